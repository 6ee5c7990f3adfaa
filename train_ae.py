"""Stage 1: train the motion encoder and the decoder together (paper section 3.1, eqs. 1-3 and 8).

    python train_ae.py --preset tiny                                   synthetic world, a laptop, no data
    python train_ae.py --preset tiny --frames 8 --init runs/ae/semo.safetensors --out runs/video     image-to-video
    python train_ae.py --preset small --data DIR [DIR ...]             real clips, made by data.py prepare
    torchrun --nproc_per_node=8 train_ae.py --preset paper --data DIR  the same on 8 GPUs
    python train_ae.py --preset tiny --reflow runs/gen/semo.safetensors     straighter paths, fewer steps to paint a frame

Run the same command again to resume: --out holds state.pt (to go on), semo.safetensors (to use), log.jsonl and pictures
of reference | target | output. Ctrl-C and SIGTERM save first.
"""
import argparse
import math
import os
import sys
import time
from collections import deque
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

import data
import flow
import sample
import training
from decoder import Decoder, DecoderConfig
from encoder import EncoderConfig, MotionEncoder, random_masking
from media import latents
from media.device import autocast
from media.files import InputError
from media.weights import save_weights
from world.people import HELD_OUT, random_clip, random_pairs
from world.render import MOTION, render

# persons: people a step and process; targets: pictures of each; near: share of people who hold still (pairs,
# data.Clips); mask_max: masks drop a share of U(0, this) (paper: 0.9, too much for minutes of training); label_weight: weight
# of the known motion in the loss, at the start of a run (AutoEncoder.forward); latents: the space (media/latents.py)
PRESETS = {
    "nano": dict(encoder=EncoderConfig(32, patch_size=8, width=32, depth=1, heads=1, token_dim=8),
                 decoder=DecoderConfig(32, patch_size=8, width=32, depth=1, heads=1, token_dim=8, tokens_per_motion=2),
                 steps=20, persons=2, targets=2, near=0.5, mask_max=0.9, label_weight=0.3, lr=3e-3, muon_lr=0.02),
    "tiny": dict(encoder=EncoderConfig(64, patch_size=8, width=128, depth=4, heads=2),
                 decoder=DecoderConfig(64, patch_size=8, width=192, depth=4, heads=3),
                 steps=4700, persons=16, targets=4, near=0.4, mask_max=0.2, label_weight=0.3, lr=1e-3, muon_lr=0.02),
    "small": dict(encoder=EncoderConfig(256, width=384, depth=8, heads=6, token_dim=128),
                  decoder=DecoderConfig(256, width=512, depth=12, heads=8, token_dim=128),
                  steps=200000, persons=16, targets=4, near=0.5, mask_max=0.9, label_weight=0.0, lr=5e-4, muon_lr=0.01),
    "paper": dict(encoder=EncoderConfig(32, 4, patch_size=2, width=512, depth=8, heads=8, token_dim=512),
                  decoder=DecoderConfig(32, 4, patch_size=2, width=768, depth=12, heads=12, token_dim=512, predict="v"),
                  latents="sd", steps=400000, persons=8, targets=4, near=0.5, mask_max=0.9, label_weight=0.0, lr=1e-4, muon_lr=0.005),
}


def normalise_factors(motion_labels):
    """Motion factors (n, M), each at about unit variance."""
    low, high = torch.tensor(list(MOTION.values()), device=motion_labels.device).unbind(1)
    return (2 * (motion_labels - low) / (high - low) - 1) * 3**0.5


