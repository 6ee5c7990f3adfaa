"""media/landmarks.py: labels read by networks of known answers, and the files they are written to."""
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from media import landmarks
from media.files import InputError, write_lines
from media.prepare import MARGIN
from media.prepared import load_landmarks, load_set
from media.video import VideoWriter


def face(centre=(128, 128), side=100, turn=0.2, seed=0):
    """Mesh points of a face that nobody has, but with a right order of corners: (468, 3)."""
    points = np.random.default_rng(seed).uniform(-0.4, 0.4, (468, 3))
    for index, place in {10: (0, -0.5), 152: (0, 0.5), 234: (-0.45, 0), 454: (0.45, 0), 33: (-0.3, -0.2),
                         133: (-0.1, -0.2), 362: (0.1, -0.2), 263: (0.3, -0.2)}.items():
        points[index, :2] = place
    cos, sin = np.cos(turn), np.sin(turn)
    points[:, :2] = points[:, :2] @ np.array([[cos, sin], [-sin, cos]])
    return side * points + (*centre, 0)


def places(size):
    """A picture whose red and green are x and y of the pixel."""
    y, x = np.mgrid[:size, :size]
    return np.stack([x, y, np.full_like(x, 99)], 2).astype(np.uint8)


def matrix_of(square, size):
    """Find by the colours of a cut of `places` where its pixels were: (2, 3), x and y of (x, y, 1)."""
    y, x = np.mgrid[:len(square), :len(square)]
    inside = ((square[..., :2] > 0) & (square[..., :2] < size - 1)).all(2)           # not the repeated border
    here = np.stack([x, y, np.ones_like(x)], 2)[inside]
    return np.linalg.lstsq(here, square[..., :2][inside].astype(float), rcond=None)[0].T


def mesh_network(truth, size, errors=None, presence=1.0):
    """A network that finds `truth` in any cut of `places`, but for errors in its own pixels at each call."""
    calls = []

    def run(square):
        matrix = matrix_of(square, size)
        error = np.zeros(2) if errors is None else errors[len(calls)]
        calls.append(matrix[:, :2] @ error)                                 # the error in the picture
        flat = np.linalg.solve(matrix[:, :2], (truth[:, :2] - matrix[:, 2]).T).T + error
        depth = truth[:, 2:] * 192 / (192 * np.linalg.det(matrix[:, :2]) ** 0.5)
        return np.hstack([flat, depth]).ravel(), np.array([presence])
    return run, calls


@pytest.mark.parametrize("size, centre", [(256, (128, 128)), (256, (200, 60)), (120, (60, 62))])
def test_the_mesh_is_the_mean_of_crops_wherever_the_face_was(size, centre):
    """Also at the border, from points of the frame before, and in a frame of another size."""
    truth = face(centre, side=0.4 * size)
    before = face((centre[0] + 0.04 * size, centre[1] - 0.03 * size), side=0.44 * size, turn=0.1)
    network, calls = mesh_network(truth, size)
    np.testing.assert_allclose(landmarks.read_mesh(places(size), before, network), truth, atol=0.15)
    assert len(calls) == 1 + len(landmarks.JITTER)
    errors = np.random.default_rng(1).normal(0, 4, (len(calls), 2))
    errors[0] = 0                                               # else the other crops were of another place
    network, calls = mesh_network(truth, size, errors)
    moved = landmarks.read_mesh(places(size), before, network) - truth
    np.testing.assert_allclose(moved[:, :2], np.tile(np.mean(calls, 0), (468, 1)), atol=0.15)


