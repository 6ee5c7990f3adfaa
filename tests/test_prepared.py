"""media/prepared.py: frames by number, what is damaged or lacks something is refused, landmarks."""
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

import data
from media import landmarks, prepared
from media.files import InputError, write_lines
from media.image import from_uint8
from media.prepare import KEYFRAMES, MARGIN, margin_px
from media.video import VideoWriter

FRAMES, WIDE = 60, 40                                         # 40 pixels: the tight square has 32


def make_set(folder, clips, sound=False, **about):
    """Write a set of clips (identity, split, pictures (F, 40, 40, 3) or greys (F,)) -> its manifest."""
    (folder / "clips").mkdir()
    rows = []
    for k, (identity, split, pictures) in enumerate(clips):
        wave = 0.1 * torch.randn(len(pictures) * 640) if sound else None
        with VideoWriter(folder / f"clips/{k}.mp4", WIDE, wave, keyframes=KEYFRAMES) as video:
            for picture in pictures:
                video.write(np.broadcast_to(picture, (WIDE, WIDE, 3)).astype(np.uint8))
        rows.append({"file": f"clips/{k}.mp4", "identity": identity, "split": split, "frames": len(pictures),
                     "sound": sound, "margin": MARGIN, **about})
    write_lines(folder / "manifest.jsonl", rows)
    return rows


