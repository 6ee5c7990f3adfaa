"""evaluate.py and metrics.py: every measure against a direct computation or a case whose answer is known; the commands."""
import json
import math
import os
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data  # noqa: E402
import evaluate  # noqa: E402
import metrics  # noqa: E402
import perceptual  # noqa: E402
import reader  # noqa: E402
import synthetic  # noqa: E402
from decoder import Decoder, DecoderConfig  # noqa: E402
from encoder import EncoderConfig, MotionEncoder  # noqa: E402
from generator import Generator, GeneratorConfig  # noqa: E402
from media import VideoWriter  # noqa: E402
from synthetic import HELD_OUT, IDENTITY, MOTION  # noqa: E402
from training import save_release  # noqa: E402

torch.set_num_threads(1)
NAMES = list(MOTION)
META = {"size": 32, "audio": "mel", "latents": "pixel", "steps": 1, "gen_steps": 2, "guidance": 1.5}


def pictures(n=3, size=24, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Small untrained releases, with and without a generator, and an untrained reader."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 1, "token_dim": 8}
    models = {"encoder": MotionEncoder(EncoderConfig(**shape)), "decoder": Decoder(DecoderConfig(**shape, expand=2))}
    save_release(folder / "ae.safetensors", models, META)
    models["generator"] = Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=1, window=8, past=4, ahead=1))
    save_release(folder / "w.safetensors", models, META)
    reader.save_reader(folder / "r.safetensors", reader.MotionReader())
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(evaluate, "FRAMES", {"reconstruct": 5, "probe": 2, "masked": 5, "talk": 12, "steps": 16})
    bank = evaluate.training_frames
    monkeypatch.setattr(evaluate, "training_frames", lambda args, size, count=10: bank(args, size, count))


def run(given, command, *more, ckpt="w.safetensors"):
    names = ["--ckpt", str(given / ckpt), "--reader", str(given / "r.safetensors")]
    return evaluate.main([command, *names, "--device", "cpu", *more])


def refused(capsys, status, *words):
    """Status 2, one line on stderr that holds the words."""
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and said.startswith("evaluate.py: ")
    assert all(word in said for word in words), said


# --------------------------------------------------------------------------------------------------- picture measures
def test_psnr_and_l1_are_on_the_unit_scale():
    true = pictures()
    made = true + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1)           # 0.1 and 0.01 of [0, 1]
    assert torch.allclose(metrics.psnr(made, true), torch.tensor([20.0, 40.0, 100.0]), atol=1e-3)
    assert torch.allclose(metrics.l1(made, true), torch.tensor([0.1, 0.01, 0.0]), atol=1e-5)


def test_a_box_counts_its_pixels_alone():
    true, made, box = pictures(1), pictures(1), torch.zeros(1, 24, 24, dtype=torch.bool)
    box[:, 3:9, 5:20] = True
    made[:, :, 3:9, 5:20] += 0.2
    made[:, :, 20:] = 0                                                     # outside: must not matter
    assert metrics.psnr(made, true, box).item() == pytest.approx(20, abs=1e-3)
    assert metrics.l1(made, true, box).item() == pytest.approx(0.1, abs=1e-5)


def direct_ssim(a, b):
    """The definition, one window and one channel at a time, in double precision -> map (H-10, W-10) for one picture."""
    line = torch.tensor([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)], dtype=torch.float64)
    window = torch.outer(line, line) / line.sum() ** 2
    a, b = (a.double() + 1) / 2, (b.double() + 1) / 2
    size, total = a.shape[-1] - 10, torch.zeros(a.shape[-2] - 10, a.shape[-1] - 10, dtype=torch.float64)
    for c in range(3):
        for y in range(len(total)):
            for x in range(size):
                p, q = a[c, y: y + 11, x: x + 11], b[c, y: y + 11, x: x + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, vpq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
                total[y, x] += ((2 * mp * mq + 0.01**2) * (2 * vpq + 0.03**2)
                                / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2))) / 3
    return total


