"""A model's picture of a face, put back into the photo at the photo's own resolution.

    photo, face square --Composer--> photo at output size, finer copy around the face: once a photo
    low, moved, alpha, field --Composer.frame--> the whole photo with the face moved: once a frame

Displacements do not depend on the resolution: enlarged, they move the photo's own pixels. What the model
paints keeps the model's resolution:

    out = up(low) + (moved_hi - up(moved)) * (1 - up(alpha))

Whatever alpha is, the picture at the model's resolution is low: alpha decides only how much of the photo's
finer detail stays. So it is lowered where the model hardly changes what it has moved, and raised where it
paints something else: the detail of an open eye would open the lids that close over it.
"""
import functools

import cv2
import numpy as np
import torch
from PIL import Image

from media.face import Square, crop_square, frame_photo, square_matrix
from media.image import from_uint8, open_image, to_uint8

MAX_ENLARGE, MIN_FACE = 2.0, 256    # a photo is enlarged until its square has MIN_FACE pixels a side
FINE = 3                            # linear sampling of a copy this much finer keeps a moved photo sharp
CHANGED = 24                        # of 255: where the model changes less, alpha counts less
REPAINTED = 10, 30                  # of 255: a change from which the detail of the photo goes, and is gone
BORDER = 0.18                       # share of the square's side in which change fades out; narrower: the hair
                                    # of a turning head is bent into waves; wider: the chin stands still
MARGIN = 0.25                       # pixels up to so many sides outside the square may be moved into it


def output_size(width, height, square_size, size):
    """(width, height) of the video of a photo with a face square of `square_size`: even, at most `size`."""
    scale = min(size / max(width, height), max(1.0, min(MAX_ENLARGE, MIN_FACE / square_size)))
    return tuple(max(2, 2 * round(scale * n / 2)) for n in (width, height))


@functools.cache
def edge_window(size, still):
    """(size, size, 1) float32: 0 in the outer `still` cells, a ramp, 1 from the share BORDER inwards."""
    cells = np.arange(size)
    depth = (np.minimum(cells, size - 1 - cells) + 1 - still) / max(1.0, BORDER * size - still)
    ramp = 0.5 - 0.5 * np.cos(np.pi * depth.clip(0, 1))
    return np.outer(ramp, ramp).astype(np.float32)[..., None]


