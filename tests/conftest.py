"""What all tests share: torch on one thread, signal handlers given back, processes that start at once."""
import multiprocessing
import os
import signal
import sys
from functools import cache
from multiprocessing import forkserver

import pytest
import torch

import training
from media import prepare

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def signals():
    """Training takes SIGTERM and Ctrl-C for itself; give them back to pytest."""
    kept = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    yield
    for name, handler in kept.items():
        signal.signal(name, handler)


@cache
def quick_context():
    """-> a context of multiprocessing whose processes import nothing: they are forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo", "matplotlib.pyplot", "test_kills",
                                    "test_train_ae"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))                # it is not told otherwise
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="session")
def fork():
    if sys.platform != "linux":
        pytest.skip("needs a process that forks others")
    return quick_context()


@pytest.fixture(autouse=True, scope="session")
def quick_workers():
    """data.py prepare starts its workers so when it is called as a function, not as a program."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setattr(prepare, "get_context", lambda kind: quick_context())
        yield


@pytest.fixture(autouse=True, scope="session")
def quick_curves():
    """Training draws no curves but in the tests of its log and in those of other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_curves", lambda log, picture: open(picture, "wb").close())
        yield
