"""Video: any file -> frames at 25 a second, and frames with sound -> mp4.

    video --read_frames--> PIL pictures at 25 fps, by timestamp
    frames + sound --VideoWriter--> H.264 + AAC mp4: a file, complete or absent, or a stream of fragments
"""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import torch
from PIL import Image

from media.files import (
    MAX_GAP,
    VIDEO_WANTED,
    InputError,
    atomic_write,
    check_not_truncated,
    decode_stream,
    open_media,
    picture_stream,
)
from media.image import MIN_SIDE
from media.sound import FPS, LAYOUTS, SAMPLE_RATE, decode_audio, probe_audio, rechunk, resample, sound_frame

PROVENANCE = "AI-generated video: made by SeMo from one photo; not a recording of a real event."
LARGE = 512 * 512          # pixels of a picture
BEHIND = 16                # frames that may wait for the encoder
FILE = {"movflags": "+faststart"}                             # the index in front: it plays while it loads
# a fragment a frame, and sound and picture do not wait for each other
LIVE = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": str(10**6 // FPS),
        "flush_packets": "1", "max_interleave_delta": "1"}


# ---- reading -----------------------------------------------------------------------------------------------

def to_upright_rgb(frame, aspect):
    """Turn a decoded frame whose pixels are `aspect` times as wide as high into an upright PIL picture.

    Of an interlaced frame every other line is kept: both fields in one picture show a moving mouth twice.
    """
    guess = "ITU709" if frame.colorspace in (0, 2) and frame.height >= 720 else None   # untagged HD is BT.709
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=guess)
    if frame.interlaced_frame:
        pixels, aspect = np.ascontiguousarray(pixels[::2]), aspect / 2
    image, turns = Image.fromarray(pixels), round(frame.rotation / 90) % 4
    if turns:
        image = image.transpose(getattr(Image.Transpose, f"ROTATE_{90 * turns}"))
    aspect = 1 / aspect if turns % 2 else aspect
    return image if aspect == 1 else image.resize((max(1, round(image.width * aspect)), image.height))


def read_frames(path):
    """Read a video as PIL pictures, 25 a second; the same object where one is shown again. Raises InputError.

    At each 1/25 s the frame nearest in time, so that 30 fps and variable rates keep their speed.
    """
    with open_media(path, VIDEO_WANTED) as container:
        stream = picture_stream(container)
        if stream is None:
            raise InputError(f"{path} has no picture that can be decoded; give {VIDEO_WANTED}")
        if not MIN_SIDE <= min(stream.width, stream.height) <= max(stream.width, stream.height) <= 8192:
            size = f"{stream.width}x{stream.height}"
            raise InputError(f"{path} is {size}; give a video of {MIN_SIDE} to 8192 pixels")
        stream.thread_type, aspect = "AUTO", float(stream.sample_aspect_ratio or 1)
        if not 0.1 <= aspect <= 10:
            raise InputError(f"{path} says that its pixels are {aspect:.3g} times as wide as high; "
                             "convert it to mp4 again")
        stream.codec_context.options = {"max_pixels": str(8192**2)}  # pictures may exceed the header
        step, zero, last, shown, count = 1 / float(stream.average_rate or FPS), 0.0, 0.0, None, 0
        for frame in decode_stream(container, stream):
            now = frame.time if frame.time is not None else last + step * (shown is not None)
            if shown is None:
                zero = now
            elif now <= last:
                continue                                     # a timestamp that stands still or runs backwards
            elif now - last > MAX_GAP:
                gap = f"{now - last:.0f} s"
                raise InputError(f"{path} jumps {gap} between two frames; convert it to mp4 again")
            while shown is not None and zero + count / FPS < (last + now) / 2:
                yield shown
                count += 1
            step = float(frame.duration * frame.time_base) if frame.duration else step
            step = step if step > 0.01 else 1 / FPS               # one tick: the writer did not know
            shown, last = to_upright_rgb(frame, aspect), now
        if shown is None:
            raise InputError(f"{path} holds no frame that can be decoded; give {VIDEO_WANTED}")
        end = last + min(step, 1.0) - zero
        check_not_truncated(path, container, stream, end)
        yield from [shown] * max(count == 0, round(end * FPS) - count)


# ---- writing -----------------------------------------------------------------------------------------------

