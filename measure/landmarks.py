"""Read mouth, lids and head pose from frames with MediaPipe's face mesh, and compare two readings of a clip.

    python measure/landmarks.py FRAMES.npy CURVES.npz    (F, 256, 256, 3) uint8 -> a curve (F,) per factor

MediaPipe needs numpy < 2 (requirements-measure.txt), so it may live in an environment of its own:
`read(frames, python)` runs this file with that interpreter, so it imports nothing else of this repository.

Each frame is detected afresh with the attention mesh (478 points, lips and eyes refined). A correlation is
undefined (nan) where the true factor does not move; it is 0 where only the generated one does not move, or
where fewer than half of the frames have a face, so that neither a still mouth nor a broken face can drop out
of a median.
"""
import os
import subprocess
import sys
import tempfile

import numpy as np

SIZE = 256              # px, of the frames that are read
FPS = 25
LEAST = 8               # frames that both curves need
REACH = 3               # frames: largest lag, and the largest distance of two blinks that match
SHUT = 0.55             # of the clip's 80th percentile: lids nearer together than this are a blink
FACTORS = ("opening", "width", "lids", "yaw", "pitch")
MEASURES = ("correlation", "near", "amplitude", "concordance", "best", "lag", "error")
COUNTS = ("frames", "missing", "true_blinks", "blinks", "matched")


# ---- frames -> curves ----

def factors(points):
    """Compute the factors from mesh points.

    points: (F, 478, 3) in pixels, nan where no face. -> {factor: (F,)}: opening d(13, 14) / d(10, 152),
    width d(61, 291) / d(10, 152), lids (mean over the eyes of gap / width), distances in the picture plane;
    yaw and pitch in degrees; corners: how far the mouth's corners are above the middle of the lips, along
    the face, / d(10, 152).
    """
    def gap(a, b):
        return np.linalg.norm(points[:, a, :2] - points[:, b, :2], axis=1)

    def tilt(a, b):                                     # out of the picture plane, whatever the roll
        along = points[:, b] - points[:, a]
        return np.degrees(np.arctan2(along[:, 2], np.hypot(along[:, 0], along[:, 1])))

    face = gap(10, 152)                                 # forehead to chin
    upwards = points[:, 10, :2] - points[:, 152, :2]
    raised = (points[:, [61, 291], :2] - points[:, [13, 14], :2]).mean(1)
    return {"opening": gap(13, 14) / face, "width": gap(61, 291) / face,
            "lids": (gap(159, 145) / gap(33, 133) + gap(386, 374) / gap(362, 263)) / 2,
            "yaw": tilt(234, 454), "pitch": tilt(10, 152), "corners": (raised * upwards).sum(1) / face**2}


def detect(frames):
    """Read the factors of each frame (F, 256, 256, 3) uint8 RGB -> {factor: (F,)}, nan where no face is."""
    try:
        from mediapipe.python.solutions.face_mesh import FaceMesh
    except ImportError as error:
        sys.exit(f"reading faces needs mediapipe==0.10.21 ({error}); give --landmarks an interpreter that "
                 "has it: an environment with requirements-measure.txt")
    points = np.full((len(frames), 478, 3), np.nan)
    with FaceMesh(static_image_mode=True, max_num_faces=1, refine_landmarks=True) as mesh:
        for k, frame in enumerate(frames):
            faces = mesh.process(np.ascontiguousarray(frame)).multi_face_landmarks
            if faces:
                points[k] = [(p.x, p.y, p.z) for p in faces[0].landmark]
    return factors(points * SIZE)


def read(frames, python):
    """Run `detect` in a process of the interpreter `python`. Raises InputError with its last line."""
    from media.files import InputError  # not found where this file is run by `python`
    if frames.dtype != np.uint8 or frames.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; give uint8 (F, {SIZE}, {SIZE}, 3)")
    with tempfile.TemporaryDirectory() as folder:
        frames_path, curves_path = os.path.join(folder, "frames.npy"), os.path.join(folder, "curves.npz")
        np.save(frames_path, frames)
        try:
            command = [python, os.path.abspath(__file__), frames_path, curves_path]
            process = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise InputError(f"--landmarks {python} cannot be run: {error.strerror}") from None
        if process.returncode:
            errors = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
            raise InputError(f"--landmarks {python}: {errors[-1]}")
        with np.load(curves_path) as curves:
            return dict(curves)


# ---- two curves of a clip -> numbers ----

def pair(true, pred):
    """Select the frames that both curves have -> true, pred (n,); None where too few are known to judge."""
    known, both = np.isfinite(true), np.isfinite(true) & np.isfinite(pred)
    if known.sum() < LEAST or np.ptp(true[known]) < 1e-9:
        return None
    if both.sum() < max(LEAST, known.sum() / 2):
        return true[known], np.zeros(known.sum())       # a face that is not there does not follow
    return true[both], pred[both]


def correlation(true, pred):
    """Compute Pearson's correlation of curves (F,): nan where `true`, 0 where only `pred` does not move."""
    known = pair(true, pred)
    if known is None or np.ptp(known[0]) < 1e-9:
        return np.nan
    return 0.0 if np.ptp(known[1]) < 1e-9 else float(np.corrcoef(*known)[0, 1])


