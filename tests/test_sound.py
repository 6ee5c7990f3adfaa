"""media/sound.py: sound of every format comes out as known values; other files are refused in a sentence."""
import io
import math
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from test_image import picture_bytes, refused

from media.sound import audio_chunks, load_audio, pcm_chunks


# ------------------------------------------------------------------------------------------------------ sound
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
    # a pure tone and nothing else
    assert spectrum.square().sort().values[:-8].sum() < 1e-3 * spectrum.square().sum()


@pytest.mark.parametrize("name, rate, channels, subtype", [
    ("a.wav", 8000, 1, "PCM_16"), ("b.wav", 44100, 2, "PCM_24"), ("c.wav", 192000, 1, "FLOAT"),
    ("d.wav", 48000, 6, "PCM_16"), ("e.wav", 11025, 2, "PCM_U8"), ("f.wav", 96000, 2, "DOUBLE"),
    ("g.wav", 16000, 1, "PCM_32"), ("h.wav", 8000, 1, "ULAW"), ("i.flac", 96000, 2, "PCM_24"),
    ("j.flac", 48000, 6, "PCM_16"), ("k.ogg", 44100, 2, "VORBIS"), ("l.mp3", 44100, 1, None),
    ("m.aiff", 22050, 1, "PCM_16"), ("n.wav", 44100, 3, "PCM_16")])
def test_tone_from_every_format(tmp_path, name, rate, channels, subtype):
    soundfile.write(tmp_path / name, sine(rate, 1.0, channels), rate, subtype=subtype)
    check_sine(load_audio(tmp_path / name), 1.0, slack=0.06 if name.endswith(("mp3", "ogg")) else 1.5e-3)


@pytest.mark.parametrize("name, rate, codec, layout", [
    ("a.m4a", 44100, "aac", "stereo"), ("b.m4a", 48000, "aac", "5.1"), ("c.mp4", 16000, "aac", "mono"),
    ("d.mka", 8000, "pcm_s16le", "mono"), ("e.mov", 48000, "pcm_s24le", "stereo")])
def test_tone_from_every_container(tmp_path, name, rate, codec, layout):
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    save_with_libav(tmp_path / name, sine(rate, 1.0, channels), rate, codec, layout)
    wave = load_audio(tmp_path / name)
    # AAC's bass channel carries no 440 Hz
    check_sine(wave * 6 / 5 if layout == "5.1" else wave, 1.0, slack=0.07)


def test_channels_are_averaged(tmp_path):
    left = sine(16000, 0.5, 1)
    soundfile.write(tmp_path / "a.wav", np.hstack([left, np.zeros_like(left)]), 16000, subtype="FLOAT")
    assert torch.allclose(load_audio(tmp_path / "a.wav"), torch.from_numpy(left[:, 0]) / 2, atol=1e-6)
    soundfile.write(tmp_path / "b.wav", np.hstack([left, -left]), 16000, subtype="FLOAT")
    assert load_audio(tmp_path / "b.wav").abs().max() < 1e-6


def test_same_rate_is_untouched_and_integers_have_the_right_scale(tmp_path):
    wave = np.array([0, 32767, -32768, 16384, -1], np.int16)
    soundfile.write(tmp_path / "a.wav", np.tile(wave, 500), 16000)
    assert torch.equal(load_audio(tmp_path / "a.wav")[:5], torch.from_numpy(wave / 32768).float())


def test_a_tenth_of_a_second_and_less(tmp_path):
    for samples in (1, 10, 1600):
        soundfile.write(tmp_path / "a.wav", sine(16000, 1, 1)[:samples], 16000)
        assert len(load_audio(tmp_path / "a.wav")) == samples
    soundfile.write(tmp_path / "a.wav", sine(44100, 0.1, 2), 44100)
    assert abs(len(load_audio(tmp_path / "a.wav")) - 1600) <= 1


def test_chunks_are_the_whole(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, (50000, 2)), 44100)
    chunks = list(audio_chunks(tmp_path / "a.wav", 0.25))
    assert all(len(chunk) == 4000 for chunk in chunks[:-1]) and 0 < len(chunks[-1]) <= 4000
    assert torch.equal(torch.cat(chunks), load_audio(tmp_path / "a.wav"))


def test_pure_sound_may_start_at_any_time(tmp_path):
    save_with_libav(tmp_path / "a.mka", sine(16000, 1.0, 1), 16000, "pcm_s16le", "mono", start=5)
    check_sine(load_audio(tmp_path / "a.mka"), 1.0)


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
        samples = np.ascontiguousarray(sine(16000, 1.0, 1).T)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = 16000, Fraction(1, 16000)
        frame.pts = round((base + lead) * 16000)
        container.mux(audio.encode(frame))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    wave = load_audio(path)
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
    save_with_libav(tmp_path / "front.m4a", sine(16000, 4, 1), 16000, "aac", "mono",
                    options={"movflags": "faststart"})
    wav, flac, m4a, front = ((tmp_path / n).read_bytes()
                             for n in ("good.wav", "good.flac", "good.m4a", "front.m4a"))
    noise = np.random.default_rng(0).bytes(20000)
    for name, content, words in [
            ("empty.wav", b"", ("empty",)), ("text.wav", b"hello, I am no sound at all", ("not a sound",)),
            ("picture.wav", picture_bytes(), ("not a sound",)), ("noise.mp3", noise, ("sound",)),
            ("noise.wav", noise, ("sound",)), ("header.wav", wav[:44], ("sound",)),
            ("cut.wav", wav[:20000], ("cut off",)),
            ("cut.flac", flac[: len(flac) // 2], ("cut off",)),
            ("cut.m4a", m4a[: len(m4a) // 2], ("not a sound",)),
            ("front.m4a", front[: len(front) // 2], ("cut off",)),
            ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\ngood.wav\n#EXT-X-ENDLIST\n", ("not a sound",)),
            ("list.wav", b"ffconcat version 1.0\nfile good.wav\n", ("not a sound",))]:
        path = saved(name, content)
        refused(lambda path=path: load_audio(path), name, *words)
    refused(lambda: load_audio(tmp_path), "is a folder")
    refused(lambda: load_audio(tmp_path / "no.wav"), "does not exist")


def test_silence_without_length_and_nan_are_refused(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 1)), 16000)
    refused(lambda: load_audio(tmp_path / "none.wav"), "none.wav", "no sound")
    for bad in (np.nan, np.inf):
        wave = sine(16000, 1, 1)
        wave[777] = bad
        soundfile.write(tmp_path / "bad.wav", wave, 16000, subtype="FLOAT")
        refused(lambda: load_audio(tmp_path / "bad.wav"), "bad.wav", "NaN")


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
    chunks = list(pcm_chunks(pipe(values.tobytes(), size)))
    assert torch.equal(torch.cat(chunks), torch.from_numpy(values.astype(np.float32) / 32768))
    assert max(map(len, chunks)) <= max(1, size // 2 + 1) and min(map(len, chunks)) > 0


def test_bad_raw_sound_is_refused():
    for data, words in [(b"", ("stdin is empty", "16-bit")),
                        (bytes(4001), ("within a sample", "4001 bytes", "16-bit")),
                        (bytes(1600), ("0.05 s", "16 kHz")), (bytes(1), ("within a sample",))]:
        refused(lambda data=data: list(pcm_chunks(pipe(data, 1000))), *words)
    assert len(torch.cat(list(pcm_chunks(pipe(bytes(3200), 1000))))) == 1600
