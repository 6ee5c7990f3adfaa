"""train_gen.py: windows frame by frame, clips encoded once, exact resume, the release and its preview."""
import hashlib
import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_audio_features import whisper_folder  # noqa: F401
from test_encoder import run_two
from test_image import read_video
from test_train_ae import same, state

import flow
import sample
import train_ae
import train_gen
import training
from decoder import Decoder, DecoderConfig
from generator import Generator, GeneratorConfig
from media import audio_features, prepare
from media.device import autocast
from media.files import InputError
from media.latents import Pixel
from media.sound import load_audio
from media.weights import save_weights
from sample import load_models
from world.people import HELD_OUT, random_clip, random_moods
from world.render import render
from world.speech import EMOTIONS, speak

NANO = train_gen.PRESETS["nano"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ae(tmp_path_factory):
    """A release of stage 1."""
    out = tmp_path_factory.mktemp("ae")
    assert train_ae.main(["--preset", "nano", "--device", "cpu", "--steps", "3", "--out", str(out)]) == 0
    return out / "semo.safetensors"


def command(ae, out, *more, steps=4):
    return ["--preset", "nano", "--device", "cpu", "--ae", str(ae), "--out", str(out), "--steps", str(steps),
            *more]


def train(ae, out, *more, steps=4):
    return train_gen.main(command(ae, out, *more, steps=steps))


@pytest.fixture
def no_preview(monkeypatch):
    monkeypatch.setattr(train_gen, "preview", lambda *_: None)


# ---- windows: every entry names its clip and frame ---------------------------------------------------------

P, K, AHEAD, CLIPS, FRAMES = 3, 4, 2, 5, 14
QUIET = -1.0                                                                 # stands for a row of silence
CONFIG = GeneratorConfig(token_dim=6, window=K, past=P, lookahead=AHEAD)


def numbered(sets=(0,) * CLIPS, frames=(FRAMES,) * CLIPS, change=None, labelled=True):
    """Encoded clips whose every entry is 100 * clip + frame.

    Masked ones a half more, pictures of others -100 * clip - 1.. ; sets and lengths of the clips; frames at
    which their moods, that name them too, change.
    """
    name = torch.cat([100.0 * k + torch.arange(n) for k, n in enumerate(frames)])[:, None]           # (n, 1)
    change = frames if change is None else change
    places = torch.tensor([[sum(frames[:k]), n, sets[k], change[k]] for k, n in enumerate(frames)])
    others = -100.0 * torch.arange(len(frames))[:, None, None] - torch.arange(1, 5)[:, None]   # (clips, 4, 1)
    return train_gen.Encoded(name.expand(-1, 6), (name + 0.5).expand(-1, 6), name.expand(-1, 320),
                             (1 + name.expand(-1, 7)) * labelled,
                             torch.full((len(name), 9), torch.nan), others.expand(-1, -1, 6), places,
                             torch.zeros(len(frames), 7))


@pytest.fixture(scope="module")
def drawn():
    """400 windows as numbers: 100 * clip + frame; masked entries carry a half more."""
    found = train_gen.sample_windows(numbered(), CONFIG, 400, torch.Generator().manual_seed(0),
                                     torch.full((320,), QUIET))
    for part, shape in zip(found, [(400, K, 6), (400, P, 6), (400, 6), (400, P + K + AHEAD, 320),
                                   (400, P + K, 7)], strict=True):
        assert part.shape == shape and (part == part[..., :1]).all()         # whole rows, not mixtures
    new, past, reference, heard, mood = (part[..., 0] for part in found)
    start = new[:, 0] % 100
    return {"new": new, "past": past, "reference": reference, "heard": heard, "mood": mood,
            "clip": new[:, 0] // 100, "start": start,
            "begins": (past == reference[:, None]).all(1), "own": reference >= 0}


def test_new_frames_are_clear_and_in_a_row(drawn):
    assert torch.equal(drawn["new"], drawn["new"][:, :1] + torch.arange(K))
    assert set(drawn["clip"].tolist()) == set(range(CLIPS))
    inside = drawn["start"][~drawn["begins"]]
    assert set(inside.tolist()) == set(range(P, FRAMES - K + 1))    # every place that has a past and a future
    assert drawn["begins"].float().mean() == pytest.approx(0.25, abs=0.06)


def test_past_is_masked_and_leads_to_the_new_frames(drawn):
    inside = ~drawn["begins"]
    want = drawn["new"][inside, :1] + torch.arange(-P, 0) + 0.5
    assert torch.equal(drawn["past"][inside], want)


def test_a_video_starts_from_its_photo(drawn):
    """At the start the past is the reference, repeated, and that the clear frame before the first new one."""
    begins = drawn["begins"]
    assert torch.equal(drawn["past"][begins], drawn["reference"][begins, None].expand(-1, P))
    own = begins & drawn["own"]
    assert torch.equal(drawn["reference"][own], drawn["new"][own, 0] - 1)
    assert set(drawn["start"][begins].tolist()) == set(range(1, FRAMES - K + 1))  # any frame may be the photo


def test_reference_is_a_clear_frame_from_anywhere_in_the_clip_or_the_person_in_another_mood(drawn):
    own, reference, clip = drawn["own"] & ~drawn["begins"], drawn["reference"], drawn["clip"]
    assert torch.equal(reference[own] // 100, clip[own])
    assert set((reference[own] % 100).tolist()) == set(range(FRAMES))
    other = ~drawn["own"]
    assert set((-reference[other] - 100 * clip[other]).tolist()) == {1, 2, 3, 4}
    assert other.float().mean() == pytest.approx(0.85 / 2, abs=0.07)


def test_moods_are_those_of_past_and_new_frames_or_none(drawn):
    frame = (drawn["start"][:, None] + torch.arange(-P, K)).clamp(min=0)
    none = (drawn["mood"] == 0).all(1)
    assert none.float().mean() == pytest.approx(0.15, abs=0.05)
    assert torch.equal(drawn["mood"][~none], (1 + 100 * drawn["clip"][:, None] + frame)[~none])
    assert drawn["own"][none].all()                                          # then the photo tells the mood


def test_without_a_mood_the_reference_has_that_of_the_window():
    found = train_gen.sample_windows(numbered(change=(6,) * CLIPS), CONFIG, 2000,
                                     torch.Generator().manual_seed(0), torch.zeros(320))
    none, start, reference = (found[4] == 0).all((1, 2)), found[0][:, 0, 0] % 100, found[2][:, 0] % 100
    assert torch.equal(reference[none] < 6, start[none] < 6)
    own = found[2][:, 0] >= 0
    assert ((reference < 6) != (start < 6))[own & ~none].float().mean() > 0.3


def test_clips_of_unknown_mood_have_none_and_keep_their_own_reference():
    found = train_gen.sample_windows(numbered(labelled=False), CONFIG, 100, torch.Generator().manual_seed(0),
                                     torch.zeros(320))
    assert not found[4].any() and (found[2] >= 0).all()


def test_row_i_of_the_speech_belongs_to_frame_start_minus_past_plus_i(drawn):
    frame = drawn["start"][:, None] + torch.arange(-P, K + AHEAD)
    outside = (frame < 0) | (frame >= FRAMES)
    want = torch.where(outside, QUIET, 100 * drawn["clip"][:, None] + frame)
    silent = (drawn["heard"][:, :P] == QUIET).all(1)              # six in ten starts: nothing was said before
    assert silent[drawn["begins"]].float().mean() == pytest.approx(0.6, abs=0.12)
    assert not silent[~drawn["begins"]].any()
    want[silent, :P] = QUIET
    assert torch.equal(drawn["heard"], want)
    assert (drawn["heard"][drawn["start"] == FRAMES - K][:, -AHEAD:] == QUIET).all()     # nor after the end


def test_fresh_masks_change_the_past_alone(drawn):
    """The past is what encode_past makes of its frames: those before the first new one, or any at a start."""
    asked = []

    def encode_past(index, rng):
        asked.append(index)
        return index[..., None].expand(-1, -1, 6) + 0.25

    windows = train_gen.sample_windows(numbered(), CONFIG, 400, torch.Generator().manual_seed(0),
                                       torch.full((320,), QUIET), encode_past=encode_past)
    new, past, reference, audio, mood = (part[..., 0] for part in windows)
    for part, name in ((new, "new"), (reference, "reference"), (audio, "heard"), (mood, "mood")):
        assert torch.equal(part, drawn[name])
    inside = ~drawn["begins"]
    first_frame = FRAMES * drawn["clip"][inside] + drawn["start"][inside]
    assert torch.equal(asked[0][inside], (first_frame[:, None] + torch.arange(-P, 0)).long())
    assert torch.equal(past[inside], asked[0][inside] + 0.25)
    assert torch.equal(past[~inside], drawn["past"][~inside])


def test_windows_repeat_with_the_draw():
    one, again, other = (train_gen.sample_windows(numbered(), CONFIG, 8, torch.Generator().manual_seed(s),
                                                  torch.zeros(320))
                         for s in (0, 0, 1))
    assert same(list(one), list(again)) and not torch.equal(one[0], other[0])


def test_sets_are_drawn_equally_and_short_clips_from_their_start():
    """Four clips against one, which is too short for a past."""
    given = numbered(sets=(0, 0, 0, 0, 1), frames=(FRAMES,) * 4 + (P + K - 1,))
    new, past, reference, *_ = train_gen.sample_windows(given, CONFIG, 400, torch.Generator().manual_seed(0),
                                                        torch.zeros(320))
    short = new[:, 0, 0] >= 400
    assert short.float().mean() == pytest.approx(0.5, abs=0.08)
    assert set((new[short][:, 0, 0] - 400).tolist()) == set(range(1, P))
    assert torch.equal(past[short][:, 0], reference[short])
    assert (reference[short].abs() < 400 + P + K - 1).all() and (new[~short][:, -1, 0] % 100 < FRAMES).all()


def test_varied_sound_keeps_silence_and_its_rows():
    """Loudness and colour change alike in all rows of a window; nothing falls below silence."""
    quiet, rng = torch.full((320,), -1.4), torch.Generator().manual_seed(0)
    sound = torch.randn(50, 9, 4, 1, generator=rng).expand(-1, -1, -1, 80).flatten(2) + 2
    varied = audio_features.vary_sound(sound, quiet, rng)
    assert varied.shape == sound.shape and (varied >= quiet).all()
    change = (varied - sound).unflatten(2, (4, 80))
    loud = sound.unflatten(2, (4, 80)) > 2.5                                 # far above any floor of noise
    spread = torch.stack([change[k][..., 40][loud[k][..., 40]].std() for k in range(50)])
    assert spread.max() < 0.05 and change[:, :, :, 40].std() > 0.15


def test_varied_sound_moves_the_formants_of_a_window_alike():
    sound = torch.full((200, 3, 4, 80), 1.0)
    sound[..., 40] = 20.0
    quiet, rng = torch.full((320,), -1.4), torch.Generator().manual_seed(0)
    varied = audio_features.vary_sound(sound.flatten(2), quiet, rng)
    peak = varied.unflatten(2, (4, 80)).argmax(-1)                            # (200, 3, 4)
    assert (peak == peak[:, :1, :1]).all() and peak.min() in (34, 35) and peak.max() in (46, 47)


def test_a_slower_clip_keeps_sound_and_motion_together():
    """A ramp of motion and the same ramp in the spectra, in a quarter of a frame's steps."""
    time = torch.arange(40.0)
    spectra = (time[:, None] + (torch.arange(4) - 1.5) / 4)[..., None].expand(-1, -1, 80)    # (40, 4, 80)
    motion = audio_features.change_tempo(time[:, None].expand(-1, 6), 50)
    features = audio_features.change_tempo(spectra.reshape(40, 320), 50).unflatten(1, (4, 80))
    assert motion.shape == (50, 6) and features.shape == (50, 4, 80)
    torch.testing.assert_close(motion[5:45, 0], (torch.arange(5, 45) + 0.5) * 0.8 - 0.5)
    torch.testing.assert_close(features.mean((1, 2))[5:45], motion[5:45, 0], atol=1e-4, rtol=0)
    rows = torch.randn(40, 7)
    assert audio_features.change_tempo(rows, 40) is rows


def test_directions_read_what_is_known():
    """Tokens whose first number is the opening and whose second the yaw: directions are these axes."""
    rng = torch.Generator().manual_seed(0)
    motion, factors = torch.randn(400, 12, generator=rng), torch.randn(400, 9, generator=rng)
    factors[:, 0], factors[:, 3] = 5 * motion[:, 0], -0.1 * motion[:, 1]
    places = torch.tensor([[0, 200, 0, 200], [200, 200, 0, 200]])
    encoded = numbered(frames=(200, 200))._replace(motion=motion, factors=factors, clip_index=places)
    directions, changes = train_gen.readout_directions(encoded)
    assert directions.shape == (12, 9) and changes.shape == (9, 12)
    delta = (motion[:100] - motion[100:200]) @ directions
    known = torch.stack([factors[:100, 0] - factors[100:200, 0], factors[:100, 3] - factors[100:200, 3]], 1)
    for k, column in enumerate((0, 3)):
        assert torch.corrcoef(torch.stack([delta[:, column], known[:, k]]))[0, 1] > 0.99
    assert directions[:, [1, 2, 4, 5, 6, 7, 8]].norm() < 0.5 * directions[:, [0, 3]].norm()
    torch.testing.assert_close((changes @ directions)[:, [0, 3]], torch.eye(9)[:, [0, 3]], rtol=0, atol=0.05)
    assert train_gen.readout_directions(encoded._replace(factors=torch.full((400, 9), torch.nan))) is None
    factors[:, [3, 8]] = 0                                     # what never changes tells nothing
    still, changes = train_gen.readout_directions(encoded._replace(factors=factors))
    assert still.isfinite().all() and not still[:, [3, 8]].any()
    matrix = train_gen.enlarge(still, changes, [3.0] * 9)
    assert matrix.isfinite().all() and torch.linalg.matrix_norm(matrix, 2) < 4


def test_amplified_motion_is_read_as_larger_and_else_unchanged():
    """The decoder's layers give for a motion what they gave for it with two of its readings enlarged."""
    config = DecoderConfig(image_size=8, patch_size=4, width=24, depth=1, heads=2, token_dim=12)
    decoder, rng = Decoder(config), torch.Generator().manual_seed(0)
    directions, gains = torch.randn(12, 9, generator=rng), (1.5, 1, 2, 1, 1, 1, 1, 1, 1)
    changes, motion = torch.linalg.pinv(directions), torch.randn(5, 12, generator=rng)
    matrix = train_gen.enlarge(directions, changes, gains)
    larger = motion @ matrix
    torch.testing.assert_close(larger @ directions, motion @ directions * torch.tensor(gains),
                               rtol=1e-4, atol=1e-4)
    rest = torch.eye(12) - directions @ changes                              # what is not read
    torch.testing.assert_close(larger @ rest, motion @ rest, rtol=1e-4, atol=1e-4)
    first, second = decoder.motion(larger), decoder.motion_delta.project(torch.cat([larger, larger], 1))
    train_gen.amplify(decoder, matrix)
    torch.testing.assert_close(decoder.motion(motion), first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.motion_delta.project(torch.cat([motion, motion], 1)), second,
                               rtol=1e-4, atol=1e-4)


def test_motions_are_amplified_on_the_device_of_the_decoder():
    """The device "meta" refuses whatever lies elsewhere."""
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(image_size=8, patch_size=4, width=24, depth=1, heads=2, token_dim=12))
        directions = torch.ones(12, 9)
    train_gen.amplify(decoder, train_gen.enlarge(directions, directions.T, train_gen.GAINS))


def test_a_wished_mood_shows_more_than_in_the_clips():
    """Changes from the reference are larger, of new frames and past, in windows with a mood alone."""
    def draw(**given):
        return train_gen.sample_windows(numbered(), CONFIG, 100, torch.Generator().manual_seed(0),
                                        torch.zeros(320), **given)

    matrix = torch.eye(6) + 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    (new, past, reference, audio, mood), found = draw(), draw(expression=matrix)
    assert torch.equal(reference, found[2]) and torch.equal(audio, found[3])
    assert torch.equal(mood[..., 0], found[4][..., 0])
    torch.testing.assert_close(mood[..., 1:], train_gen.STRENGTH * found[4][..., 1:])
    assert mood[..., 1:].any()
    wished = mood.flatten(1).any(1)
    assert 60 < wished.sum() < 98
    for x, y in zip((new, past), found, strict=False):
        assert torch.equal(x[~wished], y[~wished])
        base = reference[wished, None]
        torch.testing.assert_close(y[wished], base + (x[wished] - base) @ matrix)


def test_the_loss_by_hand():
    """A model that is wrong by a constant along one direction: eq. (9), its share, no change in time."""
    motion, noise, t = torch.randn(2, K, 6), torch.randn(2, K, 6), torch.tensor([0.3, 1.0])
    wrong = torch.tensor([2.0, 0, 0, 0, 0, 0])
    model = lambda z, t: motion - noise + wrong                              # noqa: E731
    assert train_gen.motion_loss(model, motion, noise, t).item() == pytest.approx(4 / 6, abs=1e-5)
    loss = train_gen.motion_loss(model, motion, noise, t, torch.eye(6, 9))
    assert loss.item() == pytest.approx(4 / 6 + 0.5 * train_gen.SHARES[0] * 4, abs=1e-5)
    jumping = lambda z, t: motion - noise + wrong * torch.tensor([0.0, 1, 0, 1])[:, None]    # noqa: E731
    loss = train_gen.motion_loss(jumping, motion, noise, t, torch.zeros(6, 9))
    assert loss.item() == pytest.approx(4 / 12 + 0.25 * 4 / 6, abs=1e-5)


def test_silence_is_the_row_of_a_silent_wave():
    assert torch.equal(sample.encode_silence("mel"),
                       audio_features.extract_features(torch.zeros(1, 6400))[0, 5])


# ---- clips -------------------------------------------------------------------------------------------------

@pytest.fixture
def fp32(monkeypatch):
    """No autocast, so that equal tokens are equal."""
    monkeypatch.setattr(train_gen, "autocast", lambda device: nullcontext())


def test_a_clip_is_encoded_frame_by_frame(ae, fp32):
    encoder = load_models(ae)[0]["encoder"]
    draw, args = torch.Generator().manual_seed(0), train_gen.parse(command("ae", "out", "--clips", "4"))
    clip = list(train_gen.synthetic_clips(args, {"seconds": 1.2}, 32, 0, 1))[3]
    clear = train_gen.encode_clip(encoder, clip.frames)
    masked = train_gen.encode_clip(encoder, clip.frames, 0.6, draw)
    voice, face, change = random_moods(torch.tensor([3]), 30)
    made = random_clip(torch.tensor([3]), 30, face, voice)
    with torch.no_grad():
        want = encoder(render(made["identity"].expand(30, -1), made["motion"][0], 32)).flatten(1)
    torch.testing.assert_close(clear, want, atol=1e-5, rtol=1e-4)
    assert torch.equal(clip.wave, made["wave"]) and torch.equal(clip.mood, face[0]) and clip.change == change
    assert masked.shape == clear.shape == (30, 8) and not torch.isclose(masked, clear).all(1).any()
    torch.testing.assert_close(train_gen.encode_clip(encoder, clip.frames, 0.0, draw), clear)    # no mask


def test_masks_are_those_of_the_draw_and_differ_from_step_to_step(ae, fp32):
    encoder, frames = load_models(ae)[0]["encoder"], torch.randn(9, 3, 32, 32)

    def encode(step):
        return train_gen.encode_clip(encoder, frames, 0.9, training.step_rng(0, 0, step))

    assert torch.equal(encode(1), encode(1)) and not torch.isclose(encode(1), encode(2)).all(1).any()


def test_a_person_is_also_seen_in_other_moods():
    """No two pictures are alike, and all are nearer to the person's own frames than to somebody else's."""
    args = train_gen.parse(command("ae", "out", "--clips", "2"))
    one, other = train_gen.synthetic_clips(args, {"seconds": 1.2}, 32, 0, 1)
    assert one.others.shape == (train_gen.OTHERS, 3, 32, 32)
    distance = [torch.cdist(one.others.flatten(1), x.frames.flatten(1)).amin(1) for x in (one, other)]
    assert (distance[0] < 0.7 * distance[1]).all() and torch.pdist(one.others.flatten(1)).min() > 0


def test_moods_that_never_disagree():
    """The ablation: voice, face and references of a clip are of one mood."""
    args = train_gen.parse(command("ae", "out", "--clips", "3"))
    for clip in train_gen.synthetic_clips(args, {"seconds": 1.2, "agree": True}, 32, 0, 1):
        assert torch.equal(clip.mood, clip.voice.expand(30, -1)) and clip.change == 30 and clip.others is None


def test_processes_encode_different_clips_none_held_out(monkeypatch):
    seen, make = [], random_clip
    monkeypatch.setattr(train_gen, "random_clip", lambda seeds, *more: (
        seen.extend(seeds.tolist()) or make(seeds, *more)))
    for seed in (0, 1, 9):
        for rank in range(2):
            args = train_gen.parse(command("ae", "out", "--clips", "3", "--seed", str(seed)))
            assert len(list(train_gen.synthetic_clips(args, NANO, 32, rank, 2))) == 3
    assert len(set(seen)) == 18 and 0 <= min(seen) and max(seen) < HELD_OUT
    list(train_gen.synthetic_clips(train_gen.parse(command("ae", "out", "--seed", "12345")), NANO, 32, 0, 1))
    assert max(seen) < HELD_OUT


def test_held_out_clips_are_of_the_test_split_or_else_synthetic(ae, tmp_path, monkeypatch):
    asked, seeds, make = [], [], random_clip

    def real_clips(args, preset, people, size, rank, world):
        asked.append((people, preset["augment"]))
        return train_gen.synthetic_clips(args, preset, size, rank, world)

    def find_clips(folder, split, sound):
        if folder == "damaged":
            raise InputError(folder)
        return {"a": [split]} if folder == "any" else {}

    monkeypatch.setattr(train_gen, "real_clips", real_clips)
    monkeypatch.setattr(train_gen.prepared, "find_clips", find_clips)
    monkeypatch.setattr(train_gen, "fingerprints", lambda paths: ["x"])
    monkeypatch.setattr(train_gen, "random_clip",
                        lambda seed, *more: seeds.append(seed.item()) or make(seed, *more))
    encoder = load_models(ae)[0]["encoder"]
    for folders, read, want in ((["any"], 1, 0), (["without"], 0, HELD_OUT), (["without", "any"], 1, 0)):
        args = train_gen.parse(command(ae, tmp_path, "--clips", "1", "--data", *folders))
        encoded = train_gen.encode_held_out(args, NANO, encoder, Pixel(), 32, 0, 1, CPU)
        assert asked == read * [({"a": ["test"]}, False)] and seeds.pop() == want and seeds == []
        assert len(encoded.clip_index) == 1 and args.data == folders
        asked.clear()
    args.data = ["damaged"]                              # is told, not replaced by synthetic clips
    with pytest.raises(InputError, match="damaged"):
        train_gen.encode_held_out(args, NANO, encoder, Pixel(), 32, 0, 1, CPU)


def test_the_synthetic_world_is_drawn_on_the_training_device(monkeypatch):
    """The device "meta" refuses whatever lies elsewhere."""
    monkeypatch.setattr(torch.Tensor, "item", lambda x: 3)                           # numbers it has not
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x)
    args = train_gen.parse(command("ae", "out", "--clips", "1"))
    clip, = train_gen.synthetic_clips(args, NANO, 32, 0, 1, "meta")
    assert {x.device.type for x in (clip.frames, clip.wave, clip.others, clip.factors)} == {"meta"}


