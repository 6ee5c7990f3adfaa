"""What a checkpoint has learned, drawn on people that training never saw: of the synthetic world, or real.

    python -m measure.pictures [--ckpt F] [--out DIR] [--data DIR] [--device auto]

    errors.png        photo | driving frame | ours | error; then another person's photo doing the same
    directions.png    principal directions of the token: one person's token moved along each, and what each
                      has to do with
    trajectories.png  a speaking clip's tokens along such directions, beside the true motion
    attention.png     where on the face the motion token looks, in each layer of the encoder

--data takes photos and driving frames from the test split of a folder of data.py prepare. What needs the true
motion (the names of the directions, the trajectories) is of the synthetic world all the same.
"""
import argparse
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
from measure import charts, metrics
from measure.checkpoint import WEIGHTS, decode_clip, encode, open_checkpoint, render_batched
from measure.metrics import NAMES
from media.files import InputError, atomic_write
from media.image import to_uint8
from media.sound import FPS
from world.people import HELD_OUT, random_clip, random_motion
from world.render import random_identity

# to choose a driving frame from, for the directions, trajectories
FRAMES = {"clip": 100, "pca": 2000, "speech": 200}
PEOPLE, DIRECTIONS, STEPS, GAIN = 5, 8, (-2, -1, 0, 1, 2), 4  # steps in standard deviations; errors amplified
SHOWN = ("yaw", "pitch", "jaw", "blink_l")                    # factors whose trajectories are drawn
FONT, LINE, GAP = ImageFont.load_default(14), 18, 8


# ---- drawing -----------------------------------------------------------------------------------------------

