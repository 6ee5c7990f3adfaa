"""Labels for training: read mouth, lids, brows and head pose from prepared clips with MediaPipe's face mesh.

    python -m media.landmarks --data SET [SET ...]       SET/clips/*.mp4 -> SET/landmarks/*.npz

Optional: with these files stage 1 picks pairs of frames that differ in the mouth or the lids alone, weighs
both in the loss, and may read the factors from differences of tokens while `label_weight` fades. Without them
the usual place of mouth and eyes in the square is taken. Uses the plain mesh (468 points);
measure/landmarks.py judges with the attention mesh. MediaPipe needs numpy < 2 (requirements-measure.txt), so
this may run in an environment of its own; it needs only mediapipe, numpy and av.
"""
import argparse
import os
import sys

import numpy as np

from media.files import InputError, atomic_write, command, read_lines

FACTORS = ("opening", "width", "lid_left", "lid_right", "yaw", "pitch", "roll", "brow", "corner", "furrow")
# Usual difference of two frames of a clip (median over clips); what mirroring a picture does to the factors.
SCALE = (0.023, 0.019, 0.040, 0.040, 0.070, 0.062, 0.039, 0.0104, 0.0088, 0.0053)
WEIGHT = (2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.6, 0.6, 0.6)           # in the loss of stage 1
MIRROR, SIGN = (0, 1, 3, 2, 4, 5, 6, 7, 8, 9), (1, 1, 1, 1, -1, 1, -1, 1, 1, 1)
# Ellipses (x, y, half width, half height) of mouth, eyes and face in [-1, 1] of the square: medians of clips.
USUAL = ((0.0, 0.33, 0.27, 0.17), (-0.25, -0.25, 0.15, 0.095), (0.25, -0.25, 0.15, 0.095),
         (0.0, 0.0, 0.59, 0.78))


def distance(points, a, b):
    return np.linalg.norm(points[:, a, :2] - points[:, b, :2], axis=1)


def read_factors(points):
    """Compute FACTORS from mesh points (F, 468, 3) in pixels, x right, y down -> (F, 10).

    Lengths are shares of forehead to chin or of the eye's width, angles are in radians.
    """
    flat, face = points[..., :2], distance(points, 10, 152)
    eyes = flat[:, 263] - flat[:, 33]
    roll = np.arctan2(eyes[:, 1], eyes[:, 0])

    def down(v):                                       # component of (F, 2) along the face's own vertical
        return np.cos(roll) * v[:, 1] - np.sin(roll) * v[:, 0]

    yaw = np.arctan2(points[:, 454, 2] - points[:, 234, 2], points[:, 454, 0] - points[:, 234, 0])
    pitch = np.arctan2(points[:, 152, 2] - points[:, 10, 2], points[:, 152, 1] - points[:, 10, 1])
    lips, corners = flat[:, [13, 14]].mean(1), flat[:, [61, 291]].mean(1)
    brow = (down(flat[:, 159] - flat[:, 105]) + down(flat[:, 386] - flat[:, 334])) / 2
    return np.stack([distance(points, 13, 14) / face, distance(points, 61, 291) / face,
                     distance(points, 159, 145) / distance(points, 33, 133),
                     distance(points, 386, 374) / distance(points, 362, 263), yaw, pitch, roll,
                     brow / face, -down(corners - lips) / face, distance(points, 107, 336) / face], axis=1)


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


def read_clip(path, mesh_class):
    """Track the mesh through a clip -> points (F, 468, 3) in pixels, nan where no face; size of the clip."""
    import av
    points = []
    mesh = mesh_class(max_num_faces=1, min_detection_confidence=0.4)
    with mesh, av.open(f"file:{path}") as container:
        for frame in container.decode(video=0):
            image = frame.to_ndarray(format="rgb24")
            faces = mesh.process(image).multi_face_landmarks
            points.append([(p.x, p.y, p.z) for p in faces[0].landmark[:468]] if faces
                          else np.full((468, 3), np.nan))
    return np.array(points) * image.shape[0], image.shape[0]


def label(folder, mesh_class):
    """Write landmarks/*.npz for each clip of a prepared folder that lacks it. Raises InputError."""
    records = read_lines(os.path.join(folder, "manifest.jsonl"))
    os.makedirs(os.path.join(folder, "landmarks"), exist_ok=True)
    for number, record in enumerate(records, 1):
        path = os.path.join(folder, landmark_file(record["file"]))
        if not os.path.exists(path):
            points, size = read_clip(os.path.join(folder, record["file"]), mesh_class)
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, factors=read_factors(points).astype(np.float32),
                         ellipses=ellipses(points, size).astype(np.float32))
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
    args = parser.parse_args(argv)
    try:
        from mediapipe.python.solutions.face_mesh import FaceMesh
    except ImportError as error:
        raise InputError(f"needs mediapipe==0.10.21 ({error}); see requirements-measure.txt") from None
    for folder in args.data:
        if not os.path.isfile(os.path.join(folder, "manifest.jsonl")):
            raise InputError(f"{folder} holds no manifest.jsonl; make it with data.py prepare")
    for folder in args.data:
        label(folder, FaceMesh)


if __name__ == "__main__":
    sys.exit(main())
