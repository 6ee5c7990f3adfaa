"""Photos and videos to videos of turned faces: more persons and more poses for stage 1.

    python -m media.turn --input DIR [DIR ...] --out VIDEOS        pictures and videos of one face each
    python data.py prepare --videos VIDEOS --out SET               then as with any other videos

A photo shows no motion, and in speech turning, nodding and moving go together. A face mesh tells the depth
of a face: every frame here is a picture, displaced as if the head had turned, nodded, tilted and moved by
amounts drawn at random; brows and corners of the mouth move a little, too (compare face profiling, Zhu et al.
2016, arXiv 1511.07212). What is hidden does not appear, so the angles stay small. Of a video some frames are
taken, each as a picture of its own. A folder below --input is a person; each file directly in it is another.
Videos that are already there are kept.

Needs requirements-measure.txt, as media/landmarks.py, and like it may run in an environment of its own.
"""
import argparse
import os
import sys

import av
import cv2
import numpy as np

from media.files import InputError, atomic_write, command, open_clip
from media.landmarks import cut, open_readers, read_mesh

PICTURES, VIDEOS = (".jpg", ".jpeg", ".png", ".webp"), (".mp4", ".mov", ".mkv", ".webm", ".avi")
SIZE = 480                             # px, of the square that is written
SIDE = 2.25                            # of it, by forehead to chin: prepare crops 1.8
FRAMES, TAKEN = 27, 4                  # of a video that is written; taken of one that is read
OVAL = (10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148,
        176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109)   # mesh points round it
BROWS, INNER, CORNERS = (70, 105, 66, 296, 334, 300), (107, 336), (61, 291)


def rotation(yaw, pitch, roll):
    """Angles in radians -> matrix (3, 3) for x right, y down, z away."""
    (cy, cp, cr), (sy, sp, sr) = (f([yaw, pitch, roll]) for f in (np.cos, np.sin))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


class Head:
    """A picture (S, S, 3) uint8 with mesh points (468, 3) in its pixels, to be seen from elsewhere."""

    def __init__(self, image, points):
        self.image, self.points, size = image, points.astype(float), len(image)
        self.face = np.linalg.norm(points[10, :2] - points[152, :2])                   # the unit of lengths
        middle = (self.points[10, :2] + self.points[152, :2]) / 2
        self.x, self.y = np.meshgrid(*[np.arange(size, dtype=np.float32)] * 2)
        # all of the head moves, the border of the picture stays
        far = np.hypot(self.x - middle[0], (self.y - middle[1]) / 1.05 + 0.08 * self.face) / self.face
        fade = np.clip((far - 0.58) / 0.32, 0, 1)
        self.head = (1 - fade**2 * (3 - 2 * fade))[..., None].astype(np.float32)
        ear = (self.points[234] + self.points[454]) / 2
        self.pivot = ear + np.array([0, 0.25, 0.1]) * self.face                       # joint of head and neck
        self.depth = self.find_depth(middle)

    def find_depth(self, middle, cells=30):
        """Depth at each pixel -> (S, S): the mean of nearby mesh points, and of rings round the face."""
        points = [self.points]
        for grow in (1.15, 1.35, 1.7):
            ring = self.points[list(OVAL)]
            ring[:, :2] = middle + grow * (ring[:, :2] - middle)
            ring[:, 2] += 0.3 * (min(grow, 1.4) - 1) * self.face
            points.append(ring)
        points, size = np.concatenate(points), len(self.image)
        axis = (np.arange(cells) + 0.5) * size / cells
        x, y = (part.reshape(-1, 1) for part in np.meshgrid(axis, axis))
        squared = ((x - points[:, 0])**2 + (y - points[:, 1])**2) / self.face**2
        weight = np.exp(-squared / (2 * 0.055**2)) + 1e-9 * np.exp(-squared / (2 * 0.3**2)) + 1e-30
        depth = (weight @ points[:, 2] / weight.sum(1)).reshape(cells, cells).astype(np.float32)
        return cv2.resize(depth, (size, size), interpolation=cv2.INTER_CUBIC)

    def turned(self, yaw=0.0, pitch=0.0, roll=0.0, move=(0.0, 0.0), grow=0.0, whole=False, local=()):
        """Angles in radians, move (x, y) in faces, grow a logarithm; whole: the background, too; local: (mesh
        point, x, y, radius) in faces, what else moves -> the picture (S, S, 3)."""
        space = np.stack([self.x, self.y, self.depth], -1) - self.pivot                # (S, S, 3)
        shift = space @ (np.exp(grow) * rotation(yaw, pitch, roll)).T - space
        shift = (shift[..., :2] + np.array(move) * self.face).astype(np.float32)
        shift *= 1 if whole else self.head
        for point, x, y, radius in local:
            squared = (self.x - self.points[point, 0])**2 + (self.y - self.points[point, 1])**2
            near = np.exp(-squared / (2 * (radius * self.face)**2))
            shift += (near[..., None] * np.array([x, y]) * self.face).astype(np.float32)
        here = there = np.stack([self.x, self.y], -1)
        for _ in range(5):                                     # where does what is seen here come from?
            there = here - cv2.remap(shift, there, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return cv2.remap(self.image, there, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def draw_motion(rng):
    """Draw the arguments of Head.turned: each motion in a part of the frames, so that none tells another."""
    def normal(deviation, limit, share):
        value = np.clip(deviation * rng.standard_normal(), -limit, limit)
        return float(value) if rng.random() < share else 0.0

    brow, frown = normal(0.022, 0.045, 0.4), normal(0.015, 0.03, 0.3)
    up, out = (normal(0.018, 0.035, 1), normal(0.015, 0.03, 1)) if rng.random() < 0.4 else (0.0, 0.0)
    local = [(point, 0, -brow, 0.06) for point in BROWS]
    for sign, inner, corner in zip((1, -1), INNER, CORNERS, strict=True):
        local += [(inner, sign * frown, 0.3 * abs(frown), 0.05), (corner, -sign * out, -up, 0.06)]
    return {"yaw": normal(0.1, 0.24, 0.8), "pitch": normal(0.09, 0.2, 0.8), "roll": normal(0.05, 0.12, 0.5),
            "move": (normal(0.025, 0.07, 0.6), normal(0.025, 0.07, 0.6)), "grow": normal(0.03, 0.08, 0.6),
            "whole": bool(rng.random() < 0.4), "local": local}


def cut_face(image, points):
    """Cut the square round the mesh points (468, 3) of a picture -> (SIZE, SIZE, 3), points in it."""
    span, middle = SIDE * np.linalg.norm(points[10, :2] - points[152, :2]), points[[10, 152], :2].mean(0)
    scale = SIZE / span
    if scale < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), 0.45 / scale)
    square, matrix = cut(image, middle, span, 0, SIZE)
    return square, (points - [*matrix[:, 2], 0]) * scale


