"""Stage 1: train the motion encoder and the decoder together (paper section 3.1, eqs. 1-3 and 8).

    python train_ae.py --preset tiny                                   synthetic world, a laptop, no data
    python train_ae.py --preset small --data DIR [DIR ...]             real clips, made by data.py prepare
    torchrun --nproc_per_node=8 train_ae.py --preset paper --data DIR  the paper's own method, on 8 GPUs
    python train_ae.py --preset tiny --frames 8 --init runs/ae/semo.safetensors --out runs/video
                                                                       image-to-video
    python train_ae.py --preset tiny --mesh MESH --data DIR --init runs/ae/semo.safetensors --blend 0.5 \
        --lr 1.5e-4 --muon-lr 3e-3 --out runs/finish                   a finish by a face mesh (media/mesh.py)
    python train_ae.py --preset tiny --reflow runs/gen/semo.safetensors
                                                                       straighter paths, fewer sampling steps

Run the same command again to resume: --out holds state.pt (training state), semo.safetensors (weights to
use), log.jsonl and sample pictures: reference | target | 1 step | 4 steps. Ctrl-C and SIGTERM save first.
"""
import copy
import math
import os
from collections import deque
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import flow
import training
from decoder import Decoder, DecoderConfig
from encoder import EncoderConfig, MotionEncoder, random_masking
from media import latents, prepared
from media.device import autocast
from media.files import command
from media.image import save_grid
from media.landmarks import FACTORS, SCALE, WEIGHT
from media.mesh import FEATURES, FaceMesh, random_axes, view
from media.weights import save_weights
from sample import load_models
from world.people import HELD_OUT, consecutive_frames, random_pairs
from world.render import MOTION, normalise_factors, region_ellipses, render

PAPER = dict(full_attention=True, predict="v", tokens_per_motion=1, motion_delta=False, ref_context=False)

# Sizes of the networks and of a run. persons: of a step and process; targets: pictures of each; near: share
# of persons whose pictures are near in pose (world.people.random_pairs, data.Clips); mask_max: masks hide a
# share of the patches, U(0, this); label_weight: weight of known motion in the loss (0: none); loss:
# see AutoEncoder; curriculum: see schedule; muon_lr None: AdamW for all weights.
PRESETS = {
    "nano": dict(
        encoder=EncoderConfig(32, patch_size=8, width=32, depth=1, heads=1, token_dim=8),
        decoder=DecoderConfig(32, patch_size=8, width=32, depth=1, heads=1, token_dim=8, tokens_per_motion=2,
                              warp_grid=4, overlap=True),
        loss="region", curriculum=True, steps=20, persons=2, targets=2, near=0.5, mask_max=0.9,
        label_weight=0.3, lr=3e-3, muon_lr=0.02),
    "tiny": dict(
        encoder=EncoderConfig(96, patch_size=12, width=128, depth=4, heads=2, view_shift=2),
        decoder=DecoderConfig(96, patch_size=12, width=192, depth=4, heads=3, warp_grid=6, overlap=True),
        loss="region", curriculum=True, steps=4700, persons=16, targets=4, near=0.4, mask_max=0.2,
        label_weight=3.0, lr=1e-3, muon_lr=0.02),
    "small": dict(
        encoder=EncoderConfig(256, width=384, depth=8, heads=6, token_dim=128),
        decoder=DecoderConfig(256, width=512, depth=12, heads=8, token_dim=128, warp_grid=8, overlap=True),
        loss="region", curriculum=True, steps=200000, persons=16, targets=4, near=0.5, mask_max=0.9,
        label_weight=0.0, lr=5e-4, muon_lr=0.01),
    "large": dict(
        encoder=EncoderConfig(32, 4, patch_size=2, width=512, depth=8, heads=8, token_dim=512),
        decoder=DecoderConfig(32, 4, patch_size=2, width=768, depth=12, heads=12, token_dim=512, predict="v"),
        latents="sd", loss="weighted", curriculum=True, steps=400000, persons=8, targets=4, near=0.5,
        mask_max=0.9, label_weight=0.0, lr=1e-4, muon_lr=0.005),
    "paper": dict(
        encoder=EncoderConfig(32, 4, patch_size=2, width=512, depth=8, heads=8, token_dim=512, token_init=0,
                              running_norm=False),
        decoder=DecoderConfig(32, 4, patch_size=2, width=768, depth=12, heads=12, token_dim=512, **PAPER),
        latents="sd", loss="velocity", curriculum=False, steps=400000, persons=8, targets=4, near=0.0,
        mask_max=0.9, label_weight=0.0, lr=1e-4, muon_lr=None),
}


