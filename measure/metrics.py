"""What evaluate.py measures on pictures and on signals, each in a few lines.

Pictures are (B, 3, H, W) in [-1, 1]; a box is a mask (B, H, W) of the pixels that count, None for all.
Picture measures return one number a picture, (B,).
"""
import math

import torch
import torch.nn.functional as F

from media.sound import FPS
from world.render import IDENTITY, MOTION

NAMES = list(MOTION)


def average(x, box=None):
    """Mean of x (B, H, W) over the box -> (B,)."""
    return x.mean((1, 2)) if box is None else (x * box).sum((1, 2)) / box.sum((1, 2)).clamp(min=1)


def psnr(pred, target, box=None):
    """Peak signal to noise ratio in dB on [0, 1], at most 100 (equal pictures)."""
    error = average(((pred - target) / 2).square().mean(1), box)
    return -10 * torch.log10(error.clamp(min=1e-10))


def l1(pred, target, box=None):
    """Mean absolute difference on [0, 1]."""
    return average(((pred - target) / 2).abs().mean(1), box)


def blur(x, sigma, size, pad=True):
    """Gaussian blur of (B, C, H, W) over size x size pixels; without padding the result is size - 1 smaller.

    One product with a band matrix for each axis: on a CPU much faster than a depthwise convolution.
    """
    def band(n):
        margin = size // 2
        centre = torch.arange(n) if pad else torch.arange(margin, n - margin)
        distance = torch.arange(n)[:, None] - centre                                    # (n, n or n-size+1)
        kernel = torch.exp(-((torch.arange(size) - margin) ** 2) / (2 * sigma**2)).sum()
        return (torch.exp(-(distance**2) / (2 * sigma**2)) * (distance.abs() <= margin) / kernel).to(x)

    return band(x.shape[2]).T @ x @ band(x.shape[3])


