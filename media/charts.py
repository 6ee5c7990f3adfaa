"""Charts by matplotlib, drawn without a display; and the log of a training run as a chart: progress.png."""
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from media.files import InputError, atomic_write

DPI = 75         # a font of 10 points is about 10 pixels high


def new_figure(width, height):
    """Open an empty figure of width x height pixels. Raises InputError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("charts need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")


def to_image(figure):
    """Draw a figure -> PIL image, RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save_figure(figure, path):
    """Write a figure to a PNG or WebP file, and make its folder."""
    with atomic_write(path, make_folder=True) as temporary:
        to_image(figure).save(temporary, format=Path(path).suffix[1:], optimize=True)


def read_log(path):
    """Read log.jsonl -> {name: ([steps], [values])}. Of a step logged twice, the later line counts."""
    records = {}
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:                                        # the last line of a run that was killed
            continue
        records[record["step"]] = record
    curves = {}
    for step, record in sorted(records.items()):
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return curves


def group_names(names):
    """Group the names that share a panel: psnr and psnr_copy, loss and loss_held_out."""
    panels = {}
    for name in names:
        stem = min((other for other in names if name.startswith(other)), key=len)
        panels.setdefault(stem, []).append(name)
    return list(panels.values())


def save_curves(log, path):
    """Draw log.jsonl to a PNG file, one panel for each quantity. Without matplotlib nothing is drawn."""
    curves = read_log(log)
    panels = group_names(curves)
    try:
        figure = new_figure(420 * max(1, len(panels)), 320)
    except InputError:
        return
    for names, axes in zip(panels, figure.subplots(1, max(1, len(panels)), squeeze=False)[0], strict=False):
        for name in names:
            axes.plot(*curves[name], label=name.replace("_", " "), marker=".", markersize=3)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
