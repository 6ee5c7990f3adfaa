"""Sliders: directions of the motion token, one for each known factor of the synthetic world.

    python -m web.controls [--ckpt F]          fit them to a release, keep them in its metadata, print
                                               how well each works

A photo's token plus value times direction shall show the photo with one factor changed by the value. First,
ridge regression: two pictures of the same person differ by factors f and by token t, and t = f W over many
people gives a direction for each factor. Then gradient descent on the decoded pictures: the decoder may need
another change of the token than the encoder makes.
"""
import argparse
import json
import math
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flow import integrate
from measure import metrics
from measure.reader import NAMES, WEIGHTS, load_regressor
from media.files import atomic_write, command
from sample import DEFAULT, decode_frames, load_models
from world.people import HELD_OUT, random_motion
from world.render import MOTION, random_identity, render

DEGREES = ("yaw", "pitch", "roll")                    # kept in radians by the world, shown in degrees
REST = torch.zeros(1, len(NAMES))                     # the motion of a photo; a slider is a change from it
REST[0, NAMES.index("light")] = 0.5
SPANS = torch.tensor([MOTION[name] for name in NAMES]) - REST.T                                 # (M, 2)
PEOPLE, PICTURES, RIDGE, PASSES = 400, 6, 1.0, 9      # to fit with; pictures of each slider when it is tested
STEPS, RATE = 150, 0.1                                # of the gradient descent


@torch.no_grad()
def draw_changes(encoder, size, people=PEOPLE):
    """Draw pictures of `people` persons -> differences from each person's mean: factors f (n, M), tokens
    t (n, L*D)."""
    factors = random_motion(torch.arange(people * PICTURES)).unflatten(0, (people, PICTURES))
    tokens = []
    for person, motion in zip(random_identity(torch.arange(people)), factors, strict=True):      # (k, M)
        tokens.append(encoder(render(person.expand(PICTURES, -1), motion, size)).flatten(1))
    return [(x - x.mean(1, keepdim=True)).flatten(0, 1) for x in (factors, torch.stack(tokens))]


def fit_directions(f, t):
    """Ridge regression of token changes on factor changes -> (M, L*D), for a change of one of the world's
    units."""
    scale = f.std(0)
    f = f / scale
    w = torch.linalg.solve(f.T @ f + RIDGE * torch.eye(f.shape[1]), f.T @ t)                        # (M, L*D)
    return w / scale[:, None]


def refine_directions(models, meta, directions, t, steps=STEPS):
    """Improve directions (M, L*D) until decoded pictures are most like true ones -> (M, L*D).

    Each step shows a new person with each slider at a random value of its span. An error is counted in shares
    of the error of the photo as it is. t: token changes (n, L*D); the steps are taken in units of their
    standard deviation along their principal components.
    """
    decoder, size = models["decoder"], meta["size"]
    c = decoder.config
    variance, components = torch.linalg.eigh(t.T @ t / len(t))
    basis = (components * variance.clamp(min=1e-4).sqrt()).T                                 # (L*D, L*D)
    far = SPANS.abs().amax(1, keepdim=True)
    weights = torch.linalg.solve(basis.T, (directions * far).T).T.requires_grad_()           # (M, L*D)
    optimiser = torch.optim.Adam([weights], lr=RATE)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / steps)
        random = torch.Generator().manual_seed(step)
        person = random_identity(torch.tensor([PEOPLE + step]))
        values = SPANS[:, 0] + (SPANS[:, 1] - SPANS[:, 0]) * torch.rand(len(NAMES), generator=random)
        with torch.no_grad():
            photo = render(person, REST, size)
            true = render(person.expand(len(NAMES), -1), REST + values.diag(), size)
            still = models["encoder"](photo)
            cache = decoder.encode_reference(photo, still)
        m_t = still + (values[:, None] / far * (weights @ basis)).unflatten(1, (c.num_tokens, c.token_dim))
        noise = torch.randn(photo.shape, generator=random).expand(len(NAMES), -1, -1, -1)
        x = integrate(decoder, noise, meta["steps"], m_t=m_t, cache=cache)
        error, change = ((y - true).square().mean((1, 2, 3)) for y in (x, photo))
        weights.grad, = torch.autograd.grad((error / (change + 1e-4)).mean(), weights)
        optimiser.step()
    return (weights.detach() @ basis) / far


