"""Stage 2: train the motion generator on speech, the encoder frozen (paper section 3.2, eqs. 4-7 and 9).

    python train_gen.py --preset tiny --ae runs/ae/semo.safetensors
    python train_gen.py --preset small --ae runs/ae/semo.safetensors --data DIR [DIR ...]     clips of data.py
    torchrun --nproc_per_node=8 train_gen.py --preset paper --ae runs/ae/semo.safetensors --data DIR
    python train_gen.py --preset tiny --reflow runs/gen/semo.safetensors        one step, no guidance

First every clip is drawn or read and encoded once, kept in --out, and the emotion of voices is learned from
their sound; then the generator learns from random windows of the clips. A clip's mood, seven weights a frame,
is known in the synthetic world and of MEAD and DH-FaceEmoVid; of other sets it is none, as of a share of all
windows. Run the same command again to resume. --out holds state.pt (to go on), semo.safetensors (all
networks: what sample.py reads), log.jsonl and short clips with sound. Ctrl-C and SIGTERM save first.
"""
import argparse
import copy
import hashlib
import os
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import flow
import sample
import training
from emotion import ALIASES, VoiceConfig, VoiceEmotion
from encoder import random_masking
from generator import Generator, GeneratorConfig
from media import audio_features, prepared
from media.device import autocast
from media.files import InputError, command
from media.image import from_uint8
from media.landmarks import SIGN
from media.latents import SD, load_latents
from media.sound import FPS
from media.video import VideoWriter
from media.weights import save_weights
from world.people import HELD_OUT, other_moods, random_clip, random_mood, random_moods
from world.render import MOTION, render
from world.speech import EMOTIONS, speak

# clips: of `seconds` each, encoded once a process; windows: drawn from them at each step; audio: kind of
# features; voices: synthetic ones, without pictures, from which the emotion of a voice is learned; balanced
# and augment: ours, see motion_loss and sample_windows; guidance: at sampling, with 10% of the training
# windows without sound (ours, default 2.0); 1: none, and t uniform, as in the paper; fresh_masks: masks of
# past frames are drawn anew for each window, as in the paper; else (ours, faster) once a clip for a whole run
PRESETS = {
    "nano": dict(
        generator=GeneratorConfig(width=32, depth=1, heads=1, window=4, past=4, lookahead=1, experts=4,
                                  truncated=2),
        steps=20, windows=4, clips=2, seconds=1, voices=8, balanced=True, augment=True, lr=1e-3,
        muon_lr=0.02),
    "tiny": dict(
        generator=GeneratorConfig(experts=16, truncated=2),
        steps=3000, windows=64, clips=768, seconds=4, voices=8000, balanced=True, augment=True, lr=1e-3,
        muon_lr=0.02),
    "small": dict(
        generator=GeneratorConfig(width=256, depth=8, heads=8, experts=32, truncated=2),
        steps=100000, windows=128, clips=4096, seconds=4, voices=20000, balanced=True, augment=True, lr=5e-4,
        muon_lr=0.01),
    "large": dict(
        generator=GeneratorConfig(width=512, depth=8, heads=8, experts=64, truncated=2), audio="whisper",
        steps=200000, windows=128, clips=4096, seconds=4, voices=20000, balanced=True, augment=False, lr=1e-4,
        muon_lr=0.005),
    "paper": dict(
        generator=GeneratorConfig(width=512, depth=8, heads=8), audio="whisper", fresh_masks=True,
        steps=200000, windows=128, clips=4096, seconds=4, voices=20000, balanced=False, augment=False,
        guidance=1.0, lr=1e-4, muon_lr=None),
}
FACTORS = ("opening", "width", "lids", "yaw", "pitch", "roll", "corner", "brow", "furrow")
COLUMNS = [0, 1, 2, 4, 5, 6, 8, 7, 9]                             # of each in the landmark files
SHARES = (0.4, 0.2, 0.2, 0.07, 0.07, 0.06, 0.0, 0.0, 0.0)         # of each in motion_loss
GAINS = (1.2, 1.0, 1.6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)             # of each in the decoder, see amplify
EXPRESSION = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.6, 1.7, 2.5)        # of each where a mood is wished
STRENGTH = 1.3                            # of an emotion of weight 1 in use, relative to training
LEVELS = {1: 0.4, 2: 0.7, 3: 1.0}         # strength of MEAD's levels
HELD_OUT_CLIPS = 32                       # of each set, for the loss on clips that are never trained on
OTHERS = 4                                # pictures of the same person in other moods kept beside each clip
WORLD = sorted(Path(__file__).with_name("world").glob("*.py"))         # changed code draws other clips
TEMPI = 1.0, 0.87, 1.15                   # real clips are few: augment keeps each at these speeds