def test_ssim_is_its_definition():
    true = pictures(2, 16)
    made = (0.7 * true + 0.3 * pictures(2, 16, seed=1)).clamp(-1, 1)
    maps = torch.stack([direct_ssim(a, b) for a, b in zip(made, true, strict=True)]).float()
    assert torch.allclose(metrics.ssim(made, true), maps, atol=1e-4)
    assert torch.allclose(metrics.ssim(true, true), torch.ones(2, 6, 6), atol=1e-5)
    box = torch.zeros(2, 16, 16, dtype=torch.bool)
    box[:, 6:9, 5:11] = True                                                # centres 6..8, 5..10 are map rows 1..3, 0..5
    found = metrics.compare(made, true, box, 8)
    assert found["ssim"] == pytest.approx(maps.mean().item(), abs=1e-4)
    assert found["face_ssim"] == pytest.approx(maps[:, 1:4, 0:6].mean().item(), abs=1e-4)


def test_blur_is_a_convolution():
    x = pictures(2, 20)[..., :17]
    line = torch.tensor([math.exp(-((i - 3) ** 2) / (2 * 1.2**2)) for i in range(7)])
    kernel = (torch.outer(line, line) / line.sum() ** 2).expand(3, 1, 7, 7)
    for pad in (True, False):
        direct = torch.nn.functional.conv2d(x, kernel, padding=3 * pad, groups=3)
        assert torch.allclose(metrics.blur(x, 1.2, 7, pad), direct, atol=1e-5)


def test_sharpness_is_a_ratio_of_gradients():
    true = pictures()
    assert torch.allclose(metrics.sharpness(true, true), torch.ones(3))
    assert torch.allclose(metrics.sharpness(0.5 * true + 0.3, true), torch.full((3,), 0.5), atol=1e-5)
    assert (metrics.sharpness(metrics.blur(true, 1.2, 7), true) < 0.5).all()


def test_seams_are_found_at_patch_borders_only():
    true = pictures(1, 32) * 0.1
    assert metrics.seams(true, true, 8).item() == pytest.approx(1)
    board = torch.ones(4, 4)
    board[1::2, ::2] = board[::2, 1::2] = -1
    tiles = 0.3 * board.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert metrics.seams(true + tiles, true, 8).item() > 3
    assert metrics.seams(true + tiles.roll((4, 4), (0, 1)), true, 8).item() < 0.6
    smooth = torch.arange(16.0).expand(1, 3, 16, 16).clone()
    smooth[..., 8:] += 3                                                    # steps of 1 inside, 4 at the border of 8
    smooth += smooth.transpose(2, 3).clone()
    assert metrics.border_ratio(smooth, 8).item() == pytest.approx(4)


def test_the_face_box_holds_the_face_and_ends_at_the_chin():
    ids = HELD_OUT + torch.arange(12)
    people, motion = synthetic.identity(ids), synthetic.random_motion(ids)
    people[:, IDENTITY.index("hair_length")] = 0                            # no hair below the chin
    motion[:, NAMES.index("jaw")] = motion[:, NAMES.index("jaw")].clamp(min=0.05)
    box, drawn = metrics.face_box(people, motion, 128), synthetic.render(people, motion)
    other = motion.clone()
    for name in ("gaze_x", "gaze_y", "brow_raise", "lip_width", "lip_corner"):
        other[:, NAMES.index(name)] = -other[:, NAMES.index(name)]
    moved = (synthetic.render(people, other) - drawn).abs().amax(1) > 0.02
    assert (moved & box).sum() >= 0.995 * moved.sum() and 0.2 < box.float().mean() < 0.6
    other = motion.clone()
    other[:, NAMES.index("light_x")] *= -1                                  # light is on the head alone
    lit = (synthetic.render(people, other) - drawn).abs().amax(1) > 0
    bottom, edge = (torch.tensor([m.any(1).nonzero().max() for m in masks]) for masks in (lit, box))
    assert (bottom - edge).abs().float().mean() < 2 and (bottom - edge).max() <= 3


