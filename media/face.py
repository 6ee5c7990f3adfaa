"""The face of a photo: where it is, and the square round it that the models know."""
import os

import numpy as np
from PIL import Image

from media.files import InputError
from media.image import open_image, to_tensor

FACE_HEIGHT = 0.6                       # height of the face by the side of the crop
YUNET = "face_detection_yunet_2023mar.onnx"


def load_detector(path):
    """OpenCV's face detector YuNet. Raises InputError."""
    try:
        import cv2
    except ImportError:
        raise InputError("finding faces needs OpenCV: pip install opencv-python-headless, or do without it (README)") from None
    if not os.path.isfile(path):
        raise InputError(f"{path} does not exist; give --detector the file {YUNET} of opencv/opencv_zoo "
                         "(models/face_detection_yunet), or do without it (README)")
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)      # version 5 warns of a setting of its own
    try:
        return cv2.FaceDetectorYN.create(path, "", (320, 320), score_threshold=0.7)
    except cv2.error:
        raise InputError(f"{path} is not a YuNet model that OpenCV can read; give {YUNET}") from None


def find_face(detector, image):
    """The largest face of a PIL picture as (left, top, right, bottom) in its pixels, or None."""
    scale = min(1.0, 640 / max(image.size))
    small = np.array(image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale)))))[:, :, ::-1]
    detector.setInputSize((small.shape[1], small.shape[0]))
    _, faces = detector.detect(np.ascontiguousarray(small))
    if faces is None:
        return None
    x, y, w, h = max(faces, key=lambda face: face[2] * face[3])[:4] / scale
    return [float(x), float(y), float(x + w), float(y + h)]


def load_face(path, size, detector):
    """A picture file -> (3, size, size) float in [-1, 1]: the square round its largest face, framed as `prepare` frames clips. What
    lies outside the picture repeats its edge. Raises InputError."""
    image = open_image(path)
    face = find_face(detector, image)
    if face is None:
        raise InputError(f"{path}: no face found; give a photo of one that looks at the camera, or leave out --detector")
    left, top, right, bottom = face
    side = max(2, round((bottom - top) / FACE_HEIGHT))
    x, y = round((left + right - side) / 2), round((top + bottom - side) / 2)
    rows, columns = (np.arange(start, start + side).clip(0, most - 1) for start, most in ((y, image.height), (x, image.width)))
    return to_tensor(Image.fromarray(np.asarray(image)[rows][:, columns]), size)
