"""measure/evaluate.py: the commands, on models whose answer is known."""
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_prepared import make_set

from decoder import Decoder, DecoderConfig
from encoder import EncoderConfig, MotionEncoder
from generator import Generator, GeneratorConfig
from measure import checkpoint, clips, evaluate, landmarks, perceptual, reader
from media.video import VideoWriter
from media.weights import save_weights
from world.people import HELD_OUT, random_clip
from world.render import MOTION

META = {"size": 32, "audio": "mel", "latents": "pixel", "steps": 1, "gen_steps": 2, "guidance": 1.5}
NAMES = list(MOTION)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Small untrained releases, with and without a generator, and an untrained reader."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 1, "token_dim": 8}
    models = {"encoder": MotionEncoder(EncoderConfig(**shape)),
              "decoder": Decoder(DecoderConfig(**shape, tokens_per_motion=2))}
    save_weights(folder / "ae.safetensors", models, META)
    models["generator"] = Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=1, window=8, past=4,
                                                    lookahead=1))
    save_weights(folder / "w.safetensors", models, META)
    reader.save_regressor(folder / "r.safetensors", reader.FactorRegressor())
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for command, frames in {"reconstruct": 5, "probe": 2, "masked": 5, "talk": 12, "steps": 16}.items():
        monkeypatch.setitem(clips.FRAMES, command, frames)


def run(given, command, *more, ckpt="w.safetensors"):
    names = ["--ckpt", str(given / ckpt), "--reader", str(given / "r.safetensors")]
    return evaluate.main([command, *names, "--device", "cpu", *more])


def refused(capsys, status, *words):
    """Status 2, one line on stderr that holds the words."""
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and error.startswith("measure.evaluate: ")
    assert all(word in error for word in words), error


def still(checkpoint, photo, tokens, *_):
    """A decoder that copies the photo."""
    return photo.expand(len(tokens), -1, -1, -1)


def still_video(frames=None):
    """An animate() that copies the photo, `frames` times or as long as the sound."""
    def animate(checkpoint, photo, wave, *_):
        n = frames or wave.shape[1] // 640
        return photo.expand(n, -1, -1, -1), torch.zeros(n, 8)
    return animate


# ----------------------------------------------------------------------------------------------- the commands
def test_a_perfect_decoder_is_measured_as_perfect(given, monkeypatch, capsys):
    shown = []                                                   # A's frames, then B's photo and B moved as A
    render_batched = evaluate.render_batched
    for module in (clips, evaluate):
        monkeypatch.setattr(module, "render_batched",
                            lambda *given: shown.append(render_batched(*given)) or shown[-1])
    monkeypatch.setattr(evaluate, "decode_clip", lambda *_: shown[-1])
    assert run(given, "reconstruct", "--clips", "2", "--json", str(given / "o.json")) == 0
    found = json.loads((given / "o.json").read_text())
    for name in ("true frames", "ours, 1 step", "ours, 4 steps", "the same with frame 0", "B as A, 1 step"):
        row = {k: v["mean"] for k, v in found["rows"][name].items()}
        assert row == pytest.approx({"psnr": 100, "ssim": 1, "l1": 0, "face_psnr": 100, "face_ssim": 1,
                                     "face_l1": 0, "sharpness": 1, "blockiness": 1}, abs=1e-4)
    assert found["motion_correlation"]["ours, 1 step"] == found["motion_correlation"]["true frames"]
    assert found["rows"]["copy the photo"]["psnr"]["mean"] < 50 and found["ids"] == [HELD_OUT, HELD_OUT + 1]