# ---------------------------------------------------------------------------------------------------- signal measures
def test_a_shifted_signal_is_found_with_its_lag():
    x = torch.randn(80, generator=torch.Generator().manual_seed(0))
    for lag in (-4, 0, 3):
        made = x.roll(lag)                                                  # positive: late
        best, found, now = metrics.lag_correlation(2 * made[10:70] + 1, x[10:70])
        assert found == lag and best == pytest.approx(1, abs=1e-5)
        assert now == pytest.approx(torch.corrcoef(torch.stack([made[10:70], x[10:70]]))[0, 1].item(), abs=1e-5)


def test_correlation_by_column():
    a, b = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    b[:, 1], b[:, 2] = -3 * a[:, 1] + 2, 7.0
    found = metrics.correlation(a, b)
    assert found[0].item() == pytest.approx(torch.corrcoef(torch.stack([a[:, 0], b[:, 0]]))[0, 1].item(), abs=1e-5)
    assert found[1].item() == pytest.approx(-1, abs=1e-5) and found[2] == 0
    clips = [torch.randn(20, 2) + 100 * k for k in range(3)]                # what differs between clips does not count
    assert metrics.followed(clips, [x.roll(7, 0) for x in clips])[0] < 0.6
    assert metrics.followed(clips, [2 * x - 50 * k for k, x in enumerate(clips)]) == pytest.approx([1, 1], abs=1e-4)


def test_blinks_are_counted_once():
    signal = torch.zeros(60)
    signal[5:9], signal[20:22], signal[22], signal[23], signal[40] = 0.9, 0.6, 0.4, 0.6, 0.45
    assert metrics.events(signal) == 2                                      # the dip to 0.4 is no new one, 0.45 none at all


def test_interval_is_about_two_standard_errors():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = metrics.interval(values)
    assert found["mean"] == pytest.approx(sum(values) / 400)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * torch.tensor(values).std().item() / 20, rel=0.1)
    assert metrics.interval([3.0]) == {"mean": 3.0, "low": 3.0, "high": 3.0}


def test_the_probe_reads_what_is_there_and_nothing_else():
    number = torch.arange(200).repeat_interleave(5)
    motion, people = synthetic.random_motion(torch.arange(1000)), synthetic.identity(number)
    noise = torch.randn(1000, 12, generator=torch.Generator().manual_seed(0))
    turned = motion @ torch.linalg.qr(torch.randn(17, 17, generator=torch.Generator().manual_seed(1))).Q
    m, i = metrics.probe_tokens(torch.cat([turned, noise], 1), motion, people, number)
    assert list(m) == NAMES and list(i) == IDENTITY
    assert min(m.values()) > 0.99 and abs(sum(i.values()) / len(i)) < 0.1
    m, i = metrics.probe_tokens(noise, motion, people, number)
    assert all(abs(x) < 0.1 for x in m.values()) and abs(sum(i.values()) / len(i)) < 0.1
    m, _ = metrics.probe_tokens(motion[:, :1] + 0.5 * motion[:, :1].std() * noise[:, :1], motion, people, number)
    assert m["yaw"] == pytest.approx(0.8, abs=0.06)                         # signal 1, noise 1/4


# -------------------------------------------------------------------------------------------------------- the commands
def test_a_perfect_decoder_is_measured_as_perfect(given, monkeypatch, capsys):
    shown = []                                                              # A's frames, then B's photo and B moved as A
    monkeypatch.setattr(evaluate, "show", lambda *a, real=evaluate.show: shown.append(real(*a)) or shown[-1])
    monkeypatch.setattr(evaluate, "depict", lambda *_: shown[-1])
    assert run(given, "reconstruct", "--clips", "2", "--json", str(given / "o.json")) == 0
    found = json.loads((given / "o.json").read_text())
    for name in ("true frames", "ours, 1 step", "ours, 4 steps", "the same with frame 0", "B as A, 1 step"):
        row = {k: v["mean"] for k, v in found["rows"][name].items()}
        assert row == pytest.approx({"psnr": 100, "ssim": 1, "l1": 0, "face_psnr": 100, "face_ssim": 1, "face_l1": 0,
                                     "sharpness": 1, "seams": 1}, abs=1e-4)
    assert found["motion_correlation"]["ours, 1 step"] == found["motion_correlation"]["true frames"]
    assert found["rows"]["copy the photo"]["psnr"]["mean"] < 50 and found["ids"] == [HELD_OUT, HELD_OUT + 1]


