"""What the method can do, in numbers, on people and speech that were never trained on: of the synthetic
world, or real.

    python -m measure.evaluate reconstruct    pictures from one photo and tokens (table 2); B moved as A
    python -m measure.evaluate masked         the same, the encoder seeing 100% to 10% (figure 10)
    python -m measure.evaluate talk           pictures from photo and sound (tables 3, 4); the mouth
    python -m measure.evaluate probe          how much motion, and how much identity, is linear in the token
    python -m measure.evaluate steps          what fewer sampling steps cost, and how straight the paths are
    python -m measure.evaluate emotion        does the face show the wished emotion (emotions.py)?
    python -m measure.evaluate text           what --emotion-text makes of 7 names and 20 everyday phrases

Tables and figures are the paper's. --data DIR: reconstruct, masked, talk and emotion on real people, of the
test split of a folder of data.py prepare. Each prints a table; --json FILE also writes its numbers and the
clips they are of. All is measured on raw frames, before any video coding, beside its floor (copying the
photo) and its ceiling (true frames). A clip, or of real people a person, counts once; intervals are of their
mean. Where the true motion is known, it is also read off the frames (reader.py); of real people, --landmarks
reads mouth, lids and head pose with a face mesh (landmarks.py).
"""
import sys
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import flow
import sample
from emotion import TEXT_MODEL
from measure import emotions, landmarks, metrics, reader
from measure.checkpoint import (
    cell,
    command_parser,
    decode_clip,
    encode,
    generate,
    open_checkpoint,
    render_batched,
    speech_features,
    summary,
    table,
    write_json,
)
from measure.clips import FRAMES, SILENCE, Row, motion_table, picture_metrics, test_clips
from measure.metrics import NAMES
from media.compose import Composer
from media.device import autocast
from media.face import Square
from media.files import InputError, command
from media.sound import FPS, SAMPLE_RATE
from training import step_rng
from world.people import HELD_OUT, random_clip, random_motion
from world.render import face_box, random_identity

# --clips of each command (people, for probe and emotion)
CLIPS = {"reconstruct": 24, "masked": 12, "probe": 600, "talk": 12, "steps": 6, "emotion": 12}
STEPS = (1, 2, 4, 8, 20)
MASKS = (0.0, 0.3, 0.5, 0.7, 0.9)


def step_label(n):
    return f"{n} step{'s' * (n > 1)}"


# ---- the commands: each returns what it prints -------------------------------------------------------------

def reconstruct(args):
    """Show a clip's later frames from its first frame as the photo and their tokens; another person so moved.

    Synthetic: the photo of the next person B, against the true B. Real, with --landmarks: that of the person
    before, of whom no truth is known, and whether the pasted square shows.
    """
    checkpoint = open_checkpoint(args, "encoder", "decoder")
    size, shipped = checkpoint.meta["size"], args.steps or checkpoint.meta["steps"]

    def rows_of(c, earlier):
        photo, target, tokens, motion = c.images[0], c.images[1:], encode(checkpoint, c.images), c.motion
        later = None if motion is None else motion[1:]
        pred = {n: decode_clip(checkpoint, photo, tokens, n, c.number) for n in dict.fromkeys((shipped, 4))}
        rows = [Row("true frames", target, target, c.box[1:], later),
                *(Row(f"ours, {step_label(n)}", x[1:], target, c.box[1:], later) for n, x in pred.items()),
                Row("the same with frame 0", pred[shipped], c.images, c.box),
                Row("copy the photo", photo.expand_as(target), target, c.box[1:])]
        others = [x for x in earlier if x.person != c.person] if args.landmarks else []
        if others:
            b = next(x for x in others if x.person == others[-1].person)       # the person before, first clip
            pred = decode_clip(checkpoint, b.photo, tokens[1:], shipped, c.number)
            rows.append(Row("another person", pred, photo=b.photo, numbers={"seam": seam(checkpoint, b, c)}))
        if motion is None:
            return rows
        other = random_clip(torch.tensor([c.id + 1]), FRAMES["reconstruct"])
        b = other["identity"][0]
        photo, box = render_batched(b, other["motion"][0, :1], size)[0], face_box(b, later, size)
        b_target = render_batched(b, later, size)
        b_pred = decode_clip(checkpoint, photo, tokens[1:], shipped, c.number)
        return [*rows, Row(f"B as A, {step_label(shipped)}", b_pred, b_target, box, later, photo),
                Row("copy B's photo", photo.expand_as(b_target), b_target, box, photo=photo)]

    result = picture_metrics(args, checkpoint, rows_of)
    return {"rows": result.rows, "motion_correlation": motion_table(result), "ids": result.ids,
            "landmarks": result.landmarks}