def test_copying_is_measured_as_copying(given, monkeypatch):
    monkeypatch.setattr(evaluate, "decode_clip", still)
    assert run(given, "reconstruct", "--clips", "2", "--steps", "4", "--json", str(given / "o.json")) == 0
    rows = json.loads((given / "o.json").read_text())["rows"]
    assert list(rows) == ["true frames", "ours, 4 steps", "the same with frame 0", "copy the photo",
                          "B as A, 4 steps", "copy B's photo"]
    assert rows["ours, 4 steps"] == rows["copy the photo"]
    assert rows["B as A, 4 steps"] == rows["copy B's photo"]
    psnr = {name: row["psnr"]["mean"] for name, row in rows.items()}
    assert psnr["the same with frame 0"] == pytest.approx((4 * psnr["copy the photo"] + 100) / 5, abs=1e-3)
    assert run(given, "masked", "--clips", "2", "--json", str(given / "m.json")) == 0
    masked = json.loads((given / "m.json").read_text())["rows"]
    assert masked["90% masked"] == masked["copy the photo"] == rows["copy the photo"]


def test_masks_take_from_the_token_what_they_hide(given, monkeypatch):
    ratios = []

    def first_patches(n, count, ratio, rng):
        ratios.append(ratio)
        return torch.arange(count)[None].expand(n, -1)[:, : round(count * (1 - ratio))]

    monkeypatch.setattr(checkpoint, "random_masking", first_patches)
    assert run(given, "masked", "--clips", "1", "--json", str(given / "m.json")) == 0
    rows = json.loads((given / "m.json").read_text())["rows"]
    assert ratios == [0.3, 0.5, 0.7, 0.9]
    assert list(rows) == [*(f"{r}% masked" for r in (0, 30, 50, 70, 90)), "copy the photo"]


@pytest.fixture
def grey(tmp_path):
    """A folder as data.py prepare makes it: a train person and two test people, grey, all frames but the
    first brighter."""
    steps = [("a", "train", 90), ("b", "test", 10), ("b", "test", 20), ("c", "test", 40)]
    make_set(tmp_path, [(person, split, [100] + 7 * [100 + step]) for person, split, step in steps],
             sound=True, face=[0, 0, 0.5, 0.5])
    return tmp_path


def test_real_people_are_the_test_split_averaged_by_person(given, grey, monkeypatch):
    monkeypatch.setattr(evaluate, "decode_clip", lambda *given: still(*given) + 0.1)
    assert run(given, "reconstruct", "--data", str(grey), "--json", str(grey / "out.json")) == 0
    report = json.loads((grey / "out.json").read_text())
    assert report["ids"] == ["clips/1.mp4", "clips/2.mp4", "clips/3.mp4"]
    assert "B as A, 1 step" not in report["rows"]
    copy, ours = report["rows"]["copy the photo"], report["rows"]["ours, 1 step"]
    assert copy["l1"]["mean"] == pytest.approx((15 + 40) / 2 / 255, abs=1.5 / 255)
    psnr = [-10 * math.log10(error / 255**2) for error in (10 * 20, 40**2)]
    assert copy["psnr"]["mean"] == pytest.approx(sum(psnr) / 2, abs=0.5)
    assert ours["l1"]["mean"] == pytest.approx(((2.75 + 7.25) / 2 + 27.25) / 2 / 255, abs=1.5 / 255)
    assert copy["face_l1"]["mean"] == pytest.approx(copy["l1"]["mean"], abs=1e-3)


def test_a_part_of_the_clips_is_drawn_by_chance_not_by_the_alphabet(grey):
    args = SimpleNamespace(data=str(grey), clips=1, command="talk", landmarks=None)
    assert [clip.id for clip in evaluate.test_clips(args, 32)] == ["clips/3.mp4"]


def test_real_people_speak_with_their_own_and_with_another_sound(given, grey, monkeypatch):
    waves = []
    monkeypatch.setattr(evaluate, "animate", lambda *given: waves.append(given[2]) or still_video(6)(*given))
    assert run(given, "talk", "--data", str(grey), "--json", str(grey / "out.json")) == 0
    rows = json.loads((grey / "out.json").read_text())["pictures"]
    assert [wave.shape for wave in waves] == 5 * [(1, 8 * 640)]             # the first clip has no other
    assert torch.equal(waves[0], waves[2]) and torch.equal(waves[1], waves[4])
    assert not torch.equal(waves[0], waves[1])
    assert rows["true frames"]["psnr"]["mean"] == 100 and list(rows)[:2] == ["true frames", "ours"]
    brighter = 5 / 6                                                        # of the 6 frames compared
    assert rows["ours"]["l1"]["mean"] == pytest.approx((15 + 40) / 2 * brighter / 255, abs=1.5 / 255)


