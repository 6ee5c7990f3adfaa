"""media.py: files as people have them come out as known values; what cannot be used is refused in a sentence."""
import io
import math
import os
import struct
import sys
import zlib
from contextlib import nullcontext
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageCms

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import media  # noqa: E402

torch.set_num_threads(1)
ORANGE, BLUE = (230, 120, 40), (30, 60, 200)


def colour(x, y, row=0.5, column=0.5):
    """How far the colour of the loaded picture x at a place is from y, in steps of 255."""
    got = ((x[:, int(row * x.shape[1]), int(column * x.shape[2])] + 1) * 127.5).round().tolist()
    return max(abs(a - b) for a, b in zip(got, y, strict=True))


def refused(action, *words):
    """The action ends in one sentence that holds the words."""
    with pytest.raises(media.InputError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


# ----------------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("name, mode, tolerance", [
    ("a.png", "RGB", 0), ("a.jpg", "RGB", 3), ("a.webp", "RGB", 4), ("a.bmp", "RGB", 0), ("a.tif", "RGB", 0),
    ("a.gif", "P", 2), ("a.png", "P", 2), ("a.jpg", "CMYK", 3), ("a.tif", "CMYK", 0), ("a.png", "RGBA", 0),
    ("a.tif", "YCbCr", 3)])
def test_colour_survives_every_mode(tmp_path, name, mode, tolerance):
    image = Image.new("RGB", (90, 70), ORANGE)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(tmp_path / name)
    x = media.load_image(tmp_path / name, 64)
    assert x.shape == (3, 64, 64) and x.dtype == torch.float32
    assert colour(x, ORANGE) <= tolerance and colour(x, ORANGE, 0, 0) <= tolerance


@pytest.mark.parametrize("mode, value, grey", [
    ("L", 77, 77), ("1", 1, 255), ("LA", (77, 255), 77), ("I;16", 77 * 257, 77), ("I", 77 * 257, 77), ("F", 77.0, 77)])
def test_grey_modes(tmp_path, mode, value, grey):
    path = tmp_path / ("a.tif" if mode in ("F", "I") else "a.png")
    Image.new(mode, (40, 40), value).save(path)
    assert colour(media.load_image(path, 32), (grey,) * 3) <= 0.5


