"""Prepared clips -> batches that both stages train on.

    python data.py prepare --videos DIR [DIR ...] --out OUT          makes them (media/prepare.py)

    OUT --Clips--> pairs of pictures, or frames in a row; several folders drawn equally
"""
import math
import os
import signal
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from media import landmarks, prepare
from media.files import InputError
from media.image import from_uint8
from media.prepare import MARGIN
from media.prepared import load_landmarks, load_set, read_at
from media.sound import FPS


@dataclass
class Batch:
    """R persons, one reference and T targets of each, as stage 1 wants them."""
    reference: Tensor       # (R, C, H, W)
    target: Tensor          # (R*T, C, H, W)
    encoder_views: Tensor   # (R + R*T, C, H, W), what the motion encoder sees: the same, or augmented apart
    regions: Tensor         # (R*T, 3, H, W), draw_regions of reference and target together
    factors: Tensor | None  # (R*T, K) differences of known motion, target minus reference; nan in rows that
                            # are not known, None: no row is
    kind: str               # "real" or "synthetic": which factors

    def to(self, device):
        return replace(self, **{name: value.to(device, non_blocking=True)
                                for name, value in vars(self).items() if isinstance(value, Tensor)})

    def encode(self, space):
        """The same in another space (media/latents.py); regions are reduced to its cells."""
        names = "reference", "target", "encoder_views"
        encoded = {name: space.encode(getattr(self, name)) for name in names}
        regions = F.interpolate(self.regions, size=encoded["target"].shape[-2:], mode="area")
        return replace(self, **encoded, regions=regions)


def make_batch(pictures, views, masks, factors, kind: str) -> Batch:
    """Pictures and views (R, 1+T, 3, H, W), masks of draw_regions (R, 1+T, 3, H, W), factors (R*T, K)."""
    regions = torch.maximum(masks[:, 1:], masks[:, :1]).flatten(0, 1)                  # (R*T, 3, H, W)
    return Batch(pictures[:, 0].contiguous(), pictures[:, 1:].flatten(0, 1),
                 torch.cat([views[:, 0], views[:, 1:].flatten(0, 1)]), regions, factors, kind)


def draw_regions(ellipses: Tensor, size: int) -> Tensor:
    """Draw ellipses of mouth, two eyes and face as soft masks.
    ellipses (B, 4, 4): x, y, half width, half height in [-1, 1] -> (B, 3, H, W): mouth and eyes; eyes, with
    the brows above them by half; face."""
    brows = ellipses[:, 1:3] * torch.tensor([1, 1, 1.15, 2.0], device=ellipses.device)
    brows[..., 1] = brows[..., 1] - 0.4 * brows[..., 3]
    ellipses = torch.cat([ellipses, brows], 1)                                         # (B, 6, 4)
    axis = (torch.arange(size, device=ellipses.device) + 0.5) * 2 / size - 1
    x, y, a, b = ellipses[..., None, None].unbind(2)                                   # (B, 6, 1, 1)
    radius = (((axis - x) / a.clamp(min=1e-2)) ** 2 + ((axis[:, None] - y) / b.clamp(min=1e-2)) ** 2).sqrt()
    masks = torch.sigmoid(6 * (1 - radius))                                            # (B, 6, H, W)
    upper = torch.maximum(masks[:, 1:3].amax(1), 0.5 * masks[:, 4:].amax(1))
    return torch.stack([masks[:, :3].amax(1), upper, masks[:, 3]], 1)


def random_framing(rng, persons: int):
    """Draw where the tight square lies in the prepared one, its size by 12%, place by 8% of its side (ours).
    -> affine (R, 2, 3) to the tight square, mirrored (R,) bool, half of the time."""
    def uniform(*shape):
        return torch.rand(*shape, generator=rng) * 2 - 1

    zoom, aspect = torch.exp(0.12 * uniform(persons)), torch.exp(0.06 * uniform(persons))
    angle = 0.08 * uniform(persons)
    mirrored = torch.rand(persons, generator=rng) < 0.5
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    flip = torch.where(mirrored, -1.0, 1.0)
    place = 0.16 * uniform(persons, 2)
    return torch.stack([torch.stack([flip * cos * aspect, -sin, place[:, 0]], 1),
                        torch.stack([flip * sin, cos / aspect, place[:, 1]], 1)], 1), mirrored


def random_warp(rng, affine, size: int, strength: float):
    """Sampling grids of affine (R, 2, 3), for 7 persons in 10 with a smooth warp, so that persons seem more.
    strength: of its 4 x 4 grid, as a share of half the side -> (R, size, size, 2)."""
    grid = F.affine_grid(affine, (len(affine), 1, size, size), align_corners=False)
    coarse = strength * torch.randn(len(affine), 2, 4, 4, generator=rng)
    coarse = coarse * (torch.rand(len(affine), 1, 1, 1, generator=rng) < 0.7)
    displacement = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return grid + displacement.permute(0, 2, 3, 1)