def test_clips_are_kept_until_something_changes(ae, tmp_path, monkeypatch):
    made, encode = [], train_gen.encode_clip
    monkeypatch.setattr(train_gen, "encode_clip", lambda *given: made.append(len(made)) or encode(*given))
    models, meta = load_models(ae)

    def get(path=ae, *more):
        made.clear()
        args = train_gen.parse(command(path, tmp_path, "--clips", "1", *more))
        encoder = load_models(path)[0]["encoder"]
        return train_gen.encode_dataset(args, NANO, {}, encoder, Pixel(), 32, 0, 1, CPU)

    first = get()
    assert made == [0, 1, 2]                   # the clip, the same through masks, the person in other moods
    assert [part.shape for part in first[:-1]] == [(25, 8), (25, 8), (25, 320), (25, 7), (25, 9), (1, 4, 8),
                                                   (1, 4), (1, 7)]
    assert first.frames is None                                              # with fresh_masks alone
    assert same(list(first), list(get())) and made == []                     # the second time from the disk
    models["encoder"].tokens.data += 1
    save_weights(tmp_path / "other.safetensors", models, meta)
    other = get(tmp_path / "other.safetensors")
    assert made == [0, 1, 2] and not torch.equal(other[0], first[0])    # another encoder
    assert same(list(get()), list(first)) and made == [0, 1, 2]      # and back: the old ones are not confused
    for more in (["--mask-max", "0.5"], ["--seed", "1"], ["--clips", "2"]):
        get(ae, *more)
        assert made != []
        get(ae, *more)
        assert made == []
    (tmp_path / "render.py").write_text("another world")
    monkeypatch.setattr(train_gen, "WORLD", [tmp_path / "render.py"])
    get(ae, *more)
    assert made != []


