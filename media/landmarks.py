"""Labels for training: read mouth, lids, brows and head pose from prepared clips with MediaPipe's networks.

    python -m media.landmarks --data SET [SET ...]       SET/clips/*.mp4 -> SET/landmarks/*.npz

Optional: with these files stage 1 picks pairs of frames that differ in the mouth or the lids alone, weighs
both in the loss, and may read the factors from differences of tokens while `label_weight` fades. Without them
the usual place of mouth and eyes in the square is taken. A clip whose file this reader made is left alone.

The plain mesh (468 points) is read from several crops of the face and averaged, as one reading is noisy; the
lids come from the iris network, as the mesh closes them only half. With `--shape-predictor FILE` the lips are
averaged with those of dlib's 68 points (pip install dlib-bin; FILE is shape_predictor_68_face_landmarks.dat
of dlib.net, whose training data, iBUG 300-W, excludes commercial use). RESULTS.md compares the readers;
measure/landmarks.py judges with the attention mesh, which takes no part here. MediaPipe needs numpy < 2
(requirements-measure.txt), so this may run in an environment of its own.
"""
import argparse
import os
import sys

import cv2
import numpy as np

from media.files import InputError, atomic_write, check_file, command, open_clip, read_lines

READER = 2                                     # in the files; factors of another reader have other units
FACTORS = ("opening", "width", "lid_left", "lid_right", "yaw", "pitch", "roll", "brow", "corner", "furrow")
# Usual difference of two frames: root 2 times the standard deviation in a clip, mean over a person's clips,
# median over a set's persons, mean over sets. Of 1,200 training clips in 4 sets, lips with dlib's points, the
# lids alike. Measured with random crops; the furrow times 0.76, as the fixed crops below read it.
SCALE = (0.023, 0.020, 0.069, 0.069, 0.071, 0.059, 0.038, 0.0101, 0.0088, 0.0048)
WEIGHT = (2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.6, 0.6, 0.6)           # in the loss of stage 1
MIRROR, SIGN = (0, 1, 3, 2, 4, 5, 6, 7, 8, 9), (1, 1, 1, 1, -1, 1, -1, 1, 1, 1)       # of a mirrored picture
# Ellipses (x, y, half width, half height) of mouth, eyes and face in [-1, 1] of the square: medians of clips.
USUAL = ((0.0, 0.33, 0.27, 0.17), (-0.25, -0.25, 0.15, 0.095), (0.25, -0.25, 0.15, 0.095),
         (0.0, 0.0, 0.59, 0.78))
# Crops of the face beside the first: shift x, y by shares of the square, logarithm of the size, turn in
# radians. The same at every frame: no noise from frame to frame, and a second run gives the same file.
JITTER = ((-0.04, -0.04, -0.15, -0.1), (0.04, -0.04, 0.05, 0.1), (-0.04, 0.04, 0.05, 0.1),
          (0.04, 0.04, -0.15, -0.1))


def distance(points, a, b, xp=np):
    return xp.linalg.norm(points[:, a, :2] - points[:, b, :2], axis=1)


def read_factors(points, xp=np):
    """Compute FACTORS from mesh points (F, 468, 3) in pixels, x right, y down -> (F, 10).

    Lengths are shares of forehead to chin or of the eye's width, angles are in radians. xp: numpy or torch.
    """
    flat, face = points[..., :2], distance(points, 10, 152, xp)
    eyes = flat[:, 263] - flat[:, 33]
    roll = xp.arctan2(eyes[:, 1], eyes[:, 0])

    def down(v):                                       # component of (F, 2) along the face's own vertical
        return xp.cos(roll) * v[:, 1] - xp.sin(roll) * v[:, 0]

    yaw = xp.arctan2(points[:, 454, 2] - points[:, 234, 2], points[:, 454, 0] - points[:, 234, 0])
    pitch = xp.arctan2(points[:, 152, 2] - points[:, 10, 2], points[:, 152, 1] - points[:, 10, 1])
    lips, corners = flat[:, [13, 14]].mean(1), flat[:, [61, 291]].mean(1)
    brow = (down(flat[:, 159] - flat[:, 105]) + down(flat[:, 386] - flat[:, 334])) / 2
    return xp.stack([distance(points, 13, 14, xp) / face, distance(points, 61, 291, xp) / face,
                     distance(points, 159, 145, xp) / distance(points, 33, 133, xp),
                     distance(points, 386, 374, xp) / distance(points, 362, 263, xp), yaw, pitch, roll,
                     brow / face, -down(corners - lips) / face,
                     distance(points, 107, 336, xp) / face], axis=1)