def test_copying_is_measured_as_copying(given, monkeypatch):
    monkeypatch.setattr(evaluate, "depict", lambda release, photo, tokens, *_: photo.expand(len(tokens), -1, -1, -1))
    assert run(given, "reconstruct", "--clips", "2", "--steps", "4", "--json", str(given / "o.json")) == 0
    rows = json.loads((given / "o.json").read_text())["rows"]
    assert list(rows) == ["true frames", "ours, 4 steps", "the same with frame 0", "copy the photo", "nearest training frame",
                          "B as A, 4 steps", "copy B's photo"]
    assert rows["ours, 4 steps"] == rows["copy the photo"] and rows["B as A, 4 steps"] == rows["copy B's photo"]
    psnr = {name: row["psnr"]["mean"] for name, row in rows.items()}
    assert psnr["the same with frame 0"] == pytest.approx((4 * psnr["copy the photo"] + 100) / 5, abs=1e-3)
    assert run(given, "masked", "--clips", "2", "--json", str(given / "m.json")) == 0
    masked = json.loads((given / "m.json").read_text())["rows"]
    assert masked["90% masked"] == masked["copy the photo"] == rows["copy the photo"]


def test_the_nearest_training_frame_is_the_nearest():
    bank = ((pictures(20, 32) + 1) * 127.5).round().byte()
    true = (bank[[7, 3]] / 127.5 - 1) + 0.05 * pictures(2, 32, seed=1)
    assert torch.equal(evaluate.nearest(bank, true), bank[[7, 3]] / 127.5 - 1)
    drawn = evaluate.training_frames(evaluate.parse(["reconstruct"]), 32, count=10)
    again = synthetic.render(synthetic.identity(torch.arange(10)), synthetic.random_motion(torch.arange(10)), 32)
    assert (drawn / 127.5 - 1 - again).abs().max() < 0.005                  # people of the training part


def test_masks_take_from_the_token_what_they_hide(given, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "random_keep", lambda n, count, ratio, draw: seen.append(ratio) or torch.arange(count)[None]
                        .expand(n, -1)[:, : round(count * (1 - ratio))])
    assert run(given, "masked", "--clips", "1", "--json", str(given / "m.json")) == 0
    rows = json.loads((given / "m.json").read_text())["rows"]
    assert seen == [0.3, 0.5, 0.7, 0.9] and list(rows) == [*(f"{r}% masked" for r in (0, 30, 50, 70, 90)), "copy the photo"]


@pytest.fixture
def grey(tmp_path):
    """A folder as data.py prepare makes it: a train person and two test people, grey, all frames but the first brighter."""
    (tmp_path / "clips").mkdir()
    rows = []
    for k, (who, split, step) in enumerate([("a", "train", 90), ("b", "test", 10), ("b", "test", 20), ("c", "test", 40)]):
        with VideoWriter(tmp_path / f"clips/{k}.mp4", 32, sound=0.1 * torch.randn(8 * 640)) as video:
            for n in range(8):
                video.write(np.full((32, 32, 3), 100 + step * (n > 0), np.uint8))
        rows.append({"file": f"clips/{k}.mp4", "identity": who, "split": split, "frames": 8, "sound": True, "face": [0, 0, 0.5, 0.5]})
    data.write_lines(tmp_path / "manifest.jsonl", rows)
    return tmp_path


