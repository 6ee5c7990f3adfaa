"""What the method can do, in numbers, on people and speech that were never trained on: of the synthetic
world, or real.

    python -m measure.evaluate reconstruct    pictures from one photo and tokens (table 2); B moved as A
    python -m measure.evaluate masked         the same, the encoder seeing 100% to 10% (figure 10)
    python -m measure.evaluate talk           pictures from photo and sound (tables 3, 4); the mouth
    python -m measure.evaluate probe          how much motion, and how much identity, is linear in the token
    python -m measure.evaluate steps          what fewer sampling steps cost, and how straight the paths are
    python -m measure.evaluate emotion        does the face show the wished emotion (emotions.py)?

Tables and figures are the paper's. --data DIR: reconstruct, masked, talk and emotion on real people, of the
test split of a folder of data.py prepare. Each prints a table; --json FILE also writes its numbers and the
clips they are of. All is measured on raw frames, before any video coding, beside its floor (copying the
photo; the nearest training frame) and its ceiling (true frames). A clip, or of real people a person, counts
once; intervals are of their mean. Where the true motion is known, it is also read off the frames (reader.py);
of real people, --landmarks reads mouth, lids and head pose with a face mesh (landmarks.py).
"""
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import flow
import sample
from measure import emotions, landmarks, metrics, perceptual, reader
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
from measure.metrics import NAMES
from media.compose import Composer
from media.device import autocast
from media.face import Square
from media.files import InputError
from media.image import to_uint8
from media.sound import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from training import step_rng
from world.people import HELD_OUT, random_clip, random_motion
from world.render import face_box, random_identity

# --clips of each command (people, for probe and emotion), and the length of a clip in frames (of each person,
# for probe)
CLIPS = {"reconstruct": 24, "masked": 12, "probe": 600, "talk": 12, "steps": 6, "emotion": 12}
FRAMES = {"reconstruct": 50, "masked": 50, "probe": 8, "talk": 150, "steps": 100, "emotion": 75}
STEPS = (1, 2, 4, 8, 20)
MASKS = (0.0, 0.3, 0.5, 0.7, 0.9)
PAPER = {
    "reconstruct": "Paper, table 2 (256 px, other clips, L1 of an unknown scale): PSNR, SSIM, L1, LPIPS, "
                   "FID, FVD on HDTF 29.12, 0.912, 57.8, 0.043, 21.4, 136.7; DH-FaceVid-1K 32.13, 0.914, "
                   "51.4, 0.036, 22.0, 112.2; MEAD 36.23, 0.949, 44.5, 0.019, 23.5, 71.0",
    "talk": "Paper, tables 3 and 4 (256 px, other clips): PSNR, SSIM, LPIPS, FID, FVD on DH-FaceVid-1K "
            "22.95, 0.768, 0.095, 27.7, 206.5; HDTF 21.99, 0.739, 0.111, 26.9, 218.4, with Sync-C 6.147, "
            "Sync-D 8.574"}
NOT_READ = "the same with frame 0", "nearest training frame"       # rows that the face mesh does not read
SILENCE = "digital silence"                                        # row of talk that it reads by itself


# ---- clips, and the rows of a table of pictures ------------------------------------------------------------

def test_clips(args, size, sound=False):
    """Yield clips that training never saw.

    Each has number, id, person (whose it is), images (n, 3, H, W), box (n, H, W) of the face as a mask, face
    (the same as shares of the sides), and motion (n, M) where it is known; with sound wave (1, S); with
    --landmarks large (n, 3, 256, 256) and wide (W, W, 3) uint8, the first frame with its margin.
    """
    seconds_for_blinks = args.landmarks and args.command == "reconstruct"
    length = FRAMES["talk" if seconds_for_blinks else args.command]
    if not args.data:
        for seed in tqdm(range(HELD_OUT, HELD_OUT + args.clips), unit="clip", disable=None):
            factors = random_clip(torch.tensor([seed]), length)
            motion, identity = factors["motion"][0], factors["identity"][0]
            yield SimpleNamespace(number=seed - HELD_OUT, id=seed, person=seed, motion=motion,
                                  images=render_batched(identity, motion, size), wave=factors["wave"],
                                  box=face_box(identity, motion, size), face=perceptual.FACE)
        return
    people, = data.load_sets([args.data], "test", sound=sound)
    each = 1 if args.command == "emotion" else None                                    # clips of a person
    manifest = [entry for person in sorted(people) for entry in people[person][:each]][:args.clips]
    for number, entry in enumerate(tqdm(manifest, unit="clip", disable=None)):
        images, wave = data.read_clip(entry["path"], size)
        images = images[:length]
        face = entry.get("face", perceptual.FACE)
        left, top, right, bottom = (round(size * share) for share in face)
        box = torch.zeros(len(images), size, size)
        box[:, max(0, top):bottom, max(0, left):right] = 1
        clip = SimpleNamespace(number=number, id=entry["file"], person=entry["identity"], images=images,
                               wave=wave[None, : len(images) * SAMPLES_PER_FRAME] if sound else None,
                               box=box, face=face, motion=None)
        if args.landmarks:
            clip.large = data.read_clip(entry["path"], landmarks.SIZE)[0][:length]
            clip.wide = data.read_at(entry["path"], [0], landmarks.SIZE, margin=True)[0]
        yield clip


