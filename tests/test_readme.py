"""README's commands run as they stand, at the nano size; what it names exists."""
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from media.video import VideoWriter

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
LINES = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
ORDER = ("data.py", "train_ae.py", "train_gen.py", "-m world.people", "sample.py", "-m measure.evaluate", "-m measure.pictures",
         "-m measure.ablate", "-m measure.bench")
SMALLER = {"data.py": "--crop centre --size 32 --jobs 1", "train_ae.py": "--steps 2 --persons 2",
           "train_gen.py": "--steps 2 --clips 1 --voices 2",
           "world.people": "--size 32", "sample.py": "", "measure.evaluate": ""}


def commands(script):
    return [shlex.split(line) for line in LINES if line.startswith("python " + script)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which README's relative paths hold, with a short speech and two folders of videos."""
    path = tmp_path_factory.mktemp("readme")
    os.mkdir(path / "examples")
    os.symlink(os.path.join(ROOT, "examples", "portrait.png"), path / "examples" / "portrait.png")
    wave, rate = soundfile.read(os.path.join(ROOT, "examples", "speech.wav"))
    soundfile.write(path / "examples" / "speech.wav", wave[: rate // 2], rate)
    for name in ("HDTF", "my_videos"):
        os.mkdir(path / name)
        with VideoWriter(path / name / "WDA_Someone0.mp4", 32, torch.from_numpy(wave).float()) as video:
            for k in range(50):
                video.write(np.full((32, 32, 3), 4 * k, np.uint8))
    return path


def shrink(words):
    """The command at the nano size: words of a README line -> arguments."""
    start = words.index("-m") + 1 if "-m" in words else 1
    script, rest = words[start], [("nano" if word in ("tiny", "small") else word) for word in words[start + 1:]]
    for option, few in (("--clips", "1"), ("--seconds", "0.2"), ("--frames", "2")):
        if option in rest:
            rest[rest.index(option) + 1] = few
    if script == "sample.py" and "--ckpt" not in rest:
        rest += ["--ckpt", "runs/gen/semo.safetensors"]
    if script == "measure.evaluate":
        rest += ["--clips", "10" if "probe" in rest else "2"]
    command = ["-m", script] if "-m" in words else [os.path.join(ROOT, script)]
    return [sys.executable, *command, *rest, *SMALLER[script].split()]


def test_every_command_runs(folder):
    run = [words for script in ORDER for words in commands(script) if "measure." not in script]
    run.sort(key=lambda words: "--reflow" in words)                          # they need what the others make
    assert len(run) >= 12
    for words in run:
        done = subprocess.run(shrink(words), cwd=folder, capture_output=True, text=True, timeout=120,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})
        assert done.returncode == 0, (words, done.stderr[-2000:])
    for made in ("out.mp4", "out2.mp4", "runs/ae/semo.safetensors", "runs/gen/semo.safetensors"):
        assert (folder / made).stat().st_size > 0


def test_every_line_is_a_known_command():
    known = ("python ", "torchrun ", "pip install -r requirements.txt", "pip install opencv-python-headless", "ruff check .", "pytest")
    assert all(line.startswith(known) for line in LINES if line)
    scripts = [" ".join(shlex.split(line)[1:3 if " -m " in line else 2]) for line in LINES if line.startswith("python ")]
    assert set(scripts) <= set(ORDER)


def test_named_files_and_functions_exist():
    for name in set(re.findall(r"`([\w/]+\.py)`", TEXT)):
        assert os.path.exists(os.path.join(ROOT, name)), name
    for file, rest in re.findall(r"^\|.*\| `([\w/]+\.py)` (`.*`) \|$", TEXT, re.M):
        code = open(os.path.join(ROOT, file), encoding="utf-8").read()
        for name in re.findall(r"`([\w.]+)`", rest):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", code), (file, name)


def test_pinned_torch_is_the_one_that_runs():
    assert f"torch=={torch.__version__.split('+')[0]}" in open(os.path.join(ROOT, "requirements.txt")).read().split()
