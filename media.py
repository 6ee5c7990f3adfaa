"""Files in and out: photos, sound and video as people have them, and the mp4 that comes back.

    photo --load_image--> (3, size, size) in [-1, 1]
    sound --pcm--> blocks at the file's own rate --resample--> 16 kHz mono: audio_chunks (streamed), load_audio (whole)
    video --read_video--> (3, size, size) in [-1, 1] at 25 fps, by timestamp
    raw PCM on a pipe --pcm_chunks--> (S,) pieces as they arrive
    frames + sound --VideoWriter--> H.264 + AAC mp4: a file, complete or absent, or a stream of fragments

Frames and sound of one file share time zero: its first picture. Whatever is wrong with a user's file ends in
InputError: one sentence that names the file, what is wrong and what would be right.
"""
import io
import os
import sys
import warnings
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from itertools import chain
from types import SimpleNamespace

import av
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

FPS = 25
SAMPLE_RATE = 16000
MIN_SIDE = 16              # pixels; below this a picture holds no face
MAX_PIXELS = 128_000_000   # a 108-megapixel phone passes; a header that claims more is refused before decoding
MAX_GAP = 60.0             # seconds without a frame; a longer jump of timestamps is damage, not a pause
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
# Containers that libav may open. Playlists (which name other files), pictures and text are not among them.
MEDIA_FORMATS = ("wav,w64,aiff,caf,au,flac,ogg,mp3,aac,ac3,eac3,amr,wv,ape,tta,mov,mp4,m4a,3gp,matroska,webm,avi,asf,"
                 "flv,mpeg,mpegts,mxf,gif")
SOUND_WANTED = "a wav, flac, ogg, mp3 or m4a file, or a video with sound"
VIDEO_WANTED = "a video file such as mp4, mov, webm or mkv"
IMAGE_WANTED = "a jpg, png or webp picture"
LAYOUTS = {1: "mono", 2: "stereo"}
BACKDROP = (128, 128, 128)  # what shows through a transparent picture
PROVENANCE = "AI-generated video: made by SeMo from one photo; not a recording of a real event."


class InputError(Exception):
    """Something is wrong with what the user gave; the message is the one sentence to print."""


def check_file(path, wanted):
    """Refuse what is not a readable, non-empty regular file; `wanted` ends the sentence."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give {wanted}")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; give {wanted}")
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file; give {wanted}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; change its permissions or give {wanted}")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty (0 bytes); give {wanted}")


# ----------------------------------------------------------------------------------------------------------- pictures
def square_box(width, height, aspect=1.0):
    """The square to keep, (left, top, right, bottom) in pixels: the middle of a wide picture, the upper part of a tall
    one (a tenth of what is cut lies above, the rest below: heads sit there). aspect: a pixel's width by its height."""
    side = min(width * aspect, height)
    left, top = (width - side / aspect) / 2, (height - side) / 10
    return left, top, left + side / aspect, top + side


def to_tensor(image, size, aspect=1.0):
    """RGB picture -> (3, size, size) float in [-1, 1]: cropped to a square, scaled by Lanczos with anti-aliasing."""
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=square_box(*image.size, aspect))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1      # (3, H, W)