def random_colours(x: Tensor, rng, strength=1.0) -> Tensor:
    """Change the colours and the light of pictures x (R, n, 3, H, W), alike for all n of a person (ours).
    Gamma 0.7 to 1.4, a random 3 x 3 matrix near the identity, an offset, a gradient of light up to 20%."""
    persons, size = len(x), x.shape[-1]
    gamma = torch.exp(0.35 * strength * (torch.rand(persons, generator=rng) * 2 - 1))
    matrix = torch.eye(3) + 0.12 * strength * torch.randn(persons, 3, 3, generator=rng)
    offset = 0.08 * strength * torch.randn(persons, 3, generator=rng)
    light = 0.2 * strength * (torch.rand(persons, 2, generator=rng) * 2 - 1)
    axis = torch.linspace(-1, 1, size)
    x = ((x + 1) / 2).clamp(1e-3, 1) ** gamma.view(-1, 1, 1, 1, 1) * 2 - 1
    x = torch.einsum("rij,rnjhw->rnihw", matrix, x) + offset.view(-1, 1, 3, 1, 1)
    shade = 1 + light[:, 0].view(-1, 1, 1) * axis[:, None] + light[:, 1].view(-1, 1, 1) * axis     # (R, H, W)
    return (x * shade[:, None, None]).clamp(-1, 1)


def random_blur(views: Tensor, rng) -> Tensor:
    """Blur views (R, n, 3, H, W) and add noise, to each its own amount, of about half of the persons (ours).
    What the decoder makes is softer than a photo, and an encoder of sharp views takes a soft eye for a shut
    one. Gaussian of up to 1.5 pixels, noise of up to 0.06."""
    def amounts(most, share):
        persons = torch.rand(len(views), 1, generator=rng) < share
        return most * torch.rand(*views.shape[:2], generator=rng) * persons                       # (R, n)

    sigma = amounts(1.5, 0.6).clamp(min=0.01).flatten()[:, None]
    taps = torch.softmax(-torch.arange(-4, 5) ** 2 / (2 * sigma**2), 1).repeat_interleave(3, 0)   # (R*n*3, 9)
    x = F.pad(views.flatten(0, 2)[None], (4, 4, 4, 4), mode="replicate")
    for shape in ((-1, 1, 9, 1), (-1, 1, 1, 9)):
        x = F.conv2d(x, taps.to(x).view(shape), groups=len(taps))
    noise = amounts(0.06, 0.4)[..., None, None, None] * torch.randn(views.shape, generator=rng)
    return (x.view_as(views) + noise.to(x)).clamp(-1, 1)