@pytest.mark.parametrize("row, want", [
    ({"emotion": "fear", "level": 2}, {"afraid": 0.7, "neutral": 0.3}),
    ({"emotion": "happy", "level": 3}, {"happy": 1}),
    ({"emotion": "surprised", "level": 1}, {"surprised": 0.4, "neutral": 0.6}),
    ({"emotion": "disgust"}, {"disgusted": 1}),
    ({"emotion": "neutral", "level": 1}, {"neutral": 1}), ({"emotion": "contempt", "level": 3}, {}),
    ({}, {})])
def test_labels_of_real_clips(row, want):
    torch.testing.assert_close(train_gen.mood_label(row),
                               torch.tensor([want.get(name, 0.0) for name in EMOTIONS]))


def test_every_emotion_of_mead_but_contempt_has_a_label():
    got = {name: train_gen.mood_label({"emotion": name}) for name in prepare.EMOTIONS}
    assert not got.pop("contempt").any()
    assert sorted(mood.argmax().item() for mood in got.values()) == list(range(7))


@pytest.fixture
def no_landmarks(monkeypatch):
    monkeypatch.setattr(train_gen.prepared, "load_landmarks",
                        lambda row: (None, np.full((9, 10), np.nan, np.float32)))


def test_processes_read_different_real_clips(monkeypatch, no_landmarks):
    people = {"b": [{"path": "b0"}, {"path": "b1"}], "a": [{"path": "a0"}, {"path": "a1"}, {"path": "a2"}]}
    read = []
    monkeypatch.setattr(train_gen.prepared, "read_clip", lambda path, size: (
        read.append(path) or (torch.zeros(1), torch.zeros(1))))
    args = train_gen.parse(command("ae", "out", "--clips", "9"))
    for rank in range(2):
        found = list(train_gen.real_clips(args, {"augment": False}, people, 32, rank, 2))
        assert all(not clip.mood.any() and clip.others is None for clip in found)  # nobody said how they feel
    assert sorted(read) == ["a0", "a1", "a2", "b0", "b1"]                    # all, each once


