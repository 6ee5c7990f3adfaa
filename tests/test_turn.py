"""media/turn.py: displacements of known size, and the videos that are written."""
import av
import cv2
import numpy as np
import pytest

from media import turn
from media.prepare import prepare_one

SIZE, FACE = 240, 120


def points(depth=0.0):
    """A flat face of 120 pixels, points at random but for those that are used; depth: of the tip."""
    made = np.random.default_rng(0).uniform(-40, 40, (468, 3)) * (1, 1, 0)
    for k, index in enumerate(turn.OVAL):
        angle = 2 * np.pi * k / len(turn.OVAL)
        made[index, :2] = 45 * np.sin(angle), -60 * np.cos(angle)
    made[152, :2], made[234, :2], made[454, :2] = (0, 60), (-45, 0), (45, 0)
    near = np.exp(-(made[:, :2]**2).sum(1) / (2 * 15**2))
    made[:, 2] = depth * near
    return made + (120, 120, 0)


def places():
    """A picture whose red and green are x and y of the pixel."""
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.stack([x, y, np.full_like(x, 99)], 2).astype(np.uint8)


def displacement(head, **motion):
    """Where what is seen at each pixel was -> (S, S, 2): the motion of it."""
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.stack([x, y], 2) - head.turned(**motion)[..., :2].astype(float)


def test_no_motion_is_the_picture():
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert np.array_equal(turn.Head(image, points()).turned(), image)


def test_the_head_moves_and_the_border_stays():
    head = turn.Head(places(), points())
    moved = displacement(head, move=(0.05, -0.025))
    assert np.abs(moved[90:150, 90:150] - (0.05 * FACE, -0.025 * FACE)).max() <= 1
    for border in (moved[1], moved[-2], moved[:, 1], moved[:, -2]):
        assert np.abs(border).max() <= 1
    everything = displacement(head, move=(0.05, -0.025), whole=True)
    assert np.abs(everything[20:-20, 20:-20] - (0.05 * FACE, -0.025 * FACE)).max() <= 1


def test_a_turn_moves_each_point_by_its_depth():
    """The tip of a nose 40 pixels before the pivot's plane goes 40 sin(yaw) further than that plane."""
    deep, flat = turn.Head(places(), points(-40.0)), turn.Head(places(), points())
    assert deep.depth[120, 120] == pytest.approx(-40, abs=8) and abs(flat.depth[120, 120]) < 2
    yaw = 0.15
    apart = displacement(deep, yaw=yaw)[120, 120, 0] - displacement(flat, yaw=yaw)[120, 120, 0]
    assert apart == pytest.approx(np.sin(yaw) * deep.depth[120, 120], abs=1.5)
    nod = displacement(deep, pitch=yaw)[120, 120, 1] - displacement(flat, pitch=yaw)[120, 120, 1]
    assert nod == pytest.approx(-np.sin(yaw) * deep.depth[120, 120], abs=1.5)


def test_tilt_and_size_are_those_of_the_picture_plane():
    head = turn.Head(places(), points())
    tilted, grown = turn.rotation(0, 0, 0.1), np.exp(0.06) * np.eye(3)
    for motion, matrix in (({"roll": 0.1}, tilted), ({"grow": 0.06}, grown)):
        offset = np.array([150.0, 100.0]) - head.pivot[:2]
        want = matrix[:2, :2] @ offset - offset
        x, y = np.round(offset + want + head.pivot[:2]).astype(int)              # there it is to be seen
        assert np.abs(displacement(head, **motion)[y, x] - want).max() <= 1.5


def test_brows_and_corners_move_alone():
    head = turn.Head(places(), points())
    moved = displacement(head, local=[(61, -0.04, -0.03, 0.06)])
    x, y = np.round(points()[61, :2] + np.array([-0.04, -0.03]) * FACE).astype(int)
    assert np.abs(moved[y, x] - (-0.04 * FACE, -0.03 * FACE)).max() <= 1.5
    far = np.hypot(*(np.mgrid[:SIZE, :SIZE] - np.array([y, x])[:, None, None])) > 40
    assert np.abs(moved[far]).max() <= 1


