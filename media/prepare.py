"""From folders of video as they come to clips that both stages train on: `python data.py prepare`.

    videos --prepare--> OUT/clips/*.mp4 (a square round the face, 25 fps, 16 kHz mono), OUT/manifest.jsonl,
                          OUT/dropped.jsonl

A clip shows MARGIN times the side of the tight square (media/face.py) that the models see, so that training
can vary the framing; "square" and "size" of a manifest row are those of the tight square.

Every person of a manifest belongs to its train or its test split for ever: by the set's own list (--people),
else by a hash of the name, so that preparing more videos moves nobody.
"""
import argparse
import hashlib
import os
import re
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import astuple, replace
from glob import escape, glob
from multiprocessing import get_context, parent_process
from queue import SimpleQueue

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from media.face import (
    DETECT_EVERY,
    FACE_BOX,
    Square,
    crop_square,
    find_faces,
    largest,
    load_detector,
    median_square,
    middle_square,
)
from media.files import InputError, OutputError, printable, read_lines, write_lines
from media.sound import FPS, SAMPLES_PER_FRAME, audio_chunks, has_audio
from media.video import VideoWriter, square_pixel_frames

VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".ts", ".wmv",
                 ".flv", ".3gp")
SHORTEST, LONGEST = 1.0, 10.0  # seconds of a clip
SCENE_THRESHOLD = 20           # of 255: mean change from frame to frame of 16 x 16 averages that begins a new
                               # scene
MIN_DETECT_RATE = 0.8          # a face must be found in this share of the frames searched
MAX_OUTSIDE = 0.2              # of the square's side may lie outside the picture, whose edge is repeated
                               # there
MAX_UPSCALE = 2.0              # crops that would be enlarged more than this are dropped
# dB of full scale; share of samples at the limit; dB from quiet to loud frames
SILENT, CLIPPED, NOISY = -50.0, 0.005, 6.0
TEST_SHARE = 0.05             # of the people, where a set has no list of its own
MARGIN = 1.25                 # a prepared square is so many times as wide as the tight square that models see
KEYFRAMES = 5                 # of the clips: any frame is at most four away from one that is coded by itself
EMOTIONS = ("neutral", "angry", "contempt", "disgusted", "fear", "happy", "sad", "surprised")


# ----------------------------------------------------------------------------------------------------- people
def parse_identity(path, folder=""):
    """What the names of known sets tell of a video, path relative to its folder -> dict with identity, for
    MEAD and DH-FaceEmoVid also the emotion, for MEAD its level and the camera.

    folder: that folder's own name. File names of CelebV are a YouTube id and numbers, which many other names
    look like, so "celebv" has to stand somewhere in folder or path."""
    path = path.replace(os.sep, "/")
    stem = os.path.splitext(path)[0]
    mead = re.search(r"(?:^|[/_])([MW]\d{3})[/_](?:video[/_])?"
                     r"(front|down|top|left_30|left_60|right_30|right_60)"
                     rf"[/_]({'|'.join(EMOTIONS)})[/_]level_(\d)", stem)
    if mead:
        actor, camera, emotion, level = mead.groups()
        return {"identity": f"MEAD/{actor}", "camera": camera, "emotion": emotion, "level": int(level)}
    emo = re.search(r"(?:^|/)(\d{3})_(angry|disgust|fear|happy|neutral|sad|surprised?)_\d+$", stem)
    if emo:
        return {"identity": f"DH-FaceEmoVid/{emo[1]}", "emotion": emo[2]}
    vox = re.search(r"(?:^|/)(id\d{5})[/#]", stem)
    if vox:
        return {"identity": f"VoxCeleb/{vox[1]}"}
    hdtf = re.search(r"(?:^|/)(?:(RD_Radio\d+)|((?:RD|WDA|WRA)_[A-Za-z]+))\d*(?:_\d+)*$", stem)
    if hdtf:                                 # WDA_EricSwalwell1 and 0 are one person; RD_Radio1 and 2 are two
        return {"identity": f"HDTF/{hdtf[1] or hdtf[2]}"}
    celebv = re.search(r"(?:^|/)([\w-]{11})(?:_\d+){1,2}$", stem)
    # one YouTube video may show several people; they stay together
    if celebv and "celebv" in f"{folder}/{path}".lower():
        return {"identity": f"CelebV-HQ/{celebv[1]}"}
    return {"identity": os.path.dirname(path) or "."}


