"""What the method can do, in numbers, on people and speech that were never trained on: of the synthetic
world, or real.

    python -m measure.evaluate reconstruct [--ckpt F]
        pictures from one photo and tokens (paper: table 2); B doing what A does
    python -m measure.evaluate masked [--ckpt F]
        the same, the encoder seeing 100% to 10% of each frame (paper: figure 10)
    python -m measure.evaluate talk [--ckpt F]
        pictures from photo and sound (paper: tables 3, 4); does the mouth say it?
    python -m measure.evaluate probe [--ckpt F]
        the token: how much motion, and how much identity, is linear in it
    python -m measure.evaluate steps [--ckpt F]
        what fewer sampling steps cost, and how straight the paths are
    python -m measure.evaluate emotion [--ckpt F]
        does the face feel what it is told (emotions.py)

--data DIR: reconstruct, masked and talk on real people, of the test split of a folder of data.py prepare.
Each prints a table; --json FILE also writes its numbers and the clips they are of. All is measured on raw
frames, before any video coding, beside its floor (copying the photo; the nearest training frame) and its
ceiling (true frames). A clip, or of real people a person, counts once; intervals are of their mean. Where the
true motion is known, it is also read off the frames (reader.py); of real people, --landmarks reads mouth,
lids and head pose with a face mesh (landmarks.py).
"""
import argparse
import json
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
from generator import generate_motion
from measure import emotions, landmarks, metrics, perceptual, reader
from measure.checkpoint import (
    WEIGHTS,
    cell,
    decode_clip,
    encode,
    open_checkpoint,
    render_batched,
    summary,
    table,
)
from measure.metrics import NAMES
from media import audio_features
from media.device import autocast
from media.files import InputError, atomic_write
from media.image import to_uint8
from media.sound import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from training import step_rng
from world.people import HELD_OUT, random_clip, random_motion
from world.render import face_box, random_identity

# --clips of each command (people, for probe), and the length of a clip in frames (of each person, for probe)
CLIPS = {"reconstruct": 24, "masked": 12, "probe": 600, "talk": 12, "steps": 6, "emotion": 24}
FRAMES = {"reconstruct": 50, "masked": 50, "probe": 8, "talk": 150, "steps": 100}
STEPS = (1, 2, 4, 8, 20)
MASKS = (0.0, 0.3, 0.5, 0.7, 0.9)
PAPER = {"reconstruct": "Paper, table 2 (256 px, other clips, L1 of an unknown scale): PSNR, SSIM, L1, "
                        "LPIPS, FID, FVD on HDTF 29.12, "
                        "0.912, 57.8, 0.043, 21.4, 136.7; DH-FaceVid-1K 32.13, 0.914, 51.4, 0.036, 22.0, "
                        "112.2; MEAD 36.23, 0.949, "
                        "44.5, 0.019, 23.5, 71.0",
         "talk": "Paper, tables 3 and 4 (256 px, other clips): PSNR, SSIM, LPIPS, FID, FVD on DH-FaceVid-1K "
                 "22.95, 0.768, 0.095, "
                 "27.7, 206.5; HDTF 21.99, 0.739, 0.111, 26.9, 218.4, with Sync-C 6.147, Sync-D 8.574"}


# ---- clips, and the rows of a table of pictures ------------------------------------------------------------