class AutoEncoder(nn.Module):
    """Both networks and their loss, as one module: what DistributedDataParallel and torch.compile want."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.label_head = nn.Linear(encoder.config.num_tokens * encoder.config.token_dim, len(MOTION))

    def forward(self, reference, target, noise, t, ids_keep, motion_labels, label_weight, endpoint=None):
        """reference (R, C, H, W); target, noise (R*T, C, H, W); t (R*T,); ids_keep (R + R*T, n) patches not masked -> loss.

        Each sample's error is divided by that of copying the reference (ours): a moving mouth then counts as much as a
        turning head, which changes ten times the pixels. Where the true motion is known, motion_labels (R + R*T, M), its error as
        a linear reading of the token enters with weight `label_weight` (ours; the paper has no labels): a start for small models
        that are trained for minutes. motion_labels (0, M): unknown. endpoint: where the paths end, if not at the target (reflow).
        """
        motion = self.encoder(torch.cat([reference, target]), ids_keep)                    # (R + R*T, L, D)   eq. (1)
        m_r, m_t = motion[: len(reference)], motion[len(reference):]
        cache = self.decoder.encode_reference(reference, m_r)
        copied = reference.repeat_interleave(len(target) // len(reference), 0)
        weight = 0.1 / ((target - copied).square().mean((1, 2, 3)) + 0.002)            # (R*T,)
        endpoint = target if endpoint is None else endpoint
        loss = flow.flow_loss(self.decoder, endpoint, noise, t, weight=weight, m_t=m_t, cache=cache)       # eqs. (3), (8)
        labels = self.label_head(motion.flatten(1))                                    # (R + R*T, M)
        error = labels[: len(motion_labels)] - normalise_factors(motion_labels)
        return loss + label_weight * error.square().sum() / max(1, labels.numel())


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the networks and of the run")
    p.add_argument("--out", help="folder of this run; an unfinished one is resumed (default: runs/ae, or runs/reflow_ae)")
    p.add_argument("--init", help="start from these weights, e.g. the image model for --frames 8")
    p.add_argument("--reflow", metavar="TEACHER", help="learn the straight line from noise to what these weights make of it; its "
                   "encoder, and its generator if it has one, are kept")
    p.add_argument("--one-step", action="store_true", help="with --reflow: learn the one step from pure noise alone (distillation)")
    p.add_argument("--teacher-steps", type=int, default=20, help="with --reflow: steps of the teacher (default: %(default)s)")
    p.add_argument("--frames", type=int, default=1, help="above 1: the image-to-video stage, clips of so many frames")
    p.add_argument("--data", nargs="+", metavar="DIR", default=["synthetic"], help="folders made by data.py prepare, drawn equally; "
                   "the word synthetic stands for the synthetic world (default)")
    p.add_argument("--workers", type=int, default=2, help="processes that read clips ahead (default: %(default)s)")
    p.add_argument("--vae", default=latents.SD, help="preset paper: the autoencoder, hub id or folder (default: %(default)s)")
    p.add_argument("--steps", type=int, help="length of the run (default: the preset's)")
    p.add_argument("--persons", type=int, help="people a step and process (default: the preset's)")
    p.add_argument("--label-weight", type=float, help="weight of the true motion in the loss, fading out over the first 80%% of the "
                   "run; 0: no label ever (default: the preset's; 0 with --init)")
    p.add_argument("--mask-max", type=float, help="masks drop a share of the patches, U(0, this) (paper: 0.9; default: the preset's)")
    p.add_argument("--accumulate", type=int, default=1, help="batches a step, for large batches in little memory")
    p.add_argument("--checkpoint-activations", action="store_true", help="keep less for the backward pass and compute it again")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="fuse with torch.compile: 1-2 minutes to start, then faster (needs a C++ compiler on CPUs)")
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints and pictures")
    args = p.parse_args(argv)
    preset = PRESETS[args.preset]
    if args.init or args.reflow:
        preset = {**preset, "label_weight": 0.0, **({"mask_max": 0.0} if args.reflow else {})}
    args.out = args.out or ("runs/reflow_ae" if args.reflow else "runs/ae")
    for name in ("steps", "persons", "mask_max", "label_weight"):
        setattr(args, name, preset[name] if getattr(args, name) is None else getattr(args, name))
    if args.init and args.reflow or args.one_step and not args.reflow:
        p.error("--reflow begins from its teacher, without --init; --one-step goes with --reflow")
    counts = (args.steps, args.persons, args.frames, args.accumulate, args.teacher_steps, args.save_every, args.seed + 1,
              args.workers + 1)
    if min(counts) < 1 or args.label_weight < 0 or not 0 <= args.mask_max < 1:
        p.error("--steps, --persons, --frames, --accumulate, --teacher-steps and --save-every must be positive, "
                "--seed, --label-weight and --workers not negative, --mask-max in [0, 1)")
    return args


def synthetic_video_batch(seeds, frames, size, render_fn):
    """The video stage's food: a frame of each of R clips and `frames` later ones in a row -> (R, 3, H, W), (R*F, 3, H, W),
    and as random_pairs() their motion."""
    clips = random_clip(seeds, 2 * frames)
    motion = torch.cat([clips["motion"][:, :1], clips["motion"][:, frames:]], dim=1)     # (R, 1+F, M)
    people = clips["identity"].repeat_interleave(frames + 1, 0)
    images = render_fn(people, motion.flatten(0, 1), size).unflatten(0, (-1, frames + 1))
    return images[:, 0], images[:, 1:].flatten(0, 1), torch.cat([motion[:, 0], motion[:, 1:].flatten(0, 1)])


def image_px(preset):
    """Pixels of a picture's side: what the models see, times the factor of their latents."""
    return preset["encoder"].image_size * latents.SPACES[preset.get("latents", "pixel")].factor


