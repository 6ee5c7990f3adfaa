"""From folders of videos to clips that both stages train on: `python data.py prepare`.

    videos --prepare--> OUT/clips/*.mp4 (a square round the face, 25 fps, 16 kHz mono),
                        OUT/manifest.jsonl, OUT/dropped.jsonl (the reason for everything left out)

A clip shows MARGIN times the side of the tight square (media/face.py) that the models see, so that training
can vary the framing; "square" and "size" of a manifest row are those of the tight square.

Every person of a manifest belongs to its train or its test split for ever: by the list of --people, else by a
hash of the name, so that preparing more videos moves nobody.
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
from media.files import InputError, OutputError, command, printable, read_lines, write_lines
from media.sound import FPS, SAMPLES_PER_FRAME, audio_chunks, has_audio
from media.video import VideoWriter, read_frames

VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".ts", ".wmv",
                 ".flv", ".3gp")
SHORTEST, LONGEST = 1.0, 10.0  # seconds of a clip
SCENE_THRESHOLD = 20           # of 255: mean change of 16 x 16 averages of a frame that begins a new scene
MIN_DETECT_RATE = 0.8          # a face must be found in this share of the frames searched
MAX_OUTSIDE = 0.2              # share of the square's side that may lie outside the picture
MAX_UPSCALE = 2.0              # crops that would be enlarged more than this are dropped
MIN_LEVEL, MAX_CLIPPED, MIN_RANGE = -50.0, 0.005, 6.0    # dB; share of samples; dB from quiet to loud frames
TEST_SHARE = 0.05              # of the people, where a set has no list of its own
MARGIN = 1.25                  # side of a prepared square by that of the tight square that models see
KEYFRAMES = 5                  # of the clips: any frame is at most four away from one that is coded by itself
EMOTIONS = ("neutral", "angry", "contempt", "disgusted", "fear", "happy", "sad", "surprised")


# ---- people and scenes -------------------------------------------------------------------------------------

def parse_identity(path, folder=""):
    """Read from a file name of a known set -> identity, and where it tells them: emotion, level, camera.

    path is relative to the folder called `folder`. File names of CelebV are a YouTube id and numbers, which
    many other names look like, so "celebv" has to stand somewhere in folder or path.
    """
    path = path.replace(os.sep, "/")
    stem = os.path.splitext(path)[0]
    if match := re.search(r"(?:^|[/_])([MW]\d{3})[/_](?:video[/_])?"
                          r"(front|down|top|left_30|left_60|right_30|right_60)"
                          rf"[/_]({'|'.join(EMOTIONS)})[/_]level_(\d)", stem):
        actor, camera, emotion, level = match.groups()
        return {"identity": f"MEAD/{actor}", "camera": camera, "emotion": emotion, "level": int(level)}
    if match := re.search(r"(?:^|/)(\d{3})_(angry|disgust|fear|happy|neutral|sad|surprised?)_\d+$", stem):
        return {"identity": f"DH-FaceEmoVid/{match[1]}", "emotion": match[2]}
    if match := re.search(r"(?:^|/)(id\d{5})[/#]", stem):
        return {"identity": f"VoxCeleb/{match[1]}"}
    # WDA_EricSwalwell1 and 0 are one person; RD_Radio1 and 2 are two
    if match := re.search(r"(?:^|/)(?:(RD_Radio\d+)|((?:RD|WDA|WRA)_[A-Za-z]+))\d*(?:_\d+)*$", stem):
        return {"identity": f"HDTF/{match[1] or match[2]}"}
    # one YouTube video may show several people; they stay together
    match = re.search(r"(?:^|/)([\w-]{11})(?:_\d+){1,2}$", stem)
    if match and "celebv" in f"{folder}/{path}".lower():
        return {"identity": f"CelebV-HQ/{match[1]}"}
    return {"identity": os.path.dirname(path) or "."}


def name_hash(name):
    """Hash a name, whatever bytes are in it -> 64 hex digits."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def split_of(identity):
    """'test' for TEST_SHARE of all names, decided by the name alone."""
    return "test" if int(name_hash(identity)[:8], 16) < TEST_SHARE * 2**32 else "train"


