"""README's commands run as they stand, at the nano size; what it and the other documents name exists."""
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import soundfile
import torch

from measure import clips, pictures
from media.image import to_uint8
from media.prepare import split_of
from media.video import VideoWriter
from world.people import random_clip
from world.render import render

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
# What makes a command quick. measure.ablate takes hours at any size; tests/test_ablate.py runs it.
SMALLER = {"sample": "", "data": "--crop centre --size 32 --jobs 1", "world.people": "--size 32",
           "train_ae": "--steps 2 --persons 2 --workers 0", "train_gen": "--steps 2 --clips 1 --voices 2",
           "measure.evaluate": "--clips 2", "measure.pictures": "", "measure.bench": "--seconds 1 --rounds 1"}


def module_of(words):
    """Words of a command -> name of its module, its arguments."""
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    return name.removesuffix(".py"), rest


COMMANDS = [module_of(shlex.split(line)) for line in LINES if line.startswith("python ")]
RUN = [command for command in COMMANDS if command[0] in SMALLER]
TRAINING = [command for command in RUN if command[0] in ("data", "train_ae", "train_gen")]


def shrink(name, words):
    """Arguments of README -> the same at the nano size."""
    words = ["nano" if word in ("tiny", "small") else word for word in words]
    for option, few in (("--clips", "1"), ("--seconds", "0.2"), ("--frames", "2")):
        if option in words:
            words[words.index(option) + 1] = few
    if name in ("sample", "measure.bench") and "--ckpt" not in words:
        words += ["--ckpt", "runs/gen/semo.safetensors"]
    return words + SMALLER[name].split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which README's relative paths hold: a photo, a short speech, and two folders of videos.

    One of two persons belongs to the test split, which the hash of a name decides.
    """
    path = tmp_path_factory.mktemp("readme")
    (path / "examples").mkdir()
    (path / "examples" / "portrait.png").symlink_to(ROOT / "examples" / "portrait.png")
    wave, rate = soundfile.read(ROOT / "examples" / "speech.wav")
    soundfile.write(path / "examples" / "speech.wav", wave[: rate // 2], rate)
    person = next(name for name in map(str, range(1000)) if split_of(f"my_videos/{name}") == "test")
    for seed, video in enumerate(("HDTF/WDA_Someone0.mp4", f"my_videos/{person}/a.mp4")):
        (path / video).parent.mkdir(parents=True)
        clip = random_clip(torch.tensor([seed]), 40)
        pictures = to_uint8(render(clip["identity"].expand(40, -1), clip["motion"][0], 32))
        with VideoWriter(str(path / video), 32, clip["wave"][0]) as writer:
            for picture in pictures.permute(0, 2, 3, 1).numpy():
                writer.write(picture)
    return path


@pytest.mark.slow
def test_every_command_runs(folder, monkeypatch):
    assert len(RUN) >= 14
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pictures, "FRAMES", {"clip": 6, "pca": 40, "speech": 20})
    monkeypatch.setitem(clips.FRAMES, "reconstruct", 5)
    # training first, since sample.py has no embedded weights here; reflow after its teachers
    TRAINING.sort(key=lambda command: "--reflow" in command[1])
    for name, words in TRAINING + [command for command in RUN if command not in TRAINING]:
        main = importlib.import_module("media.prepare" if name == "data" else name).main
        assert main(shrink(name, words)) in (None, 0), (name, words)
    for file in ("out.mp4", "out2.mp4", "runs/ae/semo.safetensors", "runs/mine_gen/semo.safetensors"):
        assert Path(file).stat().st_size > 0


@pytest.mark.slow
def test_first_command_runs_as_a_user_runs_it(folder):
    """Whose home folder cannot be written, either."""
    line = next(line for line in LINES if line.startswith("python sample.py"))
    words = [str(ROOT / "sample.py") if word == "sample.py" else word for word in shlex.split(line)[1:]]
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "HOME": "/proc", "XDG_CACHE_HOME": "/proc"})
    assert done.returncode == 0 and done.stderr == "" and "frames" in done.stdout, done.stderr[-2000:]


def test_every_line_is_a_known_command():
    modules = {name for name, _ in COMMANDS}
    assert modules <= {*SMALLER, "measure.ablate"}
    others = [line for line in LINES if line and not line.startswith("python ")]
    assert others == ["pip install -r requirements.txt"]


def test_options_in_documents_exist():
    """Every option of a python command in a document or a recipe stands in the source of its module."""
    texts = [*DOCUMENTS, *ROOT.glob("recipes/*.sh")]
    found = 0
    for path in texts:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:python|torchrun)[^\n`#|]*", text):
            match = re.search(r"(?:python|torchrun) .*?(?:-m ([\w.]+)|\b(\w+)\.py\b)(.*)", line)
            if not match or not (source := source_of(match[1] or match[2])):
                continue
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", match[3]):
                assert f'"{option}"' in source, (path.name, line)
                found += 1
    assert found > 40


def test_options_named_alone_exist():
    """An option in backquotes without its command belongs to a command of this repository, or to torchrun."""
    paths = (path for path in ROOT.glob("**/*.py") if "node_modules" not in path.parts)
    sources = "".join(path.read_text(encoding="utf-8") for path in paths)
    for path in DOCUMENTS:
        for option in re.findall(r"`(--[a-z][\w-]*)", path.read_text(encoding="utf-8")):
            assert f'"{option}"' in sources or option == "--shutdown-timeout", (path.name, option)


def source_of(name):
    """Text of a module of this repository and of the options it shares, '' if it is none."""
    name = {"data": "media.prepare"}.get(name, name)
    paths = (ROOT / (name.replace(".", "/") + ".py"), ROOT / name.replace(".", "/") / "__main__.py")
    text = next((path.read_text(encoding="utf-8") for path in paths if path.is_file()), "")
    if name in ("train_ae", "train_gen"):
        return text + source_of("training")
    uses_shared = "command_parser(" in text and name != "measure.checkpoint"
    return text + source_of("measure.checkpoint") if uses_shared else text


def test_readme_is_short():
    assert len(TEXT.splitlines()) <= 250


def test_links_lead_to_files():
    links = [(path, link) for path in DOCUMENTS
             for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text())]
    assert len(links) > 12
    for path, link in links:
        assert (path.parent / link).exists(), (path.name, link)


def test_anchors_lead_to_headings():
    for path in DOCUMENTS:
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)#([\w-]+)\)", path.read_text()):
            target = (path.parent / link).read_text() if link else path.read_text()
            titles = re.findall(r"^#+ (.*)$", target, re.M)
            headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in headings, (path.name, link, anchor)


def test_named_files_and_functions_exist():
    for name in set(re.findall(r"`([\w/]+\.(?:py|md|sh|txt|cff|safetensors))`", TEXT)):
        assert (ROOT / name).exists(), name
    pairs = re.findall(r"`([\w/]+\.py)` ((?:`[\w.]+`(?:, )?)+)", TEXT)
    assert len(pairs) > 12
    for file, names in pairs:
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)(?<!\.py)`", names):
            last = name.split(".")[-1]
            assert re.search(rf"(def|class) {last}\b|^{last} =", code, re.M), (file, name)


def test_file_tree_is_complete():
    """Each Python file outside tests/ is named in README's tree, below its folder, and nothing else is."""
    tree, named, room = re.search(r"## Files\n\n```\n(.*?)```", TEXT, re.S)[1], set(), ""
    for line in tree.splitlines():
        start = re.match(r"(\w+/)", line)
        room = start[1] if start else room
        named |= {room + name for name in re.findall(r"\b[a-z_]+\.py\b", line)}
    exist = {path.relative_to(ROOT).as_posix() for room in (".", "media", "world", "measure", "web")
             for path in (ROOT / room).glob("*.py") if not path.name.startswith("__")}
    assert named == exist


def test_pinned_torch_is_the_one_that_runs():
    assert f"torch=={torch.__version__.split('+')[0]}" in (ROOT / "requirements.txt").read_text().split()


def test_project_lists_every_module():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    assert set(settings["packages"]) == {path.parent.name for path in ROOT.glob("*/__init__.py")}
