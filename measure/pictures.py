"""What a checkpoint has learned, drawn on people that training never saw: of the synthetic world, or real.

    python -m measure.pictures [--ckpt F] [--out DIR] [--data DIR] [--device auto]

    errors.png        photo | driving frame | ours | error; then another person's photo doing the same
    directions.png    principal directions of the token: one person's token moved along each, and what each
                      has to do with
    trajectories.png  a speaking clip's tokens along such directions, beside the true motion
    attention.png     where on the face the motion token looks, in each layer of the encoder
    emotions.webp     (of weights with emotions) six emotions at growing intensity; photo and voice are calm
    conflict.webp     (with --rival) each emotion with a calm voice and with that of another emotion, by these
                      weights and by those of --rival, such as those of `measure.ablate --only emotion`

--data takes photos and driving frames from the test split of a folder of data.py prepare. What needs the true
motion (the names of the directions, the trajectories, the emotions) is of the synthetic world all the same.
"""
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from emotion import intensify
from measure import metrics
from measure.checkpoint import command_parser, decode_clip, encode, open_checkpoint, render_batched
from measure.emotions import EYE, Person, generate_moods, open_with_experts
from measure.metrics import NAMES
from media import prepared
from media.charts import new_figure, save_figure
from media.files import InputError, command
from media.image import to_uint8
from media.sound import FPS, SAMPLES_PER_FRAME
from world.people import HELD_OUT, random_clip, random_motion
from world.render import random_identity
from world.speech import EMOTIONS

FRAMES = {"clip": 100, "pca": 2000, "speech": 200}   # of a clip, for the PCA, of the trajectories
PEOPLE, DIRECTIONS = 5, 8                            # rows of errors and attention, of directions
STEPS, GAIN = (-2, -1, 0, 1, 2), 4                   # standard deviations along a direction; errors amplified
SHOWN = ("yaw", "pitch", "jaw", "blink_l")           # factors whose trajectories are drawn
INTENSITIES, FACE, MOMENT = (0, 0.5, 1, 1.5), 8, 50  # of emotions: intensities, which person, which frame


def heat(x):
    """(..., H, W) from 0 to 1 -> (..., 3, H, W) in [-1, 1]: black, red, yellow, white."""
    return torch.stack([3 * x, 3 * x - 1, 3 * x - 2], -3).clamp(0, 1) * 2 - 1


def difference(a, b, gain):
    """Mean absolute difference over the colours of two pictures (3, H, W), times gain -> heat (3, H, W)."""
    return heat(gain * (a - b).abs().mean(0) / 2)


