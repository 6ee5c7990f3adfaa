"""Photos: any picture file -> a PIL picture in RGB; bytes <-> numbers in [-1, 1]."""
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from media.files import InputError, atomic_write, check_file

MIN_SIDE = 16             # pixels; below this a picture holds no face
MAX_PIXELS = 128_000_000  # a 108-megapixel phone passes; a header that claims more is refused before decoding
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
IMAGE_WANTED = "a jpg, png or webp picture"
BACKDROP = (128, 128, 128)  # what shows through a transparent picture


def to_rgb(image):
    """Any PIL mode -> RGB: 16 bits scaled to 8, colour profiles applied, transparency over BACKDROP."""
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
    """A picture file -> PIL picture, upright, opaque, RGB. Raises InputError.

    least: a jpeg of twice this size or more is decoded at a half, a quarter or an eighth of its size.
    """
    check_file(path, IMAGE_WANTED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # Pillow warns of what MAX_PIXELS decides here
            Image.init()
            image = Image.open(path, formats=[kind for kind in IMAGE_FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError:
        most = f"{MAX_PIXELS // 10**6} megapixels"
        raise InputError(f"{path} claims more than {most}; give a smaller picture") from None
    except Exception:                                          # each of Pillow's readers fails in its own way
        raise InputError(f"{path} is not a picture that can be read; give {IMAGE_WANTED}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        most = f"{MAX_PIXELS // 10**6} megapixels"
        raise InputError(f"{path} is {width}x{height}, above {most}; give a smaller picture")
    if min(width, height) < MIN_SIDE:
        least = f"{MIN_SIDE}x{MIN_SIDE}"
        raise InputError(f"{path} is {width}x{height} pixels; give a picture of at least {least}")
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
            raise InputError(f"{path} is a damaged or cut-off picture; copy it again") from None


def to_uint8(x):
    """Numbers in [-1, 1], any shape, clipped to it -> whole numbers 0..255, uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


def from_uint8(frames):
    """(..., H, W, 3) uint8 array -> (..., 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -3) / 127.5 - 1


def save_grid(path, rows):
    """rows: list of (n, 3, H, W) in [-1, 1] -> a PNG, one row of pictures each."""
    picture = torch.cat([torch.cat(list(pictures.float().cpu()), dim=2) for pictures in rows], dim=1)
    pixels = to_uint8(picture).permute(1, 2, 0).numpy()
    with atomic_write(path, make_folder=True) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
