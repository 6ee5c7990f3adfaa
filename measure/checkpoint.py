"""A checkpoint under test: opened with what a command needs, asked for tokens and frames; and the tables it is reported in."""
from pathlib import Path
from types import SimpleNamespace

import torch

import sample
from decoder import paint
from encoder import random_keep
from measure import metrics
from media.device import autocast, pick_device
from media.files import InputError
from media.latents import SD, load_latents
from training import draws
from world.render import render

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


# ---- the release under test -----------------------------------------------------------------------------------------

def open_release(args, *kinds):
    """-> what a command needs: the networks `kinds`, the space they work in, meta, device. ValueError if one is missing."""
    device = pick_device(args.device)
    models, meta = sample.load_models(args.ckpt, device)
    for kind in kinds:
        if kind not in models:
            raise InputError(f"{args.ckpt} holds no {kind}, only {', '.join(models)}; this command needs one")
    return SimpleNamespace(**models, space=load_latents(meta["latents"], meta.get("vae", SD), device), meta=meta, device=device)


def computing(release):
    """bf16 where it is fast, as in use."""
    return autocast(release.device)


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


def depict(release, photo, motions, steps, seed, still=None):
    """The decoder's frames of the person on photo (3, H, W) in motions (n, L*D) -> (n, 3, H, W). still: the photo's own."""
    z_r = release.space.encode(photo[None].to(release.device))
    noise = torch.randn(z_r.shape, generator=draws(1, 0, seed)).to(release.device)
    still = encode(release, photo[None]) if still is None else still
    with computing(release):
        parts = list(paint(release.decoder, z_r, still, iter([motions]), noise, steps))
    return torch.cat([release.space.decode(part.float()).clamp(-1, 1).cpu() for part in parts])


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
