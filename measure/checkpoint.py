"""What these commands share: options; the checkpoint under test, its tokens and frames; tables."""
import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch

import sample
from encoder import random_masking
from generator import generate_motion
from measure import metrics
from media import audio_features
from media.device import autocast, pick_device
from media.files import InputError, atomic_write
from media.latents import SD, load_latents
from training import step_rng
from world.render import render


def command_parser(module, description):
    """Make the parser of `python -m measure.MODULE` with the options that all commands have."""
    parser = argparse.ArgumentParser(prog=f"python -m measure.{module}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ckpt", default=sample.DEFAULT, help="weights to measure (default: the embedded)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    return parser


def write_json(path, values):
    """Write plain values to a file, and make its folder."""
    with atomic_write(path, make_folder=True) as temporary:
        Path(temporary).write_text(json.dumps(values, indent=1) + "\n")


def open_checkpoint(args, *kinds):
    """Load what a command needs -> the networks `kinds`, their space, meta, device. Raises InputError."""
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
            z = checkpoint.space.encode(part.to(checkpoint.device))
            tokens.append(checkpoint.encoder(z, ids_keep).flatten(1).float())
    return torch.cat(tokens)


def speech_features(checkpoint, waves):
    """Sound (B, S) -> features (B, n, A), a row for each frame."""
    meta, waves = checkpoint.meta, audio_features.normalise_loudness(waves)
    return audio_features.extract_features(waves, meta["audio"], meta.get("whisper"))


def generate(checkpoint, photo, waves, seed, gen_steps=None, emotion=None, batch=1):
    """Generate motion for photo (3, H, W) and sound (1 or B, S) -> (B, n, L*D), or (n, L*D) where B = 1.

    gen_steps: sampling steps, as released where None; emotion: see generator.generate_motion; batch: B.
    """
    meta, m_ref = checkpoint.meta, encode(checkpoint, photo[None]).expand(batch, -1)
    features = speech_features(checkpoint, waves).squeeze(0)                           # (n, A) or (B, n, A)
    silence = sample.encode_silence(meta["audio"], meta.get("whisper"))
    with autocast(checkpoint.device):
        windows = list(generate_motion(checkpoint.generator, m_ref, iter([features]), step_rng(3, 0, seed),
                                       silence, gen_steps or meta["gen_steps"], meta["guidance"], emotion))
    return torch.cat(windows, dim=-2)


def decode_clip(checkpoint, photo, motions, steps, seed, m_ref=None):
    """Generate the person on photo (3, H, W) in motions (n, L*D) -> (n, 3, H, W). m_ref: the photo's own."""
    z_r = checkpoint.space.encode(photo[None].to(checkpoint.device))
    noise = torch.randn(z_r.shape, generator=step_rng(1, 0, seed)).to(checkpoint.device)
    m_ref = encode(checkpoint, photo[None]) if m_ref is None else m_ref
    with autocast(checkpoint.device):
        pictures = list(sample.decode_frames(checkpoint.decoder, z_r, m_ref, iter([motions]), noise, steps))
    return torch.cat([checkpoint.space.decode(picture.x).clamp(-1, 1).cpu() for picture in pictures])


def summary(clips):
    """Average the measures of clips, [{name: number}, ...] -> {name: mean and its 95% interval}."""
    return {name: metrics.interval([measured[name] for measured in clips]) for name in clips[0]}


def cell(value, digits, bounds=False):
    """Write a mean or median {mean or value, low, high}, and if wanted its interval -> list of texts."""
    if value is None or None in value.values():                                    # of no clip it is known
        return ["-"] + [""] * bounds
    middle, low, high = (f"{x:.{digits}f}" for x in value.values())
    return [middle] + [f"[{low} {high}]"] * bounds


def table(head, rows):
    """Print aligned columns: the first (names) to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for name, *cells in [head, *rows]:
        numbers = (text.rjust(width) for text, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *numbers]).rstrip())


def interval_table(rows, measures, digits):
    """Print these measures of {row: {measure: see cell}}, each with its interval."""
    table(["", *(text for name in measures for text in (name, ""))],
          [[label, *(text for name in measures for text in cell(entry[name], digits, True))]
           for label, entry in rows.items()])
