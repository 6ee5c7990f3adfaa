"""Talking photos side by side, as one animated WebP: the first picture of README.

    python -m examples.talking PHOTO [PHOTO ...] [--wav F] [--seconds S] [--ckpt F] [--out F]

Each photo, cut to the surroundings of its face, speaks by sample.py at full resolution. Every second frame is
kept, 12.5 a second, and the quality is lowered until the file is small enough.
"""
import argparse
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

import sample
from media.face import frame_photo, load_detector
from media.files import InputError, atomic_write, command
from media.image import open_image
from media.video import read_frames

HERE = Path(__file__).resolve().parent
LIMIT = 1_500_000                                                 # bytes


def around_face(path, size):
    """Open a photo, cut out the square round its face, twice as wide as the face square -> (size, size)."""
    photo = open_image(path)
    face, _ = frame_photo(photo, load_detector())
    width = min(2 * face.size, *photo.size)
    left = min(max(0, face.cx - width / 2), photo.width - width)
    top = min(max(0, face.cy - width / 2), photo.height - width)
    return photo.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + width, top + width))


def speak(photo, wav, args, folder):
    """Make the video of one photo -> every second frame of it."""
    image, video = (str(Path(folder) / name) for name in ("photo.png", "video.mp4"))
    around_face(photo, args.size).save(image)
    if sample.main(["--img", image, "--wav", wav, "--ckpt", args.ckpt, "--seed", str(args.seed),
                    "--out", video]):
        raise InputError(f"no video was made of {photo}")
    frames = list(read_frames(video))[::2]
    return [frame.resize((args.size, args.size), Image.Resampling.LANCZOS) for frame in frames]


def encode(frames):
    """Encode as WebP at the best quality that stays below LIMIT -> bytes."""
    for quality in range(80, 0, -8):
        data = io.BytesIO()
        frames[0].save(data, format="WEBP", save_all=True, append_images=frames[1:], duration=80, loop=0,
                       quality=quality, method=4)
        if len(data.getvalue()) <= LIMIT:
            return data.getvalue()
    raise InputError(f"more than {LIMIT / 1e6} MB at any quality; give fewer --seconds or a smaller --size")


@command("examples.talking")
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m examples.talking", description=__doc__.split("\n")[0])
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    parser.add_argument("--wav", default=str(HERE / "speech.wav"), help="the speech (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="so much of it (default: %(default)s)")
    parser.add_argument("--size", type=int, default=480, help="of a photo, in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another number, another take")
    parser.add_argument("--ckpt", default=sample.DEFAULT, help="weights (default: the embedded ones)")
    parser.add_argument("--out", default=str(HERE / "talking.webp"), help="default: %(default)s")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        wave, rate = soundfile.read(args.wav)
        wav = str(Path(folder) / "speech.wav")
        soundfile.write(wav, wave[: round(args.seconds * rate)], rate)
        videos = [speak(photo, wav, args, folder) for photo in args.photos]
    beside = [np.concatenate(images, axis=1) for images in zip(*videos, strict=True)]
    data = encode([Image.fromarray(pixels) for pixels in beside])
    with atomic_write(args.out) as temporary:
        Path(temporary).write_bytes(data)
    print(f"{args.out}: {len(data) / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
