"""People of the synthetic world who move and speak, drawn from seeds.

    seeds --> random_pairs, consecutive_frames: pictures
    seeds --> random_clip: one person talking, with sound

    python -m world.people --out DIR --clips N --seconds S [--seed N]
        mp4 clips with sound and their factors (.npz)
"""
import argparse
import math
import os
import sys

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from media.files import InputError, atomic_write, command
from media.image import to_uint8
from media.sound import FPS, SAMPLE_RATE
from media.video import VideoWriter
from world.render import IDENTITY, MOTION, POSE, random_identity, render
from world.speech import EMOTIONS, speak, uniform

HELD_OUT = 10**9  # identity ids and clip seeds below are for training, at or above for testing, for ever


def random_motion(seeds):
    """Draw every motion factor alone, (B,) integers -> (B, M): wide coverage for stage 1 and for probes."""
    u = uniform(seeds, 3 * len(MOTION), stream=11).view(len(seeds), 3, len(MOTION))
    low, high = torch.tensor(list(MOTION.values()), device=u.device).unbind(1)
    pose = torch.tensor([name in POSE for name in MOTION], device=u.device)
    share = torch.where(pose, u[:, :2].mean(1), u[:, 0])                  # poses gather round the middle
    m = dict(zip(MOTION, (low + (high - low) * share).unbind(1), strict=True))
    gate = dict(zip(MOTION, u[:, 2].unbind(1), strict=True))
    m["jaw"] = m["jaw"] * (gate["jaw"] > 0.2)                             # one mouth in five is shut
    left, right = (m[eye] * (gate["blink_l"] > 0.5) for eye in ("blink_l", "blink_r"))    # half are open
    m["blink_l"] = left
    m["blink_r"] = torch.where(gate["blink_r"] > 0.3, left, right)        # most blinks are of both eyes
    return torch.stack([m[name] for name in MOTION], 1)                                               # (B, M)


def random_pairs(seeds, targets, near, size=128, render_fn=render, swap=False):
    """Draw 1 + `targets` pictures of each of R people, (R,) -> pictures, motion, pictures for the encoder.

    Pictures are (R, 1+T, 3, size, size) in [-1, 1], their motion (R, 1+T, M). The share `near` of the people
    hold still between their pictures, as neighbouring frames of a speaker do: pose and light are kept, and a
    random half of mouth, eyes and brows, so that a gaze is at times all there is to explain. The others
    change in everything, as distant frames. swap: of three people in four the encoder's views of the targets
    show another person in the same motion, of every second one also that of the reference. render_fn:
    `render`, or the same compiled.
    """
    count, split = targets + 1, HELD_OUT * (seeds >= HELD_OUT)
    motion_ids = (seeds % HELD_OUT)[:, None] * count + torch.arange(count, device=seeds.device)
    motion_ids = motion_ids % HELD_OUT + split[:, None]                    # (R, 1+T): motions, too, are split
    motion = random_motion(motion_ids.flatten()).unflatten(0, (-1, count))                # (R, 1+T, M)
    held = torch.tensor([name in (*POSE, "light_x", "light") for name in MOTION], device=seeds.device)
    keep = held | (uniform(seeds, len(MOTION), stream=12) < 0.5)                          # (R, M)
    number = torch.arange(len(seeds), device=seeds.device)
    keep = keep & (number < round(near * len(seeds)))[:, None]
    motion = torch.where(keep[:, None], motion[:, :1], motion)

    def draw(people):
        images = render_fn(random_identity(people).repeat_interleave(count, 0), motion.flatten(0, 1), size)
        return images.unflatten(0, (-1, count))                                           # (R, 1+T, 3, H, W)

    pictures = draw(seeds)
    if not swap:
        return pictures, motion, pictures
    other = draw((seeds + 1 + 7919 * (seeds % 13 + 1)) % HELD_OUT + split)
    own = (number % 4 == 3)[:, None].repeat(1, count)                                     # (R, 1+T)
    own[:, 0] = number % 2 == 1
    return pictures, motion, torch.where(own[:, :, None, None, None], pictures, other)


