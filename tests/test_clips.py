"""measure/clips.py: which clips are measured, and tables whose numbers are known."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from measure import clips, perceptual
from measure.clips import NAMES, Row
from world.people import HELD_OUT, random_clip
from world.render import render


def arguments(**given):
    return SimpleNamespace(**{"data": None, "clips": 2, "command": "probe", "landmarks": None,
                              "networks": None, "reader": "reader", **given})


@pytest.fixture
def real(monkeypatch):
    """A set of three people with 2, 1 and 1 clips; pictures of clip k are k / 10, its sound is k."""
    people = {name: [{"path": k, "file": f"clips/{k}.mp4", "identity": name} for k in numbers]
              for name, numbers in (("b", (0, 1)), ("a", (2,)), ("c", (3,)))}
    monkeypatch.setattr(clips.prepared, "load_set", lambda folder, split, sound: people)
    monkeypatch.setattr(clips.prepared, "read_clip", lambda path, size: (
        torch.full((9, 3, size, size), path / 10), torch.full((9 * 640,), float(path))))
    return people


# ---- clips -------------------------------------------------------------------------------------------------

def test_synthetic_clips_are_held_out_and_as_drawn():
    first, second = clips.test_clips(arguments(command="probe"), 16)
    assert (first.number, first.id, second.id) == (0, HELD_OUT, HELD_OUT + 1)
    drawn = random_clip(torch.tensor([HELD_OUT + 1]), clips.FRAMES["probe"])
    want = render(drawn["identity"].expand(8, -1), drawn["motion"][0], 16)
    assert torch.equal(second.images, want) and torch.equal(second.motion, drawn["motion"][0])
    assert torch.equal(second.wave, drawn["wave"]) and second.box.shape == (8, 16, 16)


def test_real_clips_are_cut_with_their_sound_and_face(real):
    real["a"][0]["face"] = (0.25, 0.0, 0.75, 0.5)
    found = {c.id: c for c in clips.test_clips(arguments(data="set", clips=9), 16, sound=True)}
    assert list(found) == [f"clips/{k}.mp4" for k in (2, 0, 1, 3)]                   # people by name
    clip = found["clips/2.mp4"]
    assert clip.person == "a" and clip.images.shape == (8, 3, 16, 16) and clip.motion is None
    assert clip.wave.shape == (1, 8 * 640) and (clip.wave == 2).all()
    assert clip.box.sum((1, 2)).tolist() == [64] * 8 and clip.box[0, :8, 4:12].all()
    assert found["clips/3.mp4"].face == perceptual.FACE


def test_emotions_take_one_clip_of_a_person(real):
    found = clips.test_clips(arguments(data="set", clips=9, command="emotion"), 16)
    assert [c.id for c in found] == ["clips/2.mp4", "clips/0.mp4", "clips/3.mp4"]


# ---- tables ------------------------------------------------------------------------------------------------

def measure(rows_of, args, monkeypatch, read=lambda x: torch.zeros(len(x), len(NAMES))):
    monkeypatch.setattr(clips.reader, "load_regressor", lambda path: read)
    config = SimpleNamespace(patch_size=8)
    checkpoint = SimpleNamespace(meta={"size": 16}, device=torch.device("cpu"),
                                 space=SimpleNamespace(factor=1), decoder=SimpleNamespace(config=config))
    return clips.picture_metrics(args, checkpoint, rows_of)


def test_a_person_with_more_clips_counts_once(real, monkeypatch, capsys):
    """Pictures are brighter by 0.2 in b's two clips, by 0.1 in the others; L1 of values from 0 to 1."""
    def rows_of(c, earlier):
        assert len(earlier) == c.number
        return [Row("ours", c.images + (0.2 if c.person == "b" else 0.1), c.images, c.box)]

    result = measure(rows_of, arguments(data="set", clips=9), monkeypatch)
    assert result.rows["ours"]["l1"]["mean"] == pytest.approx((0.2 + 0.1 + 0.1) / 3 / 2, rel=1e-4)
    assert result.read == {} and len(result.clips) == 4 and result.read_motion is None
    assert "4 clips of 3 unseen people of set, 16 px" in capsys.readouterr().out


def test_motion_is_read_where_it_is_known(monkeypatch, capsys):
    seen = []

    def read(pictures):
        seen.append(pictures)
        return pictures[:, 0, 0, :1] * torch.ones(len(NAMES))

    def rows_of(c, earlier):
        return [Row("ours", c.images, c.images, c.box, c.motion), Row(clips.SILENCE, c.images)]

    result = measure(rows_of, arguments(), monkeypatch, read)
    assert len(seen) == 2 and [len(x) for x in result.read["ours"]] == [8, 8]
    assert set(result.rows) == {"ours"} and result.rows["ours"]["psnr"]["mean"] >= 99
    table = clips.motion_table(result, ["jaw"])
    assert set(table["ours"]) == set(NAMES) and "jaw" in capsys.readouterr().out
    assert clips.motion_table(SimpleNamespace(read={}, commanded={})) == {}


def test_frechet_distances_of_true_frames_are_of_every_other_clip(capsys):
    """Features whose distance is known: means 0 and 3, no spread."""
    def clip(value, other):
        return {"FID": [torch.full((4, 2), float(x)) for x in (value, other)], "csim": value}

    by_network = {"true frames": [clip(0, 0), clip(3, 3)], "ours": [clip(1, 1), clip(1, 1)]}
    rows = {}
    clips.networks_table(by_network, rows)
    assert rows["true frames"]["fid"] == pytest.approx(18, abs=1e-3)
    assert rows["ours"]["fid"] == pytest.approx(0, abs=1e-3) and rows["ours"]["csim"]["mean"] == 1
    assert "(n=1 clips: few)" in capsys.readouterr().out


def test_silence_belongs_to_the_row_ours(monkeypatch):
    """What the mesh reads: the brightness; rows of the photo's own frame are left out."""
    curves = []

    def read_faces(args, parts):
        curves.extend(len(x) for x in parts)
        return [{"opening": x[:, 0, 0, 0].numpy()} for x in parts]

    monkeypatch.setattr(clips, "read_faces", read_faces)
    monkeypatch.setattr(clips.landmarks, "scores", lambda true, read: {"n": len(true["opening"])})
    monkeypatch.setattr(clips.landmarks, "silence", lambda read, true: {"silence": float(np.mean(read))})
    c = SimpleNamespace(large=torch.zeros(8, 3, 4, 4))
    rows = [Row("ours", torch.zeros(6, 3, 4, 4), numbers={"seam": 5}),
            Row(clips.SILENCE, torch.ones(3, 3, 4, 4)),
            Row("the same with frame 0", torch.zeros(1, 3, 4, 4))]
    scores = clips.landmark_scores(arguments(command="talk"), c, rows)
    assert scores == {"ours": {"n": 6, "seam": 5, "silence": 1.0}} and curves == [8, 6, 3]
    curves.clear()
    clips.landmark_scores(arguments(command="reconstruct"), c, rows[:1])
    assert curves == [7, 6]                                                          # without the photo