class VideoWriter:
    """An mp4 (H.264 yuv420p + AAC, 25 fps), written frame by frame.

        with VideoWriter("out.mp4", size=(640, 480), sound="speech.wav") as video:
            video.write(frame)        # (480, 640, 3) uint8

    path: a name, of a file that is complete or absent (atomic_write), or an open binary file such as a pipe,
    to which fragments are written: all that is coded before write() returns, nothing before the first frame.
    size: width and height, or one number for both; even.
    sound: None, a file (streamed while frames come, at its own rate up to 48 kHz, in mono or stereo), a (S,)
    tensor at 16 kHz, or an iterator of such, of which a frame's sound is taken as the frame is written. It
    lasts exactly as long as the frames: cut, or followed by silence.
    keyframes: in a file, one in so many frames is a keyframe: few for a small file, many for quick seeking.
    """

    def __init__(self, path, size, sound=None, comment=PROVENANCE, keyframes=250):
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if self.size[0] % 2 or self.size[1] % 2:
            raise ValueError(f"size {size}: yuv420p needs even numbers")
        self.path, self.sound, self.comment, self.keyframes, self.frames = path, sound, comment, keyframes, 0
        self.live, self.coded = hasattr(path, "write"), []

    def __enter__(self):
        with ExitStack() as stack:
            if self.live:
                target = SimpleNamespace(write=self.coded.append)
            else:
                target = "file:" + stack.enter_context(atomic_write(self.path, ".mp4"))
            self.open_sound()
            options = LIVE if self.live else FILE
            self.container = stack.enter_context(av.open(target, "w", format="mp4", options=options))
            stack.push(self.finish)
            comment = self.comment.encode(errors="backslashreplace").decode()                 # odd file names
            self.container.metadata["comment"] = comment
            # large pictures: veryfast gives the same size and quality (at two less crf) in half the time
            crf, preset = ("16", "veryfast") if self.size[0] * self.size[1] > LARGE else ("18", "fast")
            options = {"crf": crf, "preset": preset, "g": str(self.keyframes)}
            if self.live:
                options |= {"tune": "zerolatency", "g": str(FPS)}     # who comes late waits a second at most
            if torch.backends.cpu.get_cpu_capability() == "AVX512":
                # in its macroblock tree the AVX-512 code of x264 (core 165) reads memory that nobody has
                # written: the same frames would be other bytes each time
                options["x264-params"] = "asm=avx2"
            self.video = self.container.add_stream("libx264", rate=FPS, options=options)
            context = self.video.codec_context
            context.width, context.height = self.size
            context.pix_fmt, context.thread_count = "yuv420p", 1  # a second thread gains nothing here
            context.color_range = context.colorspace = 1                                      # BT.709
            context.color_primaries = context.color_trc = 1
            if self.blocks:
                self.audio = self.container.add_stream("aac", rate=self.rate, layout=LAYOUTS[self.channels])
                self.audio.codec_context.bit_rate = 96_000 * self.channels
            self.stack = stack.pop_all()
        return self

    def open_sound(self):
        """Set self.blocks: blocks of sound of one frame's length, the last shorter; None without sound."""
        self.blocks, sound = None, self.sound
        if sound is None:
            return
        rate, self.channels, self.gain = SAMPLE_RATE, 1, 1.0
        if isinstance(sound, torch.Tensor):
            sound = sound.detach().cpu().float()
            self.gain, sound = 1 / max(1.0, np.abs(sound.numpy()).max(initial=0)), iter([sound])
        if hasattr(sound, "__next__"):
            blocks = ((chunk.numpy()[None], SAMPLE_RATE) for chunk in sound)                  # (1, S)
        else:
            rate, channels, self.gain = probe_audio(sound)
            blocks, self.channels = decode_audio(sound), channels if channels <= 2 else 1
        kept = rate in (22050, 24000, 32000, 44100) or rate <= 16000
        self.rate = max(16000, rate) if kept else 48000
        self.blocks = rechunk(resample(blocks, self.rate, self.channels), self.rate // FPS)

    def write(self, frame):
        """Append one (height, width, 3) uint8 frame, array or tensor, and the sound that belongs to it."""
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG",
                                   interpolation="AREA", threads=1)
        picture.pts, picture.time_base = self.frames, Fraction(1, FPS)
        self.encode(self.video, picture)
        if self.blocks:
            n = self.rate // FPS
            x = next(self.blocks, torch.zeros(0, self.channels)) * self.gain
            x = np.pad(x.clamp(-1, 1).numpy().T, ((0, 0), (0, n - len(x))))                   # (C, n)
            self.encode(self.audio, sound_frame(x, self.rate, self.frames * n))
        self.frames += 1
        self.flush()

    def encode(self, stream, frame):
        """Code a frame of a stream, or with None what its coder still holds."""
        packets = stream.encode(frame)
        if self.live:                         # AAC begins before time zero, which fragments cannot hide
            packets = [packet for packet in packets if packet.pts >= 0]
        self.container.mux(packets)

    def flush(self):
        """Write what is coded to a pipe. Not from within libav, where a Ctrl-C would be lost."""
        if not self.coded:
            return
        data = memoryview(b"".join(self.coded))
        self.coded.clear()
        try:
            while data:                                           # without a buffer, a part may be taken
                data = data[self.path.write(data):]
            self.path.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            cause = error.strerror or error
            raise InputError(f"the video cannot be written to its pipe: {cause}; choose another") from None

    def finish(self, kind, *_):
        """Code, unless there was an error, what the coders hold."""
        if kind is None:
            for stream in self.container.streams:
                self.encode(stream, None)

    def __exit__(self, *error):
        self.stack.__exit__(*error)
        if error[0] is None:
            self.flush()


def write_all(video, frames, done):
    """Write frames while the next are computed: in a thread, at most BEHIND behind; done() after each.
    To a pipe at once, so that it may wait for its reader, and a signal end that wait."""
    if not isinstance(video.path, str):
        for frame in frames:
            video.write(frame)
            done()
        return
    waiting, worker = deque(), ThreadPoolExecutor(1)
    try:
        for frame in frames:
            waiting.append(worker.submit(video.write, frame))
            if len(waiting) > BEHIND:
                waiting.popleft().result()                        # an error of the writer is raised here
                done()
        for job in waiting:
            job.result()
            done()
    finally:
        worker.shutdown(cancel_futures=True)                      # before the file is closed