def ellipses(points, size):
    """Compute the ellipses of mouth, left and right eye, face from mesh points (F, 468, 3) in pixels.

    size: of the square -> (F, 4, 4): x, y, half width, half height in [-1, 1] of the square.
    """
    p = points[..., :2] / size * 2 - 1
    wide, high = distance(p, 61, 291) / 2, distance(p, 0, 17) / 2
    mouth = [p[:, [0, 13, 14, 17, 61, 291]].mean(1), 1.35 * wide, 1.35 * high + 0.25 * wide]
    eyes = [[(p[:, a] + p[:, b]) / 2, 0.675 * distance(p, a, b), 0.425 * distance(p, a, b)]
            for a, b in ((33, 133), (362, 263))]
    face = [(p[:, 10] + p[:, 152]) / 2, 0.54 * distance(p, 234, 454), 0.56 * distance(p, 10, 152)]
    return np.stack([np.column_stack(part) for part in (mouth, *eyes, face)], axis=1)


# ---- readers -----------------------------------------------------------------------------------------------

def open_network(name):
    """Open one of MediaPipe's networks -> a function of a picture (S, S, 3) uint8, to its outputs."""
    import mediapipe
    from ai_edge_litert.interpreter import Interpreter
    path = os.path.join(os.path.dirname(mediapipe.__file__), "modules", name, f"{name}.tflite")
    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(picture):
        interpreter.set_tensor(inputs[0]["index"], picture[None] / np.float32(255))
        interpreter.invoke()
        return [interpreter.get_tensor(output["index"]).ravel() for output in outputs]
    return run


def open_predictor(path):
    """Open the file of dlib's 68 points -> a function of a picture and a box (left, top, right, bottom), to
    points (68, 2) in pixels. Raises InputError."""
    wanted = "shape_predictor_68_face_landmarks.dat of dlib.net"
    check_file(path, wanted)
    try:
        import dlib
        predictor = dlib.shape_predictor(os.fspath(path))
    except ImportError as error:
        raise InputError(f"--shape-predictor needs dlib ({error}): pip install dlib-bin") from None
    except (RuntimeError, MemoryError):
        raise InputError(f"{path} is no file of dlib; give {wanted}") from None

    def run(image, box):
        parts = predictor(image, dlib.rectangle(*map(int, box))).parts()
        return np.array([(part.x, part.y) for part in parts], float)
    if len(run(np.zeros((64, 64, 3), np.uint8), (8, 8, 56, 56))) != 68:
        raise InputError(f"{path} predicts other points than dlib's 68; give {wanted}")
    return run


def open_readers(shape_predictor=None):
    """Open what reads frames -> find, mesh, iris, predict (None without a file). Raises InputError.

    find: a function of a picture (H, W, 3) uint8, to mesh points (468, 3) in pixels of a face anywhere in it,
    or None. mesh, iris: open_network. predict: open_predictor."""
    try:
        from mediapipe.python.solutions.face_mesh import FaceMesh
        mesh, iris = open_network("face_landmark"), open_network("iris_landmark")
    except ImportError as error:
        raise InputError(f"needs mediapipe==0.10.21 and ai-edge-litert ({error}); see "
                         "requirements-measure.txt") from None
    predict = open_predictor(shape_predictor) if shape_predictor else None
    finder = FaceMesh(static_image_mode=True, max_num_faces=1, min_detection_confidence=0.4)

    def find(image):
        faces, (height, width) = finder.process(image).multi_face_landmarks, image.shape[:2]
        if faces:
            return np.array([(p.x, p.y, p.z) for p in faces[0].landmark[:468]]) * (width, height, width)
    return find, mesh, iris, predict