def test_clips_are_drawn_by_the_seed_not_by_the_alphabet(monkeypatch, no_landmarks):
    people = {name: [{"path": f"{name}{k}"} for k in range(10)] for name in "abcdefgh"}
    read = []
    monkeypatch.setattr(train_gen.prepared, "read_clip", lambda path, size: (
        read.append(path) or (torch.zeros(1), torch.zeros(1))))
    for seed in ("0", "0", "1"):
        args = train_gen.parse(command("ae", "out", "--clips", "10", "--seed", seed))
        list(train_gen.real_clips(args, {"augment": False}, people, 32, 0, 1))
    first, again, other = read[:10], read[10:20], read[20:]
    assert first == again and first != other and len({path[0] for path in first}) > 4


def test_augmented_clips_are_seen_mirrored_too(monkeypatch):
    frames = torch.randn(30, 3, 4, 4)
    monkeypatch.setattr(train_gen.prepared, "read_clip", lambda *_: (frames, torch.zeros(30 * 640)))
    known = np.tile(np.arange(1, 11, dtype=np.float32), (30, 1))
    monkeypatch.setattr(train_gen.prepared, "load_landmarks", lambda row: (None, known))
    args = train_gen.parse(command("ae", "out", "--clips", "9"))
    plain, mirrored = train_gen.real_clips(args, {"augment": True}, {"a": [{"path": "a0"}]}, 4, 0, 1)
    assert torch.equal(mirrored.frames, plain.frames.flip(-1))
    assert torch.equal(mirrored.wave, plain.wave)
    assert plain.factors[0].tolist() == [1, 2, 3.5, 5, 6, 7, 9, 8, 10]   # head pose, corner, brow, furrow
    assert mirrored.factors[0].tolist() == [1, 2, 3.5, -5, 6, -7, 9, 8, 10]