def consecutive_frames(seeds, frames, size=128, render_fn=render):
    """Draw a random frame and `frames` consecutive ones of each of R clips -> as random_pairs."""
    motion = random_clip(seeds, 4 * frames)["motion"]                                     # (R, 4F, M)
    u = uniform(seeds, 2, stream=13)
    first = (u[:, :1] * 4 * frames).long()
    start = (u[:, 1:] * (3 * frames + 1)).long() + torch.arange(frames, device=seeds.device)
    index = torch.cat([first, start], dim=1)                                              # (R, 1+F)
    motion = motion.gather(1, index[..., None].expand(-1, -1, motion.shape[-1]))
    people = random_identity(seeds).repeat_interleave(frames + 1, 0)
    pictures = render_fn(people, motion.flatten(0, 1), size).unflatten(0, (-1, frames + 1))
    return pictures, motion, pictures


# ---- time: a person who speaks -----------------------------------------------------------------------------

# What each emotion adds to the face (Ekman and Friesen 1978, as directions; sizes ours).
EMOTION_FACE = {
    "neutral": {},
    "happy": {"lip_corner": 0.9, "brow_raise": 0.15},
    "sad": {"lip_corner": -0.8, "brow_raise": 0.4},
    "angry": {"brow_furrow": 0.9, "lip_corner": -0.3, "brow_raise": -0.3},
    "afraid": {"brow_raise": 0.7, "brow_furrow": 0.4},
    "disgusted": {"brow_furrow": 0.5, "lip_corner": -0.6},
    "surprised": {"brow_raise": 1.0}}
# and to movement: lids (added to both blinks), log of the head's speed and reach, log rate of gaze jumps.
EMOTION_MOVEMENT = {
    "neutral": (0, 0, 0), "happy": (0, 0, 0), "sad": (0.2, math.log(0.6), 0), "angry": (0, math.log(1.4), 0),
    "afraid": (-0.1, math.log(1.4), math.log(2)), "disgusted": (0, 0, 0), "surprised": (-0.1, 0, 0)}
# Slow movements: highest frequency in Hz, amplitude as a share of the range.
WANDER = {"yaw": (0.5, 0.5), "pitch": (0.6, 0.45), "roll": (0.4, 0.4), "shift_x": (0.3, 0.4),
          "shift_y": (0.3, 0.4), "scale": (0.15, 0.4), "lip_corner": (0.4, 0.25), "brow_raise": (0.7, 0.35),
          "light_x": (0.1, 0.2)}


def drift(seeds, frame, stream, hertz):
    """Wander in about [-1, 1] by five sine waves up to `hertz`: (B,), frame (F,) or (B, F) -> (B, F)."""
    u = uniform(seeds, 10, stream)
    time = frame / FPS
    rate, phase = hertz * (0.15 + 0.85 * u[:, :5, None]), 2 * math.pi * u[:, 5:, None]
    return 0.4 * torch.sin(2 * math.pi * rate * time.unsqueeze(-2) + phase).sum(1)


def irregular_events(seeds, frame, stream, low, high):
    """Draw events every low..high seconds -> frames since the last (B, F), period (B, 1), draws (B, F, 2).

    frame: time in frames, (F,) or (B, F).
    """
    u = uniform(seeds, 3, stream)
    period = FPS * (low + (high - low) * u[:, :1])                                        # (B, 1) frames
    time = frame + period * u[:, 1:2]
    number = torch.div(time, period, rounding_mode="floor")                               # (B, F)
    u = uniform((seeds[:, None] * 65_537 + number.long()).flatten(), 2, stream).view(*number.shape, 2)
    return time - number * period, period, u