def parse(argv, presets=PRESETS):
    p = training.make_parser(__doc__, presets)
    p.set_defaults(mask_max=0.2, save_every=500)                                       # 0.2: the paper's
    p.add_argument("--ae", metavar="WEIGHTS", default="runs/ae/semo.safetensors",
                   help="weights of stage 1: their encoder is used, frozen (default: %(default)s)")
    p.add_argument("--whisper", default=audio_features.WHISPER,
                   help="presets large and paper: the Whisper model, hub id or folder (default: %(default)s)")
    p.add_argument("--clips", type=int,
                   help="most clips of each set that each process encodes (default: the preset's)")
    p.add_argument("--voices", type=int,
                   help="synthetic voices that teach the emotion of a voice (default: the preset's)")
    p.add_argument("--windows", type=int, help="windows a step and process (default: the preset's)")
    args = p.parse_args(argv)
    training.check_options(p, args, presets[args.preset])
    args.ae, args.out = args.reflow or args.ae, args.out or ("runs/reflow_gen" if args.reflow else "runs/gen")
    return args


# ---- clips -------------------------------------------------------------------------------------------------

class Clip(NamedTuple):
    """A clip before it is encoded."""
    frames: torch.Tensor         # (F, 3, H, W)
    wave: torch.Tensor           # (1, S)
    mood: torch.Tensor           # (F, 7) of the face; zeros: unknown
    change: int                  # the frame at which it changes; F: it does not
    voice: torch.Tensor          # (7,) mood of the voice; zeros: unknown
    others: torch.Tensor | None  # (OTHERS, 3, H, W) pictures of the person in other moods
    factors: torch.Tensor        # (F, 9) FACTORS, each in a unit of its set; nan: not known


class Encoded(NamedTuple):
    """Clips, encoded and put end to end, n frames in all."""
    motion: torch.Tensor         # (n, L*D)
    masked: torch.Tensor         # (n, L*D) seen through a mask
    features: torch.Tensor       # (n, A) of the speech
    mood: torch.Tensor           # (n, 7)
    factors: torch.Tensor        # (n, 9)
    others: torch.Tensor         # (clips, OTHERS, L*D) in other moods; masked without fresh_masks
    clip_index: torch.Tensor     # (clips, 4) first frame, length, number of its set, frame of change of mood
    voices: torch.Tensor         # (clips, 7) moods of the voices; zeros: unknown
    frames: torch.Tensor | None = None       # (n, C, H, W) half precision, with fresh_masks


@torch.no_grad()
def encode_clip(encoder, frames, mask_max=0.0, rng=None):
    """Encode frames (F, C, H, W) of a speaker -> motion (F, L*D), eq. (5); with rng through masks of one
    ratio from U(0, mask_max), eq. (4)."""
    ratio = mask_max * torch.rand((), generator=rng).item() if rng else 0.0
    motion, ids_keep = [], None
    for part in frames.split(25):
        if rng:
            ids_keep = random_masking(len(part), len(encoder.pos_embed), ratio, rng).to(part.device)
        with autocast(part.device):
            motion.append(encoder(part, ids_keep).flatten(1).cpu())
    return torch.cat(motion)


def synthetic_clips(args, preset, size, rank, world, device="cpu", split="train"):
    """Draw clips of the synthetic world on a device, one by one."""
    render_fn = torch.compile(render, dynamic=False) if args.compile else render
    frames, agree = round(preset["seconds"] * FPS), preset.get("agree", False)
    for number in range(args.clips):
        seed = ((args.seed * 100_000 + number) * world + rank) % HELD_OUT + HELD_OUT * (split == "test")
        seed = torch.tensor([seed], device=device)
        voice, face, change = random_moods(seed, frames)
        if agree:                                                     # ablation: one mood a clip, the voice's
            face, change = voice[:, None].expand(-1, frames, -1), torch.tensor([frames])
        clip = random_clip(seed, frames, face, voice)
        identity, motion = clip["identity"], clip["motion"][0]                         # (1, I), (F, M)
        moved = other_moods(seed, clip["motion"], OTHERS)
        others = None if agree else render(identity.expand(OTHERS, -1), moved, size)
        pictures = [render_fn(identity.expand(len(part), -1), part, size) for part in motion.split(25)]
        m = dict(zip(MOTION, motion.unbind(1), strict=True))
        factors = torch.stack([m["jaw"], m["lip_width"], -(m["blink_l"] + m["blink_r"]) / 2,
                               m["yaw"], m["pitch"], m["roll"],
                               m["lip_corner"], m["brow_raise"], -m["brow_furrow"]], 1)
        yield Clip(torch.cat(pictures), clip["wave"], face[0].cpu(), change.item(), voice[0].cpu(), others,
                   factors.cpu())