def test_motions_are_drawn_apart():
    drawn = [turn.draw_motion(np.random.default_rng(seed)) for seed in range(600)]
    table = np.array([[d["yaw"], d["pitch"], d["roll"], *d["move"], d["grow"]] for d in drawn])
    assert np.abs(np.corrcoef(table.T) - np.eye(6)).max() < 0.15
    assert (np.abs(table).max(0) <= [0.24, 0.2, 0.12, 0.07, 0.07, 0.08]).all() and (table == 0).any(0).all()


@pytest.fixture
def readers(monkeypatch):
    """Small videos, and readers that see the face of `points` in all but black pictures."""
    monkeypatch.setattr(turn, "SIZE", 96)

    def find(image):
        return points() * (len(image) / SIZE) if image.any() else None

    monkeypatch.setattr(turn, "open_readers", lambda: (find, None, None, None))
    monkeypatch.setattr(turn, "read_mesh", lambda image, found, mesh: found)


def picture(path, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(1).integers(80, 180, (6, 6, 3), dtype=np.uint8)
    image = cv2.resize(image, (120, 120), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(path), image if value is None else np.full_like(image, value))


def test_every_picture_becomes_a_video_that_prepare_takes(tmp_path, readers, capsys):
    picture(tmp_path / "in" / "anna" / "one.png")
    picture(tmp_path / "in" / "bert.jpg")
    picture(tmp_path / "in" / "black.png", 0)
    turn.write_video(str(tmp_path / "in" / "anna" / "film.mp4"),
                     [np.full((96, 96, 3), 50 + k, np.uint8) for k in range(30)])
    assert turn.main(["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.mp4"))
    assert names == ["anna/film.mp4-0.mp4", "anna/film.mp4-1.mp4", "anna/film.mp4-2.mp4",
                     "anna/film.mp4-3.mp4", "anna/one.png-0.mp4", "bert/bert.jpg-0.mp4"]
    assert "6 videos" in capsys.readouterr().out
    with av.open(str(tmp_path / "out" / "bert" / "bert.jpg-0.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == turn.FRAMES and frames[0].shape == (turn.SIZE, turn.SIZE, 3)
    changes = [np.abs(frame - frames[0]).mean() for frame in frames[1:]]
    assert min(changes) > 0.1 and np.median(changes) > 1
    (tmp_path / "set" / "clips").mkdir(parents=True)
    video, out = tmp_path / "out" / "bert" / "bert.jpg-0.mp4", str(tmp_path / "set")
    made = prepare_one(str(video), "bert.jpg-0.mp4", {}, out, 64, "centre")
    assert [clip["frames"] for clip in made["kept"]] == [turn.FRAMES] and not made["dropped"]


def test_a_seed_repeats_the_motions(tmp_path, readers, monkeypatch):
    picture(tmp_path / "in" / "a.png")
    made = []
    monkeypatch.setattr(turn, "write_video", lambda path, frames: made.append(np.stack(frames)))
    for seed in ("0", "0", "1"):                                # nothing is written, so nothing is kept
        turn.main(["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--seed", seed])
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


def test_videos_of_an_earlier_run_are_kept(tmp_path, readers, capsys):
    picture(tmp_path / "in" / "a.png")
    command = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert turn.main(command) == 0
    video = tmp_path / "out" / "a" / "a.png-0.mp4"
    video.write_bytes(b"as it is")
    assert turn.main(command) == 0 and video.read_bytes() == b"as it is"
    assert capsys.readouterr().out.count("1 of 1 files, 1 videos") == 2


@pytest.mark.parametrize("make, words", [
    (lambda folder: None, "no picture and no video below"),
    (lambda folder: folder.rmdir(), "is not a folder"),
    (lambda folder: picture(folder / "black.png", 0), "no face in any of them"),
    (lambda folder: (folder / "broken.png").write_bytes(b"no picture"), "is not a picture that can be read"),
    (lambda folder: (folder / "broken.mp4").write_bytes(b"no film"), "is not a sound or video"),
])
def test_bad_input_is_one_sentence(tmp_path, readers, capsys, make, words):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    assert turn.main(["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else True