def sheet(title, head, rows, labels=None):
    """Lay out rows of pictures, each (x (3, H, W) in [-1, 1], note), under `head`, beside `labels`.

    -> figure of matplotlib; a picture takes about 130 pixels.
    """
    width = max(135 * len(head) + (150 if labels else 0), 7 * max(map(len, title.split("\n"))))
    figure = new_figure(width, 135 * len(rows) + 90)
    figure.suptitle(title)
    for i, axes in enumerate(figure.subplots(len(rows), len(head), squeeze=False)):
        for (x, note), ax in zip(rows[i], axes, strict=True):
            ax.imshow(to_uint8(x.cpu()).permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.text(0.03, 0.04, note, color="white", transform=ax.transAxes)
            ax.set(xticks=[], yticks=[])
        if labels:
            axes[0].set_ylabel(labels[i], rotation=0, ha="right", va="center")
        if i == 0:
            for ax, text in zip(axes, head, strict=True):
                ax.set_title(text, fontsize="medium")
    return figure


def test_clips(args, size):
    """People of the test split -> [(frames (F, 3, H, W), true motion (F, M) and identity (I,), or None)]."""
    if args.data:
        people = prepared.load_set(args.data, "test")
        if len(people) < 2:
            raise InputError(f"{args.data}: one person in the test split; re-enactment needs two")
        return [(prepared.read_clip(people[name][0]["path"], size)[0][: FRAMES["clip"]], None, None)
                for name in sorted(people)[:PEOPLE]]
    clips = random_clip(HELD_OUT + torch.arange(PEOPLE), FRAMES["clip"])
    return [(render_batched(person, motion, size), motion, person)
            for motion, person in zip(clips["motion"], clips["identity"], strict=True)]


def errors(checkpoint, clips):
    """Draw each clip's photo, the frame least like it, and how that frame moves this and another's photo."""
    def error(pred, target):
        return difference(pred, target, GAIN), f"{metrics.psnr(pred[None], target[None]).item():.1f} dB"

    rows = []
    for (frames, motion, _), (photos, _, person) in zip(clips, clips[1:] + clips[:1], strict=True):
        at = (frames - frames[:1]).abs().mean((1, 2, 3)).argmax()
        token = encode(checkpoint, frames[at][None])
        ours, other = (decode_clip(checkpoint, photo, token, checkpoint.meta["steps"], 0)[0]
                       for photo in (frames[0], photos[0]))
        rows.append([(frames[0], ""), (frames[at], ""), (ours, ""), error(ours, frames[at]),
                     (photos[0], ""), (other, "")])
        if motion is not None:
            target = render_batched(person, motion[at][None], checkpoint.meta["size"])[0]
            rows[-1] += [(target, ""), error(other, target)]
    scale = f"error x {GAIN}\n(white: {100 / GAIN:.0f}%)"
    head = ["photo of A", "driving frame", "ours", scale, "photo of B", "ours: B as A", "true: B as A", scale]
    title = ("Unseen people: A's photo driven by the frame of A's clip that is least like it (left half),\n"
             "and the photo of another person B driven by the same frame (right half). "
             "Error: absolute difference, PSNR.")
    return sheet(title, head[: len(rows[0])], rows)


def token_pca(checkpoint):
    """Compute the PCA of tokens of many people in free motion.

    -> mean, axes (k, D), deviations (k,), shares (k,), scores (n, k) in deviations, motion (n, M),
    correlations (k, M). Each axis points to where the factor grows that it correlates with most.
    """
    ids = HELD_OUT + 10_000 + torch.arange(FRAMES["pca"])
    motion = random_motion(ids)
    tokens = encode(checkpoint, render_batched(random_identity(ids), motion, checkpoint.meta["size"])).cpu()
    mean = tokens.mean(0)
    _, values, axes = torch.linalg.svd(tokens - mean, full_matrices=False)
    shares, axes = (values.square() / values.square().sum())[:DIRECTIONS], axes[:DIRECTIONS]
    deviations = (values / (len(tokens) - 1) ** 0.5).clamp(min=1e-9)[:DIRECTIONS]
    scores = (tokens - mean) @ axes.T / deviations
    correlations = torch.stack([metrics.correlation(scores[:, k: k + 1].expand_as(motion), motion)
                                for k in range(len(axes))])
    strongest = correlations.gather(1, correlations.abs().argmax(1, keepdim=True))                  # (k, 1)
    sign = torch.where(strongest < 0, -1.0, 1.0)
    return SimpleNamespace(mean=mean, axes=sign * axes, deviations=deviations, shares=shares,
                           scores=scores * sign.T, motion=motion, correlations=sign * correlations)


def directions(checkpoint, photo, pca):
    """Draw photo (3, H, W) with its token moved along each principal direction."""
    m_ref, labels, rows = encode(checkpoint, photo[None]), [], []
    for k, correlations in enumerate(pca.correlations):
        changes = torch.tensor(STEPS)[:, None] * pca.deviations[k] * pca.axes[k]                    # (n, L*D)
        frames = decode_clip(checkpoint, photo, m_ref + changes.to(m_ref), checkpoint.meta["steps"], 0)
        rows.append([(x, "") for x in (*frames, difference(frames[0], frames[-1], GAIN / 2))])
        first, second = (f"{NAMES[j]} {correlations[j]:+.2f}" for j in correlations.abs().topk(2).indices)
        labels.append(f"{k + 1}: {pca.shares[k]:.1%} of variance\n\n{first}\n({second})")
    title = (f"A photo's token moved along each principal direction (sd: standard deviations)\n"
             f"of the tokens of {len(pca.motion)} unseen synthetic people. Left: the true motion factors\n"
             "that correlate most with the place along it, and how much.")
    return sheet(title, [*(f"{x:+d} sd" if x else "as it is" for x in STEPS),
                         f"change, first\nto last, x {GAIN / 2:g}"], rows, labels)


def trajectories(checkpoint, pca):
    """Draw a clip's tokens along the directions of the factors SHOWN over time, and many on the first two.

    -> figure of matplotlib, 1200 x 640 pixels.
    """
    clip, yaw = random_clip(torch.tensor([HELD_OUT]), FRAMES["speech"]), pca.motion[:, NAMES.index("yaw")]
    motion = clip["motion"][0]                                                                        # (F, M)
    tokens = encode(checkpoint, render_batched(clip["identity"][0], motion, checkpoint.meta["size"])).cpu()
    path = (tokens - pca.mean) @ pca.axes.T / pca.deviations                                          # (F, k)
    figure = new_figure(1200, 640)
    left, right = figure.subfigures(1, 2)
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
        correlation = metrics.correlation(*curves[:, :, None]).item()
        ax.set_title(f"correlation {correlation:.2f}", loc="right", fontsize="medium")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0, frameon=False)
    ax.set_xlabel("time (s)")
    right.suptitle(f"One frame each of {len(yaw)} synthetic people, coloured by the true yaw\n"
                   "Black: the frames of the speaking clip")
    ax = right.subplots()
    degrees = torch.rad2deg(yaw)
    limit = degrees.abs().max().item()
    points = ax.scatter(*pca.scores[:, :2].T, c=degrees, s=8, cmap="coolwarm", vmin=-limit, vmax=limit)
    ax.plot(*path[:, :2].T, color="black")
    ax.set(xlabel="direction 1 (standard deviations)", ylabel="direction 2")
    ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
    right.colorbar(points, label="yaw (degrees)")
    return figure


