"""media/face.py: the square of a photo is that of the clips."""
import numpy as np
import pytest
import torch
from PIL import Image
from test_prepare import find

from media import face
from media.face import load_face
from media.files import InputError

torch.set_num_threads(1)


@pytest.mark.parametrize("top, left", [(40, 90), (2, 130)])
def test_a_photo_is_cut_as_the_clips_are(tmp_path, monkeypatch, top, left):
    """Also near a corner, where the picture's edge is repeated."""
    pixels = np.full((120, 160, 3), (30, 60, 90), np.uint8)
    pixels[top: top + 24, left: left + 24] = 220
    Image.fromarray(pixels).save(tmp_path / "a.png")
    monkeypatch.setattr(face, "find_face", find)
    image = load_face(str(tmp_path / "a.png"), 40, "some")
    bright = (image[0] > 0.2).nonzero()
    assert image.shape == (3, 40, 40) and bright.min(0).values.tolist() == [8, 8] and bright.max(0).values.tolist() == [31, 31]
    assert torch.allclose(image[:, 35, 3], torch.tensor([30, 60, 90]) / 127.5 - 1, atol=0.02)
    Image.fromarray(pixels // 2).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png: no face found"):
        load_face(str(tmp_path / "b.png"), 40, "some")