def test_clips(args, size, sound=False):
    """Clips that training never saw, one after the other: number, id, who, images (n, 3, H, W), box (n, H, W)
    of the face, and motion (n, M) where it is known, with sound wave (1, S)."""
    if not args.data:
        for seed in tqdm(range(HELD_OUT, HELD_OUT + args.clips), unit="clip", disable=None):
            factors = random_clip(torch.tensor([seed]), FRAMES[args.command])
            motion, person = factors["motion"][0], factors["identity"][0]
            yield SimpleNamespace(number=seed - HELD_OUT, id=seed, who=seed,
                                  images=render_batched(person, motion, size),
                                  box=face_box(person, motion, size), wave=factors["wave"], motion=motion,
                                  face=perceptual.FACE)
        return
    people, = data.load_sets([args.data], "test", sound=sound)
    manifest_rows = [entry for person in sorted(people) for entry in people[person]][:args.clips]
    for number, entry in enumerate(tqdm(manifest_rows, unit="clip", disable=None)):
        images, wave = data.read_clip(entry["path"], size)
        images = images[:FRAMES["talk" if args.landmarks else args.command]]        # blinks need seconds
        face = entry.get("face", perceptual.FACE)
        left, top, right, bottom = (round(size * share) for share in face)
        box = torch.zeros(len(images), size, size)
        box[:, max(0, top):bottom, max(0, left):right] = 1
        wave = wave[None, : len(images) * SAMPLES_PER_FRAME] if sound else None
        large = data.read_clip(entry["path"], landmarks.SIZE)[0][:len(images)] if args.landmarks else None
        yield SimpleNamespace(number=number, id=entry["file"], who=entry["identity"], images=images, box=box,
                              wave=wave, motion=None, face=face, large=large)