def to_rgb(image):
    """Any PIL mode -> RGB: wide numbers scaled to 8 bits, colour profiles applied, transparency over BACKDROP."""
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if image.mode.startswith("I;") or grey.max() > 255:       # "I" holds 16-bit grey, or 8 bits in wide cells
            grey = grey / 257
        elif image.mode == "F" and grey.max() <= 1:
            grey = grey * 255
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKDROP + (255,)), image).convert("RGB")
    if image.info.get("icc_profile") and image.mode in ("RGB", "CMYK"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass                                                  # a broken profile: the plain conversion will do
    return image.convert("RGB")


def open_image(path, least=None):
    """A picture file -> PIL picture, upright, opaque, RGB. Raises InputError. least: a jpeg larger than that is decoded at a half,
    a quarter or an eighth of its size."""
    check_file(path, IMAGE_WANTED)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                       # Pillow warns of what MAX_PIXELS decides here
            Image.init()
            image = Image.open(path, formats=[kind for kind in IMAGE_FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError:
        raise InputError(f"{path} claims more than {MAX_PIXELS // 10**6} megapixels; give a smaller picture") from None
    except Exception:                                             # each of Pillow's readers fails in its own way
        raise InputError(f"{path} is not a picture that can be read; give {IMAGE_WANTED}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{path} is {width}x{height}, above {MAX_PIXELS // 10**6} megapixels; give a smaller picture")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{path} is {width}x{height} pixels; give a picture of at least {MIN_SIDE}x{MIN_SIDE}")
    with image:
        try:
            if least:
                image.draft("RGB", (least, least))
            image.load()
            try:
                image = ImageOps.exif_transpose(image)
            except Exception:                                     # damaged EXIF says nothing about which way is up
                pass
            return to_rgb(image)
        except Exception:
            raise InputError(f"{path} is a damaged or cut-off picture; copy it again or give another") from None


def load_image(path, size):
    """A picture file -> (3, size, size) float in [-1, 1]: upright, opaque, square (square_box). Raises InputError."""
    return to_tensor(open_image(path, 2 * size), size)


# -------------------------------------------------------------------------------------------------------------- sound
@contextmanager
def open_media(path, wanted):
    """libav on a local file; nothing but MEDIA_FORMATS in files may be opened by it. Raises InputError."""
    check_file(path, wanted)
    try:
        options = {"format_whitelist": MEDIA_FORMATS, "protocol_whitelist": "file"}
        container = av.open("file:" + os.fspath(path), container_options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError):
        raise InputError(f"{path} is not a sound or video that can be read; give {wanted}") from None
    with container:
        yield container


def picture_stream(container):
    """The first real video stream, or None; the cover picture of a song is no video."""
    covers = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & covers), None)


def decode(container, stream):
    """Frames of a stream in order. What is damaged is skipped; check_whole tells how much was lost."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                continue
    except (av.FFmpegError, OSError):                             # the file breaks off here
        return


def check_whole(path, container, stream, seconds):
    """Refuse a file of which clearly less than its header promises could be read."""
    name, promised = container.format.name, float((stream.duration or 0) * stream.time_base)
    if name == "wav":                                             # libav looks at the file's size, not at its header
        with open(path, "rb") as file:
            head = file.read(8)
        size = int.from_bytes(head[4:], "little") if head[:4] == b"RIFF" else 0
        promised *= size / os.path.getsize(path) if size < 0x7FFF0000 else 0    # endless streams write such numbers
    if name.startswith(("wav", "flac", "mov")) and seconds < 0.9 * promised - 0.1:
        raise InputError(f"{path} is cut off: only {seconds:.1f} s of {promised:.1f} s can be read; copy it again")


def has_audio(path):
    """Whether a sound or video file holds any sound."""
    with open_media(path, VIDEO_WANTED) as container:
        return len(container.streams.audio) > 0


def to_float(frame):
    """A decoded frame in any sample format -> (channels, n) float32; full scale is 1."""
    x = frame.to_ndarray()
    if not frame.format.is_planar:
        x = x.reshape(-1, frame.layout.nb_channels).T                                       # (C, n)
    if x.dtype.kind in "iu":
        x = (x - 128.0 * (x.dtype.kind == "u")) / 2.0 ** (8 * x.itemsize - 1)               # 8-bit sound is unsigned
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def pcm(path):
    """Sound of a file, in blocks: yields ((channels, n) float32, rate). Raises InputError, at the end at the latest.

    In a video, silence fills what its timestamps leave open, so that sample 0 belongs to the first picture.
    """
    with open_media(path, SOUND_WANTED) as container:
        if not container.streams.audio:
            raise InputError(f"{path} has no sound; give {SOUND_WANTED}")
        stream, picture = container.streams.audio[0], picture_stream(container)
        zero = picture.start_time * picture.time_base if picture and picture.start_time is not None else None
        given, drop, seconds = 0, None, 0.0                       # samples yielded; those before time zero, to drop
        for frame in decode(container, stream):
            x, rate = to_float(frame), frame.sample_rate
            if not np.isfinite(x).all():
                raise InputError(f"{path} holds NaN or infinite samples; export it again as 16-bit wav")
            late = 0 if zero is None or frame.time is None else round((frame.time - float(zero)) * rate) - given
            drop = max(0, -late) if drop is None else drop
            if 0 < late < MAX_GAP * rate and (given == 0 or late > 0.1 * rate):   # less is jitter of the timestamps
                yield np.zeros((len(x), late), np.float32), rate
                given += late
            cut = min(drop, x.shape[1])
            drop, given, seconds = drop - cut, given + x.shape[1] - cut, seconds + x.shape[1] / rate
            if cut < x.shape[1]:
                yield x[:, cut:], rate
        check_whole(path, container, stream, seconds)
        if given == 0:
            raise InputError(f"{path} holds no sound that can be decoded; give {SOUND_WANTED}")


def resample(blocks, rate, channels):
    """Blocks of ((C, n), their rate) -> tensors (m, channels) at `rate`; other channel counts become their mean."""
    source, resampler = None, None
    for x, new in chain(blocks, [(None, None)]):
        frames = []
        if resampler and new != source:                           # at the end, or where a chained file changes its rate
            frames += resampler.resample(None)
        if new != source:
            source, resampler = new, av.AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=rate)
        if x is not None:
            x = x if len(x) == channels else np.repeat(x.mean(0, keepdims=True), channels, 0)           # (channels, n)
            frames += resampler.resample(sound_frame(x, new))
        yield from (torch.from_numpy(frame.to_ndarray().T.copy()) for frame in frames)                  # (m, channels)


def sound_frame(x, rate, pts=None):
    """(1 or 2, n) float32 -> libav's frame."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x), format="fltp", layout=LAYOUTS[len(x)])
    frame.sample_rate, frame.pts, frame.time_base = rate, pts, Fraction(1, rate)
    return frame


def rechunk(blocks, n):
    """Iterable of tensors (any, ...) -> iterator of (n, ...), cut and joined in order; the last is shorter."""
    held = None
    for block in blocks:
        held = block if held is None else torch.cat([held, block])
        while len(held) >= n:
            yield held[:n]
            held = held[n:]
    if held is not None and len(held):
        yield held


def audio_chunks(path, seconds=1.0):
    """Sound of a file as (S,) float32 pieces of `seconds` (the last is shorter), 16 kHz mono; memory does not grow."""
    for chunk in rechunk(resample(pcm(path), SAMPLE_RATE, 1), round(seconds * SAMPLE_RATE)):
        yield chunk[:, 0].clone()                                                                       # (S,)


def pcm_chunks(pipe, name="stdin"):
    """Raw sound, 16-bit little-endian mono at 16 kHz, as it arrives on an open binary file -> (S,) float32 pieces of any
    size; a read waits for no more than there is. Raises InputError, at the end of the sound, for half a sample or under 0.1 s."""
    wanted, given, half = "signed 16-bit little-endian PCM, mono, 16 kHz, 0.1 s or more", 0, b""
    while data := pipe.read1(SAMPLE_RATE):                                                  # 0.5 s at most
        given, data = given + len(data), half + data
        whole = len(data) // 2 * 2
        half = data[whole:]
        if whole:
            yield torch.from_numpy(np.frombuffer(data[:whole], "<i2").astype(np.float32) / 2**15)       # (S,)
    if given == 0:
        raise InputError(f"{name} is empty (0 bytes); give {wanted}")
    if half:
        raise InputError(f"{name} ends within a sample, after {given} bytes; give {wanted}")
    if given < 0.1 * SAMPLE_RATE * 2:
        raise InputError(f"{name} holds only {given / SAMPLE_RATE / 2:.2f} s of sound; give {wanted}")


def load_audio(path):
    """A whole sound file -> (S,) float32, 16 kHz mono (the mean of the channels, not levelled). Raises InputError."""
    return torch.cat(list(audio_chunks(path)))


def measure(path):
    """One pass over a sound file, nothing kept -> rate, channels, gain. Raises InputError for what is unusable.

    gain: what the written sound is multiplied by. Peaks above full scale are brought down to it; the mean of more than
    two channels is brought up to the peak of the loudest of them.
    """
    rate, channels, peak, mixed = 0, 0, 1e-9, 1e-9
    for x, here in pcm(path):
        rate, channels = rate or here, channels or len(x)
        peak, mixed = max(peak, float(np.abs(x).max())), max(mixed, float(np.abs(x.mean(0)).max()))
    return rate, channels, min(1.0, peak) / (mixed if channels > 2 else peak)


# -------------------------------------------------------------------------------------------------------------- video
def upright(frame, aspect):
    """A decoded frame -> (PIL image, a pixel's width by its height): colours to RGB, turned as its metadata says.

    Of an interlaced frame every other line is kept: both fields in one picture would show a moving mouth twice.
    """
    guess = "ITU709" if frame.colorspace in (0, 2) and frame.height >= 720 else None   # untagged HD is BT.709
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=guess)
    if frame.interlaced_frame:
        pixels, aspect = np.ascontiguousarray(pixels[::2]), aspect / 2
    image, turns = Image.fromarray(pixels), round(frame.rotation / 90) % 4
    if turns:
        image = image.transpose(getattr(Image.Transpose, f"ROTATE_{90 * turns}"))
    return image, 1 / aspect if turns % 2 else aspect


