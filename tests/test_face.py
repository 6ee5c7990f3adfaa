"""media/face.py: faces are found also when smaller, turned, beside others; squares are cut exactly."""
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from media.face import (
    FACE_BOX,
    Square,
    crop_square,
    find_faces,
    largest,
    load_detector,
    median_square,
    middle_square,
    square_of_box,
    square_of_points,
)
from media.files import InputError

ROOT = Path(__file__).parent.parent
PORTRAIT = Image.open(ROOT / "examples" / "portrait.png").convert("RGB")        # 512 x 512, one face
DETECTOR = load_detector()


def scene(*placed, size=(700, 400)):
    """The portrait on grey, each time (scale, left, top, degrees): PIL, and the matrices that placed it."""
    canvas, matrices = np.full((*size[::-1], 3), 128, np.uint8), []
    for scale, left, top, degrees in placed:
        matrix = cv2.getRotationMatrix2D((256, 256), -degrees, scale)
        matrix[:, 2] += left - 256 + 256 * scale, top - 256 + 256 * scale
        mask = cv2.warpAffine(np.ones((512, 512), np.uint8), matrix, size)
        canvas[mask > 0] = cv2.warpAffine(np.asarray(PORTRAIT), matrix, size)[mask > 0]
        matrices.append(matrix)
    return Image.fromarray(canvas), matrices


ALONE = largest(find_faces(DETECTOR, PORTRAIT))


def test_the_drawn_face_fills_its_square():
    assert len(find_faces(DETECTOR, PORTRAIT)) == 1
    assert abs(ALONE.cx - 256) < 20 and abs(ALONE.cy - 270) < 30
    assert 400 < ALONE.size < 500 and abs(ALONE.angle) < 0.06


@pytest.mark.parametrize("scale, degrees", [(0.7, 0), (0.35, 0), (0.6, 10), (0.6, -10), (0.5, 32)])
def test_the_square_follows_the_face(scale, degrees):
    """Smaller, elsewhere and turned by as much as needs a turned search."""
    image, (matrix,) = scene((scale, 300, 30, degrees))
    (square, eyes), = find_faces(DETECTOR, image)
    x, y = matrix @ (ALONE.cx, ALONE.cy, 1)
    assert eyes
    assert square.size == pytest.approx(scale * ALONE.size, rel=0.08)
    assert np.hypot(square.cx - x, square.cy - y) < 0.05 * square.size
    assert np.degrees(square.angle - ALONE.angle) == pytest.approx(degrees, abs=4)


def test_faces_come_from_left_to_right_and_the_largest_is_taken():
    image, _ = scene((0.42, 490, 100, 0), (0.6, 180, 50, 0), (0.3, 10, 200, 0))
    faces = find_faces(DETECTOR, image)
    assert [round(square.size / ALONE.size, 1) for square, _ in faces] == [0.3, 0.6, 0.4]
    assert largest(faces) == faces[1][0]
    assert largest([(Square(0, 0, 100), False), (Square(0, 0, 50), True)]) == Square(0, 0, 50)
    assert largest([]) is None


def test_a_large_photo_is_searched_at_once_size():
    image = PORTRAIT.resize((2048, 2048))
    square = largest(find_faces(DETECTOR, image))
    assert square.size == pytest.approx(4 * ALONE.size, rel=0.06)
    assert square.cx == pytest.approx(4 * ALONE.cx, rel=0.03)


def test_no_face_is_found_where_there_is_none():
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    assert find_faces(DETECTOR, Image.fromarray(noise)) == []
    assert find_faces(DETECTOR, Image.new("RGB", (400, 300), (200, 180, 160))) == []


def test_the_middle_square_leaves_room_below_in_tall_pictures():
    assert middle_square(400, 300) == Square(200, 150, 300)
    assert middle_square(300, 400) == Square(150, 160, 300)