class Clips(Dataset):
    """Batches of stage 1 from prepared folders.

    Item `number` is a function of (seed, number) alone, so that no process, worker or step sees another's and
    a resumed run goes on with what comes next. A share `near` of the persons is shown within a fifth of a
    second, the others at any distance. Where there are landmarks (media/landmarks.py), some persons are shown
    at equal pose: 3 in 8 with the mouth as different as the clip has it, 3 in 16 with the lids so, 1 in 8
    with brows and corners of the mouth so (ours, compare MuseTalk, arXiv 2410.10122). rows: the targets
    follow each other instead (the video stage). augment: shape, framing and colours vary per person, and for
    half of the persons the encoder sees another shape and other colours than the decoder, so that its token
    cannot tell who it is (compare Burkov et al. 2020), of some softer pictures (random_blur).
    """

    def __init__(self, folders, persons: int, targets: int, near: float, size: int, seed=0, split="train",
                 rows=False, augment=True):
        self.sets = [list(load_set(folder, split).items()) for folder in folders]
        self.persons, self.targets, self.near, self.size = persons, targets, near, size
        self.seed, self.rows, self.augment = seed, rows, augment

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.seed, number])
        drawn = [self.person(rng, k) for k in range(self.persons)]
        pictures, ellipses, factors = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**40)))
        pictures, masks, views, mirrored = self.frame(from_uint8(pictures.numpy()), ellipses, torch_rng)
        swapped = factors[..., landmarks.MIRROR] * torch.tensor(landmarks.SIGN)
        factors = torch.where(mirrored[:, None, None], swapped, factors)
        delta = ((factors[:, 1:] - factors[:, :1]) / torch.tensor(landmarks.SCALE)).flatten(0, 1).float()
        known = delta.isfinite().all(1).any()                                          # delta (R*T, K)
        return make_batch(pictures, views, masks, delta if known else None, "real")

    def frame(self, wide, ellipses, rng):
        """Frame prepared squares (R, 1+T, 3, W, W) and ellipses in them.
        -> pictures, masks and encoder views (R, 1+T, 3, size, size) each, mirrored (R,)."""
        persons, count, size = *wide.shape[:2], self.size
        masks = draw_regions(ellipses.flatten(0, 1), wide.shape[-1]).unflatten(0, (persons, count))
        if not self.augment:
            edge = (wide.shape[-1] - size) // 2
            pictures, masks = (x[..., edge:edge + size, edge:edge + size] for x in (wide, masks))
            return pictures, masks, pictures, torch.zeros(persons, dtype=torch.bool)

        def warp(x, grid):
            x, grid = x.flatten(0, 1), grid.repeat_interleave(count, 0)
            x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
            return x.unflatten(0, (persons, count))

        affine, mirrored = random_framing(rng, persons)
        both = warp(torch.cat([wide, masks], 2), 1 / MARGIN * random_warp(rng, affine, size, 0.05))
        pictures, masks = random_colours(both[:, :, :3], rng), both[:, :, 3:]
        identity = torch.eye(2, 3).expand(persons, 2, 3)
        views = warp(pictures, random_warp(rng, identity, size, 0.03))
        apart = torch.rand(persons, generator=rng) < 0.5
        views = torch.where(apart.view(-1, 1, 1, 1, 1), random_colours(views, rng, 0.6), pictures)
        return pictures, masks, random_blur(views, rng), mirrored

    def person(self, rng, k: int):
        """Draw set, then person, then clip, each equally.
        -> pictures (1+T, W, W, 3) uint8 of the prepared square, ellipses (1+T, 4, 4), factors (1+T, K), nan
        where not known."""
        people = self.sets[rng.integers(len(self.sets))]
        clips = people[rng.integers(len(people))][1]
        clip = clips[rng.integers(len(clips))]
        ellipses, factors = load_landmarks(clip)
        numbers = self.frame_numbers(rng, clip["frames"], factors, k)
        return read_at(clip["path"], numbers, self.size, margin=True), ellipses[numbers], factors[numbers]

    def frame_numbers(self, rng, frames: int, factors, k: int) -> list[int]:
        """Choose the reference and the targets of person k of a batch -> 1+T frame numbers."""
        first, targets = int(rng.integers(frames)), self.targets
        if self.rows:
            start = int(rng.integers(max(1, frames - targets + 1)))
            return [first, *(min(start + n, frames - 1) for n in range(targets))]
        kind = np.searchsorted([3 / 8, 9 / 16, 11 / 16], (k + 0.5) / self.persons)
        mined = [(0, 1), (2, 3), (7, 8), None][kind]                                   # columns of factors
        known = np.isfinite(factors).all(1)
        if mined and known[first] and known.sum() > 2 * targets:
            return [first, *mine_pairs(rng, factors / landmarks.SCALE, first, mined, targets)]
        low, high = 0, frames
        if k < round(self.near * self.persons):
            low, high = max(0, first - FPS // 5), min(frames, first + FPS // 5 + 1)
        return [first, *rng.integers(low, high, targets).tolist()]


def mine_pairs(rng, factors, first: int, columns, count: int) -> list[int]:
    """Choose frames of nearly the pose of frame `first` that differ from it most in `columns` of factors.

    factors (F, K) -> `count` of the 2 * count most different of the quarter nearest in yaw, pitch and roll.
    """
    known = np.flatnonzero(np.isfinite(factors).all(1) & (np.arange(len(factors)) != first))
    pose = np.abs(factors[known, 4:7] - factors[first, 4:7]).sum(1)
    near = known[np.argsort(pose, kind="stable")[: max(2 * count, math.ceil(len(known) / 4))]]
    difference = np.abs(factors[near] - factors[first])[:, list(columns)].sum(1)
    different = near[np.argsort(-difference, kind="stable")[: 2 * count]]
    return rng.choice(different, count, replace=False).tolist()


def worker_init(_):
    """Leave signals to the main process.
    Ctrl-C and torchrun's end reach the whole group, but the main process may need another batch before it
    stops. It may still end this process by SIGTERM."""
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def loader(clips: Clips, numbers, workers: int):
    """Yield items of `clips` in the order of `numbers`, read ahead by `workers` processes (0: none)."""
    options = {}
    if workers:
        options = dict(prefetch_factor=4, worker_init_fn=worker_init, multiprocessing_context="spawn")
    try:
        yield from DataLoader(clips, batch_size=None, sampler=numbers, num_workers=workers, **options)
    except InputError as error:                          # a process sends its sentence below a traceback
        sentence = str(error).strip().splitlines()[-1]
        raise InputError(sentence.removeprefix("media.files.InputError: ")) from None


if __name__ == "__main__":
    sys.exit(prepare.main())
