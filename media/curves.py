"""The log of a training run as a picture: progress.png beside the sample pictures, one panel for each thing
that is logged.

    python -m media.curves RUN/log.jsonl [RUN/progress.png]
"""
import json
import math
import sys
from pathlib import Path

from media.files import InputError, atomic_write


def read_log(path):
    """log.jsonl -> {name: ([steps], [values])}. Of steps logged twice, after a crash, the later line
    counts."""
    rows = {}
    for line in Path(path).read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:                                        # the last line of a run that was killed
            continue
        rows[row["step"]] = row
    curves = {}
    for step, row in sorted(rows.items()):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, ([], []))
                curves[name][0].append(step)
                curves[name][1].append(value)
    return curves


def panels_of(names):
    """Names -> lists of names that share a panel: psnr and psnr_copy, loss and loss_held_out."""
    panels = {}
    for name in names:
        stem = min((other for other in names if name.startswith(other)), key=len)
        panels.setdefault(stem, []).append(name)
    return list(panels.values())


def save_curves(log, path):
    """Draw log.jsonl to a PNG -> whether it was drawn: without matplotlib it is not. Raises InputError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    curves = read_log(log)
    panels = panels_of(curves)
    figure = Figure(figsize=(4.2 * max(1, len(panels)), 3.2), layout="constrained")
    for axes, names in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        for name in names:
            axes.plot(*curves[name], label=name.replace("_", " "), marker=".", markersize=3)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def main(argv=None):
    args = sys.argv[1:] if argv is None else argv
    if len(args) not in (1, 2) or not Path(args[0]).is_file():
        print("media.curves: give the log.jsonl of a run, and where to draw it", file=sys.stderr)
        return 2
    try:
        if save_curves(args[0], args[1] if len(args) == 2 else Path(args[0]).with_name("progress.png")):
            return 0
        print("media.curves: drawing needs matplotlib: pip install matplotlib", file=sys.stderr)
    except InputError as error:
        print(f"media.curves: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
