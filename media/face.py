"""The face of a picture: where it is, and the square around it that the models are trained on.

    photo --find_faces--> Squares, left to right --largest--> Square --crop_square--> (size, size, 3)

Framing is the same for training clips, photos and driving videos: the side is 1.44 times the distance from
the top of the forehead to the chin, the centre is the midpoint of the two, the eyes are level. Faces are
found by the cascades in OpenCV's wheel (Viola and Jones 2001), or by YuNet where its file is given.
"""
import os
from dataclasses import astuple, dataclass
from itertools import chain, islice

import cv2
import numpy as np

from media.files import InputError
from media.image import from_uint8
from media.sound import FPS
from media.video import read_frames

YUNET = "face_detection_yunet_2023mar.onnx"
SEARCH_SIZE = 640                # pixels of the long side of the picture in which faces are searched
# From a detection to the square, fitted to face meshes of 289 people and 200 photos. A cascade's box: side of
# the square by the box's side, or by the geometric mean of box and eye distance; its centre below the box's.
BOX_SIDE, EYES_SIDE, BOX_DOWN = 1.45, 2.33, 0.08
# YuNet: side by the geometric mean of box height and distance from eyes to mouth; centre below the eyes.
YUNET_SIDE, YUNET_DOWN = 2.15, 0.48
EYE_DISTANCE = (0.32, 0.6)       # plausible distance of two eyes, by the side of the cascade's box
MAX_SLOPE = np.deg2rad(23)       # a pair of eyes that slopes more is not a pair
TILTS = (0, 25, -25)             # degrees by which the picture is turned when no upright face is found
DETECT_EVERY = 5                 # faces of a video are searched in one frame of so many
FACE_BOX = (0.22, 0.08, 0.78, 0.85)     # left, top, right, bottom of YuNet's box, by the square's side


@dataclass(frozen=True)
class Square:
    """A square in a picture: centre and size (length of a side) in pixels, pixel k covering k to k + 1.

    angle: of the upper edge, in radians, positive where it falls to the right.
    """
    cx: float
    cy: float
    size: float
    angle: float = 0.0


class Cascades:
    """OpenCV's frontal face and eye cascades, whose files come with its wheel."""

    def __init__(self):
        def load(name):
            return cv2.CascadeClassifier(os.path.join(cv2.data.haarcascades, f"haarcascade_{name}.xml"))

        self.strict, self.loose = load("frontalface_alt2"), load("frontalface_default")
        self.eyes = load("eye_tree_eyeglasses"), load("eye")

    def find(self, rgb):
        """Find faces in (H, W, 3) uint8 -> [(Square, whether both eyes were found)]."""
        grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        size, least = grey.shape[::-1], max(20, round(min(grey.shape) * 0.08))
        for tilt in TILTS:
            turn = cv2.getRotationMatrix2D((size[0] / 2, size[1] / 2), tilt, 1)
            turned = cv2.warpAffine(grey, turn, size, borderMode=cv2.BORDER_REPLICATE) if tilt else grey
            for cascade, neighbours, sure in ((self.strict, 4, tilt == 0), (self.loose, 6, False)):
                faces = []
                for box in cascade.detectMultiScale(turned, 1.1, neighbours, minSize=(least, least)):
                    eyes = self.find_eyes(turned, box)
                    if sure or eyes is not None:           # what is less reliable counts only with both eyes
                        square = turn_back(square_of_box(box, eyes), turn, np.deg2rad(tilt))
                        faces.append((square, eyes is not None))
                if faces:
                    return faces
        return []

    def find_eyes(self, grey, box):
        """Find both eyes in a face's box (x, y, w, h) -> their centres (2, 2), left one first, or None."""
        x, y, w, _ = (float(v) for v in box)
        scale, size = 128 / w, 168                         # the box becomes 128 pixels in a patch of 168
        origin = np.array([x - 20 / scale, y - 20 / scale])
        matrix = np.array([[scale, 0, -origin[0] * scale], [0, scale, -origin[1] * scale]])
        patch = cv2.warpAffine(grey, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)
        for cascade in self.eyes:
            pair = []
            for left in (24, 74):                          # left and right half of the face, overlapping
                part = patch[40:100, left:left + 70]
                boxes, votes = cascade.detectMultiScale2(part, 1.05, 2, minSize=(18, 18), maxSize=(56, 56))
                if len(boxes):
                    ex, ey, ew, eh = boxes[int(np.argmax(votes))]
                    pair.append((left + ex + ew / 2, 40 + ey + eh / 2, ew))
            if len(pair) < 2:
                continue
            (lx, ly, lw), (rx, ry, rw) = pair
            near, far = EYE_DISTANCE
            level, alike = abs(np.arctan2(ry - ly, rx - lx)) < MAX_SLOPE, abs(lw - rw) < 0.35 * max(lw, rw)
            if level and alike and near < np.hypot(rx - lx, ry - ly) / 128 < far:
                return np.array([[lx, ly], [rx, ry]]) / scale + origin
        return None


