"""Where tensors live: the one choice of device, and of precision on it."""
import torch

from media.files import InputError


def pick_device(name="auto"):
    """"auto" -> the best there is. Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        torch.autocast(device.type)                              # "meta" holds no numbers, others no bf16
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here; give auto, cpu, cuda or mps") from error
    return device


def fast_bf16(device):
    """Whether bf16 is quicker than fp32 here: any recent GPU; a CPU only with AMX or AVX512-BF16."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return able.get("amx_bf16", False) or able.get("avx512_bf16", False)
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(device, enabled=True):
    """bf16 where it is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and fast_bf16(device))


def autocast_iter(device, items, models=True):
    """The items of an iterator, each made without gradients and, where bf16 is fast, under autocast.
    models=False: out of autocast. The context is entered around each item alone: a generator function keeps
    what its caller entered only while it computes, and what it enters itself would leak to the caller."""
    items = iter(items)
    while True:
        with torch.inference_mode(), autocast(device, models):
            item = next(items, None)
        if item is None:
            return
        yield item