def read_frames(path):
    """Pictures of a video as upright() gives them, 25 a second: (image, aspect). Raises InputError.

    At each 1/25 s the frame nearest in time, so that 30 fps and variable rates keep their speed.
    """
    with open_media(path, VIDEO_WANTED) as container:
        stream = picture_stream(container)
        if stream is None:
            raise InputError(f"{path} has no picture; give {VIDEO_WANTED}")
        if not MIN_SIDE <= min(stream.width, stream.height) <= max(stream.width, stream.height) <= 8192:
            raise InputError(f"{path} is {stream.width}x{stream.height}; give a video of {MIN_SIDE} to 8192 pixels")
        stream.thread_type, aspect = "AUTO", float(stream.sample_aspect_ratio or 1)
        step, zero, last, shown, made = 1 / float(stream.average_rate or FPS), 0.0, 0.0, None, 0
        for frame in decode(container, stream):
            now = frame.time if frame.time is not None else last + step * (shown is not None)
            if shown is None:
                zero = now
            elif now <= last:
                continue                                          # a timestamp that stands still or runs backwards
            elif now - last > MAX_GAP:
                raise InputError(f"{path} jumps {now - last:.0f} s between two frames; convert it to mp4 again")
            while shown is not None and zero + made / FPS < (last + now) / 2:
                yield shown
                made += 1
            step = float(frame.duration * frame.time_base) if frame.duration else step
            step = step if step > 0.01 else 1 / FPS               # one tick: the writer did not know
            shown, last = upright(frame, aspect), now
        if shown is None:
            raise InputError(f"{path} holds no frame that can be decoded; give {VIDEO_WANTED}")
        end = last + min(step, 1.0) - zero
        check_whole(path, container, stream, end)
        yield from [shown] * max(made == 0, round(end * FPS) - made)