def test_a_labelled_person_is_also_seen_in_neutral_clips(monkeypatch, no_landmarks):
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))    # the clips in their order
    rows = [{"path": name, "identity": "a", "emotion": emotion, "level": 3, "frames": 9}
            for name, emotion in (("a0", "neutral"), ("a1", "happy"), ("a2", "sad"), ("a3", "neutral"))]
    rows.append({"path": "b0", "identity": "b", "emotion": "angry", "level": 3, "frames": 9})
    monkeypatch.setattr(train_gen.prepared, "read_clip", lambda *_: (
        torch.zeros(9, 3, 2, 2), torch.zeros(9 * 640)))
    monkeypatch.setattr(train_gen.prepared, "read_at", lambda path, *_: (
        np.full((1, 2, 2, 3), ord(path[1]), np.uint8)))
    args = train_gen.parse(command("ae", "out", "--clips", "9"))
    found = list(train_gen.real_clips(args, {"augment": False}, {"a": rows[:4], "b": rows[4:]}, 2, 0, 1))
    seen = [None if x.others is None else set((127.5 * (x.others[:, 0, 0, 0] + 1)).round().int().tolist())
            for x in found]
    zero, three = ord("0"), ord("3")
    assert seen == [{three}, {zero, three}, {zero, three}, {zero}, None]
    assert found[1].others.shape == (4, 3, 2, 2)
    assert [x.change for x in found] == [9] * 5 and found[1].mood[:, EMOTIONS.index("happy")].eq(1).all()