def schedule(args, progress: float) -> dict:
    """What changes during a run, as a function of progress in [0, 1]; printed at the start.

    The paper has no schedule: masks U(0, 0.9) from the first step, t uniform. Ours (curriculum) starts at
    pure noise without masks, where the token is all there is to learn from; masks and less noisy targets come
    in later. The weight of known motion falls to a tenth over the last 30%, that of the warped reference to
    zero over the first third; motion read from the predicted picture (cycle, mesh) enters from 30% to 40%,
    structure (SSIM, gradients) in the last 45%. A run from trained weights (--init) has the second half
    alone.
    """
    if args.init:
        progress = 0.5 + progress / 2
    ramp = min(1.0, max(0.0, (progress - 0.4) / 0.4)) if args.curriculum else 1.0
    p_pure_noise = 1 - 0.1 * ramp if args.curriculum else 0.0
    if args.reflow:
        p_pure_noise = 1.0 if args.one_step else 0.5
    return {"mask_max": ramp * args.mask_max,
            "p_pure_noise": p_pure_noise,
            "label": args.label_weight * min(1.0, 0.1 + (1 - progress) / 0.3),
            "cycle": 0.4 * args.label_weight * min(1.0, max(0.0, (progress - 0.3) / 0.1)),
            "mesh": min(1.0, max(0.0, (progress - 0.3) / 0.1)),
            "warped": 0.5 * max(0.0, 1 - 3 * progress),
            "structure": 0.5 * min(1.0, max(0.0, (progress - 0.55) / 0.1))}


# ---- loss --------------------------------------------------------------------------------------------------