def follow(true, pred):
    """Compare two curves (F,) of one clip.

    -> correlation at lag 0; near: the best within 1 frame; amplitude: ratio of standard deviations;
    concordance (Lin 1989: also mean and amplitude must agree); best: the best correlation within REACH
    frames, at `lag` (> 0: late); error: root of the mean squared difference.
    """
    known = pair(true, pred)
    if known is None:
        return dict.fromkeys(MEASURES, np.nan)
    by_lag = {}
    for lag in sorted(range(-REACH, REACH + 1), key=abs):
        late, early = max(lag, 0), max(-lag, 0)
        r = correlation(true[early: len(true) - late], pred[late: len(pred) - early])
        if np.isfinite(r):
            by_lag[lag] = r
    best = max(by_lag, key=by_lag.get, default=0)
    a, b = known
    disagreement = a.var() + b.var() + (a.mean() - b.mean()) ** 2
    return {"correlation": by_lag.get(0, np.nan),
            "near": max((r for lag, r in by_lag.items() if abs(lag) < 2), default=np.nan),
            "amplitude": float(b.std() / a.std()),
            "concordance": float(2 * np.cov(a, b, bias=True)[0, 1] / disagreement),
            "best": by_lag.get(best, np.nan), "lag": float(best) if np.ptp(b) > 1e-9 else np.nan,
            "error": float(np.sqrt(np.mean((a - b) ** 2)))}


def blinks(lids):
    """Find the blinks of a clip, lids (F,) -> the frame of each where the lids are nearest together."""
    if not np.isfinite(lids).any():
        return []
    shut = np.nan_to_num(lids, nan=np.inf) < SHUT * np.nanpercentile(lids, 80)
    shut = np.concatenate([[False], shut, [False]])
    edges = np.flatnonzero(shut[1:] != shut[:-1])
    return [int(start + np.argmin(lids[start:end])) for start, end in edges.reshape(-1, 2)]


def matches(true, pred):
    """Count the blinks (frames, in order) of `true` that have one of `pred` of their own within REACH."""
    count, k = 0, 0
    for frame in true:
        while k < len(pred) and pred[k] < frame - REACH:
            k += 1
        if k < len(pred) and pred[k] <= frame + REACH:
            count, k = count + 1, k + 1
    return count


def known_mean(curve, reduce=np.mean):
    """Reduce a curve (F,) over its known values -> number, nan where there is none."""
    known = curve[np.isfinite(curve)]
    return float(reduce(known)) if len(known) else np.nan


def scores(true, pred):
    """Compare the readings of a clip, {factor: (F,)} each.

    -> {factor_measure: number}, yaw_std and pitch_std of pred in degrees, and the counts of COUNTS.
    """
    numbers = {f"{name}_{k}": x for name in FACTORS for k, x in follow(true[name], pred[name]).items()}
    numbers |= {f"{name}_std": known_mean(pred[name], np.std) for name in ("yaw", "pitch")}
    true_blinks, pred_blinks = blinks(true["lids"]), blinks(pred["lids"])
    return numbers | {"frames": len(pred["lids"]), "missing": int(np.isnan(pred["opening"]).sum()),
                      "true_blinks": len(true_blinks), "blinks": len(pred_blinks),
                      "matched": matches(true_blinks, pred_blinks)}


def silence(opening, true):
    """Measure how far the mouth stays open without sound -> means after 0.2 s and of the photo, lowest tenth.

    opening (F,): read in silence; true (F,): of the clip whose first frame is the photo.
    """
    return {"silence_opening": known_mean(opening[FPS // 5:]), "photo_opening": known_mean(true[:1]),
            "shut_opening": known_mean(true, lambda x: np.percentile(x, 10))}


# ---- many clips -> a table ----

def rates(counts):
    """Compute blinks a minute, their F1 and the share of frames without a face from {count: sums (...)}."""
    with np.errstate(invalid="ignore", divide="ignore"):
        with_face = counts["frames"] - counts["missing"]
        return {"blinks_a_minute": counts["blinks"] / with_face * FPS * 60,
                "blink_f1": 2 * counts["matched"] / (counts["true_blinks"] + counts["blinks"]),
                "no_face": counts["missing"] / counts["frames"]}


def summary(clips, people):
    """Summarize a row of clips by person.

    clips: what `scores` returned for each, or other numbers {measure: number}; people: whose each is. ->
    {measure: {value, low, high}}: the median over people of the mean of each one's clips; where COUNTS are
    given, blinks and missing frames counted over all; with bootstrap intervals (95%) over people. None where
    nothing can be said.
    """
    names = sorted(set(people))
    of = np.array([names.index(person) for person in people])
    draw = np.random.default_rng(0).random((2000, len(names)))
    result = {}

    def add(key, value, drawn):
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
        numbers = {"value": value, "low": low, "high": high}
        result[key] = {name: float(x) if np.isfinite(x) else None for name, x in numbers.items()}

    for key in [key for key in clips[0] if key not in COUNTS]:
        x = np.array([clip[key] for clip in clips])
        mean = np.array([known_mean(x[of == k]) for k in range(len(names))])
        known = mean[np.isfinite(mean)]
        drawn = known[(draw[:, :len(known)] * len(known)).astype(int)]
        add(key, known_mean(known, np.median), np.median(drawn, axis=1) if len(known) else known)
    if set(COUNTS) <= clips[0].keys():
        sums = {key: np.bincount(of, [clip[key] for clip in clips], len(names)) for key in COUNTS}
        drawn = rates({key: x[(draw * len(names)).astype(int)].sum(1) for key, x in sums.items()})
        for key, value in rates({key: x.sum() for key, x in sums.items()}).items():
            add(key, value, drawn[key])
    return result


if __name__ == "__main__":
    np.savez(sys.argv[2], **detect(np.load(sys.argv[1])))