def perform(seeds, jaw, lip_width, emotion, movement=False):
    """Draw a speaker's motion: jaw, lip_width (B, F), emotion (B, 7) or (B, F, 7) -> (B, F, M).

    movement: emotion also changes the lids, how fast and far the head moves and how often the eyes jump
    (EMOTION_MOVEMENT); without, only the expression (EMOTION_FACE). Neutral is the same in both.
    """
    frames, device = jaw.shape[1], jaw.device
    emotion = emotion.expand(frames, -1, -1).transpose(0, 1) if emotion.ndim == 2 else emotion     # (B, F, 7)
    face = [[EMOTION_FACE[e].get(name, 0.0) for name in MOTION] for e in EMOTIONS]
    face = torch.tensor(face, device=device)                                              # (7, M)
    moves = torch.tensor([EMOTION_MOVEMENT[e] for e in EMOTIONS], device=device) * movement
    lids, tempo, jumps = (emotion @ moves).unbind(2)                                      # (B, F)
    tempo, jumps = tempo.exp(), jumps.exp()
    frame = torch.arange(frames, device=device)
    head_frame, gaze_frame = (x.cumsum(1) - x for x in (tempo, jumps))        # (B, F): `frame` where neutral
    rest = uniform(seeds, len(MOTION), stream=20) * 2 - 1                      # (B, M) this clip's usual pose
    m = {}
    for k, (name, (hertz, amplitude)) in enumerate(WANDER.items()):
        speed, time = (tempo, head_frame) if name in POSE else (1, frame)
        m[name] = amplitude * speed * drift(seeds, time, 21 + k, hertz) + 0.45 * rest[:, k, None]
    m["brow_furrow"] = 0.25 * drift(seeds, frame, 31, 0.5).clamp(min=0)
    m["light"] = 0.5 + 0.5 * rest[:, 10, None] + 0.1 * drift(seeds, frame, 32, 0.2)
    since, _, u = irregular_events(seeds, gaze_frame, 33, 0.7, 2.0)                 # the eyes jump, then rest
    m["gaze_x"], m["gaze_y"] = 1.6 * u[..., 0] - 0.8, 1.2 * u[..., 1] - 0.6
    since, period, u = irregular_events(seeds, frame, 34, 2.0, 4.5)        # a blink takes a fifth of a second
    blink = torch.exp(-(((since - (0.2 + 0.6 * u[..., 0]) * period) / 2.4) ** 4))
    m["blink_l"] = m["blink_r"] = (blink + 0.12 * drift(seeds, frame, 35, 0.3).clamp(min=0)) + lids
    m["jaw"], m["lip_width"] = jaw, lip_width
    low, high = torch.tensor(list(MOTION.values()), device=device).unbind(1)
    motion = torch.stack([m[name] for name in MOTION], dim=2) + emotion @ face            # (B, F, M)
    angles = torch.tensor([name in ("yaw", "pitch", "roll") for name in MOTION], device=device)
    return torch.minimum(torch.maximum(motion * torch.where(angles, high, 1.0), low), high)


def random_clip(seeds, frames, face=None, emotion=None):
    """Draw people who speak: (B,) -> identity (B, I), motion (B, F, M), wave (B, F*640), emotion (B, 7).

    emotion (B, 7): the mood of the voice (default: the seed's own). face (B, 7) or (B, F, 7): the mood of the
    face, with its movement (default: the voice's, expression alone).
    """
    speech = speak(seeds, frames, emotion)
    movement = face is not None
    face = face if movement else speech["emotion"]
    motion = perform(seeds, speech["jaw"], speech["lip_width"], face, movement)
    return {"identity": random_identity(seeds), "motion": motion, "wave": speech["wave"],
            "emotion": speech["emotion"]}


# Pairs of emotions that no training clip mixes: what experts make of them is a test.
UNSEEN_PAIRS = (("happy", "surprised"), ("sad", "angry"), ("afraid", "disgusted"), ("happy", "disgusted"),
                ("angry", "surprised"))
FADE = 10         # frames from one mood to the next


def random_mood(seeds, stream):
    """(B,) -> (B, 7): 19% neutral, 56% one emotion, 25% a seen pair; at a strength of 0.4 to 1."""
    eye, u = torch.eye(len(EMOTIONS), device=seeds.device), uniform(seeds, 5, stream)
    pairs = [(a, b) for a in range(1, 7) for b in range(a + 1, 7)
             if (EMOTIONS[a], EMOTIONS[b]) not in UNSEEN_PAIRS]
    pair = torch.tensor(pairs, device=seeds.device)[(len(pairs) * u[:, 3]).long()]                   # (B, 2)
    share, strength = 0.3 + 0.4 * u[:, 4:], 0.4 + 0.6 * u[:, 1:2]
    mixed = share * eye[pair[:, 0]] + (1 - share) * eye[pair[:, 1]]
    felt = torch.where(u[:, :1] < 0.75, eye[1 + (6 * u[:, 2]).long()], mixed)
    return torch.where(u[:, :1] < 0.19, eye[0], strength * felt + (1 - strength) * eye[0])