class Composer:
    """Made once for a photo; frame() composes each picture of the model into it.

    photo: (H, W, 3) uint8 at output size; square: the face in it. All change fades out towards its edge,
    which is the photo itself.
    """

    def __init__(self, photo, square):
        self.photo, self.square = np.ascontiguousarray(photo), square
        height, width = photo.shape[:2]
        reach = square.size / 2 * (abs(np.cos(square.angle)) + abs(np.sin(square.angle)))
        left, right = (int(np.clip(x, 0, width)) for x in (square.cx - reach, square.cx + reach + 1))
        top, bottom = (int(np.clip(y, 0, height)) for y in (square.cy - reach, square.cy + reach + 1))
        self.box, self.box_size = (slice(top, bottom), slice(left, right)), (right - left, bottom - top)
        margin = round(MARGIN * square.size)
        x0, y0 = max(0, left - margin), max(0, top - margin)
        source = self.photo[y0:bottom + margin, x0:right + margin]
        size = FINE * source.shape[1] - 1, FINE * source.shape[0] - 1
        to_photo = np.array([[1 / FINE, 0, 0], [0, 1 / FINE, 0]])      # pixel k becomes pixel FINE * k
        self.source = cv2.warpAffine(source, to_photo, size, flags=cv2.INTER_LANCZOS4 | cv2.WARP_INVERSE_MAP,
                                     borderMode=cv2.BORDER_REPLICATE)
        x, y = np.meshgrid(np.arange(left, right), np.arange(top, bottom))
        self.grid = (FINE * np.stack([x - x0, y - y0], axis=-1)).astype(np.float32)          # (h, w, 2)

    @property
    def size(self):
        """(width, height) of the frames."""
        return self.photo.shape[1], self.photo.shape[0]

    def enlarge(self, x):
        """(n, n, C) of the square -> (h, w, C) of its bounding box, linearly; 0 outside the square."""
        matrix = square_matrix(self.square, len(x))
        matrix[:, 2] += matrix[:, :2] @ (self.box[1].start, self.box[0].start)
        return cv2.warpAffine(x, matrix, self.box_size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)

    def enlarge_smoothly(self, x):
        """(n, n, C) uint8 -> as enlarge(), by cubic interpolation up to four times the size."""
        return self.enlarge(cv2.resize(x, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC))

    def move(self, field):
        """The bounding box (h, w, 3) uint8 with the photo's pixels moved by a field (n, n, 2).

        Its displacements x, y are in halves of the square, whose edge does not move.
        """
        c, s = np.cos(self.square.angle), np.sin(self.square.angle)
        to_source = np.array([[c, s], [-s, c]], np.float32) * (FINE * self.square.size / 2)
        displacement = self.enlarge((field * edge_window(len(field), 1)) @ to_source)          # (h, w, 2)
        return cv2.remap(self.source, cv2.add(self.grid, displacement), None, cv2.INTER_LINEAR,
                         borderMode=cv2.BORDER_REPLICATE)

    def frame(self, low, moved, alpha, field):
        """Compose one picture of the model -> the whole photo (H, W, 3) uint8.

        low: (s, s, 3) uint8, the model's picture; moved: (s, s, 3) uint8, the reference as the model moved
        it; alpha: (s, s) float, how far that is faded out; field: (n, n, 2) float32, the displacements
        (move()).
        """
        window = edge_window(len(low), 2)
        change = cv2.dilate(cv2.absdiff(low, moved).max(-1), np.ones((3, 3), np.uint8))        # (s, s)
        change, (start, end) = change.astype(np.float32), REPAINTED
        alpha = np.maximum(alpha.clip(0, 1) * np.minimum(1, change / CHANGED),
                           ((change - start) / (end - start)).clip(0, 1))
        fade = np.rint(255 * alpha[..., None] * window).astype(np.uint8)
        low = np.rint(moved + (low.astype(np.float32) - moved) * window).astype(np.uint8)
        low = self.enlarge_smoothly(low)                                                       # (h, w, 3)
        both = self.enlarge_smoothly(np.concatenate([moved, fade], axis=-1))                   # (h, w, 4)
        keep = cv2.merge([cv2.bitwise_not(cv2.extractChannel(both, 3))] * 3)
        coarse = cv2.multiply(cv2.cvtColor(both, cv2.COLOR_BGRA2BGR), keep, scale=1 / 255)
        sharp = cv2.multiply(self.move(field), keep, scale=1 / 255)
        # sharp + low - coarse in saturating bytes: the negative part of low - coarse first
        return self.put(cv2.add(cv2.subtract(sharp, cv2.subtract(coarse, low)), cv2.subtract(low, coarse)))

    def blend(self, low):
        """The whole photo with a picture (s, s, 3) uint8 without displacements, such as a decoded latent."""
        window = np.rint(255 * edge_window(len(low), 2)).astype(np.uint8)
        share = cv2.merge([self.enlarge_smoothly(window)] * 3)
        rest = cv2.multiply(self.photo[self.box], cv2.bitwise_not(share), scale=1 / 255)
        return self.put(cv2.add(rest, cv2.multiply(self.enlarge_smoothly(low), share, scale=1 / 255)))

    def put(self, pixels):
        """The whole photo with pixels (h, w, 3) in the bounding box."""
        photo = self.photo.copy()
        photo[self.box] = pixels
        return photo


def load_composer(image, square, size, crop=False):
    """Make the Composer of a PIL photo and the Square of its face; the video's long side is at most `size`.

    crop: it shows the square alone, upright.
    """
    if crop:
        width, _ = output_size(square.size, square.size, square.size, size)
        return Composer(crop_square(image, square, width), Square(width / 2, width / 2, width))
    width, height = output_size(*image.size, square.size, size)
    fx, fy = width / image.width, height / image.height
    square = Square(square.cx * fx, square.cy * fy, square.size * (fx * fy) ** 0.5, square.angle)
    return Composer(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)), square)


def read_photo(path, model_size, detector, size=1080, crop=False, number=None):
    """Read a photo -> its face (3, model_size, model_size) in [-1, 1], its Composer, a note or None.

    See load_composer() and frame_photo(). Raises InputError.
    """
    photo = open_image(path, None if crop else 2 * size)
    square, note = frame_photo(photo, detector, number, path)
    image = from_uint8(crop_square(photo, square, model_size))
    return image, load_composer(photo, square, size, crop), note


def latents_to_frames(space, frames):
    """Latents (n, C, H, W) -> n arrays (H, W, 3) uint8."""
    with torch.inference_mode():
        pixels = to_uint8(space.decode(frames))
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def pictures_to_frames(space, pictures, composer=None):
    """The decoder's Pictures -> (H, W, 3) uint8 frames, put into the whole photo if there is a Composer."""
    for picture in pictures:
        low = latents_to_frames(space, picture.x)
        if composer is None:
            yield from low
        elif picture.moved is None:                            # a latent space has no displacements of pixels
            yield from map(composer.blend, low)
        else:
            alpha, field = picture.alpha[:, 0].cpu().numpy(), picture.field.cpu().numpy()
            yield from map(composer.frame, low, latents_to_frames(space, picture.moved), alpha, field)
