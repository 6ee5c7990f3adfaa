"""media/device.py: the one choice of device and precision."""
import builtins
import io

import pytest
import torch

from media import device
from media.files import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("flags, fast", [("fpu avx512_bf16 sse", True), ("fpu amx_bf16", True),
                                         ("fpu avx2 avx512f", False)])
def test_bf16_on_a_cpu_needs_instructions_of_its_own(monkeypatch, flags, fast):
    monkeypatch.setattr(builtins, "open", lambda path: io.StringIO(f"flags : {flags}\n"))
    assert device.fast_bf16(CPU) is fast
    with device.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if fast else torch.float32)
    with device.autocast(CPU, enabled=False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_system_that_does_not_tell_has_no_fast_bf16(monkeypatch):
    def refuse(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(builtins, "open", refuse)
    assert device.fast_bf16(CPU) is False and device.fast_bf16(torch.device("mps")) is False


def test_auto_takes_the_best_there_is(monkeypatch):
    assert device.pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.pick_device() == CPU


@pytest.mark.parametrize("name", ["abacus", "meta", "meta:x", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match="give auto, cpu, cuda or mps"):
        device.pick_device(name)