def test_lids_are_gaps_of_the_contour_by_its_width():
    """Gaps of 4, 6 and 8 px in an eye of 20 px; one eye is cut as it is, the other mirrored."""
    contour, seen = np.full((71, 3), 77.0), []
    contour[:16, :2] = [(k if k < 9 else k - 8, 0) for k in range(16)]
    contour[[0, 8], 0] = -10, 10
    contour[[3, 4, 5], 1], contour[[11, 12, 13], 1] = (2, 3, 4), (-2, -3, -4)
    points = face(turn=0)

    def iris(square):
        seen.append(square)
        return contour.ravel(), np.zeros(15)

    assert landmarks.read_lids(places(256), points, iris) == pytest.approx([0.3, 0.3])
    step = 2.3 * 20 / 64                                    # eyes of 20 px in squares of 2.3 times as much
    for square, x, direction in ((seen[0], 108, 1), (seen[1], 148, -1)):
        assert square.shape == (64, 64, 3)
        want = [[direction * step, 0, x - 32 * direction * step], [0, step, 108 - 32 * step]]
        np.testing.assert_allclose(matrix_of(square, 256), want, atol=0.4)
        np.testing.assert_allclose(matrix_of(square, 256)[:, :2], np.array(want)[:, :2], atol=0.01)


def test_lips_are_means_of_both_readers():
    """dlib's points: gaps of 9, 12 and 15 px, corners 40 px apart, in a face 100 px high."""
    parts, boxes = np.zeros((68, 2)), []
    parts[[67, 66, 65], 1], parts[54] = (9, 12, 15), (24, 32)
    truth = face(turn=0)
    truth[[13, 14], :2], truth[[61, 291], :2] = ((128, 150), (128, 158)), ((118, 154), (148, 154))

    def predict(_, box):
        boxes.append(box)
        return parts

    frames, iris = [places(256)], lambda _: (np.arange(213.0),)
    given = lambda _: truth, mesh_network(truth, 256)[0], iris
    _, alone = landmarks.read_frames(frames, *given)
    _, both = landmarks.read_frames(frames, *given, predict)
    assert alone[0, :2] == pytest.approx([0.08, 0.30], abs=2e-3)
    assert both[0, :2] == pytest.approx([(0.08 + 0.12) / 2, (0.30 + 0.40) / 2], abs=2e-3)
    np.testing.assert_array_equal(alone[0, 2:], both[0, 2:])
    left, top, right, bottom = np.array(boxes).T
    np.testing.assert_allclose(right - left, bottom - top)
    assert len(boxes) == len(landmarks.JITTER) and np.ptp(left) > 2
    assert np.mean(left + right) / 2 == pytest.approx(128, abs=1)
    assert np.mean(right - left) == pytest.approx(95, rel=0.05)              # as dlib's own detector would


def test_a_face_is_searched_at_first_and_where_it_was_lost():
    truth, blank = face(), np.zeros((256, 256, 3), np.uint8)
    searched = []

    def find(image):
        searched.append(image is not blank)
        return truth if image.any() else None

    network = mesh_network(truth, 256)[0]
    points, factors = landmarks.read_frames(
        [places(256), places(256), blank, blank, places(256), places(256)], find,
        lambda square: network(square) if square.any() else (np.zeros(1404), np.array([-1.0])),
        lambda _: (np.arange(213.0),))
    assert searched == [True, False, False, True]
    lost = np.isnan(factors).all(1)
    assert lost.tolist() == np.isnan(points).all((1, 2)).tolist() == [False, False, True, True, False, False]
    assert np.isfinite(factors[~lost]).all()
    np.testing.assert_allclose(factors[~lost, 6], 0.2, atol=2e-3)                                       # roll


# ---- files -------------------------------------------------------------------------------------------------

@pytest.fixture
def prepared(tmp_path):
    """A set of one clip of three frames; readers that see the same face in each."""
    (tmp_path / "clips").mkdir()
    with VideoWriter(tmp_path / "clips/a.mp4", 80) as writer:
        for _ in range(3):
            writer.write(places(80))
    write_lines(tmp_path / "manifest.jsonl", [{"file": "clips/a.mp4", "identity": "a", "split": "train",
                                               "frames": 3, "sound": False, "margin": MARGIN}])
    def mesh(_):
        return face((96, 96), 130).ravel(), np.ones(1)
    return tmp_path, (lambda _: face((40, 40), 50), mesh, lambda _: (np.arange(213.0),), None)