def test_real_people_are_the_test_split_averaged_by_person(given, grey, monkeypatch):
    monkeypatch.setattr(evaluate, "depict", lambda release, photo, tokens, *_: photo.expand(len(tokens), -1, -1, -1) + 0.1)
    assert run(given, "reconstruct", "--data", str(grey), "--json", str(grey / "out.json")) == 0
    found = json.loads((grey / "out.json").read_text())
    assert found["ids"] == ["clips/1.mp4", "clips/2.mp4", "clips/3.mp4"] and "B as A, 1 step" not in found["rows"]
    copy, ours = found["rows"]["copy the photo"], found["rows"]["ours, 1 step"]
    assert copy["l1"]["mean"] == pytest.approx((15 + 40) / 2 / 255, abs=1.5 / 255)
    assert copy["psnr"]["mean"] == pytest.approx(-10 * (math.log10(10 * 20 / 255**2) + math.log10(40**2 / 255**2)) / 2, abs=0.5)
    assert ours["l1"]["mean"] == pytest.approx(((2.75 + 7.25) / 2 + 27.25) / 2 / 255, abs=1.5 / 255)
    assert copy["face_l1"]["mean"] == pytest.approx(copy["l1"]["mean"], abs=1e-3)
    nearest = found["rows"]["nearest training frame"]["l1"]["mean"]         # of a: 100, 190 against 110, 120 and 140
    assert nearest == pytest.approx(((10 + 20) / 2 + 40) / 2 / 255, abs=1.5 / 255)


def test_real_people_speak_with_their_own_and_with_another_sound(given, grey, monkeypatch):
    heard = []
    monkeypatch.setattr(evaluate, "spoken", lambda release, photo, wave, *_: heard.append(wave) or photo.expand(6, -1, -1, -1))
    assert run(given, "talk", "--data", str(grey), "--json", str(grey / "out.json")) == 0
    rows = json.loads((grey / "out.json").read_text())["pictures"]
    assert [wave.shape for wave in heard] == 5 * [(1, 8 * 640)]             # the first clip has no other
    assert torch.equal(heard[0], heard[2]) and torch.equal(heard[1], heard[4]) and not torch.equal(heard[0], heard[1])
    assert rows["true frames"]["psnr"]["mean"] == 100 and list(rows)[:2] == ["true frames", "ours"]
    assert rows["ours"]["l1"]["mean"] == pytest.approx((15 + 40) / 2 * 5 / 6 / 255, abs=1.5 / 255)         # 6 frames were made


def test_networks_are_asked_about_every_row(given, monkeypatch, capsys):
    """Stand-ins for the published networks: each says of pictures what can be checked."""
    asked = []

    def inception(x):
        asked.append(x)
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], 1)

    nets = {"lpips": lambda made, true: (made - true).abs().mean((1, 2, 3)), "inception": inception,
            "syncnet": lambda frames, wave, face: {"sync_c": frames.mean(), "sync_d": wave.abs().max(), "offset": 0}}
    monkeypatch.setattr(perceptual, "load", lambda folder, device: (nets, ["no FVD: get it there"]))
    assert run(given, "reconstruct", "--clips", "3", "--networks", str(given), "--json", str(given / "o.json")) == 0
    said, rows = capsys.readouterr().out, json.loads((given / "o.json").read_text())["rows"]
    assert "no FVD: get it there" in said and "(n=3 clips: few)" in said and "(n=1 clips: few)" in said and "sync" not in said
    assert all(row["lpips"]["mean"] == pytest.approx(2 * row["l1"]["mean"], abs=1e-4) for row in rows.values())
    assert rows["copy the photo"]["fid"] > 0 and rows["true frames"]["fid"] > 0          # the latter: other clips
    assert len(asked) == 3 * 10                                             # 7 rows made, frames 1.., 0.., and B's: each once
    assert run(given, "talk", "--clips", "2", "--networks", str(given), "--json", str(given / "o.json")) == 0
    row = json.loads((given / "o.json").read_text())["pictures"]["ours"]
    assert row["sync_d"]["mean"] > 0 and row["fid"] > 0


@pytest.mark.parametrize("command, clips, words", [
    ("reconstruct", 1, ("PSNR", "copy the photo", "B as A, 1 step", "lip_corner")),
    ("masked", 1, ("90% masked", "copy the photo", "jaw")),
    ("probe", 20, ("brow_furrow", "back_dir", "90% masked")),
    ("talk", 1, ("nearest training frame", "Sync-C", "lip width", "other sound", "digital silence", "blinks_per_minute")),
    ("steps", 1, ("decoder: PSNR", "blinks/min", "bend of the paths"))])
