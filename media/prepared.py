"""Prepared clips, as media/prepare.py makes them: their list, their frames, their sound and their labels."""
import os

import numpy as np

from media import landmarks
from media.files import InputError, check_not_truncated, open_clip, read_lines
from media.image import from_uint8
from media.prepare import KEYFRAMES, MARGIN, margin_px
from media.sound import FPS, SAMPLE_RATE, has_audio, load_audio


def find_clips(folder: str, split: str, sound=False) -> dict:
    """Read the manifest of a prepared folder -> {identity: [its clips, with their path]}, empty where the
    split has none. Raises InputError for a manifest that training cannot use."""
    path = os.path.join(folder, "manifest.jsonl")
    if not os.path.isfile(path):
        raise InputError(f"{folder} holds no manifest.jsonl; make it with: python data.py prepare "
                         f"--videos {folder} --out DIR, and give DIR")
    people, splits, clips = {}, {}, read_lines(path)
    fields = {"file": str, "identity": str, "frames": int, "split": str, "sound": bool}
    for number, clip in enumerate(clips, 1):
        complete = all(isinstance(clip.get(name), kind) for name, kind in fields.items())
        if not complete or not 0 < clip["frames"] < 10**6 or clip["split"] not in ("train", "test"):
            raise InputError(f"{path}, line {number}: lacks file, identity, split, frames or sound; prepare "
                             "the set again")
        name = clip["file"]
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise InputError(f"{path}, line {number}: {name} is not a file inside the folder")
        if clip.get("margin") != MARGIN:
            raise InputError(f"{path}, line {number}: prepared with another framing; prepare the set again")
        if splits.setdefault(clip["identity"], clip["split"]) != clip["split"]:
            raise InputError(f"{path} has clips of {clip['identity']} both in its train and in its test "
                             "split; a person belongs to one")
        if clip["split"] == split and (clip["sound"] or not sound):
            clip["path"] = os.path.join(folder, name)
            people.setdefault(clip["identity"], []).append(clip)
    return people


def load_set(folder: str, split: str, sound=False) -> dict:
    """As find_clips, but a split without clips is an InputError too."""
    people = find_clips(folder, split, sound)
    if not people:
        raise InputError(f"{folder} holds no clip{' with sound' if sound else ''} of the {split} split")
    return people


def read_at(path: str, numbers, size: int, margin=False) -> np.ndarray:
    """Read frames of a prepared clip by number, in any order: their tight square, (n, size, size, 3) uint8.
    margin: the whole prepared square, (n, W, W, 3) with W = margin_px(size). Raises InputError."""
    frames = {}
    with open_clip(path) as (container, stream):
        tick, position, decoded = 1 / (FPS * stream.time_base), None, iter(())
        for number in sorted(set(numbers)):
            if position is None or number > position + KEYFRAMES:
                container.seek(round(number * tick) + (stream.start_time or 0), stream=stream)
                decoded = container.decode(stream)
            for frame in decoded:
                position = round((frame.pts - (stream.start_time or 0)) / tick)
                if position >= number:
                    frames[number] = to_array(frame, size, margin)
                    break
            else:
                raise InputError(f"{path} ends before its frame {number}; prepare the set again")
    return np.stack([frames[number] for number in numbers])


def to_array(frame, size: int, margin=False) -> np.ndarray:
    """A decoded frame -> its tight square (size, size, 3) uint8; margin: the whole, as read_at."""
    wide = margin_px(size)
    edge = 0 if margin else (wide - size) // 2
    pixels = frame.reformat(wide, wide, "rgb24", src_colorspace="ITU709", interpolation="AREA").to_ndarray()
    return pixels[edge:wide - edge, edge:wide - edge]


def read_clip(path: str, size: int):
    """Read a whole prepared clip -> frames (F, 3, size, size) in [-1, 1], sound (S,) at 16 kHz or None.
    Raises InputError."""
    with open_clip(path) as (container, stream):
        frames = [to_array(frame, size) for frame in container.decode(stream)]
        check_not_truncated(path, container, stream, len(frames) / FPS)
    wave = load_audio(path)[: len(frames) * SAMPLE_RATE // FPS] if has_audio(path) else None
    return from_uint8(np.stack(frames)), wave


def load_landmarks(clip: dict):
    """Read a clip's landmarks -> ellipses (F, 4, 4) in its prepared square, factors (F, K).
    The usual ellipses and nan where there are none. Raises InputError."""
    usual = np.tile(np.array(landmarks.USUAL, np.float32) / MARGIN, (clip["frames"], 1, 1))
    path = os.path.join(clip["path"][: -len(clip["file"])], landmarks.landmark_file(clip["file"]))
    if not os.path.exists(path):
        return usual, np.full((clip["frames"], len(landmarks.FACTORS)), np.nan, np.float32)
    ellipses, factors = landmarks.read_labels(path, clip["frames"])
    return np.where(np.isfinite(ellipses), ellipses, usual), factors