def scan_video(path, detector):
    """First pass -> number of frames, first frames of new scenes, faces {frame: Square or None}, size."""
    last, cuts, faces, size, n = None, [], {}, None, 0
    for n, image in enumerate(read_frames(path), 1):
        size = size or image.size
        small = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
        if last is not None and np.abs(small - last).mean() > SCENE_THRESHOLD:
            cuts.append(n - 1)
        if detector is not None and (n - 1) % DETECT_EVERY == 0:
            faces[n - 1] = largest(find_faces(detector, image))
        last = small
    return n, cuts, faces, size


def split_scenes(frames, cuts):
    """Cut scenes into equal parts of at most LONGEST seconds -> [(first frame, number of frames)]."""
    scenes = []
    for start, end in zip([0, *cuts], [*cuts, frames], strict=True):
        parts = -(-(end - start) // round(LONGEST * FPS))
        marks = [start + (end - start) * k // parts for k in range(parts + 1)]
        scenes += [(a, b - a) for a, b in zip(marks, marks[1:], strict=False)]
    return scenes


def clip_square(faces, width, height, size):
    """Squares of a clip's faces (None: not found) -> the one Square to cut, or a reason to drop the clip."""
    detected = [square for square in faces if square is not None]
    if len(detected) < max(1, MIN_DETECT_RATE * len(faces)):
        return f"face found in {len(detected)} of {len(faces)} frames looked at"
    square = median_square(detected)
    if square.size * MAX_UPSCALE < size:
        return f"face too small: its square has {square.size:.0f} pixels a side"
    far = [s for s in detected if max(abs(s.cx - square.cx), abs(s.cy - square.cy)) > 0.35 * square.size]
    if len(far) > (1 - MIN_DETECT_RATE) * len(faces):
        return "face leaves the square"
    half = square.size / 2
    outside = max(half - square.cx, half - square.cy, square.cx + half - width, square.cy + half - height)
    if outside > MAX_OUTSIDE * square.size:
        return "face cut off by the edge of the picture"
    return Square(round(square.cx, 1), round(square.cy, 1), round(square.size, 1), round(square.angle, 3))


def audio_quality(wave):
    """(S,) at 16 kHz -> why a talking clip cannot have this sound, or None."""
    level = 10 * np.log10(np.square(wave).mean() + 1e-12)
    if level < MIN_LEVEL:
        return f"silent: {level:.0f} dB"
    clipped = (np.abs(wave) > 0.999).mean()
    if clipped > MAX_CLIPPED:
        return f"clipped: {clipped:.1%} of the samples"
    powers = np.square(wave[: len(wave) // 320 * 320].reshape(-1, 320)).mean(1)            # 20 ms
    pause, speech = 10 * np.log10(np.percentile(powers, [10, 95]) + 1e-12)
    return f"noisy: pauses only {speech - pause:.0f} dB below speech" if speech - pause < MIN_RANGE else None


def split_audio(path, scenes):
    """Sound of successive scenes [(first frame, frames)] -> iterator of (S,) arrays, 16 kHz, zero-padded.

    Only one scene is held at a time. Raises InputError, at the end of the file at the latest.
    """
    chunks, held = audio_chunks(path), np.zeros(0, np.float32)
    for _, frames in scenes:
        n = frames * SAMPLES_PER_FRAME
        while len(held) < n and (chunk := next(chunks, None)) is not None:
            held = np.concatenate([held, chunk.numpy()])
        yield np.pad(held[:n], (0, max(0, n - len(held))))
        held = held[n:]
    for _ in chunks:                                             # a file that breaks off says so at its end
        pass


# ---- one video ---------------------------------------------------------------------------------------------

def clip_stem(path, source):
    """Make the first part of the names of a video's clips."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", os.path.splitext(os.path.basename(path))[0])[:60]
    return f"{stem}-{name_hash(source)[:8]}"


def prepare_one(path, source, labels, out, size, crop="face", detector=None):
    """Write the clips of one video -> {"kept": [manifest rows], "dropped": [rows with a reason]}."""
    try:
        centre = crop == "centre"
        frames, cuts, faces, (width, height) = scan_video(path, None if centre else load_detector(detector))
        scenes = split_scenes(frames, cuts)
        sounds = split_audio(path, scenes) if has_audio(path) else [None] * len(scenes)
        kept, dropped = [], []
        for number, ((start, count), audio) in enumerate(zip(scenes, sounds, strict=True)):
            of_scene = [square for k, square in faces.items() if start <= k < start + count]
            square = middle_square(width, height) if centre else clip_square(of_scene, width, height, size)
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
            file = f"clips/{clip_stem(path, source)}-{number:03d}.mp4"
            face = {} if centre else {"face": FACE_BOX}
            kept.append({"file": file, "source": source, **labels, "start": start / FPS, "fps": FPS,
                         "frames": count, "size": size, "square": astuple(square), "margin": MARGIN,
                         "sound": audio is not None, **face})
        write_clips(path, scenes, kept, out, size)
        return {"kept": kept, "dropped": dropped}
    except OutputError:                                          # no fault of the video: the run ends
        raise
    except InputError as error:
        reason = str(error).replace(os.fspath(path), source)
    except Exception as error:                          # whatever libav makes of damage: a line in the report
        reason = f"{type(error).__name__}: {error}"
    return {"kept": [], "dropped": [{"source": source, "reason": reason}]}


def margin_px(size):
    """Pixels a side of a prepared square when the tight square in its middle has `size`; even margins."""
    return size + 2 * round(size * (MARGIN - 1) / 2)


def write_clips(path, scenes, kept, out, size):
    """Second pass: write a clip for each of the scenes [(first frame, frames)] that has a manifest row."""
    if not kept:
        return
    rows, images = {round(record["start"] * FPS): record for record in kept}, read_frames(path)
    sounds = split_audio(path, scenes) if kept[0]["sound"] else [None] * len(scenes)
    for (start, count), audio in zip(scenes, sounds, strict=True):
        if start not in rows:
            for _ in range(count):
                next(images)
            continue
        record, sound = rows[start], None if audio is None else torch.from_numpy(audio)
        tight, clip = Square(*record["square"]), os.path.join(out, record["file"])
        square = replace(tight, size=MARGIN * tight.size)
        comment = f"A part of {record['source']}, prepared for training."
        with VideoWriter(clip, margin_px(size), sound, comment, KEYFRAMES) as video:
            for _ in range(count):
                video.write(crop_square(next(images), square, margin_px(size)))


# ---- all videos --------------------------------------------------------------------------------------------

def find_videos(folders):
    """List all videos below the folders -> sorted [(path, source): the folder's name and the path in it]."""
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
                         "webm or avi files")
    (name, count), = Counter(name for _, name in videos).most_common(1)
    if count > 1:
        raise InputError(f"--videos: two folders have the same last part, and the same file in both: {name}")
    return sorted(videos, key=lambda pair: pair[1])


def start_worker():
    """Leave Ctrl-C to the parent process, and end this one when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


class Workers:
    """`jobs` processes, each of which prepares one video at a time.

    One that dies, by a fault of libav or for want of memory, costs the video it had, and that only after a
    second attempt; another process takes its place.
    """

    def __init__(self, jobs):
        self.idle = [self.new() for _ in range(jobs)]
        self.threads = ThreadPoolExecutor(jobs)                  # each waits for one process

    def new(self):
        return ProcessPoolExecutor(1, get_context("spawn"), start_worker)

    def submit(self, *task):
        return self.threads.submit(self.attempt, *task)

    def attempt(self, path, source, labels, out, *settings):
        pool, reason = self.idle.pop(), "the process that read it crashed, twice"
        outcome = {"kept": [], "dropped": [{"source": source, "reason": reason}]}
        try:
            for _ in range(2):
                try:
                    outcome = pool.submit(prepare_one, path, source, labels, out, *settings).result()
                    break
                except BrokenProcessPool:
                    pool.shutdown()
                    pool = self.new()
        finally:
            self.idle.append(pool)
        if not outcome["kept"]:                          # it failed in the second pass, perhaps within a clip
            clips = os.path.join(escape(out), "clips", f"*{clip_stem(path, source)}-*")
            for name in glob(clips, include_hidden=True):
                os.remove(name)
        return outcome

    def close(self):
        """Finish the videos begun, no others."""
        self.threads.shutdown(cancel_futures=True)
        for pool in self.idle:
            pool.shutdown()


@contextmanager
def lock_folder(folder):
    """Refuse a folder that another process prepares now. The lock ends with the process in any case."""
    try:
        file = open(os.path.join(folder, "lock"), "ab")
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written: {error.strerror}") from None
    with file:
        try:
            import fcntl  # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {folder} is being written by another prepare; "
                             "wait for it or give another --out") from None
        except (ImportError, OSError):                           # a disk that knows no locks
            pass
        yield


def read_people(path):
    """Read the list of --people -> {real path of a video: {"identity", "split"}}. Raises InputError."""
    people, folder = {}, os.path.dirname(os.path.abspath(path))
    for record in read_lines(path):
        name, file = record.get("identity", record.get("ident")), record.get("file")
        split = record.get("split")
        if not (isinstance(name, str) and isinstance(file, str) and split in (None, "train", "test")):
            raise InputError(f"{path}: each line needs file and identity, and may have split: train or test")
        try:
            video = os.path.realpath(os.path.join(folder, file))
        except ValueError:                                       # a zero byte, half a character
            raise InputError(f"{path}: {file!a} cannot be the name of a file") from None
        people[video] = {"identity": name, "split": split or split_of(name)}
    return people


def prepare(args):
    """Run the command. OUT/parts keeps each video's outcome: started again, it goes on with the others."""
    todo, people = find_videos(args.videos), read_people(args.people) if args.people else {}
    if args.crop == "face":
        load_detector(args.detector)                             # refuse now rather than once a video
    for folder in ("clips", "parts"):
        try:
            os.makedirs(os.path.join(args.out, folder), exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {args.out} cannot be made: {error.strerror}") from None
    with lock_folder(args.out):
        prepare_all(args, todo, people)


def read_part(path, out):
    """Read what prepare_one returned for a video in an earlier run -> that, or None if it is not complete."""
    fields = {"file": str, "source": str, "identity": str, "split": str, "start": (int, float), "fps": int,
              "frames": int, "size": int, "sound": bool}
    try:
        part, = read_lines(path)
        complete = part.keys() == {"kept", "dropped"} and all(
            all(isinstance(record.get(name), kind) for name, kind in fields.items())
            and record["frames"] > 0 and os.path.isfile(os.path.join(out, record["file"]))
            for record in part["kept"])
        complete = complete and all(isinstance(record["reason"], str) for record in part["dropped"])
    except (InputError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return part if complete else None


def prepare_all(args, todo, people):
    """Prepare the videos todo [(path, source)] into args.out, which no other process writes to now.

    people: identity and split of those listed, see read_people().
    """
    for left in glob(os.path.join(escape(args.out), "**", ".*.part"), recursive=True):
        os.remove(left)                                          # of a run that was killed
    settings = [{"size": args.size, "crop": args.crop, "framing": "1.44 forehead to chin", "margin": MARGIN}]
    settings_file = os.path.join(args.out, "settings.jsonl")
    if os.path.exists(settings_file) and read_lines(settings_file) != settings:
        raise InputError(f"{args.out} was prepared with another --size or --crop; give another --out")
    write_lines(settings_file, settings)
    parts, jobs, workers = {}, {}, Workers(args.jobs)
    with closing(workers), tqdm(total=len(todo), unit="video", disable=None) as bar:
        for path, source in todo:
            parts[source] = os.path.join(args.out, "parts", name_hash(source)[:24] + ".jsonl")
            if read_part(parts[source], args.out):
                bar.update()
                continue
            folder, name = source.split("/", 1)
            labels = parse_identity(name, folder)
            if "/" not in labels["identity"]:
                labels["identity"] = f"{folder}/{labels['identity']}"
            labels["split"] = split_of(labels["identity"])
            labels.update(people.get(os.path.realpath(path), {}))
            jobs[workers.submit(path, source, labels, args.out, args.size, args.crop, args.detector)] = source
        for job in as_completed(jobs):
            write_lines(parts[jobs[job]], [job.result()])
            bar.update()
    done = [read_part(parts[source], args.out) for _, source in todo]
    kept, dropped = ([record for part in done for record in part[kind]] for kind in ("kept", "dropped"))
    write_lines(os.path.join(args.out, "dropped.jsonl"), dropped)
    write_lines(os.path.join(args.out, "manifest.jsonl"), kept)
    minutes = sum(record["frames"] for record in kept) / FPS / 60
    number, out = len({record["identity"] for record in kept}), printable(args.out)
    print(f"{len(kept)} clips, {minutes:.1f} minutes, {number} people in {out}/manifest.jsonl; "
          f"{len(dropped)} dropped, each with its reason in {out}/dropped.jsonl")
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
                   help="find faces with this file of OpenCV's YuNet (default: with the cascades in OpenCV)")
    p.add_argument("--people", metavar="FILE",
                   help="lines of JSON: file (relative to FILE), identity, maybe split (train or test)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    if args.size < 32 or args.size % 2 or args.jobs < 1:
        parser.error("--size must be an even number from 32 on, --jobs positive")
    return args


@command("data.py")
def main(argv=None):
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepare(args)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
