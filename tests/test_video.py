"""media/video.py: frames keep their time, written files play and are whole or absent."""
import fcntl
import io
import math
import os
import struct
import threading
import time
from contextlib import nullcontext
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from test_image import BLUE, ORANGE, colour, read_video, refused
from test_sound import check_sine, sine

from media.sound import has_audio, load_audio
from media.video import VideoWriter


def save_video(path, ticks, rate=1000, shape=(64, 64), paint=None, colorspace=1):
    """An mp4 whose frame k is shown from ticks[k] / rate seconds on and is a grey of 3 k + 20."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "4", "bf": "0"})
        stream.height, stream.width = shape
        stream.time_base = stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.colorspace = colorspace
        for k, tick in enumerate(ticks):
            array = np.full((*shape, 3), 3 * k + 20, np.uint8) if paint is None else paint(k)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=colorspace)
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def shown(path, size=32):
    """Which source frame (see save_video) each frame of read_video is."""
    return [round((((frame.mean().item() + 1) * 127.5) - 20) / 3) for frame in read_video(path, size)]


def test_video_without_sound_is_refused_as_sound(tmp_path):
    save_video(tmp_path / "mute.mp4", [0, 1, 2])
    assert not has_audio(tmp_path / "mute.mp4")
    refused(lambda: load_audio(tmp_path / "mute.mp4"), "mute.mp4", "no sound")


def test_twenty_five_stays_frame_by_frame(tmp_path):
    save_video(tmp_path / "a.mp4", range(0, 50), rate=25)
    assert shown(tmp_path / "a.mp4") == list(range(50))
    save_video(tmp_path / "b.mp4", range(1000, 3000, 40))        # starts late, in milliseconds
    assert shown(tmp_path / "b.mp4") == list(range(50))


def test_thirty_and_variable_rates_keep_their_speed(tmp_path):
    save_video(tmp_path / "a.mp4", range(0, 60), rate=30)        # 2 s
    got = shown(tmp_path / "a.mp4")
    assert len(got) == 50
    assert all(abs(frame / 30 - k / 25) <= 1 / 60 + 1e-6 for k, frame in enumerate(got))
    ticks = [0, 40, 80, 400, 440, 900, 940]                      # a pause after 80 ms and after 440 ms
    save_video(tmp_path / "b.mp4", ticks)
    got = shown(tmp_path / "b.mp4")
    assert len(got) in (24, 25)                                  # 980 ms
    for k, frame in enumerate(got):
        assert abs(ticks[frame] - 40 * k) == min(abs(tick - 40 * k) for tick in ticks)


@pytest.mark.parametrize("colorspace", [1, 5])
def test_colours_of_either_matrix(tmp_path, colorspace):
    orange = np.full((64, 64, 3), ORANGE, np.uint8)
    save_video(tmp_path / "a.mp4", [0, 1], rate=25, paint=lambda k: orange, colorspace=colorspace)
    assert colour(next(read_video(tmp_path / "a.mp4", 32)), ORANGE) <= 4


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_phone_rotation_is_undone(tmp_path, turns):
    """The matrix of the track header says how a player must turn; the picture comes out as it shows it."""
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32], upright[:32, 32:], upright[32:, :32] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    stored = np.ascontiguousarray(np.rot90(upright, turns))  # a player turns it clockwise by `turns` quarters
    save_video(tmp_path / "a.mp4", [0, 1], rate=25, paint=lambda k: stored)
    file = bytearray((tmp_path / "a.mp4").read_bytes())
    place = file.index(b"tkhd") + 4 + 40
    a, b = {1: (0, 1), 2: (-1, 0), 3: (0, -1)}[turns]            # clockwise: cos, sin
    file[place:place + 36] = struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(file)
    x = next(read_video(tmp_path / "a.mp4", 64))
    assert colour(x, (200, 40, 40), 0.2, 0.2) < 8 and colour(x, (40, 200, 40), 0.2, 0.8) < 8
    assert colour(x, (40, 40, 200), 0.8, 0.2) < 8


def test_bad_videos_are_refused(tmp_path):
    save_video(tmp_path / "a.mp4", range(50), rate=25)
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp4").write_bytes(b"no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    soundfile.write(tmp_path / "a.wav", sine(16000, 1, 1), 16000)
    for name, word in [("cut.mp4", "not a sound or video"), ("text.mp4", "not a sound or video"),
                       ("empty.mp4", "empty"), ("a.wav", "no picture"), ("no.mp4", "does not exist")]:
        refused(lambda name=name: next(read_video(tmp_path / name, 32)), name, word)
    refused(lambda: next(read_video(tmp_path, 32)), "folder")
    save_video(tmp_path / "jump.mp4", [0, 40, 10**7])
    refused(lambda: list(read_video(tmp_path / "jump.mp4", 32)), "jump.mp4", "jumps")


# ---------------------------------------------------------------------------------------------------- writing
def picture(k, size=64):
    frame = np.full((size, size, 3), ORANGE, np.uint8)
    frame[:, size // 2:] = BLUE
    return frame


def write(path, frames, sound=None, size=64, paint=picture):
    with VideoWriter(path, size, sound=sound) as video:
        for k in range(frames):
            video.write(paint(k))


@pytest.mark.parametrize("width, height", [(96, 64), (64, 150), (600, 450)])
def test_a_picture_need_not_be_square(tmp_path, width, height):
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 3], frame[height // 2:] = ORANGE, BLUE
    with VideoWriter(tmp_path / "o.mp4", (width, height)) as video:
        for _ in range(3):
            video.write(frame)
    with av.open(str(tmp_path / "o.mp4")) as container:
        shown = [x.to_ndarray(format="rgb24", src_colorspace="ITU709") for x in container.decode(video=0)]
    assert len(shown) == 3 and shown[0].shape == frame.shape
    assert np.abs(shown[2].astype(int) - frame).mean() < 3
    with pytest.raises(ValueError, match="even"):
        VideoWriter(tmp_path / "p.mp4", (width, height + 1))


@pytest.mark.parametrize("rate, channels", [(8000, 1), (44100, 2), (48000, 6), (96000, 2), (22050, 1)])
def test_written_video_is_what_browsers_play(tmp_path, rate, channels):
    soundfile.write(tmp_path / "a.wav", sine(rate, 2.0, channels), rate)
    path = tmp_path / "out with space.mp4"
    write(path, 50, tmp_path / "a.wav")
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert audio.codec_context.name == "aac"
        assert video.average_rate == 25 and video.frames == 50 and video.duration * video.time_base == 2
        assert abs(audio.duration * audio.time_base - 2) <= 0.04
        assert 16000 <= audio.rate <= 48000 and audio.codec_context.channels == (2 if channels == 2 else 1)
        assert "AI-generated" in container.metadata["comment"] and "SeMo" in container.metadata["comment"]
        frame = next(container.decode(video))
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    frames = list(read_video(path, 64))
    assert len(frames) == 50
    assert colour(frames[30], ORANGE, column=0.25) <= 4 and colour(frames[30], BLUE, column=0.75) <= 4
    check_sine(load_audio(path)[:31000], 31000 / 16000)
    assert sorted(os.listdir(tmp_path)) == ["a.wav", path.name]


@pytest.mark.parametrize("size, sound", [((144, 128), True), ((262, 262), False), ((272, 96), True)])
def test_the_same_frames_and_sound_are_the_same_bytes(tmp_path, size, sound):
    """Also where the encoder works with memory that other pictures have left."""
    y, x = np.mgrid[:size[1], :size[0]]
    pictures = [np.stack([np.sin((x + 3 * k) / 17), np.cos((y - k) / 11), np.sin((x + y + 5 * k) / 23)], -1)
                for k in range(40)]
    pictures = [(128 + 100 * picture).astype(np.uint8) for picture in pictures]
    wave, written = torch.from_numpy(sine(16000, 1.6, 1)[:, 0]) if sound else None, set()
    for seed in range(3):
        left = [np.random.default_rng(seed).integers(0, 255, 10_000 * n, dtype=np.uint8) for n in range(20)]
        del left
        with VideoWriter(tmp_path / "x.mp4", size, wave) as video:
            for picture in pictures:
                video.write(picture)
        written.add((tmp_path / "x.mp4").read_bytes())
    assert len(written) == 1


def test_sound_is_cut_or_followed_by_silence(tmp_path):
    for seconds in (0.1, 5.0):
        write(tmp_path / "a.mp4", 50, torch.from_numpy(sine(16000, seconds, 1)[:, 0]))
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert abs(container.streams.audio[0].duration * container.streams.audio[0].time_base - 2) <= 0.04
        wave = load_audio(tmp_path / "a.mp4")
        loud = wave.unfold(0, 1600, 1600).abs().amax(1) > 0.2
        assert loud.sum() == (1 if seconds < 1 else 20)


def test_too_loud_float_sound_is_turned_down_not_clipped(tmp_path):
    soundfile.write(tmp_path / "a.wav", 6 * sine(16000, 1, 1), 16000, subtype="FLOAT")     # peak 3
    write(tmp_path / "a.mp4", 25, tmp_path / "a.wav")
    wave = load_audio(tmp_path / "a.mp4")[2000:14000]
    assert abs(wave.square().mean().sqrt() - 1 / math.sqrt(2)) < 0.04   # a sine of peak 1 (libav's AAC: 0.95)


def test_speech_in_one_of_six_channels_keeps_its_loudness(tmp_path):
    samples = np.zeros((16000, 6), np.float32)
    samples[:, 2] = sine(16000, 1, 1)[:, 0]
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    write(tmp_path / "a.mp4", 25, tmp_path / "a.wav")
    assert abs(load_audio(tmp_path / "a.mp4")[2000:14000].abs().max() - 0.5) < 0.03


@pytest.mark.parametrize("live", [False, True])
def test_flash_and_click_stay_together(tmp_path, live):
    """White frames and clicks at the same times are within a frame of each other after a round trip."""
    times, rate = [10, 37, 61], 44100
    sound = np.zeros((rate * 3, 2), np.float32)
    for k in times:
        sound[k * rate // 25: k * rate // 25 + 400] = 0.9
    soundfile.write(tmp_path / "a.wav", sound, rate)
    flash = {True: np.full((64, 64, 3), 250, np.uint8), False: np.full((64, 64, 3), 5, np.uint8)}
    with open(tmp_path / "a.mp4", "wb") if live else nullcontext(tmp_path / "a.mp4") as out:
        write(out, 75, tmp_path / "a.wav", paint=lambda k: flash[k in times])
    bright = [k for k, frame in enumerate(read_video(tmp_path / "a.mp4", 32)) if frame.mean() > 0]
    wave = load_audio(tmp_path / "a.mp4").abs()
    onsets = [k for k in range(1, len(wave)) if wave[k] > 0.3 and wave[max(0, k - 3000):k].max() <= 0.3]
    assert bright == times
    assert [onset / 640 for onset in onsets] == pytest.approx(times, abs=0.15)


# -------------------------------------------------------------------------------------------------- streaming
def decoded(data):
    """An mp4's bytes -> its frames' times, its sound (S,)."""
    with av.open(io.BytesIO(data)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    with av.open(io.BytesIO(data)) as container:
        return times, np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def test_a_stream_is_whole_and_leaves_as_it_is_made():
    """Fragments: frames can be decoded from what has left so far; nothing leaves before the first frame."""
    out, left = io.BytesIO(), []
    wave = torch.from_numpy(sine(16000, 4.0, 1)[:, 0])
    with VideoWriter(out, 64, sound=iter(wave.split(900))) as video:
        assert out.getvalue() == b""
        for k in range(100):
            video.write(picture(k))
            left.append(len(out.getvalue()))
    data = out.getvalue()
    times, sound = decoded(data)
    assert times == pytest.approx([k / 25 for k in range(100)])
    assert len(sound) == pytest.approx(64000, abs=1024)
    check_sine(torch.from_numpy(sound[1024:60000]), 58976 / 16000)
    assert all(len(decoded(data[:left[k]])[0]) >= k - 2 for k in (5, 16, 40, 99))
    with av.open(io.BytesIO(data)) as container:
        keys = [round(25 * float(p.pts * p.time_base)) for p in container.demux(video=0) if p.is_keyframe]
        assert keys == [0, 25, 50, 75] and "AI-generated" in container.metadata["comment"]


def test_sound_that_comes_in_pieces_is_the_sound(tmp_path):
    """An iterator is read no further than the frames have come; the file is as if made of the whole."""
    wave, taken = torch.from_numpy(sine(16000, 2.0, 1)[:, 0]), []
    chunks = (taken.append(1) or chunk for chunk in wave.split(320))
    with VideoWriter(tmp_path / "a.mp4", 64, sound=chunks) as video:
        for k in range(50):
            video.write(picture(k))
            assert len(taken) == 2 * (k + 1)
    write(tmp_path / "b.mp4", 50, wave)
    assert torch.equal(load_audio(tmp_path / "a.mp4"), load_audio(tmp_path / "b.mp4"))


class Closed(io.BytesIO):
    """Takes some writes, then fails."""

    def __init__(self, error):
        super().__init__()
        self.error, self.left = error, 5

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(data[:100])                         # a part, as a raw pipe may


def test_a_reader_that_goes_away_and_a_full_disk():
    with pytest.raises(BrokenPipeError):
        write(Closed(BrokenPipeError(32, "Broken pipe")), 20)
    refused(lambda: write(Closed(OSError(28, "No space left on device")), 20), "No space left")


# ---------------------------------------------------------------------------------------- what is left behind
def test_a_slow_reader_gets_every_byte():
    """Of a pipe that holds a page; writing waits for it."""
    pictures = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3), dtype=np.uint8)
    whole, got, (source, target) = io.BytesIO(), [], os.pipe()
    fcntl.fcntl(target, fcntl.F_SETPIPE_SZ, 4096)

    def read():
        while piece := os.read(source, 1000):
            got.append(piece)
            time.sleep(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    with open(target, "wb", buffering=0) as pipe:
        for file in (whole, pipe):
            with VideoWriter(file, 64) as video:
                for picture in pictures:
                    video.write(picture)
    reader.join()
    assert b"".join(got) == whole.getvalue() and len(got) > 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted_writing_leaves_nothing(tmp_path, error):
    def fail(k):
        if k == 7:
            raise error
        return picture(k)

    with pytest.raises(error):
        write(tmp_path / "a.mp4", 20, paint=fail)
    assert os.listdir(tmp_path) == []
    (tmp_path / "a.mp4").write_bytes(b"older")
    with pytest.raises(error):
        write(tmp_path / "a.mp4", 20, paint=fail)
    assert (tmp_path / "a.mp4").read_bytes() == b"older" and len(os.listdir(tmp_path)) == 1


def test_failure_while_finishing_leaves_nothing(tmp_path, monkeypatch):
    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(lambda: write(tmp_path / "a.mp4", 5), "a.mp4", "No space left")
    assert os.listdir(tmp_path) == []


def test_bad_sound_for_the_writer_leaves_nothing(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    refused(lambda: write(tmp_path / "a.mp4", 5, tmp_path / "bad.wav"), "bad.wav")
    assert os.listdir(tmp_path) == ["bad.wav"]


def test_outputs_that_cannot_be_are_refused_before_work(tmp_path):
    for path, word in [(tmp_path / "no" / "a.mp4", "no folder"), (tmp_path / "a.gif", ".mp4"),
                       (tmp_path, ".mp4")]:
        refused(lambda path=path: write(path, 0), str(path), word)
    (tmp_path / "d.mp4").mkdir()
    refused(lambda: write(tmp_path / "d.mp4", 0), "d.mp4", "folder")
    if os.geteuid() != 0:                                        # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(lambda: write(tmp_path / "locked" / "a.mp4", 0), "cannot be written")