def attention_weights(attention, x):
    """Compute the weights of an attention layer with input x (B, n, E) -> (B, heads, n, n)."""
    q, k, _ = attention.project(x)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def token_attention(encoder, z):
    """Compute what each layer's motion token attends to in pictures z (B, C, H, W): patches, then tokens.

    -> (B, depth, N+L), mean over heads and motion tokens.
    """
    weights, tokens = [], encoder.config.num_tokens

    def keep(layer, given, _):
        weights.append(attention_weights(layer, *given)[:, :, -tokens:])

    hooks = [block.attention.register_forward_hook(keep) for block in encoder.blocks]
    encoder.encode_view(z)
    for hook in hooks:
        hook.remove()
    return torch.stack([x.mean((1, 2)) for x in weights], 1)


def attention(checkpoint, frames):
    """Draw frames (n, 3, H, W), a row each: the frame, then each layer's attention laid over it."""
    z, c = checkpoint.space.encode(frames.to(checkpoint.device)), checkpoint.encoder.config
    weights = token_attention(checkpoint.encoder, z).float().cpu()
    maps = weights[..., : -c.num_tokens].unflatten(2, (c.image_size // c.patch_size, -1))  # (n, depth, h, w)
    smooth = F.interpolate(maps, size=frames.shape[-2:], mode="bicubic").clamp(min=0)
    smooth = heat(smooth / smooth.amax((2, 3), keepdim=True))                            # (n, depth, 3, H, W)
    rows = []
    for x, layers, shares in zip(frames, smooth, maps.amax((2, 3)), strict=True):
        overlays = 0.45 * x + 0.55 * layers + 0.1                                        # (depth, 3, H, W)
        rows.append([(x, ""), *((m, f"{share:.0%}") for m, share in zip(overlays, shares, strict=True))])
    title = ("Where the motion token looks in each layer of the encoder: its attention to the\n"
             "frame's patches, mean over heads. White: the patch that gets most, and its share.")
    return sheet(title, ["frame", *(f"layer {k + 1}" for k in range(maps.shape[1]))], rows)


def faces(checkpoint, person, waves, moods):
    """Draw frame MOMENT of a Person who speaks waves (1 or B, S) in moods (B, 7) -> (B, 3, H, W)."""
    waves = waves[:, : (MOMENT + FPS) * SAMPLES_PER_FRAME]
    tokens = generate_moods(checkpoint, person.photo, waves, moods, person.number)[:, MOMENT]
    return decode_clip(checkpoint, person.photo, tokens, checkpoint.meta["steps"], person.number)


def emotions(checkpoint, person):
    """Draw the person on whom each emotion grows, beside the true face."""
    true = render_batched(person.identity, person.truth[:, MOMENT], checkpoint.meta["size"])
    moods = torch.stack([intensify(mood, x) for mood in EYE[1:] for x in INTENSITIES])
    drawn = faces(checkpoint, person, person.waves[:1], moods).unflatten(0, (6, -1))
    title = (f"An unseen person with a calm photo and a calm voice, {MOMENT / FPS:g} s after the start.\n"
             "Left: the true face; then by --emotion and --intensity.")
    rows = [[(x, "") for x in (true[1 + k], *drawn[k])] for k in range(6)]
    return sheet(title, ["true", *map(str, INTENSITIES)], rows, EMOTIONS[1:])


def conflict(checkpoint, rival, person):
    """Draw each emotion by two checkpoints, with a calm voice and with the voice of another emotion."""
    true = render_batched(person.identity, person.truth[:, MOMENT], checkpoint.meta["size"])
    other = torch.tensor([1 + (e + 2) % 6 for e in range(1, 7)])
    waves = torch.cat([person.waves[:1].expand(6, -1), person.waves[other]])
    drawn = [faces(c, person, waves, EYE[1:].repeat(2, 1)).unflatten(0, (2, 6)) for c in (checkpoint, rival)]
    rows = []
    for k in range(6):
        voices = "", f"{EMOTIONS[other[k]]} voice"
        pairs = [(x, note) for pair in drawn for x, note in zip(pair[:, k], voices, strict=True)]
        rows.append([(true[1 + k], ""), *pairs])
    title = ("The same words in a calm voice and in that of another emotion, by two checkpoints.\n"
             "The label at the left is what is wished.")
    return sheet(title, ["true", *("these weights\ncalm voice", "other voice"),
                         *("rival\ncalm voice", "other voice")], rows, EMOTIONS[1:])


@command("measure.pictures")
def main(argv=None):
    parser = command_parser("pictures", __doc__)
    parser.add_argument("--out", default="pictures", help="folder of the pictures (default: %(default)s)")
    parser.add_argument("--data", help="a folder of data.py prepare (default: the synthetic world)")
    parser.add_argument("--rival", metavar="F", help="other weights with emotions, for conflict.webp")
    args, start = parser.parse_args(argv), time.time()
    new_figure(1, 1)                                            # without matplotlib: refuse before the work
    with torch.inference_mode():
        checkpoint = open_checkpoint(args, "encoder", "decoder")
        rival = args.rival and open_with_experts(SimpleNamespace(ckpt=args.rival, device=args.device))
        clips = test_clips(args, checkpoint.meta["size"])
        pca = token_pca(checkpoint)
        figures = {"errors.png": errors(checkpoint, clips),
                   "directions.png": directions(checkpoint, clips[-2][0][0], pca),
                   "trajectories.png": trajectories(checkpoint, pca),
                   "attention.png": attention(checkpoint, torch.stack([frames[-1] for frames, *_ in clips]))}
        generator = getattr(checkpoint, "generator", None)
        if rival or generator and (generator.config.experts or generator.config.mood_table):
            person = Person(open_with_experts(args), None, None, FACE)
            figures["emotions.webp"] = emotions(checkpoint, person)
        if rival:
            figures["conflict.webp"] = conflict(checkpoint, rival, person)
    for name, figure in figures.items():
        save_figure(figure, Path(args.out) / name)
    print(f"{args.out}: {', '.join(figures)}; {time.time() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