def split_of(identity):
    """'test' for TEST_SHARE of all names, decided by the name alone."""
    return "test" if int(hashlib.sha256(os.fsencode(identity)).hexdigest()[:8],
                         16) < TEST_SHARE * 2**32 else "train"


# ---------------------------------------------------------------------------------------------------- prepare
def scan_video(path, detector):
    """First pass -> frames, frame numbers where a new scene begins, faces {frame number: Square or None},
    frame size."""
    before, cuts, faces, size, n = None, [], {}, None, 0
    for n, image in enumerate(square_pixel_frames(path), 1):
        size, now = size or image.size, np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
        if before is not None and np.abs(now - before).mean() > SCENE_THRESHOLD:
            cuts.append(n - 1)
        if detector is not None and (n - 1) % DETECT_EVERY == 0:
            faces[n - 1] = largest(find_faces(detector, image))
        before = now
    return n, cuts, faces, size


def split_scenes(frames, cuts):
    """Scenes cut into equal parts of at most LONGEST seconds -> [(first frame, number of frames)]."""
    scenes = []
    for start, end in zip([0, *cuts], [*cuts, frames], strict=True):
        parts = -(-(end - start) // round(LONGEST * FPS))
        marks = [start + (end - start) * k // parts for k in range(parts + 1)]
        scenes += [(a, b - a) for a, b in zip(marks, marks[1:], strict=False)]
    return scenes


def clip_square(faces, width, height, size):
    """Squares of a clip's faces (None where none was found) -> the one Square to cut, or the reason to drop
    the clip."""
    found = [square for square in faces if square is not None]
    if len(found) < max(1, MIN_DETECT_RATE * len(faces)):
        return f"face found in {len(found)} of {len(faces)} frames looked at"
    square = median_square(found)
    if square.side * MAX_UPSCALE < size:
        return f"face too small: its square has {square.side:.0f} pixels a side"
    strayed = [s for s in found if max(abs(s.cx - square.cx), abs(s.cy - square.cy)) > 0.35 * square.side]
    if len(strayed) > (1 - MIN_DETECT_RATE) * len(faces):
        return "face leaves the square"
    half = square.side / 2
    outside = max(half - square.cx, half - square.cy, square.cx + half - width, square.cy + half - height)
    if outside > MAX_OUTSIDE * square.side:
        return "face cut off by the edge of the picture"
    return Square(round(square.cx, 1), round(square.cy, 1), round(square.side, 1), round(square.angle, 3))


def audio_quality(wave):
    """(S,) at 16 kHz -> why a talking clip cannot have this sound, or None."""
    level = 10 * np.log10(np.square(wave).mean() + 1e-12)
    if level < SILENT:
        return f"silent: {level:.0f} dB"
    clipped = (np.abs(wave) > 0.999).mean()
    if clipped > CLIPPED:
        return f"clipped: {clipped:.1%} of the samples"
    powers = np.square(wave[: len(wave) // 320 * 320].reshape(-1, 320)).mean(1)            # 20 ms
    low, loud = 10 * np.log10(np.percentile(powers, [10, 95]) + 1e-12)
    return f"noisy: pauses only {loud - low:.0f} dB below speech" if loud - low < NOISY else None


def split_audio(path, scenes):
    """Sound of scenes that follow one another, [(first frame, frames)] -> one (S,) array each, 16 kHz,
    silence where the file has no more. Only one scene is held at a time. Raises InputError, at the end at the
    latest."""
    chunks, held = audio_chunks(path), np.zeros(0, np.float32)
    for _, frames in scenes:
        n = frames * SAMPLES_PER_FRAME
        while len(held) < n and (chunk := next(chunks, None)) is not None:
            held = np.concatenate([held, chunk.numpy()])
        yield np.pad(held[:n], (0, max(0, n - len(held))))
        held = held[n:]
    for _ in chunks:                                             # a file that breaks off says so at its end
        pass


def clip_stem(path, source):
    """How the names of a video's clips begin."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", os.path.splitext(os.path.basename(path))[0])[:60]
    return f"{stem}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"


def prepare_one(path, source, labels, out, size, crop="face", detector=None):
    """One video: its clips are written to out/clips -> {"kept": [manifest rows], "dropped": [rows with a
    reason]}."""
    try:
        centre = crop == "centre"
        frames, cuts, faces, (width, height) = scan_video(path, None if centre else load_detector(detector))
        name, scenes = clip_stem(path, source), split_scenes(frames, cuts)
        sounds = split_audio(path, scenes) if has_audio(path) else [None] * len(scenes)
        kept, dropped = [], []
        for number, ((start, count), audio) in enumerate(zip(scenes, sounds, strict=True)):
            found = [square for k, square in faces.items() if start <= k < start + count]
            square = middle_square(width, height) if centre else clip_square(found, width, height, size)
            if count < SHORTEST * FPS:
                reason = f"shorter than {SHORTEST} s"
            elif isinstance(square, str):
                reason = square
            elif centre and min(width, height) * MAX_UPSCALE < size:
                reason = f"picture too small: {width}x{height}"
            else:
                reason = None if audio is None else audio_quality(audio)
            if reason:
                dropped.append({"source": source, "start": start / FPS, "frames": count, "reason": reason})
                continue
            record = {"file": f"clips/{name}-{number:03d}.mp4", "source": source, **labels,
                      "start": start / FPS, "fps": FPS,
                   "frames": count, "size": size, "square": astuple(square), "margin": MARGIN,
                      "sound": audio is not None}
            if not centre:                            # where in the square the face is, as shares of its side
                record["face"] = FACE_BOX
            kept.append(record)
        write_clips(path, scenes, kept, out, size)
        return {"kept": kept, "dropped": dropped}
    except OutputError:                                          # no fault of the video: the run ends
        raise
    except InputError as error:
        return {"kept": [], "dropped": [{"source": source,
                                         "reason": str(error).replace(os.fspath(path), source)}]}
    except Exception as error:                          # whatever libav makes of damage: a line in the report
        return {"kept": [], "dropped": [{"source": source, "reason": f"{type(error).__name__}: {error}"}]}


def margin_px(size):
    """Pixels a side of a prepared square when the tight square in its middle has `size`; even margins."""
    return size + 2 * round(size * (MARGIN - 1) / 2)


def write_clips(path, scenes, kept, out, size):
    """Second pass: of the scenes [(first frame, frames)] those that have a manifest row, one clip after the
    other."""
    if not kept:
        return
    plan, images = {round(record["start"] * FPS): record for record in kept}, square_pixel_frames(path)
    sounds = split_audio(path, scenes) if kept[0]["sound"] else [None] * len(scenes)
    for (start, count), audio in zip(scenes, sounds, strict=True):
        if start not in plan:
            for _ in range(count):
                next(images)
            continue
        record, sound = plan[start], None if audio is None else torch.from_numpy(audio)
        square = Square(*record["square"])
        square = replace(square, side=MARGIN * square.side)
        comment = f"A part of {record['source']}, prepared for training."
        with VideoWriter(os.path.join(out, record["file"]), margin_px(size), sound, comment,
                         KEYFRAMES) as video:
            for _ in range(record["frames"]):
                video.write(crop_square(next(images), square, margin_px(size)))


def find_videos(folders):
    """All videos below the folders -> sorted [(path, name): folder's own name and the path in it]."""
    videos = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise InputError(f"{folder} is not a folder; give --videos folders that hold video files")
        base = os.path.basename(os.path.abspath(folder))
        for here, _, files in os.walk(folder, followlinks=True):
            paths = [os.path.join(here, name) for name in files if name.lower().endswith(VIDEO_ENDINGS)]
            videos += [(path, f"{base}/{os.path.relpath(path, folder).replace(os.sep, '/')}")
                       for path in paths]
    if not videos:
        raise InputError(f"{', '.join(folders)}: no video file below; give folders that hold mp4, mov, mkv, "
                         f"webm or avi files")
    names = Counter(name for _, name in videos)
    if max(names.values()) > 1:
        raise InputError(f"--videos names two folders with the same last part and the same file in both: "
                         f"{names.most_common(1)[0][0]}")
    return sorted(videos, key=lambda pair: pair[1])


def start_worker():
    """In a worker process: Ctrl-C is the parent's business, and when the parent is gone, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


class Workers:
    """`jobs` processes that prepare one video at a time each. One that dies, by a fault of libav or for want
    of memory, costs the video it had, and that only after a second attempt; another process takes its
    place."""

    def __init__(self, jobs):
        self.idle = SimpleQueue()
        for _ in range(jobs):
            self.idle.put(self.new())
        self.threads = ThreadPoolExecutor(jobs)                  # each waits for one process

    def new(self):
        return ProcessPoolExecutor(1, get_context("spawn"), start_worker)

    def submit(self, *task):
        return self.threads.submit(self.attempt, *task)

    def attempt(self, path, source, labels, out, *settings):
        pool = self.idle.get()
        outcome = {"kept": [], "dropped": [{"source": source,
                                            "reason": "the process that read it crashed, twice"}]}
        try:
            for _ in range(2):
                try:
                    outcome = pool.submit(prepare_one, path, source, labels, out, *settings).result()
                    break
                except BrokenProcessPool:
                    pool.shutdown()
                    pool = self.new()
        finally:
            self.idle.put(pool)
        if not outcome["kept"]:                          # it failed in the second pass, perhaps within a clip
            for name in glob(os.path.join(escape(out), "clips", f"*{clip_stem(path, source)}-*"),
                             include_hidden=True):
                os.remove(name)
        return outcome

    def close(self):
        """Finish the videos begun, no others."""
        self.threads.shutdown(cancel_futures=True)
        while not self.idle.empty():
            self.idle.get().shutdown()


@contextmanager
def lock_folder(folder):
    """Refuse a folder that another process prepares at the moment. The lock ends with the process, however
    that ends."""
    try:
        file = open(os.path.join(folder, "lock"), "ab")
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            import fcntl  # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {folder} is being written by another prepare; wait for it or give "
                             f"another --out") from None
        except (ImportError, OSError):                           # a disk that knows no locks
            pass
        yield


def prepare(args):
    """The command. Each video's outcome is kept in OUT/parts: started again, it goes on with those that lack
    one."""
    todo, known = find_videos(args.videos), {}
    if args.people:
        base = os.path.dirname(os.path.abspath(args.people))
        for record in read_lines(args.people):
            name = record.get("identity", record.get("ident"))
            split = record.get("split", "train")
            if not isinstance(name, str) or not isinstance(record.get("file"), str) or split not in ("train",
                "test"):
                raise InputError(f"{args.people}: each line needs file and identity, and may have split: "
                                 f"train or test")
            path = os.path.realpath(os.path.join(base, record["file"]))
            known[path] = {"identity": name, "split": record.get("split") or split_of(name)}
    if args.crop == "face":
        load_detector(args.detector)                             # refuse now rather than once a video
    for folder in ("clips", "parts"):
        try:
            os.makedirs(os.path.join(args.out, folder), exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {args.out} cannot be made: {error.strerror}") from None
    with lock_folder(args.out):
        prepare_all(args, todo, known)


def read_part(path, out):
    """What prepare_one said of a video in an earlier run; None if there is nothing, or nothing whole: it is
    prepared again."""
    fields = {"file": str, "source": str, "identity": str, "split": str, "start": (int, float), "fps": int,
              "frames": int, "size": int, "sound": bool}
    try:
        part, = read_lines(path)
        whole = {"kept", "dropped"} == part.keys() and all(
            all(isinstance(record.get(name), kind) for name, kind in fields.items())
            and record["frames"] > 0 and os.path.isfile(os.path.join(out, record["file"]))
            for record in part["kept"])
        whole = whole and all(isinstance(record["reason"], str) for record in part["dropped"])
    except (InputError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return part if whole else None


def prepare_all(args, todo, known):
    """The videos todo [(path, source)] into args.out, which no other process writes to now."""
    for folder in ("clips", "parts"):
        for name in os.listdir(os.path.join(args.out, folder)):
            if name.endswith(".part"):                           # left by a run that was killed
                os.remove(os.path.join(args.out, folder, name))
    settings = [{"size": args.size, "crop": args.crop, "framing": "1.44 forehead to chin", "margin": MARGIN}]
    if os.path.exists(os.path.join(args.out, "settings.jsonl")):
        if read_lines(os.path.join(args.out, "settings.jsonl")) != settings:
            raise InputError(f"{args.out} was prepared with another --size or --crop; give another --out")
    write_lines(os.path.join(args.out, "settings.jsonl"), settings)
    parts, jobs, workers = {}, {}, Workers(args.jobs)
    with closing(workers), tqdm(total=len(todo), unit="video", disable=None) as bar:
        for path, source in todo:
            parts[source] = os.path.join(args.out, "parts",
                                         hashlib.sha256(os.fsencode(source)).hexdigest()[:24] + ".jsonl")
            if read_part(parts[source], args.out):
                bar.update()
                continue
            folder, name = source.split("/", 1)
            labels = parse_identity(name, folder)
            if "/" not in labels["identity"]:
                labels["identity"] = f"{folder}/{labels['identity']}"
            labels = {**labels, "split": split_of(labels["identity"]),
                      **known.get(os.path.realpath(path), {})}
            jobs[workers.submit(path, source, labels, args.out, args.size, args.crop, args.detector)] = source
        for job in as_completed(jobs):
            write_lines(parts[jobs[job]], [job.result()])
            bar.update()
    done = [read_part(parts[source], args.out) for _, source in todo]
    kept, dropped = ([record for part in done for record in part[kind]] for kind in ("kept", "dropped"))
    write_lines(os.path.join(args.out, "dropped.jsonl"), dropped)
    write_lines(os.path.join(args.out, "manifest.jsonl"), kept)
    minutes, people = sum(record["frames"]
                          for record in kept) / FPS / 60, len({record["identity"] for record in kept})
    print(f"{len(kept)} clips, {minutes:.1f} minutes, {people} people in "
          f"{printable(args.out)}/manifest.jsonl; "
          f"{len(dropped)} dropped, each with its reason in {printable(args.out)}/dropped.jsonl")
    if not kept:
        raise InputError(f"no clip could be made; see the reasons in {args.out}/dropped.jsonl")


def parse(argv):
    parser = argparse.ArgumentParser(description="Real video, made ready to train on.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="video files -> square 25 fps clips and a manifest",
                            allow_abbrev=False)
    p.add_argument("--videos", nargs="+", required=True, metavar="DIR", help="folders, searched to any depth")
    p.add_argument("--out", required=True,
                   help="folder for clips/, manifest.jsonl, dropped.jsonl; run again to resume")
    p.add_argument("--size", type=int, default=256, help="pixels a side of the tight square; clips have "
                   f"{MARGIN} times as many (default: 256)")
    p.add_argument("--crop", choices=("face", "centre"), default="face",
                   help="a fixed square round the face, or the middle")
    p.add_argument("--detector", metavar="YUNET.onnx",
                   help="find faces with this file of OpenCV's YuNet (default: with the "
                                                            "cascades in OpenCV)")
    p.add_argument("--people", metavar="FILE",
                   help="lines of JSON: file (relative to FILE), identity, maybe split (train or test)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    if args.size < 32 or args.size % 2 or args.jobs < 1:
        parser.error("--size must be an even number from 32 on, --jobs positive")
    return args


def main(argv=None):
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepare(args)
    except InputError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0