# ---- one frame ---------------------------------------------------------------------------------------------

def cut(image, centre, span, angle, size, mirrored=False):
    """Cut a turned square out of a picture; beyond the border its outermost pixels are repeated.

    centre (2,) and span in pixels, angle in radians -> (size, size, 3), and the matrix (2, 3) from its pixels
    to those of the picture."""
    cos, sin = np.cos(angle) * span / size, np.sin(angle) * span / size
    turn = np.array([[cos, -sin], [sin, cos]]) * ([-1, 1] if mirrored else [1, 1])
    matrix = np.column_stack([turn, centre - turn @ [size / 2, size / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE), matrix


def face_square(points):
    """The square that the mesh network expects round points (468, 3) -> centre (2,), span, angle."""
    x, y = points[263, :2] - points[33, :2]
    angle = np.arctan2(y, x)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    level = points[:, :2] @ turn
    low, high = level.min(0), level.max(0)
    return turn @ (low + high) / 2, 1.5 * (high - low).max(), angle


def read_mesh(image, points, mesh):
    """Read the mesh near known points (468, 3) -> their mean over several crops, or None: no face there."""
    def read(centre, span, angle):
        square, matrix = cut(image, centre, span, angle, 192)
        located, presence = mesh(square)
        located = located.reshape(468, 3).astype(float)
        flat, depth = located[:, :2] @ matrix[:, :2].T + matrix[:, 2], located[:, 2:] * span / 192
        return np.hstack([flat, depth]), presence.item() > 0                   # a logit

    located, present = read(*face_square(points))
    if not present:
        return None
    centre, span, angle = face_square(located)
    around = [read(centre + span * np.array([x, y]), span * np.exp(grow), angle + turn)[0]
              for x, y, grow, turn in JITTER]
    return np.mean([located, *around], axis=0)


def read_lids(image, points, iris):
    """Read the gap between the lids of both eyes of a mesh (468, 3) -> 2 shares of the eye's width.

    The iris network knows one eye, the other is mirrored; its first 16 points go round the lids."""
    gaps = []
    for a, b in ((33, 133), (362, 263)):
        along, middle = points[b, :2] - points[a, :2], points[[a, b], :2].mean(0)
        span, angle = 2.3 * np.hypot(*along), np.arctan2(along[1], along[0])
        contour = iris(cut(image, middle, span, angle, 64, mirrored=a == 362)[0])[0].reshape(71, 3)[None, :16]
        gap = np.mean([distance(contour, k, k + 8) for k in (3, 4, 5)])
        gaps.append(gap / distance(contour, 0, 8).item())
    return gaps


def read_lips(image, points, predict):
    """Read opening and width of the lips of a mesh (468, 3) with dlib's points -> 2 shares of the face."""
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    span, readings = (high - low).max(), []
    for x, y, grow, _ in JITTER:
        centre = (low + high) / 2 + span * np.array([0.6 * x, 0.6 * y + 0.025])
        half = 0.475 * span * np.exp(grow + 0.05)
        lips = predict(image, (*(centre - half), *(centre + half)))[None]              # (1, 68, 2)
        gap = np.mean([distance(lips, a, b) for a, b in ((61, 67), (62, 66), (63, 65))])
        readings.append((gap, distance(lips, 48, 54).item()))
    return np.mean(readings, axis=0) / distance(points[None], 10, 152)


# ---- clips -------------------------------------------------------------------------------------------------

def read_frames(frames, find, mesh, iris, predict=None):
    """Track one face through frames (H, W, 3) uint8 -> points (F, 468, 3) in pixels, factors (F, 10).

    nan where no face is seen. The others: open_readers."""
    all_points, all_factors, points = [], [], None
    for image in frames:
        if points is not None:
            points = read_mesh(image, points, mesh)
        if points is None and (searched := find(image)) is not None:
            points = read_mesh(image, searched, mesh)
        all_points.append(np.full((468, 3), np.nan) if points is None else points)
        factors = read_factors(all_points[-1][None])[0]
        if points is not None:
            factors[2:4] = read_lids(image, points, iris)
            if predict:
                factors[:2] = (factors[:2] + read_lips(image, points, predict)) / 2
        all_factors.append(factors)
    return np.array(all_points), np.array(all_factors)


def read_labels(path, frames):
    """Read the labels of a clip of so many frames -> ellipses (F, 4, 4), factors (F, 10), nan without a face.
    Raises InputError for a file that is damaged, of another reader or of another clip."""
    try:
        with np.load(path) as file:
            labels, factors = (np.asarray(file[name], np.float32) for name in ("ellipses", "factors"))
            reader = file["reader"].tolist() if "reader" in file else 1
    except Exception as error:                           # whatever numpy, zipfile and zlib make of damage
        raise InputError(f"{path} cannot be read ({error}); run python -m media.landmarks again") from None
    if reader != READER:
        folder = os.path.dirname(os.path.dirname(path))
        raise InputError(f"{path} was made by another reader; label again: python -m media.landmarks --data "
                         f"{folder}")
    if labels.shape != (frames, 4, 4) or factors.shape != (frames, len(FACTORS)):
        raise InputError(f"{path} is of another clip: {len(factors)} frames, not {frames}; run python -m "
                         "media.landmarks again")
    return labels, factors


def write_labels(path, video, count, readers):
    """Read a prepared clip of `count` frames by `readers` (open_readers), write its labels to path. Raises
    InputError."""
    with open_clip(video) as (container, stream):
        size = stream.width
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(stream))
        points, factors = read_frames(frames, *readers)
    if len(points) != count:
        raise InputError(f"{video} is damaged: {len(points)} frames, not {count}; prepare the set again")
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, factors=factors.astype(np.float32), reader=READER,
                 ellipses=ellipses(points, size).astype(np.float32))


