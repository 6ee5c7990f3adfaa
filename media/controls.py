"""Sliders: a text such as "yaw=-10:10 blink=0,1,0" -> changes of the motion token. web/controls.py fits their
directions."""
import torch
import torch.nn.functional as F

from media.files import InputError


def parse_controls(text, controls, frames):
    """"yaw=-10:10 blink=0,1,0" -> token changes (frames, L*D). a: stays; a:b: from a to b; a,b,c: through
    these, evenly in time. blink: both eyes. Raises InputError."""
    if not controls:
        raise InputError("--controls: these weights hold none; python -m web.controls --ckpt FILE fits them")
    if not text.split():
        raise InputError("--controls is empty; give for example 'yaw=-10:10 blink=0,1,0'")
    path = torch.zeros(frames, len(next(iter(controls.values()))["direction"]))
    for item in text.split():
        name, _, values = item.partition("=")
        names = ["blink_l", "blink_r"] if name == "blink" else [name]
        if any(n not in controls for n in names):
            raise InputError(f"--controls: there is no {name!r}; give some of blink, {', '.join(controls)}")
        try:
            points = [float(v) for v in values.replace(":", ",").split(",")]
        except ValueError:
            raise InputError(f"--controls: {item!r} is not NAME=number, NAME=from:to or NAME=a,b,c") from None
        low, high = controls[names[0]]["low"], controls[names[0]]["high"]
        if not all(low <= v <= high for v in points):
            raise InputError(f"--controls: {name} goes from {low:g} to {high:g} "
                             f"{controls[names[0]]['unit']}".rstrip())
        course = F.interpolate(torch.tensor(points)[None, None], size=frames, mode="linear",
                                                 align_corners=True)[0, 0]                         # (frames,)
        for n in names:
            path += course[:, None] * torch.tensor(controls[n]["direction"])
    return path