def test_faces_are_read_beside_ceiling_and_floor(given, grey, monkeypatch, capsys):
    """A stand-in for the face mesh, to which brightness is the opening of the mouth; decoded frames follow at
    0.1 of it."""
    calls = []

    def read(frames, python):
        calls.append((frames.shape, python))
        light = frames.astype(float).mean((1, 2, 3))
        return {k: light if k == "opening" else np.full(len(light), np.nan) for k in landmarks.FACTORS}

    monkeypatch.setattr(landmarks, "read", read)
    monkeypatch.setattr(landmarks, "LEAST", 3)
    for k, path in enumerate(sorted((grey / "clips").iterdir())):           # brightness goes up and down
        with VideoWriter(path, 40, sound=0.1 * torch.randn(12 * 640)) as video:
            for n in range(12):
                video.write(np.full((40, 40, 3), 100 + 10 * k + 40 * (n % 4 > 1), np.uint8))
    monkeypatch.setattr(evaluate, "encode", lambda checkpoint, images: images.mean((1, 2, 3))[:, None])
    monkeypatch.setattr(evaluate, "decode_clip", lambda checkpoint, photo, tokens, *_:
                        (photo - photo.mean() + 0.1 * tokens[:, :, None, None]).expand(-1, 3, -1, -1))
    nets = {"csim": lambda photo, frames, face: photo.mean() - frames.mean((1, 2, 3))}
    monkeypatch.setattr(perceptual, "load", lambda *_: (nets, []))
    monkeypatch.setitem(evaluate.FRAMES, "talk", 12)
    out = ["--json", str(grey / "out.json"), "--networks", str(grey)]
    assert run(given, "reconstruct", "--data", str(grey), "--landmarks", "python-of-the-mesh", *out) == 0
    report = json.loads((grey / "out.json").read_text())
    rows = report["landmarks"]
    assert [shape[0] for shape, _ in calls] == [5 * 11, 5 * 11, 6 * 11]  # another person is before the last
    assert {python for _, python in calls} == {"python-of-the-mesh"}
    want = {"true frames": [1, 1], "ours, 1 step": [1, 0.1], "ours, 4 steps": [1, 0.1],
            "another person": [1, 0.1], "copy the photo": [0, 0]}
    read_back = {name: [entry["opening_" + k]["value"] for k in ("correlation", "amplitude")]
                 for name, entry in rows.items()}
    assert read_back == {name: pytest.approx(x, abs=0.03) for name, x in want.items()}
    assert rows["another person"]["seam"]["value"] == 0                     # grey goes on across the border
    csim = {name: entry["csim"]["mean"] for name, entry in report["rows"].items()}
    photos = np.array([110, 120, 130]) / 127.5 - 1                          # brightness of each first frame
    assert csim["copy the photo"] == pytest.approx(0, abs=0.01)
    assert csim["true frames"] == pytest.approx(-40 / 127.5 * 6 / 11, abs=0.02)     # 6 of 11 are brighter
    moved = 0.1 * (photos[2] + 40 / 127.5 * 6 / 11)
    assert csim["another person"] == pytest.approx(photos[0] - moved, abs=0.02)     # b's photo, c's motion
    monkeypatch.setattr(evaluate, "animate", still_video(12))
    assert run(given, "talk", "--data", str(grey), "--landmarks", *out) == 0
    report = json.loads((grey / "out.json").read_text())
    rows = report["landmarks"]
    assert calls[-1][1] == sys.executable
    assert rows["true frames"]["opening_correlation"]["value"] == pytest.approx(1, abs=0.01)
    assert rows["ours"]["opening_correlation"]["value"] == 0
    assert rows["ours"]["audio_gain"]["value"] == pytest.approx(1)
    assert "digital silence" not in rows
    for name in ("silence_opening", "photo_opening", "shut_opening"):  # two people: median of 115 and 130
        assert rows["ours"][name]["value"] == pytest.approx(122.5, abs=1.5)
    assert report["start_jump"]["ours"]["mean"] > 0