def synthetic_batch(args, preset, number, render_fn, held_out=False):
    """The people of one forward pass, a function of its number alone: no two processes or steps get the same."""
    size = image_px(preset)
    seeds = (args.seed * 1_000_003 + number) * args.persons + torch.arange(args.persons)
    seeds = seeds + HELD_OUT if held_out else seeds % HELD_OUT
    if args.frames > 1:
        return synthetic_video_batch(seeds, args.frames, size, render_fn)
    return random_pairs(seeds, preset["targets"], preset["near"], size, render_fn)


def real_clips(args, preset, split):
    """The folders of --data, or None where there are none. Raises InputError."""
    folders = [name for name in args.data if name != "synthetic"]
    targets = args.frames if args.frames > 1 else preset["targets"]
    if not folders:
        return None
    return data.Clips(folders, args.persons, targets, preset["near"], image_px(preset), args.seed, split, args.frames > 1)


def batches(args, preset, real, numbers, render_fn):
    """The batches of `numbers` in their order, each from the synthetic world or from the folders, by their share of --data:
    pictures as random_pairs() and their motion, (0, M) where nobody knows it."""
    share = 1 - ("synthetic" in args.data) / len(args.data)

    def is_real(number):
        return number * 0.6180339887 % 1 < share                                       # evenly spread

    loaded = iter(data.loader(real, (number for number in numbers if is_real(number)), args.workers)) if real else None
    for number in numbers:
        yield (*next(loaded), torch.zeros(0, len(MOTION))) if is_real(number) else synthetic_batch(args, preset, number, render_fn)


def held_out_batch(args, preset):
    """What the pictures show: held-out people, of the folders' test split where there is one."""
    if args.data == ["synthetic"]:
        return synthetic_batch(args, preset, 0, render, held_out=True)
    try:
        return real_clips(args, preset, "test")[0]
    except InputError:
        return real_clips(args, preset, "train")[0]


