"""Clips that were never trained on, of the synthetic world or real, and the tables of what is made of them.

    test_clips --a command of evaluate.py--> Rows: pictures beside true ones --picture_metrics--> tables

A clip, or of real people a person, counts once; intervals are of their mean.
"""
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from measure import landmarks, metrics, perceptual, reader
from measure.checkpoint import cell, render_batched, summary, table
from measure.metrics import NAMES
from media import prepared
from media.image import to_uint8
from media.sound import SAMPLES_PER_FRAME
from world.people import HELD_OUT, random_clip
from world.render import face_box

# length of a clip in frames by command (of each person, for probe)
FRAMES = {"reconstruct": 50, "masked": 50, "probe": 8, "talk": 150, "steps": 100, "emotion": 75}
SILENCE = "digital silence"                                        # row of talk that it reads by itself


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
    people = prepared.load_set(args.data, "test", sound=sound)
    each = 1 if args.command == "emotion" else None                                    # clips of a person
    manifest = [entry for person in sorted(people) for entry in people[person][:each]]
    drawn = torch.randperm(len(manifest), generator=torch.Generator().manual_seed(0))[:args.clips]
    manifest = [manifest[k] for k in sorted(drawn.tolist())]
    for number, entry in enumerate(tqdm(manifest, unit="clip", disable=None)):
        images, wave = prepared.read_clip(entry["path"], size)
        images = images[:length]
        face = entry.get("face", perceptual.FACE)
        left, top, right, bottom = (round(size * share) for share in face)
        box = torch.zeros(len(images), size, size)
        box[:, max(0, top):bottom, max(0, left):right] = 1
        clip = SimpleNamespace(number=number, id=entry["file"], person=entry["identity"], images=images,
                               wave=wave[None, : len(images) * SAMPLES_PER_FRAME] if sound else None,
                               box=box, face=face, motion=None)
        if args.landmarks:
            clip.large = prepared.read_clip(entry["path"], landmarks.SIZE)[0][:length]
            clip.wide = prepared.read_at(entry["path"], [0], landmarks.SIZE, margin=True)[0]
        yield clip


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


def person_mean(clips):
    """Average the measures of one person's clips, [{name: number}, ...] -> {name: number}."""
    return {name: sum(measured[name] for measured in clips) / len(clips) for name in clips[0]}


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
    nets, absent = perceptual.load(args.networks, checkpoint.device)
    for c in test_clips(args, size, sound):
        rows = rows_of(c, clips)
        clips.append(SimpleNamespace(id=c.id, person=c.person, photo=c.images[0], wave=c.wave,
                                     wide=getattr(c, "wide", None)))
        for name, scores in (landmark_scores(args, c, rows) if args.landmarks else {}).items():
            by_mesh.setdefault(name, []).append((c.person, scores))
        for x in rows:
            if x.name != SILENCE:
                by_network.setdefault(x.name, []).append(network_metrics(nets, c, x, sound))
            if x.target is not None:
                measured = metrics.compare(x.pred, x.target, x.box, patch)
                by_row.setdefault(x.name, {}).setdefault(c.person, []).append(measured)
            if x.motion is not None:
                read.setdefault(x.name, []).append(read_motion(x.pred))
                commanded.setdefault(x.name, []).append(x.motion)
    ids, people = [c.id for c in clips], {c.person for c in clips}
    rows = {name: summary([person_mean(of_one) for of_one in by_person.values()])
            for name, by_person in by_row.items()}
    print(f"{len(ids)} clips of {len(people)} unseen people of {args.data or 'the synthetic world'}, "
          f"{size} px; face: the box round the head; mean [95%]")
    pictures_table(rows)
    if nets:
        networks_table(by_network, rows)
    mesh = landmarks_table(by_mesh, size) if by_mesh else {}
    print(*absent, sep="\n")
    return SimpleNamespace(rows=rows, read=read, commanded=commanded, clips=clips, ids=ids,
                           read_motion=read_motion, landmarks=mesh)


def read_faces(args, clips):
    """Read clips [(n, 3, H, W)] with the face mesh, all enlarged to its size -> [{factor: (n,)}]."""
    frames = torch.cat([F.interpolate(x.float(), landmarks.SIZE, mode="bicubic") for x in clips])
    frames = to_uint8(frames).permute(0, 2, 3, 1).contiguous().numpy()
    curves = landmarks.read(frames, args.landmarks)
    ends = np.cumsum([len(x) for x in clips])[:-1]
    return [{name: np.split(curve, ends)[k] for name, curve in curves.items()} for k in range(len(clips))]