def mood_label(record):
    """The mood (7,) of a prepared clip from emotion and level of its manifest; zeros where they tell none."""
    mood, strength = torch.zeros(len(EMOTIONS)), LEVELS.get(record.get("level"), 1.0)
    name = ALIASES.get(record.get("emotion"), record.get("emotion"))
    if name in EMOTIONS:                                                               # contempt is not
        mood[0] = 1 - strength
        mood[EMOTIONS.index(name)] += strength
    return mood


def real_clips(args, preset, people, size, rank, world):
    """Read clips with sound, {person: [row of the manifest]}; with augment each once more, mirrored.
    Others of a labelled clip are middle frames of the person's neutral clips, or else of any."""
    records = [record for identity in sorted(people) for record in people[identity]]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(args.seed)).tolist()
    for record in [records[k] for k in order[rank::world][:args.clips]]:
        frames, wave = prepared.read_clip(record["path"], size)
        mood, others = mood_label(record), None
        clips = people[record["identity"]] if mood.any() else []
        clips = [x for x in clips if x["path"] != record["path"]]
        clips = [x for x in clips if x.get("emotion") == "neutral"] or clips
        if clips:
            chosen = [clips[k * len(clips) // OTHERS] for k in range(OTHERS)]
            pictures = [prepared.read_at(x["path"], [x["frames"] // 2], size) for x in chosen]
            others = from_uint8(np.concatenate(pictures))
        known = torch.from_numpy(prepared.load_landmarks(record)[1])[: len(frames)]    # (F, 10)
        known[:, 2] = known[:, 2:4].mean(1)                                            # both lids
        moods = mood.expand(len(frames), -1)
        clip = Clip(frames, wave[None], moods, len(frames), mood, others, known[:, COLUMNS])
        yield clip
        if preset["augment"]:
            yield clip._replace(frames=frames.flip(-1), factors=(known * torch.tensor(SIGN))[:, COLUMNS],
                                others=None if others is None else others.flip(-1))


def fingerprints(paths):
    """Hash files -> [SHA-256 of each]."""
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def read_cache(path):
    """What an earlier start kept there; None if there is nothing, or nothing whole: it is made again."""
    try:
        cached = torch.load(path, map_location="cpu", weights_only=True, mmap=True)    # frames may be many
        return cached if cached["key"] else None
    except Exception:                                   # whatever torch and zipfile make of damage
        return None


def encode_dataset(args, preset, sets, encoder, space, size, rank, world, device, split="train"):
    """Encode this process's clips of --data, in sets {folder: {person: clips}} those of folders. Kept in
    --out, for the next start. Raises InputError."""
    kind, fresh_masks = preset.get("audio", "mel"), preset.get("fresh_masks", False)
    inputs = [args.ae, *(os.path.join(name, "manifest.jsonl") for name in args.data if name != "synthetic")]
    key = [*fingerprints(inputs + WORLD), args.clips, args.seed, args.mask_max, preset["seconds"], world,
           args.whisper, kind, size, preset.get("agree", False), preset["augment"], fresh_masks,
           *Encoded._fields, *FACTORS, *args.data]
    path = os.path.join(args.out, f"clips-{rank}.pt" if split == "train" else "held-out.pt")
    cached = read_cache(path)
    if cached:
        if cached["key"][0] != key[0] and os.path.exists(os.path.join(args.out, "state.pt")):
            raise InputError(f"the run in {args.out} learned the tokens of another encoder; give another "
                             "--out")
        if cached["key"] == key:
            return Encoded(*(cached[name] for name in Encoded._fields))
    clips, kept, number, first = [], [], 0, 0
    for k, name in enumerate(args.data):
        if name == "synthetic":
            drawn = synthetic_clips(args, preset, size, rank, world, device, split)
        else:
            drawn = real_clips(args, preset, sets[name], size, rank, world)
        for clip in tqdm(drawn, desc=f"encoding {name}", unit="clip", disable=rank > 0):
            masks = args.mask_max, training.step_rng(args.seed, rank, number)
            pictures = space.encode(clip.frames.to(device))
            motion, masked = encode_clip(encoder, pictures), encode_clip(encoder, pictures, *masks)
            wave = audio_features.normalise_loudness(clip.wave.to(device))
            features = audio_features.extract_features(wave, kind, args.whisper)[0].cpu()       # (F, A)
            frames = min(len(motion), len(features))
            others = (motion if fresh_masks else masked)[torch.arange(OTHERS) * frames // OTHERS]
            if clip.others is not None:
                others = encode_clip(encoder, space.encode(clip.others.to(device)),
                                     *(() if fresh_masks else masks))           # in the paper M_r is clear
            number += 1
            rows = [x[:frames] for x in (motion, masked, features, clip.mood, clip.factors)]
            vary = name != "synthetic" and preset["augment"] and kind == "mel" and not fresh_masks
            for tempo in TEMPI if vary else (1.0,):
                count = int(frames / tempo)
                if count >= preset["generator"].window:
                    place = torch.tensor([[first, count, k, min(int(clip.change / tempo), count)]])
                    clips.append((*(audio_features.change_tempo(x, count) for x in rows), others[None],
                                  place, clip.voice[None]))
                    kept += [pictures[:frames].half().cpu()] if fresh_masks else []
                    first += count
    if not clips:
        raise InputError(f"no clip of {', '.join(args.data)} is as long as a window, "
                         f"{preset['generator'].window} frames")
    encoded = Encoded(*(torch.cat(x) for x in zip(*clips, strict=True)),
                      torch.cat(kept) if fresh_masks else None)
    training.atomic_save(path, key=key, **encoded._asdict())
    return encoded


def encode_held_out(args, preset, *given):
    """A few clips that are never trained on: of the test splits of --data, synthetic if none has one."""
    sets = {name: prepared.find_clips(name, "test", sound=True) for name in args.data if name != "synthetic"}
    tested = [name for name in args.data if sets.get(name, True)]
    args = argparse.Namespace(**{**vars(args), "clips": min(args.clips, HELD_OUT_CLIPS),
                                 "data": tested or ["synthetic"]})
    preset = {**preset, "augment": False, "fresh_masks": False}
    return encode_dataset(args, preset, sets, *given, split="test")


# ---- windows and loss --------------------------------------------------------------------------------------

def sample_windows(encoded, config, count, rng, silence_features, augment=False, encode_past=None,
                   expression=None):
    """Draw random windows -> new motion, past, reference, audio, mood.

    (B, K, L*D), (B, P, L*D), (B, L*D), (B, P+K+lookahead, A), (B, P+K, 7).

    Sets are drawn equally, then their clips. Two kinds: within a clip, and (a quarter, and all of clips too
    short for a past) at its start, where the past is the reference motion, repeated, and the audio before is
    silence (silence_features, (A,)), as sample.py begins: the reference there is the frame before the first
    new one, so that a video starts from its photo. Within a clip the reference is a frame from anywhere in it
    or, of half the windows with a mood, of the person in another mood: otherwise it would tell the emotion,
    and the label nothing. A share of 0.15 has no mood; its reference has the window's, so that without a mood
    the face keeps the photo's. augment: the sound is varied (vary_sound) and noise of up to 0.1 is added to
    the past, which in use holds the model's own errors (ours). encode_past: function of the past's frame
    numbers (B, P) and rng that encodes them through new masks; None: as they were seen through the masks of
    their clips. expression (L*D, L*D): with a mood, the change from the reference is larger by this matrix,
    and the emotions' weights are smaller by STRENGTH, so that weight 1 goes further (ours): what the decoder
    shows of corners and brows is too small.
    """
    motion, features, moods, others, clip_index = (
        encoded.motion, encoded.features, encoded.mood, encoded.others, encoded.clip_index)
    P, K = config.past, config.window

    def uniform(*shape):
        return torch.rand(*shape, generator=rng)

    sets = clip_index[:, 2].bincount()                                                 # clips of each
    numbers = sets.nonzero()[:, 0]
    chosen_set = numbers[torch.randint(len(numbers), (count,), generator=rng)]
    clip = (sets.cumsum(0) - sets)[chosen_set] + (uniform(count) * sets[chosen_set]).long()
    first, frames, _, change = clip_index[clip].unbind(1)                              # (B,)

    at_start = (uniform(count) < 0.25) | (frames < P + K)
    later = P + (uniform(count) * (frames - K + 1 - P).clamp(min=1)).long()
    early = 1 + (uniform(count) * (frames - K).clamp(min=1)).long()                    # any frame is a photo
    start = torch.where(at_start, torch.minimum(early, frames - K), later)             # first new frame
    new = motion[(first + start)[:, None] + torch.arange(K)]                           # (B, K, L*D)
    when = start[:, None] + torch.arange(-P, K + config.lookahead)                     # (B, P+K+lookahead)
    mood = moods[first[:, None] + when[:, :P + K].clamp(min=0)]                        # (B, P+K, 7)
    no_mood = (uniform(count) < 0.15) | ~mood.flatten(1).any(1)

    low = torch.where(no_mood & (start >= change), change, 0)                          # the part of one mood
    high = torch.where(no_mood & (start < change), change, frames)
    own = motion[first + low + (uniform(count) * (high - low)).long()]                 # (B, L*D)   M_r
    other = others[clip, torch.randint(others.shape[1], (count,), generator=rng)]
    use_other = (uniform(count) < 0.5) & ~no_mood
    from_photo = at_start & (start > 0) & (start != change)                            # in the same mood
    own = torch.where(from_photo[:, None], motion[first + (start - 1).clamp(min=0)], own)
    reference = torch.where(use_other[:, None], other, own)

    audio = features[first[:, None] + torch.minimum(when.clamp(min=0), frames[:, None] - 1)]
    silent = (when < 0) | (when >= frames[:, None])
    before = at_start & (uniform(count) < 0.6)                                         # a video in its midst
    silent |= before[:, None] & (when < start[:, None])
    audio = torch.where(silent[..., None], silence_features.to(audio), audio)
    if augment:
        audio = audio_features.vary_sound(audio, silence_features, rng)
    index = (first + start)[:, None] + torch.where(at_start[:, None], 0, torch.arange(-P, 0))    # (B, P)
    past = encoded.masked[index] if encode_past is None else encode_past(index, rng)
    past = torch.where(at_start[:, None, None], reference[:, None], past)              # (B, P, L*D)
    if augment:
        past = past + 0.1 * uniform(count, 1, 1) * torch.randn(past.shape, generator=rng)
    wished = ~no_mood[:, None, None]
    if expression is not None:
        base = reference[:, None]
        new, past = (torch.where(wished, base + (x - base) @ expression, x) for x in (new, past))
        mood = torch.cat([mood[..., :1], mood[..., 1:] / STRENGTH], -1)
    return new, past, reference, audio, mood * wished


def ridge_regression(x, y, share):
    """Find the linear map (I, O) from x (n, I) to y (n, O); its ridge is a share of x's mean square."""
    gram = x.T @ x
    ridge = share * gram.diagonal().mean() + 1e-6
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)), x.T @ y)


def readout_directions(encoded, count=20000, seed=0):
    """Find linear directions of the token that tell FACTORS -> (L*D, 9), and how the token changes with each
    alone, (9, L*D); None where nothing is known.
    By ridge regression of differences within clips. Each is scaled so that its reading has the root of its
    R^2 as standard deviation: what cannot be read from the token does not count."""
    rng = torch.Generator().manual_seed(seed)
    x, y = [], []
    for k in encoded.clip_index[:, 2].unique():                    # every set has units of its own
        clips = encoded.clip_index[encoded.clip_index[:, 2] == k]
        chosen = clips[torch.randint(len(clips), (count,), generator=rng)]
        a, b = ((torch.rand(count, generator=rng) * chosen[:, 1]).long() + chosen[:, 0] for _ in range(2))
        delta = encoded.factors[a] - encoded.factors[b]
        known = delta.isfinite().all(1)
        if known.any():
            x.append((encoded.motion[a] - encoded.motion[b])[known].double())
            y.append((delta[known] / delta[known].std(0).clamp(min=1e-6)).clamp(-4, 4).double())
    if not x:
        return None
    x, y = torch.cat(x), torch.cat(y)
    directions = ridge_regression(x, y, 0.2)                                           # (L*D, 9)
    read = x @ directions
    explained = 1 - (y - read).square().sum(0) / y.square().sum(0).clamp(min=1e-6)
    explained = explained.clamp(min=0)                                 # also of what never changes
    scale = explained.sqrt() / read.std(0).clamp(min=1e-6)
    directions = directions * scale
    # The ridge keeps small what a factor that is hardly read seems to change.
    changes = ridge_regression(read * scale, x, 0.02)                                  # (9, L*D)
    return directions.float(), changes.float()


def enlarge(directions, changes, gains):
    """Make the matrix (L*D, L*D) by which the readings of a motion m @ matrix are `gains` (9,) times as
    large, and all else is as before. directions (L*D, 9) and changes (9, L*D): see readout_directions."""
    unchanged = torch.eye(len(directions), device=directions.device)
    return unchanged + (directions * (directions.new_tensor(gains) - 1)) @ changes


def amplify(decoder, larger):
    """Change the weights so that the decoder takes a motion m for m @ larger (L*D, L*D) (ours).

    Without it an independent reader sees smaller movements in its pictures of real faces than in the true
    ones, lids about half as large.
    """
    for layer in (decoder.motion, decoder.motion_delta.project):
        for part in layer.weight.data.split(len(larger), dim=1):                       # delta: twice
            part.copy_(part @ larger.to(part).T)


def motion_loss(model, motion, noise, t, directions=None, **cond):
    """Eq. (9), and with directions (L*D, 9) two terms of ours.

    The error as far as it is read as mouth, lids or pose, each with its share of SHARES, since most of a
    token's numbers tell nothing that is seen; and that of the change from frame to frame (as FLOAT, arXiv
    2412.01064).
    """
    v = model(flow.interpolate(motion, noise, t), t, **cond)
    error = v.float() - (motion - noise)                                               # (B, K, L*D)
    loss = error.square().mean()                                                       # eq. (9)
    if directions is not None:
        read = (error @ directions).square().mean((0, 1))                              # (9,)
        loss = loss + 0.5 * (read * read.new_tensor(SHARES)).sum() + 0.25 * error.diff(dim=1).square().mean()
    return loss


def loss_inputs(windows, rng, args, guidance, teacher, truncate, device):
    """Draw noise and times for windows -> motion, noise, t of motion_loss, and its conditions by name.
    With a teacher the motion is what the noise, truncated as in use, becomes with guidance (reflow)."""
    new, past, reference, audio, mood = (x.to(device) for x in windows)
    cond = {"past": past, "reference": reference, "audio": audio, "mood": mood}
    noise = torch.randn(new.shape, generator=rng).to(device)
    t, drop = torch.rand(len(new), generator=rng), None                                # the paper's
    if teacher:
        t = flow.sample_timesteps(len(new), rng, p_pure_noise=1.0 if args.one_step else 0.5)
        noise = truncate(noise)
        with torch.no_grad(), autocast(device):
            new = flow.integrate(teacher, noise, args.teacher_steps, **cond)
    elif guidance != 1:
        t = flow.sample_timesteps(len(new), rng, p_pure_noise=0, mean=0.0, std=1.0)
        drop = (torch.rand(len(new), generator=rng) < 0.1).to(device)
    return (new, noise, t.to(device)), {"drop": drop, **cond}


# ---- the emotion of a voice --------------------------------------------------------------------------------

def voice_moods(seeds):
    """Moods of training voices, (B,) -> (B, 7): half are one emotion, each of the seven equally often, so
    that none is told for being frequent; the others are as random_mood draws them."""
    pure = torch.eye(len(EMOTIONS))[seeds // 2 % len(EMOTIONS)]
    return torch.where(seeds[:, None] % 2 == 0, pure, random_mood(seeds, 45))


@torch.no_grad()
def voice_statistics(args, preset, encoded, model, rank, device="cpu"):
    """What VoiceEmotion sees after one, two and all seconds of a voice (n, 3, S), and its moods (n, 7).
    Of synthetic voices without pictures, kept in --out, and of labelled clips."""
    kind, frames = preset.get("audio", "mel"), round(preset["seconds"] * FPS)
    key = [*fingerprints(WORLD), args.voices, frames, args.seed, args.whisper, kind]
    path = os.path.join(args.out, f"voices-{rank}.pt")

    def at_three(features):
        ends = [min(k, features.shape[1]) - 1 for k in (FPS, 2 * FPS, features.shape[1])]
        return model.pool(features)[0][:, ends]

    cached = read_cache(path)
    if not cached or cached["key"] != key:
        statistics, moods = [], []
        seeds = HELD_OUT // 2 + args.seed * 100_000 + torch.arange(args.voices)
        for part in tqdm(seeds.split(16), desc="voices", unit="batch", disable=rank > 0):
            mood = voice_moods(part)
            wave = audio_features.normalise_loudness(speak(part, frames, mood)["wave"].to(device))
            statistics.append(at_three(audio_features.extract_features(wave, kind, args.whisper).cpu()))
            moods.append(mood)
        cached = {"key": key, "statistics": torch.cat(statistics), "moods": torch.cat(moods)}
        training.atomic_save(path, **cached)
    statistics, moods = [cached["statistics"]], [cached["moods"]]
    for (first, length, *_), mood in zip(encoded.clip_index.tolist(), encoded.voices, strict=True):
        if mood.any():
            statistics.append(at_three(encoded.features[None, first:first + length]))
            moods.append(mood[None])
    return torch.cat(statistics), torch.cat(moods)


def train_voice(args, preset, encoded, rank, device="cpu", steps=1500, batch=256):
    """Train VoiceEmotion, which tells the mixture of a voice, by cross-entropy.
    Nothing of it is in state.pt: a resumed run trains the same again, from the seed and what is kept in
    --out."""
    parts = 4 if preset.get("audio", "mel") == "mel" else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)                                                   # weights and dropout
        model = VoiceEmotion(VoiceConfig(audio_dim=encoded.features.shape[1], parts=parts))
        rng = torch.Generator().manual_seed(args.seed)
        statistics, moods = voice_statistics(args, preset, encoded, model, rank, device)
        steps = min(steps, 5 * len(statistics))
        model.mean.copy_(statistics.mean((0, 1)))
        model.std.copy_(statistics.flatten(0, 1).std(0, correction=0) + 1e-3)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.3)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            chosen = torch.randint(len(statistics), (batch,), generator=rng)
            length = torch.randint(statistics.shape[1], (batch,), generator=rng)
            loss = F.cross_entropy(model(statistics[chosen, length]), moods[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval().requires_grad_(False)


# ---- the run -----------------------------------------------------------------------------------------------

def preview(path, models, meta, args, seconds=3):
    """Let a held-out person of the synthetic world speak held-out words, by sample.py: an mp4 with sound."""
    clip = random_clip(torch.tensor([HELD_OUT + args.seed]), seconds * FPS)
    photo = render(clip["identity"], clip["motion"][:, 0], meta["size"])[0]
    wave = audio_features.normalise_loudness(clip["wave"])
    features = audio_features.extract_features(wave, meta["audio"], args.whisper)[0]
    with VideoWriter(path, meta["size"], sound=wave[0]) as video:
        for frame in sample.animate_from_audio(models, meta, photo, iter([features]), args.seed):
            video.write(frame)


def train(args, preset) -> int:
    """Train as the settings say; see `parse` and PRESETS. Raises InputError."""
    rank, world, device = training.init_distributed(args.device)
    torch.manual_seed(args.seed)                             # first weights; later numbers come from step_rng
    kind, guidance = preset.get("audio", "mel"), preset.get("guidance", 2.0)
    models, meta = sample.load_models(args.ae, device)
    space = load_latents(meta["latents"], meta.get("vae", SD), device)
    silence_features = sample.encode_silence(kind, args.whisper)
    sets = {name: prepared.load_set(name, "train", sound=True) for name in args.data if name != "synthetic"}
    training.make_run_folder(args.out)
    encoder = models["encoder"].requires_grad_(False)
    config = replace(preset["generator"], num_tokens=encoder.config.num_tokens,
                     token_dim=encoder.config.token_dim, audio_dim=len(silence_features))
    if args.reflow and "generator" in models:                       # a student has the experts of its teacher
        taught = models["generator"].config
        config = replace(config, experts=taught.experts, mood_table=taught.mood_table,
                         truncated=taught.truncated, learned_gates=taught.learned_gates)
    model = Generator(config).to(device)
    teacher = None
    if args.init:
        training.init_from(args.init, sample.load_models(args.init)[0], generator=model)
    if args.reflow:
        training.init_from(args.reflow, models, generator=model)
        null = {"audio": None}
        teacher = flow.with_cfg(models["generator"].requires_grad_(False), meta["guidance"], null)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    lr_scale = 0.1 if args.reflow else 1.0                          # a student is nearly there
    muon_lr = preset["muon_lr"] and lr_scale * preset["muon_lr"]
    optimisers = training.optimisers(model, lr_scale * preset["lr"], muon_lr)
    state, configs = os.path.join(args.out, "state.pt"), {"generator": config}
    step = training.resume(state, args, configs, model, ema, optimisers)
    if rank == 0:
        training.print_settings(args, model, step)

    encoded = encode_dataset(args, preset, sets, encoder, space, meta["size"], rank, world, device)
    if rank == 0:
        held_out = encode_held_out(args, preset, encoder, space, meta["size"], 0, 1, device)
    encode_past = None
    if preset.get("fresh_masks"):
        def encode_past(index, rng):                                            # each window has its ratio
            return torch.stack([encode_clip(encoder, encoded.frames[past].to(device).float(), args.mask_max,
                                            rng) for past in index])
    voice = models.get("voice") if args.reflow else None
    if (config.experts or config.mood_table) and not args.reflow:
        voice = train_voice(args, preset, encoded, rank, device)
    known = readout_directions(encoded) if preset["balanced"] and not args.reflow else None
    directions = expression = None
    if known is not None:
        expression = enlarge(*known, EXPRESSION)
        directions, changes = (x.to(device) for x in known)
        decoder = models["decoder"]
        real = args.data != ["synthetic"] and decoder.config.num_tokens == 1 and decoder.config.motion_delta
        if real and "gains" not in meta:                        # weights of a run may be given as --ae again
            amplify(decoder, enlarge(directions, changes, GAINS))
            meta["gains"] = GAINS
        if config.truncated:                                            # opening and width of the mouth
            for network in (model, ema):
                network.truncated.copy_(torch.linalg.qr(directions[:, :config.truncated]).Q)

    def draw_loss(network, encoded, rng, augment=False, encode_past=None):
        windows = sample_windows(encoded, config, args.windows, rng, silence_features, augment, encode_past,
                                 expression)
        inputs, cond = loss_inputs(windows, rng, args, guidance, teacher, model.truncate, device)
        with autocast(device):
            return motion_loss(network, *inputs, directions, **cond)

    ddp_model = training.ddp_wrap(model, world, device)
    stopper = training.Stopper()
    recent = deque(maxlen=100)                                    # losses, to print their mean
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0)
    while step < args.steps:
        training.set_lr(optimisers, step, args.steps, warmup=50)
        loss = draw_loss(ddp_model, encoded, training.step_rng(args.seed, rank, step),
                         preset["augment"] and kind == "mel", encode_past)
        loss.backward()
        training.clip_and_step(model, optimisers, loss.item(), step, state, device)
        training.update_ema(ema, model, step, training.ema_decay(args.steps))
        step += 1
        bar.update()
        recent.append(loss.item())
        mean_loss = sum(recent) / len(recent)
        bar.set_postfix(loss=f"{mean_loss:.4f}")
        stop = training.any_rank(stopper.wanted, device)
        if rank == 0 and (step % args.save_every == 0 or step == args.steps or stop):
            networks = {"encoder": encoder, "decoder": models["decoder"], "generator": ema}
            networks |= {"voice": voice} if voice else {}
            sampling = dict(gen_steps=1, guidance=1.0) if teacher else dict(gen_steps=4, guidance=guidance)
            meta |= {"audio": kind, "whisper": args.whisper, **sampling}
            save_weights(os.path.join(args.out, "semo.safetensors"), networks, meta)
            preview(os.path.join(args.out, f"step{step:06d}.mp4"), networks, meta, args)
            training.save_checkpoint(state, step, args, configs, model, ema, optimisers)
            with torch.no_grad():                                   # the same windows, noise and t each time
                held_out_loss = draw_loss(ema, held_out, training.step_rng(args.seed, 0, 0)).item()
            steps_per_second = (step - bar.initial) / bar.format_dict["elapsed"]
            training.log(args.out, step=step, loss=mean_loss, loss_held_out=held_out_loss,
                         windows_per_second=steps_per_second * world * args.windows)
        if stop:
            break
    bar.close()
    return 130 if step < args.steps else 0


@command("train_gen.py")
def main(argv=None) -> int:
    """-> exit status: 0 when the run is complete, 130 when it was stopped, 2 for bad input."""
    args = parse(argv)
    return train(args, PRESETS[args.preset])


if __name__ == "__main__":
    training.shutdown(main)
