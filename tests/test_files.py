"""media/files.py: a file is whole or as it was."""
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from media.files import atomic_write, decode_stream, remove_unfinished

# ---- state -------------------------------------------------------------------------------------------------

def write(path, text, error=None):
    with atomic_write(path, make_folder=True) as temporary:
        Path(temporary).write_text(text)
        if error:
            raise error


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "x.txt"
    write(path, "old")
    with pytest.raises(RuntimeError, match="power cut"):
        write(path, "half", RuntimeError("power cut"))
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x.txt"]
    write(path, "new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["x.txt"]


def test_a_file_is_readable_by_all_that_the_umask_lets(tmp_path):
    """safetensors makes files that only their owner reads."""
    with atomic_write(tmp_path / "w.safetensors") as temporary:
        save_file({"a": torch.ones(2)}, temporary)
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_killed_processes_left_is_removed(tmp_path):
    """Also by a process that has the number of one, as in containers; what a living one writes stays."""
    dead, own, living = (tmp_path / f".x.mp4.{pid}.part" for pid in (2**22 + 1, os.getpid(), os.getppid()))
    other = tmp_path / ".y.mp4.4194305.part"
    own.write_bytes(b"half")
    with atomic_write(tmp_path / "x.mp4") as temporary:
        open(temporary, "ab").write(b"whole")
    assert (tmp_path / "x.mp4").read_bytes() == b"whole"
    for path in (dead, own, living, other):
        path.write_bytes(b"half")
    remove_unfinished(tmp_path / "x.mp4")
    assert set(tmp_path.iterdir()) == {tmp_path / "x.mp4", living, other}
    remove_unfinished(tmp_path)
    assert set(tmp_path.iterdir()) == {tmp_path / "x.mp4", living}


def test_a_stream_that_begins_within_a_file_does_not_end_it():
    """PyAV raises IndexError at its first packet (seen in a damaged .ts)."""
    parts = iter([["a", "b"], ["c"]])

    def demux(stream):
        for name in next(parts):
            yield SimpleNamespace(decode=lambda name=name: [name])
        if name == "b":
            raise IndexError("list index out of range")

    assert list(decode_stream(SimpleNamespace(demux=demux), None)) == ["a", "b", "c"]