def training_frames(args, size, count=1000):
    """Frames that training may have seen, (count, 3, H, W) as bytes: of the synthetic world, or of a folder's
    train split."""
    if not args.data:
        ids = torch.arange(count)
        return to_uint8(render_batched(random_identity(ids), random_motion(ids), size))
    people, = data.load_sets([args.data], "train")
    manifest_rows = [entry for person in sorted(people) for entry in people[person]]
    manifest_rows = tqdm(manifest_rows[:: -(-len(manifest_rows) // (count // 5))], desc="training frames",
                         unit="clip", disable=None)
    frames = [data.read_at(entry["path"], range(0, entry["frames"], -(-entry["frames"] // 5)), size)
              for entry in manifest_rows]
    return torch.cat([torch.from_numpy(x).permute(0, 3, 1, 2) for x in frames])


def nearest_in(bank):
    """bank (k, 3, H, W) bytes -> function: true frames (n, 3, H, W) -> the frame of the bank closest to each,
    seen at 16 x 16."""
    def shrink(images):
        return F.interpolate(images.float(), size=(16, 16), mode="area").flatten(1)

    bank_small = torch.cat([shrink(part) for part in bank.split(50)])      # once, and few as floats at a time
    return lambda target: bank[torch.cdist(shrink((target + 1) * 127.5), bank_small).argmin(1)] / 127.5 - 1


@dataclass
class Row:
    """Pictures of one clip in a row of a table: pred against target (n, 3, H, W), box (n, H, W) of the face.

    motion (n, M): the commanded one, where it is known and is to be read off pred. Without target, pred is
    only read by the face mesh (--landmarks).
    """
    name: str
    pred: torch.Tensor
    target: torch.Tensor | None = None
    box: torch.Tensor | None = None
    motion: torch.Tensor | None = None


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


def picture_metrics(args, checkpoint, rows_of, sound=False):
    """Measure pictures against true ones, and print the tables.

    rows_of(clip, earlier) -> [Row] of each unseen clip; earlier: id, who, photo (the first frame) and wave of
    the clips before it. -> SimpleNamespace: rows {row: measures}, read {row: [(n, M)]} and commanded {row:
    [(n, M)]} where motion is known, clips (id, who, photo, wave of all), ids, read_motion (the regressor),
    landmarks.
    """
    by_row, by_network, by_mesh, read, commanded, clips = {}, {}, {}, {}, {}, []
    size = checkpoint.meta["size"]
    patch = checkpoint.decoder.config.patch_size * checkpoint.space.factor
    read_motion = None if args.data else reader.load_regressor(args.reader)
    nets, absent = perceptual.load(args.networks, checkpoint.device) if args.networks else ({}, [])
    for c in test_clips(args, size, sound):
        rows, cache = rows_of(c, clips), FeatureCache()
        clips.append(SimpleNamespace(id=c.id, who=c.who, photo=c.images[0], wave=c.wave))
        for name, scores in (landmark_scores(args, c, rows) if args.landmarks else {}).items():
            by_mesh.setdefault(name, []).append((c.who, scores))
        for row in rows:
            if row.target is None:
                continue
            measured = metrics.compare(row.pred, row.target, row.box, patch)
            by_row.setdefault(row.name, {}).setdefault(c.who, []).append(measured)
            by_network.setdefault(row.name, []).append(network_metrics(nets, c, row, cache, sound))
            if row.motion is not None:
                read.setdefault(row.name, []).append(read_motion(row.pred))
                commanded.setdefault(row.name, []).append(row.motion)
    ids, people = [c.id for c in clips], {c.who for c in clips}
    rows = {name: summary([person_mean(of_one) for of_one in by_person.values()]) for name,
            by_person in by_row.items()}
    print(f"{len(ids)} clips of {len(people)} unseen people of {args.data or 'the synthetic world'}, {size} "
          f"px; "
          "face: the box round the head; mean [95%]")
    pictures_table(rows)
    if nets:
        networks_table(by_network, rows)
    mesh = landmarks_table(by_mesh, size) if by_mesh else {}
    print(PAPER.get(args.command, ""))
    hint = [] if nets else ["LPIPS, FID, FVD, Sync and CSIM need published networks: --networks DIR"]
    print(*(absent or hint), sep="\n")
    return SimpleNamespace(rows=rows, read=read, commanded=commanded, clips=clips, ids=ids,
                           read_motion=read_motion, landmarks=mesh)


def landmark_scores(args, c, rows):
    """Compare what a face mesh reads from a clip's rows [Row] with what it reads from the clip.

    All frames are read at 256 px, rows enlarged; the target is the clip at that size, so that the row `true
    frames` is the ceiling at the model's size. -> {row: landmarks.scores}, with the rows of c.reenacted {row:
    pred}.
    """
    first = int(args.command == "reconstruct")                      # its rows begin after the photo
    unread = "the same with frame 0", "nearest training frame"
    pred = {row.name: row.pred for row in rows if row.name not in unread}
    clips = [c.large[first:], *(F.interpolate(x.float(), landmarks.SIZE, mode="bicubic")
                                for x in pred.values())]
    frames = to_uint8(torch.cat(clips)).permute(0, 2, 3, 1).contiguous().numpy()
    try:
        curves = landmarks.read(frames, args.landmarks)
    except ValueError as error:
        raise InputError(str(error)) from None
    ends = np.cumsum([len(x) for x in clips])[:-1]
    target, *read = ({k: np.split(curve, ends)[n] for k, curve in curves.items()} for n in range(len(clips)))
    return {name: landmarks.scores({k: curve[:len(x["opening"])] for k, curve in target.items()}, x)
            for name, x in zip(pred, read, strict=True)}


def landmarks_table(by_mesh, size):
    """Print what the face mesh read, {row: [(person, scores) of each clip]} -> {row: landmarks.summary}."""
    rows = {name: landmarks.summary([scores for _, scores in x], [who for who, _ in x]) for name,
            x in by_mesh.items()}
    print(f"\nread by a face mesh at {landmarks.SIZE} px (true frames: reduced to {size} px, the ceiling); "
          f"median over people: "
          "correlation [95%],\nampl(itude): ratio of standard deviations; of the opening also the "
          "correlation within 1 frame, "
          "lag, concord(ance)")
    print(*landmarks.lines(rows), sep="\n")
    if "other sound" in rows:
        other = [scores["opening_error"] for _, scores in by_mesh["other sound"]]
        # the first clip has no other
        own = [scores["opening_error"] for _, scores in by_mesh["ours"][-len(other):]]
        gain = float(np.nanmean(other) / np.nanmean(own))
        print(f"audio gain {gain:.3f}: error of the opening with another recording's sound, divided by that "
              f"with its own")
        rows["ours"]["audio_gain"] = {"value": gain, "low": None, "high": None}
    return rows


def network_metrics(nets, c, row, cache, sound):
    """Ask the networks of perceptual.py about a Row of clip c -> {measure: number}.

    For Frechet distances the features of its pred and target, by the clip's FeatureCache.
    """
    values = {}
    if "lpips" in nets:
        values["lpips"] = nets["lpips"](row.pred, row.target).mean().item()
    if "csim" in nets:
        values["csim"] = nets["csim"](row.target[:1], row.pred, c.face).mean().item()
    if "syncnet" in nets and sound:
        values |= {k: v for k, v in nets["syncnet"](row.pred, c.wave, c.face).items() if k != "offset"}
    for name in {"inception", "i3d"} & nets.keys():
        values[name] = [cache(name, nets[name], x) for x in (row.pred, row.target)]
    return values


def networks_table(by_network, rows):
    """Print what the networks said, {row: [network_metrics() of each clip]}, and add it to rows {row:
    measures}.

    Of the true frames the Frechet distance is that of every other clip to the rest: as near as different
    clips come.
    """
    measures = {k: None for values in by_network.values() for clip in values for k in clip}
    lines = []
    for name, values in by_network.items():
        line = [name]
        for k in measures:
            if k in ("inception", "i3d"):
                pred, target = ([clip[k][column] for clip in values] for column in (0, 1))
                if name == "true frames":
                    pred, target = pred[::2], pred[1::2]
                a, b = (torch.cat(x) if x else torch.zeros(0, 1) for x in (pred, target))
                enough = min(len(a), len(b)) > 1
                rows[name]["fid" if k == "inception" else "fvd"] = perceptual.frechet(a,
                    b) if enough else None
                line.append(perceptual.frechet_text(a, b, min(len(pred), len(target))) if enough
                            else "too few")
            else:
                rows[name][k] = metrics.interval([clip[k] for clip in values])
                line += cell(rows[name][k], 3)
        lines.append(line)
    print()
    table(["", *({"inception": "FID", "i3d": "FVD"}.get(k, k) for k in measures)], lines)


def motion_table(result, factors=NAMES):
    """The motion read off a measurement's frames against the commanded, printed -> {row: {factor:
    correlation}}."""
    rows = {name: dict(zip(NAMES, metrics.motion_correlation(x, result.commanded[name]), strict=True))
            for name, x in result.read.items()}
    if rows:
        ceiling = " (true frames: the reader's ceiling)" if "true frames" in rows else ""
        print(f"\nmotion read off the frames, correlation with the commanded within clips{ceiling}")
        table(["", *rows], [[factor, *(f"{entry[factor]:.3f}" for entry in rows.values())]
                            for factor in factors])
    return rows


def step_label(n):
    return f"{n} step{'s' * (n > 1)}"


# ---- the commands: each returns what it prints -------------------------------------------------------------

def reconstruct(args):
    """A clip's own first frame as the photo, all later frames from their tokens; then, where the truth of it
    is known, the photo of the next person B, moved as A moves, against the true B."""
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
        if args.landmarks:                                       # the person before, moved as this one moves
            others = [x for x in earlier if x.who != c.who]
            for other in [x for x in others if x.who == others[-1].who][:1]:
                pred = decode_clip(checkpoint, other.photo, tokens[1:], shipped, c.number)
                rows.append(Row("another person", pred))
        if motion is None:
            return rows
        other = random_clip(torch.tensor([c.id + 1]), FRAMES["reconstruct"])
        b = other["identity"][0]
        photo, box = render_batched(b, other["motion"][0, :1], size)[0], face_box(b, later, size)
        b_target = render_batched(b, later, size)
        b_pred = decode_clip(checkpoint, photo, tokens[1:], shipped, c.number)
        return [*rows, Row(f"B as A, {step_label(shipped)}", b_pred, b_target, box, later),
                Row("copy B's photo", photo.expand_as(b_target), b_target, box)]

    result = picture_metrics(args, checkpoint, rows_of)
    return {"rows": result.rows, "motion_correlation": motion_table(result), "ids": result.ids,
            "landmarks": result.landmarks}


def masked(args):
    """Reconstruction from tokens of frames, and a photo, of which the encoder sees only a part."""
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
    """L1 in brackets: on pictures from 0 to 255."""
    def text(k, value):
        if "l1" in k:
            return [f"{value['mean']:.4f} ({255 * value['mean']:.1f})"]
        return cell(value, 4 if "ssim" in k else 2, "psnr" in k)

    table(["", "PSNR", "", "SSIM", "L1 (x 255)", "face PSNR", "", "face SSIM", "face L1", "sharpness",
           "blockiness"],
          [[name, *(part for k in entry for part in text(k, entry[k]))] for name, entry in rows.items()])


def probe(args):
    """Ridge regression from the token to every factor, on people that neither the encoder nor the regression
    has seen."""
    checkpoint, each = open_checkpoint(args, "encoder"), FRAMES["probe"]
    number = torch.arange(args.clips).repeat_interleave(each)                               # (n,) whose frame
    people, motion = random_identity(HELD_OUT + number), random_motion(HELD_OUT + torch.arange(len(number)))
    tokens, rng = {ratio: [] for ratio in (0.0, 0.5, 0.9)}, step_rng(2, 0, 0)
    for part in tqdm(torch.arange(len(number)).split(50), unit="batch", disable=None):
        images = render_batched(people[part], motion[part], checkpoint.meta["size"])
        for ratio in tokens:
            tokens[ratio].append(encode(checkpoint, images, ratio, rng))
    r2 = {f"{ratio:.0%} masked": metrics.probe_tokens(torch.cat(x), motion, people, number) for ratio,
          x in tokens.items()}
    means = {name: {"motion": sum(m.values()) / len(m), "identity": sum(i.values()) / len(i)} for name,
             (m, i) in r2.items()}
    m, i = r2["0% masked"]
    print(f"linear probe of the token, R^2 on unseen people ({args.clips} people, {each} frames each)")
    listed = [[[name, f"{value:.3f}"] for name, value in part.items()] for part in (m, i)]
    table(["motion", "R^2", "identity", "R^2"], [a + b for a, b in zip_longest(*listed, fillvalue=["", ""])])
    print()
    table(["mean R^2", *means], [[kind, *(f"{x[kind]:.3f}" for x in means.values())]
                                 for kind in ("motion", "identity")])
    return {"motion": m, "identity": i, "means": means}


def animate(checkpoint, photo, wave, gen_steps, steps, seed):
    """The whole job on photo (3, H, W) and sound (1, S) -> frames (n, 3, H, W), before any video coding."""
    meta = checkpoint.meta
    sounds = audio_features.normalise_loudness(wave), torch.zeros(1, SAMPLES_PER_FRAME)
    features, silence_features = (audio_features.extract_features(x, meta["audio"], meta.get("whisper"))[0]
                                  for x in sounds)                                                    # (F, A)
    m_ref = encode(checkpoint, photo[None])
    with autocast(checkpoint.device):
        motions = list(generate_motion(checkpoint.generator, m_ref, iter([features]), step_rng(3, 0, seed),
                                       silence_features[0], gen_steps, meta["guidance"]))
    return decode_clip(checkpoint, photo, torch.cat(motions), steps, seed)


def talk(args):
    """The photo is a clip's first frame, the sound the clip's; `other sound` is another clip's, against this
    one's truth."""
    checkpoint = open_checkpoint(args, "encoder", "decoder", "generator")
    size = checkpoint.meta["size"]
    num_steps = args.steps or checkpoint.meta["gen_steps"], args.steps or checkpoint.meta["steps"]
    nearest = nearest_in(training_frames(args, size))

    def rows_of(c, earlier):
        def row(name, pred, motion=None):
            n = min(len(pred), len(c.images))                # a file's sound may be shorter than its pictures
            pred, target = (x if len(x) == n else x[:n] for x in (pred, c.images))
            return Row(name, pred, target, c.box[:n], motion if motion is None else motion[:n])

        photo, other = c.images[0], earlier[-1].wave if earlier else None
        if not args.data:
            other = random_clip(torch.tensor([c.id + 1]), FRAMES["talk"])["wave"]
        rows = [row("true frames", c.images, c.motion),
                row("ours", animate(checkpoint, photo, c.wave, *num_steps, c.number), c.motion)]
        if other is not None:
            rows.append(row("other sound", animate(checkpoint, photo, other, *num_steps, c.number), c.motion))
        return [*rows, row("copy the photo", photo.expand_as(c.images)),
                row("nearest training frame", nearest(c.images))]

    result = picture_metrics(args, checkpoint, rows_of, sound=True)
    if args.data:
        return {"rows": {}, "pictures": result.rows, "ids": result.ids, "landmarks": result.landmarks}
    mouth = {name: summary([metrics.sync(*pair) for pair in zip(x, result.commanded[name], strict=True)])
             for name, x in result.read.items()}
    jaw_in_silence = {}
    for number, clip in enumerate(result.clips):
        noise = torch.randn(1, 2 * SAMPLE_RATE, generator=step_rng(4, 0, clip.id))
        for name, wave in (("digital silence", 0 * noise), ("noise at -60 dB", 1e-3 * noise)):
            motion = result.read_motion(animate(checkpoint, clip.photo, wave, *num_steps, number))
            jaw = motion[FPS // 2:, NAMES.index("jaw")]             # after half a second to close the mouth
            jaw_in_silence.setdefault(name, []).append({"jaw_mean": jaw.mean().item()})
    silence_mouth = {name: summary(clips) for name, clips in jaw_in_silence.items()}
    print("\nmouth read off the frames against the true")
    table(["correlation [95%]", "jaw", "", "best lag", "frames", "lip width", "", "best lag", "frames"],
          [[name, *cell(r["jaw"], 3, True), *cell(r["jaw_best"], 3), *cell(r["jaw_lag"], 1),
            *cell(r["lip_width"], 3, True),
            *cell(r["lip_width_best"], 3), *cell(r["lip_width_lag"], 1)] for name, r in mouth.items()])
    print("\nwhat the sound does not decide (head: standard deviation in degrees), and how open the mouth is "
          "(0 to 1)")
    keys = ("yaw_std", "pitch_std", "roll_std", "blinks_per_minute", "jaw_mean")
    table(["", *keys], [[name, *(cell(r[k], 2)[0] if k in r else "" for k in keys)] for name,
                        r in (mouth | silence_mouth).items()])
    return {"rows": mouth, "silence": silence_mouth, "pictures": result.rows, "ids": result.ids}


def steps(args):
    """Decoder: self-reconstruction as in `reconstruct`. Generator: the mouth as in `talk`, its frames painted
    as released."""
    checkpoint, read_motion = open_checkpoint(args, "encoder", "decoder",
                                              "generator"), reader.load_regressor(args.reader)
    size, meta, mouth = checkpoint.meta["size"], checkpoint.meta, [NAMES.index(name)
                                                                   for name in ("jaw", "lip_width")]
    tokens_of, by_steps = (checkpoint.decoder.config.num_tokens, checkpoint.decoder.config.token_dim), {}
    for c in test_clips(args, size):
        tokens = encode(checkpoint, c.images)
        for n in STEPS:
            frames = decode_clip(checkpoint, c.images[0], tokens, n, c.id)
            follows = metrics.correlation(read_motion(frames)[:, mouth], c.motion[:, mouth]).tolist()
            says = metrics.sync(read_motion(animate(checkpoint, c.images[0], c.wave, n, meta["steps"], c.id)),
                                c.motion)
            by_steps.setdefault(n, []).append({
                "psnr": metrics.psnr(frames, c.images).mean().item(),
                "face_psnr": metrics.psnr(frames, c.images, c.box).mean().item(),
                "jaw": follows[0], "lip_width": follows[1], "talk_jaw": says["jaw"],
                "talk_lip_width": says["lip_width"],
                "yaw_std": says["yaw_std"], "blinks": says["blinks_per_minute"]})
    with autocast(checkpoint.device):                                        # the last clip's paths
        z_r = checkpoint.space.encode(c.images[:1].to(checkpoint.device))
        cache = checkpoint.decoder.encode_reference(z_r, tokens[:1].unflatten(1, tokens_of))
        noise = torch.randn(len(tokens), *z_r.shape[1:], generator=step_rng(1, 0, 0)).to(checkpoint.device)
        m_t = tokens.unflatten(1, tokens_of)
        paths = {"decoder": flow.straightness(checkpoint.decoder, noise, m_t=m_t, cache=cache).mean().item()}
        g, wave = checkpoint.generator.config, audio_features.normalise_loudness(c.wave)
        rows = audio_features.extract_features(wave, meta["audio"], meta.get("whisper"))[0]
        noise = torch.randn(1, g.window, tokens.shape[1], generator=step_rng(1, 0, 1)).to(checkpoint.device)
        model = flow.with_cfg(checkpoint.generator, meta["guidance"], {"audio": None})
        window_features = rows[: g.past + g.window + g.lookahead][None].to(checkpoint.device)
        cond = {"past": tokens[None, : g.past], "reference": tokens[:1], "audio": window_features}
        paths["generator"] = flow.straightness(model, noise, **cond).mean().item()
    rows = {n: summary(clips) for n, clips in by_steps.items()}
    print(f"{args.clips} unseen people and recordings of {FRAMES['steps'] / FPS:g} s, {size} px; "
          f"correlations read off the frames")
    table(["steps", "decoder: PSNR", "face PSNR", "jaw", "lip width", "generator: jaw", "lip width",
           "yaw std", "blinks/min"],
          [[str(n), *(cell(r[k], 3 if "jaw" in k or "lip" in k else 2)[0] for k in r)] for n,
           r in rows.items()])
    print(f"straightness of the paths (0: straight): decoder {paths['decoder']:.4f}, generator "
          f"{paths['generator']:.4f}")
    return {"rows": {str(n): r for n, r in rows.items()}, "straightness": paths}


COMMANDS = {"reconstruct": reconstruct, "masked": masked, "talk": talk, "probe": probe, "steps": steps,
            "emotion": emotions.emotion}


def parse(argv):
    p = argparse.ArgumentParser(prog="python -m measure.evaluate", description=__doc__.split("\n")[0],
                                allow_abbrev=False)
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("--ckpt", default=str(WEIGHTS / "semo-tiny.safetensors"),
                   help="weights (default: the embedded)")
    p.add_argument("--steps", type=int, help="sampling steps (default: as released)")
    p.add_argument("--clips", type=int, help=f"unseen clips, or for probe people (default: {CLIPS})")
    p.add_argument("--data", help="reconstruct, masked, talk: the test split of a folder of data.py prepare "
                                  "(default: synthetic)")
    p.add_argument("--networks", help="folder of published networks, for LPIPS, FID, FVD, Sync-C, Sync-D, "
                                      "CSIM (perceptual.py)")
    p.add_argument("--landmarks", nargs="?", const=sys.executable, metavar="PYTHON",
                   help="reconstruct, talk with --data: read mouth, lids and head pose with MediaPipe's face "
                        "mesh; PYTHON: the "
                        "interpreter that has it, if not this one (requirements-measure.txt)")
    p.add_argument("--json", help="also write the numbers to this file")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    p.add_argument("--reader", default=str(reader.WEIGHTS), help="weights of the motion reader")
    args = p.parse_args(argv)
    if args.data and args.command in ("probe", "steps", "emotion"):
        p.error(f"--data is not for {args.command}: of real clips the true motion is not known")
    if args.landmarks and (not args.data or args.command not in ("reconstruct", "talk")):
        p.error("--landmarks is for reconstruct and talk with --data")
    if args.clips is None and not args.data:
        args.clips = CLIPS[args.command]
    least = 10 if args.command == "probe" else 1
    if any(given is not None and given < low for given, low in ((args.clips, least), (args.steps, 1))):
        p.error(f"--clips must be at least {least}, --steps at least 1")
    return args


def main(argv=None):
    """-> exit status: 0, or 2 after one sentence about what cannot be used."""
    args, began = parse(argv), time.time()
    try:
        if args.networks and not Path(args.networks).is_dir():
            raise InputError(f"--networks {args.networks} is no folder; give one that holds published "
                             f"networks (README)")
        with torch.inference_mode():
            result = COMMANDS[args.command](args)
        if args.json:
            report = {"command": args.command, "ckpt": args.ckpt, "clips": args.clips, "steps": args.steps,
                      **result}
            with atomic_write(args.json, make_folder=True) as temporary:
                Path(temporary).write_text(json.dumps(report, indent=1) + "\n")
    except InputError as error:
        print(f"measure.evaluate: {error}", file=sys.stderr)
        return 2
    print(f"\n{time.time() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