def source_frames(path):
    """Read a picture, or frames spread over a video -> list of (H, W, 3) uint8 RGB. Raises InputError."""
    if path.lower().endswith(PICTURES):
        image = cv2.imread(path)
        if image is None:
            raise InputError(f"{path} is not a picture that can be read; remove it")
        return [cv2.cvtColor(image, cv2.COLOR_BGR2RGB)]
    with open_clip(path) as (container, stream):
        count = sum(1 for _ in container.decode(stream))
    picks = set(np.linspace(0, count - 1, TAKEN).round().astype(int).tolist())
    with open_clip(path) as (container, stream):
        return [frame.to_ndarray(format="rgb24") for number, frame in enumerate(container.decode(stream))
                if number in picks]


def turned_frames(image, find, mesh, rng):
    """A picture (H, W, 3) of a face -> FRAMES frames (SIZE, SIZE, 3), the first as it is; None: no face.
    find, mesh: media.landmarks.open_readers."""
    points = find(image)
    points = None if points is None else read_mesh(image, points, mesh)
    if points is None:
        return None
    head = Head(*cut_face(image, points))
    return [head.image, *(head.turned(**draw_motion(rng)) for _ in range(FRAMES - 1))]


def write_video(path, frames):
    """Write frames (S, S, 3) as an mp4 of 25 frames a second that is complete or absent."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path, ".mp4") as name, av.open("file:" + name, "w", format="mp4") as container:
        stream = container.add_stream("libx264", 25, width=SIZE, height=SIZE, pix_fmt="yuv420p",
                                      options={"crf": "14"})
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def list_files(folders):
    """List pictures and videos below folders -> sorted [(path, its name below --out)]. Raises InputError."""
    found = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise InputError(f"{folder} is not a folder; give folders of pictures and videos")
        for here, _, names in os.walk(folder):
            person = os.path.relpath(here, folder)
            for name in names:
                stem, ending = os.path.splitext(name)
                if ending.lower() in PICTURES + VIDEOS:
                    owner = stem if person == "." else person
                    found.append((os.path.join(here, name), os.path.join(owner, name)))
    if not found:
        raise InputError(f"{', '.join(folders)}: no picture and no video below; give folders of jpg, png, "
                         "webp, mp4, mov, mkv, webm or avi files")
    return sorted(found)


@command("media.turn")
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="DIR",
                        help="folders of pictures and videos; a folder in them is a person")
    parser.add_argument("--out", required=True, metavar="VIDEOS", help="folder to write videos to")
    parser.add_argument("--seed", type=int, default=0, help="of the motions (default: %(default)s)")
    args = parser.parse_args(argv)
    files = list_files(args.input)
    find, mesh, _, _ = open_readers()
    written = 0
    for number, (path, name) in enumerate(files):
        for taken, image in enumerate(source_frames(path)):
            rng = np.random.default_rng([args.seed, number, taken])
            video = os.path.join(args.out, f"{name}-{taken}.mp4")
            if os.path.exists(video):                           # of an earlier run
                written += 1
            elif frames := turned_frames(image, find, mesh, rng):
                write_video(video, frames)
                written += 1
        print(f"\r{number + 1} of {len(files)} files, {written} videos in {args.out}", end="", flush=True)
    print()
    if not written:
        raise InputError("no face in any of them; give pictures and videos that show one face each")


if __name__ == "__main__":
    sys.exit(main())