def test_sixteen_bit_grey_keeps_its_gradient(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    got = media.load_image(tmp_path / "a.png", 64)[0, 32]
    assert (got - torch.linspace(-1, 1, 64)).abs().max() < 0.01


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_backdrop(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (64, 64), 1)
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.paste(0, (32, 0, 64, 64))
        image.save(tmp_path / "a.png", transparency=1)
        opaque = (255, 0, 0)
    else:
        image = Image.new(mode, (64, 64), (9,) * (len(mode) - 1) + (0,))
        image.paste((200,) * (len(mode) - 1) + (255,), (32, 0, 64, 64))
        image.save(tmp_path / "a.png")
        opaque = (200, 200, 200)
    x = media.load_image(tmp_path / "a.png", 64)
    assert colour(x, media.BACKDROP, column=0.1) <= 0.5 and colour(x, opaque, column=0.9) <= 0.5


def test_half_transparent_is_half_backdrop(tmp_path):
    Image.new("RGBA", (32, 32), (255, 255, 255, 128)).save(tmp_path / "a.png")
    assert colour(media.load_image(tmp_path / "a.png", 32), (192, 192, 192)) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32], upright[:32, 32:], upright[32:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,  # the inverse of a viewer's
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    image = Image.fromarray(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if undo is None else image.transpose(undo)).save(tmp_path / "a.png", exif=exif)
    x = media.load_image(tmp_path / "a.png", 64)
    assert colour(x, (255, 0, 0), 0.2, 0.2) == 0 and colour(x, (0, 255, 0), 0.2, 0.8) == 0
    assert colour(x, (0, 0, 255), 0.8, 0.2) == 0 and colour(x, (0, 0, 0), 0.8, 0.8) == 0


def test_wide_keeps_its_middle_and_tall_its_upper_part(tmp_path):
    wide = Image.new("RGB", (300, 100), BLUE)
    wide.paste(ORANGE, (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    x = media.load_image(tmp_path / "wide.png", 50)
    assert all(colour(x, ORANGE, 0.5, column) <= 1 for column in (0.1, 0.5, 0.9))
    assert media.square_box(300, 100) == (100, 0, 200, 100)
    assert media.square_box(100, 300) == (0, 20, 100, 120)
    assert media.square_box(200, 300, aspect=0.5) == (0, 20, 200, 120)    # pixels half as wide as high


def test_shrinking_averages(tmp_path):
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "a.png")
    assert media.load_image(tmp_path / "a.png", 64).abs().max() < 0.05   # nearest would give -1 and 1, and moire between


def test_colour_profile_is_applied(tmp_path):
    """A profile whose red and blue primaries are exchanged must exchange red and blue; a broken one must do nothing."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")        # the first are entries of the tag table
    profile[red:red + 4], profile[blue:blue + 4] = b"bXYZ", b"rXYZ"
    Image.new("RGB", (32, 32), ORANGE).save(tmp_path / "a.png", icc_profile=bytes(profile))
    assert colour(media.load_image(tmp_path / "a.png", 32), ORANGE[::-1]) <= 2
    Image.new("RGB", (32, 32), ORANGE).save(tmp_path / "b.png", icc_profile=b"not a profile")
    assert colour(media.load_image(tmp_path / "b.png", 32), ORANGE) == 0


def picture_bytes(kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes whose header says 60000 x 60000."""
    png = bytearray(picture_bytes())
    png[16:24] = struct.pack(">II", 60000, 60000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.mark.parametrize("name, content, words", [
    ("empty.png", b"", ("empty",)), ("text.jpg", b"hello, I am no picture", ("not a picture",)),
    ("cut.png", picture_bytes()[:2000], ("cut-off",)), ("cut.jpg", picture_bytes("JPEG")[:2000], ("cut-off",)),
    ("cut.webp", picture_bytes("WEBP")[:500], ("picture",)), ("bomb.png", bomb(), ("megapixels",)),
    ("head.png", picture_bytes()[:20], ("picture",))])
def test_bad_pictures_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(lambda: media.load_image(tmp_path / name, 32), name, *words)


def test_missing_folder_and_tiny_pictures_are_refused(tmp_path):
    refused(lambda: media.load_image(tmp_path / "no.png", 32), "no.png", "does not exist")
    refused(lambda: media.load_image(tmp_path, 32), "is a folder")
    Image.new("RGB", (300, 15)).save(tmp_path / "thin.png")
    refused(lambda: media.load_image(tmp_path / "thin.png", 32), "300x15")


# -------------------------------------------------------------------------------------------------------------- sound
def sine(rate, seconds, channels, frequency=440.0):
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)
    return np.tile(wave[:, None], (1, channels)).astype(np.float32)


def save_with_libav(path, samples, rate, codec, layout, start=0, options=None):
    """samples (S, C) to any container that libav writes, beginning at `start` seconds."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def check_sine(wave, seconds, frequency=440.0, slack=1.5e-3):
    assert wave.dtype == torch.float32 and wave.ndim == 1
    assert abs(len(wave) / 16000 - seconds) <= slack, len(wave)
    middle = wave[len(wave) // 4: 3 * len(wave) // 4]
    spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs()
    assert abs(spectrum.argmax().item() * 16000 / len(middle) - frequency) <= 16000 / len(middle)
    assert abs(middle.square().mean().sqrt().item() - 0.5 / math.sqrt(2)) < 0.01
    assert spectrum.square().sort().values[:-8].sum() < 1e-3 * spectrum.square().sum()    # a pure tone and nothing else


@pytest.mark.parametrize("name, rate, channels, subtype", [
    ("a.wav", 8000, 1, "PCM_16"), ("b.wav", 44100, 2, "PCM_24"), ("c.wav", 192000, 1, "FLOAT"),
    ("d.wav", 48000, 6, "PCM_16"), ("e.wav", 11025, 2, "PCM_U8"), ("f.wav", 96000, 2, "DOUBLE"),
    ("g.wav", 16000, 1, "PCM_32"), ("h.wav", 8000, 1, "ULAW"), ("i.flac", 96000, 2, "PCM_24"),
    ("j.flac", 48000, 6, "PCM_16"), ("k.ogg", 44100, 2, "VORBIS"), ("l.mp3", 44100, 1, None),
    ("m.aiff", 22050, 1, "PCM_16"), ("n.wav", 44100, 3, "PCM_16")])
def test_tone_from_every_format(tmp_path, name, rate, channels, subtype):
    soundfile.write(tmp_path / name, sine(rate, 1.0, channels), rate, subtype=subtype)
    check_sine(media.load_audio(tmp_path / name), 1.0, slack=0.06 if name.endswith(("mp3", "ogg")) else 1.5e-3)


@pytest.mark.parametrize("name, rate, codec, layout", [
    ("a.m4a", 44100, "aac", "stereo"), ("b.m4a", 48000, "aac", "5.1"), ("c.mp4", 16000, "aac", "mono"),
    ("d.mka", 8000, "pcm_s16le", "mono"), ("e.mov", 48000, "pcm_s24le", "stereo")])
def test_tone_from_every_container(tmp_path, name, rate, codec, layout):
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    save_with_libav(tmp_path / name, sine(rate, 1.0, channels), rate, codec, layout)
    wave = media.load_audio(tmp_path / name)
    check_sine(wave * 6 / 5 if layout == "5.1" else wave, 1.0, slack=0.07)      # AAC's bass channel carries no 440 Hz


def test_channels_are_averaged(tmp_path):
    left = sine(16000, 0.5, 1)
    soundfile.write(tmp_path / "a.wav", np.hstack([left, np.zeros_like(left)]), 16000, subtype="FLOAT")
    assert torch.allclose(media.load_audio(tmp_path / "a.wav"), torch.from_numpy(left[:, 0]) / 2, atol=1e-6)
    soundfile.write(tmp_path / "b.wav", np.hstack([left, -left]), 16000, subtype="FLOAT")
    assert media.load_audio(tmp_path / "b.wav").abs().max() < 1e-6


def test_same_rate_is_untouched_and_integers_have_the_right_scale(tmp_path):
    wave = np.array([0, 32767, -32768, 16384, -1], np.int16)
    soundfile.write(tmp_path / "a.wav", np.tile(wave, 500), 16000)
    assert torch.equal(media.load_audio(tmp_path / "a.wav")[:5], torch.from_numpy(wave / 32768).float())


def test_a_tenth_of_a_second_and_less(tmp_path):
    for samples in (1, 10, 1600):
        soundfile.write(tmp_path / "a.wav", sine(16000, 1, 1)[:samples], 16000)
        assert len(media.load_audio(tmp_path / "a.wav")) == samples
    soundfile.write(tmp_path / "a.wav", sine(44100, 0.1, 2), 44100)
    assert abs(len(media.load_audio(tmp_path / "a.wav")) - 1600) <= 1


def test_chunks_are_the_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, (50000, 2)), 44100)
    chunks = list(media.audio_chunks(tmp_path / "a.wav", 0.25))
    assert all(len(chunk) == 4000 for chunk in chunks[:-1]) and 0 < len(chunks[-1]) <= 4000
    assert torch.equal(torch.cat(chunks), media.load_audio(tmp_path / "a.wav"))


def test_pure_sound_may_start_at_any_time(tmp_path):
    save_with_libav(tmp_path / "a.mka", sine(16000, 1.0, 1), 16000, "pcm_s16le", "mono", start=5)
    check_sine(media.load_audio(tmp_path / "a.mka"), 1.0)


@pytest.mark.parametrize("lead", [0.4, -0.4])
def test_sound_of_a_video_starts_with_its_first_picture(tmp_path, lead):
    """Sound that begins `lead` after the picture is preceded by silence, or loses what comes before it."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"bf": "0"})
        video.width = video.height = 32
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        base = 1.0
        for k in range(25):
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = k + round(25 * base), Fraction(1, 25)
            container.mux(video.encode(picture))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sine(16000, 1.0, 1).T), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, round((base + lead) * 16000), Fraction(1, 16000)
        container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    wave = media.load_audio(path)
    assert abs(len(wave) / 16000 - (1 + lead)) < 0.002
    if lead > 0:
        assert wave[:6300].abs().max() == 0 and wave[6500:7000].abs().max() > 0.4


def test_bad_sounds_are_refused(tmp_path):
    def saved(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    soundfile.write(tmp_path / "good.wav", sine(16000, 1, 1), 16000)
    soundfile.write(tmp_path / "good.flac", np.random.default_rng(0).normal(0, 0.1, 160000), 16000)
    save_with_libav(tmp_path / "good.m4a", sine(16000, 4, 1), 16000, "aac", "mono")
    save_with_libav(tmp_path / "front.m4a", sine(16000, 4, 1), 16000, "aac", "mono", options={"movflags": "faststart"})
    wav, flac, m4a, front = ((tmp_path / n).read_bytes() for n in ("good.wav", "good.flac", "good.m4a", "front.m4a"))
    noise = np.random.default_rng(0).bytes(20000)
    for name, content, words in [
            ("empty.wav", b"", ("empty",)), ("text.wav", b"hello, I am no sound at all", ("not a sound",)),
            ("picture.wav", picture_bytes(), ("not a sound",)), ("noise.mp3", noise, ("sound",)),
            ("noise.wav", noise, ("sound",)), ("header.wav", wav[:44], ("sound",)),
            ("cut.wav", wav[:20000], ("cut off",)),
            ("cut.flac", flac[: len(flac) // 2], ("cut off",)), ("cut.m4a", m4a[: len(m4a) // 2], ("not a sound",)),
            ("front.m4a", front[: len(front) // 2], ("cut off",)),
            ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\ngood.wav\n#EXT-X-ENDLIST\n", ("not a sound",)),
            ("list.wav", b"ffconcat version 1.0\nfile good.wav\n", ("not a sound",))]:
        path = saved(name, content)
        refused(lambda path=path: media.load_audio(path), name, *words)
    refused(lambda: media.load_audio(tmp_path), "is a folder")
    refused(lambda: media.load_audio(tmp_path / "no.wav"), "does not exist")


def test_silence_without_length_and_nan_are_refused(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 1)), 16000)
    refused(lambda: media.load_audio(tmp_path / "none.wav"), "none.wav", "no sound")
    for bad in (np.nan, np.inf):
        wave = sine(16000, 1, 1)
        wave[777] = bad
        soundfile.write(tmp_path / "bad.wav", wave, 16000, subtype="FLOAT")
        refused(lambda: media.load_audio(tmp_path / "bad.wav"), "bad.wav", "NaN")


def test_video_without_sound_is_refused_as_sound(tmp_path):
    save_video(tmp_path / "mute.mp4", [0, 1, 2])
    assert not media.has_audio(tmp_path / "mute.mp4")
    refused(lambda: media.load_audio(tmp_path / "mute.mp4"), "mute.mp4", "no sound")


class Trickle(io.RawIOBase):
    """A pipe that gives `size` bytes a read."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def readable(self):
        return True

    def readinto(self, buffer):
        part, self.data = self.data[:self.size], self.data[self.size:]
        buffer[:len(part)] = part
        return len(part)


def pipe(data, size):
    return io.BufferedReader(Trickle(data, size), buffer_size=max(1, size))


@pytest.mark.parametrize("size", [1, 7, 640, 100000])
def test_raw_sound_comes_as_it_arrives(size):
    values = np.array([0, 1, -1, 32767, -32768, 256] * 400, "<i2")
    chunks = list(media.pcm_chunks(pipe(values.tobytes(), size)))
    assert torch.equal(torch.cat(chunks), torch.from_numpy(values.astype(np.float32) / 32768))
    assert max(map(len, chunks)) <= max(1, size // 2 + 1) and min(map(len, chunks)) > 0


def test_bad_raw_sound_is_refused():
    for data, words in [(b"", ("stdin is empty", "16-bit")), (bytes(4001), ("within a sample", "4001 bytes", "16-bit")),
                        (bytes(1600), ("0.05 s", "16 kHz")), (bytes(1), ("within a sample",))]:
        refused(lambda data=data: list(media.pcm_chunks(pipe(data, 1000))), *words)
    assert len(torch.cat(list(media.pcm_chunks(pipe(bytes(3200), 1000))))) == 1600


# -------------------------------------------------------------------------------------------------------------- video
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
    return [round((((frame.mean().item() + 1) * 127.5) - 20) / 3) for frame in media.read_video(path, size)]


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
    assert colour(next(media.read_video(tmp_path / "a.mp4", 32)), ORANGE) <= 4


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_phone_rotation_is_undone(tmp_path, turns):
    """The matrix of the track header says how a player must turn; the picture must come out as it shows it."""
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32], upright[:32, 32:], upright[32:, :32] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    stored = np.ascontiguousarray(np.rot90(upright, turns))      # a player turns it clockwise by `turns` quarters
    save_video(tmp_path / "a.mp4", [0, 1], rate=25, paint=lambda k: stored)
    file = bytearray((tmp_path / "a.mp4").read_bytes())
    place = file.index(b"tkhd") + 4 + 40
    a, b = {1: (0, 1), 2: (-1, 0), 3: (0, -1)}[turns]            # clockwise: cos, sin
    file[place:place + 36] = struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(file)
    x = next(media.read_video(tmp_path / "a.mp4", 64))
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
        refused(lambda name=name: next(media.read_video(tmp_path / name, 32)), name, word)
    refused(lambda: next(media.read_video(tmp_path, 32)), "folder")
    save_video(tmp_path / "jump.mp4", [0, 40, 10**7])
    refused(lambda: list(media.read_video(tmp_path / "jump.mp4", 32)), "jump.mp4", "jumps")


# ------------------------------------------------------------------------------------------------------------ writing
def picture(k, size=64):
    frame = np.full((size, size, 3), ORANGE, np.uint8)
    frame[:, size // 2:] = BLUE
    return frame


def write(path, frames, sound=None, size=64, paint=picture):
    with media.VideoWriter(path, size, sound=sound) as video:
        for k in range(frames):
            video.write(paint(k))


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
    frames = list(media.read_video(path, 64))
    assert len(frames) == 50
    assert colour(frames[30], ORANGE, column=0.25) <= 4 and colour(frames[30], BLUE, column=0.75) <= 4
    check_sine(media.load_audio(path)[:31000], 31000 / 16000)
    assert sorted(os.listdir(tmp_path)) == ["a.wav", path.name]


def test_sound_is_cut_or_followed_by_silence(tmp_path):
    for seconds in (0.1, 5.0):
        write(tmp_path / "a.mp4", 50, torch.from_numpy(sine(16000, seconds, 1)[:, 0]))
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert abs(container.streams.audio[0].duration * container.streams.audio[0].time_base - 2) <= 0.04
        wave = media.load_audio(tmp_path / "a.mp4")
        loud = wave.unfold(0, 1600, 1600).abs().amax(1) > 0.2
        assert loud.sum() == (1 if seconds < 1 else 20)


def test_too_loud_float_sound_is_turned_down_not_clipped(tmp_path):
    soundfile.write(tmp_path / "a.wav", 6 * sine(16000, 1, 1), 16000, subtype="FLOAT")     # peak 3
    write(tmp_path / "a.mp4", 25, tmp_path / "a.wav")
    wave = media.load_audio(tmp_path / "a.mp4")[2000:14000]
    assert abs(wave.square().mean().sqrt() - 1 / math.sqrt(2)) < 0.04   # a sine of peak 1 (libav's AAC: 0.95)


def test_speech_in_one_of_six_channels_keeps_its_loudness(tmp_path):
    samples = np.zeros((16000, 6), np.float32)
    samples[:, 2] = sine(16000, 1, 1)[:, 0]
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    write(tmp_path / "a.mp4", 25, tmp_path / "a.wav")
    assert abs(media.load_audio(tmp_path / "a.mp4")[2000:14000].abs().max() - 0.5) < 0.03


@pytest.mark.parametrize("live", [False, True])
def test_flash_and_click_stay_together(tmp_path, live):
    """White frames and clicks at the same times; both are found within a frame of each other after a round trip."""
    times, rate = [10, 37, 61], 44100
    sound = np.zeros((rate * 3, 2), np.float32)
    for k in times:
        sound[k * rate // 25: k * rate // 25 + 400] = 0.9
    soundfile.write(tmp_path / "a.wav", sound, rate)
    flash = {True: np.full((64, 64, 3), 250, np.uint8), False: np.full((64, 64, 3), 5, np.uint8)}
    with open(tmp_path / "a.mp4", "wb") if live else nullcontext(tmp_path / "a.mp4") as out:
        write(out, 75, tmp_path / "a.wav", paint=lambda k: flash[k in times])
    bright = [k for k, frame in enumerate(media.read_video(tmp_path / "a.mp4", 32)) if frame.mean() > 0]
    wave = media.load_audio(tmp_path / "a.mp4").abs()
    onsets = [k for k in range(1, len(wave)) if wave[k] > 0.3 and wave[max(0, k - 3000):k].max() <= 0.3]
    assert bright == times
    assert len(onsets) == 3 and all(abs(onset / 640 - k) < 0.15 for onset, k in zip(onsets, times, strict=True))


# ---------------------------------------------------------------------------------------------------------- streaming
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
    with media.VideoWriter(out, 64, sound=iter(wave.split(900))) as video:
        assert out.getvalue() == b""
        for k in range(100):
            video.write(picture(k))
            left.append(len(out.getvalue()))
    data = out.getvalue()
    times, sound = decoded(data)
    assert times == pytest.approx([k / 25 for k in range(100)]) and len(sound) == pytest.approx(64000, abs=1024)
    check_sine(torch.from_numpy(sound[1024:60000]), 58976 / 16000)
    assert all(len(decoded(data[:left[k]])[0]) >= k - 2 for k in (5, 16, 40, 99))
    with av.open(io.BytesIO(data)) as container:
        keys = [round(25 * float(p.pts * p.time_base)) for p in container.demux(video=0) if p.is_keyframe]
        assert keys == [0, 25, 50, 75] and "AI-generated" in container.metadata["comment"]


def test_sound_that_comes_in_pieces_is_the_sound(tmp_path):
    """An iterator is read no further than the frames have come; a file made of it is the one made of the whole."""
    wave, taken = torch.from_numpy(sine(16000, 2.0, 1)[:, 0]), []
    chunks = (taken.append(1) or chunk for chunk in wave.split(320))
    with media.VideoWriter(tmp_path / "a.mp4", 64, sound=chunks) as video:
        for k in range(50):
            video.write(picture(k))
            assert len(taken) == 2 * (k + 1)
    write(tmp_path / "b.mp4", 50, wave)
    assert torch.equal(media.load_audio(tmp_path / "a.mp4"), media.load_audio(tmp_path / "b.mp4"))


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


# ------------------------------------------------------------------------------------------------- what is left behind
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
    for path, word in [(tmp_path / "no" / "a.mp4", "no folder"), (tmp_path / "a.gif", ".mp4"), (tmp_path, ".mp4")]:
        refused(lambda path=path: write(path, 0), str(path), word)
    (tmp_path / "d.mp4").mkdir()
    refused(lambda: write(tmp_path / "d.mp4", 0), "d.mp4", "folder")
    if os.geteuid() != 0:                                        # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(lambda: write(tmp_path / "locked" / "a.mp4", 0), "cannot be written")
