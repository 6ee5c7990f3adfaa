"""Photos: any picture file -> (3, size, size) in [-1, 1], and back to bytes.

    photo --load_image--> (3, size, size) in [-1, 1]
"""
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from media.files import InputError, check_file

MIN_SIDE = 16             # pixels; below this a picture holds no face
MAX_PIXELS = 128_000_000  # a 108-megapixel phone passes; a header that claims more is refused before decoding
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
IMAGE_WANTED = "a jpg, png or webp picture"
BACKDROP = (128, 128, 128)  # what shows through a transparent picture


# --------------------------------------------------------------------------------------------------- pictures
def square_box(width, height, aspect=1.0):
    """The square to keep, (left, top, right, bottom) in pixels: the middle of a wide picture, the upper part
    of a tall one (a tenth of what is cut lies above, the rest below: heads sit there). aspect: a pixel's
    width by its height."""
    side = min(width * aspect, height)
    left, top = (width - side / aspect) / 2, (height - side) / 10
    return left, top, left + side / aspect, top + side


def to_tensor(image, size, aspect=1.0):
    """RGB picture -> (3, size, size) float in [-1, 1]: cropped to a square, scaled by Lanczos with
    anti-aliasing."""
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=square_box(*image.size, aspect))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1      # (3, H, W)


def to_rgb(image):
    """Any PIL mode -> RGB: wide numbers scaled to 8 bits, colour profiles applied, transparency over
    BACKDROP."""
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if image.mode.startswith("I;") or grey.max() > 255:   # "I" holds 16-bit grey, or 8 bits in wide cells
            grey = grey / 257
        elif image.mode == "F" and grey.max() <= 1:
            grey = grey * 255
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKDROP + (255,)), image).convert("RGB")
    if image.info.get("icc_profile") and image.mode in ("RGB", "CMYK"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass                                              # a broken profile: the plain conversion will do
    return image.convert("RGB")


def open_image(path, least=None):
    """A picture file -> PIL picture, upright, opaque, RGB. Raises InputError. least: a jpeg larger than that
    is decoded at a half, a quarter or an eighth of its size."""
    check_file(path, IMAGE_WANTED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # Pillow warns of what MAX_PIXELS decides here
            Image.init()
            image = Image.open(path, formats=[kind for kind in IMAGE_FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError:
        raise InputError(f"{path} claims more than {MAX_PIXELS // 10**6} megapixels; give a "
                         f"smaller picture") from None
    except Exception:                                          # each of Pillow's readers fails in its own way
        raise InputError(f"{path} is not a picture that can be read; give {IMAGE_WANTED}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{path} is {width}x{height}, above {MAX_PIXELS // 10**6} megapixels; give a "
                         f"smaller picture")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{path} is {width}x{height} pixels; give a picture of at least "
                         f"{MIN_SIDE}x{MIN_SIDE}")
    with image:
        try:
            if least:
                image.draft("RGB", (least, least))
            image.load()
            try:
                image = ImageOps.exif_transpose(image)
            except Exception:                                # damaged EXIF says nothing about which way is up
                pass
            return to_rgb(image)
        except Exception:
            raise InputError(f"{path} is a damaged or cut-off picture; copy it again or "
                             f"give another") from None


def load_image(path, size):
    """A picture file -> (3, size, size) float in [-1, 1]: upright, opaque, square (square_box). Raises
    InputError."""
    return to_tensor(open_image(path, 2 * size), size)


def to_uint8(x):
    """Numbers of pictures in [-1, 1], any shape, clipped to it -> whole numbers 0..255, uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


def from_uint8(frames):
    """(..., H, W, 3) uint8 array -> (..., 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -3) / 127.5 - 1
