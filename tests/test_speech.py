"""The synthetic voice: reproducible, bounded, and its sound tells the truth about its mouth."""

import math

import pytest
import torch

from world import speech

SEEDS = torch.arange(24)
CLIPS = speech.speak(SEEDS, 75)


def frame_power(wave):
    return wave.unflatten(1, (-1, 640)).square().mean(2)  # (B, F)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_uniform_is_a_counter_based_hash():
    seeds = torch.tensor([0, 1, 10**9, -5])
    u = speech.uniform(seeds, 20000, 7)
    assert torch.equal(u[2:3, :100], speech.uniform(seeds[2:3], 100, 7))
    assert u.min() >= 0 and u.max() < 1
    histogram = torch.stack([row.histc(10, 0, 1) for row in u]) / 20000
    assert (histogram - 0.1).abs().max() < 0.01
    others = [u[1], speech.uniform(seeds, 20000, 8)[0], u[0].roll(1)]  # other seed, other stream, next draw
    assert all(abs(correlation(u[0], other)) < 0.03 for other in others)


def splitmix64(state):
    """The finaliser in plain integers, as published (Steele, Lea & Flood 2014)."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_mix_is_splitmix64():
    for value in (1, 12345, 2**62 + 3, 2**63 + 99, 2**64 - 1):
        signed = value - 2**64 if value >= 2**63 else value
        assert speech._mix(torch.tensor([signed])).item() % 2**64 == splitmix64(value)


def test_shapes_and_ranges():
    assert CLIPS["wave"].shape == (24, 75 * 640) and CLIPS["wave"].dtype == torch.float32
    assert CLIPS["jaw"].shape == CLIPS["lip_width"].shape == (24, 75)
    assert all(x.isfinite().all() for x in CLIPS.values())
    assert CLIPS["wave"].abs().max() <= 1 and CLIPS["lip_width"].abs().max() <= 1
    assert CLIPS["jaw"].min() >= 0 and CLIPS["jaw"].max() <= 1
    assert CLIPS["jaw"].max() > 0.8 and CLIPS["lip_width"].min() < -0.7 and CLIPS["lip_width"].max() > 0.7
    assert CLIPS["emotion"].shape == (24, 7) and CLIPS["emotion"].min() >= 0
    torch.testing.assert_close(CLIPS["emotion"].sum(1), torch.ones(24))


def test_a_seed_alone_equals_the_seed_in_a_batch():
    alone, again = speech.speak(SEEDS[5:6], 75), speech.speak(SEEDS.flip(0), 75)
    for name, x in CLIPS.items():
        torch.testing.assert_close(alone[name], x[5:6], atol=1e-5, rtol=0)
        torch.testing.assert_close(again[name].flip(0), x, atol=1e-5, rtol=0)
    assert (CLIPS["wave"][0] - CLIPS["wave"][1]).abs().max() > 0.01


@pytest.mark.parametrize("frames", [1, 2, 31])
def test_a_longer_clip_begins_with_the_shorter(frames):
    short = speech.speak(SEEDS, frames)
    for name, x in short.items():
        assert x.shape[1] == {"wave": frames * 640, "emotion": 7}.get(name, frames)
        torch.testing.assert_close(x, CLIPS[name][:, :x.shape[1]], atol=1e-5, rtol=0)


def test_no_frames_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        speech.speak(SEEDS, 0)


def test_silence_shuts_the_mouth():
    _, _, since = speech.phones(SEEDS, speech.voice(SEEDS), 75 * speech.STEPS)
    speaking = (since != 0).unflatten(1, (-1, speech.STEPS)).any(2).float()
    deep = speaking.unfold(1, 5, 1).amax(2) == 0  # two frames from any speech, on either side
    assert 0.02 < deep.float().mean() < 0.5
    assert CLIPS["jaw"][:, 2:-2][deep].max() < 1e-6
    assert CLIPS["lip_width"][:, 2:-2][deep].abs().max() < 1e-6


def test_pauses_are_quieter_and_never_digital_silence():
    power = frame_power(CLIPS["wave"]).log10()
    assert power.min() > -12
    for clip, jaw in zip(power, CLIPS["jaw"], strict=True):
        if (jaw == 0).sum() > 8:
            assert clip[jaw > 0.3].mean() > clip[jaw == 0].mean() + 0.5  # 5 dB
    assert correlation((power - power.mean(1, keepdim=True)), CLIPS["jaw"]) > 0.5


def test_bilabials_close_the_mouth_in_mid_speech():
    said, _, _ = speech.phones(SEEDS, speech.voice(SEEDS), 75 * speech.STEPS)
    closed = said[..., 10].unflatten(1, (-1, speech.STEPS)).amin(2) > 0  # lips shut for a whole video frame
    assert closed.sum() > 20
    assert CLIPS["jaw"][closed].mean() < 0.03 < CLIPS["jaw"][~closed].mean()


def spectrum_of(vowel, monkeypatch):
    """Mean power spectrum of voices that say nothing but one vowel; its tract factors are set to one."""
    table = {name: speech.PHONES[vowel] for name in speech.PHONES}
    plain = speech.voice(SEEDS)
    one = torch.ones_like(plain["effort"])
    plain |= {"tract": one.expand(-1, 3), "effort": one, "lips": one, "pitch": 100 * one, "snr": 60 * one,
              "breath": 0 * one, "eq_tilt": 0 * one, "eq_bump": 0 * one}
    monkeypatch.setattr(speech, "PHONES", table)
    monkeypatch.setattr(speech, "voice", lambda seeds, emotion: plain)
    clips = speech.speak(SEEDS, 50)
    monkeypatch.undo()
    spectra = torch.stft(clips["wave"], 1024, window=torch.hann_window(1024),
                         return_complex=True).abs().square()
    return spectra.mean(2) / spectra.mean((1, 2))[:, None], clips  # (B, 513)


def test_measured_formants_are_those_of_the_vowel(monkeypatch):
    f = torch.arange(513) * 16000 / 1024

    def peak(power, low, high):
        band = (f >= low) & (f < high)
        # 140 Hz wide
        return f[band][power[:, band].log().mean(0).unfold(0, 9, 1).mean(1).argmax() + 4].item()

    for vowel in ("i", "a", "u", "ae"):
        power, clips = spectrum_of(vowel, monkeypatch)
        F1, F2 = speech.PHONES[vowel][:2]
        # stress moves F1, by way of the jaw
        F1 = speech.F1_CLOSED + speech.F1_SPAN * clips["jaw"].mean().item()
        if F1 > 350:  # below, F1 sits on the first harmonics
            assert abs(peak(power, 350, 950 if F2 > 1300 else 900) - F1) < 90, vowel
        assert abs(peak(power, max(F2 - 500, F1 + 150), F2 + 500) - F2) < 150, vowel


def test_pitch_and_emotion_reach_the_sound():
    voices = speech.voice(torch.arange(2000))
    assert voices["pitch"].min() >= 80 and voices["pitch"].max() <= 300
    emotion = voices["emotion"]
    assert (emotion.argmax(1) == 0).float().mean() > 0.5 and emotion[:, 1:].amax(0).min() > 0.7
    sad, happy = emotion[:, 2] > 0.6, emotion[:, 1] > 0.6
    assert voices["pitch"][happy].log().mean() > voices["pitch"][sad].log().mean() + 0.15
    assert voices["rate"][happy].mean() > voices["rate"][sad].mean()
    pitch = torch.full((1, 200), 125.0)
    pulses, noise = speech.excitation(SEEDS[:1], pitch)
    spectrum = torch.fft.rfft(pulses[0, :16000]).abs()
    # all its energy lies at multiples of the pitch
    assert spectrum.argsort()[-20:].remainder(125).eq(0).all()
    assert math.isclose(pulses.square().mean(), 1, abs_tol=0.05)
    assert math.isclose(noise.square().mean(), 1, abs_tol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu():
    there = speech.speak(SEEDS.cuda(), 75)
    for name in ("jaw", "lip_width", "emotion"):
        torch.testing.assert_close(there[name].cpu(), CLIPS[name], atol=1e-3, rtol=0)
    assert correlation(there["wave"].cpu(), CLIPS["wave"]) > 0.99
