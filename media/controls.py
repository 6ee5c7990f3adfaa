"""Controls: a text such as "yaw=-10:10 blink=0,1,0" -> changes of the motion token.

web/controls.py fits their directions and keeps them in the weights.
"""
import torch
import torch.nn.functional as F

from media.files import InputError


def parse_controls(text, controls, frames):
    """Turn "yaw=-10:10 blink=0,1,0" into token changes (frames, L*D). Raises InputError.

    a: stays; a:b: from a to b; a,b,c: through these, evenly in time. blink: both eyes.
    """
    if not controls:
        raise InputError("--controls: these weights hold none; python -m web.controls --ckpt FILE fits them")
    if not text.split():
        raise InputError("--controls is empty; give for example 'yaw=-10:10 blink=0,1,0'")
    changes = torch.zeros(frames, len(next(iter(controls.values()))["direction"]))
    for item in text.split():
        name, _, values = item.partition("=")
        names = ["blink_l", "blink_r"] if name == "blink" else [name]
        if any(n not in controls for n in names):
            raise InputError(f"--controls: there is no {name!r}; give some of blink, {', '.join(controls)}")
        try:
            points = [float(v) for v in values.replace(":", ",").split(",")]
        except ValueError:
            raise InputError(f"--controls: {item!r} is not NAME=number, NAME=from:to or NAME=a,b,c") from None
        low, high, units = (controls[names[0]][key] for key in ("low", "high", "unit"))
        if not all(low <= v <= high for v in points):
            raise InputError(f"--controls: {name} goes from {low:g} to {high:g} {units}".rstrip())
        points = torch.tensor(points)[None, None]
        values = F.interpolate(points, size=frames, mode="linear", align_corners=True)[0, 0]       # (frames,)
        for n in names:
            changes += values[:, None] * torch.tensor(controls[n]["direction"])
    return changes
