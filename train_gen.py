"""Stage 2: train the motion generator on speech, the motion encoder frozen (paper section 3.2, eqs. 4-7 and 9).

    python train_gen.py --preset tiny --ae runs/ae/semo.safetensors
    torchrun --nproc_per_node=8 train_gen.py --preset tiny --ae runs/ae/semo.safetensors

First every clip is drawn and encoded once, kept in --out; then the generator learns from random windows of them.
Run the same command again to resume. --out holds state.pt (to go on), semo.safetensors (all three networks: what
sample.py reads), log.jsonl and short clips with sound. Ctrl-C and SIGTERM save first.
"""
import argparse
import hashlib
import os
import sys
import time
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

import audio
import flow
import synthetic
import training
from data import FPS, VideoWriter
from decoder import paint
from encoder import random_keep
from generator import Generator, GeneratorConfig, dream

# clips: of `seconds` each, encoded once a process; windows: drawn from them at each step
PRESETS = {
    "nano": dict(generator=GeneratorConfig(width=32, depth=1, heads=1, window=4, past=4, ahead=1),
                 steps=20, windows=4, clips=2, seconds=1, lr=1e-3, muon_lr=0.02),
    "tiny": dict(generator=GeneratorConfig(), steps=3000, windows=64, clips=768, seconds=4, lr=1e-3, muon_lr=0.02),
}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the network and of the run")
    p.add_argument("--ae", default="runs/ae/semo.safetensors", help="release of stage 1: its encoder is used, frozen")
    p.add_argument("--out", default="runs/gen", help="folder of this run; an unfinished one is resumed")
    p.add_argument("--steps", type=int, help="length of the run (default: the preset's)")
    p.add_argument("--clips", type=int, help="clips drawn and encoded by each process (default: the preset's)")
    p.add_argument("--windows", type=int, help="windows a step and process (default: the preset's)")
    p.add_argument("--mask-max", type=float, default=0.2, help="masks of the past frames, U(0, this) (paper: 0.2)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="draw the clips with torch.compile: a minute to start, then five times faster (needs a C++ compiler)")
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints and preview clips")
    args = p.parse_args(argv)
    for name in ("steps", "clips", "windows"):
        setattr(args, name, PRESETS[args.preset][name] if getattr(args, name) is None else getattr(args, name))
    if min(args.steps, args.clips, args.windows, args.save_every, args.seed + 1) < 1 or not 0 <= args.mask_max < 1:
        p.error("--steps, --clips, --windows and --save-every must be positive, --seed not negative, --mask-max in [0, 1)")
    return args


@torch.no_grad()
def encode_clip(encoder, seed, frames, mask_max, draw, render, device, bf16):
    """One speaker -> motion (F, L*D) eq. (5), the same seen through a mask eq. (4), speech features (F, A)."""
    made = synthetic.clip(torch.tensor([seed]), frames)
    rows = audio.features(audio.level(made["wave"]))[0]                                # (F, A)
    clear, masked = [], []
    patches = (encoder.config.image_size // encoder.config.patch_size) ** 2
    ratio = mask_max * torch.rand((), generator=draw).item()
    for part in made["motion"][0].split(25):
        people = made["identity"].expand(len(part), -1)
        images = render(people, part, encoder.config.image_size).to(device)
        with bf16:
            clear.append(encoder(images).flatten(1).cpu())                             # (n, L*D)   eq. (5)
            keep = random_keep(len(part), patches, ratio, draw).to(device)
            masked.append(encoder(images, keep).flatten(1).cpu())                      # (n, L*D)   eq. (4)
    return torch.cat(clear), torch.cat(masked), rows


def clips(args, preset, encoder, rank, world, device, bf16):
    """This process's clips, encoded: motion, masked (n, F, L*D), rows (n, F, A). Kept in --out, for the next start."""
    with open(args.ae, "rb") as f:
        key = [hashlib.file_digest(f, "sha256").hexdigest(), args.clips, args.seed, args.mask_max, preset["seconds"], world]
    path = os.path.join(args.out, f"clips-{rank}.pt")
    if os.path.exists(path):
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if kept["key"][0] != key[0] and os.path.exists(os.path.join(args.out, "state.pt")):
            raise SystemExit(f"train_gen.py: the run in {args.out} learned the tokens of another encoder; give another --out")
        if kept["key"] == key:
            return [kept[name] for name in ("motion", "masked", "rows")]
    made, frames = [], round(preset["seconds"] * FPS)
    render = torch.compile(synthetic.render, dynamic=False) if args.compile else synthetic.render
    for number in tqdm(range(args.clips), desc="encoding", unit="clip", disable=rank > 0):
        seed = ((args.seed * 100_000 + number) * world + rank) % synthetic.HELD_OUT
        draw = training.draws(args.seed, rank, seed)
        made.append(encode_clip(encoder, seed, frames, args.mask_max, draw, render, device, bf16))
    motion, masked, rows = (torch.stack(part) for part in zip(*made, strict=True))
    training.save_state(path, key=key, motion=motion, masked=masked, rows=rows)
    return motion, masked, rows


def windows(data, config, count, draw):
    """Random windows -> new motion (B, K, L*D), past (B, P, L*D), reference (B, L*D), audio (B, P+K+ahead, A).

    Two kinds: within a clip, and (a quarter) at its start, where the past is the reference motion, repeated, and what was
    heard before is silence - as sample.py begins. The reference is a frame from anywhere in the clip.
    """
    motion, masked, rows = data
    n, frames, _ = motion.shape
    P, K = config.past, config.window
    clip = torch.randint(n, (count,), generator=draw)
    begin = torch.rand(count, generator=draw) < 0.25
    start = torch.where(begin, 0, torch.randint(P, frames - K + 1, (count,), generator=draw))         # first new frame
    reference = masked[clip, torch.randint(frames, (count,), generator=draw)]                         # (B, L*D)
    new = motion[clip[:, None], start[:, None] + torch.arange(K)]                                     # (B, K, L*D)
    past = masked[clip[:, None], (start[:, None] + torch.arange(-P, 0)).clamp(min=0)]
    past = torch.where(begin[:, None, None], reference[:, None], past)                                # (B, P, L*D)
    when = start[:, None] + torch.arange(-P, K + config.ahead)
    heard = rows[clip[:, None], when.clamp(0, frames - 1)]
    heard = torch.where(((when < 0) | (when >= frames))[..., None], silence().to(heard), heard)       # (B, P+K+ahead, A)
    return new, past, reference, heard


def silence():
    """The speech features of no sound, (A,)."""
    return audio.features(torch.zeros(1, audio.FRAME))[0, 0]


def preview(path, models, args, device, seconds=3):
    """A held-out person says held-out words: a short mp4 with sound, photo = the clip's first frame."""
    size = models["encoder"].config.image_size
    made = synthetic.clip(torch.tensor([synthetic.HELD_OUT + args.seed]), seconds * FPS)
    photo = synthetic.render(made["identity"], made["motion"][:, 0], size).to(device)
    wave = audio.level(made["wave"])
    with torch.inference_mode():
        still = models["encoder"](photo).flatten(1)
    draw = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(1, *photo.shape[1:], generator=draw).to(device)
    motions = dream(models["generator"], still, iter([audio.features(wave)[0]]), draw, silence())
    with VideoWriter(path, size, sound=wave[0]) as video:
        for frames in paint(models["decoder"], photo, still, motions, noise):
            for frame in ((frames + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy():
                video.write(frame)


def main(argv=None):
    args = parse(argv)
    preset = PRESETS[args.preset]
    rank, world, device = training.start(args.device)
    training.seed_everything(args.seed)
    try:
        models, meta = training.load_release(args.ae, device)
    except ValueError as error:
        raise SystemExit(f"train_gen.py: {error}") from error
    encoder = models["encoder"].requires_grad_(False)
    config = replace(preset["generator"], num_tokens=encoder.config.num_tokens, token_dim=encoder.config.token_dim)
    model, ema = (Generator(config).to(device) for _ in range(2))
    ema.load_state_dict(model.state_dict())
    ema.eval().requires_grad_(False)
    optimisers = training.optimisers(model, preset["lr"], preset["muon_lr"])
    files = {name: os.path.join(args.out, name) for name in ("state.pt", "semo.safetensors", "log.jsonl")}
    os.makedirs(args.out, exist_ok=True)
    step = training.resume(files["state.pt"], {"generator": config}, model, ema, optimisers)
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=training.fast_bf16(device))
    data = clips(args, preset, encoder, rank, world, device, bf16)
    loss_of = training.wrap(model, world, device)
    stopper, began, first = training.Stopper(), time.time(), step
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0)
    while step < args.steps:
        training.set_rate(optimisers, step, args.steps, warmup=50)
        draw = training.draws(args.seed, rank, step)
        new, past, reference, heard = (x.to(device) for x in windows(data, config, args.windows, draw))
        noise = torch.randn(new.shape, generator=draw).to(device)
        t = flow.random_times(len(new), draw, noise_share=0, mean=0.0, spread=1.0).to(device)
        drop = (torch.rand(len(new), generator=draw) < 0.1).to(device)                 # for guidance
        with bf16:
            loss = flow.flow_loss(loss_of, new, noise, t, past=past, reference=reference, audio=heard, drop=drop)
        loss.backward()
        training.descend(model, optimisers, loss.item(), step, files["state.pt"], device)
        training.update_ema(ema, model, step, training.ema_decay(args.steps))
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        stop = training.anyone(stopper.wanted, device)
        if rank == 0 and (step % args.save_every == 0 or step == args.steps or stop):
            done = {"encoder": encoder, "decoder": models["decoder"], "generator": ema}
            training.save_release(files["semo.safetensors"], done, {**meta, "audio": "mel", "gen_steps": 4, "guidance": 1.5})
            preview(os.path.join(args.out, f"step{step:06d}.mp4"), done, args, device)
            training.log(files["log.jsonl"], step=step, loss=loss.item(),
                         windows_per_second=(step - first) * world * args.windows / (time.time() - began))
            training.save_state(files["state.pt"], step=step, configs={"generator": asdict(config)}, model=model.state_dict(),
                                ema=ema.state_dict(), optimisers=[o.state_dict() for o in optimisers])
        if stop:
            break
    bar.close()
    return 130 if step < args.steps else 0


if __name__ == "__main__":
    sys.exit(main())
