"""data.py: batches are functions of their number."""

import numpy as np
import pytest
import torch

import data
from media.files import InputError, write_lines
from media.image import from_uint8
from media.prepare import KEYFRAMES
from media.video import VideoWriter

torch.set_num_threads(1)


# ---- batches --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two prepared folders: the upper half's grey tells the frame, the lower half's green the clip and its blue left side set b."""
    made = []
    for name, clips in (("a", 3), ("b", 1)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "clips").mkdir()
        lines = []
        for clip in range(clips):
            picture = np.zeros((32, 32, 3), np.uint8)
            with VideoWriter(folder / f"clips/{clip}.mp4", 32, keyframes=KEYFRAMES) as out:
                for k in range(60):
                    picture[:16], picture[16:, :, 1], picture[16:, :16, 2] = 10 + 4 * k, 50 * clip, 200 * (name == "b")
                    out.write(picture)
            lines.append({"file": f"clips/{clip}.mp4", "identity": f"{name}{clip}", "split": "test" if clip == 2 else "train",
                          "frames": 60, "sound": False})
        write_lines(folder / "manifest.jsonl", lines)
        made.append(str(folder))
    return made


def numbers_of(pictures):
    """Which frame of its clip each picture (n, 3, H, W) is."""
    return ((pictures[:, :, 2:14].mean((1, 2, 3)) + 1) * 127.5).sub(10).div(4).round().int().tolist()


def test_frames_by_number_are_those_of_the_whole(sets):
    path = f"{sets[0]}/clips/1.mp4"
    whole, _ = data.read_clip(path, 32)
    asked = [7, 59, 0, 31, 30, 7]
    torch.testing.assert_close(from_uint8(data.read_at(path, asked, 32)), whole[asked])
    assert numbers_of(whole) == list(range(60))
    with pytest.raises(InputError, match="ends before its frame 60"):
        data.read_at(path, [60], 32)


def test_a_batch_is_a_function_of_its_number(sets):
    clips = data.Clips(sets, 4, 2, 0.5, 32)
    assert all(torch.equal(x, y) for x, y in zip(clips[5], data.Clips(sets, 4, 2, 0.5, 32)[5], strict=True))
    seen = {numbers_of(clips[k][0])[0] for k in range(30)}
    assert len(seen) > 10 and not torch.equal(clips[5][0], data.Clips(sets, 4, 2, 0.5, 32, seed=1)[5][0])
    one, two = ([x[0] for x in data.loader(clips, [3, 4, 5], workers)] for workers in (0, 2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True)) and torch.equal(one[2], clips[5][0])


def test_near_people_are_shown_within_a_fifth_of_a_second(sets):
    clips = data.Clips(sets, 4, 3, 0.5, 32, jitter=0)
    far = []
    for k in range(20):
        first, others = (numbers_of(x) for x in clips[k])
        gaps = [abs(other - first[n // 3]) for n, other in enumerate(others)]
        assert max(gaps[:6]) <= 5
        far += gaps[6:]
    assert max(far) > 30


def test_the_video_stage_gets_frames_in_a_row(sets):
    clips = data.Clips(sets, 2, 6, 0, 32, rows=True, jitter=0)
    for k in range(10):
        for clip in torch.tensor(numbers_of(clips[k][1])).view(2, 6):
            assert (clip.diff() == 1).all()


def test_sets_are_drawn_equally_and_test_people_never(sets):
    clips = data.Clips(sets, 1, 1, 0, 32, jitter=0)
    pictures = torch.cat([clips[k][0] for k in range(80)])
    of_b = (pictures[:, 2, 20:].amax((1, 2)) > 0).float().mean()
    assert of_b == pytest.approx(0.5, abs=0.15)                              # one clip against two
    assert ((pictures[:, 1, 20:].mean((1, 2)) + 1) * 127.5).max() < 75       # green 100: the clip of the test person
    held = data.Clips(sets[:1], 1, 1, 0, 32, split="test", jitter=0)
    assert ((held[0][0][:, 1, 20:].mean() + 1) * 127.5) > 85


def test_flip_and_colour_are_one_for_all_pictures_of_a_person(sets):
    clips = data.Clips(sets[1:], 1, 2, 0, 32, jitter=0.2)
    flipped, tints = set(), set()
    for k in range(12):
        x = torch.cat(clips[k])
        side = (x[:, 2, 24, 8] > x[:, 2, 24, 24]).tolist()                   # set b: blue on the left
        assert len(set(side)) == 1
        flipped.add(side[0])
        blue = x[:, 2, 20:].amax((1, 2))
        assert blue.max() - blue.min() < 0.03
        tints.add(round(blue[0].item(), 2))
    assert flipped == {True, False} and len(tints) > 5


def test_folders_without_what_is_asked_are_refused(sets, tmp_path):
    with pytest.raises(InputError, match="no manifest.jsonl"):
        data.load_sets([str(tmp_path)], "train")
    with pytest.raises(InputError, match="no clip of the test split"):
        data.load_sets(sets[1:], "test")
    with pytest.raises(InputError, match="no clip with sound"):
        data.load_sets(sets, "train", sound=True)
    rows = [{"identity": who, "split": split, "file": "x.mp4", "sound": True}
            for who, split in (("a", "train"), ("b", "test"), ("b", "train"))]
    write_lines(tmp_path / "manifest.jsonl", rows)
    with pytest.raises(InputError, match="clips of b both in its train and in its test split"):
        data.load_sets([str(tmp_path)], "train")