def ssim(pred, target):
    """Structural similarity (Wang et al. 2004) on [0, 1], mean over channels, Gaussian window of sigma 1.5.

    -> (B, H-10, W-10): only of windows, 11 x 11, that lie inside the picture.
    """
    a, b = (pred + 1) / 2, (target + 1) / 2
    moments = blur(torch.cat([a, b, a * a, b * b, a * b]), 1.5, 11, pad=False)          # (5B, 3, H-10, W-10)
    ma, mb, aa, bb, ab = moments.split(len(a))
    va, vb, vab = aa - ma**2, bb - mb**2, ab - ma * mb
    return ((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean(1)


def gradient(x):
    """Length of the gradient, mean over channels: (B, 3, H, W) -> (B, H, W), the last row and column zero."""
    dx, dy = F.pad(x.diff(dim=3), (0, 1)), F.pad(x.diff(dim=2), (0, 0, 0, 1))
    return (dx**2 + dy**2).sqrt().mean(1)


def sharpness(pred, target, box=None):
    """Mean gradient, made over true: under 1 is blurred, over 1 is noisy."""
    return average(gradient(pred), box) / average(gradient(target), box).clamp(min=1e-8)


def border_ratio(x, patch):
    """Mean difference of neighbouring pixels across patch borders, over that inside patches."""
    ratios = []
    for step in (x.diff(dim=3), x.diff(dim=2).transpose(2, 3)):                         # (B, 3, H, W-1)
        border = torch.arange(1, step.shape[3] + 1, device=x.device) % patch == 0
        ratios.append(step[..., border].abs().mean((1, 2, 3))
                      / step[..., ~border].abs().mean((1, 2, 3)).clamp(min=1e-8))
    return (ratios[0] + ratios[1]) / 2


def blockiness(pred, target, patch):
    """Patch borders, made relative to true: 1 where none can be seen."""
    return border_ratio(pred, patch) / border_ratio(target, patch).clamp(min=1e-8)


def seam_ratio(frames, photo, edge, size):
    """Mean difference of neighbours across the border of a square put into a photo, over the photo's own.

    frames: (n, H, W, 3) and photo: (H, W, 3) uint8; the square begins at pixel (edge, edge).
    """
    def across(x):                                                          # (..., H, W, 3)
        x, square = x.astype(float), slice(edge, edge + size)
        steps = [abs(x[..., square, k, :] - x[..., square, k - 1, :]).mean() for k in (edge, edge + size)]
        steps += [abs(x[..., k, square, :] - x[..., k - 1, square, :]).mean() for k in (edge, edge + size)]
        return sum(steps)

    return float(across(frames) / max(across(photo), 1e-8))


def compare(pred, target, box, patch):
    """Compute all picture measures of a clip (n, 3, H, W), means over its frames; face_: over the box."""
    values, similarity = {}, ssim(pred, target)
    for prefix, where in (("", None), ("face_", box)):
        values[prefix + "psnr"] = psnr(pred, target, where)
        values[prefix + "ssim"] = average(similarity, None if where is None else where[:, 5:-5, 5:-5])
        values[prefix + "l1"] = l1(pred, target, where)
    values |= {"sharpness": sharpness(pred, target, box), "blockiness": blockiness(pred, target, patch)}
    return {name: value.mean().item() for name, value in values.items()}


def correlation(a, b):
    """Pearson's, of each column: (F, n), (F, n) -> (n,). 0 where one of the two does not move."""
    a, b = a - a.mean(0), b - b.mean(0)
    scale = (a.square().sum(0) * b.square().sum(0)).sqrt()
    return torch.where(scale > 1e-9, (a * b).sum(0) / scale.clamp(min=1e-9), torch.zeros_like(scale))


def lag_correlation(pred, target, reach=5):
    """Correlate (F,), (F,) -> the best over shifts of `reach` frames, its shift (> 0: late), that at 0."""
    by_lag = {}
    for lag in range(-reach, reach + 1):
        late, early = max(lag, 0), max(-lag, 0)
        if len(pred) - late - early > 2:
            a, b = pred[late: len(pred) - early, None], target[early: len(target) - late, None]
            by_lag[lag] = correlation(a, b).item()
    best = max(by_lag, key=lambda lag: (by_lag[lag], -abs(lag)))
    return by_lag[best], best, by_lag[0]


def count_events(signal, up=0.5, down=0.3):
    """Count how often (F,) rises above `up`, again only after it has fallen below `down`."""
    count, inside = 0, False
    for value in signal.tolist():
        count += value > up and not inside
        inside = value > up or (inside and value > down)
    return count


def motion_correlation(read, target):
    """Correlate all frames of all clips, lists of (n, M), each clip's mean taken out -> M numbers."""
    return correlation(*(torch.cat([x - x.mean(0) for x in each]) for each in (read, target))).tolist()


def sync(read, target):
    """Compare a clip's mouth and head as read (n, M) with the true (n, M) -> {name: number}, degrees."""
    at, values = {name: k for k, name in enumerate(NAMES)}, {}
    for name in ("jaw", "lip_width"):
        best, lag, now = lag_correlation(read[:, at[name]], target[:, at[name]])
        values |= {name: now, name + "_best": best, name + "_lag": lag}
    for name in ("yaw", "pitch", "roll"):
        values[name + "_std"] = math.degrees(read[:, at[name]].std())
    blinks = count_events((read[:, at["blink_l"]] + read[:, at["blink_r"]]) / 2)
    return values | {"blinks_per_minute": blinks * 60 * FPS / len(read),
                     "jaw_mean": read[:, at["jaw"]].mean().item()}


def r_squared(guess, target):
    """Share of the variance explained, of each column: (n, k), (n, k) -> (k,)."""
    return 1 - (guess - target).square().sum(0) / (target - target.mean(0)).square().sum(0).clamp(min=1e-9)


def ridge_r_squared(x, y, fit, check, test):
    """Compute R^2 on the rows `test` of each column of y (n, k), read from x (n, d) by ridge regression.

    fit, check, test: masks (n,). It is fitted on `fit`, its strength is the best on `check`, for each column.
    """
    x, y = x.double(), y.double()
    x = (x - x[fit].mean(0)) / x[fit].std(0).clamp(min=1e-6)
    middle = y[fit].mean(0)
    values, vectors = torch.linalg.eigh(x[fit].T @ x[fit] / fit.sum())
    projected = vectors.T @ (x[fit].T @ (y[fit] - middle) / fit.sum())                     # (d, k)
    strengths = torch.logspace(-5, 3, 17, dtype=x.dtype)
    weights = torch.stack([vectors @ (projected / (values.clamp(min=0) + s)[:, None])
                           for s in strengths])                                                 # (17, d, k)
    scores = torch.stack([r_squared(x[check] @ w + middle, y[check]) for w in weights])              # (17, k)
    best = weights[scores.argmax(0), :, torch.arange(y.shape[1])].T                                  # (d, k)
    return r_squared(x[test] @ best + middle, y[test]).float()


def probe_tokens(tokens, motion, people, number):
    """Probe tokens (n, d) linearly, people split 60-20-20 by their number (n,) -> R^2 of motion, identity."""
    share = number.float() / (number.max() + 1)
    fit, check, test = share < 0.6, (share >= 0.6) & (share < 0.8), share >= 0.8
    r2 = ridge_r_squared(tokens.cpu(), torch.cat([motion, people], 1), fit, check, test).tolist()
    return dict(zip(NAMES, r2, strict=False)), dict(zip(IDENTITY, r2[len(NAMES):], strict=True))


def interval(values):
    """Bootstrap a list of numbers (Efron 1979) -> mean, and its 95% interval, low and high."""
    return ratio_interval(torch.tensor(values, dtype=torch.float64), torch.ones(len(values)))


def ratio_interval(a, b):
    """Bootstrap over people (P,), (P,) -> sum of a over sum of b as mean, and its 95% interval, low, high."""
    a, b = a.double(), b.double()
    pick = torch.randint(len(a), (2000, len(a)), generator=torch.Generator().manual_seed(0))
    ratios = a[pick].sum(1) / b[pick].sum(1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return {"mean": (a.sum() / b.sum()).item(), "low": low, "high": high}


def straightness(model, noise, steps=20, **cond):
    """How far the paths are from straight -> (B,); 0: one step is exact.

    The straightness of Liu et al. 2022 (section 2.2), relative: mean over time of |v - chord|^2 by |chord|^2.
    """
    z, sq_norms, total = noise, [], 0.0
    for k in range(steps):
        v = model(z, z.new_full((len(z),), 1 - k / steps), **cond)
        z, total = z + v / steps, total + v / steps
        sq_norms.append(v.float().square().flatten(1).sum(1))                          # (B,)
    chord = total.float().square().flatten(1).sum(1)                                   # |mean v|^2
    return torch.stack(sq_norms).mean(0) / chord - 1             # mean |v - chord|^2 = mean |v|^2 - |chord|^2