def test_the_median_square_ignores_a_stray_one():
    assert median_square([Square(10, 20, 30, 0.1)] * 3 + [Square(90, 90, 90, 0.9)]) == Square(10, 20, 30, 0.1)


def turned(points, angle, about=(0, 0)):
    c, s = np.cos(angle), np.sin(angle)
    return (np.asarray(points) - about) @ np.array([[c, s], [-s, c]]) + about


def test_yunets_points_give_a_square_that_turns_and_grows_with_them():
    points = np.array([[-20, 0], [20, 0], [0, 25], [-15, 45], [15, 45]], float)
    upright = square_of_points((-40, -40, 80, 110), points)
    assert (upright.cx, upright.angle) == (0, 0) and upright.cy == pytest.approx(0.48 * 45)
    assert upright.size == pytest.approx(2.15 * np.sqrt(45 * 110))
    tilted = square_of_points((-80, -80, 160, 220), 2 * turned(points, 0.3) + (7, 5))
    assert tilted.angle == pytest.approx(0.3) and tilted.size == pytest.approx(2 * upright.size)
    assert (tilted.cx, tilted.cy) == pytest.approx(tuple(2 * turned([[0, upright.cy]], 0.3)[0] + (7, 5)))


def test_a_cascades_box_gives_a_square_below_its_centre_along_the_face():
    level = square_of_box((100, 100, 50, 50))
    assert (level.cx, level.cy, level.size, level.angle) == pytest.approx((125, 129, 72.5, 0))
    tilted = square_of_box((100, 100, 50, 50), turned([[-10, 0], [10, 0]], 0.2) + (125, 115))
    assert tilted.angle == pytest.approx(0.2) and tilted.size == pytest.approx(2.33 * np.sqrt(50 * 20))
    assert (tilted.cx, tilted.cy) == pytest.approx((125 - 4 * np.sin(0.2), 125 + 4 * np.cos(0.2)))


# ---- cutting -----------------------------------------------------------------------------------------------

def test_a_whole_square_is_cut_pixel_by_pixel():
    pixels = np.random.default_rng(1).integers(0, 255, (40, 50, 3), np.uint8)
    assert (crop_square(pixels, Square(20, 15, 20), 20) == pixels[5:25, 10:30]).all()


def test_a_turned_square_comes_out_upright():
    """Brightness that rises along the square's upper edge rises along x in the crop, by the right amount."""
    y, x = np.mgrid[:200, :200] + 0.5
    angle, square = 0.4, Square(110, 90, 60, 0.4)
    plane = 100 + 0.5 * ((x - 110) * np.cos(angle) + (y - 90) * np.sin(angle))
    for size in (120, 30, 10):
        out = crop_square(np.repeat(plane[..., None], 3, 2).round().astype(np.uint8), square, size)
        expected = 100 + 0.5 * ((np.arange(size) + 0.5) / size - 0.5) * 60
        assert abs(out[..., 1] - expected).max() < 1.6, size


def test_shrinking_does_not_alias():
    board = np.repeat((np.indices((240, 240)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, 2)
    for angle in (0.0, 0.3):
        inside = crop_square(board, Square(120, 120, 130, angle), 16)
        assert inside.min() > 110 and inside.max() < 145


def test_outside_the_picture_its_edge_is_repeated():
    pixels = np.full((30, 30, 3), 50, np.uint8)
    pixels[0] = 200
    out = crop_square(pixels, Square(15, 0, 20), 20)
    assert (out[:10] == 200).all() and (out[13:] == 50).all()


def test_the_box_of_the_face_lies_in_the_square():
    left, top, right, bottom = FACE_BOX
    assert 0 < left < 0.5 < right < 1 and 0 < top < 0.5 < bottom < 1 and left + right == pytest.approx(1)


def test_a_detector_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_detector(str(tmp_path / "no.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(InputError, match="not a YuNet"):
        load_detector(str(tmp_path / "bad.onnx"))