def test_commands_on_an_untrained_release(given, capsys, command, clips, words):
    assert run(given, command, "--clips", str(clips), "--json", str(given / f"{command}.json")) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in words), said
    found = json.loads((given / f"{command}.json").read_text())
    assert found["command"] == command and found["clips"] == clips


def test_steps_are_those_of_the_sampler(given, monkeypatch, capsys):
    """A decoder that is the better the more steps it takes, a generator asked for each number of steps."""
    asked, dream = [], evaluate.dream
    monkeypatch.setattr(evaluate, "dream", lambda *given: asked.append(given[5]) or dream(*given))
    monkeypatch.setattr(evaluate, "STEPS", (1, 4))
    monkeypatch.setattr(evaluate, "depict", lambda release, photo, tokens, steps, seed:
                        photo.expand(len(tokens), -1, -1, -1) * (1 - 1 / (1 + steps)))
    assert run(given, "steps", "--clips", "2", "--json", str(given / "o.json")) == 0
    found = json.loads((given / "o.json").read_text())
    assert asked == [1, 4, 1, 4] and list(found["rows"]) == ["1", "4"]
    assert found["rows"]["1"]["psnr"]["mean"] < found["rows"]["4"]["psnr"]["mean"] - 3
    assert found["bend"]["decoder"] == pytest.approx(0, abs=1e-3)            # untrained: one picture from everywhere


def test_the_mouth_is_judged_against_its_own_truth(given, monkeypatch):
    """A reader that knows the truth, told through the frames: full marks for the true frames, none for a still photo."""
    def frames(people, motion, size):
        return motion.view(-1, 1, 1, 17).expand(-1, 3, 17, 17).clone()

    monkeypatch.setattr(evaluate, "FRAMES", {"talk": 40})
    monkeypatch.setattr(metrics, "face_box", lambda person, motion, size: torch.ones(len(motion), 17, 17, dtype=torch.bool))
    monkeypatch.setattr(evaluate, "show", frames)
    monkeypatch.setattr(reader, "load_reader", lambda path: lambda x: x[:, 0, 0])
    monkeypatch.setattr(evaluate, "spoken", lambda release, photo, wave, *more: photo.expand(wave.shape[1] // 640, -1, -1, -1))
    assert run(given, "talk", "--clips", "2", "--json", str(given / "o.json")) == 0
    rows = json.loads((given / "o.json").read_text())["rows"]
    assert rows["true frames"]["jaw"]["mean"] == pytest.approx(1, abs=1e-4) and rows["true frames"]["jaw_lag"]["mean"] == 0
    assert rows["ours"]["jaw"]["mean"] == 0 and rows["ours"]["yaw_std"]["mean"] < 1e-4
    motion = synthetic.clip(torch.tensor([HELD_OUT, HELD_OUT + 1]), 40)["motion"]
    assert rows["true frames"]["yaw_std"]["mean"] == pytest.approx(math.degrees(motion[:, :, 0].std(1).mean()), rel=1e-4)


def test_what_cannot_be_used_is_refused(given, tmp_path, capsys):
    refused(capsys, run(given, "talk", ckpt="ae.safetensors"), "ae.safetensors", "generator")
    refused(capsys, run(given, "probe", ckpt="none.safetensors"), "none.safetensors", "not a readable")
    refused(capsys, run(given, "probe", ckpt="r.safetensors"), "r.safetensors", "not a SeMo release")
    refused(capsys, run(given, "reconstruct", "--reader", str(given / "w.safetensors")), "w.safetensors", "not a motion reader")
    refused(capsys, run(given, "reconstruct", "--reader", str(tmp_path / "no")), "python reader.py")
    refused(capsys, run(given, "probe", "--device", "abacus"), "abacus")
    refused(capsys, run(given, "reconstruct", "--networks", str(tmp_path / "no")), "no folder")
    for bad in (["probe", "--clips", "3"], ["talk", "--steps", "0"], ["dance"]):
        with pytest.raises(SystemExit):
            evaluate.main(bad)
    refused(capsys, run(given, "reconstruct", "--data", str(tmp_path)), "manifest.jsonl", "data.py prepare")