@torch.no_grad()
def read_back(models, meta, directions, people=6):
    """Move each slider of unseen people over its span and read the frames -> correlation of value and
    reading (M,), and how far each factor moves by it, in shares of the factors' spans (M, M)."""
    reader, steps = load_regressor(WEIGHTS), meta["steps"]
    values = torch.stack([torch.linspace(*span, PASSES) for span in SPANS.tolist()])                  # (M, n)
    readings = torch.zeros(people, len(NAMES), PASSES, len(NAMES))
    for p in range(people):
        photo = render(random_identity(torch.tensor([HELD_OUT + p])), REST, meta["size"])
        still = models["encoder"](photo).flatten(1)
        noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(p))
        moved = still + (values[:, :, None] * directions[:, None]).flatten(0, 1)                  # (M*n, L*D)
        pictures = decode_frames(models["decoder"], photo, still, iter([moved]), noise, steps)
        frames = torch.cat([picture.x for picture in pictures])
        readings[p] = reader(frames.clamp(-1, 1)).unflatten(0, (len(NAMES), PASSES))
    readings = (readings - readings.mean(2, keepdim=True)) / (SPANS[:, 1] - SPANS[:, 0])
    own = readings.diagonal(dim1=1, dim2=3).permute(0, 2, 1)  # (p, M, n)
    flat = own.permute(1, 0, 2).flatten(1)
    true = (values - values.mean(1, keepdim=True)).repeat(1, people)
    matched = metrics.correlation(flat.T, true.T)                                                       # (M,)
    line = (values - values.mean(1, keepdim=True)) / (SPANS[:, 1:] - SPANS[:, :1])
    slope = torch.einsum("pmnk,mn->mk", readings, line) / people / line.square().sum(1)[:, None]  # (M, M)
    return matched, slope


def fit_controls(models, meta):
    """-> {name: {"unit", "low", "high", "direction" (L*D numbers for one unit), "correlation", "others"}} in
    JSON values.

    correlation: of the slider's value and what the motion reader sees in frames of unseen people. gain: how
    much of the asked change it sees. others: the most that any other factor moves, as a share of that.
    """
    f, t = draw_changes(models["encoder"], meta["size"])
    directions = refine_directions(models, meta, fit_directions(f, t), t)
    matched, slope = read_back(models, meta, directions)
    controls = {}
    for k, name in enumerate(NAMES):
        factor = 180 / math.pi if name in DEGREES else 1.0
        low, high = (value * factor for value in SPANS[k].tolist())
        others = slope[k].abs().clone()
        others[k] = 0
        controls[name] = {
            "unit": "degrees" if name in DEGREES else "", "low": round(low, 2), "high": round(high, 2),
            "direction": [round(v, 5) for v in (directions[k] / factor).tolist()],
            "correlation": round(matched[k].item(), 3), "gain": round(slope[k, k].item(), 3),
            "others": round((others.max() / slope[k, k].abs().clamp(min=1e-6)).item(), 3),
            "other": NAMES[others.argmax()]}
    return controls


@command("web.controls")
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--ckpt", default=DEFAULT,
                        help="released weights, .safetensors; its metadata is rewritten")
    args = parser.parse_args(argv)
    models, meta = load_models(args.ckpt)
    controls = fit_controls(models, meta)
    with safe_open(args.ckpt, framework="pt") as f:
        weights = {name: f.get_tensor(name) for name in f.keys()}
        about = json.loads(f.metadata()["semo"])
    about["controls"] = controls
    with atomic_write(args.ckpt) as temporary:
        save_file(weights, temporary, metadata={"semo": json.dumps(about)})
    print("| slider | range | correlation | gain | largest other |\n|---|---|---|---|---|")
    for name, c in controls.items():
        span = f"{c['low']:g} to {c['high']:g} {c['unit']}".rstrip()
        other = f"{c['others']:.2f} ({c['other']})"
        print(f"| `{name}` | {span} | {c['correlation']:.2f} | {c['gain']:.2f} | {other} |")


if __name__ == "__main__":
    sys.exit(main())
