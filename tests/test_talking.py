"""examples/talking.py: faces cut out, a file that is small enough."""
import io

import numpy as np
import pytest
from PIL import Image

from examples import talking
from media.files import InputError


def noise(count, size=64):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return [Image.fromarray(x) for x in pixels]


def test_quality_falls_until_the_file_is_small_enough(monkeypatch):
    frames = noise(4)
    best = talking.encode(frames)
    monkeypatch.setattr(talking, "LIMIT", len(best) // 2)
    smaller = talking.encode(frames)
    with Image.open(io.BytesIO(smaller)) as image:
        assert len(smaller) <= len(best) // 2 and image.n_frames == 4 and image.size == (64, 64)
    monkeypatch.setattr(talking, "LIMIT", 10)
    with pytest.raises(InputError, match="fewer --seconds"):
        talking.encode(frames)


def test_the_square_is_about_the_face():
    """The drawn portrait: the face is in the middle of its own surroundings."""
    photo = talking.around_face(str(talking.HERE / "portrait.png"), 96)
    assert photo.size == (96, 96) and photo.mode == "RGB"
    face, _ = talking.frame_photo(photo, talking.load_detector())
    assert abs(face.cx - 48) < 12 and abs(face.cy - 48) < 12
