"""media/image.py: pictures of all kinds come out as known values; others are refused in a sentence."""
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from media.face import crop_square, middle_square
from media.files import InputError
from media.image import BACKDROP, from_uint8, open_image, save_grid
from media.video import read_frames

ORANGE, BLUE = (230, 120, 40), (30, 60, 200)


def cut_middle(image, size):
    """A PIL picture as one without a face is used -> (3, size, size) in [-1, 1]."""
    return from_uint8(crop_square(image, middle_square(*image.size), size))


def load_image(path, size):
    return cut_middle(open_image(path, 2 * size), size)


def read_video(path, size):
    return (cut_middle(image, size) for image in read_frames(path))


def colour(x, y, row=0.5, column=0.5):
    """How far the colour of the loaded picture x at a place is from y, in steps of 255."""
    got = ((x[:, int(row * x.shape[1]), int(column * x.shape[2])] + 1) * 127.5).round().tolist()
    return max(abs(a - b) for a, b in zip(got, y, strict=True))


def refused(action, *words):
    """The action ends in one sentence that holds the words."""
    with pytest.raises(InputError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


@pytest.mark.parametrize("name, mode, tolerance", [
    ("a.png", "RGB", 0), ("a.jpg", "RGB", 3), ("a.webp", "RGB", 4), ("a.bmp", "RGB", 0), ("a.tif", "RGB", 0),
    ("a.gif", "P", 2), ("a.png", "P", 2), ("a.jpg", "CMYK", 3), ("a.tif", "CMYK", 0), ("a.png", "RGBA", 0),
    ("a.tif", "YCbCr", 3)])
def test_colour_survives_every_mode(tmp_path, name, mode, tolerance):
    image = Image.new("RGB", (90, 70), ORANGE)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(tmp_path / name)
    x = load_image(tmp_path / name, 64)
    assert x.shape == (3, 64, 64) and x.dtype == torch.float32
    assert colour(x, ORANGE) <= tolerance and colour(x, ORANGE, 0, 0) <= tolerance


@pytest.mark.parametrize("mode, value, grey", [
    ("L", 77, 77), ("1", 1, 255), ("LA", (77, 255), 77), ("I;16", 77 * 257, 77), ("I", 77 * 257, 77),
    ("F", 77.0, 77)])
def test_grey_modes(tmp_path, mode, value, grey):
    path = tmp_path / ("a.tif" if mode in ("F", "I") else "a.png")
    Image.new(mode, (40, 40), value).save(path)
    assert colour(load_image(path, 32), (grey,) * 3) <= 0.5


def test_sixteen_bit_grey_keeps_its_gradient(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    got = load_image(tmp_path / "a.png", 64)[0, 32]
    assert (got - torch.linspace(-1, 1, 64)).abs().max() < 0.01


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_backdrop(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (64, 64), 1)
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.paste(0, (32, 0, 64, 64))
        image.save(tmp_path / "a.png", transparency=1)
        opaque = (255, 0, 0)
    else:
        image = Image.new(mode, (64, 64), (9,) * (len(mode) - 1) + (0,))
        image.paste((200,) * (len(mode) - 1) + (255,), (32, 0, 64, 64))
        image.save(tmp_path / "a.png")
        opaque = (200, 200, 200)
    x = load_image(tmp_path / "a.png", 64)
    assert colour(x, BACKDROP, column=0.1) <= 0.5 and colour(x, opaque, column=0.9) <= 0.5


def test_half_transparent_is_half_backdrop(tmp_path):
    Image.new("RGBA", (32, 32), (255, 255, 255, 128)).save(tmp_path / "a.png")
    assert colour(load_image(tmp_path / "a.png", 32), (192, 192, 192)) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32], upright[:32, 32:], upright[32:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # the inverse of a viewer's
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    image = Image.fromarray(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if undo is None else image.transpose(undo)).save(tmp_path / "a.png", exif=exif)
    x = load_image(tmp_path / "a.png", 64)
    assert colour(x, (255, 0, 0), 0.2, 0.2) == 0 and colour(x, (0, 255, 0), 0.2, 0.8) == 0
    assert colour(x, (0, 0, 255), 0.8, 0.2) == 0 and colour(x, (0, 0, 0), 0.8, 0.8) == 0


def test_wide_keeps_its_middle_and_tall_its_upper_part(tmp_path):
    wide = Image.new("RGB", (300, 100), BLUE)
    wide.paste(ORANGE, (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    x = load_image(tmp_path / "wide.png", 50)
    assert all(colour(x, ORANGE, 0.5, column) <= 1 for column in (0.1, 0.5, 0.9))


def test_shrinking_averages(tmp_path):
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 64).abs().max() < 0.05    # nearest: -1 and 1, and moire between


def test_colour_profile_is_applied(tmp_path):
    """A profile with red and blue primaries exchanged exchanges red and blue; a broken one does nothing."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")        # the first are entries of the tag table
    profile[red:red + 4], profile[blue:blue + 4] = b"bXYZ", b"rXYZ"
    Image.new("RGB", (32, 32), ORANGE).save(tmp_path / "a.png", icc_profile=bytes(profile))
    assert colour(load_image(tmp_path / "a.png", 32), ORANGE[::-1]) <= 2
    Image.new("RGB", (32, 32), ORANGE).save(tmp_path / "b.png", icc_profile=b"not a profile")
    assert colour(load_image(tmp_path / "b.png", 32), ORANGE) == 0


def picture_bytes(kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes whose header says 60000 x 60000."""
    png = bytearray(picture_bytes())
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.mark.parametrize("name, content, words", [
    ("empty.png", b"", ("empty",)), ("text.jpg", b"hello, I am no picture", ("not a picture",)),
    ("cut.png", picture_bytes()[:2000], ("cut-off",)),
    ("cut.jpg", picture_bytes("JPEG")[:2000], ("cut-off",)),
    ("cut.webp", picture_bytes("WEBP")[:500], ("picture",)), ("bomb.png", bomb(), ("megapixels",)),
    ("head.png", picture_bytes()[:20], ("picture",))])
def test_bad_pictures_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(lambda: load_image(tmp_path / name, 32), name, *words)


def test_missing_folder_and_tiny_pictures_are_refused(tmp_path):
    refused(lambda: load_image(tmp_path / "no.png", 32), "no.png", "does not exist")
    refused(lambda: load_image(tmp_path, 32), "is a folder")
    Image.new("RGB", (300, 15)).save(tmp_path / "thin.png")
    refused(lambda: load_image(tmp_path / "thin.png", 32), "300x15")


def test_grid_has_the_right_pixels(tmp_path):
    level = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])                   # 2.0: clipped
    cells = level.view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 4).clone()          # two rows of three pictures
    cells[0, 1, 0] = 1.0                                                     # red
    cells[1, 0, :, 0, 3] = -1.0                                              # one corner
    save_grid(tmp_path / "g.png", list(cells))
    got = np.asarray(Image.open(tmp_path / "g.png"))
    assert got.shape == (8, 12, 3) and os.listdir(tmp_path) == ["g.png"]
    want = np.array([[0, 64, 128], [191, 255, 255]])
    for i in range(2):
        for j in range(3):
            cell = got[4 * i:4 * i + 4, 4 * j:4 * j + 4].copy()
            if (i, j) == (1, 0):
                assert (cell[0, 3] == 0).all()
                cell[0, 3] = want[i, j]
            if (i, j) == (0, 1):
                assert (cell[..., 0] == 255).all()
                cell[..., 0] = want[i, j]
            assert (cell == want[i, j]).all(), (i, j)