def training_frames(args, size, count=1000):
    """Draw or read frames that training may have seen -> about (count, 3, H, W) as bytes: of the synthetic
    world, or of a folder's train split."""
    if not args.data:
        ids = torch.arange(count)
        return to_uint8(render_batched(random_identity(ids), random_motion(ids), size))
    people, = data.load_sets([args.data], "train")
    manifest = [entry for person in sorted(people) for entry in people[person]]
    manifest = manifest[:: -(-len(manifest) // (count // 5))]                   # five frames of each clip
    frames = [data.read_at(entry["path"], range(0, entry["frames"], -(-entry["frames"] // 5)), size)
              for entry in tqdm(manifest, desc="training frames", unit="clip", disable=None)]
    return torch.cat([torch.from_numpy(x).permute(0, 3, 1, 2) for x in frames])


def nearest_in(bank):
    """Make the function true frames (n, 3, H, W) -> the frame of the bank closest to each, seen at 16 x 16.

    bank: (k, 3, H, W) bytes, shrunk once and few at a time.
    """
    def shrink(images):
        return F.interpolate(images.float(), size=(16, 16), mode="area").flatten(1)

    bank_small = torch.cat([shrink(part) for part in bank.split(50)])
    return lambda target: bank[torch.cdist(shrink((target + 1) * 127.5), bank_small).argmin(1)] / 127.5 - 1


@dataclass
class Row:
    """Pictures of one clip in a row of a table: pred against target (n, 3, H, W), box (n, H, W) of the face.

    motion (n, M): the commanded one, where it is known and is to be read off pred. Without target, pred is
    only read by the face mesh (--landmarks) and compared with photo (3, H, W), whose face it should show.
    numbers: other measures of the row.
    """
    name: str
    pred: torch.Tensor
    target: torch.Tensor | None = None
    box: torch.Tensor | None = None
    motion: torch.Tensor | None = None
    photo: torch.Tensor | None = None
    numbers: dict | None = None


class FeatureCache:
    """Network features of the pictures of one clip, once for each tensor: rows share their target."""

    def __init__(self):
        self.features = {}

    def __call__(self, name, network, pictures):
        key = name, id(pictures)
        if key not in self.features:
            self.features[key] = network(pictures), pictures    # kept: ids of freed tensors are reused
        return self.features[key][0]


def person_mean(clips):
    """Average the measures of one person's clips, [{name: number}, ...] -> {name: number}."""
    return {name: sum(measured[name] for measured in clips) / len(clips) for name in clips[0]}


def load_networks(args, device):
    """Load the networks of --networks -> {name: function}, and sentences about those that are absent."""
    if not args.networks:
        return {}, ["LPIPS, FID, FVD, Sync and CSIM need published networks: --networks DIR"]
    return perceptual.load(args.networks, device)


def picture_metrics(args, checkpoint, rows_of, sound=False):
    """Measure pictures against true ones, and print the tables.

    rows_of(clip, earlier) -> [Row] of each test clip; earlier: id, person, photo (the first frame), wide and
    wave of the clips before it. -> SimpleNamespace: rows {row: measures}, read {row: [(n, M)]} and commanded
    {row: [(n, M)]} where motion is known, clips (as `earlier`, all), ids, read_motion (the regressor),
    landmarks.
    """
    by_row, by_network, by_mesh, read, commanded, clips = {}, {}, {}, {}, {}, []
    size = checkpoint.meta["size"]
    patch = checkpoint.decoder.config.patch_size * checkpoint.space.factor
    read_motion = None if args.data else reader.load_regressor(args.reader)
    nets, absent = load_networks(args, checkpoint.device)
    for c in test_clips(args, size, sound):
        rows, cache = rows_of(c, clips), FeatureCache()
        clips.append(SimpleNamespace(id=c.id, person=c.person, photo=c.images[0], wave=c.wave,
                                     wide=getattr(c, "wide", None)))
        for name, scores in (landmark_scores(args, c, rows) if args.landmarks else {}).items():
            by_mesh.setdefault(name, []).append((c.person, scores))
        for row in rows:
            if row.name != SILENCE:
                by_network.setdefault(row.name, []).append(network_metrics(nets, c, row, cache, sound))
            if row.target is not None:
                measured = metrics.compare(row.pred, row.target, row.box, patch)
                by_row.setdefault(row.name, {}).setdefault(c.person, []).append(measured)
            if row.motion is not None:
                read.setdefault(row.name, []).append(read_motion(row.pred))
                commanded.setdefault(row.name, []).append(row.motion)
    ids, people = [c.id for c in clips], {c.person for c in clips}
    rows = {name: summary([person_mean(of_one) for of_one in by_person.values()])
            for name, by_person in by_row.items()}
    print(f"{len(ids)} clips of {len(people)} unseen people of {args.data or 'the synthetic world'}, "
          f"{size} px; face: the box round the head; mean [95%]")
    pictures_table(rows)
    if nets:
        networks_table(by_network, rows)
    mesh = landmarks_table(by_mesh, size) if by_mesh else {}
    print(PAPER.get(args.command, ""), *absent, sep="\n")
    return SimpleNamespace(rows=rows, read=read, commanded=commanded, clips=clips, ids=ids,
                           read_motion=read_motion, landmarks=mesh)


def read_faces(args, clips):
    """Read clips [(n, 3, H, W)] with the face mesh, all enlarged to its size -> [{factor: (n,)}]."""
    frames = torch.cat([F.interpolate(x.float(), landmarks.SIZE, mode="bicubic") for x in clips])
    frames = to_uint8(frames).permute(0, 2, 3, 1).contiguous().numpy()
    try:
        curves = landmarks.read(frames, args.landmarks)
    except ValueError as error:
        raise InputError(str(error)) from None
    ends = np.cumsum([len(x) for x in clips])[:-1]
    return [{name: np.split(curve, ends)[k] for name, curve in curves.items()} for k in range(len(clips))]


def landmark_scores(args, c, rows):
    """Compare what the face mesh reads from a clip's rows [Row] with what it reads from the clip at 256 px.

    So the row `true frames` is the ceiling at the model's size. -> {row: landmarks.scores and row.numbers}.
    """
    rows = [x for x in rows if x.name not in NOT_READ]
    first = int(args.command == "reconstruct")                      # its rows begin after the photo
    target, *curves = read_faces(args, [c.large[first:], *(x.pred for x in rows)])
    scores = {}
    for x, read in zip(rows, curves, strict=True):
        if x.name == SILENCE:
            scores["ours"] |= landmarks.silence(read["opening"], target["opening"])
        else:
            true = {name: curve[:len(x.pred)] for name, curve in target.items()}
            scores[x.name] = landmarks.scores(true, read) | (x.numbers or {})
    return scores


def landmarks_table(by_mesh, size):
    """Print what the face mesh read, {row: [(person, scores) of each clip]} -> {row: landmarks.summary}."""
    rows = {name: landmarks.summary([scores for _, scores in clips], [person for person, _ in clips])
            for name, clips in by_mesh.items()}
    print(f"\nread by a face mesh at {landmarks.SIZE} px (true frames: reduced to {size} px, the ceiling); "
          f"median over people: correlation [95%],\nampl(itude): ratio of standard deviations; of the "
          f"opening also the correlation within 1 frame, lag, concord(ance)")
    print(*landmarks.lines(rows), sep="\n")
    print("\nhead: standard deviation of the angles, degrees")
    keys = ["yaw_std", "pitch_std"] + ["seam"] * any("seam" in entry for entry in rows.values())
    table(["", *keys],
          [[name, *(landmarks.number(entry.get(k)) for k in keys)] for name, entry in rows.items()])
    if "silence_opening" in rows.get("ours", {}):
        names = ("silence_opening", "photo_opening", "shut_opening")
        print("opening of the mouth in digital silence, after 0.2 s: {}; in the photo: {}; lowest tenth of "
              "the true clip: {}".format(*(landmarks.number(rows["ours"][name], 3) for name in names)))
    if "other sound" in rows:
        other = [scores["opening_error"] for _, scores in by_mesh["other sound"]]
        own = [scores["opening_error"] for _, scores in by_mesh["ours"]]
        gain = float(np.nanmean(other) / np.nanmean(own[-len(other):]))          # the first has no other
        print(f"audio gain {gain:.3f}: error of the opening with another recording's sound, divided by that "
              f"with its own")
        rows["ours"]["audio_gain"] = {"value": gain, "low": None, "high": None}
    return rows


def network_metrics(nets, c, row, cache, sound):
    """Measure a Row of clip c by the networks of perceptual.py -> {measure: number}.

    For Frechet distances the features of its pred and target, by the clip's FeatureCache. CSIM compares with
    the photo.
    """
    values, paired = {}, nets if row.target is not None else {}
    if "lpips" in paired:
        values["lpips"] = nets["lpips"](row.pred, row.target).mean().item()
    if "csim" in nets:
        photo = c.images[0] if row.photo is None else row.photo
        values["csim"] = nets["csim"](photo[None], row.pred, c.face).mean().item()
    if "syncnet" in paired and sound:
        values |= {k: v for k, v in nets["syncnet"](row.pred, c.wave, c.face).items() if k != "offset"}
    for name in {"inception", "i3d"} & paired.keys():
        values[name] = [cache(name, nets[name], x) for x in (row.pred, row.target)]
    return values


def networks_table(by_network, rows):
    """Print what the networks measured, {row: [network_metrics() of each clip]}, and add it to rows {row:
    measures}.

    Of the true frames the Frechet distance is that of every other clip to the rest: as near as different
    clips come.
    """
    titles = {"inception": "FID", "i3d": "FVD"}
    measures = list({k: None for values in by_network.values() for clip in values for k in clip})
    lines = []
    for name, values in by_network.items():
        line, entry = [name], rows.setdefault(name, {})
        for k in measures:
            if k not in values[0]:
                line.append("-")
            elif k not in titles:
                entry[k] = metrics.interval([clip[k] for clip in values])
                line += cell(entry[k], 3)
            else:
                pred, target = ([clip[k][column] for clip in values] for column in (0, 1))
                if name == "true frames":
                    pred, target = pred[::2], pred[1::2]
                a, b = (torch.cat(x) if x else torch.zeros(0, 1) for x in (pred, target))
                enough = min(len(a), len(b)) > 1
                entry[titles[k].lower()] = perceptual.frechet(a, b) if enough else None
                clips = min(len(pred), len(target))
                line.append(perceptual.frechet_text(a, b, clips) if enough else "too few")
        lines.append(line)
    print()
    table(["", *(titles.get(k, k) for k in measures)], lines)


def motion_table(result, factors=NAMES):
    """Print how far the motion read off a measurement's frames follows the commanded -> {row: {factor:
    correlation}}."""
    rows = {name: dict(zip(NAMES, metrics.motion_correlation(x, result.commanded[name]), strict=True))
            for name, x in result.read.items()}
    if rows:
        ceiling = " (true frames: the reader's ceiling)" if "true frames" in rows else ""
        print(f"\nmotion read off the frames, correlation with the commanded within clips{ceiling}")
        table(["", *rows],
              [[factor, *(f"{entry[factor]:.3f}" for entry in rows.values())] for factor in factors])
    return rows


def step_label(n):
    return f"{n} step{'s' * (n > 1)}"


# ---- the commands: each returns what it prints -------------------------------------------------------------

def reconstruct(args):
    """Show a clip's later frames from its first frame as the photo and their tokens; then another person so
    moved.

    Synthetic: the photo of the next person B, against the true B. Real, with --landmarks: that of the person
    before, of whom no truth is known, and whether the pasted square shows.
    """
    checkpoint = open_checkpoint(args, "encoder", "decoder")
    size, shipped = checkpoint.meta["size"], args.steps or checkpoint.meta["steps"]
    nearest = nearest_in(training_frames(args, size))

    def rows_of(c, earlier):
        photo, target, tokens, motion = c.images[0], c.images[1:], encode(checkpoint, c.images), c.motion
        later = None if motion is None else motion[1:]
        pred = {n: decode_clip(checkpoint, photo, tokens, n, c.number) for n in dict.fromkeys((shipped, 4))}
        rows = [Row("true frames", target, target, c.box[1:], later),
                *(Row(f"ours, {step_label(n)}", x[1:], target, c.box[1:], later) for n, x in pred.items()),
                Row("the same with frame 0", pred[shipped], c.images, c.box),
                Row("copy the photo", photo.expand_as(target), target, c.box[1:]),
                Row("nearest training frame", nearest(target), target, c.box[1:])]
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


def seam(checkpoint, b, c, frames=8):
    """Measure the border of b's face square, put back into b's picture moved as clip c -> metrics.seam_ratio.

    frames: how many of the clip, evenly spread.
    """
    side, edge = landmarks.SIZE, (len(b.wide) - landmarks.SIZE) // 2
    composer = Composer(b.wide, Square(edge + side / 2, edge + side / 2, side))
    video = c.images[torch.linspace(0, len(c.images) - 1, frames).long()]
    moved = sample.reenact(vars(checkpoint), checkpoint.meta, b.photo, iter(video), composer=composer)
    return metrics.seam_ratio(np.stack(list(moved)), b.wide, edge, side)


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


def pictures_table(rows):
    """Print the picture measures of {row: measures}; L1 in brackets: on pictures from 0 to 255."""
    def cells(name, value):
        if "l1" in name:
            return [f"{value['mean']:.4f} ({255 * value['mean']:.1f})"]
        return cell(value, 4 if "ssim" in name else 2, "psnr" in name)

    table(["", "PSNR", "", "SSIM", "L1 (x 255)", "face PSNR", "", "face SSIM", "face L1", "sharpness",
           "blockiness"],
          [[name, *(text for k, value in entry.items() for text in cells(k, value))]
           for name, entry in rows.items()])


def probe(args):
    """Regress every factor on the token (ridge), on people that neither the encoder nor the regression has
    seen."""
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
    """Do the whole job on photo (3, H, W) and sound (1, S) -> frames (n, 3, H, W), before any video coding,
    and their tokens (n, L*D)."""
    tokens = generate(checkpoint, photo, wave, seed, gen_steps)
    return decode_clip(checkpoint, photo, tokens, steps, seed), tokens


def talk(args):
    """Animate a clip's first frame by the clip's sound; `other sound` is another clip's, against this one's
    truth."""
    checkpoint = open_checkpoint(args, "encoder", "decoder", "generator")
    size = checkpoint.meta["size"]
    num_steps = args.steps or checkpoint.meta["gen_steps"], args.steps or checkpoint.meta["steps"]
    nearest, jumps = nearest_in(training_frames(args, size)), []

    def rows_of(c, earlier):
        def row_of(name, pred, motion=None):
            n = min(len(pred), len(c.images))                # a file's sound may be shorter than its pictures
            pred, target = (x if len(x) == n else x[:n] for x in (pred, c.images))
            return Row(name, pred, target, c.box[:n], motion if motion is None else motion[:n])

        photo, other = c.images[0], earlier[-1].wave if earlier else None
        if not args.data:
            other = random_clip(torch.tensor([c.id + 1]), FRAMES["talk"])["wave"]
        ours, tokens = animate(checkpoint, photo, c.wave, *num_steps, c.number)
        jumps.append(start_jump(tokens, encode(checkpoint, c.images)))
        rows = [row_of("true frames", c.images, c.motion), row_of("ours", ours, c.motion)]
        if other is not None:
            pred, _ = animate(checkpoint, photo, other, *num_steps, c.number)
            rows.append(row_of("other sound", pred, c.motion))
        rows += [row_of("copy the photo", photo.expand_as(c.images)),
                 row_of("nearest training frame", nearest(c.images))]
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
    """Measure how far the first of tokens (n, L*D) is from the photo's, the first of true_tokens (F, L*D), in
    median distances of true neighbours; beside it the same of the true second frame."""
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
    """Decoder: self-reconstruction as in `reconstruct`. Generator: the mouth as in `talk`, its frames decoded
    as released."""
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
    features = speech_features(checkpoint, c.wave)[0][:, : g.past + g.window + g.lookahead]
    with autocast(checkpoint.device):
        z_r, m_t = checkpoint.space.encode(c.images[:1].to(checkpoint.device)), tokens.unflatten(1, shape)
        decoder_path = flow.straightness(checkpoint.decoder, noise(0, len(tokens), *z_r.shape[1:]), m_t=m_t,
                                         cache=checkpoint.decoder.encode_reference(z_r, m_t[:1]))
        generator_path = flow.straightness(
            flow.with_cfg(checkpoint.generator, checkpoint.meta["guidance"], {"audio": None}),
            noise(1, 1, g.window, tokens.shape[1]), past=tokens[None, : g.past], reference=tokens[:1],
            audio=features.to(checkpoint.device))
    return {"decoder": decoder_path.mean().item(), "generator": generator_path.mean().item()}


def emotion(args):
    """Show wished emotions on people of the synthetic world, or on real photos."""
    if not args.data:
        return emotions.synthetic_people(args)
    checkpoint = emotions.open_with_experts(args)
    nets, absent = load_networks(args, checkpoint.device)
    clips = test_clips(args, checkpoint.meta["size"], sound=True)
    report = emotions.real_people(args, checkpoint, clips, read_faces if args.landmarks else None, nets)
    print(*absent, sep="\n")
    return report


COMMANDS = {"reconstruct": reconstruct, "masked": masked, "talk": talk, "probe": probe, "steps": steps,
            "emotion": emotion}


def parse(argv):
    p = command_parser("evaluate", __doc__)
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("--steps", type=int, help="sampling steps (default: as released)")
    p.add_argument("--clips", type=int, help=f"test clips; for probe and emotion people (default: {CLIPS})")
    p.add_argument("--data", help="reconstruct, masked, talk, emotion: the test split of a folder of data.py "
                                  "prepare (default: synthetic)")
    p.add_argument("--networks", help="folder of published networks, for LPIPS, FID, FVD, Sync-C, Sync-D, "
                                      "CSIM (perceptual.py)")
    p.add_argument("--landmarks", nargs="?", const=sys.executable, metavar="PYTHON",
                   help="reconstruct, talk, emotion with --data: read mouth, lids and head pose with "
                        "MediaPipe's face mesh; PYTHON: the interpreter that has it, if not this one "
                        "(requirements-measure.txt)")
    p.add_argument("--json", help="also write the numbers to this file")
    p.add_argument("--reader", default=str(reader.WEIGHTS), help="weights of the motion reader")
    args = p.parse_args(argv)
    if args.data and args.command in ("probe", "steps"):
        p.error(f"--data is not for {args.command}: of real clips the true motion is not known")
    if args.landmarks and (not args.data or args.command not in ("reconstruct", "talk", "emotion")):
        p.error("--landmarks is for reconstruct, talk and emotion with --data")
    if args.command == "emotion" and args.data and not (args.landmarks or args.networks):
        p.error("emotion with --data needs --landmarks, --networks or both: of real clips no mood is known")
    if args.clips is None and not args.data:
        args.clips = CLIPS[args.command]
    least = 10 if args.command == "probe" else 1
    if any(number is not None and number < low for number, low in ((args.clips, least), (args.steps, 1))):
        p.error(f"--clips must be at least {least}, --steps at least 1")
    return args


def run(args):
    """Measure, print and, with --json, write. Raises InputError."""
    start = time.time()
    if args.networks and not Path(args.networks).is_dir():
        raise InputError(f"--networks {args.networks} is no folder; give one that holds published networks "
                         f"(README)")
    with torch.inference_mode():
        result = COMMANDS[args.command](args)
    if args.json:
        write_json(args.json, {"command": args.command, "ckpt": args.ckpt, "clips": args.clips,
                               "steps": args.steps, **result})
    print(f"\n{time.time() - start:.0f} s")


def main(argv=None):
    """-> exit status: 0, or 2 after one sentence about what cannot be used."""
    args = parse(argv)
    try:
        run(args)
    except InputError as error:
        print(f"measure.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
