"""Files damaged at random: every one ends in a complete result or in one sentence, in time, in memory, and
leaves nothing.

    pytest tests/test_fuzz.py -m long          1,000 of each kind, but for those of the fast run
    FUZZ=100 pytest tests/test_fuzz.py         as many of each

Case k of a kind is the same for ever: its damage is drawn from (kind, k) alone.
"""
import json
import os
import random
import re
import shutil
import signal
import struct
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from test_prepare import speech
from test_sample import META, small_models

import data
import sample
from media import landmarks, prepare
from media.files import InputError, write_lines
from media.prepared import load_landmarks, load_set
from media.video import VideoWriter
from media.weights import save_weights

FEW, MANY = int(os.environ.get("FUZZ", 12)), 1000                            # cases of a kind
SECONDS, MEGABYTES = 60, 1500
ABSURD = [0, -1, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64, 10**30, 1e308,
          float("inf"), float("nan"), None, True, "", "x" * 10000, [], {}, [[]], "\ud800", "../../etc/passwd"]


# ---- damage ------------------------------------------------------------------------------------------------

def place(rng, length):
    """Anywhere, half of the time in the first 200 bytes."""
    return rng.randrange(max(1, min(length, 200) if rng.random() < 0.5 else length))


def flip(rng, x, others):
    for _ in range(rng.choice((1, 1, 3, 20, 200))):
        x[place(rng, len(x))] ^= 1 << rng.randrange(8)


def cut(rng, x, others):
    del x[rng.randrange(len(x)):]


def drop(rng, x, others):
    at = place(rng, len(x))
    del x[at:at + rng.choice((1, 4, 100, 4096))]


def insert(rng, x, others):
    n, at = rng.choice((1, 4, 100, 4096)), place(rng, len(x))
    x[at:at] = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n), x[at:at + n]))


def swap(rng, x, others):
    n = rng.choice((4, 16, 64, 512))
    x[:n] = rng.choice(others)[:n]


def size(rng, x, others):
    """A number of 2, 4 or 8 bytes becomes absurd."""
    form = rng.choice("<>") + rng.choice("HIQ")
    n, at = struct.calcsize(form), place(rng, len(x))
    x[at:at + n] = struct.pack(form, rng.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 2, 2**63 - 1,
                                                 2**64 - 1)) % 256**n)


def text(rng, x):
    """A value or the structure of JSON text changes."""
    how = rng.randrange(4)
    if how == 0:
        x = re.sub(r'(?<=[:\[,])\s*(-?[\d.]+|"[^"]*"|true|false|null)',
                   lambda m: absurd(rng) if rng.random() < 0.1 else m[0], x)
    elif how == 1:
        found = list(re.finditer(r'-?[\d.]+|"[^"]*"|true|false|null', x))
        if found:
            m = rng.choice(found)
            x = x[:m.start()] + absurd(rng) + x[m.end():]
    elif how == 2:
        x = rng.choice(("[" * 100000, "null", "[]", "{}", "3", '"x"', "{" * 1000, "\x00" * 10, "{}\n" * 3,
                        ""))
    else:
        m = rng.choice(list(re.finditer(r'"[^"]*"\s*:', x)) or [re.match("", x)])
        x = x[:m.start()] + rng.choice(("", '"other":', '"identity":')) + x[m.end():]
    return x


def absurd(rng):
    return json.dumps(rng.choice(ABSURD))


def damage(kind, k, whole, others, json_text=False):
    """Case k of a kind: bytes of a good file -> bytes of a damaged one."""
    rng, x = random.Random(f"{kind} {k}"), bytearray(whole)
    if json_text and rng.random() < 0.7:
        return text(rng, bytes(x).decode()).encode(errors="surrogatepass")
    if whole[8:9] == b"{" and rng.random() < 0.5:                            # safetensors: its header is JSON
        n, = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8:8 + n])
        header["__metadata__"]["semo"] = text(rng, header["__metadata__"]["semo"])
        header = json.dumps(header).encode()
        return struct.pack("<Q", len(header)) + header + whole[8 + n:]
    for _ in range(rng.choice((1, 1, 2, 5))):
        if x:
            rng.choice((flip, flip, cut, drop, insert, swap, size, size))(rng, x, others)
    return bytes(x)


# ---- limits ------------------------------------------------------------------------------------------------

