"""media/files.py: a file is whole or as it was."""
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from media.files import atomic_write

torch.set_num_threads(1)


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
