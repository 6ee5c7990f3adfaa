"""The shipped weights: both files open, and what they make of people and speech that were never trained on
keeps its quality.

A wrong weight name, a decoder that copies the photo, sound that is not used or a changed default falls below
a floor.
"""
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import META, networks

import sample
from measure import emotions, metrics, reader
from measure.checkpoint import decode_clip, encode, generate
from media import audio_features
from media.latents import Pixel
from media.weights import save_weights
from sample import load_models
from world.people import HELD_OUT, random_clip
from world.render import MOTION, render

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
NAMES, CLIPS, FRAMES = list(MOTION), 2, 75


@pytest.fixture(scope="module")
def shipped():
    """Models and meta of the shipped weights, the motion reader, held-out clips (frames, motion, wave)."""
    models, meta = load_models(WEIGHTS / "semo-tiny.safetensors")
    clips = []
    for seed in range(HELD_OUT, HELD_OUT + CLIPS):
        c = random_clip(torch.tensor([seed]), FRAMES)
        frames = render(c["identity"].expand(FRAMES, -1), c["motion"][0], meta["size"])
        clips.append((frames, c["motion"][0], c["wave"]))
    return models, meta, reader.load_regressor(WEIGHTS / "motion-reader.safetensors"), clips


def tensor(frames):
    """(H, W, 3) uint8 frames -> (n, 3, H, W) in [-1, 1]."""
    return torch.stack([torch.from_numpy(x) for x in frames]).permute(0, 3, 1, 2) / 127.5 - 1


def factor_correlation(motion_reader, frames, motion):
    """Correlation over time of every motion factor read off the frames with the true one."""
    with torch.inference_mode():
        return dict(zip(NAMES, metrics.correlation(motion_reader(frames), motion).tolist(), strict=True))


def speak(models, meta, photo, wave):
    wave = audio_features.normalise_loudness(wave)
    rows = audio_features.extract_features(wave, meta["audio"], meta.get("whisper"))[0]
    return tensor(sample.animate_from_audio(models, meta, photo, iter([rows])))


def test_reader_reads_true_frames(shipped):
    _, _, motion_reader, clips = shipped
    for frames, motion, _ in clips:
        r = factor_correlation(motion_reader, frames, motion)
        assert min(r[name] for name in ("yaw", "pitch", "jaw", "blink_l")) > 0.8, r


def test_reconstruction_is_far_above_copying(shipped):
    """From the first frame and the tokens alone: PSNR, motion, sharpness, at the released number of steps."""
    models, meta, motion_reader, clips = shipped
    gains, jaws, yaws, sharp = [], [], [], []
    for frames, motion, _ in clips:
        made = tensor(sample.reenact(models, meta, frames[0], iter(frames), absolute=True))
        copied = frames[:1].expand_as(frames)
        assert made.shape == frames.shape
        ours, copying = (metrics.psnr(pred[1:], frames[1:]) for pred in (made, copied))
        gains.append((ours - copying).mean().item())
        r = factor_correlation(motion_reader, made, motion)
        jaws.append(r["jaw"])
        yaws.append(r["yaw"])
        sharp.append(metrics.sharpness(made, frames).mean().item())
    assert min(gains) > 5.5
    assert min(jaws) > 0.9 and min(yaws) > 0.9
    assert 0.8 < min(sharp) <= max(sharp) < 1.1


def test_speech_moves_the_mouth_and_other_speech_does_not(shipped):
    """From photo and sound: jaw and lips as the true ones; with another clip's sound, unrelated to them."""
    models, meta, motion_reader, clips = shipped
    own, other, sharp = [], [], []
    for k, (frames, motion, wave) in enumerate(clips):
        made = speak(models, meta, frames[0], wave)
        wrong = speak(models, meta, frames[0], clips[k - 1][2])
        own.append(factor_correlation(motion_reader, made, motion)["jaw"])
        other.append(factor_correlation(motion_reader, wrong, motion)["jaw"])
        sharp.append(metrics.sharpness(made, frames).mean().item())
    assert min(own) > 0.85
    assert max(map(abs, other)) < 0.4
    assert 0.7 < min(sharp) <= max(sharp) < 1.2


