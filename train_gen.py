"""Stage 2: train the motion generator on speech, the motion encoder frozen (paper section 3.2, eqs. 4-7 and 9).

    python train_gen.py --preset tiny --ae runs/ae/semo.safetensors
    python train_gen.py --preset small --ae runs/ae/semo.safetensors --data DIR [DIR ...]     clips of data.py prepare
    torchrun --nproc_per_node=8 train_gen.py --preset paper --ae runs/ae/semo.safetensors --data DIR
    python train_gen.py --preset tiny --reflow runs/gen/semo.safetensors     straighter paths: one step, no guidance

First every clip is drawn or read and encoded once, kept in --out; then the generator learns from random windows of them.
Run the same command again to resume. --out holds state.pt (to go on), semo.safetensors (all three networks: what
sample.py reads), log.jsonl and short clips with sound. Ctrl-C and SIGTERM save first.
"""
import argparse
import hashlib
import os
import sys
import time
from dataclasses import replace

import torch
from tqdm import tqdm

import data
import flow
import sample
import training
from decoder import decode_frames
from encoder import random_masking
from generator import Generator, GeneratorConfig, generate_motion
from media import audio_features
from media.device import autocast
from media.files import InputError
from media.image import to_uint8
from media.latents import SD, load_latents
from media.sound import FPS, SAMPLES_PER_FRAME
from media.video import VideoWriter
from media.weights import save_weights
from world.people import HELD_OUT, random_clip
from world.render import render

# clips: of `seconds` each, encoded once a process; windows: drawn from them at each step; audio: kind of features
PRESETS = {
    "nano": dict(generator=GeneratorConfig(width=32, depth=1, heads=1, window=4, past=4, lookahead=1),
                 steps=20, windows=4, clips=2, seconds=1, lr=1e-3, muon_lr=0.02),
    "tiny": dict(generator=GeneratorConfig(), steps=3000, windows=64, clips=768, seconds=4, lr=1e-3, muon_lr=0.02),
    "small": dict(generator=GeneratorConfig(width=256, depth=8, heads=8), steps=100000, windows=128, clips=4096, seconds=4,
                  lr=5e-4, muon_lr=0.01),
    "paper": dict(generator=GeneratorConfig(width=512, depth=8, heads=8), audio="whisper", steps=200000, windows=128, clips=4096,
                  seconds=4, lr=1e-4, muon_lr=0.005),
}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the network and of the run")
    p.add_argument("--ae", default="runs/ae/semo.safetensors", help="weights of stage 1: their encoder is used, frozen")
    p.add_argument("--out", help="folder of this run; an unfinished one is resumed (default: runs/gen, or runs/reflow_gen)")
    p.add_argument("--reflow", metavar="TEACHER", help="in place of --ae: learn the straight line from noise to what the generator of "
                   "these weights makes of it, guidance included")
    p.add_argument("--one-step", action="store_true", help="with --reflow: learn the one step from pure noise alone (distillation)")
    p.add_argument("--teacher-steps", type=int, default=20, help="with --reflow: steps of the teacher (default: %(default)s)")
    p.add_argument("--data", nargs="+", metavar="DIR", default=["synthetic"], help="folders made by data.py prepare, drawn equally; "
                   "the word synthetic stands for the synthetic world (default)")
    p.add_argument("--whisper", default=audio_features.WHISPER,
                   help="preset paper: the Whisper model, hub id or folder (default: %(default)s)")
    p.add_argument("--steps", type=int, help="length of the run (default: the preset's)")
    p.add_argument("--clips", type=int, help="most clips of each set that each process encodes (default: the preset's)")
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
    if args.one_step and not args.reflow:
        p.error("--one-step goes with --reflow")
    args.ae, args.out = args.reflow or args.ae, args.out or ("runs/reflow_gen" if args.reflow else "runs/gen")
    counts = (args.steps, args.clips, args.windows, args.save_every, args.teacher_steps, args.seed + 1)
    if min(counts) < 1 or not 0 <= args.mask_max < 1:
        p.error("--steps, --clips, --windows, --teacher-steps and --save-every must be positive, --seed not negative, "
                "--mask-max in [0, 1)")
    return args