def label(folder, readers):
    """Write landmarks/*.npz for each clip of a prepared folder that lacks it. Raises InputError."""
    records = read_lines(os.path.join(folder, "manifest.jsonl"))
    os.makedirs(os.path.join(folder, "landmarks"), exist_ok=True)
    for number, record in enumerate(records, 1):
        path = os.path.join(folder, landmark_file(record["file"]))
        try:
            read_labels(path, record["frames"])
        except InputError:
            write_labels(path, os.path.join(folder, record["file"]), record["frames"], readers)
        print(f"\r{folder}: {number} of {len(records)} clips", end="", flush=True)
    print()


def landmark_file(clip):
    """clips/NAME.mp4 -> landmarks/NAME.npz."""
    return os.path.join("landmarks", os.path.splitext(os.path.basename(clip))[0] + ".npz")


@command("media.landmarks")
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="SET",
                        help="folders made by data.py prepare")
    parser.add_argument("--shape-predictor", metavar="FILE", help="dlib's 68 points, for the lips too")
    args = parser.parse_args(argv)
    for folder in args.data:
        if not os.path.isfile(os.path.join(folder, "manifest.jsonl")):
            raise InputError(f"{folder} holds no manifest.jsonl; make it with data.py prepare")
    readers = open_readers(args.shape_predictor)
    for folder in args.data:
        label(folder, readers)


if __name__ == "__main__":
    sys.exit(main())