def test_faces_are_read_of_real_clips_alone(given, grey, capsys):
    for bad in (["reconstruct"], ["masked", "--data", str(grey)]):
        with pytest.raises(SystemExit):
            run(given, bad[0], "--landmarks", *bad[1:])
    nobody = str(grey / "no-python")
    refused(capsys, run(given, "reconstruct", "--data", str(grey), "--landmarks", nobody), nobody,
            "cannot be run")


def test_networks_are_asked_about_every_row(given, monkeypatch, capsys):
    """Stand-ins for the published networks: each says of pictures what can be checked."""
    asked = []

    def inception(x):
        asked.append(x)
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1)

    def syncnet(frames, wave, face):
        return {"sync_c": frames.mean(), "sync_d": wave.abs().max(), "offset": 0}

    nets = {"lpips": lambda pred, target: (pred - target).abs().mean((1, 2, 3)), "inception": inception,
            "syncnet": syncnet}
    monkeypatch.setattr(perceptual, "load", lambda folder, device: (nets, ["no FVD: get it there"]))
    assert run(given, "reconstruct", "--clips", "3", "--networks", str(given), "--json",
               str(given / "o.json")) == 0
    printed, rows = capsys.readouterr().out, json.loads((given / "o.json").read_text())["rows"]
    assert "no FVD: get it there" in printed
    assert "(n=3 clips: few)" in printed
    assert "(n=1 clips: few)" in printed
    assert "sync" not in printed
    assert all(row["lpips"]["mean"] == pytest.approx(2 * row["l1"]["mean"], abs=1e-4)
               for row in rows.values())
    assert rows["copy the photo"]["fid"] > 0 and rows["true frames"]["fid"] > 0      # the latter: other clips
    assert len(asked) == 3 * 2 * 7                          # pred and target of each row
    assert run(given, "talk", "--clips", "2", "--networks", str(given), "--json", str(given / "o.json")) == 0
    row = json.loads((given / "o.json").read_text())["pictures"]["ours"]
    assert row["sync_d"]["mean"] > 0 and row["fid"] > 0


@pytest.mark.parametrize("command, clips, words", [
    ("reconstruct", 1, ("PSNR", "copy the photo", "B as A, 1 step", "lip_corner")),
    ("masked", 1, ("90% masked", "copy the photo", "jaw")),
    ("probe", 20, ("brow_furrow", "back_dir", "90% masked")),
    ("talk", 1, ("lip width", "other sound", "digital silence", "blinks_per_minute")),
    ("steps", 1, ("decoder: PSNR", "blinks/min", "straightness of the paths"))])
def test_commands_on_an_untrained_release(given, capsys, command, clips, words):
    assert run(given, command, "--clips", str(clips), "--json", str(given / f"{command}.json")) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed
    report = json.loads((given / f"{command}.json").read_text())
    assert report["command"] == command and report["clips"] == clips