# ---- the emotion of a voice --------------------------------------------------------------------------------

def test_the_emotion_of_a_voice_is_learned(tmp_path, monkeypatch):
    """Sad voices are dull and slow, surprised ones high: told apart on people never heard."""
    args = train_gen.parse(command("ae", str(tmp_path), "--voices", "400"))
    encoded = numbered()                                                 # clips without a label teach nothing
    pair = torch.eye(7)[[EMOTIONS.index("sad"), EMOTIONS.index("surprised")]]
    monkeypatch.setattr(train_gen, "voice_moods", lambda seeds: pair[seeds % 2])
    voice = train_gen.train_voice(args, {"seconds": 1.5}, encoded, 0, steps=300)
    assert not voice.training
    seeds = HELD_OUT + torch.arange(64)
    wave = audio_features.normalise_loudness(speak(seeds, 40, pair[seeds % 2])["wave"])
    rows = audio_features.extract_features(wave)
    mood = voice(voice.pool(rows)[0][:, -1]).softmax(-1)
    told = mood[:, EMOTIONS.index("surprised")] > mood[:, EMOTIONS.index("sad")]
    assert (told == (seeds % 2 == 1)).float().mean() > 0.85
    assert mood[:, [EMOTIONS.index("sad"), EMOTIONS.index("surprised")]].sum(1).min() > 0.6
    again = train_gen.train_voice(args, {"seconds": 1.5}, encoded, 0, steps=300)    # statistics from the disk
    assert same(again.state_dict(), voice.state_dict())


def test_no_emotion_is_more_frequent_in_training_voices():
    moods = train_gen.voice_moods(torch.arange(1400))
    assert moods[::2].sum(0).tolist() == [100] * 7 and moods[::2].amax(1).eq(1).all()
    assert torch.allclose(moods.sum(1), torch.ones(1400)) and (moods[1::2].amax(1) < 1).any()


def test_labelled_clips_teach_the_voice_too(tmp_path):
    args = train_gen.parse(command("ae", str(tmp_path), "--voices", "3"))
    encoded = numbered(frames=(60, 30))._replace(voices=torch.stack([torch.zeros(7), torch.eye(7)[2]]))
    model = train_gen.VoiceEmotion(train_gen.VoiceConfig())
    x, y = train_gen.voice_statistics(args, {"seconds": 1}, encoded, model, 0)
    assert x.shape == (4, 3, 320) and y.shape == (4, 7) and y[3, 2] == 1
    want = model.pool(encoded.features[None, 60:])[0][0, [24, 29, 29]]
    torch.testing.assert_close(x[3], want)


# ---- the paper's own method --------------------------------------------------------------------------------

def test_the_preset_paper_has_none_of_our_changes():
    preset = train_gen.PRESETS["paper"]
    assert preset["fresh_masks"] and not preset["balanced"] and not preset["augment"]
    assert preset["guidance"] == 1 and preset["muon_lr"] is None and preset["lr"] == 1e-4
    assert preset["generator"].window == 16
    assert not preset["generator"].experts and not preset["generator"].truncated
    assert train_gen.parse(["--preset", "paper"]).mask_max == 0.2


def test_the_preset_paper_trains_with_smaller_networks(
        ae, whisper_folder, tmp_path, monkeypatch, no_preview):                        # noqa: F811
    """Three steps on features of a random Whisper; each sees the past through other masks."""
    seen, encode, choose = [], train_gen.encode_clip, train_gen.sample_windows

    def recorded(encoder, frames, *given):
        found = encode(encoder, frames, *given)
        seen.extend([found] if len(frames) == small.past else [])            # not of whole clips or others
        return found

    def same_windows(encoded, config, count, rng, silence, augment, encode_past, expression):
        assert not augment and expression is None                            # ours, not the paper's
        if encoded.frames is None:                                           # held out
            return choose(encoded, config, count, rng, silence)
        return choose(encoded, config, count, torch.Generator().manual_seed(1), silence, False,
                      lambda index, _: encode_past(index, rng))

    monkeypatch.setattr(train_gen, "encode_clip", recorded)
    monkeypatch.setattr(train_gen, "sample_windows", same_windows)
    paper = train_gen.PRESETS["paper"]
    small = replace(paper["generator"], width=32, depth=1, heads=1, window=4, past=5, lookahead=1)
    preset = {**paper, "generator": small, "clips": 1, "seconds": 1, "windows": 4}
    args = train_gen.parse(["--preset", "paper", "--device", "cpu", "--ae", str(ae), "--out", str(tmp_path),
                            "--steps", "3", "--mask-max", "0.9", "--whisper", whisper_folder],
                           {"paper": preset})
    assert train_gen.train(args, preset) == 0
    steps = torch.stack(seen).unflatten(0, (3, 4))                           # (steps, windows, P, L*D)
    assert not torch.equal(steps[0], steps[1]) and not torch.equal(steps[1], steps[2])
    kept = torch.load(tmp_path / "clips-0.pt", weights_only=True)
    assert kept["frames"].shape == (25, 3, 32, 32) and kept["frames"].dtype == torch.float16
    assert len(state(tmp_path)["optimisers"]) == 1                           # AdamW alone
    others = next(train_gen.synthetic_clips(args, preset, 32, 0, 1)).others
    with torch.no_grad(), autocast(CPU):                                     # M_r is never masked
        want = load_models(ae)[0]["encoder"](others).flatten(1)
    torch.testing.assert_close(kept["others"][0], want, atol=0.01, rtol=0)


# ---- several processes -------------------------------------------------------------------------------------

def given_windows():
    """A generator with no layer at zero and four windows for it: new motions, noise, times, the rest."""
    torch.manual_seed(0)
    model = Generator(replace(CONFIG, width=32, depth=2, heads=2, experts=2))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    new, past, reference = torch.randn(4, K, 6), torch.randn(4, P, 6), torch.randn(4, 6)
    audio, mood = torch.randn(4, P + K + AHEAD, 320), torch.rand(4, P + K, 7)
    cond = {"past": past, "reference": reference, "audio": audio, "mood": mood,
            "drop": torch.tensor([True, False, False, True])}
    return model, [new, torch.randn(4, K, 6), torch.rand(4)], cond