@torch.inference_mode()
def test_a_video_starts_from_its_photo(shipped):
    """The first generated frame is at most 1.5 times as far from the photo, in the space of tokens, as true
    frames are from the next: mean of 12 people, 3 takes each. (Two random frames of a clip: 3 times.)"""
    models, meta, _, _ = shipped
    checkpoint = SimpleNamespace(**models, space=Pixel(), meta=meta, device=torch.device("cpu"))
    first, usual = [], []
    for k in range(12):
        c = random_clip(torch.tensor([HELD_OUT + k]), 25)
        frames = render(c["identity"].expand(25, -1), c["motion"][0], meta["size"])
        true = encode(checkpoint, frames)
        usual.append(true.diff(dim=0).norm(dim=1).mean())
        for take in range(3):
            tokens = generate(checkpoint, frames[0], c["wave"][:, :16 * 640], 3 * k + take)
            first.append((tokens[0] - true[0]).norm())
    assert sum(first) / len(first) < 1.5 * sum(usual) / len(usual)


@torch.inference_mode()
def test_emotions_move_the_corners_of_the_mouth(shipped):
    """Of a calm photo with its own speech: lip corners, as read off the frames, up when happy and down when
    sad."""
    models, meta, motion_reader, clips = shipped
    checkpoint = SimpleNamespace(**models, space=Pixel(), meta=meta, device=torch.device("cpu"))
    changes = []
    for frames, _, wave in clips:
        tokens = emotions.generate_moods(checkpoint, frames[0], wave, emotions.EYE[:3], 0)[:, 12::4]
        made = decode_clip(checkpoint, frames[0], tokens.flatten(0, 1), meta["steps"], 0)
        corners = motion_reader(made)[:, NAMES.index("lip_corner")].view(3, -1).mean(1)
        neutral, happy, sad = corners.tolist()
        changes.append((happy - neutral, happy - sad))
    assert sum(happy for happy, _ in changes) / CLIPS > 0.05, changes
    assert min(both for _, both in changes) > 0.3, changes


def test_released_defaults(shipped):
    models, meta, _, _ = shipped
    assert set(models) == {"encoder", "decoder", "generator", "voice"}
    assert (meta["steps"], meta["latents"], meta["audio"]) == (1, "pixel", "mel")
    size = models["decoder"].config.image_size
    assert (meta["gen_steps"], meta["guidance"], meta["size"]) == (4, 2.0, size)


def test_the_shipped_file_saved_again_holds_the_same_numbers(shipped, tmp_path):
    models, meta, _, _ = shipped
    save_weights(tmp_path / "w.safetensors", models, meta)
    again, meta_again = load_models(tmp_path / "w.safetensors")
    assert meta_again == meta and meta["format"] == "semo-2"
    old, new = load_file(WEIGHTS / "semo-tiny.safetensors"), load_file(tmp_path / "w.safetensors")
    assert len(old) == len(new)
    sums = (sorted(v.double().sum().item() for v in weights.values()) for weights in (old, new))
    assert next(sums) == next(sums)
    for kind, model in models.items():
        state = again[kind].state_dict()
        assert again[kind].config == model.config
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---- the format --------------------------------------------------------------------------------------------

@pytest.fixture
def release(tmp_path):
    save_weights(tmp_path / "w.safetensors", networks(), META)
    return tmp_path / "w.safetensors"


def rewrite(path, about=None, **weights):
    """Change a release on the disk: its JSON and single weights (None: left out)."""
    with safe_open(path, framework="pt") as f:
        found = json.loads(f.metadata()["semo"])
    held = {**load_file(path), **weights}
    save_file({k: v for k, v in held.items() if v is not None}, path,
              {"semo": json.dumps({**found, **(about or {})})})


# ---- releases ----------------------------------------------------------------------------------------------

def test_release_round_trip(release):
    want, (got, meta) = networks(), load_models(str(release))
    assert meta == {"format": "semo-2", **META} and list(got) == ["encoder", "decoder", "generator"]
    for kind, model in want.items():
        assert got[kind].config == model.config and not got[kind].training
        for name, value in model.state_dict().items():
            exact = value.ndim < 2                                          # vectors and statistics stay fp32
            torch.testing.assert_close(got[kind].state_dict()[name], value, rtol=0 if exact else 2**-11,
                                       atol=0 if exact else 1e-7)
    assert {v.dtype for v in load_file(release).values() if v.ndim > 1} == {torch.float16}


