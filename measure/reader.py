"""The motion reader: a small network that reads the motion factors of the synthetic world off a picture.

    python -m measure.reader [--minutes 15]        train it again; its weights are embedded

It learns from true frames alone and is used for nothing but measuring: evaluate.py reads with it what
generated frames show, and says beside every reading how well true frames are read (the ceiling).
"""
import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from measure import metrics
from measure.metrics import NAMES
from media.device import autocast
from media.files import InputError, atomic_write, command
from media.image import to_uint8
from training import update_ema
from world.people import HELD_OUT, random_clip, random_motion
from world.render import MOTION, random_identity, render

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "motion-reader.safetensors"
FORMAT = "semo-motion-reader-1"


class FactorRegressor(nn.Module):
    """Picture (B, 3, H, W) in [-1, 1] -> motion factors (B, M). No global pooling, so positions are kept."""

    def __init__(self, size=128, widths=(24, 48, 64, 96)):
        super().__init__()
        self.size = size
        layers = [nn.Conv2d(3, widths[0], 5, 2, 2), nn.SiLU()]
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(widths[-1], 32, 1), nn.Flatten())       # (B, 32*8*8)
        self.head = nn.Sequential(nn.Linear(32 * (size // 16) ** 2, 192), nn.SiLU(),
                                  nn.Linear(192, len(MOTION)))
        low, high = torch.tensor(list(MOTION.values()), dtype=torch.float32).unbind(1)
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("reach", (high - low) / 2)

    def forward(self, x):
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.middle + self.reach * self.head(self.features(x)).float()


def true_frames(number, count, start=0, render_fn=render):
    """Draw the number-th `count` frames, half in free motion, half speaking -> images, motion (count, M)."""
    ids = start + number * count + torch.arange(count)
    motion = random_motion(ids)
    speaking = random_clip(ids[: math.ceil(count / 16)], 40)["motion"][:, 4::5].flatten(0, 1)[: count // 2]
    motion[: len(speaking)] = speaking
    return render_fn(random_identity(ids), motion), motion


def mirror(images, motion):
    """Mirror images and motion: left and right change places."""
    sign = torch.tensor([-1.0 if name in ("yaw", "roll", "shift_x", "gaze_x", "light_x") else 1.0
                         for name in NAMES])
    order = [NAMES.index({"blink_l": "blink_r", "blink_r": "blink_l"}.get(name, name)) for name in NAMES]
    return images.flip(-1), motion[:, order] * sign


def augment(images, rng):
    """Blur the first quarter of images, halve the pixels of the second, add a colour cast and noise to all.

    Generated frames have some of it, and must still be read fairly.
    """
    soft, noisy, gain, lift = torch.rand(len(images), 8, 1, 1, generator=rng).split([1, 1, 3, 3], dim=1)
    x, n = images.clone(), math.ceil(len(images) / 4)
    x[:n] = x[:n].lerp(metrics.blur(x[:n], 1.2, 7), soft[:n])
    half = F.interpolate(x[n:2 * n], scale_factor=0.5, mode="bilinear", antialias=True)
    x[n:2 * n] = F.interpolate(half, size=x.shape[-2:], mode="bilinear", antialias=True)
    return x * (0.9 + 0.2 * gain) + 0.2 * lift - 0.1 + 0.08 * noisy * torch.randn(images.shape, generator=rng)


def train_regressor(path, minutes, batch=64, rate=2e-3, reuse=4, compiled=True):
    """Train for minutes of processor time, so that a busy machine gets the same reader; save on the way.

    Every frame drawn is used `reuse` times. compiled: draw faster, after a start of a minute.
    """
    torch.manual_seed(0)
    render_fn = torch.compile(render, dynamic=False) if compiled else render
    regressor = FactorRegressor().to(memory_format=torch.channels_last)                # faster on CPUs
    ema = copy.deepcopy(regressor).requires_grad_(False)
    optimiser = torch.optim.AdamW(regressor.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    rng, test = torch.Generator().manual_seed(0), [true_frames(k, 64, HELD_OUT) for k in range(8)]
    images, motions, step, began, seconds, reported = [], [], 0, time.process_time(), 0.0, 0.0
    while seconds < 60 * minutes:
        if step % reuse == 0:
            new, motion = true_frames(step // reuse, batch, render_fn=render_fn)
            images, motions = (images + [to_uint8(new)])[-200:], (motions + [motion])[-200:]
        a = torch.randint(len(images), (batch,), generator=rng)
        b = torch.randint(batch, (batch,), generator=rng)
        x = torch.stack([images[i][j] for i, j in zip(a, b, strict=True)]) / 127.5 - 1          # (B, 3, H, W)
        y = torch.stack([motions[i][j] for i, j in zip(a, b, strict=True)])                     # (B, M)
        x[::2], y[::2] = mirror(x[::2], y[::2])
        x = augment(x, rng)
        warmup, progress = min(1, (step + 1) / 50), seconds / (60 * minutes)
        optimiser.param_groups[0]["lr"] = rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))
        with autocast(torch.device("cpu")):
            pred = regressor(x)
        loss = F.smooth_l1_loss((pred - y) / regressor.reach, torch.zeros_like(y), beta=0.2)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(regressor.parameters(), 1.0)
        optimiser.step()
        update_ema(ema, regressor, step, decay=0.99)
        step, seconds = step + 1, time.process_time() - began
        if seconds - reported > 30 or seconds >= 60 * minutes:
            reported, ceiling = seconds, read_back(ema, test)
            save_regressor(path, ema, steps=step)
            text = " ".join(f"{name} {x:.3f}" for name, x in zip(NAMES, ceiling.tolist(), strict=True))
            print(f"{seconds:.0f} s, step {step}, loss {loss:.4f}: correlation {text}", flush=True)


@torch.no_grad()
def read_back(regressor, batches):
    """Correlate what is read with what is true on (images, motion) batches -> (M,)."""
    return metrics.correlation(torch.cat([regressor(x) for x, _ in batches]),
                               torch.cat([y for _, y in batches]))


def save_regressor(path, regressor, **meta):
    """Write the weights in half precision, vectors in single, and plain values in the metadata."""
    weights = {name: value.half().contiguous() if value.ndim > 1 else value
               for name, value in regressor.state_dict().items()}
    meta = json.dumps({"format": FORMAT, "factors": NAMES, **meta})
    with atomic_write(path, make_folder=True) as temporary:
        save_file(weights, temporary, metadata={"semo": meta})


def load_regressor(path):
    """Read the weights of a motion reader. Raises InputError if the file holds none of this world."""
    advice = "`python -m measure.reader` trains it"
    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get("semo", "{}"))
            weights = {name: f.get_tensor(name).float() for name in f.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the motion reader; {advice}") from error
    if not isinstance(meta, dict) or (meta.get("format"), meta.get("factors")) != (FORMAT, NAMES):
        raise InputError(f"{path}: not a motion reader of this synthetic world; {advice}")
    regressor = FactorRegressor()
    try:
        regressor.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights are not those of a motion reader; {advice}") from error
    return regressor.eval().requires_grad_(False)


@command("measure.reader")
def main(argv=None):
    """Train the reader, and print how well it reads unseen people."""
    parser = argparse.ArgumentParser(prog="python -m measure.reader", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(WEIGHTS), help="its weights (default: the embedded, replaced)")
    parser.add_argument("--minutes", type=float, default=15,
                        help="processor time to train for (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.minutes < 0.01:
        parser.error("--minutes must be at least 0.01")
    train_regressor(args.out, args.minutes)
    test = [true_frames(number, 64, HELD_OUT) for number in range(8, 24)]
    correlation = read_back(load_regressor(args.out), test).tolist()
    print("true frames of unseen people, correlation of what is read with what is true")
    print("\n".join(f"{name:12} {value:.3f}" for name, value in zip(NAMES, correlation, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