def random_moods(seeds, frames):
    """Draw moods of training clips, (B,) -> of the voice (B, 7), of the face (B, F, 7), frame of change (B,).

    Half of the faces change their mood; of the others the frame is `frames`. A fifth of the faces have the
    voice's.
    """
    u = uniform(seeds, 4, stream=40)
    neutral = torch.eye(len(EMOTIONS), device=seeds.device)[0]
    voice = neutral.lerp(random_mood(seeds, 41), (2 * u[:, :1]).clamp(max=1))                # half are weaker
    first, second = random_mood(seeds, 42), random_mood(seeds, 43)
    first = torch.where(u[:, 1:2] < 0.2, voice, first)
    change = (frames * (0.25 + 0.5 * u[:, 3])).long()
    change = torch.where(u[:, 2] < 0.5, change, frames)
    frame = torch.arange(frames, device=seeds.device)
    share = 0.5 - 0.5 * torch.cos(math.pi * ((frame - change[:, None]) / FADE).clamp(0, 1))          # (B, F)
    return voice, first[:, None].lerp(second[:, None], share[..., None]), change


def other_moods(seed, motion, count):
    """Draw a speaker's movements in `count` other moods: seed (1,), motion (1, F, M) of random_clip -> one
    frame of each, from all over the clip, (count, M)."""
    index, frames = torch.arange(count, device=seed.device), motion.shape[1]
    jaw, lip_width = (motion[:, :, list(MOTION).index(name)] for name in ("jaw", "lip_width"))      # (1, F)
    moods = random_mood(seed * count + index, 44)
    jaw, lip_width = jaw.expand(count, -1), lip_width.expand(count, -1)                   # (count, F)
    moved = perform(seed.expand(count), jaw, lip_width, moods, movement=True)             # (count, F, M)
    return moved[index, (2 * index + 1) * frames // (2 * count)]


@command("world.people")
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m world.people", description="A synthetic data set.",
                                     allow_abbrev=False)
    parser.add_argument("--out", default="synthetic", help="folder for NUMBER.mp4, NUMBER.wav and NUMBER.npz")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0,
                        help=f"number of the first clip; from {HELD_OUT} on: never trained on")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    args = parser.parse_args(argv)
    frames = round(args.seconds * FPS) if 0 < args.seconds < 1e6 else 0
    seeds = range(args.seed, args.seed + args.clips)
    if not 0 <= args.seed < seeds.stop < 2**63 or frames < 1 or args.size < 16 or args.size % 2:
        raise InputError(f"--clips {args.clips} must be at least 1, --seed {args.seed} 0 to 2^63, --seconds "
                         f"{args.seconds} at least a frame, --size {args.size} an even number from 16 on")
    for seed in tqdm(seeds, unit="clip"):
        factors = {name: value[0] for name, value in random_clip(torch.tensor([seed]), frames).items()}
        stem = os.path.join(args.out, f"{seed:06d}")
        with atomic_write(stem + ".wav", make_folder=True) as temporary, open(temporary, "wb") as file:
            soundfile.write(file, factors["wave"].numpy(), SAMPLE_RATE, format="WAV")
        with VideoWriter(stem + ".mp4", args.size, sound=stem + ".wav") as video:
            for motion in factors["motion"].split(16):
                drawn = render(factors["identity"].expand(len(motion), -1), motion, args.size)
                for frame in to_uint8(drawn).permute(0, 2, 3, 1).numpy():
                    video.write(frame)
        with atomic_write(stem + ".npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: factors[name] for name in ("identity", "motion", "emotion")},
                     identity_names=IDENTITY, motion_names=list(MOTION), emotion_names=EMOTIONS)


if __name__ == "__main__":
    sys.exit(main())
