"""Sound: any file or pipe -> 16 kHz mono.

    sound --decode_audio--> blocks at the file's own rate --resample--> 16 kHz mono:
        audio_chunks (streamed), load_audio (whole)
    raw PCM on a pipe --pcm_chunks, live_chunks--> (S,) pieces as they arrive

Frames and sound of one file share time zero: its first picture.
"""
from collections import deque
from fractions import Fraction
from itertools import chain, groupby

import av
import numpy as np
import torch

from media.files import (
    MAX_GAP,
    SOUND_WANTED,
    VIDEO_WANTED,
    InputError,
    check_not_truncated,
    decode_stream,
    open_media,
    picture_stream,
    sound_stream,
)

FPS = 25                                   # frames per second of every video here
SAMPLE_RATE = 16000                        # samples per second of every sound here
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
LAYOUTS = {1: "mono", 2: "stereo"}


def has_audio(path):
    """Whether a sound or video file holds any sound."""
    with open_media(path, VIDEO_WANTED) as container:
        return sound_stream(container) is not None


def samples_to_float(frame):
    """A decoded frame in any sample format -> (channels, n) float32; full scale is 1."""
    x = frame.to_ndarray()
    if not frame.format.is_planar:
        x = x.reshape(-1, frame.layout.nb_channels).T                                       # (C, n)
    if x.dtype.kind in "iu":
        x = (x - 128.0 * (x.dtype.kind == "u")) / 2.0 ** (8 * x.itemsize - 1)        # 8-bit sound is unsigned
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def decode_audio(path):
    """Yield the sound of a file in blocks: (channels, n) float32, rate. Raises InputError, maybe at the end.

    In a video, silence fills what its timestamps leave open, so that sample 0 belongs to the first picture.
    """
    with open_media(path, SOUND_WANTED) as container:
        stream, picture = sound_stream(container), picture_stream(container)
        if stream is None:
            raise InputError(f"{path} has no sound that can be decoded; give {SOUND_WANTED}")
        zero = picture.start_time * picture.time_base if picture and picture.start_time is not None else None
        given, drop, seconds = 0, None, 0.0                 # samples yielded; those before time zero, to drop
        for frame in decode_stream(container, stream):
            x, rate = samples_to_float(frame), frame.sample_rate
            if not np.isfinite(x).all():
                raise InputError(f"{path} holds NaN or infinite samples; export it again as 16-bit wav")
            late = 0                                                # samples missing before this block
            if zero is not None and frame.time is not None:
                late = round((frame.time - float(zero)) * rate) - given
            drop = max(0, -late) if drop is None else drop
            if 0 < late < MAX_GAP * rate and (given == 0 or late > 0.1 * rate):      # less: timestamps jitter
                yield np.zeros((len(x), late), np.float32), rate
                given += late
            cut = min(drop, x.shape[1])
            drop, given, seconds = drop - cut, given + x.shape[1] - cut, seconds + x.shape[1] / rate
            if cut < x.shape[1]:
                yield x[:, cut:], rate
        check_not_truncated(path, container, stream, seconds)
        if given == 0:
            raise InputError(f"{path} holds no sound that can be decoded; give {SOUND_WANTED}")


def resample(blocks, rate, channels):
    """Blocks ((C, n), their rate) -> tensors (m, channels) at `rate`; other channel counts are averaged."""
    for source, same in groupby(blocks, key=lambda block: block[1]):        # chained files change their rate
        resampler = av.AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=rate)
        for x, _ in chain(same, [(None, None)]):
            if x is not None:
                x = x if len(x) == channels else np.repeat(x.mean(0, keepdims=True), channels, 0)
                x = sound_frame(x, source)
            for frame in resampler.resample(x):                                             # None: the rest
                yield torch.from_numpy(frame.to_ndarray().T.copy())                         # (m, channels)


def sound_frame(x, rate, pts=None):
    """(1 or 2, n) float32 -> libav's frame."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x), format="fltp", layout=LAYOUTS[len(x)])
    frame.sample_rate, frame.pts, frame.time_base = rate, pts, Fraction(1, rate)
    return frame


def rechunk(blocks, n):
    """Iterable of tensors (any, ...) -> iterator of (n, ...), in order; the last is shorter."""
    held = None
    for block in blocks:
        held = block if held is None else torch.cat([held, block])
        while len(held) >= n:
            yield held[:n]
            held = held[n:]
    if held is not None and len(held):
        yield held


def audio_chunks(path, seconds=1.0):
    """Read a sound file as (S,) float32 chunks of `seconds` (the last is shorter), 16 kHz mono."""
    for chunk in rechunk(resample(decode_audio(path), SAMPLE_RATE, 1), round(seconds * SAMPLE_RATE)):
        yield chunk[:, 0].clone()                                                                       # (S,)


def pcm_chunks(pipe, name="stdin"):
    """Raw sound, 16-bit little-endian mono at 16 kHz, as it arrives on an open binary file -> (S,) float32.

    A read waits for no more than there is. Raises InputError at the end of the sound, if it is shorter than
    0.1 s or ends within a sample.
    """
    wanted, given, half = "signed 16-bit little-endian PCM, mono, 16 kHz, 0.1 s or more", 0, b""
    while data := pipe.read1(SAMPLE_RATE):                                                  # 0.5 s at most
        given, data = given + len(data), half + data
        even = len(data) // 2 * 2
        half = data[even:]
        if even:
            yield torch.from_numpy(np.frombuffer(data[:even], "<i2").astype(np.float32) / 2**15)       # (S,)
    if given == 0:
        raise InputError(f"{name} is empty (0 bytes); give {wanted}")
    if half:
        raise InputError(f"{name} ends within a sample, after {given} bytes; give {wanted}")
    if given < 0.1 * SAMPLE_RATE * 2:
        raise InputError(f"{name} holds only {given / SAMPLE_RATE / 2:.2f} s of sound; give {wanted}")


def live_chunks(pipe):
    """Read pcm_chunks for two -> iterator of chunks as they arrive, iterator of those that have arrived.
    The second ends when none waits: a frame is made, and takes its sound, after that has arrived."""
    waiting = deque()

    def listen():
        for chunk in pcm_chunks(pipe):
            waiting.append(chunk)
            yield chunk

    def follow():
        while waiting:
            yield waiting.popleft()

    return listen(), follow()


def load_audio(path):
    """A whole sound file -> (S,) float32, 16 kHz mono, the mean of the channels. Raises InputError."""
    return torch.cat(list(audio_chunks(path)))


def probe_audio(path):
    """Read through a sound file, keeping nothing -> rate, channels, gain. Raises InputError.

    gain: what the written sound is multiplied by. Peaks above full scale are brought down to it; the mean of
    more than two channels is brought up to the peak of the loudest of them.
    """
    rate, channels, peak, mixed = 0, 0, 1e-9, 1e-9
    for x, block_rate in decode_audio(path):
        rate, channels = rate or block_rate, channels or len(x)
        peak, mixed = max(peak, float(np.abs(x).max())), max(mixed, float(np.abs(x.mean(0)).max()))
    return rate, channels, min(1.0, peak) / (mixed if channels > 2 else peak)