class YuNet:
    """OpenCV's face detector YuNet: a box and five points for each face."""

    def __init__(self, path):
        if not os.path.isfile(path):
            raise InputError(f"{path} does not exist; give --detector the file {YUNET} of opencv/opencv_zoo "
                             "(models/face_detection_yunet), or leave --detector out")
        try:
            self.net = cv2.FaceDetectorYN.create(path, "", (320, 320), score_threshold=0.7)
        except cv2.error:
            raise InputError(f"{path} is not a YuNet model that OpenCV can read; give {YUNET}, or leave "
                             "--detector out") from None

    def find(self, rgb):
        """Find faces in (H, W, 3) uint8 -> [(Square, True)]."""
        self.net.setInputSize(rgb.shape[1::-1])
        _, faces = self.net.detect(np.ascontiguousarray(rgb[:, :, ::-1]))
        return [(square_of_points(face[:4], face[4:14].reshape(5, 2)), True)
                for face in (() if faces is None else faces)]


def square_of_box(box, eyes=None):
    """The Square of a face from a cascade's box (x, y, w, h) and the eyes (2, 2) in it, if found."""
    x, y, w, h = (float(v) for v in box)
    across = np.array([1.0, 0.0]) if eyes is None else eyes[1] - eyes[0]
    angle = float(np.arctan2(across[1], across[0]))
    size = BOX_SIDE * w if eyes is None else EYES_SIDE * float(np.sqrt(w * np.hypot(*across)))
    down = BOX_DOWN * w
    return Square(x + w / 2 - down * np.sin(angle), y + h / 2 + down * np.cos(angle), size, angle)


def square_of_points(box, points):
    """The Square of a face from YuNet's box (x, y, w, h) and points (5, 2): eyes, nose, mouth corners."""
    eyes, mouth, across = points[:2].mean(0), points[3:].mean(0), points[1] - points[0]
    angle, height = float(np.arctan2(across[1], across[0])), float(np.hypot(*(mouth - eyes)))
    cx, cy = eyes + YUNET_DOWN * height * np.array([-np.sin(angle), np.cos(angle)])
    return Square(float(cx), float(cy), YUNET_SIDE * float(np.sqrt(height * box[3])), angle)


def turn_back(square, turn, angle):
    """A Square of a picture turned by the matrix `turn` (2, 3), by -angle -> in the picture itself."""
    x, y = cv2.invertAffineTransform(turn) @ (square.cx, square.cy, 1)
    return Square(float(x), float(y), square.size, square.angle + float(angle))


def load_detector(path=None):
    """The cascades, or YuNet where its file is given. Raises InputError."""
    if not hasattr(cv2, "CascadeClassifier"):
        raise InputError("OpenCV 5 has no face cascades: pip install 'opencv-python-headless>=4.10,<5'")
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)      # InputError says what went wrong
    return Cascades() if path is None else YuNet(path)


