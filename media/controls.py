"""Controls: a text such as "yaw=-10:10 blink=0,1,0" -> changes of the motion token.

web/controls.py fits their directions and keeps them in the weights.
"""
import torch
import torch.nn.functional as F

from media.files import InputError


def parse_controls(text, controls, width, frames):
    """Turn "yaw=-10:10 blink=0,1,0" into changes of a token of `width` numbers, (frames, width).

    a: stays; a:b: from a to b; a,b,c: through these, evenly in time. blink: both eyes. Raises InputError.
    """
    if not controls:
        raise InputError("--controls: these weights hold none; python -m web.controls --ckpt FILE fits them")
    if not text.split():
        raise InputError("--controls is empty; give for example 'yaw=-10:10 blink=0,1,0'")
    try:
        directions = {name: torch.tensor(control["direction"]) for name, control in controls.items()}
        spans = {name: (float(control["low"]), float(control["high"])) for name, control in controls.items()}
        damaged = any(x.shape != (width,) or not x.isfinite().all() for x in directions.values())
    except (AttributeError, KeyError, TypeError, ValueError):
        damaged = True
    if damaged:
        raise InputError("--controls: those of these weights are damaged; python -m web.controls --ckpt FILE "
                         "fits them again")
    changes = torch.zeros(frames, width)
    for item in text.split():
        name, _, values = item.partition("=")
        names = ["blink_l", "blink_r"] if name == "blink" else [name]
        if any(n not in controls for n in names):
            raise InputError(f"--controls: there is no {name!r}; give some of blink, {', '.join(controls)}")
        try:
            points = [float(v) for v in values.replace(":", ",").split(",")]
        except ValueError:
            raise InputError(f"--controls: {item!r} is not NAME=number, NAME=from:to or NAME=a,b,c") from None
        low, high = spans[names[0]]
        if not all(low <= v <= high for v in points):
            units = controls[names[0]].get("unit", "")
            raise InputError(f"--controls: {name} goes from {low:g} to {high:g} {units}".rstrip())
        points = torch.tensor(points)[None, None]
        values = F.interpolate(points, size=frames, mode="linear", align_corners=True)[0, 0]       # (frames,)
        for n in names:
            changes += values[:, None] * directions[n]
    return changes
