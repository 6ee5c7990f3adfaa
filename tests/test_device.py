"""media/device.py: the one choice of device and precision."""

import torch

from media.device import fast_bf16

torch.set_num_threads(1)


def test_fast_bf16_is_yes_or_no():
    assert fast_bf16(torch.device("cpu")) in (True, False)
    assert fast_bf16(torch.device("mps")) is False