@torch.no_grad()
def encode_clip(encoder, space, parts, mask_max, rng, device, bf16):
    """Pictures of a speaker, iterable of (n, 3, H, W) -> motion (F, L*D) eq. (5), the same seen through a mask eq. (4)."""
    clear, masked = [], []
    patches = (encoder.config.image_size // encoder.config.patch_size) ** 2
    ratio = mask_max * torch.rand((), generator=rng).item()
    for images in parts:
        images = space.encode(images.to(device))
        with bf16:
            clear.append(encoder(images).flatten(1).cpu())                             # (n, L*D)   eq. (5)
            ids_keep = random_masking(len(images), patches, ratio, rng).to(device)
            masked.append(encoder(images, ids_keep).flatten(1).cpu())                      # (n, L*D)   eq. (4)
    return torch.cat(clear), torch.cat(masked)


def synthetic_clips(args, preset, size, rank, world):
    """Clips of the synthetic world: (pictures in parts, sound (1, S))."""
    render_fn = torch.compile(render, dynamic=False) if args.compile else render
    for number in range(args.clips):
        clip = random_clip(torch.tensor([((args.seed * 100_000 + number) * world + rank) % HELD_OUT]),
                              round(preset["seconds"] * FPS))
        yield (render_fn(clip["identity"].expand(len(part), -1), part, size) for part in clip["motion"][0].split(25)), clip["wave"]


def real_clips(args, folder, size, rank, world):
    """Clips with sound of a prepared folder, its train split: (pictures in parts, sound (1, S))."""
    people, = data.load_sets([folder], "train", sound=True)
    rows = [record for identity in sorted(people) for record in people[identity]]
    for record in rows[rank::world][:args.clips]:
        frames, wave = data.read_clip(record["path"], size)
        yield frames.split(25), wave[None]


def fingerprint(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_dataset(args, preset, encoder, space, size, rank, world, device, bf16):
    """This process's clips, encoded, end to end: motion, masked (n, L*D), features (n, A); for each clip its first frame, its
    length and the number of its set, (clips, 3). Kept in --out, for the next start."""
    inputs = [args.ae, *(os.path.join(name, "manifest.jsonl") for name in args.data if name != "synthetic")]
    key = [*map(fingerprint, inputs), args.clips, args.seed, args.mask_max, preset["seconds"], world, args.whisper, "semo-2",
           *args.data]
    path = os.path.join(args.out, f"clips-{rank}.pt")
    if os.path.exists(path):
        cached = torch.load(path, map_location="cpu", weights_only=True)
        if cached["key"][0] != key[0] and os.path.exists(os.path.join(args.out, "state.pt")):
            raise SystemExit(f"train_gen.py: the run in {args.out} learned the tokens of another encoder; give another --out")
        if cached["key"] == key:
            return [cached[name] for name in ("motion", "masked", "features", "clip_index")]
    encoded, clip_index, number, first = [], [], 0, 0
    for k, name in enumerate(args.data):
        if name == "synthetic":
            speakers = synthetic_clips(args, preset, size, rank, world)
        else:
            speakers = real_clips(args, name, size, rank, world)
        for parts, wave in tqdm(speakers, desc=f"encoding {name}", unit="clip", disable=rank > 0):
            rng = training.step_rng(args.seed, rank, number)
            motion, masked = encode_clip(encoder, space, parts, args.mask_max, rng, device, bf16)
            wave = audio_features.normalise_loudness(wave)
            features = audio_features.extract_features(wave, preset.get("audio", "mel"), args.whisper)[0]              # (F, A)
            frames = min(len(motion), len(features))
            number += 1
            if frames >= preset["generator"].window:
                encoded.append((motion[:frames], masked[:frames], features[:frames]))
                clip_index.append([first, frames, k])
                first += frames
    if not encoded:
        window = preset["generator"].window
        raise SystemExit(f"train_gen.py: no clip of {', '.join(args.data)} is as long as a window, {window} frames")
    motion, masked, features = (torch.cat(part) for part in zip(*encoded, strict=True))
    training.atomic_save(path, key=key, motion=motion, masked=masked, features=features, clip_index=torch.tensor(clip_index))
    return motion, masked, features, torch.tensor(clip_index)


def sample_windows(encoded, config, count, rng, silence_features):
    """Random windows -> new motion (B, K, L*D), past (B, P, L*D), reference (B, L*D), audio (B, P+K+lookahead, A).

    Sets are drawn equally, then their clips. Two kinds: within a clip, and (a quarter, and all of clips too short for a
    past) at its start, where the past is the reference motion, repeated, and the audio before is silence
    (silence_features, (A,)), as sample.py begins. The reference is a frame from anywhere in the clip.
    """
    motion, masked, features, clip_index = encoded
    P, K = config.past, config.window
    sets = clip_index[:, 2].bincount()                                                                    # clips of each
    kinds = sets.nonzero()[:, 0]
    kind = kinds[torch.randint(len(kinds), (count,), generator=rng)]
    chosen = (sets.cumsum(0) - sets)[kind] + (torch.rand(count, generator=rng) * sets[kind]).long()
    first, frames = clip_index[chosen, 0], clip_index[chosen, 1]                                                  # (B,)
    at_start = (torch.rand(count, generator=rng) < 0.25) | (frames < P + K)
    later = P + (torch.rand(count, generator=rng) * (frames - K + 1 - P).clamp(min=1)).long()
    start = torch.where(at_start, 0, later)                                                              # first new frame
    reference = masked[first + (torch.rand(count, generator=rng) * frames).long()]                   # (B, L*D)
    new = motion[(first + start)[:, None] + torch.arange(K)]                                          # (B, K, L*D)
    past = masked[(first + start)[:, None] + torch.where(at_start[:, None], 0, torch.arange(-P, 0))]
    past = torch.where(at_start[:, None, None], reference[:, None], past)                                # (B, P, L*D)
    when = start[:, None] + torch.arange(-P, K + config.lookahead)
    audio = features[first[:, None] + torch.minimum(when.clamp(min=0), frames[:, None] - 1)]
    audio = torch.where(((when < 0) | (when >= frames[:, None]))[..., None], silence_features.to(audio), audio)
    return new, past, reference, audio                                                                # audio (B, P+K+lookahead, A)


def encode_silence(kind, whisper):
    """The speech features of no sound, (A,)."""
    return audio_features.extract_features(torch.zeros(1, SAMPLES_PER_FRAME), kind, whisper)[0, 0]


def preview(path, models, meta, space, silence_features, args, device, seconds=3):
    """A held-out person of the synthetic world says held-out words: a short mp4 with sound, photo = the clip's first frame."""
    size = meta["size"]
    clip = random_clip(torch.tensor([HELD_OUT + args.seed]), seconds * FPS)
    photo = space.encode(render(clip["identity"], clip["motion"][:, 0], size).to(device))
    wave = audio_features.normalise_loudness(clip["wave"])
    with torch.inference_mode():
        m_ref = models["encoder"](photo).flatten(1)
    rng = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(1, *photo.shape[1:], generator=rng).to(device)
    features = audio_features.extract_features(wave, meta["audio"], args.whisper)[0]
    motions = generate_motion(models["generator"], m_ref, iter([features]), rng, silence_features)
    with VideoWriter(path, size, sound=wave[0]) as video:
        for frames in decode_frames(models["decoder"], photo, m_ref, motions, noise):
            for frame in to_uint8(space.decode(frames)).permute(0, 2, 3, 1).cpu().numpy():
                video.write(frame)


def main(argv=None):
    args = parse(argv)
    preset = PRESETS[args.preset]
    rank, world, device = training.init_distributed(args.device)
    training.seed_everything(args.seed)
    kind = preset.get("audio", "mel")
    try:
        models, meta = sample.load_models(args.ae, device)
        space = load_latents(meta["latents"], meta.get("vae", SD), device)
        silence_features = encode_silence(kind, args.whisper)
        for name in args.data:
            if name != "synthetic":
                data.load_sets([name], "train", sound=True)                            # refuse now what cannot be read later
    except (InputError, ValueError, OSError) as error:
        raise SystemExit(f"train_gen.py: {error}") from error
    encoder = models["encoder"].requires_grad_(False)
    config = replace(preset["generator"], num_tokens=encoder.config.num_tokens, token_dim=encoder.config.token_dim,
                     audio_dim=len(silence_features))
    model, ema = (Generator(config).to(device) for _ in range(2))
    teacher = None
    if args.reflow:
        try:
            training.init_from(args.reflow, models, generator=model)
        except ValueError as error:
            raise SystemExit(f"train_gen.py: {error}") from error
        teacher = flow.with_cfg(models["generator"].requires_grad_(False), meta["guidance"], null={"audio": None})
    ema.load_state_dict(model.state_dict())
    ema.eval().requires_grad_(False)
    lr_scale = 0.1 if args.reflow else 1.0                            # a student is nearly there
    optimisers = training.optimisers(model, lr_scale * preset["lr"], lr_scale * preset["muon_lr"])
    files = {name: os.path.join(args.out, name) for name in ("state.pt", "semo.safetensors", "log.jsonl")}
    os.makedirs(args.out, exist_ok=True)
    step = training.resume(files["state.pt"], {"generator": config}, model, ema, optimisers)
    bf16 = autocast(device)
    encoded = encode_dataset(args, preset, encoder, space, meta["size"], rank, world, device, bf16)
    ddp_model = training.ddp_wrap(model, world, device)
    stopper, began, first = training.Stopper(), time.time(), step
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0)
    while step < args.steps:
        training.set_lr(optimisers, step, args.steps, warmup=50)
        rng = training.step_rng(args.seed, rank, step)
        new, past, reference, audio = (x.to(device) for x in sample_windows(encoded, config, args.windows, rng, silence_features))
        noise = torch.randn(new.shape, generator=rng).to(device)
        if teacher:                                                                    # pairs of noise and what it becomes
            t = flow.sample_timesteps(len(new), rng, p_pure_noise=1.0 if args.one_step else 0.5).to(device)
            drop = None                                                                # guidance is in what it becomes
            with torch.no_grad(), bf16:
                new = flow.integrate(teacher, noise, args.teacher_steps, past=past, reference=reference, audio=audio)
        else:
            t = flow.sample_timesteps(len(new), rng, p_pure_noise=0, mean=0.0, std=1.0).to(device)
            drop = (torch.rand(len(new), generator=rng) < 0.1).to(device)             # for guidance
        with bf16:
            loss = flow.flow_loss(ddp_model, new, noise, t, past=past, reference=reference, audio=audio, drop=drop)
        loss.backward()
        training.clip_and_step(model, optimisers, loss.item(), step, files["state.pt"], device)
        training.update_ema(ema, model, step, training.ema_decay(args.steps))
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}")
        stop = training.any_rank(stopper.wanted, device)
        if rank == 0 and (step % args.save_every == 0 or step == args.steps or stop):
            models_out = {"encoder": encoder, "decoder": models["decoder"], "generator": ema}
            sampling_defaults = {"gen_steps": 1, "guidance": 1.0} if teacher else {"gen_steps": 4, "guidance": 1.5}
            meta_out = {**meta, "audio": kind, "whisper": args.whisper, **sampling_defaults}
            save_weights(files["semo.safetensors"], models_out, meta_out)
            preview(os.path.join(args.out, f"step{step:06d}.mp4"), models_out, meta_out, space, silence_features, args, device)
            training.log(files["log.jsonl"], step=step, loss=loss.item(),
                         windows_per_second=(step - first) * world * args.windows / (time.time() - began))
            training.save_checkpoint(files["state.pt"], step, {"generator": config}, model, ema, optimisers)
        if stop:
            break
    bar.close()
    return 130 if step < args.steps else 0


if __name__ == "__main__":
    sys.exit(main())