def tile(x, note=""):
    """(3, H, W) in [-1, 1] -> picture, small ones enlarged to about 128 pixels, with a note in its corner."""
    pixels = to_uint8(x.cpu()).permute(1, 2, 0).numpy()
    side = x.shape[-1] * max(1, 128 // x.shape[-1])
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    ImageDraw.Draw(image).text((4, side - 4), note, "white", FONT, anchor="ls", stroke_width=1,
                               stroke_fill="black")
    return image


def heat(x):
    """(..., H, W) from 0 to 1 -> (..., 3, H, W) in [-1, 1]: black, red, yellow, white."""
    return torch.stack([3 * x, 3 * x - 1, 3 * x - 2], -3).clamp(0, 1) * 2 - 1


def difference(a, b, gain):
    """Absolute difference of two pictures (3, H, W), mean over colours, `gain` times -> heat (3, H, W), white
    from 1 on."""
    return heat(gain * (a - b).abs().mean(0) / 2)


def sheet(title, head, rows, side=None):
    """Rows of equal pictures under their titles `head`, texts `side` left of them -> one picture, as wide as
    all of it needs."""
    cell, width = rows[0][0].width + 2, lambda text: max(math.ceil(FONT.getlength(line))
                                                         for line in text.split("\n"))
    left, high = GAP + (GAP + max(map(width, side)) if side else 0), max(text.count("\n") + 1
        for text in head) * LINE
    top = 2 * GAP + (title.count("\n") + 1) * LINE + high
    image = Image.new("RGB", (left + max(len(head) * cell, width(title)) + GAP, top + len(rows) * cell + GAP),
                      "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((left, GAP), title, "black", FONT)
    for j, text in enumerate(head):
        canvas.text((left + j * cell + cell // 2, top - GAP // 2), text, "black", FONT, anchor="md",
                    align="center")
    for i, entry in enumerate(rows):
        if side:
            canvas.text((GAP, top + i * cell + cell // 2), side[i], "black", FONT, anchor="lm")
        for j, picture in enumerate(entry):
            image.paste(picture, (left + j * cell, top + i * cell))
    return image


# ---- the four pictures -------------------------------------------------------------------------------------

def test_clips(args, size):
    """People of the test split -> [(frames (F, 3, H, W), true motion (F, M) and identity (I,), or None)]."""
    if args.data:
        (people,) = data.load_sets([args.data], "test")
        if len(people) < 2:
            raise InputError(f"{args.data}: one person in the test split; re-enactment needs two")
        return [(data.read_clip(people[name][0]["path"], size)[0][: FRAMES["clip"]], None, None)
                for name in sorted(people)[:PEOPLE]]
    clips = random_clip(HELD_OUT + torch.arange(PEOPLE), FRAMES["clip"])
    return [(render_batched(person, motion, size), motion, person)
            for motion, person in zip(clips["motion"], clips["identity"], strict=True)]


def errors(checkpoint, clips):
    """A clip's first frame is the photo, the frame least like it drives: this person, then the photo of the
    next one, B."""
    def error_tile(pred, target):
        return tile(difference(pred, target, GAIN), f"{metrics.psnr(pred[None], target[None]).item():.1f} dB")

    rows = []
    for (frames, motion, _), (photos, _, person) in zip(clips, clips[1:] + clips[:1], strict=True):
        at = (frames - frames[:1]).abs().mean((1, 2, 3)).argmax()
        token = encode(checkpoint, frames[at][None])
        ours, other = (decode_clip(checkpoint, photo, token, checkpoint.meta["steps"], 0)[0]
                       for photo in (frames[0], photos[0]))
        rows.append([*map(tile, (frames[0], frames[at], ours)), error_tile(ours, frames[at]), tile(photos[0]),
                     tile(other)])
        if motion is not None:
            target = render_batched(person, motion[at][None], checkpoint.meta["size"])[0]
            rows[-1] += [tile(target), error_tile(other, target)]
    error = f"error x {GAIN}\n(white: {100 / GAIN:.0f}%)"
    head = ["photo of A", "driving frame", "ours", error, "photo of B", "ours: B as A", "true: B as A", error]
    title = ("Unseen people: A's photo driven by the frame of A's clip that is least like it (left half), "
             "and the photo of another\n"
             "person B driven by the same frame (right half). Error: absolute difference, and the frame's "
             "PSNR.")
    return sheet(title, head[: len(rows[0])], rows)


def principal(tokens, count):
    """PCA of tokens (n, D) -> mean (D,), orthonormal directions (k, D), deviation along each (k,), share of
    variance (k,)."""
    mean = tokens.mean(0)
    _, s, axes = torch.linalg.svd(tokens - mean, full_matrices=False)
    return mean, axes[:count], (s / (len(tokens) - 1) ** 0.5).clamp(min=1e-9)[:count], (s**2
        / (s**2).sum())[:count]


def token_pca(checkpoint):
    """PCA of tokens of many people in free motion, each direction pointing to where the factor grows that it
    correlates with most -> mean, axes (k, D), deviations, shares (k,), scores (n, k) in deviations, motion
    (n, M), correlations (k, M)."""
    ids = HELD_OUT + 10_000 + torch.arange(FRAMES["pca"])
    motion = random_motion(ids)
    tokens = encode(checkpoint, render_batched(random_identity(ids), motion, checkpoint.meta["size"])).cpu()
    mean, axes, deviations, shares = principal(tokens, DIRECTIONS)
    scores = (tokens - mean) @ axes.T / deviations
    correlations = torch.stack([metrics.correlation(scores[:, k: k + 1].expand_as(motion), motion)
                                for k in range(len(axes))])
    # (k, 1)
    sign = torch.where(correlations.gather(1, correlations.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    return SimpleNamespace(mean=mean, axes=sign * axes, deviations=deviations, shares=shares,
                           scores=scores * sign.T, motion=motion, correlations=sign * correlations)


def directions(checkpoint, photo, pca):
    """The token of photo (3, H, W) moved along each direction, painted."""
    m_ref, side, rows = encode(checkpoint, photo[None]), [], []
    for k, near in enumerate(pca.correlations):
        # (n, L*D)
        motions = m_ref + (torch.tensor(STEPS)[:, None] * pca.deviations[k] * pca.axes[k]).to(m_ref)
        frames = decode_clip(checkpoint, photo, motions, checkpoint.meta["steps"], 0)
        rows.append([tile(x) for x in (*frames, difference(frames[0], frames[-1], GAIN / 2))])
        most = [f"{NAMES[j]} {near[j]:+.2f}" for j in near.abs().topk(2).indices.tolist()]
        side.append(f"{k + 1}: {pca.shares[k]:.1%} of variance\n\n{most[0]}\n({most[1]})")
    title = (f"A photo's token moved along each principal direction (sd: standard deviations) of the tokens "
             f"of {len(pca.motion)}\n"
             "unseen synthetic people. Left: the true motion factors that correlate most with the place "
             "along it, and how much.")
    return sheet(title, [*(f"{x:+d} sd" if x else "as it is" for x in STEPS),
                         f"change, first\nto last, x {GAIN / 2:g}"], rows, side)


def trajectories(checkpoint, pca):
    """Draw a clip's tokens along the directions of the factors SHOWN over time, and all frames on the first
    two.

    -> figure of matplotlib, 1200 x 640 pixels.
    """
    clip, yaw = random_clip(torch.tensor([HELD_OUT]), FRAMES["speech"]), pca.motion[:, NAMES.index("yaw")]
    motion = clip["motion"][0]                                                                        # (F, M)
    tokens = encode(checkpoint, render_batched(clip["identity"][0], motion, checkpoint.meta["size"])).cpu()
    path = (tokens - pca.mean) @ pca.axes.T / pca.deviations                                          # (F, k)
    fig = charts.figure(1200, 640)
    left, right = fig.subfigures(1, 2)
    left.suptitle("An unseen synthetic person speaks: the tokens along the principal direction that carries\n"
                  "each factor, and the factor itself (both scaled to mean 0 and standard deviation 1)")
    seconds = torch.arange(len(path)) / FPS
    for name, ax in zip(SHOWN, left.subplots(len(SHOWN), 1, sharex=True), strict=True):
        j = NAMES.index(name)
        k = pca.correlations[:, j].abs().argmax().item()
        curves = torch.stack([motion[:, j], path[:, k] * pca.correlations[k, j].sign()])              # (2, F)
        curves = (curves - curves.mean(1, keepdim=True)) / curves.std(1, keepdim=True).clamp(min=1e-6)
        ax.plot(seconds, curves[0], color="tab:orange", label=f"true {name}")
        ax.plot(seconds, curves[1], color="navy", label=f"token, direction {k + 1}")
        ax.set_title(f"correlation {metrics.correlation(*curves[:, :, None]).item():.2f}", loc="right",
                     fontsize="medium")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, frameon=False)
    ax.set_xlabel("time (s)")
    right.suptitle(f"One frame each of {len(yaw)} synthetic people, coloured by the true yaw\n"
                   "Black: the frames of the speaking clip")
    ax = right.subplots()
    degrees = torch.rad2deg(yaw)
    limit = degrees.abs().max().item()
    points = ax.scatter(*pca.scores[:, :2].T, c=degrees, s=8, cmap="coolwarm", vmin=-limit, vmax=limit)
    ax.plot(*path[:, :2].T, color="black")
    ax.set(xlabel="direction 1 (standard deviations)", ylabel="direction 2", xlim=(-2.6, 2.6),
           ylim=(-2.6, 2.6))
    right.colorbar(points, label="yaw (degrees)")
    return fig


def attention_weights(attention, x):
    """Weights of an attention layer whose input is x (B, n, E) -> (B, heads, n, n); rows sum to one."""
    q, k, _ = attention.project(x)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def token_attention(encoder, z):
    """Pictures z (B, C, H, W) -> what each layer's motion token attends to, (B, depth, N+L): patches, then
    tokens. Mean over heads (and motion tokens)."""
    weights, tokens = [], encoder.config.num_tokens
    def keep(layer, given, _):
        weights.append(attention_weights(layer, *given)[:, :, -tokens:])

    hooks = [block.attention.register_forward_hook(keep) for block in encoder.blocks]
    encoder(z)
    for hook in hooks:
        hook.remove()
    return torch.stack([x.mean((1, 2)) for x in weights], 1)


def attention(checkpoint, frames):
    """frames (n, 3, H, W), a row each: the frame, then each layer's attention laid over it."""
    z, c = checkpoint.space.encode(frames.to(checkpoint.device)), checkpoint.encoder.config
    weights = token_attention(checkpoint.encoder, z).float().cpu()
    maps = weights[..., : -c.num_tokens].unflatten(2, (c.image_size // c.patch_size, -1))  # (n, depth, h, w)
    smooth = F.interpolate(maps, size=frames.shape[-2:], mode="bicubic").clamp(min=0)
    smooth = heat(smooth / smooth.amax((2, 3), keepdim=True))                            # (n, depth, 3, H, W)
    rows = [[tile(x), *(tile(0.45 * x + 0.55 * m + 0.1, f"{share:.0%}") for m,
                        share in zip(*layers, strict=True))]
            for x, *layers in zip(frames, smooth, maps.amax((2, 3)), strict=True)]
    title = ("Where the motion token looks in each layer of the encoder: its attention to the\n"
             "frame's patches, mean over heads. White: the patch that gets most, and its share.")
    return sheet(title, ["frame", *(f"layer {k + 1}" for k in range(maps.shape[1]))], rows)


def main(argv=None):
    """-> exit status: 0, or 2 after one sentence about what cannot be used."""
    p = argparse.ArgumentParser(prog="python -m measure.pictures", description=__doc__.split("\n")[0],
                                allow_abbrev=False)
    p.add_argument("--ckpt", default=str(WEIGHTS / "semo-tiny.safetensors"),
                   help="weights (default: the embedded)")
    p.add_argument("--out", default="pictures", help="folder for the four PNG files (default: %(default)s)")
    p.add_argument("--data", help="a folder made by data.py prepare, its test split (default: the synthetic "
                                  "world)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    args, began = p.parse_args(argv), time.time()
    try:
        charts.require()                                            # refuse before the work
        with torch.inference_mode():
            checkpoint = open_checkpoint(args, "encoder", "decoder")
            clips = test_clips(args, checkpoint.meta["size"])
            pca = token_pca(checkpoint)
            images = {"errors": errors(checkpoint, clips),
                      "directions": directions(checkpoint, clips[-2][0][0], pca),
                    "trajectories": charts.to_image(trajectories(checkpoint, pca)),
                    "attention": attention(checkpoint, torch.stack([frames[-1] for frames, *_ in clips]))}
        for name, image in images.items():
            with atomic_write(Path(args.out) / f"{name}.png", make_folder=True) as temporary:
                image.save(temporary, format="PNG", optimize=True)
    except InputError as error:
        print(f"measure.pictures: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {', '.join(f'{name}.png' for name in images)}; {time.time() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
