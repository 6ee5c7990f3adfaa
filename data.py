"""Prepared clips -> batches that both stages train on.

    python data.py prepare --videos DIR [DIR ...] --out OUT          makes them (media/prepare.py)

    OUT --Clips--> pairs of pictures, frames in a row, whole clips with sound; several folders drawn equally
"""
import os
import signal
import sys

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from media import prepare
from media.files import InputError, picture_stream, read_lines
from media.image import from_uint8
from media.prepare import KEYFRAMES
from media.sound import FPS, SAMPLE_RATE, has_audio, load_audio


# ----------------------------------------------------------------------------------------------------------- datasets
def read_at(path, numbers, size):
    """Frames of a prepared clip by number -> (n, size, size, 3) uint8, in the order asked."""
    got = {}
    with av.open("file:" + path) as container:
        stream = picture_stream(container)
        tick, here, decoded = 1 / (FPS * stream.time_base), None, iter(())
        for number in sorted(set(numbers)):
            if here is None or number > here + KEYFRAMES:
                container.seek(round(number * tick) + (stream.start_time or 0), stream=stream)
                decoded = container.decode(stream)
            for frame in decoded:
                here = round((frame.pts - (stream.start_time or 0)) / tick)
                if here >= number:
                    got[number] = frame.reformat(size, size, "rgb24", src_colorspace="ITU709", interpolation="AREA").to_ndarray()
                    break
            else:
                raise InputError(f"{path} ends before its frame {number}; prepare the set again")
    return np.stack([got[number] for number in numbers])


def read_clip(path, size):
    """A whole prepared clip -> frames (F, 3, size, size) float in [-1, 1], sound (S,) at 16 kHz or None."""
    with av.open("file:" + path) as container:
        frames = [frame.reformat(size, size, "rgb24", src_colorspace="ITU709", interpolation="AREA").to_ndarray()
                  for frame in container.decode(picture_stream(container))]
    wave = load_audio(path)[: len(frames) * SAMPLE_RATE // FPS] if has_audio(path) else None
    return from_uint8(np.stack(frames)), wave


def load_sets(folders, split, sound=False):
    """Manifests of prepared folders -> one {identity: [rows with an absolute path]} for each. Raises InputError."""
    sets = []
    for folder in folders:
        path = os.path.join(folder, "manifest.jsonl")
        if not os.path.isfile(path):
            raise InputError(f"{folder} holds no manifest.jsonl; make it with: python data.py prepare --videos {folder} --out DIR, "
                             "and give DIR")
        people, rows = {}, read_lines(path)
        trained, tested = ({record["identity"] for record in rows if record["split"] == name} for name in ("train", "test"))
        if both := trained & tested:
            raise InputError(f"{path} has clips of {min(both)} both in its train and in its test split; a person belongs to one")
        for record in rows:
            if record["split"] == split and (record["sound"] or not sound):
                people.setdefault(record["identity"], []).append({**record, "path": os.path.join(folder, record["file"])})
        if not people:
            raise InputError(f"{path} holds no clip{' with sound' if sound else ''} of the {split} split")
        sets.append(people)
    return sets


class Clips(Dataset):
    """Batches of stage 1 from prepared folders: item `number` is a function of (seed, number) alone, so that no process,
    worker or step sees another's and a resumed run goes on with what comes next.

    An item: one picture of each of R people and `targets` others of the same clip -> (R, 3, size, size), (R*targets, 3, size, size)
    in [-1, 1]. A share `near` of the people is shown within a fifth of a second, the others at any distance. rows: the
    targets follow each other instead (the video stage). Flip and colour jitter, ours, are one for all pictures of a person.
    """

    def __init__(self, folders, persons, targets, near, size, seed=0, split="train", rows=False, jitter=0.1):
        self.sets = [list(people.items()) for people in load_sets(folders, split)]
        self.persons, self.targets, self.near, self.size = persons, targets, near, size
        self.seed, self.rows, self.jitter = seed, rows, jitter

    def __getitem__(self, number):
        rng = np.random.default_rng([self.seed, number])
        near = round(self.near * self.persons)
        pictures = torch.stack([self.person(rng, k < near) for k in range(self.persons)])                # (R, 1+T, 3, H, W)
        return pictures[:, 0], pictures[:, 1:].flatten(0, 1)

    def person(self, rng, near):
        """Set, then person, then clip, each drawn equally -> (1+T, 3, H, W)."""
        people = self.sets[rng.integers(len(self.sets))]
        clips = people[rng.integers(len(people))][1]
        clip = clips[rng.integers(len(clips))]
        frames, first = clip["frames"], int(rng.integers(clip["frames"]))
        if self.rows:
            start = int(rng.integers(max(1, frames - self.targets + 1)))
            others = [min(start + k, frames - 1) for k in range(self.targets)]
        else:
            low, high = (max(0, first - FPS // 5), min(frames, first + FPS // 5 + 1)) if near else (0, frames)
            others = rng.integers(low, high, self.targets).tolist()
        x = from_uint8(read_at(clip["path"], [first, *others], self.size))                 # (1+T, 3, H, W)
        x = x.flip(-1) if rng.random() < 0.5 else x
        gain, shift = (torch.from_numpy(rng.uniform(-self.jitter, self.jitter, 3).astype(np.float32)) for _ in range(2))
        return (x * (1 + gain[:, None, None]) + 0.5 * shift[:, None, None]).clamp(-1, 1)


def worker_init(_):
    """In a reading process: signals to the whole group (Ctrl-C, torchrun's end) are the parent's business, which may need
    another batch before it stops; the parent itself may end it."""
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def loader(clips, numbers, workers):
    """Items of `clips` in the order of `numbers`, read ahead by `workers` processes (0: none)."""
    prefetch = {"prefetch_factor": 4, "worker_init_fn": worker_init, "multiprocessing_context": "spawn"} if workers else {}
    return DataLoader(clips, batch_size=None, sampler=numbers, num_workers=workers, **prefetch)


if __name__ == "__main__":
    sys.exit(prepare.main())