def charbonnier(x: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 distance of pictures (B, C, H, W) at each pixel -> (B, 1, H, W)."""
    return ((x - target).square().mean(1, keepdim=True) + 1e-4).sqrt()


def dssim(x: Tensor, y: Tensor, window: int = 7, stride: int = 3) -> Tensor:
    """(1 - SSIM) / 2 of the luminance of pictures (B, C, H, W) in [-1, 1] (Wang et al. 2004).
    -> (B, 1, (H-7)//3 + 1, (W-7)//3 + 1), of windows `stride` pixels apart."""
    x, y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    moments = torch.cat([x, y, x * x, y * y, x * y], 1)
    mx, my, xx, yy, xy = F.avg_pool2d(moments, window, stride).chunk(5, 1)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return (1 - (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
            / ((mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2))) / 2


def weighted_mean(error: Tensor, weight: Tensor) -> Tensor:
    """Mean of error (B, 1, H, W) under weight (B, 1, H, W) -> (B,)."""
    return (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp(min=1e-6)


def motion_error(x: Tensor, y: Tensor, weight) -> Tensor:
    """Error of motion x (B, M) against y, each factor by its weight, squared up to 3 units -> (B, M).
    An absolute error would leave rare large motion, such as blinks, unlearned."""
    return 3 * weight * F.smooth_l1_loss(x, y, reduction="none", beta=3.0)


def field_roughness(field: Tensor) -> Tensor:
    """Mean squared difference in pixels between neighbouring displacements; field (B, H, W, 2) in halves."""
    pixels = field * (field.shape[1] / 2)
    return pixels.diff(dim=1).square().mean() + pixels.diff(dim=2).square().mean()


class RunningRidge(nn.Module):
    """Linear map from differences of tokens to those of known motion, by running ridge regression (ours).
    A head that is trained by gradient descent is wrong at first and lags behind the encoder; this one is the
    best linear map of about the last hundred batches, of all processes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("xx", torch.zeros(inputs, inputs))
        self.register_buffer("xy", torch.zeros(inputs, outputs))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, x, y):
        """Learn from differences of tokens x (B, I) and of motion y (B, O); B may be 0 in some processes."""
        sums, count = torch.cat([x.T @ x, x.T @ y], 1), torch.tensor(float(len(x)), device=x.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(count)
        if count:
            self.count += 1
            rate = torch.clamp(1 / self.count, min=0.01)                 # a plain average, then a moving one
            xx, xy = (sums / count).split([self.xx.shape[1], self.xy.shape[1]], 1)
            self.xx.lerp_(xx, rate)
            self.xy.lerp_(xy, rate)

    def forward(self, x):
        """Read the motion (B, O) from x (B, I)."""
        ridge = 0.01 * self.xx.diagonal().mean() + 1e-6
        return x @ torch.linalg.solve(self.xx + ridge * torch.eye(len(self.xx), device=x.device), self.xy)


class AutoEncoder(nn.Module):
    """Both networks and their loss, as one module: what DistributedDataParallel and torch.compile want.

    Three losses. "velocity": eq. (8) as it is (the paper). "weighted": each sample's eq. (8) divided by the
    error of copying the reference, so that a mouth counts as much as a turning head, which changes ten times
    the pixels (ours). "region" (ours, pixels): `region_loss` on the predicted picture. labels: with known
    motion in the loss, which is read from the token and, by averaged weights, from decoded pictures
    (cycle consistency): what the token holds must also be seen.
    """

    WHOLE, MOUTH_EYES, UPPER = 1.5, 3.0, 1.5           # weights of the parts of region_loss

    def __init__(self, encoder: MotionEncoder, decoder: Decoder, loss: str = "region", labels: bool = True):
        super().__init__()
        self.encoder, self.decoder, self.loss = encoder, decoder, loss
        motion = encoder.config.num_tokens * encoder.config.token_dim
        known = {"synthetic": len(MOTION), "real": len(FACTORS)} if labels else {}
        self.label_heads = nn.ModuleDict({kind: RunningRidge(motion, count) for kind, count in known.items()})

    def forward(self, batch: data.Batch, noise, t, ids_keep, weights: dict, endpoint=None, average=None,
                mesh=None, axes=None):
        """-> scalar loss of a batch of R references and R*T targets.
        noise (R*T, C, H, W), t (R*T,), ids_keep (R + R*T, n): visible patches; weights: schedule(); endpoint
        (R*T, C, H, W): where the paths end if not at the target (reflow); average: the AutoEncoder of
        averaged weights, which reads known motion from the predicted pictures (None: not read); mesh: a
        FaceMesh, which reads those of real faces instead, through views axes (R, 2, 3)."""
        reference, target = batch.reference, batch.target
        motion = self.encoder(batch.encoder_views, ids_keep)                           # (R+R*T, L, D) eq. (1)
        m_r, m_t = motion[: len(reference)], motion[len(reference):]
        cache = self.decoder.encode_reference(reference, m_r)
        copies = reference.repeat_interleave(len(target) // len(reference), 0)         # (R*T, C, H, W)
        if self.loss == "region" and endpoint is None:
            z_t = flow.interpolate(target, noise, t)
            picture = self.decoder(z_t, t, m_t, cache, as_picture=True)
            loss = self.region_loss(picture.x, target, copies, batch.regions, weights["structure"])
            if weights["warped"]:
                warped = self.region_loss(picture.moved, target, copies, batch.regions, 0.0)
                loss = loss + weights["warped"] * warped
            loss = loss + 0.2 * field_roughness(picture.field)
            seen = mesh is not None and batch.kind == "real"
            weight = weights["mesh" if seen else "cycle"]
            if weight and (seen or average and batch.factors is not None):
                count, pure = len(target) // len(reference), noise.new_ones(len(m_r))
                borrowed = m_r + (m_t[::count] - m_r).roll(1, 0)                       # another's motion
                crossed = self.decoder(noise[::count], pure, borrowed, cache, as_picture=True).x
                read = (self.mesh_loss(picture.x, crossed, batch, mesh, axes) if seen
                        else self.cycle_loss(picture.x, crossed, batch, average))
                loss = loss + weight * read
        else:
            weight = None
            if self.loss != "velocity":
                weight = 0.1 / ((target - copies).square().mean((1, 2, 3)) + 0.0005)   # (R*T,)
            z = target if endpoint is None else endpoint
            loss = flow.flow_loss(self.decoder, z, noise, t, weight, m_t=m_t, cache=cache)     # eqs. (3), (8)
        if weights["label"]:
            loss = loss + weights["label"] * self.label_loss(m_r, m_t, batch)
        return loss

    def label_loss(self, m_r, m_t, batch: data.Batch):
        """Error of known motion read from differences of tokens, mean of R*T rows; those unknown (nan) add 0.
        m_r (R, L, D), m_t (R*T, L, D): tokens of references and targets. In training every process updates
        all heads, as it sums with the others'."""
        delta = (m_t - m_r.repeat_interleave(len(m_t) // len(m_r), 0)).flatten(1)      # (R*T, L*D)
        loss = 0.0
        for kind, head in self.label_heads.items():
            x, y = delta[:0], delta.new_zeros(0, head.xy.shape[1])
            if kind == batch.kind and batch.factors is not None:
                known = batch.factors.isfinite().all(1)
                x, y = delta[known], batch.factors[known].clamp(-8, 8)
            with torch.autocast(delta.device.type, enabled=False):
                if self.training:
                    head.update(x.detach(), y)
                if len(y):
                    weight = y.new_tensor(WEIGHT) if kind == "real" else 1.0
                    loss = motion_error(head(x), y, weight).mean(1).sum() / len(delta)
        return loss

    def cycle_loss(self, picture, crossed, batch: data.Batch, average):
        """Error of known motion that the averaged encoder reads from decoded pictures (ours): of the targets
        (R*T, C, H, W), and of every person with the motion of another (R, C, H, W), for which there is no
        true picture."""
        pictures = torch.cat([batch.reference, picture, crossed])
        counts = len(crossed), len(picture), len(crossed)
        s_r, s_t, s_x = average.encoder.encode_view(pictures).split(counts)
        lent = replace(batch, factors=batch.factors[:: len(picture) // len(crossed)].roll(1, 0))
        return average.label_loss(s_r, s_t, batch) + 2 / 3 * average.label_loss(s_r, s_x, lent)

    def mesh_loss(self, picture, crossed, batch: data.Batch, mesh, axes):
        """Error of what a face mesh reads from decoded pictures of real faces (ours); arguments as above.

        An encoder reads in a picture what its decoder has learned to write for it; networks that somebody
        else trained see half of that motion. Two targets of each person are compared with the true pictures
        by features, points and factors; a person with another's motion should differ from the reference as
        the other does, which needs no true picture. No label enters.
        """
        def error(x, y):                                                               # (B, 10) -> scalar
            difference = ((x - y) / x.new_tensor(SCALE)).clamp(-8, 8)
            return motion_error(difference, torch.zeros_like(x), x.new_tensor(WEIGHT)).mean()

        picture, target, regions = (x.unflatten(0, (len(crossed), -1))[:, :2].flatten(0, 1)
                                    for x in (picture, batch.target, batch.regions))
        with torch.autocast(picture.device.type, enabled=False):
            with torch.no_grad():
                own, true = mesh(batch.reference, axes), mesh(target, axes)
            predicted, other = mesh(picture, axes, eyes=true.points), mesh(crossed, axes)
            changed = own.factors + (true.factors[::2] - own.factors).roll(1, 0)
            loss = 2 * error(predicted.factors, true.factors) + error(other.factors, changed)
            face = (true.points[:, 10] - true.points[:, 152]).norm(dim=1)[:, None, None]
            # Distance of the points in percent of the face's height, those of lips and eyes counted again.
            apart = 100 * ((predicted.points - true.points)[..., :2] / face).abs().mean(2)
            loss = loss + 0.3 * apart.mean() + 0.2 * apart[:, FEATURES].mean()
            where = view(0.3 * regions[:, 2:] + regions[:, :1] + 0.5 * regions[:, 1:2], axes, 96)
            for x, y, z in zip(predicted.features, true.features, own.features, strict=True):
                weight = F.interpolate(where, x.shape[-2:], mode="area")
                wrong, copied = (weighted_mean((features - y).abs().mean(1, keepdim=True), weight)
                                 for features in (x, z.repeat_interleave(2, 0)))
                loss = loss + 1.25 * (wrong / (copied + copied.mean() / 2).clamp(min=1e-3)).mean()
        return loss

    def region_loss(self, x, target, copies, regions, structure: float):
        """Error of the picture x relative to copying the reference -> scalar.

        Of the whole picture, of mouth and eyes, and of eyes and brows, which move less than the mouth. x,
        target, copies (B, C, H, W); regions (B, 3, H, W) soft masks, see data.draw_regions. The area of mouth
        and eyes is a twelfth of the picture; divided by it, as in FLOAT (arXiv 2412.01064, A.2), their error
        counts. Outside the face the weight is 0.2.
        """
        features, upper, face = regions.split(1, 1)                                    # (B, 1, H, W) each
        error, copy_error = charbonnier(x, target), charbonnier(copies, target)
        loss = 0.0
        for part, weight, least in ((0.2 + 0.8 * face, self.WHOLE, 0.02),
                                    (features, self.MOUTH_EYES, 0.03),
                                    (upper, self.UPPER, 0.03)):
            loss = loss + weight * weighted_mean(error, part) / (weighted_mean(copy_error, part) + least)
        if structure:
            inside = 0.3 * face + features
            windows = F.avg_pool2d(inside, 7, 3)                                       # as dssim
            error, copy_error = (weighted_mean(dssim(y, target), windows) for y in (x, copies))
            loss = loss + structure * (error / (copy_error + 0.05))
            for scale in (1, 2, 4):
                difference, weight = F.avg_pool2d(x - target, scale), F.avg_pool2d(inside, scale)
                for axis in (2, 3):
                    edge = difference.diff(dim=axis).abs().mean(1, keepdim=True)
                    part = weight.narrow(axis, 1, edge.shape[axis])
                    loss = loss + 6 * structure * weighted_mean(edge, part)
        return loss.mean()


# ---- data --------------------------------------------------------------------------------------------------

def image_px(preset: dict) -> int:
    """Side of a picture in pixels: what the models see, times the factor of their latents."""
    return preset["encoder"].image_size * latents.SPACES[preset.get("latents", "pixel")].factor


def synthetic_batch(args, preset, number: int, render_fn, device="cpu", held_out=False) -> data.Batch:
    """Draw the persons of one forward pass, a function of its number alone: no two passes get the same.
    In every second batch of a curriculum the encoder sees another person make the same motion (ours): the
    truth, which only a synthetic world has, that a token must not tell who moves."""
    seeds = (args.seed * 1_000_003 + number) * args.persons + torch.arange(args.persons, device=device)
    seeds = seeds + HELD_OUT if held_out else seeds % HELD_OUT
    size = image_px(preset)
    if args.frames > 1:
        pictures, motion, views = consecutive_frames(seeds, args.frames, size, render_fn)
    else:
        swap = args.curriculum and number % 2 == 1 and not held_out
        targets, near = preset["targets"], preset["near"]
        pictures, motion, views = random_pairs(seeds, targets, near, size, render_fn, swap)
    factors = normalise_factors(motion)                                                # (R, 1+T, M)
    delta = (factors[:, 1:] - factors[:, :1]).flatten(0, 1)                            # (R*T, M)
    masks = data.draw_regions(region_ellipses(motion).flatten(0, 1), size).unflatten(0, motion.shape[:2])
    return data.make_batch(pictures, views, masks, delta, "synthetic")


def real_clips(args, preset, split: str):
    """The folders of --data as data.Clips, of the test split those that have one; None where there are none.
    Raises InputError."""
    folders = [name for name in args.data
               if name != "synthetic" and (split == "train" or prepared.find_clips(name, split))]
    if not folders:
        return None
    targets = args.frames if args.frames > 1 else preset["targets"]
    return data.Clips(folders, args.persons, targets, preset["near"], image_px(preset), args.seed, split,
                      rows=args.frames > 1, augment=args.curriculum and split == "train")


def batches(args, preset, real, numbers, render_fn, device):
    """Yield each of `numbers` and its batch, synthetic or of the folders by their share of --data."""
    share = sum(name != "synthetic" for name in args.data) / len(args.data)

    def is_real(number):
        return number * 0.6180339887 % 1 < share                                       # evenly spread

    loaded = iter(data.loader(real, (n for n in numbers if is_real(n)), args.workers)) if real else None
    for number in numbers:
        yield number, (next(loaded) if is_real(number)
                       else synthetic_batch(args, preset, number, render_fn, device))


def held_out_batch(args, preset) -> tuple[data.Batch, str]:
    """The persons of the sample pictures, of the folders' test split or else synthetic; and which of them."""
    if real := real_clips(args, preset, "test"):
        return real[0], "test"
    return synthetic_batch(args, preset, 0, render, held_out=True), "synthetic"


def sample_noise_t_mask(args, encoder: EncoderConfig, shape, number: int, rank: int, now: dict):
    """Draw noise and times of the R*T targets of one pass, and visible patches of all pictures.

    From (seed, rank, number), on the CPU, so that devices agree. The frames of a clip share their time and,
    as in sampling, their noise. now: schedule(). Without a curriculum t is uniform on [0, 1], as in the
    paper.
    """
    rng, clips = training.step_rng(args.seed, rank, number), shape[0] // args.frames
    noise = torch.randn(clips, *shape[1:], generator=rng).repeat_interleave(args.frames, 0)
    if args.curriculum or args.reflow:
        t = flow.sample_timesteps(clips, rng, p_pure_noise=now["p_pure_noise"])
    else:
        t = torch.rand(clips, generator=rng)
    patches = (encoder.image_size // encoder.patch_size) ** 2
    ratio = now["mask_max"] * torch.rand((), generator=rng).item()                  # one for all: a rectangle
    ids_keep = random_masking(args.persons + shape[0], patches, ratio, rng)
    return noise, t.repeat_interleave(args.frames), ids_keep


@torch.no_grad()
def reflow_pairs(teacher: dict, batch: data.Batch, noise, steps: int) -> Tensor:
    """What the teacher makes of the noise for the targets' motion (Liu et al. 2022, algorithm 1)."""
    motion = teacher["encoder"](batch.encoder_views)                                # as the student sees them
    m_r, m_t = motion[: len(batch.reference)], motion[len(batch.reference):]
    cache = teacher["decoder"].encode_reference(batch.reference, m_r)
    return flow.integrate(teacher["decoder"], noise, steps, m_t=m_t, cache=cache)


@torch.no_grad()
def save_samples(path, model, space, held_out, seed: int, device) -> dict:
    """Write the persons of held_out_batch, reference, target, 1 step, 4 steps -> PSNR in dB of 1 step and of
    copying."""
    batch, split = held_out
    batch = batch.to(device).encode(space)
    m_r, m_t = model.encoder(batch.reference), model.encoder(batch.target)
    cache = model.decoder.encode_reference(batch.reference, m_r)
    noise = torch.randn(batch.target.shape, generator=training.step_rng(seed, 0, 0)).to(device)
    outputs = [flow.integrate(model.decoder, noise, n, m_t=m_t, cache=cache) for n in (1, 4)]
    copies = batch.reference.repeat_interleave(len(batch.target) // len(batch.reference), 0)
    copies, target, *outputs = (space.decode(x) for x in (copies, batch.target, *outputs))
    save_grid(path, [x[:: max(1, len(target) // 12)] for x in (copies, target, *outputs)])
    psnr, psnr_copy = (-10 * math.log10(((x.clamp(-1, 1) - target) / 2).square().mean().item() + 1e-12)
                       for x in (outputs[0], copies))
    return {"psnr": psnr, "psnr_copy": psnr_copy, "shown": split}


# ---- the run -----------------------------------------------------------------------------------------------

def parse(argv, presets=PRESETS):
    p = training.make_parser(__doc__, presets)
    p.add_argument("--frames", type=int, default=1,
                   help="above 1: the image-to-video stage, clips of so many frames")
    p.add_argument("--workers", type=int, default=2, help="processes that read clips ahead (default: 2)")
    p.add_argument("--vae", default=latents.SD,
                   help="presets large and paper: the autoencoder, hub id or folder")
    p.add_argument("--persons", type=int, help="persons a step and process (default: the preset's)")
    p.add_argument("--lr", type=float, help="peak learning rate of AdamW (default: the preset's)")
    p.add_argument("--muon-lr", type=float, help="peak learning rate of Muon (default: the preset's)")
    p.add_argument("--label-weight", type=float,
                   help="weight of known motion in the loss; 0: no label (default: the preset's)")
    p.add_argument("--mesh", metavar="DIR",
                   help="compare what a face mesh reads from decoded pictures of real faces, in the place of "
                        "what the encoder reads; DIR: see media/mesh.py")
    p.add_argument("--decoder-only", action="store_true",
                   help="with --init: the encoder and all other networks of its file stay as they are")
    p.add_argument("--blend", type=float, default=0.0, metavar="SHARE",
                   help="with --init: save the mean of the trained weights and the first, which have this "
                        "share (WiSE-FT, arXiv 2109.01903; default: 0)")
    p.add_argument("--accumulate", type=int, default=1,
                   help="batches a step, for large steps in little memory")
    p.add_argument("--checkpoint-activations", action="store_true",
                   help="keep less for the backward pass, compute it again")
    args = p.parse_args(argv)
    preset = presets[args.preset]
    if args.reflow:                                                           # a student is nearly there
        preset = {**preset, "label_weight": 0.0, "mask_max": 0.0, "lr": 0.1 * preset["lr"],
                  "muon_lr": preset["muon_lr"] and 0.1 * preset["muon_lr"]}
    args.out = args.out or ("runs/reflow_ae" if args.reflow else "runs/ae")
    args.curriculum = preset["curriculum"]
    training.check_options(p, args, preset)
    if (args.decoder_only or args.blend) and not args.init:
        p.error("--decoder-only and --blend need --init WEIGHTS")
    if args.blend > 1:
        p.error(f"--blend is {args.blend}; give a number in [0, 1]")
    if args.mesh and preset.get("latents", "pixel") != "pixel":
        p.error(f"--mesh reads pictures, and preset {args.preset} works on latents")
    if args.mesh and (args.reflow or set(args.data) == {"synthetic"}):
        p.error("--mesh reads real faces; give folders of clips as --data, and no --reflow")
    if not args.lr:
        p.error("--lr is 0; give a positive number")
    return args


def train(args, preset: dict) -> int:
    """Train as the settings say; see `parse` and PRESETS. Raises InputError."""
    rank, world, device = training.init_distributed(args.device)
    torch.manual_seed(args.seed)                             # first weights; later numbers come from step_rng
    configs = {"encoder": preset["encoder"], "decoder": replace(preset["decoder"], frames=args.frames)}
    model = AutoEncoder(MotionEncoder(configs["encoder"]), Decoder(configs["decoder"]), preset["loss"],
                        labels=args.label_weight > 0).to(device)
    kind = preset.get("latents", "pixel")
    training.make_run_folder(args.out)
    space = latents.load_latents(kind, args.vae, device)
    real = real_clips(args, preset, "train")
    mesh = FaceMesh(args.mesh).to(device) if args.mesh else None
    kept, meta, source = {}, {}, args.init or args.reflow               # kept: networks that are not trained
    frozen = args.decoder_only or bool(args.reflow)           # tokens must stay what the generator writes
    if source:
        kept, meta = load_models(source, device)
        training.init_from(source, kept, encoder=model.encoder, decoder=model.decoder)
    if not frozen:
        kept, meta = {}, {}
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    start = copy.deepcopy(ema) if args.blend else None
    optimisers = training.optimisers(model, args.lr, args.muon_lr)
    state = os.path.join(args.out, "state.pt")
    step = training.resume(state, args, configs, model, ema, optimisers)
    if rank == 0:
        held_out = held_out_batch(args, preset)
        training.print_settings(args, model, step,
                                **{f"schedule at {p:.0%}": schedule(args, p) for p in (0, 0.5, 1)})

    if args.checkpoint_activations:
        training.checkpoint_activations(model)
    render_fn = torch.compile(render, dynamic=False) if args.compile else render
    if args.compile:
        model.decoder.compile(dynamic=False)             # in place; the encoder's shapes change with the mask
    model.train()
    if frozen:
        model.encoder.requires_grad_(False).eval()
    ddp_model = training.ddp_wrap(model, world, device)
    stopper = training.Stopper()
    recent = deque(maxlen=100)                                    # losses, to print their mean
    stride = args.accumulate * world                                                   # batches of a step
    numbers = range(step * stride + rank, args.steps * stride, world)
    numbered = batches(args, preset, real, numbers, render_fn, device)
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0)
    while step < args.steps:
        training.set_lr(optimisers, step, args.steps, warmup=50)
        now, loss = schedule(args, step / args.steps), 0.0
        for part in range(args.accumulate):            # only the last backward pass waits for other processes
            number, batch = next(numbered)
            batch = batch.to(device).encode(space)
            random = sample_noise_t_mask(args, preset["encoder"], batch.target.shape, number, rank, now)
            noise, t, ids_keep = (x.to(device) for x in random)
            axes = None
            if mesh:
                axes = random_axes(args.persons, training.step_rng(args.seed, rank, number)).to(device)
            if world > 1:
                ddp_model.require_backward_grad_sync = part == args.accumulate - 1
            with autocast(device):
                endpoint = reflow_pairs(kept, batch, noise, args.teacher_steps) if args.reflow else None
                part_loss = ddp_model(batch, noise, t, ids_keep, now, endpoint, ema, mesh, axes)
            part_loss = part_loss / args.accumulate
            part_loss.backward()
            loss += part_loss.item()
        training.clip_and_step(model, optimisers, loss, step, state, device)
        training.update_ema(ema, model, step, training.ema_decay(args.steps))
        step += 1
        recent.append(loss)
        mean_loss = sum(recent) / len(recent)
        bar.update()
        bar.set_postfix(loss=f"{mean_loss:.4f}")
        stop = training.any_rank(stopper.wanted, device)
        if rank == 0 and (step % args.save_every == 0 or step == args.steps or stop):
            path = os.path.join(args.out, f"step{step:06d}.png")
            saved = ema
            if start:
                saved = copy.deepcopy(ema)
                for trained, first_value in zip(saved.parameters(), start.parameters(), strict=True):
                    trained.lerp_(first_value, args.blend)
            samples = save_samples(path, saved, space, held_out, args.seed, device)
            meta |= {"latents": kind, "vae": args.vae, "size": image_px(preset), "steps": 1,
                     "trained_steps": step}
            save_weights(os.path.join(args.out, "semo.safetensors"),
                         {**kept, "encoder": saved.encoder, "decoder": saved.decoder}, meta)
            training.save_checkpoint(state, step, args, configs, model, ema, optimisers)
            steps_per_second = (step - bar.initial) / bar.format_dict["elapsed"]
            training.log(args.out, step=step, loss=mean_loss, **samples,
                         pictures_per_second=steps_per_second * stride * len(batch.target))
        if stop:
            break
    bar.close()
    return 130 if step < args.steps else 0


@command("train_ae.py")
def main(argv=None) -> int:
    """-> exit status: 0 when the run is complete, 130 when it was stopped, 2 for bad input."""
    args = parse(argv)
    return train(args, PRESETS[args.preset])


if __name__ == "__main__":
    training.shutdown(main)
