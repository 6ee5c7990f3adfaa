"""Charts by matplotlib: figures of a given size in pixels, drawn without a display, written whole."""
import numpy as np
from PIL import Image

from media.files import InputError, atomic_write

DPI = 75         # a font of 10 points is about 10 pixels high


def require():
    """Import matplotlib's Figure. Raises InputError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("charts need matplotlib: pip install matplotlib") from None
    return Figure


def figure(width, height):
    """Open an empty figure of width x height pixels. Raises InputError where matplotlib is missing."""
    return require()(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")


def to_image(fig):
    """Draw a figure -> PIL image, RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save(fig, path):
    """Write a figure to a PNG file, and make its folder."""
    with atomic_write(path, make_folder=True) as temporary:
        to_image(fig).save(temporary, format="PNG", optimize=True)