def sample_noise_t_mask(args, encoder, shape, number, rank, progress):
    """Noise and times of the R*T targets of one pass and masks for all, drawn on the CPU from (seed, rank, number).

    A curriculum (ours): a run starts at pure noise and without masks, where the token is all there is to learn from;
    between 40% and 80% of its steps, clearer targets and the paper's masks come in. Reflow has neither: half of its
    targets are pure noise, or all.
    """
    rng = training.step_rng(args.seed, rank, number)
    ramp = min(1.0, max(0.0, (progress - 0.4) / 0.4))
    noise = torch.randn(shape, generator=rng)
    p_pure_noise = (1.0 if args.one_step else 0.5) if args.reflow else 1 - 0.1 * ramp
    t = flow.sample_timesteps(shape[0] // args.frames, rng, p_pure_noise=p_pure_noise)
    t = t.repeat_interleave(args.frames)                                               # one time a clip
    patches = (encoder.image_size // encoder.patch_size) ** 2
    ratio = ramp * args.mask_max * torch.rand((), generator=rng).item()               # one for all: a rectangle
    return noise, t, random_masking(args.persons + shape[0], patches, ratio, rng)


@torch.no_grad()
def reflow_pairs(teacher, reference, target, noise, steps):
    """Reflow's pairs (Liu et al. 2022, algorithm 1): what the teacher makes of the noise, for the targets' motion."""
    encoder, decoder = teacher["encoder"], teacher["decoder"]
    m_r = encoder(reference)
    return flow.integrate(decoder, noise, steps, m_t=encoder(target), cache=decoder.encode_reference(reference, m_r))


@torch.no_grad()
def save_samples(path, model, space, args, preset, device):
    """Held-out people: reference | target | output after 1 and 4 steps -> PSNR in dB of 1 step and of copying."""
    model.eval()
    reference, target = (space.encode(x.to(device)) for x in held_out_batch(args, preset)[:2])
    m_r, m_t = model.encoder(reference), model.encoder(target)
    cache = model.decoder.encode_reference(reference, m_r)
    noise = torch.randn(target.shape, generator=training.step_rng(args.seed, 0, 0)).to(device)
    one, four = (flow.integrate(model.decoder, noise, n, m_t=m_t, cache=cache) for n in (1, 4))
    copied = reference.repeat_interleave(len(target) // len(reference), 0)
    copied, target, one, four = (space.decode(x) for x in (copied, target, one, four))
    show = slice(None, None, max(1, len(target) // 12))
    training.save_grid(path, [x[show] for x in (copied, target, one, four)])
    model.train()
    return [-10 * math.log10(((x.clamp(-1, 1) - target) / 2).square().mean().item() + 1e-12) for x in (one, copied)]


def train_step(args, preset, ddp_model, inputs, step, rank, world, space, device, bf16, teacher=None):
    """Gradients of one step's batches -> their mean loss. Only the last backward pass waits for the other processes."""
    total = 0.0
    for part in range(args.accumulate):
        number = (step * args.accumulate + part) * world + rank
        *pictures, motion_labels = (x.to(device, non_blocking=True) for x in next(inputs))
        reference, target = map(space.encode, pictures)
        drawn = sample_noise_t_mask(args, preset["encoder"], target.shape, number, rank, step / args.steps)
        noise, t, ids_keep = (x.to(device) for x in drawn)
        if world > 1:
            ddp_model.require_backward_grad_sync = part == args.accumulate - 1
        with bf16:
            endpoint = reflow_pairs(teacher, reference, target, noise, args.teacher_steps) if teacher else None
            label_weight = args.label_weight * max(0.0, 1 - step / args.steps / 0.8)
            loss = ddp_model(reference, target, noise, t, ids_keep, motion_labels, label_weight, endpoint)
        (loss / args.accumulate).backward()
        total += loss.item() / args.accumulate
    return total


def main(argv=None):
    args = parse(argv)
    preset = PRESETS[args.preset]
    rank, world, device = training.init_distributed(args.device)
    training.seed_everything(args.seed)
    configs = {"encoder": preset["encoder"], "decoder": replace(preset["decoder"], frames=args.frames)}
    model, ema = (AutoEncoder(MotionEncoder(configs["encoder"]), Decoder(configs["decoder"])).to(device) for _ in range(2))
    render_fn = torch.compile(render, dynamic=False) if args.compile else render
    kind = preset.get("latents", "pixel")
    try:
        space = latents.load_latents(kind, args.vae, device)
        real = real_clips(args, preset, "train")
        teacher, meta = sample.load_models(args.reflow, device) if args.reflow else ({}, {})
        if args.init or args.reflow:
            path = args.init or args.reflow
            training.init_from(path, sample.load_models(path)[0], encoder=model.encoder, decoder=model.decoder)
    except (InputError, ValueError) as error:
        raise SystemExit(f"train_ae.py: {error}") from error
    ema.load_state_dict(model.state_dict())
    ema.eval().requires_grad_(False)
    lr_scale = 0.1 if args.reflow else 1.0                            # a student is nearly there
    optimisers = training.optimisers(model, lr_scale * preset["lr"], lr_scale * preset["muon_lr"])
    files = {name: os.path.join(args.out, name) for name in ("state.pt", "semo.safetensors", "log.jsonl")}
    step = training.resume(files["state.pt"], configs, model, ema, optimisers)

    if args.checkpoint_activations:
        training.checkpoint_activations(model)
    if args.compile:
        model.decoder.compile(dynamic=False)                        # in place; the encoder's shapes change with the mask
    model.train()
    if teacher:                                                     # tokens must stay what the generator writes
        model.encoder.requires_grad_(False).eval()
    ddp_model = training.ddp_wrap(model, world, device)
    bf16 = autocast(device)
    stopper, began, first = training.Stopper(), time.time(), step
    recent = deque(maxlen=100)                                      # losses, to print their mean
    numbers = [(later * args.accumulate + part) * world + rank for later in range(step, args.steps) for part in range(args.accumulate)]
    inputs = batches(args, preset, real, numbers, render_fn)
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0)
    while step < args.steps:
        training.set_lr(optimisers, step, args.steps, warmup=50)
        loss = train_step(args, preset, ddp_model, inputs, step, rank, world, space, device, bf16, teacher)
        training.clip_and_step(model, optimisers, loss, step, files["state.pt"], device)
        training.update_ema(ema, model, step, training.ema_decay(args.steps))
        step += 1
        bar.update()
        recent.append(loss)
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}")
        stop = training.any_rank(stopper.wanted, device)
        if rank == 0 and (step % args.save_every == 0 or step == args.steps or stop):
            psnr, copy = save_samples(os.path.join(args.out, f"step{step:06d}.png"), ema, space, args, preset, device)
            meta |= {"latents": kind, "vae": args.vae, "size": image_px(preset), "steps": 1, "trained_steps": step}
            save_weights(files["semo.safetensors"], {**teacher, "encoder": ema.encoder, "decoder": ema.decoder}, meta)
            pictures = args.accumulate * world * args.persons * (args.frames if args.frames > 1 else preset["targets"])
            training.log(files["log.jsonl"], step=step, loss=sum(recent) / len(recent), psnr=psnr, psnr_copy=copy,
                         pictures_per_second=pictures * (step - first) / (time.time() - began))
            training.save_checkpoint(files["state.pt"], step, configs, model, ema, optimisers)
        if stop:
            break
    bar.close()
    return 130 if step < args.steps else 0


if __name__ == "__main__":
    sys.exit(main())
