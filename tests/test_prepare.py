"""media/prepare.py: any tree of videos becomes the clips it should, with reasons for the rest."""
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from media import prepare as prepare_module
from media import prepared
from media.face import FACE_BOX, Square, crop_square, find_faces, largest, load_detector
from media.files import read_lines
from media.image import from_uint8
from media.prepare import TEST_SHARE, clip_square, parse_identity, split_of, split_scenes

ROOT = Path(__file__).parent.parent
NOISE = np.random.default_rng(0)


def speech(seconds):
    """Bursts of noise and pauses, (S,): passes for speech."""
    wave = NOISE.normal(0, 0.1, round(seconds * 16000)).astype(np.float32)
    return (wave * (np.arange(len(wave)) // 3200 % 2) + 1e-4).astype(np.float32)


def video(path, frames, rate=25, size=(64, 96), paint=None, wave=None, lead=0.0, codec="libx264", aspect=1):
    """A video of `frames` at `rate` (height, width); its sound starts `lead` seconds after its picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        sound = out.add_stream("aac" if codec == "libx264" else "mp3", rate=16000,
                               layout="mono") if wave is not None else None
        if sound:
            frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            frame.sample_rate = 16000
            fifo, given = av.AudioFifo(), round(lead * 16000)
            fifo.write(frame)
            while (part := fifo.read(sound.codec_context.frame_size or 1152, partial=True)) is not None:
                part.pts, part.time_base = given, Fraction(1, 16000)
                given += part.samples
                out.mux(sound.encode(part))
            out.mux(sound.encode(None))
        for k in range(frames):
            picture = np.full((*size, 3), 60 + k % 100, np.uint8) if paint is None else paint(k)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def prepare(*words):
    return prepare_module.main(["prepare", "--crop", "centre", "--size", "32", "--jobs", "1",
                                *map(str, words)])


def rows(folder, name="manifest"):
    return read_lines(folder / f"{name}.jsonl")


# ---- who is who --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path, identity", [
    ("M003/video/front/angry/level_2/001.mp4", "MEAD/M003"),
    ("W011_left_30_neutral_level_1_040.mp4", "MEAD/W011"),
    ("id10283/0cM943TyKcM/00001.mp4", "VoxCeleb/id10283"),
    ("train/id00012#21Uxsk56VDQ#00001#00110.mp4", "VoxCeleb/id00012"),
    ("WDA_KatieHill_000.mp4", "HDTF/WDA_KatieHill"),
    ("x/WRA_JebHensarling2_001.mp4", "HDTF/WRA_JebHensarling"),
    ("RD_Radio34_001.mp4", "HDTF/RD_Radio34"), ("RD_Radio3.mp4", "HDTF/RD_Radio3"),
    ("001_happy_038.mp4", "DH-FaceEmoVid/001"), ("x/018_fear_51.mp4", "DH-FaceEmoVid/018"),
    ("celebv-hq/_Yu-EWF7Fxc_5.mp4", "CelebV-HQ/_Yu-EWF7Fxc"),
    ("CelebV/35666/M2Ohb0FAaJU_11_0.mp4", "CelebV-HQ/M2Ohb0FAaJU"),
    ("alice/interview_a_01.mp4", "alice"), ("bob/interview_a_02.mp4", "bob"),
    ("anna/holiday 1.mp4", "anna"), ("a/b/c.mp4", "a/b"), ("lonely.mp4", "."),
])
def test_identity_from_known_names_or_the_folder(path, identity):
    assert parse_identity(path)["identity"] == identity


def test_the_folder_of_a_set_may_be_the_one_given():
    assert parse_identity("35666/M2Ohb0FAaJU_11_0.mp4", "CelebV-HQ")["identity"] == "CelebV-HQ/M2Ohb0FAaJU"
    assert parse_identity("35666/M2Ohb0FAaJU_11_0.mp4", "holidays")["identity"] == "35666"


def test_mead_names_tell_emotion_level_and_camera():
    told = parse_identity("M003/video/left_30/sad/level_3/012.mp4")
    assert (told["emotion"], told["level"], told["camera"]) == ("sad", 3, "left_30")


@pytest.mark.parametrize("emotion", ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"])
def test_dh_faceemovid_names_tell_the_emotion(emotion):
    assert parse_identity(f"part/006_{emotion}_031.mp4") == {"identity": "DH-FaceEmoVid/006",
                                                             "emotion": emotion}


def test_the_split_depends_on_the_name_alone():
    names = [f"person {k}" for k in range(4000)]
    splits = [split_of(name) for name in names]
    assert splits.count("test") / 4000 == pytest.approx(TEST_SHARE, abs=0.012) and set(splits) == {"train",
        "test"}
    assert [split_of(name) for name in names[:5]] == splits[:5]


# ---- prepare -----------------------------------------------------------------------------------------------

def test_pieces_are_equal_parts_of_scenes():
    assert split_scenes(100, []) == [(0, 100)]
    assert split_scenes(700, [100]) == [(0, 100), (100, 200), (300, 200), (500, 200)]
    assert split_scenes(251, []) == [(0, 125), (125, 126)]


def test_a_mixed_folder(tmp_path):
    """Good, 30 fps, other containers, two scenes; short, silent, clipped, noisy, broken, empty, no video."""
    tree = tmp_path / "in"
    video(tree / "anna" / "good.mp4", 50, wave=speech(2))
    video(tree / "anna" / "fast.mkv", 60, rate=30)
    video(tree / "ben" / "old.avi", 30, codec="mpeg4")
    video(tree / "ben" / "scenes.mp4", 70,
          paint=lambda k: np.full((64, 96, 3), 40 if k < 40 else 200, np.uint8))
    video(tree / "ben" / "short.mp4", 20)
    video(tree / "ben" / "silent.mp4", 30, wave=np.zeros(19200, np.float32))
    video(tree / "ben" / "clipped.mp4", 30, wave=np.sign(speech(1.2)).astype(np.float32))
    video(tree / "ben" / "noisy.mp4", 30, wave=NOISE.normal(0, 0.1, 19200).astype(np.float32))
    (tree / "broken.mp4").write_bytes((tree / "anna" / "good.mp4").read_bytes()[:3000])
    (tree / "empty.mov").write_bytes(b"")
    (tree / "notes.txt").write_text("no video")
    assert prepare("--videos", tree, "--out", tmp_path / "out") == 0
    kept = {(row["source"], row["start"]): row for row in rows(tmp_path / "out")}
    assert {key: row["frames"] for key, row in kept.items()} == {
        ("in/anna/good.mp4", 0): 50, ("in/anna/fast.mkv", 0): 50, ("in/ben/old.avi", 0): 30,
        ("in/ben/scenes.mp4", 0): 40, ("in/ben/scenes.mp4", 1.6): 30}
    assert {row["identity"] for row in kept.values()} == {"in/anna", "in/ben"}
    assert [row["sound"] for row in kept.values()].count(True) == 1 and kept["in/anna/good.mp4", 0]["sound"]
    reasons = {row["source"]: row["reason"] for row in rows(tmp_path / "out", "dropped")}
    for name, word in (("ben/short.mp4", "shorter"), ("ben/silent.mp4", "silent"),
                       ("ben/clipped.mp4", "clipped"),
                       ("ben/noisy.mp4", "noisy"), ("broken.mp4", "not a sound or video"),
                       ("empty.mov", "empty")):
        assert word in reasons.pop(f"in/{name}")
    assert not reasons
    for row in kept.values():
        frames, wave = prepared.read_clip(str(tmp_path / "out" / row["file"]), 32)
        assert frames.shape == (row["frames"], 3, 32, 32) and (wave is not None) == row["sound"]


def test_flash_and_click_stay_together(tmp_path):
    """30 fps, the sound starting 0.3 s late, a square that lights up at 1.3 s just as a click is heard."""
    wave = 0.01 * speech(2)
    wave[16000:16160] = 0.9                                           # one second after the sound's own start

    def paint(k):
        picture = np.full((64, 64, 3), 60, np.uint8)
        picture[20:40, 20:40] = 250 if k >= 39 else 60                       # 1.3 s at 30 fps
        return picture

    video(tmp_path / "in" / "a.mp4", 66, rate=30, size=(64, 64), paint=paint, wave=wave, lead=0.3)
    assert prepare("--videos", tmp_path / "in", "--out", tmp_path / "out") == 0
    frames, heard = prepared.read_clip(str(tmp_path / "out" / rows(tmp_path / "out")[0]["file"]), 32)
    flash = int((frames[:, :, 15, 15].mean(1) > 0.3).nonzero()[0])
    click = int(heard.abs().argmax()) / 640
    assert abs(flash - 1.3 * 25) <= 1 and abs(click - 1.3 * 25) <= 1


def test_pixels_that_are_not_square_become_so(tmp_path):
    wide = np.full((64, 96, 3), 40, np.uint8)
    wide[:, 40:56] = 220                                                     # a bar 16 wide, in stored pixels
    for name, aspect in (("a", 1), ("b", 2)):
        video(tmp_path / "in" / f"{name}.mp4", 30, paint=lambda k: wide, aspect=aspect)
    assert prepare("--videos", tmp_path / "in", "--out", tmp_path / "out", "--size", "64") == 0
    for row in rows(tmp_path / "out"):
        frames, _ = prepared.read_clip(str(tmp_path / "out" / row["file"]), 64)
        assert (frames[0, 0, 32] > 0.3).sum().item() == pytest.approx({"in/a.mp4": 16,
            "in/b.mp4": 32}[row["source"]], abs=2)


def tree_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}


@pytest.fixture(scope="module")
def six_videos(tmp_path_factory):
    """A folder of videos, and the files of an unbroken run."""
    folder = tmp_path_factory.mktemp("six")
    for k in range(6):
        video(folder / "in" / f"{k}.mp4", 60, size=(256, 256),
              paint=lambda n, k=k: np.full((256, 256, 3), 30 * k + n % 30, np.uint8))
    assert prepare("--videos", folder / "in", "--out", folder / "whole", "--size", "64") == 0
    return folder / "in", tree_of(folder / "whole")


def wait_for_a_part(out):
    until = time.time() + 300
    while not list(out.glob("parts/*.jsonl")) and time.time() < until:
        time.sleep(0.01)


def prepare_in_a_group(*words):
    os.setpgid(0, 0)
    prepare_module.get_context = lambda kind: multiprocessing.get_context("fork")
    prepare(*words)


def test_killed_midway_and_started_again_it_gives_the_same_bytes(fork, six_videos, tmp_path):
    folder, whole = six_videos
    words = ["--videos", folder, "--size", "64", "--out", tmp_path / "cut"]
    run = fork.Process(target=prepare_in_a_group, args=words)
    run.start()
    wait_for_a_part(tmp_path / "cut")
    os.killpg(run.pid, signal.SIGKILL)
    with open(tmp_path / "cut" / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)                                     # until the worker is gone, too
    assert not (tmp_path / "cut" / "manifest.jsonl").exists()
    (tmp_path / "cut" / "clips" / ".half.mp4.1.part").write_bytes(b"what a kill while it writes leaves")
    assert prepare(*words) == 0
    assert tree_of(tmp_path / "cut") == whole


def test_told_to_stop_and_started_again_it_gives_the_same_bytes(six_videos, tmp_path):
    """As a program, with its own worker."""
    folder, whole = six_videos
    words = ["--videos", folder, "--size", "64", "--out", tmp_path / "cut"]
    run = subprocess.Popen([sys.executable, ROOT / "data.py", "prepare", "--crop", "centre", "--jobs", "1",
                            *words], stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_a_part(tmp_path / "cut")
    run.terminate()
    assert run.wait(300) == 130
    assert not list((tmp_path / "cut").rglob(".*")) and not (tmp_path / "cut" / "manifest.jsonl").exists()
    assert prepare(*words) == 0
    assert tree_of(tmp_path / "cut") == whole


def test_a_list_of_people_decides_identity_and_split(tmp_path):
    for name in ("a", "b", "c"):
        video(tmp_path / "set" / "in" / f"{name}.mp4", 30)
    (tmp_path / "set" / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"file": "in/a.mp4", "ident": "m1", "split": "test"},
        {"file": "in/b.mp4", "identity": "m2", "split": "train"})))
    assert prepare("--videos", tmp_path / "set" / "in", "--out", tmp_path / "out", "--people",
                   tmp_path / "set" / "list.jsonl") == 0
    found = {row["source"]: (row["identity"], row["split"]) for row in rows(tmp_path / "out")}
    assert found["in/a.mp4"] == ("m1", "test") and found["in/b.mp4"] == ("m2",
        "train") and found["in/c.mp4"][0] == "in/."


@pytest.mark.parametrize("words, told", [
    (["--videos", "none", "--out", "out"], "none is not a folder"),
    (["--videos", "bare", "--out", "out"], "no video file"),
    (["--videos", "in", "--out", "file"], "cannot be made"),
    (["--videos", "in", "--out", "other"], "another --size or --crop"),
    (["--videos", "in", "--out", "out", "--people", "bad.jsonl"], "bad.jsonl"),
    (["--videos", "in", "in", "--out", "out"], "two folders"),
    (["--videos", "in", "--out", "out", "--crop", "face", "--detector", "none.onnx"], "OpenCV|none.onnx"),
])
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir(), Path("in").mkdir(), Path("file").write_text(""), Path("other").mkdir()
    Path("in/a.mp4").write_bytes(b"x")
    Path("bad.jsonl").write_text('{"file": 3}\n')
    Path("other/settings.jsonl").write_text('{"size": 64, "crop": "centre"}\n')
    assert prepare(*words) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("data.py: ")
    assert any(word in said for word in told.split("|"))
    assert "\n" not in said
    assert "Trace" not in said


def test_nothing_to_keep_is_said(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"x")
    assert prepare("--videos", tmp_path / "in", "--out", tmp_path / "out") == 2
    assert "no clip could be made" in capsys.readouterr().err and rows(tmp_path / "out", "dropped")


# ---- faults ------------------------------------------------------------------------------------------------

def start_crashing_worker(start=prepare_module.start_worker):
    """Start a process of prepare that some videos end, as a fault of libav or the memory killer would."""
    def scan_video(path, detector, scan=prepare_module.scan_video):
        if path.endswith("crash.mp4") or path.endswith("once.mp4") and not os.path.exists(path + ".seen"):
            open(path + ".seen", "w").close()
            os.kill(os.getpid(), signal.SIGSEGV)
        return scan(path, detector)

    prepare_module.scan_video = scan_video
    start()


def test_a_crashing_worker_costs_one_video(tmp_path, monkeypatch):
    for name in ("a", "b crash", "c once"):
        video(tmp_path / "in" / f"{name}.mp4", 30)
    monkeypatch.setattr(prepare_module, "start_worker", start_crashing_worker)
    assert prepare("--videos", tmp_path / "in", "--out", tmp_path / "out", "--jobs", "2") == 0
    assert [row["source"] for row in rows(tmp_path / "out")] == ["in/a.mp4", "in/c once.mp4"]
    assert [(row["source"], row["reason"]) for row in rows(tmp_path / "out", "dropped")] == [
        ("in/b crash.mp4", "the process that read it crashed, twice")]
    assert len(list((tmp_path / "out" / "clips").iterdir())) == 2


def test_two_prepares_do_not_write_one_folder(tmp_path, capsys):
    video(tmp_path / "in" / "a.mp4", 30)
    (tmp_path / "out" / "clips").mkdir(parents=True)
    part = tmp_path / "out" / "clips" / ".x.mp4.1.part"
    part.write_bytes(b"what the other writes")
    with prepare_module.lock_folder(tmp_path / "out"):
        assert prepare("--videos", tmp_path / "in", "--out", tmp_path / "out") == 2
    assert "another prepare" in capsys.readouterr().err and part.exists()
    assert prepare("--videos", tmp_path / "in", "--out", tmp_path / "out") == 0 and not part.exists()


def test_sound_is_held_a_scene_at_a_time(monkeypatch):
    """An hour of sound in chunks of a second: no more is taken than the scenes so far need; then silence."""
    taken = []

    def chunks(path):
        for k in range(3600):
            taken.append(k)
            yield torch.full((16000,), float(k))

    monkeypatch.setattr(prepare_module, "audio_chunks", chunks)
    scenes = split_scenes(3601 * 25 + 10, [130])
    for (start, count), wave in zip(scenes, prepare_module.split_audio("x", scenes), strict=True):
        assert len(wave) == count * 640 and len(taken) <= (start + count) / 25 + 1
        last = (start + count - 1) // 25 if start + count <= 90000 else 0
        assert wave[0] == start // 25 and wave[-1] == last


def test_names_that_are_not_utf8(tmp_path):
    video(tmp_path / "a.mp4", 30)
    folder = os.path.join(os.fsencode(tmp_path), b"in\xff 'x'\n")
    os.makedirs(folder)
    os.rename(tmp_path / "a.mp4", os.path.join(folder, b"\xfe.mp4"))
    assert prepare("--videos", os.fsdecode(folder), "--out", tmp_path / "out") == 0
    row, = rows(tmp_path / "out")
    assert os.fsencode(row["source"]) == b"in\xff 'x'\n/\xfe.mp4"
    assert (tmp_path / "out" / row["file"]).exists()


# ---- faces -------------------------------------------------------------------------------------------------

FACE = Square(130, 80, 100, 0.1)


def test_the_square_is_that_of_the_median_face():
    assert clip_square([FACE] * 4 + [None], 400, 300, 100) == FACE
    stray = Square(150, 90, 120, 0.3)
    assert clip_square([FACE] * 3 + [stray] * 2, 400, 300, 100) == FACE
    # may leave the picture a little
    assert clip_square([Square(45, 40, 100)] * 3, 400, 300, 100) == Square(45, 40, 100)


@pytest.mark.parametrize("faces, word", [
    ([FACE] * 7 + [None] * 3, "7 of 10"), ([None] * 3, "0 of 3"), ([Square(100, 100, 49)] * 4, "too small"),
    ([FACE] * 5 + [Square(230, 130, 100)] * 5, "leaves"), ([Square(380, 100, 100)] * 4, "cut off"),
])
def test_faces_that_do_not_do_are_told(faces, word):
    assert word in clip_square(faces, 400, 300, 100)


def test_prepare_cuts_the_square_of_the_face(tmp_path):
    """A face that is small and off the middle of a video is framed in its clip as in a photo."""
    portrait = Image.open(ROOT / "examples" / "portrait.png").convert("RGB")
    portrait = portrait.resize((160, 160), Image.Resampling.LANCZOS)
    frame = Image.new("RGB", (320, 240), (90, 110, 130))
    frame.paste(portrait, (140, 40))
    video(tmp_path / "a.mp4", 30, size=(240, 320), paint=lambda k: np.asarray(frame))
    (tmp_path / "clips").mkdir()
    about = {"identity": "a", "split": "train"}
    row, = prepare_module.prepare_one(str(tmp_path / "a.mp4"), "in/a.mp4", about, tmp_path, 96)["kept"]
    square = Square(*row["square"])
    alone = largest(find_faces(load_detector(), portrait))
    moved = square.cx - 140, square.cy - 40, square.size
    assert moved == pytest.approx((alone.cx, alone.cy, alone.size), abs=6)
    assert row["face"] == FACE_BOX and row["margin"] == 1.25
    wide = prepared.read_at(str(tmp_path / row["file"]), [7], 96, margin=True)
    around = crop_square(frame, replace(square, size=1.25 * square.size), 120)
    assert wide.shape == (1, 120, 120, 3) and np.abs(wide[0].astype(int) - around).mean() < 5
    frames, _ = prepared.read_clip(str(tmp_path / row["file"]), 96)
    expected = from_uint8(crop_square(frame, square, 96))
    assert frames.shape == (30, 3, 96, 96) and (frames[7] - expected).abs().mean() < 0.03