class Late(BaseException):
    """Not an Exception, so that nothing takes it for damage."""


def peak():
    """The most memory held since the last reset, MB (Linux; 0 elsewhere)."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return 0


@contextmanager
def limits(what):
    def late(*_):
        raise Late(f"{what}: longer than {SECONDS} s")

    try:
        Path("/proc/self/clear_refs").write_text("5")                          # resets the peak
    except OSError:
        pass
    before, kept = peak(), [signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)                # of its own work
    signal.alarm(10 * SECONDS)                                   # and beside any work of others
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), kept, strict=True):
            signal.signal(number, handler)
    assert peak() - before < MEGABYTES, f"{what}: {peak() - before:.0f} MB"


# ---- good files --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with files of every kind, {kind: [names]}."""
    folder, rng = tmp_path_factory.mktemp("good"), np.random.default_rng(0)
    names = {"photo": [], "sound": [], "video": [], "checkpoint": ["w.safetensors"]}
    picture = Image.fromarray(rng.integers(0, 255, (50, 40, 3), dtype=np.uint8))
    for ending, options in (("png", {}), ("jpg", {}), ("webp", {}), ("bmp", {}), ("gif", {}),
                            ("tif", {"compression": "tiff_lzw"}), ("ppm", {})):
        picture.save(folder / f"x.{ending}", **options)
        names["photo"].append(f"x.{ending}")
    wave = speech(0.4)
    for ending in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(folder / f"y.{ending}", wave, 16000)
        names["sound"].append(f"y.{ending}")
    for name, kind, codec in (("d.mp4", "mp4", "libx264"), ("d.mkv", "matroska", "mpeg4"),
                              ("d.avi", "avi", "mpeg4"),
                              ("d.webm", "webm", "libvpx"), ("d.ts", "mpegts", "mpeg2video")):
        with av.open(str(folder / name), "w", format=kind) as out:
            stream = out.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for k in range(10):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * k, np.uint8),
                                                                 format="rgb24")))
            out.mux(stream.encode(None))
        names["video"].append(name)
    with VideoWriter(folder / "e.mp4", 32, torch.from_numpy(wave)) as video:
        for _ in range(10):
            video.write(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    names["video"].append("e.mp4")
    save_weights(folder / "w.safetensors", small_models(), META)
    return folder, names


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared folder of two people, and the videos it was made of."""
    folder = tmp_path_factory.mktemp("set")
    for name in ("anna", "ben"):
        (folder / "in" / name).mkdir(parents=True)
        with VideoWriter(folder / "in" / name / "a.mp4", 32, torch.from_numpy(speech(1.2))) as video:
            for k in range(30):
                video.write(np.full((32, 32, 3), 60 + k, np.uint8))
    write_lines(folder / "people.jsonl", [{"file": "in/anna/a.mp4", "identity": "anna", "split": "train"},
                                          {"file": "in/ben/a.mp4", "identity": "ben", "split": "test"}])
    words = ["prepare", "--crop", "centre", "--size", "32", "--jobs", "1", "--videos", str(folder / "in"),
             "--out", str(folder / "out"), "--people", str(folder / "people.jsonl")]
    assert prepare.main(words) == 0
    return folder, words


# ---- the cases ---------------------------------------------------------------------------------------------

several = pytest.mark.parametrize("cases",
                                  [range(FEW),
                                   pytest.param(range(FEW, MANY),
                                                marks=[pytest.mark.slow, pytest.mark.long])],
                                  ids=["few", "many"])


@several
@pytest.mark.parametrize("kind", ["photo", "sound", "video", "checkpoint"])
def test_sample_survives_damage(kind, cases, good, tmp_path, capfd):
    folder, names = good
    others = [(folder / name).read_bytes() for some in names.values() for name in some]
    for k in cases:
        name = names[kind][k % len(names[kind])]
        given = {"photo": "x.png", "sound": "y.wav", "checkpoint": "w.safetensors"}
        (tmp_path / name).write_bytes(damage(kind, k, (folder / name).read_bytes(), others))
        paths = {what: folder / file for what, file in given.items()} | {kind: tmp_path / name}
        drive = ["--video", paths["video"]] if kind == "video" else ["--wav", paths["sound"]]
        words = ["--img", paths["photo"], *drive, "--ckpt", paths["checkpoint"], "--out", tmp_path / "o.mp4",
                 "--device", "cpu"]
        with limits(f"{kind} {k}"):
            status = sample.main(list(map(str, words)))
        said = capfd.readouterr().err.splitlines()
        if status:
            assert status == 2 and said[-1].startswith("sample.py: ") and os.listdir(tmp_path) == [name], (k,
                said)
        else:
            with av.open(str(tmp_path / "o.mp4")) as made:
                assert made.streams.video[0].frames > 0, k
            os.remove(tmp_path / "o.mp4")
        os.remove(tmp_path / name)


@several
@pytest.mark.parametrize("name", ["settings.jsonl", "people.jsonl"])
def test_prepare_survives_damage(name, cases, prepared, capfd):
    """Of what an earlier run left, or of the list of people: the set is whole, or it is refused and as it
    was."""
    folder, words = prepared
    path = {"settings.jsonl": folder / "out" / name, "people.jsonl": folder / name}[name]
    whole, manifest = path.read_bytes(), (folder / "out" / "manifest.jsonl").read_bytes()
    try:
        for k in cases:
            path.write_bytes(damage(name, k, whole, [b"\x00\x00\x00\x18ftyp" * 8], json_text=True))
            with limits(f"{name} {k}"):
                status = prepare.main(words)
            said = capfd.readouterr().err.splitlines()
            assert status in (0, 2) and (status == 0 or said[-1].startswith("data.py: ")), (k, said)
            assert not list((folder / "out").rglob("*.part"))
            if status:
                assert (folder / "out" / "manifest.jsonl").read_bytes() == manifest, k
            path.write_bytes(whole)
            (folder / "out" / "manifest.jsonl").write_bytes(manifest)
    finally:
        path.write_bytes(whole)


@several
def test_a_damaged_outcome_of_a_video_is_not_read(cases, prepared, tmp_path):
    """None: the video is prepared again. Else it is one that prepare could have written."""
    folder, _ = prepared
    whole = next((folder / "out" / "parts").iterdir()).read_bytes()
    for k in cases:
        (tmp_path / "x.jsonl").write_bytes(damage("parts", k, whole, [b"\x00\x00\x00\x18ftyp" * 8],
                                                  json_text=True))
        with limits(f"parts {k}"):
            part = prepare.read_part(tmp_path / "x.jsonl", folder / "out")
        if part is not None:
            assert all(isinstance(row["identity"], str) and row["frames"] > 0 for row in part["kept"]), k


@several
def test_a_manifest_survives_damage(cases, prepared, tmp_path):
    folder, _ = prepared
    shutil.copytree(folder / "out", tmp_path / "set")
    path = tmp_path / "set" / "manifest.jsonl"
    whole = path.read_bytes()
    for k in cases:
        path.write_bytes(damage("manifest", k, whole, [b"\x00" * 600], json_text=True))
        with limits(f"manifest {k}"):
            try:
                data.Clips([str(tmp_path / "set")], 2, 2, 0.5, 32)[0]
            except InputError:
                pass


@several
def test_landmarks_survive_damage(cases, prepared, tmp_path):
    """They are read as arrays of the clip's length, or refused by name."""
    folder, _ = prepared
    shutil.copytree(folder / "out", tmp_path / "set")
    clip = load_set(str(tmp_path / "set"), "train").popitem()[1][0]
    path = tmp_path / "set" / landmarks.landmark_file(clip["file"])
    rng, frames = np.random.default_rng(0), clip["frames"]
    path.parent.mkdir()
    wholes = []
    for save in (np.savez, np.savez_compressed):
        save(path, ellipses=rng.random((frames, 4, 4), np.float32),
             factors=rng.random((frames, len(landmarks.FACTORS)), np.float32), reader=landmarks.READER)
        wholes.append(path.read_bytes())
    for k in cases:
        path.write_bytes(damage("landmarks", k, wholes[k % 2], wholes))
        with limits(f"landmarks {k}"):
            try:
                ellipses, factors = load_landmarks(clip)
            except InputError as error:
                assert str(path) in str(error), (k, error)
            else:
                assert ellipses.shape == (frames, 4, 4) and np.isfinite(ellipses).all(), k
                assert factors.shape == (frames, len(landmarks.FACTORS)), k
                data.Clips([str(tmp_path / "set")], 2, 2, 0.5, 32)[k]