def seam(checkpoint, b, c):
    """Measure the border of b's face square in b's picture moved as 8 frames of c -> metrics.seam_ratio."""
    middle, edge = len(b.wide) / 2, (len(b.wide) - landmarks.SIZE) // 2
    composer = Composer(b.wide, Square(middle, middle, landmarks.SIZE))
    video = c.images[torch.linspace(0, len(c.images) - 1, 8).long()]
    moved = sample.reenact(vars(checkpoint), checkpoint.meta, b.photo, iter(video), composer=composer)
    return metrics.seam_ratio(np.stack(list(moved)), b.wide, edge, landmarks.SIZE)


def masked(args):
    """Reconstruct from tokens of frames, and a photo, of which the encoder sees only a part."""
    checkpoint, rng = open_checkpoint(args, "encoder", "decoder"), step_rng(5, 0, 0)

    def rows_of(c, _):
        target, rows = c.images[1:], []
        later = None if c.motion is None else c.motion[1:]
        for ratio in MASKS:
            tokens = encode(checkpoint, c.images, ratio, rng)
            pred = decode_clip(checkpoint, c.images[0], tokens[1:], args.steps or checkpoint.meta["steps"],
                               c.number, tokens[:1])
            rows.append(Row(f"{ratio:.0%} masked", pred, target, c.box[1:], later))
        return [*rows, Row("copy the photo", c.images[:1].expand_as(target), target, c.box[1:])]

    result = picture_metrics(args, checkpoint, rows_of)
    return {"rows": result.rows, "motion_correlation": motion_table(result, ("yaw", "jaw", "blink_l")),
            "ids": result.ids}


def probe(args):
    """Regress every factor on the token, on people that neither the encoder nor the regression has seen."""
    checkpoint, each = open_checkpoint(args, "encoder"), FRAMES["probe"]
    number = torch.arange(args.clips).repeat_interleave(each)                               # (n,) whose frame
    people, motion = random_identity(HELD_OUT + number), random_motion(HELD_OUT + torch.arange(len(number)))
    tokens, rng = {ratio: [] for ratio in (0.0, 0.5, 0.9)}, step_rng(2, 0, 0)
    for part in tqdm(torch.arange(len(number)).split(50), unit="batch", disable=None):
        images = render_batched(people[part], motion[part], checkpoint.meta["size"])
        for ratio in tokens:
            tokens[ratio].append(encode(checkpoint, images, ratio, rng))
    r2 = {f"{ratio:.0%} masked": metrics.probe_tokens(torch.cat(x), motion, people, number)
          for ratio, x in tokens.items()}
    means = {name: {"motion": sum(m.values()) / len(m), "identity": sum(i.values()) / len(i)}
             for name, (m, i) in r2.items()}
    m, i = r2["0% masked"]
    print(f"linear probe of the token, R^2 on unseen people ({args.clips} people, {each} frames each)")
    columns = [[[name, f"{value:.3f}"] for name, value in part.items()] for part in (m, i)]
    table(["motion", "R^2", "identity", "R^2"], [a + b for a, b in zip_longest(*columns, fillvalue=["", ""])])
    print()
    table(["mean R^2", *means],
          [[kind, *(f"{x[kind]:.3f}" for x in means.values())] for kind in ("motion", "identity")])
    return {"motion": m, "identity": i, "means": means}


def animate(checkpoint, photo, wave, gen_steps, steps, seed):
    """Do the whole job on photo (3, H, W) and sound (1, S) -> frames (n, 3, H, W), their tokens (n, L*D)."""
    tokens = generate(checkpoint, photo, wave, seed, gen_steps)
    return decode_clip(checkpoint, photo, tokens, steps, seed), tokens


def talk(args):
    """Animate a clip's first frame by its sound; `other sound`: by another clip's, against its own truth."""
    checkpoint, jumps = open_checkpoint(args, "encoder", "decoder", "generator"), []
    num_steps = args.steps or checkpoint.meta["gen_steps"], args.steps or checkpoint.meta["steps"]

    def rows_of(c, earlier):
        def row_of(name, pred, motion=None):
            n = min(len(pred), len(c.images))                # a file's sound may be shorter than its pictures
            return Row(name, pred[:n], c.images[:n], c.box[:n], motion if motion is None else motion[:n])

        photo, other = c.images[0], earlier[-1].wave if earlier else None
        if not args.data:
            other = random_clip(torch.tensor([c.id + 1]), FRAMES["talk"])["wave"]
        ours, tokens = animate(checkpoint, photo, c.wave, *num_steps, c.number)
        jumps.append(start_jump(tokens, encode(checkpoint, c.images)))
        rows = [row_of("true frames", c.images, c.motion), row_of("ours", ours, c.motion)]
        if other is not None:
            pred, _ = animate(checkpoint, photo, other, *num_steps, c.number)
            rows.append(row_of("other sound", pred, c.motion))
        rows.append(row_of("copy the photo", photo.expand_as(c.images)))
        if args.landmarks:
            silence = torch.zeros(1, SAMPLE_RATE)
            rows.append(Row(SILENCE, animate(checkpoint, photo, silence, *num_steps, c.number)[0]))
        return rows

    result = picture_metrics(args, checkpoint, rows_of, sound=True)
    start = summary(jumps)
    print("\nstep from the photo's token to the first frame's, in median steps from one true frame to the "
          f"next: {' '.join(cell(start['ours'], 2, True))}; true frames: {cell(start['true frames'], 2)[0]}")
    report = {"pictures": result.rows, "ids": result.ids, "start_jump": start}
    if args.data:
        return {"rows": {}, **report, "landmarks": result.landmarks}
    return report | mouth_tables(checkpoint, result, num_steps)