def test_labels_are_what_training_reads_and_are_made_once(prepared):
    folder, readers = prepared
    landmarks.label(str(folder), readers)
    path = folder / "landmarks/a.npz"
    first, made = path.read_bytes(), path.stat().st_mtime_ns
    clip = load_set(str(folder), "train")["a"][0]
    ellipses, factors = load_landmarks(clip)
    assert factors.shape == (3, 10) and np.isfinite(factors).all() and ellipses.shape == (3, 4, 4)
    np.testing.assert_allclose(ellipses[0, 3, :2], 0, atol=0.1)                 # middle of the face
    landmarks.label(str(folder), readers)
    assert path.stat().st_mtime_ns == made
    for damaged in (b"", first[:-90]):
        path.write_bytes(damaged)
        landmarks.label(str(folder), readers)
        assert path.read_bytes() == first                                   # the same bytes again
    np.savez(path, factors=factors, ellipses=ellipses)                      # of the former reader
    with pytest.raises(InputError, match="label again"):
        load_landmarks(clip)
    landmarks.label(str(folder), readers)
    assert path.read_bytes() == first


def test_a_damaged_clip_is_refused_and_leaves_nothing(prepared):
    folder, readers = prepared
    whole = (folder / "clips/a.mp4").read_bytes()
    for content in (b"junk", whole[: len(whole) // 2]):
        (folder / "clips/a.mp4").write_bytes(content)
        with pytest.raises(InputError, match="clips/a.mp4 is"):
            landmarks.label(str(folder), readers)
        assert list((folder / "landmarks").iterdir()) == []


@pytest.mark.parametrize("package", ["mediapipe", "ai_edge_litert"])
def test_missing_packages_are_one_sentence(prepared, package, monkeypatch, capsys):
    for name in ("mediapipe", "mediapipe.python.solutions.face_mesh"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__file__="x/__init__.py", FaceMesh=None))
    for name in {"mediapipe": ("mediapipe.python.solutions.face_mesh",),
                 "ai_edge_litert": ("ai_edge_litert", "ai_edge_litert.interpreter")}[package]:
        monkeypatch.setitem(sys.modules, name, None)
    assert landmarks.main(["--data", str(prepared[0])]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "needs mediapipe==0.10.21 and ai-edge-litert" in told and package in told
    assert not (prepared[0] / "landmarks").exists()


def test_the_file_of_dlib_is_checked(tmp_path, monkeypatch):
    path = tmp_path / "points.dat"
    with pytest.raises(InputError, match="does not exist; give shape_predictor_68"):
        landmarks.open_predictor(path)
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(InputError, match="pip install dlib-bin"):
        landmarks.open_predictor(path)

    def refuse(_):
        raise RuntimeError("Unable to open")

    for shape_predictor, words in ((refuse, "no file of dlib"),
                                   (lambda _: lambda *_: SimpleNamespace(parts=lambda: []), "dlib's 68")):
        dlib = SimpleNamespace(shape_predictor=shape_predictor, rectangle=lambda *box: box)
        monkeypatch.setitem(sys.modules, "dlib", dlib)
        with pytest.raises(InputError, match=words):
            landmarks.open_predictor(path)


@pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in ("mediapipe", "ai_edge_litert")),
                    reason="MediaPipe is not installed (requirements-measure.txt)")
def test_the_networks_read_a_drawn_face_and_an_empty_frame():
    portrait = Image.open(Path(__file__).parents[1] / "examples" / "portrait.png").convert("RGB")
    readers = landmarks.open_readers()
    for size in (128, 256, 600):
        frames = [np.zeros((size, size, 3), np.uint8), *[np.asarray(portrait.resize((size, size)))] * 2]
        points, factors = landmarks.read_frames(frames, *readers)
        assert np.isnan(points[0]).all() and np.isnan(factors[0]).all() and np.isfinite(factors[1:]).all()
        assert (0 <= factors[1:, 0]).all() and (0.2 < factors[1:, 1]).all() and (factors[1:, 2:4] > 0.1).all()
        np.testing.assert_allclose(factors[1], factors[2], atol=0.02)
        np.testing.assert_array_equal(landmarks.read_frames(frames, *readers)[1], factors)
