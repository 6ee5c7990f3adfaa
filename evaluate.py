"""What the method can do, in numbers, on people and speech that were never trained on: of the synthetic world, or real.

    python evaluate.py reconstruct [--ckpt F]     pictures: self-reconstruction, and person B doing what A does
    python evaluate.py reconstruct --data DIR     the same of real people, of the test split of a folder of data.py prepare
    python evaluate.py probe       [--ckpt F]     the token: how much motion, and how much identity, is linear in it
    python evaluate.py talk        [--ckpt F]     the whole job: does the painted mouth say what the sound says?
    python evaluate.py steps       [--ckpt F]     what fewer sampling steps cost, and how far the paths bend
    python evaluate.py reader                     train the motion reader (once; its weights are embedded)

Each prints a table; --json FILE also writes its numbers. All is measured on raw frames, before any video coding.
The motion reader is a small network that reads the motion factors off a picture, trained on true frames alone. It is used
for nothing but measuring; every table says beside its readings how well it reads true frames (the ceiling).
"""
import argparse
import copy
import json
import math
import sys
import time
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import audio
import data
import flow
import metrics
from decoder import paint
from encoder import random_keep
from generator import dream
from latents import SD, load_latents
from media import InputError
from synthetic import FPS, HELD_OUT, MOTION, clip, identity, random_motion, render
from training import draws, fast_bf16, load_release, replace, update_ema

WEIGHTS = Path(__file__).resolve().parent / "weights"
NAMES = list(MOTION)
# --clips of each command (people, for probe), and the length of a clip in frames (of each person, for probe)
CLIPS = {"reconstruct": 24, "probe": 600, "talk": 12, "steps": 6}
FRAMES = {"reconstruct": 50, "probe": 8, "talk": 150, "steps": 100}
STEPS = (1, 2, 4, 8, 20)


# ---- the motion reader ----------------------------------------------------------------------------------------------

