"""Every command: a user's mistake is one sentence and status 2; a fault of ours keeps its traceback. A full
disk, odd paths and odd environments cost no file."""
import io
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from test_prepare import video as make_video
from test_sample import META, small_models
from test_train_ae import same

import sample
import train_ae
import train_gen
import training
from measure import ablate, bench, evaluate, pictures, reader
from media import prepare
from media.files import InputError, OutputError, read_lines, write_lines
from media.image import save_grid
from media.video import VideoWriter
from media.weights import save_weights
from world import people

COMMANDS = [  # module, what of it is made to fail, arguments
    (sample, "run", ["--img", "x.png", "--wav", "y.wav"]), (evaluate.COMMANDS, "talk", ["talk"]),
    (bench.PARTS, "train", ["train"]),
    (ablate, "run", ["--seeds", "0", "--only", "prediction"]), (pictures, "open_checkpoint", []),
    (reader, "train_regressor", []), (people, "random_clip", ["--out", "made"])]
MAIN = {id(evaluate.COMMANDS): evaluate, id(bench.PARTS): bench}


def run(monkeypatch, place, name, words, error):
    def fail(*args):
        raise error

    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, name, fail)
    return MAIN.get(id(place), place).main(words)


@pytest.mark.parametrize("place, name, words", COMMANDS)
def test_bad_input_is_told_in_a_sentence(place, name, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, place, name, words, InputError("x.png is not a picture")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(": x.png is not a picture")


@pytest.mark.parametrize("place, name, words", COMMANDS)
def test_a_fault_of_ours_does_not_look_like_bad_input(place, name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not enough values"):
        run(monkeypatch, place, name, words, ValueError("not enough values to unpack"))


# ---- a full disk -------------------------------------------------------------------------------------------

@contextmanager
def disk_ends_after(size):
    """No file can grow beyond `size` bytes."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def write_video(path):
    rng = np.random.default_rng(0)
    with VideoWriter(path, 64, torch.zeros(16000)) as video:
        for _ in range(25):
            video.write(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))


WRITERS = {
    "o.mp4": write_video,
    "state.pt": lambda path: training.atomic_save(path, weights=torch.zeros(100_000)),
    "w.safetensors": lambda path: save_weights(path, small_models(), META),
    "r.safetensors": lambda path: reader.save_regressor(path, reader.FactorRegressor()),
    "step.png": lambda path: save_grid(path, [torch.rand(2, 3, 128, 128)]),
    "manifest.jsonl": lambda path: write_lines(path, [{"file": "x" * 1000}] * 100)}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_older_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"older")
    with disk_ends_after(20_000), pytest.raises(OutputError,
                                                match=f"{name} cannot be written: File too large"):
        WRITERS[name](path)
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == [name]
    WRITERS[name](path)
    assert path.stat().st_size > 20_000 and os.listdir(tmp_path) == [name]


def test_a_full_disk_ends_the_synthetic_data_set_in_a_sentence(tmp_path, capsys):
    with disk_ends_after(20_000):
        assert people.main(["--out", str(tmp_path), "--clips", "1", "--seconds", "1", "--size", "32"]) == 2
    assert "cannot be written" in capsys.readouterr().err.splitlines()[-1] and os.listdir(tmp_path) == []


def test_a_full_disk_is_no_fault_of_a_video(tmp_path):
    """It ends the run; the video is not put down as dropped."""
    make_video(tmp_path / "a.mp4", 30, paint=lambda k: np.random.default_rng(k).integers(0, 255, (64, 96, 3),
        dtype=np.uint8))
    (tmp_path / "clips").mkdir()
    with disk_ends_after(10_000), pytest.raises(OutputError, match="cannot be written"):
        prepare.prepare_one(str(tmp_path / "a.mp4"), "in/a.mp4", {"identity": "a", "split": "train"},
                            tmp_path, 64, "centre")
    assert os.listdir(tmp_path / "clips") == []


@pytest.fixture
def train(tmp_path):
    """-> a function that trains stage 1 or stage 2 for two steps, in a folder of its own."""
    save_weights(tmp_path / "w.safetensors", small_models(), META)

    def run(stage, *more):
        words = ["--ae", str(tmp_path / "w.safetensors")] if stage is train_gen else []
        return stage.main(["--preset", "nano", "--device", "cpu", "--steps", "2", "--out",
                           str(tmp_path / "run"), *words, *more])

    return run


@pytest.mark.parametrize("stage", [train_ae, train_gen])
def test_a_full_disk_ends_training_in_a_sentence(stage, train, tmp_path, capsys):
    """While the cache of stage 2 is written, or the first weights."""
    with disk_ends_after(3_000):
        assert train(stage) == 2
    said = capsys.readouterr().err
    assert said.count("cannot be written: File too large") == 1 and "Traceback" not in said
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".")]
    assert not (tmp_path / "run" / "state.pt").exists()


def test_damaged_caches_are_made_again(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gen, "preview", lambda *_: None)
    assert train(train_gen) == 0
    caches = [tmp_path / "run" / name for name in ("clips-0.pt", "voices-0.pt")]
    whole = [torch.load(path, weights_only=True) for path in caches]
    for path in caches:
        path.write_bytes(path.read_bytes()[:-1000])
    assert train(train_gen) == 0
    assert all(same(torch.load(path, weights_only=True), held)
               for path, held in zip(caches, whole, strict=True))


@pytest.mark.parametrize("stage", [train_ae, train_gen])
def test_a_clock_that_is_set_back_changes_nothing(stage, train, tmp_path, monkeypatch):
    clock = count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(train_gen, "preview", lambda *_: None)
    assert train(stage) == 0
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert row["step"] == 2 and row.get("pictures_per_second", row.get("windows_per_second")) > 0


# ---- odd paths and environments ----------------------------------------------------------------------------

@pytest.fixture
def odd(tmp_path):
    """Linux alone takes any bytes as a name. A folder with an odd name that holds a photo, a sound, and the
    words of a command."""
    if sys.platform != "linux":
        pytest.skip("names are UTF-8 here")
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"a 'b' \"c\" $(d) %s\n\xff#?:")))
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(folder
        / "x.png")
    soundfile.write(str(tmp_path / "y.wav"), 0.1 * np.ones(8000), 16000)
    os.rename(tmp_path / "y.wav", folder / "y.wav")
    save_weights(tmp_path / "w.safetensors", small_models(), META)
    return folder, ["--img", str(folder / "x.png"), "--wav", str(folder / "y.wav"), "--out",
                    str(folder / "o.mp4"), "--ckpt", str(tmp_path / "w.safetensors"), "--device", "cpu"]


def test_paths_with_odd_characters(odd, monkeypatch, capfd):
    """Strict output, too: a name that cannot be printed as it is must not end a finished job."""
    folder, words = odd
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", "strict"))
        assert sample.main(words) == 0 and sorted(os.listdir(folder)) == ["o.mp4", "x.png", "y.wav"]
        sys.stdout.seek(0)
        assert "12 frames" in sys.stdout.read()
    assert sample.main([*words[:2], "--wav", str(folder / "none.wav"), *words[4:]]) == 2
    assert "none.wav does not exist" in capfd.readouterr().err


def test_the_synthetic_data_set_takes_odd_names(odd):
    folder, _ = odd
    words = ["--clips", "1", "--seconds", "0.04", "--size", "32"]
    assert people.main(["--out", str(folder / "set"), *words]) == 0
    assert len(os.listdir(folder / "set")) == 3


def test_a_pipe_to_a_full_disk_is_told_without_a_home_too(odd):
    _, words = odd
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "sample.py", *words[:4], "--out", "-", *words[6:]],
                              cwd=Path(__file__).parent.parent, stdout=full, stderr=subprocess.PIPE,
                              env=environ)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"No space left" in done.stderr.splitlines()[-1]


# ---- many videos -------------------------------------------------------------------------------------------

def break_video(path, how, whole):
    """Put in place of a video what cannot be used, in one of ten ways."""
    path.unlink()
    if how == 0:
        path.write_bytes(b"")
    elif how == 1:
        path.write_text("no video at all")
    elif how == 2:
        path.write_bytes(np.random.default_rng(0).bytes(20_000))
    elif how == 3:
        path.write_bytes(whole[:len(whole) // 2])
    elif how == 4:
        path.write_bytes(whole[:100])
    elif how == 5:
        path.write_bytes(bytes(400) + whole[400:])
    elif how == 6:
        soundfile.write(str(path.with_suffix(".wav")), 0.1 * np.ones(16000), 16000)
        path.with_suffix(".wav").rename(path)
    elif how == 7:
        make_video(path, 5)                                      # shorter than a second
    elif how == 8:
        path.symlink_to("nowhere.mp4")
    else:
        os.mkfifo(path)


@pytest.mark.slow
@pytest.mark.long
def test_broken_videos_cost_themselves_alone(tmp_path):
    """VIDEOS=200: so many, a quarter of them broken in ten ways."""
    number = int(os.environ.get("VIDEOS", 200))
    make_video(tmp_path / "whole.mp4", 30)
    whole, bad = (tmp_path / "whole.mp4").read_bytes(), set()
    for k in range(number):
        path = tmp_path / "in" / f"person{k % 7}" / f"{k:03d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)
        if k % 4 == 3:
            break_video(path, k // 4 % 10, whole)
            bad.add(f"in/person{k % 7}/{path.name}")
    done = subprocess.run([sys.executable, "data.py", "prepare", "--crop", "centre", "--size", "32", "--jobs",
                           "1", "--videos", str(tmp_path / "in"), "--out", str(tmp_path / "out")],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    kept, dropped = (read_lines(tmp_path / "out" / f"{name}.jsonl") for name in ("manifest", "dropped"))
    assert {row["source"] for row in dropped} == bad and all(row["reason"] for row in dropped)
    assert len(kept) == number - len(bad) and not {row["source"] for row in kept} & bad
    assert len(os.listdir(tmp_path / "out" / "clips")) == len(kept)
