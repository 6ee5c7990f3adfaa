"""A checkpoint under test: opened with what a command needs, asked for tokens and frames; and the tables it
is reported in."""
from pathlib import Path
from types import SimpleNamespace

import torch

import sample
from decoder import decode_frames
from encoder import random_masking
from measure import metrics
from media.device import autocast, pick_device
from media.files import InputError
from media.latents import SD, load_latents
from training import step_rng
from world.render import render

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


# ---- the checkpoint under test -----------------------------------------------------------------------------

def open_checkpoint(args, *kinds):
    """-> what a command needs: the networks `kinds`, the space they work in, meta, device. InputError if one
    is missing."""
    device = pick_device(args.device)
    models, meta = sample.load_models(args.ckpt, device)
    for kind in kinds:
        if kind not in models:
            raise InputError(f"{args.ckpt} holds no {kind}, only {', '.join(models)}; this command needs one")
    return SimpleNamespace(**models, space=load_latents(meta["latents"], meta.get("vae", SD), device),
                           meta=meta, device=device)


def render_batched(people, motion, size):
    """Draw one person (I,) or one each (n, I) in motion (n, M) -> (n, 3, size, size)."""
    people = people.expand(len(motion), -1)
    return torch.cat([render(*part, size) for part in zip(people.split(25), motion.split(25), strict=True)])


def encode(checkpoint, images, ratio=0.0, rng=None):
    """Images (n, 3, H, W) -> motion tokens (n, L*D), a share `ratio` of the patches masked at random."""
    c, tokens = checkpoint.encoder.config, []
    for part in images.split(50):
        patches = (c.image_size // c.patch_size) ** 2
        ids_keep = random_masking(len(part), patches, ratio, rng).to(checkpoint.device) if ratio else None
        with autocast(checkpoint.device):
            tokens.append(checkpoint.encoder(checkpoint.space.encode(part.to(checkpoint.device)),
                                             ids_keep).flatten(1).float())
    return torch.cat(tokens)


def decode_clip(checkpoint, photo, motions, steps, seed, m_ref=None):
    """The decoder's frames of the person on photo (3, H, W) in motions (n, L*D) -> (n, 3, H, W). m_ref: the
    photo's own."""
    z_r = checkpoint.space.encode(photo[None].to(checkpoint.device))
    noise = torch.randn(z_r.shape, generator=step_rng(1, 0, seed)).to(checkpoint.device)
    m_ref = encode(checkpoint, photo[None]) if m_ref is None else m_ref
    with autocast(checkpoint.device):
        parts = list(decode_frames(checkpoint.decoder, z_r, m_ref, iter([motions]), noise, steps))
    return torch.cat([checkpoint.space.decode(part.float()).clamp(-1, 1).cpu() for part in parts])


def summary(clips):
    """Measures of each clip, [{name: number}, ...] -> {name: its mean and the 95% interval of that}."""
    return {name: metrics.interval([measured[name] for measured in clips]) for name in clips[0]}


def cell(value, digits, bounds=False):
    """Mean, and if wanted its interval -> list of texts."""
    interval = f"[{value['low']:.{digits}f} {value['high']:.{digits}f}]"
    return [f"{value['mean']:.{digits}f}"] + [interval] * bounds


def table(head, rows):
    """Columns aligned: the first (names) to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for cells in [head, *rows]:
        print("  ".join(x.rjust(w) if k else x.ljust(w) for k,
                        (x, w) in enumerate(zip(cells, widths, strict=True))).rstrip())