def start_jump(tokens, true_tokens):
    """Distance of the first of tokens (n, L*D), and of the second of true_tokens, from the photo's, the first
    of true_tokens (F, L*D), in median distances of true neighbours."""
    steps = true_tokens.diff(dim=0).norm(dim=1)
    usual = steps.median().clamp(min=1e-6)
    return {"ours": ((tokens[0] - true_tokens[0]).norm() / usual).item(),
            "true frames": (steps[0] / usual).item()}


def mouth_tables(checkpoint, result, num_steps):
    """Print mouth and head as the regressor reads them off the frames of picture_metrics() and of silence."""
    mouth = {name: summary([metrics.sync(*pair) for pair in zip(x, result.commanded[name], strict=True)])
             for name, x in result.read.items()}
    jaw_in_silence = {}
    for number, clip in enumerate(result.clips):
        noise = torch.randn(1, 2 * SAMPLE_RATE, generator=step_rng(4, 0, clip.id))
        for name, wave in ((SILENCE, 0 * noise), ("noise at -60 dB", 1e-3 * noise)):
            motion = result.read_motion(animate(checkpoint, clip.photo, wave, *num_steps, number)[0])
            jaw = motion[FPS // 2:, NAMES.index("jaw")]             # after half a second to close the mouth
            jaw_in_silence.setdefault(name, []).append({"jaw_mean": jaw.mean().item()})
    silence_mouth = {name: summary(clips) for name, clips in jaw_in_silence.items()}
    print("\nmouth read off the frames against the true")
    table(["correlation [95%]", "jaw", "", "best lag", "frames", "lip width", "", "best lag", "frames"],
          [[name, *(text for part in ("jaw", "lip_width") for text in
                    [*cell(r[part], 3, True), *cell(r[part + "_best"], 3), *cell(r[part + "_lag"], 1)])]
           for name, r in mouth.items()])
    print("\nwhat the sound does not decide (head: standard deviation in degrees), and how open the mouth is "
          "(0 to 1)")
    keys = ("yaw_std", "pitch_std", "roll_std", "blinks_per_minute", "jaw_mean")
    table(["", *keys], [[name, *(cell(r[k], 2)[0] if k in r else "" for k in keys)]
                        for name, r in (mouth | silence_mouth).items()])
    return {"rows": mouth, "silence": silence_mouth}


def steps(args):
    """Vary the steps: of the decoder, as in `reconstruct`; of the generator, the mouth as in `talk`."""
    checkpoint = open_checkpoint(args, "encoder", "decoder", "generator")
    read_motion = reader.load_regressor(args.reader)
    size, mouth, by_steps = checkpoint.meta["size"], [NAMES.index("jaw"), NAMES.index("lip_width")], {}
    for c in test_clips(args, size):
        tokens = encode(checkpoint, c.images)
        for n in STEPS:
            frames = decode_clip(checkpoint, c.images[0], tokens, n, c.id)
            jaw, lip_width = metrics.correlation(read_motion(frames)[:, mouth], c.motion[:, mouth]).tolist()
            talking, _ = animate(checkpoint, c.images[0], c.wave, n, checkpoint.meta["steps"], c.id)
            speech = metrics.sync(read_motion(talking), c.motion)
            by_steps.setdefault(n, []).append({
                "psnr": metrics.psnr(frames, c.images).mean().item(),
                "face_psnr": metrics.psnr(frames, c.images, c.box).mean().item(),
                "jaw": jaw, "lip_width": lip_width, "talk_jaw": speech["jaw"],
                "talk_lip_width": speech["lip_width"], "yaw_std": speech["yaw_std"],
                "blinks": speech["blinks_per_minute"]})
    paths = straightness(checkpoint, c, tokens)
    rows = {n: summary(clips) for n, clips in by_steps.items()}
    print(f"{args.clips} unseen people and recordings of {FRAMES['steps'] / FPS:g} s, {size} px; "
          f"correlations read off the frames")
    table(["steps", "decoder: PSNR", "face PSNR", "jaw", "lip width", "generator: jaw", "lip width",
           "yaw std", "blinks/min"],
          [[str(n), *(cell(r[k], 3 if "jaw" in k or "lip" in k else 2)[0] for k in r)]
           for n, r in rows.items()])
    print(f"straightness of the paths (0: straight): decoder {paths['decoder']:.4f}, generator "
          f"{paths['generator']:.4f}")
    return {"rows": {str(n): r for n, r in rows.items()}, "straightness": paths}


def straightness(checkpoint, c, tokens):
    """Measure how straight the sampling paths of decoder and generator are on clip c of tokens (n, L*D)."""
    def noise(number, *shape):
        return torch.randn(*shape, generator=step_rng(1, 0, number)).to(checkpoint.device)

    g, shape = checkpoint.generator.config, (checkpoint.decoder.config.num_tokens, -1)
    features = speech_features(checkpoint, c.wave)[:, : g.rows]
    with autocast(checkpoint.device):
        z_r, m_t = checkpoint.space.encode(c.images[:1].to(checkpoint.device)), tokens.unflatten(1, shape)
        decoder_path = metrics.straightness(
            checkpoint.decoder, noise(0, len(tokens), *z_r.shape[1:]), m_t=m_t,
            cache=checkpoint.decoder.encode_reference(z_r, m_t[:1]))
        generator_path = metrics.straightness(
            flow.with_cfg(checkpoint.generator, checkpoint.meta["guidance"], {"audio": None}),
            noise(1, 1, g.window, tokens.shape[1]), past=tokens[None, : g.past], reference=tokens[:1],
            audio=features.to(checkpoint.device))
    return {"decoder": decoder_path.mean().item(), "generator": generator_path.mean().item()}


def emotion(args):
    """Show wished emotions on people of the synthetic world, or on real photos."""
    return emotions.real_people(args) if args.data else emotions.synthetic_people(args)


COMMANDS = {"reconstruct": reconstruct, "masked": masked, "talk": talk, "probe": probe, "steps": steps,
            "emotion": emotion, "text": emotions.words}


def parse(argv):
    p = command_parser("evaluate", __doc__)
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("--steps", type=int, help="sampling steps (default: as released)")
    p.add_argument("--clips", type=int, help=f"test clips; for probe and emotion people (default: {CLIPS})")
    p.add_argument("--data", help="reconstruct, masked, talk, emotion: the test split of a folder of data.py "
                                  "prepare (default: synthetic)")
    p.add_argument("--networks", help="folder of published networks, for LPIPS, FID, FVD, Sync-C, Sync-D, "
                                      "CSIM, expressions (perceptual.py)")
    p.add_argument("--landmarks", nargs="?", const=sys.executable, metavar="PYTHON",
                   help="reconstruct, talk, emotion with --data: read mouth, lids and head pose with "
                        "MediaPipe's face mesh; PYTHON: the interpreter that has it, if not this one "
                        "(requirements-measure.txt)")
    p.add_argument("--text-model", default=TEXT_MODEL,
                   help="text: the encoder that reads the words, hub id or folder (default: %(default)s)")
    p.add_argument("--json", help="also write the numbers to this file")
    p.add_argument("--reader", default=str(reader.WEIGHTS), help="weights of the motion reader")
    args = p.parse_args(argv)
    if args.data and args.command in ("probe", "steps", "text"):
        p.error(f"--data is not for {args.command}, which needs what is not known of real clips")
    if args.landmarks and (not args.data or args.command not in ("reconstruct", "talk", "emotion")):
        p.error("--landmarks is for reconstruct, talk and emotion with --data")
    if args.command == "emotion" and args.data and not (args.landmarks or args.networks):
        p.error("emotion with --data needs --landmarks, --networks or both: of real clips no mood is known")
    if args.clips is None and not args.data:
        args.clips = CLIPS.get(args.command)
    least = 10 if args.command == "probe" else 1
    if any(number is not None and number < low for number, low in ((args.clips, least), (args.steps, 1))):
        p.error(f"--clips must be at least {least}, --steps at least 1")
    return args


@command("measure.evaluate")
def main(argv=None):
    args, start = parse(argv), time.time()
    if args.networks and not Path(args.networks).is_dir():
        raise InputError(f"--networks {args.networks} is no folder; give one that holds published networks "
                         f"(README)")
    with torch.inference_mode():
        result = COMMANDS[args.command](args)
    if args.json:
        write_json(args.json, {"command": args.command, "ckpt": args.ckpt, "clips": args.clips,
                               "steps": args.steps, **result})
    print(f"\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
