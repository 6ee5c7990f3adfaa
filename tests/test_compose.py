"""media/compose.py: the photo's own pixels are moved, nothing outside the square changes, no edge shows."""
import cv2
import numpy as np
import pytest
from PIL import Image

from media.compose import BORDER, Composer, edge_window, load_composer, output_size
from media.face import Square, crop_square, square_matrix

rng = np.random.default_rng(0)
STILL = np.zeros((24, 24, 2), np.float32)
SOLID = np.zeros((48, 48), np.float32)              # alpha: the photo is faded nowhere
INNER = 0.98 - 2 * BORDER                            # share of the square in which nothing is faded out


def smooth_photo(width, height, detail=8):
    """Smooth random colours, structure of about `detail` pixels."""
    coarse = rng.integers(20, 235, (height // detail, width // detail, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


PHOTO = smooth_photo(300, 240)
# the last: a corner
SQUARES = [Square(150, 120, 120), Square(151.3, 118.7, 110.5, 0.2), Square(40, 30, 120, -0.15)]


def inside(square, shape, share=1.0):
    """Pixels of the photo in the square, or in its middle share."""
    y, x = np.mgrid[:shape[0], :shape[1]] + 0.5
    c, s = np.cos(square.angle), np.sin(square.angle)
    u, v = c * (x - square.cx) + s * (y - square.cy), -s * (x - square.cx) + c * (y - square.cy)
    return np.maximum(abs(u), abs(v)) < share * square.size / 2


@pytest.mark.parametrize("square", SQUARES)
def test_without_motion_the_photo_comes_back_bit_for_bit(square):
    low = crop_square(PHOTO, square, 48)
    assert (Composer(PHOTO, square).frame(low, low, SOLID, STILL) == PHOTO).all()


@pytest.mark.parametrize("square", SQUARES)
def test_nothing_outside_the_square_ever_changes(square):
    """Whatever the model says, up to motion by the whole square; inside, it shows."""
    low, moved = (rng.integers(0, 255, (48, 48, 3), np.uint8) for _ in range(2))
    field = rng.normal(0, 1, (24, 24, 2)).astype(np.float32)
    composer = Composer(PHOTO, square)
    for out in (composer.frame(low, moved, rng.random((48, 48)), field), composer.blend(low)):
        within = inside(square, PHOTO.shape)
        assert (out[~within] == PHOTO[~within]).all()
        assert np.abs(out[within].astype(int) - PHOTO[within]).mean() > 20


@pytest.mark.parametrize("square", SQUARES[:2])
def test_the_edge_of_the_square_does_not_show(square):
    """Large, strong changes fade in from the edge: next to it they are invisible."""
    white = np.full((96, 96, 3), 255, np.uint8)
    photo = np.full((240, 300, 3), 60, np.uint8)
    composer = Composer(photo, square)
    for out in (composer.frame(white, white // 4, np.ones((96, 96)), STILL + 0.3), composer.blend(white)):
        rim = inside(square, photo.shape) & ~inside(square, photo.shape, 0.97)
        assert out[rim].max() < 60 + 12 and (out[inside(square, photo.shape, INNER)] > 250).all()
        steps = np.abs(np.diff(out[..., 0].astype(int), axis=1))
        assert steps.max() < 40                                   # 195 in one step if there were no window


@pytest.mark.parametrize("square", SQUARES[:2])
def test_a_constant_displacement_moves_the_photos_own_pixels(square):
    """In halves of the square, along its own axes, as grid_sample counts: out(p) = photo(p + d)."""
    field = STILL + np.array([0.1, -0.05], np.float32)
    low = crop_square(PHOTO, square, 48)
    out = Composer(PHOTO, square).frame(low, low, SOLID, field)
    c, s = np.cos(square.angle), np.sin(square.angle)
    dx, dy = np.array([[c, -s], [s, c]]) @ (0.1, -0.05) * square.size / 2
    y, x = np.mgrid[:240, :300].astype(np.float32)
    expected = cv2.remap(PHOTO, (x + dx).astype(np.float32), (y + dy).astype(np.float32), cv2.INTER_CUBIC)
    middle = inside(square, PHOTO.shape, INNER)
    assert np.abs(out[middle].astype(int) - expected[middle]).max() <= 6
    assert np.abs(PHOTO[middle].astype(int) - expected[middle]).mean() > 10


def test_half_a_pixel_of_motion_keeps_the_photo_sharp():
    """Gradient energy of structure of three pixels, moved by (0.5, 0.5): linear sampling keeps 0.75 of it."""
    photo = smooth_photo(300, 240, detail=3)
    square = Square(150, 120, 200)
    low = crop_square(photo, square, 48)
    out = Composer(photo, square).frame(low, low, SOLID, STILL + 1 / 200)

    def energy(x):
        return np.square(np.diff(x[60:180, 90:210].astype(float), axis=1)).mean()

    assert energy(out) > 0.9 * energy(photo)


def test_what_is_painted_is_added_to_the_moved_photo():
    square = SQUARES[1]
    moved = crop_square(PHOTO, square, 48)
    low = np.clip(moved.astype(int) + 5, 0, 255).astype(np.uint8)
    out = Composer(PHOTO, square).frame(low, moved, SOLID, STILL).astype(int)
    middle = inside(square, PHOTO.shape, INNER) & (PHOTO.max(-1) < 230)
    assert np.abs(out[middle] - PHOTO[middle] - 5).max() <= 2


def test_where_alpha_is_one_the_models_picture_stands():
    square = SQUARES[0]
    low = np.full((48, 48, 3), (200, 100, 50), np.uint8)
    out = Composer(PHOTO, square).frame(low, np.zeros_like(low), np.ones((48, 48)), STILL)
    assert np.abs(out[inside(square, PHOTO.shape, INNER)].astype(int) - (200, 100, 50)).max() <= 1


@pytest.mark.parametrize(("paint", "alpha", "gone"), [(6, 0.4, 0.1), (20, 0.0, 0.5), (20, 0.5, 0.5),
                                                     (100, 0.0, 1.0)])
def test_detail_goes_where_the_model_fades_or_paints(paint, alpha, gone):
    """out = up(low) + (photo - up(moved)) (1 - gone), against the formula in floats."""
    square, photo = Square(120, 120, 192), rng.integers(0, 255, (240, 240, 3), np.uint8)
    moved = crop_square(photo, square, 48)
    low = np.where(moved < 128, moved + paint, moved - paint).astype(np.uint8)
    out = Composer(photo, square).frame(low, moved, SOLID + alpha, STILL)
    up = [cv2.resize(x.astype(np.float32), (192, 192), interpolation=cv2.INTER_CUBIC) for x in (low, moved)]
    expected = np.clip(up[0] + (photo[24:216, 24:216] - up[1]) * (1 - gone), 0, 255)
    assert np.abs(out[24:216, 24:216] - expected)[40:-40, 40:-40].mean() < 2


def test_detail_stays_where_the_model_changes_nothing():
    """Even if it fades the photo and paints the same again."""
    square = SQUARES[0]
    low = crop_square(PHOTO, square, 48)
    assert (Composer(PHOTO, square).frame(low, low, SOLID + 0.8, STILL) == PHOTO).all()


def test_a_latent_picture_replaces_the_square():
    square = SQUARES[1]
    low = np.full((32, 32, 3), (10, 200, 90), np.uint8)
    out = Composer(PHOTO, square).blend(low)
    assert np.abs(out[inside(square, PHOTO.shape, INNER)].astype(int) - (10, 200, 90)).max() <= 1


def test_the_window_is_still_at_its_edge_and_whole_inside():
    window = edge_window(40, 1)[..., 0]
    assert (window[0] == 0).all() and (window[:, -1] == 0).all() and (window[7:-7, 7:-7] == 1).all()
    assert (window == window.T).all() and (np.diff(window[20, :8]) >= 0).all() and window[6, 20] < 1


# ---- sizes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height, side, size, expected", [
    (3000, 2000, 800, 1080, (1080, 720)), (801, 601, 400, 1080, (800, 600)),
    (600, 600, 256, 1080, (600, 600)),
    (300, 200, 128, 1080, (600, 400)), (100, 80, 60, 1080, (200, 160)), (300, 200, 200, 1080, (384, 256)),
    (300, 200, 128, 400, (400, 266)), (3000, 10, 9, 1080, (1080, 4)),
])
def test_sizes_are_even_limited_and_small_faces_enlarged_at_most_twice(width, height, side, size, expected):
    assert output_size(width, height, side, size) == expected


def test_a_large_photo_is_scaled_with_its_square():
    image = Image.fromarray(smooth_photo(1500, 1000, 40))
    composer = load_composer(image, Square(800, 400, 600, 0.1), 500)
    assert composer.photo.shape == (334, 500, 3)
    square = composer.square
    assert (square.cx, square.cy, square.size) == pytest.approx((266.7, 133.5, 200), abs=0.5)
    a, b = crop_square(composer.photo, square, 64), crop_square(image, Square(800, 400, 600, 0.1), 64)
    assert np.abs(a.astype(int) - b).mean() < 3


def test_crop_is_the_upright_square_alone():
    image = Image.fromarray(smooth_photo(500, 400, 20))
    square = Square(250, 200, 281, 0.3)
    composer = load_composer(image, square, 1080, crop=True)
    assert composer.photo.shape == (280, 280, 3) and composer.square == Square(140, 140, 280)
    assert np.abs(composer.photo.astype(int) - crop_square(image, square, 280)).max() == 0
    assert square_matrix(composer.square, 280) == pytest.approx(np.array([[1, 0, 0], [0, 1, 0]]))