def read_video(path, size):
    """Frames of a video as (3, size, size) float in [-1, 1], 25 a second, upright and square (square_box). Raises InputError."""
    last, made = None, None
    for image, aspect in read_frames(path):
        if image is not last:                                     # slow videos show a picture more than once
            last, made = image, to_tensor(image, size, aspect)
        yield made


@contextmanager
def whole_file(path, suffix):
    """A temporary file beside `path`, moved to it at the end of `with`. After an exception it is removed and
    `path` keeps what it held. An output that cannot be written is refused before any work: InputError."""
    path = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(path))
    if not name.lower().endswith(suffix):
        raise InputError(f"{path} cannot be written: give a name that ends in {suffix}")
    if not os.path.isdir(folder):
        raise InputError(f"{path} cannot be written: there is no folder {folder}; make it first or choose another")
    if os.path.exists(path) and not (os.path.isfile(path) and os.access(path, os.W_OK)):
        raise InputError(f"{path} cannot be written: it is a folder or protected; choose another name")
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.part")
    try:
        open(temporary, "xb").close()
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}; choose another place") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class VideoWriter:
    """An mp4 (H.264 yuv420p + AAC, 25 fps), written frame by frame, complete or absent (see whole_file).

        with VideoWriter("out.mp4", size=128, sound="speech.wav") as video:
            video.write(frame)        # (size, size, 3) uint8

    path: a name, or an open binary file such as a pipe. That gets a fragmented mp4, which plays while it is made: whatever
    is coded is written and flushed before write() returns; nothing is written before the first frame.
    sound: None, a file (streamed while frames come, at its own rate up to 48 kHz, in mono or stereo), a (S,) tensor
    at 16 kHz, or an iterator of such, of which a frame's sound is taken as the frame is written. It lasts exactly as long
    as the frames: cut, or followed by silence.
    """

    def __init__(self, path, size, sound=None, comment=PROVENANCE, keyframes=250):
        """keyframes: one in so many frames is coded by itself; few are small, many can be read from anywhere at once."""
        if size % 2:
            raise ValueError(f"size {size}: yuv420p needs an even number")
        self.path, self.size, self.sound, self.comment, self.keyframes, self.frames = path, size, sound, comment, keyframes, 0

    def __enter__(self):
        with ExitStack() as stack:
            self.coded = [] if hasattr(self.path, "write") else None
            if self.coded is None:
                target = "file:" + stack.enter_context(whole_file(self.path, ".mp4"))
                options = {"movflags": "+faststart"}              # the index in front: plays while it loads
            else:                                                 # a fragment a frame, and no stream waits for the other
                target = SimpleNamespace(write=self.coded.append)
                options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": str(10**6 // FPS),
                           "flush_packets": "1", "max_interleave_delta": "1"}
            self.open_sound()
            self.container = stack.enter_context(av.open(target, "w", format="mp4", options=options))
            self.container.metadata["comment"] = self.comment
            options = {"crf": "18", "preset": "fast", "g": str(self.keyframes)}
            if self.coded is not None:
                options.update(tune="zerolatency", g=str(FPS))    # no look-ahead; who comes late waits a second at most
            self.video = self.container.add_stream("libx264", rate=FPS, options=options)
            context = self.video.codec_context
            context.width = context.height = self.size
            context.pix_fmt, context.thread_count = "yuv420p", 1  # a second thread gains nothing here
            context.color_range = context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            if self.blocks:
                self.audio = self.container.add_stream("aac", rate=self.rate, layout=LAYOUTS[self.channels])
                self.audio.codec_context.bit_rate = 96_000 * self.channels
            self.stack = stack.pop_all()
        return self

    def open_sound(self):
        """The sound as blocks of one frame's length, the last shorter: self.blocks, None where there is none."""
        self.blocks, wave = None, self.sound
        if isinstance(wave, torch.Tensor):
            wave = wave.detach().cpu().float().numpy()[None]                                            # (1, S)
            source, channels, self.gain = SAMPLE_RATE, 1, 1 / max(1.0, np.abs(wave).max(initial=0))
            blocks = [(wave, SAMPLE_RATE)]
        elif hasattr(wave, "__next__"):
            source, channels, self.gain = SAMPLE_RATE, 1, 1.0
            blocks = ((chunk.numpy()[None], SAMPLE_RATE) for chunk in wave)                             # (1, S)
        elif wave is not None:
            source, channels, self.gain = measure(wave)
            blocks = pcm(wave)
        if wave is not None:
            self.rate = max(16000, source) if source in (22050, 24000, 32000, 44100) or source <= 16000 else 48000
            self.channels = channels if channels <= 2 else 1
            self.blocks = rechunk(resample(blocks, self.rate, self.channels), self.rate // FPS)

    def write(self, frame):
        """Append one (size, size, 3) uint8 frame, array or tensor, and the sound that belongs to it."""
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG",
                                   interpolation="AREA", threads=1)
        picture.pts, picture.time_base = self.frames, Fraction(1, FPS)
        self.container.mux(self.video.encode(picture))
        if self.blocks:
            n = self.rate // FPS
            x = next(self.blocks, torch.zeros(0, self.channels)) * self.gain
            x = np.pad(x.clamp(-1, 1).numpy().T, ((0, 0), (0, n - len(x))))                             # (C, n)
            self.container.mux(self.from_zero(self.audio.encode(sound_frame(x, self.rate, self.frames * n))))
        self.frames += 1
        self.send()

    def from_zero(self, packets):
        """Fragments cannot say, as an edit list does, that what AAC begins with lies before time zero: leave it out."""
        return packets if self.coded is None else [packet for packet in packets if packet.pts >= 0]

    def send(self):
        """Hand on what is coded to an open file. Not from within libav, where a Ctrl-C would be lost."""
        if self.coded:
            data = memoryview(b"".join(self.coded))
            self.coded.clear()
            try:
                while data:                                       # without a buffer, a part may be taken
                    data = data[self.path.write(data):]
                self.path.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                raise InputError(f"the video cannot be written to its pipe: {error.strerror or error}; choose another") from None

    def __exit__(self, kind, error, trace):
        if kind is None:
            try:
                for stream in self.container.streams:
                    self.container.mux(self.from_zero(stream.encode(None)))
            except BaseException:
                self.stack.__exit__(*sys.exc_info())
                raise
        done = self.stack.__exit__(kind, error, trace)
        if kind is None:
            self.send()
        return done
