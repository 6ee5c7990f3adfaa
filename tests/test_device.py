"""media/device.py: the one choice of device and precision."""
import pytest
import torch

from media import device
from media.files import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("able, fast", [({"avx512_bf16": True, "amx_bf16": False}, True),
                                        ({"avx512_bf16": False, "amx_bf16": True}, True),
                                        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
                                        ({"architecture": "aarch64", "bf16": True}, False)])
def test_bf16_on_a_cpu_needs_instructions_of_its_own(monkeypatch, able, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert device.fast_bf16(CPU) is fast and device.fast_bf16(torch.device("mps")) is False
    with device.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if fast else torch.float32)
    with device.autocast(CPU, enabled=False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_auto_takes_the_best_there_is(monkeypatch):
    assert device.pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.pick_device() == CPU


@pytest.mark.parametrize("name", ["abacus", "meta", "meta:x", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match="give auto, cpu, cuda or mps"):
        device.pick_device(name)