# names in format semo-1, found in weights of that time
SEMO_1 = (("encoder.token_init.patch_summary", "encoder.thumb"),
          ("encoder.token_init.project", "encoder.sketch"), ("encoder.running_norm", "encoder.standardise"),
          ("decoder.ref_patch_embed", "decoder.under"),
          ("decoder.motion_delta.project", "decoder.change"), ("decoder.motion_delta.mix", "decoder.spread"),
          ("decoder.motion_pos_embed", "decoder.slot"), ("segment_embed", "role"), ("null_audio", "silence"),
          ("ref_condition", "still"), ("affine_head", "pose"), ("cross_attn_audio", "hear"),
          ("cross_attn_ref", "recall"), ("generator.ref_embed", "generator.recall"))


def test_weights_of_the_older_format_are_converted(release):
    """Written under the names of that time, they are what they were under today's."""
    want, weights = load_models(str(release))[0], load_file(release)
    with safe_open(release, framework="pt") as f:
        meta = json.loads(f.metadata()["semo"])
    fields = {"token_init": "thumb", "tokens_per_motion": "expand", "lookahead": "ahead"}
    configs = {kind: {fields.get(name, name): value for name, value in config.items() if name != "warp_grid"}
               for kind, config in meta["configs"].items()}
    old = {}
    for name, value in weights.items():
        for today, then in SEMO_1:
            name = name.replace(today, then)
        old[name] = value
    assert sum(name not in weights for name in old) == 30
    save_file(old, release, {"semo": json.dumps({**meta, "format": "semo-1", "configs": configs})})
    found, found_meta = load_models(str(release))
    assert found_meta["format"] == "semo-2"
    for kind, model in want.items():
        assert found[kind].config == model.config
        assert all(torch.equal(x, y) for x, y in zip(found[kind].state_dict().values(),
                                                     model.state_dict().values(), strict=True))


def test_release_of_two_networks(tmp_path):
    models = {kind: model for kind, model in networks(frames=4).items() if kind != "generator"}
    save_weights(tmp_path / "w.safetensors", models, META)
    found, _ = load_models(tmp_path / "w.safetensors")
    assert list(found) == ["encoder", "decoder"] and found["decoder"].config.frames == 4


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        load_models(path)
    said = str(error.value)
    assert str(path) in said and "\n" not in said and all(word in said for word in words), said


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100, b"\xff" * 100, None])
def test_what_is_no_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content is not None:                                                  # None: there is no such file
        path.write_bytes(content)
    refused(path, "not a readable safetensors file")


def test_a_folder_and_half_a_file_are_refused(release):
    refused(release.parent, "not a readable safetensors file")
    release.write_bytes(release.read_bytes()[: release.stat().st_size // 2])
    refused(release, "not a readable safetensors file")


@pytest.mark.parametrize("metadata", [None, {"a": "b"}, {"semo": "[1]"}, {"semo": '{"format": "semo-9"}'}])
def test_foreign_safetensors_are_refused(tmp_path, metadata):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors", metadata)
    refused(tmp_path / "w.safetensors", "not SeMo weights")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_refused(release, value):
    rewrite(release, **{"decoder.role": torch.full((2, 32), value)})
    refused(release, "1 weights hold NaN", "decoder.role")


def test_weights_of_eight_bits_are_read(release):
    tokens = torch.ones_like(networks()["encoder"].tokens)
    rewrite(release, **{"encoder.tokens": tokens.to(torch.float8_e4m3fn)})
    assert torch.equal(load_models(str(release))[0]["encoder"].tokens, tokens)


@pytest.mark.parametrize("kind, change", [("encoder", {"colour": 3}), ("generator", {"heads": "two"}),
                                          ("poser", {}), ("encoder", {"patch_size": 7})])
def test_a_config_of_another_version_is_refused(release, kind, change):
    configs = {name: asdict(model.config) for name, model in networks().items()}
    configs[kind] = {**configs.get(kind, {}), **change}
    rewrite(release, {"configs": configs})
    refused(release, kind, "another version")


def test_missing_surplus_and_misfit_weights_are_refused(release):
    whole = release.read_bytes()
    for change in ({"encoder.tokens": None}, {"encoder.other": torch.ones(2)},
                   {"encoder.tokens": torch.ones(2, 32)}):
        release.write_bytes(whole)
        rewrite(release, **change)
        refused(release, "encoder", "do not fit")
