"""The shipped weights: both files open, and what they make of people and speech that were never trained on keeps its quality.

A wrong weight name, a decoder that copies the photo, sound that is not used or a changed default falls below a floor.
"""
from pathlib import Path

import pytest
import torch

import audio
import metrics
import reader
import sample
from synthetic import HELD_OUT, MOTION, clip, render
from training import load_release

torch.set_num_threads(1)
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
NAMES, CLIPS, FRAMES = list(MOTION), 2, 75


@pytest.fixture(scope="module")
def shipped():
    """Models and meta of the shipped weights, their motion reader, and held-out clips (frames, motion, wave)."""
    models, meta = load_release(WEIGHTS / "semo-tiny.safetensors")
    clips = []
    for seed in range(HELD_OUT, HELD_OUT + CLIPS):
        c = clip(torch.tensor([seed]), FRAMES)
        frames = render(c["identity"].expand(FRAMES, -1), c["motion"][0], meta["size"])
        clips.append((frames, c["motion"][0], c["wave"]))
    return models, meta, reader.load_reader(WEIGHTS / "motion-reader.safetensors"), clips


def tensor(frames):
    """(H, W, 3) uint8 frames -> (n, 3, H, W) in [-1, 1]."""
    return torch.stack([torch.from_numpy(x) for x in frames]).permute(0, 3, 1, 2) / 127.5 - 1


def factor_correlation(motion_reader, frames, motion):
    """Correlation over time of every motion factor read off the frames with the true one."""
    with torch.inference_mode():
        return dict(zip(NAMES, metrics.correlation(motion_reader(frames), motion).tolist(), strict=True))


def speak(models, meta, photo, wave):
    rows = audio.features(audio.level(wave), meta["audio"], meta.get("whisper"))[0]
    return tensor(sample.talk(models, meta, photo, iter([rows])))


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
        gains.append((metrics.psnr(made[1:], frames[1:]) - metrics.psnr(copied[1:], frames[1:])).mean().item())
        r = factor_correlation(motion_reader, made, motion)
        jaws.append(r["jaw"])
        yaws.append(r["yaw"])
        sharp.append(metrics.sharpness(made, frames).mean().item())
    assert min(gains) > 6
    assert min(jaws) > 0.9 and min(yaws) > 0.9
    assert 0.8 < min(sharp) <= max(sharp) < 1.1


def test_speech_moves_the_mouth_and_other_speech_does_not(shipped):
    """From the photo and the sound alone: jaw and lips as the true ones; with another clip's sound, unrelated to them."""
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


def test_released_defaults(shipped):
    models, meta, _, _ = shipped
    assert set(models) == {"encoder", "decoder", "generator"}
    assert (meta["steps"], meta["latents"], meta["audio"]) == (1, "pixel", "mel")
    assert (meta["gen_steps"], meta["guidance"], meta["size"]) == (4, 1.5, models["decoder"].config.image_size)