class MotionReader(nn.Module):
    """Picture (B, 3, H, W) in [-1, 1] -> motion factors (B, M). Keeps the place of what it sees (no global pooling)."""

    def __init__(self, size=128, widths=(24, 48, 64, 96)):
        super().__init__()
        self.size = size
        layers = [nn.Conv2d(3, widths[0], 5, 2, 2), nn.SiLU()]
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(widths[-1], 32, 1), nn.Flatten())         # (B, 32*8*8)
        self.head = nn.Sequential(nn.Linear(32 * (size // 16) ** 2, 192), nn.SiLU(), nn.Linear(192, len(MOTION)))
        low, high = torch.tensor(list(MOTION.values()), dtype=torch.float32).unbind(1)
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("reach", (high - low) / 2)

    def forward(self, x):
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)         # as it is, if that size
        return self.middle + self.reach * self.head(self.features(x)).float()


def true_frames(number, count, start=0, draw=render):
    """The number-th `count` frames, no person twice: half in free motion, half speaking -> images, motion (count, M)."""
    ids = start + number * count + torch.arange(count)
    motion = random_motion(ids)
    spoken = clip(ids[: math.ceil(count / 16)], 40)["motion"][:, 4::5].flatten(0, 1)[: count // 2]
    motion[: len(spoken)] = spoken
    return draw(identity(ids), motion), motion


def mirror(images, motion):
    """The same seen in a mirror: left and right change places."""
    sign = torch.tensor([1 - 2.0 * (name in ("yaw", "roll", "shift_x", "gaze_x", "light_x")) for name in NAMES])
    order = [NAMES.index({"blink_l": "blink_r", "blink_r": "blink_l"}.get(name, name)) for name in NAMES]
    return images.flip(-1), motion[:, order] * sign


def degrade(images, draw):
    """Softness (the first quarter), half the pixels (the second), a colour cast, noise: generated frames have some, and must
    still be read fairly."""
    soft, noisy, gain, lift = torch.rand(len(images), 8, 1, 1, generator=draw).split([1, 1, 3, 3], dim=1)
    x, n = images.clone(), math.ceil(len(images) / 4)
    x[:n] = x[:n].lerp(metrics.blur(x[:n], 1.2, 7), soft[:n])
    half = F.interpolate(x[n:2 * n], scale_factor=0.5, mode="bilinear", antialias=True)
    x[n:2 * n] = F.interpolate(half, size=x.shape[-2:], mode="bilinear", antialias=True)
    return x * (0.9 + 0.2 * gain) + 0.2 * lift - 0.1 + 0.08 * noisy * torch.randn(images.shape, generator=draw)


def train_reader(path, minutes, batch=64, rate=2e-3, reuse=4, compiled=True):
    """Minutes of processor time: a busy machine gets the same reader. Every frame drawn serves `reuse` times. What is saved
    on the way (averaged weights) is already usable. compiled: draw faster, after a minute's start."""
    torch.manual_seed(0)
    draw_frames = torch.compile(render, dynamic=False) if compiled else render
    reader = MotionReader().to(memory_format=torch.channels_last)                # faster on CPUs
    ema = copy.deepcopy(reader).requires_grad_(False)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    draw, test = torch.Generator().manual_seed(0), [true_frames(k, 64, HELD_OUT) for k in range(8)]
    images, motions, step, began, spent, said = [], [], 0, time.process_time(), 0.0, 0.0
    while spent < 60 * minutes:
        if step % reuse == 0:
            new, motion = true_frames(step // reuse, batch, draw=draw_frames)
            images, motions = (images + [((new + 1) * 127.5).round().byte()])[-200:], (motions + [motion])[-200:]
        a, b = torch.randint(len(images), (batch,), generator=draw), torch.randint(batch, (batch,), generator=draw)
        x = torch.stack([images[i][j] for i, j in zip(a, b, strict=True)]) / 127.5 - 1                # (B, 3, H, W)
        y = torch.stack([motions[i][j] for i, j in zip(a, b, strict=True)])                           # (B, M)
        x[::2], y[::2] = mirror(x[::2], y[::2])
        x = degrade(x, draw)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * spent / (60 * minutes)))
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16(torch.device("cpu"))):
            guess = reader(x)
        loss = F.smooth_l1_loss((guess - y) / reader.reach, torch.zeros_like(y), beta=0.2)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        update_ema(ema, reader, step, decay=0.99)
        step, spent = step + 1, time.process_time() - began
        if spent - said > 30 or spent >= 60 * minutes:
            said, ceiling = spent, read_back(ema, test)
            save_reader(path, ema, steps=step)
            print(f"{spent:.0f} s, step {step}, loss {loss:.4f}: correlation "
                  + " ".join(f"{name} {value:.3f}" for name, value in zip(NAMES, ceiling.tolist(), strict=True)), flush=True)


@torch.no_grad()
def read_back(reader, batches):
    """Correlation of what is read with what is true on (images, motion) batches -> (M,)."""
    return metrics.correlation(torch.cat([reader(x) for x, _ in batches]), torch.cat([y for _, y in batches]))


def save_reader(path, reader, **about):
    """Half precision, and what it is in the metadata."""
    weights = {name: value.half().contiguous() if value.ndim > 1 else value for name, value in reader.state_dict().items()}
    about = json.dumps({"format": "semo-motion-reader-1", "factors": NAMES, **about})
    replace(path, lambda name: save_file(weights, name, metadata={"semo": about}))


def load_reader(path):
    """ValueError if the file is not there, or not a motion reader of this world."""
    try:
        with safe_open(path, framework="pt") as f:
            about = json.loads((f.metadata() or {}).get("semo", "{}"))
            weights = {name: f.get_tensor(name).float() for name in f.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read the motion reader; `python evaluate.py reader` trains it") from error
    if about.get("format") != "semo-motion-reader-1" or about.get("factors") != NAMES:
        raise ValueError(f"{path}: not a motion reader of this synthetic world; `python evaluate.py reader` trains it")
    reader = MotionReader()
    reader.load_state_dict(weights)
    return reader.eval().requires_grad_(False)


# ---- the release under test -----------------------------------------------------------------------------------------

def open_release(args, *kinds):
    """-> what a command needs: the networks `kinds`, the space they work in, meta, device. ValueError if one is missing."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here; give auto, cpu or cuda") from error
    models, meta = load_release(args.ckpt, device)
    for kind in kinds:
        if kind not in models:
            raise ValueError(f"{args.ckpt} holds no {kind}, only {', '.join(models)}; this command needs one")
    return SimpleNamespace(**models, space=load_latents(meta["latents"], meta.get("vae", SD), device), meta=meta, device=device)


def computing(release):
    """bf16 where it is fast, as in use."""
    return torch.autocast(release.device.type, torch.bfloat16, enabled=fast_bf16(release.device))


def show(people, motion, size):
    """Draw one person (I,) or one each (n, I) in motion (n, M) -> (n, 3, size, size)."""
    people = people.expand(len(motion), -1)
    return torch.cat([render(*part, size) for part in zip(people.split(25), motion.split(25), strict=True)])


def encode(release, images, ratio=0.0, draw=None):
    """Images (n, 3, H, W) -> motion tokens (n, L*D), a share `ratio` of the patches masked at random."""
    c, tokens = release.encoder.config, []
    for part in images.split(50):
        keep = random_keep(len(part), (c.image_size // c.patch_size) ** 2, ratio, draw).to(release.device) if ratio else None
        with computing(release):
            tokens.append(release.encoder(release.space.encode(part.to(release.device)), keep).flatten(1).float())
    return torch.cat(tokens)


def depict(release, photo, motions, steps, seed):
    """The decoder's frames of the person on photo (3, H, W) in motions (n, L*D) -> (n, 3, H, W)."""
    z_r = release.space.encode(photo[None].to(release.device))
    noise = torch.randn(z_r.shape, generator=draws(1, 0, seed)).to(release.device)
    still = encode(release, photo[None])
    with computing(release):
        parts = list(paint(release.decoder, z_r, still, iter([motions]), noise, steps))
    return torch.cat([release.space.decode(part.float()).clamp(-1, 1).cpu() for part in parts])


# ---- the commands: each returns what it prints ----------------------------------------------------------------------

def reconstruct(args):
    """A clip's own first frame as the photo; then the photo of the next person B, moved as A moves, against the true B."""
    release, reader = open_release(args, "encoder", "decoder"), load_reader(args.reader)
    size, shipped = release.meta["size"], args.steps or release.meta["steps"]
    patch = release.decoder.config.patch_size * release.space.factor
    clips, read, truth = {}, {}, []
    for seed in tqdm(range(HELD_OUT, HELD_OUT + args.clips), unit="clip", disable=None):
        made, other = (clip(torch.tensor([s]), FRAMES["reconstruct"]) for s in (seed, seed + 1))
        motion, a, b = made["motion"][0], made["identity"][0], other["identity"][0]
        images, photo = show(a, motion, size), show(b, other["motion"][0, :1], size)[0]
        true, moved, tokens = images[1:], show(b, motion[1:], size), encode(release, images[1:])
        own = {f"ours, {n} step{'s' * (n > 1)}": depict(release, images[0], tokens, n, seed) for n in dict.fromkeys((shipped, 4))}
        rows = {"true frames": (true, true, a), **{name: (x, true, a) for name, x in own.items()},
                "copy the photo": (images[:1].expand_as(true), true, a),
                f"B as A, {shipped} step{'s' * (shipped > 1)}": (depict(release, photo, tokens, shipped, seed), moved, b),
                "copy B's photo": (photo.expand_as(moved), moved, b)}
        for name, (x, target, person) in rows.items():
            if name != "true frames":
                clips.setdefault(name, []).append(metrics.compare(x, target, metrics.face_box(person, motion[1:], size), patch))
            if not name.startswith("copy"):
                read.setdefault(name, []).append(reader(x))
        truth.append(motion[1:])
    rows = {name: summary(found) for name, found in clips.items()}
    follow = {name: dict(zip(NAMES, metrics.followed(x, truth), strict=True)) for name, x in read.items()}
    print(f"{args.clips} unseen clips of {FRAMES['reconstruct']} frames, {size} px; face: the box round the head; mean [95%]")
    pictures_table(rows)
    print("\nmotion read off the frames, correlation with the commanded within clips (true frames: the reader's ceiling)")
    table(["", *follow], [[factor, *(f"{follow[row][factor]:.3f}" for row in follow)] for factor in NAMES])
    return {"rows": rows, "motion_correlation": follow}


def real_people(args):
    """Self-reconstruction of real clips, their first frame as the photo: means of each person, then over people."""
    release, (people,) = open_release(args, "encoder", "decoder"), data.load_sets([args.data], "test")
    size, shipped = release.meta["size"], args.steps or release.meta["steps"]
    patch, found = release.decoder.config.patch_size * release.space.factor, {}
    listed = [row for identity in sorted(people) for row in people[identity]]
    for row in tqdm(listed[:args.clips], unit="clip", disable=None):
        images = data.read_clip(row["path"], size)[0][:FRAMES["reconstruct"]]
        left, top, right, bottom = (round(size * share) for share in row.get("face", (0.2, 0.2, 0.8, 0.8)))
        box = torch.zeros(len(images) - 1, size, size)
        box[:, max(0, top):bottom, max(0, left):right] = 1
        true, tokens = images[1:], encode(release, images[1:])
        made = {f"ours, {n} step{'s' * (n > 1)}": depict(release, images[0], tokens, n, 0) for n in dict.fromkeys((shipped, 4))}
        for name, x in {**made, "copy the photo": images[:1].expand_as(true)}.items():
            found.setdefault(name, {}).setdefault(row["identity"], []).append(metrics.compare(x, true, box, patch))
    rows = {name: summary([{k: sum(c[k] for c in clips) / len(clips) for k in clips[0]} for clips in by_person.values()])
            for name, by_person in found.items()}
    print(f"{len(found['copy the photo'])} unseen people of {args.data}, {size} px; face: the detector's box; mean over people [95%]")
    pictures_table(rows)
    return {"rows": rows, "people": sorted(found["copy the photo"])}


def pictures_table(rows):
    table(["", "PSNR", "", "SSIM", "L1", "face PSNR", "", "face SSIM", "face L1", "sharpness", "seams"],
          [[name, *(text for k in row for text in cell(row[k], 4 if "l1" in k or "ssim" in k else 2, "psnr" in k))]
           for name, row in rows.items()])


def probe(args):
    """Ridge regression from the token to every factor, on people that neither the encoder nor the regression has seen."""
    release, each = open_release(args, "encoder"), FRAMES["probe"]
    number = torch.arange(args.clips).repeat_interleave(each)                                         # (n,) whose frame
    people, motion = identity(HELD_OUT + number), random_motion(HELD_OUT + torch.arange(len(number)))
    tokens, draw = {ratio: [] for ratio in (0.0, 0.5, 0.9)}, draws(2, 0, 0)
    for part in tqdm(torch.arange(len(number)).split(50), unit="batch", disable=None):
        images = show(people[part], motion[part], release.meta["size"])
        for ratio in tokens:
            tokens[ratio].append(encode(release, images, ratio, draw))
    found = {f"{ratio:.0%} masked": metrics.probe_tokens(torch.cat(x), motion, people, number) for ratio, x in tokens.items()}
    means = {name: {"motion": sum(m.values()) / len(m), "identity": sum(i.values()) / len(i)} for name, (m, i) in found.items()}
    m, i = found["0% masked"]
    print(f"linear probe of the token, R^2 on unseen people ({args.clips} people, {each} frames each)")
    listed = [[[name, f"{value:.3f}"] for name, value in part.items()] for part in (m, i)]
    table(["motion", "R^2", "identity", "R^2"], [a + b for a, b in zip_longest(*listed, fillvalue=["", ""])])
    print()
    table(["mean R^2", *means], [[kind, *(f"{x[kind]:.3f}" for x in means.values())] for kind in ("motion", "identity")])
    return {"motion": m, "identity": i, "means": means}


def spoken(release, photo, wave, gen_steps, steps, seed):
    """The whole job on photo (3, H, W) and sound (1, S) -> frames (n, 3, H, W), before any video coding."""
    meta = release.meta
    sounds = audio.level(wave), torch.zeros(1, audio.FRAME)
    rows, silence = (audio.features(x, meta["audio"], meta.get("whisper"))[0] for x in sounds)           # (F, A)
    with computing(release):
        motions = list(dream(release.generator, encode(release, photo[None]), iter([rows]), draws(3, 0, seed), silence[0],
                             gen_steps, meta["guidance"]))
    return depict(release, photo, torch.cat(motions), steps, seed)


def talk(args):
    """The photo is a clip's first frame, the sound the clip's; `other sound` is the next clip's, against this one's truth."""
    release, reader = open_release(args, "encoder", "decoder", "generator"), load_reader(args.reader)
    size, clips, shut = release.meta["size"], {"ours": [], "true frames": [], "other sound": []}, {}
    pace = args.steps or release.meta["gen_steps"], args.steps or release.meta["steps"]
    for seed in tqdm(range(HELD_OUT, HELD_OUT + args.clips), unit="clip", disable=None):
        made, other = (clip(torch.tensor([s]), FRAMES["talk"]) for s in (seed, seed + 1))
        motion = made["motion"][0]
        images = show(made["identity"], motion, size)
        for name, frames in (("ours", spoken(release, images[0], made["wave"], *pace, seed)), ("true frames", images),
                             ("other sound", spoken(release, images[0], other["wave"], *pace, seed))):
            clips[name].append(metrics.sync(reader(frames), motion))
        noise = torch.randn(1, 2 * audio.SAMPLE_RATE, generator=draws(4, 0, seed))
        for name, wave in (("digital silence", 0 * noise), ("noise at -60 dB", 1e-3 * noise)):
            jaw = reader(spoken(release, images[0], wave, *pace, seed))[FPS // 2:, NAMES.index("jaw")]
            shut.setdefault(name, []).append({"jaw_mean": jaw.mean().item()})         # after half a second to close the mouth
    rows, shut = ({name: summary(found) for name, found in each.items()} for each in (clips, shut))
    print(f"{args.clips} unseen people and recordings of {FRAMES['talk'] / FPS:g} s: mouth read off the frames against the true")
    table(["correlation [95%]", "jaw", "", "best lag", "frames", "lip width", "", "best lag", "frames"],
          [[name, *cell(r["jaw"], 3, True), *cell(r["jaw_best"], 3), *cell(r["jaw_lag"], 1), *cell(r["lip_width"], 3, True),
            *cell(r["lip_width_best"], 3), *cell(r["lip_width_lag"], 1)] for name, r in rows.items()])
    print("\nwhat the sound does not decide (head: standard deviation in degrees), and how open the mouth is (0 to 1)")
    keys = ("yaw_std", "pitch_std", "roll_std", "blinks_per_minute", "jaw_mean")
    table(["", *keys], [[name, *(cell(r[k], 2)[0] if k in r else "" for k in keys)] for name, r in (rows | shut).items()])
    return {"rows": rows, "silence": shut}


def steps(args):
    """Decoder: self-reconstruction as in `reconstruct`. Generator: the mouth as in `talk`, its frames painted as released."""
    release, reader = open_release(args, "encoder", "decoder", "generator"), load_reader(args.reader)
    size, meta, mouth = release.meta["size"], release.meta, [NAMES.index(name) for name in ("jaw", "lip_width")]
    tokens_of, found = (release.decoder.config.num_tokens, release.decoder.config.token_dim), {}
    for seed in tqdm(range(HELD_OUT, HELD_OUT + args.clips), unit="clip", disable=None):
        made = clip(torch.tensor([seed]), FRAMES["steps"])
        motion, person = made["motion"][0], made["identity"][0]
        images = show(person, motion, size)
        tokens, box = encode(release, images), metrics.face_box(person, motion, size)
        for n in STEPS:
            frames = depict(release, images[0], tokens, n, seed)
            follows = metrics.correlation(reader(frames)[:, mouth], motion[:, mouth]).tolist()
            says = metrics.sync(reader(spoken(release, images[0], made["wave"], n, meta["steps"], seed)), motion)
            found.setdefault(n, []).append({
                "psnr": metrics.psnr(frames, images).mean().item(), "face_psnr": metrics.psnr(frames, images, box).mean().item(),
                "jaw": follows[0], "lip_width": follows[1], "talk_jaw": says["jaw"], "talk_lip_width": says["lip_width"],
                "yaw_std": says["yaw_std"], "blinks": says["blinks_per_minute"]})
    with computing(release):                                        # the last clip's paths
        z_r = release.space.encode(images[:1].to(release.device))
        cache = release.decoder.reference(z_r, tokens[:1].unflatten(1, tokens_of))
        noise = torch.randn(len(tokens), *z_r.shape[1:], generator=draws(1, 0, 0)).to(release.device)
        bend = {"decoder": flow.bend(release.decoder, noise, m_t=tokens.unflatten(1, tokens_of), cache=cache).mean().item()}
        c, rows = release.generator.config, audio.features(audio.level(made["wave"]), meta["audio"], meta.get("whisper"))[0]
        noise = torch.randn(1, c.window, tokens.shape[1], generator=draws(1, 0, 1)).to(release.device)
        model = flow.guide(release.generator, meta["guidance"], {"audio": None})
        heard = rows[: c.past + c.window + c.ahead][None].to(release.device)
        bend["generator"] = flow.bend(model, noise, past=tokens[None, : c.past], reference=tokens[:1], audio=heard).mean().item()
    rows = {n: summary(clips) for n, clips in found.items()}
    print(f"{args.clips} unseen people and recordings of {FRAMES['steps'] / FPS:g} s, {size} px; correlations read off the frames")
    table(["steps", "decoder: PSNR", "face PSNR", "jaw", "lip width", "generator: jaw", "lip width", "yaw std", "blinks/min"],
          [[str(n), *(cell(r[k], 3 if "jaw" in k or "lip" in k else 2)[0] for k in r)] for n, r in rows.items()])
    print(f"bend of the paths (0: straight): decoder {bend['decoder']:.4f}, generator {bend['generator']:.4f}")
    return {"rows": {str(n): r for n, r in rows.items()}, "bend": bend}


def train(args):
    """The reader, and how well it reads what it never saw."""
    train_reader(args.reader, args.minutes)
    read = read_back(load_reader(args.reader), [true_frames(number, 64, HELD_OUT) for number in range(8, 24)]).tolist()
    print("true frames of unseen people, correlation of what is read with what is true")
    table(["factor", "correlation"], [[name, f"{value:.3f}"] for name, value in zip(NAMES, read, strict=True)])
    return {"correlation": dict(zip(NAMES, read, strict=True))}


def summary(clips):
    """Measures of each clip, [{name: number}, ...] -> {name: its mean and the 95% interval of that}."""
    return {name: metrics.interval([measured[name] for measured in clips]) for name in clips[0]}


def cell(value, digits, bounds=False):
    """Mean, and if wanted its interval -> list of texts."""
    return [f"{value['mean']:.{digits}f}"] + [f"[{value['low']:.{digits}f} {value['high']:.{digits}f}]"] * bounds


def table(head, rows):
    """Columns aligned: the first (names) to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        print("  ".join(x.rjust(w) if k else x.ljust(w) for k, (x, w) in enumerate(zip(row, widths, strict=True))).rstrip())


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("command", choices=("reconstruct", "probe", "talk", "steps", "reader"))
    p.add_argument("--ckpt", default=str(WEIGHTS / "semo-tiny.safetensors"), help="release (default: the embedded)")
    p.add_argument("--steps", type=int, help="sampling steps (default: as released)")
    p.add_argument("--clips", type=int, help=f"unseen clips, or for probe people (default: {CLIPS})")
    p.add_argument("--data", help="reconstruct: a folder made by data.py prepare, its test split (default: the synthetic world)")
    p.add_argument("--json", help="also write the numbers to this file")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    p.add_argument("--reader", default=str(WEIGHTS / "motion-reader.safetensors"), help="weights of the motion reader")
    p.add_argument("--minutes", type=float, default=15, help="reader: processor time to train for (default: %(default)s)")
    args = p.parse_args(argv)
    if args.data and args.command != "reconstruct":
        p.error("--data is for reconstruct: of real clips the true motion is not known")
    if args.clips is None and not args.data:
        args.clips = CLIPS.get(args.command)
    least = 10 if args.command == "probe" else 1
    if any(given is not None and given < low for given, low in ((args.clips, least), (args.steps, 1), (args.minutes, 0.01))):
        p.error(f"--clips must be at least {least}, --steps at least 1, --minutes at least 0.01")
    return args


def main(argv=None):
    """-> exit status: 0, or 2 after one sentence about what cannot be used."""
    args, began = parse(argv), time.time()
    try:
        with torch.inference_mode(args.command != "reader"):
            commands = {"reconstruct": real_people if args.data else reconstruct, "probe": probe, "talk": talk,
                        "steps": steps, "reader": train}
            found = commands[args.command](args)
        if args.json:
            about = {"command": args.command, "ckpt": args.ckpt, "clips": args.clips, "steps": args.steps, **found}
            replace(args.json, lambda name: Path(name).write_text(json.dumps(about, indent=1) + "\n"))
    except (InputError, ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    print(f"\n{time.time() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
