"""SIGKILL at random moments of every command; the same command again gives what an unbroken one gives.

    pytest tests/test_kills.py                     a few kills
    KILLS=200 pytest tests/test_kills.py -m long   as many, shared out evenly

Each run is a process of its own, forked from one that has only imported the modules.
"""
import multiprocessing
import os
import random
import signal
import socket
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from test_prepare import tree_of
from test_prepare import video as make_video
from test_sample import META, small_models
from torch.utils._pytree import tree_flatten

import sample
import train_ae
import train_gen
import training
from media import prepare
from media.weights import save_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a process that forks others")
FORK = multiprocessing.get_context("forkserver")
SECONDS = 600.0


def work(main, words, environ):
    """A command, in a process group of its own."""
    os.setpgid(0, 0)
    os.environ.update(environ)
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    prepare.get_context = lambda kind: multiprocessing.get_context("fork")       # its worker is there at once
    if environ:                                                                  # one of several processes
        training.shutdown(lambda: main(words))
    os._exit(main(words))


def start(command, ranks):
    """-> the processes of a command."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environs = [{"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
                if ranks > 1 else {} for rank in range(ranks)]
    processes = [FORK.Process(target=work, args=(*command, environ)) for environ in environs]
    for process in processes:
        process.start()
    return processes


def finish(processes):
    """-> the exit statuses."""
    for process in processes:
        process.join(SECONDS)
    return [process.exitcode for process in processes]


def kill(processes, victim, after):
    """End one process after so many seconds, then the others, as torchrun does -> whether it was still at
    work."""
    processes[victim].join(after)
    for process in (processes[victim], *processes):
        if process.is_alive():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:                                # it has no group yet, or is over
                process.kill()
            process.join()
    return processes[victim].exitcode == -signal.SIGKILL


# ---- commands: function and arguments, where the result is, what of it must be the same --------------------

@pytest.fixture(scope="module")
def given(fork, tmp_path_factory):
    """A photo, a sound, weights, three videos; and the process that forks others is started."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(folder / "x.png")
    soundfile.write(folder / "y.wav", 0.1 * rng.standard_normal(24000).clip(-3, 3), 16000)
    save_weights(folder / "w.safetensors", small_models(), META)
    for name in ("a", "b", "c"):
        make_video(folder / "in" / name / "v.mp4", 40,
                   paint=lambda k: rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    return folder


def same(a, b):
    """Equal to the last bit: nested dicts and lists of tensors, bytes and numbers."""
    (one, how), (other, like) = tree_flatten(a), tree_flatten(b)
    return how == like and all(torch.equal(x, y) if torch.is_tensor(x) else x == y
                               for x, y in zip(one, other, strict=True))


def state_of(out):
    """What a training leaves that does not tell the time; the archive in state.pt has a name that does."""
    files = {name: content for name, content in tree_of(out).items()
             if name.name not in ("state.pt", "log.jsonl", "progress.png") and name.suffix != ".pt"}
    return {"files": files, "state": torch.load(out / "state.pt", weights_only=True)}


def command_of(name, given, out):
    """-> ((function, words), number of processes, a function of the result's folder)."""
    few = ["--preset", "nano", "--device", "cpu", "--steps", "2", "--save-every", "1", "--out", str(out)]
    more = ["--ae", str(given / "w.safetensors")]
    return {
        "sample": ((sample.main, ["--img", str(given / "x.png"), "--wav", str(given / "y.wav"), "--ckpt",
                                  str(given / "w.safetensors"), "--device", "cpu", "--out",
                                  str(out / "o.mp4")]), 1, tree_of),
        "prepare": ((prepare.main, ["prepare", "--crop", "centre", "--size", "32", "--jobs", "1",
                                    "--videos", str(given / "in"), "--out", str(out)]), 1, tree_of),
        "train_ae": ((train_ae.main, few), 1, state_of),
        "train_ae of two": ((train_ae.main, few), 2, state_of),
        "train_gen": ((train_gen.main, few + more), 1, state_of),
        "train_gen of two": ((train_gen.main, few + more), 2, state_of)}[name]


NAMES = ["sample", "prepare", "train_ae", "train_ae of two", "train_gen", "train_gen of two"]


@pytest.fixture(scope="module")
def unbroken(given, tmp_path_factory):
    """-> a function: name -> the result of a command that nobody kills, and its seconds. Each runs once."""
    made = {}

    def result(name):
        if name not in made:
            out = tmp_path_factory.mktemp("unbroken")
            command, ranks, read = command_of(name, given, out)
            began = time.monotonic()
            assert finish(start(command, ranks)) == [0] * ranks
            made[name] = read(out), time.monotonic() - began
        return made[name]

    return result


def cases():
    """One kill of some commands by default, else all of them."""
    slow = [pytest.mark.slow, pytest.mark.long]
    kills = -(-int(os.environ.get("KILLS", 200)) // len(NAMES))
    few = [pytest.param(name, 1, id=name) for name in ("sample", "train_ae")]
    return few + [pytest.param(name, kills, id=f"{name}, {kills} kills", marks=slow) for name in NAMES]


@pytest.mark.parametrize("name, kills", cases())
def test_killed_and_started_again_it_gives_the_same(name, kills, given, unbroken, tmp_path):
    """Also killed more than once before it comes to its end."""
    (whole, seconds), rng, done, tries = unbroken(name), random.Random(f"{name} {kills}"), 0, 0
    while done < kills:
        tries += 1
        assert tries <= 3 * kills + 20
        out = tmp_path / str(tries)
        out.mkdir()
        command, ranks, read = command_of(name, given, out)
        while kill(start(command, ranks), rng.randrange(ranks), rng.random() * seconds):
            done += 1
            if rng.random() < 0.7 or done == kills:
                break
        else:
            seconds *= 0.7                                            # it was quicker than the unbroken one
        assert finish(start(command, ranks)) == [0] * ranks, (tries, done)
        assert same(read(out), whole), (tries, done)
    print(f"{name}: {done} kills, {tries} runs", file=sys.__stderr__)