def half(rank, folder):
    """One of two processes: the gradients of two of the windows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(minutes=2))
    try:
        model, given, about = given_windows()
        mine = slice(2 * rank, 2 * rank + 2)
        wrapped = training.ddp_wrap(model, 2, CPU)
        train_gen.flow.flow_loss(wrapped, *(x[mine] for x in given),
                                 **{name: x[mine] for name, x in about.items()}).backward()
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    os._exit(0)                                                              # as training.shutdown does


def test_two_processes_have_the_gradients_of_one(tmp_path):
    run_two(half, tmp_path)
    model, given, about = given_windows()
    train_gen.flow.flow_loss(model, *given, **about).backward()
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got["head.weight"].abs().max() > 0.1
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=0, msg=name)


# ---- whole runs --------------------------------------------------------------------------------------------

def test_a_run_writes_its_files(ae, tmp_path):
    before = hashlib.sha256(ae.read_bytes()).digest()
    assert train(ae, tmp_path, "--save-every", "3") == 0
    assert sorted(os.listdir(tmp_path)) == ["clips-0.pt", "held-out.pt", "log.jsonl", "progress.png",
                                            "semo.safetensors", "state.pt", "step000003.mp4",
                                            "step000004.mp4", "voices-0.pt"]
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [row["step"] for row in rows] == [3, 4]
    assert all(0 < row[name] < 100 for row in rows for name in ("loss", "loss_held_out"))
    assert hashlib.sha256(ae.read_bytes()).digest() == before
    models, meta = load_models(tmp_path / "semo.safetensors")
    assert list(models) == ["encoder", "decoder", "generator", "voice"]
    want = {"audio": "mel", "gen_steps": 4, "guidance": 2.0, "latents": "pixel", "size": 32}
    assert models["generator"].config.window == 4 and want.items() <= meta.items()
    stage1, ema = load_models(ae)[0], state(tmp_path)["ema"]
    for kind in ("encoder", "decoder"):                                      # frozen, statistics too
        assert same(dict(stage1[kind].state_dict()), dict(models[kind].state_dict()))
    for name, value in models["generator"].state_dict().items():
        torch.testing.assert_close(value, ema[name], rtol=1e-3, atol=1e-6, msg=name)
    kept = torch.load(tmp_path / "clips-0.pt", weights_only=True)
    encoded = train_gen.Encoded(*(kept[name] for name in train_gen.Encoded._fields))
    mouth, axes = train_gen.readout_directions(encoded)[0][:, :2], models["generator"].truncated
    torch.testing.assert_close(axes.T @ axes, torch.eye(2), rtol=0, atol=2e-3)
    assert (mouth - axes @ axes.T @ mouth).norm() < 0.01 * mouth.norm() != 0


def test_motions_of_real_faces_are_amplified_once(ae, tmp_path, monkeypatch, no_preview):
    """Also where the weights of a run are given as --ae again."""
    monkeypatch.setattr(train_gen, "real_clips", lambda args, preset, people, size, rank, world: (
        train_gen.synthetic_clips(args, preset, size, rank, world)))
    monkeypatch.setattr(train_gen, "fingerprints", lambda paths: ["x"])
    for name, people in (("load_set", {}), ("find_clips", {"a": [1]})):
        monkeypatch.setattr(train_gen.prepared, name, lambda *_, people=people, **__: people)
    weights, path = [load_models(ae)[0]["decoder"].motion.weight], ae
    for out in (tmp_path / "first", tmp_path / "again"):
        assert train(path, out, "--data", "folder", steps=1) == 0
        path = out / "semo.safetensors"
        models, meta = load_models(path)
        assert meta["gains"] == list(train_gen.GAINS)
        weights.append(models["decoder"].motion.weight)
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])


def test_the_preview_is_the_held_out_person_with_their_words(ae, tmp_path, monkeypatch):
    """Made as sample.py makes videos: with the steps and the guidance of the weights that lie beside it."""
    asked, generate = [], sample.generate_motion
    monkeypatch.setattr(sample, "generate_motion",
                        lambda *given: asked.append(given[5:7]) or generate(*given))
    assert train(ae, tmp_path, steps=1) == 0
    _, meta = load_models(tmp_path / "semo.safetensors")
    assert asked == [(meta["gen_steps"], meta["guidance"])] == [(4, 2.0)]
    path = str(tmp_path / "step000001.mp4")
    with av.open(path) as container:
        assert container.streams.video[0].average_rate == 25 and len(container.streams.audio) == 1
    frames, sound = list(read_video(path, 32)), load_audio(path)
    made = random_clip(torch.tensor([HELD_OUT]), 75)
    photo = render(made["identity"], made["motion"][:, 0], 32)[0]
    assert len(frames) == 75
    assert (frames[0] - photo).square().mean() < 0.05                      # a fresh decoder copies the photo
    assert len(sound) == pytest.approx(3 * 16000, abs=1100)                  # AAC pads to whole blocks
    wave = audio_features.normalise_loudness(made["wave"])[0]
    n = min(len(wave), len(sound))
    assert torch.corrcoef(torch.stack([wave[:n], sound[:n]]))[0, 1] > 0.9


def test_stop_and_resume_give_the_same_run(ae, tmp_path, monkeypatch, no_preview):
    assert train(ae, tmp_path / "whole", steps=10) == 0
    choose, seeds = train_gen.sample_windows, []

    def windows(*given, **named):
        seeds.append(given[3].initial_seed())
        if len(seeds) == 5:                                                 # while the fifth step is computed
            os.kill(os.getpid(), signal.SIGTERM)
        return choose(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train_gen, "sample_windows", windows)
        assert train(ae, tmp_path / "parts", steps=10) == 130
        assert state(tmp_path / "parts")["step"] == 5
        load_models(tmp_path / "parts" / "semo.safetensors")
        assert train(ae, tmp_path / "parts", steps=10) == 0
    assert len(set(seeds)) == 10                                             # every step draws anew
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["step"] == 10 and len(whole["optimisers"]) == 2 and whole["optimisers"][1]["state"]
    assert same(whole, parts)                                                # weights, EMA, optimisers
    name = "semo.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_one_set_of_windows_is_learnt(ae, tmp_path, monkeypatch, no_preview):
    choose, loss = train_gen.sample_windows, train_gen.motion_loss
    losses = []

    def recorded(*given, **cond):
        losses.append(loss(*given, **cond))
        return losses[-1]

    monkeypatch.setattr(train_gen, "sample_windows",
                        lambda given, config, count, draw, *more, **named: (
                            choose(given, config, count, draw.manual_seed(1), *more, **named)))
    monkeypatch.setattr(train_gen, "motion_loss", recorded)
    assert train(ae, tmp_path, steps=110) == 0
    *losses, held_out = losses
    assert losses[-1] < losses[0] / 5
    told = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert told["loss_held_out"] == pytest.approx(held_out.item(), rel=1e-3)
    assert told["loss"] == pytest.approx(torch.stack(losses[-100:]).mean().item(), rel=1e-3)


def test_nan_stops_the_run_and_spares_the_state(ae, tmp_path, monkeypatch, no_preview):
    choose, calls = train_gen.sample_windows, []

    def spoilt(*given, **named):
        calls.append(1)
        new, *rest = choose(*given, **named)
        return new * (float("nan") if len(calls) == 5 else 1), *rest                # the third: held out

    monkeypatch.setattr(train_gen, "sample_windows", spoilt)
    with pytest.raises(SystemExit) as end:
        train(ae, tmp_path, "--save-every", "2")
    said = str(end.value)
    assert said.startswith("loss nan") and "step 3" in said and "state.pt" in said
    held = state(tmp_path)
    assert held["step"] == 2 and all(v.isfinite().all() for kind in ("model", "ema")
                                     for v in held[kind].values())


def test_a_kill_while_the_last_step_is_saved_costs_no_release(ae, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_gen, "save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            train(ae, tmp_path)
    assert train(ae, tmp_path) == 0                                          # the same command again
    assert "generator" in load_models(tmp_path / "semo.safetensors")[0]


# ---- refusals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [None, b"no weights"])
def test_a_wrong_ae_is_one_sentence(tmp_path, content, capsys):
    path = tmp_path / "wrong.safetensors"
    if content is not None:                                                  # None: there is no such file
        path.write_bytes(content)
    assert train(path, tmp_path / "out") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("train_gen.py: ") and str(path) in said[0]
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_and_a_finished_run_says_so(ae, tmp_path, no_preview, capsys):
    assert train(ae, tmp_path, steps=2) == 0
    before = (tmp_path / "state.pt").read_bytes()
    assert "windows: 4" in capsys.readouterr().err                           # what the run does
    assert train(ae, tmp_path, "--windows", "2", steps=2) == 2
    assert "--windows 4 -> 2" in capsys.readouterr().err.splitlines()[-1]
    assert train(ae, tmp_path, steps=2) == 0
    assert "finished at step 2, nothing to do" in capsys.readouterr().err
    assert (tmp_path / "state.pt").read_bytes() == before


def test_an_out_that_cannot_be_written_is_refused_before_work(ae, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_gen, "encode_dataset", None)                   # not reached
    (tmp_path / "file").write_text("in the way")
    assert train(ae, tmp_path / "file/out") == 2
    assert "cannot be written to" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("wrong", [
    "--steps 0", "--steps -1", "--windows 0", "--windows -2", "--clips 0", "--clips -3", "--save-every 0",
    "--mask-max 1", "--mask-max nan", "--preset huge", "--step 3", "extra"])
def test_bad_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        train_gen.main(["--preset", "nano", *wrong.split()])
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


# ---- reflow ------------------------------------------------------------------------------------------------

def test_a_student_says_in_one_step_what_its_teacher_says_in_many(ae, tmp_path, no_preview, monkeypatch):
    """With guidance."""
    monkeypatch.chdir(tmp_path)
    for rate, value in (("lr", 4e-3), ("muon_lr", 0.06)):                    # so that few steps suffice
        monkeypatch.setitem(NANO, rate, value)
    models, meta = load_models(ae)
    torch.manual_seed(3)
    teacher = Generator(replace(NANO["generator"], token_dim=8, audio_dim=320)).eval()
    for p in teacher.parameters():
        p.data += 0.2 * torch.randn_like(p)
    teacher.truncated.copy_(torch.eye(8)[:, :2])
    save_weights(tmp_path / "t.safetensors", {**models, "generator": teacher},
                 {**meta, "audio": "mel", "gen_steps": 4, "guidance": 2.0})
    words = ["--preset", "nano", "--reflow", "t.safetensors", "--teacher-steps", "6", "--steps", "30",
             "--clips", "1", "--windows", "16"]
    assert train_gen.main([*words, "--device", "cpu"]) == 0
    student, about = load_models(tmp_path / "runs/reflow_gen/semo.safetensors")
    teacher = load_models(tmp_path / "t.safetensors")[0]["generator"]
    assert (about["gen_steps"], about["guidance"]) == (1, 1.0)
    assert same(student["decoder"].state_dict(), models["decoder"].state_dict())
    kept = torch.load(tmp_path / "runs/reflow_gen/clips-0.pt", weights_only=True)
    encoded = train_gen.Encoded(*(kept[name] for name in train_gen.Encoded._fields))
    draw = torch.Generator().manual_seed(9)
    silence = sample.encode_silence("mel")
    new, past, reference, heard, mood = train_gen.sample_windows(encoded, teacher.config, 32, draw, silence)
    assert torch.equal(student["generator"].truncated, teacher.truncated)
    noise = teacher.truncate(torch.randn(new.shape, generator=draw))
    cond = {"past": past, "reference": reference, "audio": heard, "mood": mood}
    with torch.no_grad():
        want = flow.integrate(flow.with_cfg(teacher, 2.0, {"audio": None}), noise, 6, **cond)
        before, after = ((flow.integrate(model, noise, 1, **cond) - want).square().mean()
                         for model in (teacher, student["generator"]))
    assert after < 0.5 * before, (before, after)


def test_one_step_goes_with_reflow(tmp_path):
    for wrong in (["--one-step"], ["--reflow", "x", "--teacher-steps", "0"]):
        with pytest.raises(SystemExit) as end:
            train_gen.parse(["--preset", "nano", *wrong])
        assert end.value.code == 2