def find_faces(detector, image):
    """Faces of a PIL picture, left to right -> [(Square in its pixels, whether both eyes were found)]."""
    scale = min(1.0, SEARCH_SIZE / max(image.size))
    small = image.resize(tuple(max(1, round(n * scale)) for n in image.size))
    faces = [(Square(s.cx / scale, s.cy / scale, s.size / scale, s.angle), eyes)
             for s, eyes in detector.find(np.asarray(small))]
    return sorted(faces, key=lambda face: face[0].cx)


def largest(faces):
    """The largest Square of find_faces' list, or None. A face without eyes found counts as 0.4 as large."""
    return max(faces, key=lambda face: face[0].size * (1 if face[1] else 0.4))[0] if faces else None


def frame_photo(image, detector, number=None, name="the photo"):
    """The face of a PIL photo -> (its Square, a sentence for the user or None).

    number: which face, from the left, 1 the first; None: the largest. Without a face: the middle of the
    photo, unless a number was asked for (InputError).
    """
    faces = find_faces(detector, image)
    if number is not None and not 1 <= number <= len(faces):
        raise InputError(f"{name}: --face {number} does not exist; faces found: {len(faces)}")
    if not faces:
        return middle_square(*image.size), f"no face found in {name}; the middle of the picture is used"
    square = largest(faces) if number is None else faces[number - 1][0]
    if number is None and len(faces) > 1:
        position = [face[0] for face in faces].index(square) + 1
        used = f"the largest, number {position} from the left, is used"
        return square, f"{len(faces)} faces found in {name}; {used}"
    return square, None


def frame_video(path, size, detector):
    """Frame the face of a driving video -> (iterator of (3, size, size) in [-1, 1], a note or None).

    25 frames a second. One Square for all frames: the median of the first second. Raises InputError.
    """
    images = read_frames(path)
    first = list(islice(images, FPS))
    faces = [face for image in first[::DETECT_EVERY] if (face := largest(find_faces(detector, image)))]
    square = median_square(faces) if faces else middle_square(*first[0].size)
    note = None if faces else f"no face found at the start of {path}; the middle of the picture is used"
    return (from_uint8(crop_square(image, square, size)) for image in chain(first, images)), note


def middle_square(width, height):
    """The Square of a picture in which no face is found: its middle, of a tall one the upper part.

    A tenth of what is cut lies above, the rest below: heads sit there.
    """
    size = min(width, height)
    return Square(width / 2, (height - size) / 10 + size / 2, size)


def median_square(faces):
    """The median of Squares, number by number."""
    return Square(*np.median([astuple(square) for square in faces], axis=0).tolist())


def square_matrix(square, size):
    """The (2, 3) matrix from points (x, y) of the picture to points of a crop of size x size pixels.

    Both are counted as in cv2: pixel k has its centre at k.
    """
    c, s, scale = np.cos(square.angle), np.sin(square.angle), size / square.size
    turn = scale * np.array([[c, s], [-s, c]])
    return np.column_stack([turn, (size - 1) / 2 - turn @ (square.cx - 0.5, square.cy - 0.5)])


def crop_square(image, square, size):
    """Cut the Square of a picture, PIL or (H, W, 3) uint8, upright -> (size, size, 3) uint8.

    Outside of the picture its edge is repeated.
    """
    pixels, shrink = np.asarray(image), square.size / size
    if shrink > 2:                                         # first to twice the resolution wanted, by area
        height, width = pixels.shape[:2]
        new = max(1, round(2 * width / shrink)), max(1, round(2 * height / shrink))
        fx, fy = new[0] / width, new[1] / height
        pixels = cv2.resize(pixels, new, interpolation=cv2.INTER_AREA)
        square = Square(square.cx * fx, square.cy * fy, square.size * (fx * fy) ** 0.5, square.angle)
    fine = size * 2 if shrink > 1 else size
    pixels = cv2.warpAffine(pixels, square_matrix(square, fine), (fine, fine), flags=cv2.INTER_CUBIC,
                            borderMode=cv2.BORDER_REPLICATE)
    return pixels if fine == size else cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