def landmark_scores(args, c, rows):
    """Compare what the face mesh reads from a clip's rows [Row] with what it reads from the clip at 256 px.

    So the row `true frames` is the ceiling at the model's size. -> {row: landmarks.scores and row.numbers}.
    """
    rows = [x for x in rows if x.name != "the same with frame 0"]
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
    lines = []
    for name, entry in rows.items():
        cells = [name]
        for factor in landmarks.FACTORS:
            cells += cell(entry[factor + "_correlation"], 2, True) + cell(entry[factor + "_amplitude"], 2)
        for key, digits in (("opening_near", 2), ("opening_lag", 1), ("opening_concordance", 2),
                            ("blinks_a_minute", 1), ("blink_f1", 2)):
            cells += cell(entry[key], digits)
        lines.append([*cells, f"{entry['no_face']['value']:.1%}"])
    table(["", *(text for name in landmarks.FACTORS for text in (name, "", "ampl")),
           "+-1", "lag", "concord", "blinks/min", "F1", "no face"], lines)
    print("\nhead: standard deviation of the angles, degrees")
    keys = ["yaw_std", "pitch_std"] + ["seam"] * any("seam" in entry for entry in rows.values())
    table(["", *keys], [[name, *(cell(entry.get(k), 2)[0] for k in keys)] for name, entry in rows.items()])
    if "silence_opening" in rows.get("ours", {}):
        names = ("silence_opening", "photo_opening", "shut_opening")
        print("opening of the mouth in digital silence, after 0.2 s: {}; in the photo: {}; lowest tenth of "
              "the true clip: {}".format(*(cell(rows["ours"][name], 3)[0] for name in names)))
    if "other sound" in rows:
        other = [scores["opening_error"] for _, scores in by_mesh["other sound"]]
        own = [scores["opening_error"] for _, scores in by_mesh["ours"]]
        gain = float(np.nanmean(other) / np.nanmean(own[-len(other):]))          # the first has no other
        print(f"audio gain {gain:.3f}: error of the opening with another recording's sound, divided by that "
              f"with its own")
        rows["ours"]["audio_gain"] = {"value": gain, "low": None, "high": None}
    return rows


def network_metrics(nets, c, row, sound):
    """Measure a Row of clip c -> {measure: number; for FID and FVD the features of pred and of target}."""
    values, paired = {}, nets if row.target is not None else {}
    if "lpips" in paired:
        values["lpips"] = nets["lpips"](row.pred, row.target).mean().item()
    if "csim" in nets:
        photo = c.images[0] if row.photo is None else row.photo
        values["csim"] = nets["csim"](photo[None], row.pred, c.face).mean().item()
    if "syncnet" in paired and sound:
        values |= {k: v for k, v in nets["syncnet"](row.pred, c.wave, c.face).items() if k != "offset"}
    for name, distance in (("inception", "FID"), ("i3d", "FVD")):
        if name in paired:
            values[distance] = [nets[name](x) for x in (row.pred, row.target)]
    return values


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


def networks_table(by_network, rows):
    """Print what the networks measured, {row: [network_metrics() of each clip]}, and add it to `rows`.

    Of true frames the Frechet distance is that of every other clip to the rest: as near as clips come.
    """
    measures = list({k: None for values in by_network.values() for clip in values for k in clip})
    lines = []
    for name, values in by_network.items():
        line, entry = [name], rows.setdefault(name, {})
        for k in measures:
            if k not in values[0]:
                line.append("-")
            elif k not in ("FID", "FVD"):
                entry[k] = metrics.interval([clip[k] for clip in values])
                line += cell(entry[k], 3)
            else:
                pred, target = ([clip[k][column] for clip in values] for column in (0, 1))
                if name == "true frames":
                    pred, target = pred[::2], pred[1::2]
                a, b = (torch.cat(x) if x else torch.zeros(0, 1) for x in (pred, target))
                enough, clips = min(len(a), len(b)) > 1, min(len(pred), len(target))
                entry[k.lower()] = distance = perceptual.frechet(a, b) if enough else None
                few = ": few" if clips < perceptual.FEW else ""
                line.append(f"{distance:.1f} (n={clips} clips{few})" if enough else "too few")
        lines.append(line)
    print()
    table(["", *measures], lines)


def motion_table(result, factors=NAMES):
    """Print how far motion read off picture_metrics' frames follows the commanded -> {row: {factor: r}}."""
    rows = {name: dict(zip(NAMES, metrics.motion_correlation(x, result.commanded[name]), strict=True))
            for name, x in result.read.items()}
    if rows:
        ceiling = " (true frames: the reader's ceiling)" if "true frames" in rows else ""
        print(f"\nmotion read off the frames, correlation with the commanded within clips{ceiling}")
        table(["", *rows],
              [[factor, *(f"{entry[factor]:.3f}" for entry in rows.values())] for factor in factors])
    return rows