def test_steps_are_those_of_the_sampler(given, monkeypatch, capsys):
    """A decoder that is the better the more steps it takes, a generator asked for each number of steps."""
    asked, generate_motion = [], checkpoint.generate_motion
    monkeypatch.setattr(checkpoint, "generate_motion",
                        lambda *given: asked.append(given[5]) or generate_motion(*given))
    monkeypatch.setattr(evaluate, "STEPS", (1, 4))
    monkeypatch.setattr(evaluate, "decode_clip", lambda release, photo, tokens, steps, seed:
                        photo.expand(len(tokens), -1, -1, -1) * (1 - 1 / (1 + steps)))
    assert run(given, "steps", "--clips", "2", "--json", str(given / "o.json")) == 0
    report = json.loads((given / "o.json").read_text())
    assert asked == [1, 4, 1, 4] and list(report["rows"]) == ["1", "4"]
    assert report["rows"]["1"]["psnr"]["mean"] < report["rows"]["4"]["psnr"]["mean"] - 3
    assert report["straightness"]["decoder"] == pytest.approx(0, abs=1e-3)  # untrained: always one picture


def test_the_mouth_is_judged_against_its_own_truth(given, monkeypatch):
    """A reader that knows the truth, told through the frames: full marks for the true frames, none for a
    still photo."""
    def frames(people, motion, size):
        return motion.view(-1, 1, 1, 17).expand(-1, 3, 17, 17).clone()

    monkeypatch.setitem(clips.FRAMES, "talk", 40)
    for module in (clips, evaluate):
        monkeypatch.setattr(module, "face_box",
                            lambda person, motion, size: torch.ones(len(motion), 17, 17, dtype=torch.bool))
        monkeypatch.setattr(module, "render_batched", frames)
    monkeypatch.setattr(reader, "load_regressor", lambda path: lambda x: x[:, 0, 0])
    monkeypatch.setattr(evaluate, "encode", lambda checkpoint, images: images.flatten(1)[:, :8])
    monkeypatch.setattr(evaluate, "animate", still_video())
    assert run(given, "talk", "--clips", "2", "--json", str(given / "o.json")) == 0
    report = json.loads((given / "o.json").read_text())
    rows = report["rows"]
    assert rows["true frames"]["jaw"]["mean"] == pytest.approx(1, abs=1e-4)
    assert rows["true frames"]["jaw_lag"]["mean"] == 0
    assert rows["ours"]["jaw"]["mean"] == 0 and rows["ours"]["yaw_std"]["mean"] < 1e-4
    motion = random_clip(torch.tensor([HELD_OUT, HELD_OUT + 1]), 40)["motion"]
    deviation = math.degrees(motion[:, :, 0].std(1).mean())
    assert rows["true frames"]["yaw_std"]["mean"] == pytest.approx(deviation, rel=1e-4)


def test_a_start_jump_is_in_usual_steps():
    """True tokens go by 1 a frame, but for one step of 9; the first generated one is 5 from the photo's."""
    true = torch.tensor([0.0, 1, 2, 11, 12])[:, None]
    assert evaluate.start_jump(torch.tensor([[5.0], [6]]), true) == {"ours": 5, "true frames": 1}


def test_what_cannot_be_used_is_refused(given, tmp_path, capsys):
    refused(capsys, run(given, "talk", ckpt="ae.safetensors"), "ae.safetensors", "generator")
    refused(capsys, run(given, "probe", ckpt="none.safetensors"), "none.safetensors", "not a readable")
    refused(capsys, run(given, "probe", ckpt="r.safetensors"), "r.safetensors", "not SeMo weights")
    refused(capsys, run(given, "reconstruct", "--reader", str(given / "w.safetensors")), "w.safetensors",
            "not a motion reader")
    refused(capsys, run(given, "reconstruct", "--reader", str(tmp_path / "no")), "measure.reader")
    refused(capsys, run(given, "probe", "--device", "abacus"), "abacus")
    refused(capsys, run(given, "reconstruct", "--networks", str(tmp_path / "no")), "no folder")
    for bad in (["probe", "--clips", "3"], ["talk", "--steps", "0"], ["dance"], ["probe", "--data", "x"]):
        with pytest.raises(SystemExit):
            evaluate.main(bad)
    refused(capsys, run(given, "reconstruct", "--data", str(tmp_path)), "manifest.jsonl", "data.py prepare")