# ---- frames ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two prepared folders: the upper half's grey tells the frame, the lower half's green the clip; its left
    side is blue in set b."""
    folders = [tmp_path_factory.mktemp(name) for name in "ab"]
    for folder, name, clips in zip(folders, "ab", (3, 1), strict=True):
        pictures = np.zeros((clips, FRAMES, WIDE, WIDE, 3), np.uint8)
        pictures[:, :, :20] = 10 + 4 * np.arange(FRAMES)[:, None, None, None]
        pictures[:, :, 20:, :, 1] = 50 * np.arange(clips)[:, None, None, None]
        pictures[:, :, 20:, :20, 2] = 200 * (name == "b")
        make_set(folder, [(f"{name}{k}", "test" if k == 2 else "train", x) for k, x in enumerate(pictures)])
    return [str(folder) for folder in folders]


def numbers_of(pictures):
    """Which frame of its clip each picture (n, 3, H, W) is."""
    return ((pictures[:, :, 2:14].mean((1, 2, 3)) + 1) * 127.5).sub(10).div(4).round().int().tolist()


def test_frames_by_number_are_those_of_the_whole(sets):
    path = f"{sets[0]}/clips/1.mp4"
    whole, _ = prepared.read_clip(path, 32)
    asked = [7, 59, 0, 31, 30, 7]
    torch.testing.assert_close(from_uint8(prepared.read_at(path, asked, 32)), whole[asked])
    assert numbers_of(whole) == list(range(FRAMES))
    with pytest.raises(InputError, match="ends before its frame 60"):
        prepared.read_at(path, [60], 32)


@pytest.mark.parametrize("damage, words", [
    (lambda path, whole: path.unlink(), "does not exist"),
    (lambda path, whole: path.write_bytes(b""), "is empty"),
    (lambda path, whole: path.write_bytes(whole[:len(whole) // 2]), "damaged|ends before|cut off"),
    (lambda path, whole: path.write_bytes(whole.replace(b"moov", b"junk")), "not a sound or video"),
    (lambda path, whole: path.write_bytes(whole[:-3000] + bytes(3000)), "damaged|ends before|cut off"),
    (lambda path, whole: path.write_text("#EXTM3U\n#EXTINF:9,\n1.mp4\n#EXT-X-ENDLIST\n"), "not a sound"),
    (lambda path, whole: soundfile.write(path, np.zeros(16000), 16000, format="WAV"), "holds no pictures")])
def test_clips_damaged_after_their_preparation_are_named(sets, tmp_path, damage, words):
    """Also by a process that reads ahead: one sentence, no traceback within."""
    shutil.copytree(sets[1], tmp_path / "set")
    for path in (tmp_path / "set" / "clips").iterdir():
        damage(path, path.read_bytes())
    clips = data.Clips([str(tmp_path / "set")], 2, 2, 0.5, 32)
    for workers in (0, 1) if words == "is empty" else (0,):
        with pytest.raises(InputError, match=words) as error:
            list(data.loader(clips, range(20), workers))
        assert str(tmp_path / "set" / "clips") in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match=words):
        prepared.read_clip(str(path), 32)


def test_the_tight_square_is_the_middle_of_the_prepared_one(sets):
    path = f"{sets[1]}/clips/0.mp4"
    wide, tight = prepared.read_at(path, [3, 9], 32, margin=True), prepared.read_at(path, [3, 9], 32)
    assert wide.shape == (2, WIDE, WIDE, 3) and tight.shape == (2, 32, 32, 3)
    assert np.array_equal(wide[:, 4:36, 4:36], tight)
    assert [margin_px(size) for size in (32, 96, 256)] == [40, 120, 320]


def test_folders_without_what_is_asked_are_refused(sets, tmp_path):
    with pytest.raises(InputError, match="no manifest.jsonl"):
        prepared.load_set(str(tmp_path), "train")
    with pytest.raises(InputError, match="no clip of the test split"):
        prepared.load_set(sets[1], "test")
    with pytest.raises(InputError, match="no clip with sound"):
        prepared.load_set(sets[0], "train", sound=True)


ROW = {"file": "clips/a.mp4", "identity": "a", "split": "train", "frames": 9, "sound": True, "margin": MARGIN}


@pytest.mark.parametrize("change, words", [
    ({"file": "../a.mp4"}, "not a file inside the folder"),
    ({"file": "/a.mp4"}, "not a file inside the folder"),
    ({"file": "clips/../../a.mp4"}, "not a file inside the folder"), ({"file": 3}, "lacks"),
    ({"frames": 0}, "lacks"), ({"frames": 10**30}, "lacks"),
    ({"identity": None}, "lacks"), ({"split": "dev"}, "lacks"), ({"margin": 1.0}, "another framing"),
    ({"margin": None}, "another framing"),
    ({"identity": "b"}, "clips of b both in its train and in its test split")])
def test_manifests_that_cannot_be_used_are_refused(tmp_path, change, words):
    rows = [ROW, {**ROW, "identity": "b", "split": "test"}]
    write_lines(tmp_path / "manifest.jsonl", rows)
    found = prepared.load_set(str(tmp_path), "train")
    assert list(found) == ["a"] and found["a"][0]["path"] == str(tmp_path / "clips/a.mp4")
    write_lines(tmp_path / "manifest.jsonl", [*rows, {**ROW, **change}])
    with pytest.raises(InputError, match=words) as refused:
        prepared.load_set(str(tmp_path), "train")
    assert "manifest.jsonl" in str(refused.value) and ("line 3" in str(refused.value) or "both" in words)


# ---- landmarks ---------------------------------------------------------------------------------------------

@pytest.fixture
def labelled(sets, tmp_path):
    """Set b with factors that tell the frame: factor j of frame k is k + j."""
    (tmp_path / "clips").symlink_to(f"{sets[1]}/clips")
    write_lines(tmp_path / "manifest.jsonl", [json.loads(line) for line in open(f"{sets[1]}/manifest.jsonl")])
    (tmp_path / "landmarks").mkdir()
    factors = np.arange(FRAMES, dtype=np.float32)[:, None] + np.arange(len(landmarks.FACTORS),
        dtype=np.float32)
    factors[5] = np.nan                                                      # no face found
    ellipses = np.tile(np.array(landmarks.USUAL, np.float32), (FRAMES, 1, 1)) * 0.5
    ellipses[5] = np.nan
    np.savez(tmp_path / "landmarks/0.npz", factors=factors, ellipses=ellipses, reader=landmarks.READER)
    return tmp_path


def clip_of(folder):
    return prepared.load_set(str(folder), "train")["b0"][0]


def test_landmarks_are_read_where_they_are(sets, labelled):
    ellipses, factors = prepared.load_landmarks(clip_of(labelled))
    assert ellipses.shape == (FRAMES, 4, 4) and factors.shape == (FRAMES, len(landmarks.FACTORS))
    usual = np.array(landmarks.USUAL) / MARGIN                               # in the prepared square
    np.testing.assert_allclose(ellipses[4], np.array(landmarks.USUAL) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(ellipses[5], usual, rtol=1e-6)
    assert np.isnan(factors[5]).all() and factors[7, 2] == 9
    ellipses, factors = prepared.load_landmarks(clip_of(sets[1]))                # there are none
    np.testing.assert_allclose(ellipses, np.tile(usual, (FRAMES, 1, 1)), rtol=1e-6)
    assert np.isnan(factors).all()


@pytest.mark.parametrize("damage, words", [
    ("empty", "cannot be read"), ("text", "cannot be read"), ("half", "cannot be read"),
    ("other arrays", "cannot be read"), ("fewer frames", f"9 frames, not {FRAMES}"),
    ("former reader", "made by another reader; label again"),
    ("later reader", "made by another reader; label again")])
def test_broken_landmarks_are_refused(labelled, damage, words):
    path = labelled / "landmarks/0.npz"
    whole = path.read_bytes()
    if damage == "other arrays":
        np.savez(path, ellipses=np.zeros((FRAMES, 4, 4)))
    elif damage == "fewer frames":
        np.savez(path, ellipses=np.zeros((9, 4, 4)), factors=np.zeros((9, len(landmarks.FACTORS))),
                 reader=landmarks.READER)
    elif damage.endswith("reader"):
        version = {} if damage == "former reader" else {"reader": landmarks.READER + 1}
        np.savez(path, ellipses=np.zeros((FRAMES, 4, 4)), factors=np.zeros((FRAMES, len(landmarks.FACTORS))),
                 **version)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(InputError, match="landmarks/0.npz") as refused:
        prepared.load_landmarks(clip_of(labelled))
    assert words in str(refused.value) and "\n" not in str(refused.value)
