"""sample.py: the whole job on a small untrained release; its frames, sound, promises and refusals."""
import fcntl
import io
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from test_decoder import decoder as small_decoder
from test_decoder import inputs
from test_image import read_video

import sample
from decoder import Decoder, DecoderConfig
from emotion import VoiceConfig, VoiceEmotion
from encoder import EncoderConfig, MotionEncoder
from flow import integrate
from generator import Generator, GeneratorConfig
from media import audio_features, face
from media import device as device_module
from media.compose import load_composer
from media.files import InputError
from media.image import from_uint8, open_image
from media.sound import has_audio, load_audio
from media.video import BEHIND, VideoWriter, write_all
from media.weights import save_weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PORTRAIT = os.path.join(ROOT, "examples", "portrait.png")

META = {"size": 32, "audio": "mel", "latents": "pixel", "steps": 1, "gen_steps": 2, "guidance": 1.0}


def small_models(**decoder):
    """Untrained, but with no layer left at zero, so that every input reaches the output."""
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2, "token_dim": 8}
    models = {"encoder": MotionEncoder(EncoderConfig(**shape)),
              "decoder": Decoder(DecoderConfig(**shape, **decoder)),
              "generator": Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=2))}
    for model in models.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.eval()
    return models


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a release, a photo, a second of speech-like sound, a driving video."""
    folder = tmp_path_factory.mktemp("given")
    save_weights(folder / "w.safetensors", small_models(), META)
    rng = np.random.default_rng(0)
    photo = Image.new("RGB", (72, 64), (90, 110, 130))
    photo.paste(Image.open(PORTRAIT).convert("RGB").resize((64, 64)), (0, 0))
    photo.save(folder / "x.png")
    soundfile.write(folder / "y.wav", 0.2 * rng.normal(size=(22050, 2)).clip(-3, 3), 22050)
    with VideoWriter(folder / "d.mp4", 32, torch.from_numpy(rng.normal(0, 0.1, 16000)).float()) as video:
        for _ in range(20):
            video.write(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    return folder


def command(given, out, *more, img="x.png", wav="y.wav", ckpt="w.safetensors"):
    drive = ["--wav", str(given / wav)] if wav else []
    return ["--img", str(given / img), *drive, "--ckpt", str(given / ckpt), "--out", str(out), "--device",
            "cpu", *more]


def refused(capsys, arguments, *words):
    """Status 2, one line on stderr that holds the words."""
    assert sample.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert all(word in said for word in words), said


# ------------------------------------------------------------------------------------------------- whole jobs
def test_photo_and_speech_make_a_video(given, tmp_path, capsys):
    assert sample.main(command(given, tmp_path / "o.mp4")) == 0
    assert "25 frames" in capsys.readouterr().out
    with av.open(str(tmp_path / "o.mp4")) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.frames, video.width, video.height) == (25, 144, 128)
        assert (sound.rate, sound.channels) == (22050, 2)
    assert os.listdir(tmp_path) == ["o.mp4"]


@pytest.fixture
def images(monkeypatch):
    """The squares of photos, as the models see them."""
    seen, prepare = [], sample.prepare_reference
    monkeypatch.setattr(sample, "prepare_reference",
                        lambda models, meta, image, seed: (
                            seen.append(image) or prepare(models, meta, image, seed)))
    return seen


@pytest.fixture
def frames(monkeypatch):
    """The frames of videos, before they are coded."""
    seen, write = [], VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, x: (seen.append(x.copy()), write(self, x)))
    return seen


@pytest.mark.parametrize("latents", [False, True])
def test_frames_are_the_whole_photo_with_its_face_moved(given, tmp_path, images, frames, latents):
    """Enlarged twice, as the face is small; outside of the face's square every frame is the photo."""
    models = small_models(predict="v") if latents else small_models()
    save_weights(tmp_path / "w.safetensors", models, META)
    assert sample.main(command(given, tmp_path / "o.mp4", ckpt=tmp_path / "w.safetensors")) == 0
    photo = open_image(given / "x.png")
    square, _ = face.frame_photo(photo, face.load_detector())
    assert torch.equal(images[0], from_uint8(face.crop_square(photo, square, 32)))
    composer = load_composer(photo, square, 1080)
    changed = (np.stack(frames) != composer.photo).any(axis=(0, 3))
    y, x = np.nonzero(changed)
    assert changed.shape == (128, 144) and changed.mean() > 0.3
    half = composer.square.size / 2 + 1
    assert max(abs(x - composer.square.cx).max(), abs(y - composer.square.cy).max()) < half * 1.05


def test_crop_and_size_are_those_of_the_video(given, tmp_path, frames):
    assert sample.main(command(given, tmp_path / "o.mp4", "--size", "72")) == 0
    assert frames[0].shape == (64, 72, 3)
    assert sample.main(command(given, tmp_path / "o.mp4", "--crop")) == 0
    assert frames[-1].shape[0] == frames[-1].shape[1] == pytest.approx(122, abs=6)
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == frames[-1].shape[:2]


def test_a_photo_without_a_face_is_used_in_the_middle(given, tmp_path, images, capsys):
    Image.linear_gradient("L").resize((48, 40)).save(tmp_path / "grey.png")
    assert sample.main([*command(given, tmp_path / "o.mp4"), "--img", str(tmp_path / "grey.png")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert "grey.png" in said[0] and "no face" in said[0]
    photo = open_image(tmp_path / "grey.png")
    assert torch.equal(images[0], from_uint8(face.crop_square(photo, face.Square(24, 20, 40), 32)))


def test_another_face_can_be_chosen(given, tmp_path, images, capsys):
    """Two faces: the larger one, at the left, unless another is asked for; a third does not exist."""
    portrait, photo = Image.open(PORTRAIT).convert("RGB"), Image.new("RGB", (320, 160), (120, 140, 90))
    photo.paste(portrait.resize((160, 160)), (0, 0))
    photo.paste(portrait.resize((100, 100)), (200, 30))
    photo.save(tmp_path / "two.png")
    for more in ([], ["--face", "1"], ["--face", "2"]):
        assert sample.main([*command(given, tmp_path / "o.mp4", *more), "--img",
                            str(tmp_path / "two.png")]) == 0
    assert "2 faces" in capsys.readouterr().err
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert (images[2] - images[0]).abs().mean() < 0.1             # the same drawn face, smaller
    words = [*command(given, tmp_path / "o.mp4", "--face", "3"), "--img", str(tmp_path / "two.png")]
    refused(capsys, words, "two.png", "--face 3", "2")


def test_reenactment_keeps_frames_and_sound(given, tmp_path):
    assert sample.main(command(given, tmp_path / "o.mp4", "--video", str(given / "d.mp4"), wav=None)) == 0
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert container.streams.video[0].frames == 20 and len(container.streams.audio) == 1


def test_mute_driving_video_works(given, tmp_path):
    with VideoWriter(tmp_path / "mute.mp4", 32) as video:
        for k in range(3):
            video.write(np.full((32, 32, 3), 50 * k, np.uint8))
    assert sample.main(command(given, tmp_path / "o.mp4", "--video", str(tmp_path / "mute.mp4"),
                               wav=None)) == 0
    assert not has_audio(tmp_path / "o.mp4") and len(list(read_video(tmp_path / "o.mp4", 32))) == 3


@pytest.mark.parametrize("seconds, frames", [(0.1, 2), (0.64, 16), (0.66, 16), (1.5, 38)])
def test_frames_are_as_many_as_the_sound_lasts(given, tmp_path, seconds, frames):
    soundfile.write(tmp_path / "y.wav", 0.1 * np.ones(round(16000 * seconds)), 16000)
    assert sample.main(command(given, tmp_path / "o.mp4", "--wav", str(tmp_path / "y.wav"), wav=None)) == 0
    assert len(list(read_video(tmp_path / "o.mp4", 32))) == frames


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.099])
def test_less_than_a_tenth_of_a_second_is_refused_as_on_a_pipe(given, tmp_path, capsys, seconds):
    soundfile.write(tmp_path / "y.wav", 0.1 * np.ones(round(16000 * seconds)), 16000)
    refused(capsys, command(given, tmp_path / "o.mp4", "--wav", str(tmp_path / "y.wav"), wav=None),
            "y.wav holds only", "0.1 s")
    assert os.listdir(tmp_path) == ["y.wav"]


@pytest.mark.parametrize("change", [{"size": 0}, {"size": "64"}, {"size": 64.0}, {"latents": "jpeg"},
                                    {"latents": None}, {"audio": "mfcc"}, {"steps": 0}, {"gen_steps": 10**9},
                                    {"guidance": float("nan")}, {"guidance": "much"}])
def test_settings_that_cannot_be_are_refused_by_name(given, tmp_path, capsys, change):
    save_weights(tmp_path / "w.safetensors", small_models(), {**META, **change})
    name, = change
    refused(capsys, command(given, tmp_path / "o.mp4", "--ckpt", str(tmp_path / "w.safetensors")),
            f"its {name} is")


def test_same_seed_same_frames_other_seed_other_take(given, tmp_path, frames):
    for seed in ("3", "3", "4"):
        assert sample.main(command(given, tmp_path / "o.mp4", "--seed", seed)) == 0
    a, b, c = np.split(np.stack(frames), 3)
    assert np.array_equal(a, b) and not np.array_equal(a, c)


# -------------------------------------------------------------------------------------------------- the parts
def features(frames):
    return torch.randn(frames, audio_features.FEATURE_DIM["mel"],
                       generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("frames", [1, 8])
def test_pieces_of_the_sound_do_not_matter(frames):
    models, rows = small_models(frames=frames), features(43)
    image = torch.rand(3, 32, 32) * 2 - 1
    whole = list(sample.animate_from_audio(models, META, image, iter([rows])))
    parts = list(sample.animate_from_audio(models, META, image, iter(rows.split(7))))
    assert len(whole) == 43 and whole[0].shape == (32, 32, 3) and whole[0].dtype == np.uint8
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_frames_depend_on_photo_sound_and_guidance():
    models, image = small_models(), torch.rand(3, 32, 32) * 2 - 1
    base, other = (np.stack(list(sample.animate_from_audio(models, META, image, iter([features(17) * k]))))
                   for k in (1, -1))
    assert not np.array_equal(base, other)
    strong = np.stack(list(sample.animate_from_audio(models, META, image, iter([features(17)]),
                                                     guidance=3.0)))
    assert not np.array_equal(base, strong)
    assert not np.array_equal(base, np.stack(list(sample.animate_from_audio(models, META, -image,
        iter([features(17)])))))


def test_early_frames_do_not_wait_for_late_sound():
    """Streaming: the first frames come when the first window and what it hears ahead are there; memory stays
    flat."""
    taken = []

    def rows():
        for k in range(1000):
            taken.append(k)
            yield features(1)

    frames = sample.animate_from_audio(small_models(), META, torch.zeros(3, 32, 32), rows())
    next(frames)
    assert len(taken) <= 16 + 3
    for _ in range(100):
        next(frames)
    assert len(taken) <= 16 + 3 + 16 * 7


def animate_live(models, image, chunks, seed=0):
    features = audio_features.stream_features(audio_features.streaming_gain(chunks))
    return sample.animate_from_audio(models, META, image, features, seed)


@pytest.mark.parametrize("size", [100, 640, 5000])
def test_live_sound_gives_the_frames_of_the_file(size, monkeypatch):
    """With the same gain, live frames are the file's; the running gain is all that differs."""
    models, image, wave = small_models(), torch.rand(3, 32, 32) * 2 - 1, 0.1 * torch.randn(30000)
    features = audio_features.extract_features(2 * wave[None])[0]
    want = np.stack(list(sample.animate_from_audio(models, META, image, iter([features]), 5)))
    assert len(list(animate_live(models, image, iter(wave.split(size)), 5))) == len(want) == 47
    monkeypatch.setattr(audio_features, "streaming_gain", lambda chunks: (2 * chunk for chunk in chunks))
    live = np.stack(list(animate_live(models, image, iter(wave.split(size)), 5)))
    assert np.abs(live.astype(int) - want.astype(int)).max() <= 1 and (live == want).mean() > 0.99


def test_live_frames_leave_when_their_window_is_heard():
    """Window, what is heard ahead and the mel windows' reach: 20 frames of sound; then 16 more for every
    16."""
    given = []
    live = animate_live(small_models(), torch.zeros(3, 32, 32),
                        (given.append(1) or 0.1 * torch.randn(640) for _ in range(100)))
    for k in range(64):
        next(live)
        assert len(given) == 20 + k // 16 * 16


def test_precision_does_not_leak(monkeypatch):
    """Models run under autocast where it is fast; neither the caller nor the sound's features may."""
    monkeypatch.setattr(device_module, "fast_bf16", lambda device: True)

    def rows():
        for _ in range(20):
            assert not torch.is_autocast_enabled("cpu")
            yield features(1)

    frames = sample.animate_from_audio(small_models(), META, torch.zeros(3, 32, 32), rows())
    for _ in frames:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")


def test_reenactment_uses_the_motion_of_each_frame(monkeypatch):
    """Backwards in, backwards out: no frame depends on its place or on the frames beside it."""
    monkeypatch.setattr(device_module, "fast_bf16", lambda device: False)
    models, image = small_models(), torch.rand(3, 32, 32) * 2 - 1
    video = torch.rand(20, 3, 32, 32) * 2 - 1
    frames = list(sample.reenact(models, META, image, iter(video), absolute=True))
    again = list(sample.reenact(models, META, image, iter(video.flip(0)), absolute=True))
    assert len(frames) == 20
    assert np.abs(np.stack(frames).astype(int) - np.stack(again[::-1]).astype(int)).max() <= 1
    assert not np.array_equal(frames[0], frames[1])


def test_reenactment_begins_as_the_photo_is(monkeypatch):
    """Changes alone: what the video shows at first is where the photo stands. A photo that is the first frame
    moves as told. Half: the first motion is the mean of both."""
    monkeypatch.setattr(device_module, "fast_bf16", lambda device: False)
    models, image, video = small_models(), torch.rand(3, 32, 32) * 2 - 1, torch.rand(20, 3, 32, 32) * 2 - 1
    first = next(sample.reenact(models, META, image, iter(video), absolute=0))
    still = next(sample.reenact(models, META, image, iter([image]), absolute=True))
    assert np.abs(first.astype(int) - still.astype(int)).mean() < 0.1
    itself = torch.cat([image[None], video])
    relative, absolute = (np.stack(list(sample.reenact(models, META, image, iter(itself), absolute=kind)))
                          for kind in (0, 1))
    assert np.abs(relative.astype(int) - absolute.astype(int)).mean() < 0.1
    other = np.stack(list(sample.reenact(models, META, image, iter(video), absolute=True)))
    assert np.abs(other[0].astype(int) - first.astype(int)).mean() > 1
    m_ref, m_first = (models["encoder"](x[None]).flatten(1) for x in (image, video[0]))
    monkeypatch.setattr(sample, "decode_motions", lambda models, meta, reference, motions, *_: motions)
    half = next(sample.reenact(models, META, image, iter(video), absolute=0.5))
    torch.testing.assert_close(half[:1], (m_ref + m_first) / 2, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------- encoding in a thread
def test_no_more_than_a_batch_waits_for_the_encoder():
    made, go = [], threading.Event()
    video = SimpleNamespace(path="o.mp4", write=lambda frame: go.wait(20))
    frames = (made.append(k) or k for k in range(100))
    work = threading.Thread(target=write_all, args=(video, frames, lambda: None))
    work.start()
    until = time.monotonic() + 20
    while len(made) <= BEHIND and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == BEHIND + 1
    go.set()
    work.join(20)
    assert len(made) == 100


@pytest.mark.parametrize("fails", [3, 24])
def test_an_error_of_the_encoder_reaches_the_caller(given, tmp_path, monkeypatch, capsys, fails):
    write = VideoWriter.write

    def failing(self, frame):
        if self.frames == fails:
            raise InputError("the disk is full")
        write(self, frame)

    monkeypatch.setattr(VideoWriter, "write", failing)
    refused(capsys, command(given, tmp_path / "o.mp4"), "the disk is full")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------- live
def raw(seconds):
    """16-bit noise whose loudness goes up and down."""
    count = round(16000 * seconds)
    wave = 0.1 * np.random.default_rng(1).normal(size=count) * np.abs(np.sin(np.arange(count) / 2500))
    return (32767 * wave.clip(-1, 1)).astype("<i2").tobytes()


def start(arguments, **pipes):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "sample.py"), *arguments],
                            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                               **pipes})


def frames_in(data):
    with av.open(io.BytesIO(data)) as container:
        return len(list(container.decode(video=0)))


def live(given, out, *more):
    return command(given, out, "--wav", "-", *more, wav=None)


def test_frames_leave_before_the_sound_has_ended(given):
    """Three seconds in, stdin still open: at least two windows have left; stdout is an mp4, nothing else."""
    work = start(live(given, "-"))
    feed = threading.Thread(target=lambda: (work.stdin.write(raw(3)), work.stdin.flush()))
    feed.start()                                               # neither pipe waits for the other
    early = b""
    while len(early) < 1000 or frames_in(early) < 30:          # the test's own time-out ends what never comes
        early += os.read(work.stdout.fileno(), 65536)
        assert work.poll() is None
    feed.join()
    rest, said = work.communicate(timeout=300)
    data = early + rest
    assert work.returncode == 0 and b"75 frames" in said and b"Traceback" not in said
    with av.open(io.BytesIO(data)) as container:
        assert container.format.name.startswith("mov") and container.streams.audio[0].rate == 16000
        sound = sum(frame.samples for frame in container.decode(audio=0))
    assert frames_in(data) == 75 and sound == pytest.approx(48000, abs=1024)
    at = 0
    while at < len(data):                                        # boxes from the first byte to the last
        assert data[at + 4:at + 8] in (b"ftyp", b"moov", b"moof", b"mdat", b"mfra")
        at += int.from_bytes(data[at:at + 4], "big")
    assert at == len(data)


def test_pieces_of_stdin_do_not_matter(given, tmp_path, monkeypatch, frames):
    for size in (333, 1280, 100000):
        data = io.BytesIO(raw(1.5))
        pipe = SimpleNamespace(read1=lambda n, data=data, size=size: data.read(size))
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe, isatty=lambda: False))
        assert sample.main(live(given, tmp_path / "o.mp4")) == 0
        wave = load_audio(tmp_path / "o.mp4").numpy()[:24000]
        assert np.corrcoef(wave, np.frombuffer(raw(1.5), "<i2")[:24000])[0, 1] > 0.8    # AAC of noise
    first, *others = np.split(np.stack(frames), 3)
    assert len(first) == 38 and all(np.array_equal(first, other) for other in others)


def test_a_file_may_be_streamed(given, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(tmp_path)
    assert sample.main(command(given, "-")) == 0
    stdout, said = capfdbinary.readouterr()
    assert b"25 frames" in said and frames_in(stdout) == 25
    with av.open(io.BytesIO(stdout)) as container:
        assert (container.streams.audio[0].rate, container.streams.audio[0].channels) == (22050, 2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("data, out, word", [(b"", "-", b"empty"), (b"", "o.mp4", b"empty"),
                                             (bytes(1600), "-", b"0.05 s"),
                                             (raw(1.2) + b"x", "o.mp4", b"within a sample")])
def test_bad_sound_on_stdin_is_refused(given, tmp_path, monkeypatch, capfdbinary, data, out, word):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))
    assert sample.main(live(given, out)) == 2
    stdout, said = capfdbinary.readouterr()
    assert stdout == b"" and word in said and said.splitlines()[-1].startswith(b"sample.py: ")
    assert os.listdir(tmp_path) == []


def test_a_reader_that_goes_away_ends_it_quietly(given):
    work = start(live(given, "-"))
    work.stdout.close()
    work.stdin.write(raw(1.5))
    work.stdin.flush()                                           # and stays open
    assert work.wait(timeout=300) == 1 and work.stderr.read() == b""
    work.stdin.close()


@pytest.mark.parametrize("out", ["o.mp4", "-"])
def test_a_kill_leaves_no_file_and_waits_for_no_reader(given, tmp_path, out):
    """While it waits for sound, or for a reader that has stalled."""
    work = start(live(given, out if out == "-" else str(tmp_path / out)))
    fcntl.fcntl(work.stdout, fcntl.F_SETPIPE_SZ, 4096)
    work.stdin.write(raw(1.9))                                   # what a pipe holds
    work.stdin.flush()
    until, held = time.monotonic() + 200, -1
    while time.monotonic() < until and not (os.listdir(tmp_path) or 0 < held == waiting(work.stdout)):
        held = waiting(work.stdout)
        time.sleep(0.5)
    assert work.poll() is None
    work.send_signal(signal.SIGTERM)
    assert work.wait(timeout=200) == 143 and os.listdir(tmp_path) == []
    assert b"Traceback" not in work.stderr.read()
    work.stdin.close()


def waiting(pipe):
    """How many bytes a pipe holds."""
    size = bytearray(4)
    fcntl.ioctl(pipe, termios.FIONREAD, size)
    return int.from_bytes(size, sys.byteorder)


def test_terminals_are_refused(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    refused(capsys, live(given, tmp_path / "o.mp4"), "--wav -", "terminal")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    refused(capsys, command(given, "-"), "--out -", "terminal")


# --------------------------------------------------------------------------------------------------- refusals
def test_bad_inputs_end_in_a_sentence(given, tmp_path, capsys):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.wav").write_bytes(b"no sound at all, just text")
    (tmp_path / "text.safetensors").write_bytes(b"no weights")
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    out = tmp_path / "o.mp4"
    for option, name, word in [
            ("--img", "empty.png", "empty"), ("--img", "no.png", "does not exist"), ("--img", "", "folder"),
            ("--wav", "text.wav", "not a sound"), ("--wav", "nan.wav", "NaN"),
            ("--wav", "no.wav", "does not exist"),
            ("--ckpt", "text.safetensors", "safetensors"), ("--ckpt", "no.safetensors", "does not exist"),
            ("--out", "no/o.mp4", "no folder"), ("--out", "o.gif", ".mp4"),
            ("--device", "abacus", "cannot be used")]:
        value = name if option == "--device" else str(tmp_path / name)
        refused(capsys, [*command(given, out), option, value], value, word)
        assert sorted(os.listdir(tmp_path)) == ["empty.png", "nan.wav", "text.safetensors", "text.wav"]
    refused(capsys, command(given, out, "--video", str(tmp_path / "text.wav"), wav=None), "text.wav", "video")


def test_weights_with_nan_and_without_generator_are_refused(given, tmp_path, capsys):
    models = small_models()
    save_weights(tmp_path / "half.safetensors", {k: models[k] for k in ("encoder", "decoder")}, META)
    half = tmp_path / "half.safetensors"
    refused(capsys, command(given, tmp_path / "o.mp4", ckpt=half), "half.safetensors", "--video")
    next(models["decoder"].parameters()).data.fill_(float("nan"))
    save_weights(tmp_path / "nan.safetensors", models, META)
    refused(capsys, command(given, tmp_path / "o.mp4", ckpt=tmp_path / "nan.safetensors"), "nan.safetensors",
            "NaN")


def test_an_input_is_not_overwritten(given, capsys):
    before = (given / "d.mp4").read_bytes()
    refused(capsys, command(given, given / "d.mp4", "--video", str(given / "d.mp4"), wav=None), "overwrite")
    assert (given / "d.mp4").read_bytes() == before


def test_driving_video_that_breaks_off_leaves_no_file(given, tmp_path, capsys, monkeypatch):
    def broken(path, size):
        yield torch.zeros(3, size, size)
        raise InputError(f"{path} is cut off")

    monkeypatch.setattr(sample, "frame_video", lambda path, size, detector: (broken(path, size), None))
    refused(capsys, command(given, tmp_path / "o.mp4", "--video", str(given / "d.mp4"), wav=None), "cut off")
    assert os.listdir(tmp_path) == []


def test_interruption_leaves_no_file_and_the_older_one(given, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **options):
        yield np.zeros((128, 144, 3), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "animate_from_audio", interrupted)
    assert sample.main(command(given, tmp_path / "o.mp4")) == 130
    assert os.listdir(tmp_path) == []
    (tmp_path / "o.mp4").write_bytes(b"older")
    assert sample.main(command(given, tmp_path / "o.mp4")) == 130
    assert os.listdir(tmp_path) == ["o.mp4"] and (tmp_path / "o.mp4").read_bytes() == b"older"


@pytest.mark.parametrize("wrong", [["--wav", "y.wav"], ["--img", "x.png"],
                                   ["--img", "x", "--wav", "y", "--video", "z"],
                                   ["--img", "x", "--video", ""], ["--img", "", "--wav", "y"],
                                   *(["--img", "x", "--wav", "y", *more] for more in (
                                       ["--steps", "0"], ["--seed", "-1"], ["--seed", str(10**30)],
                                       ["--guidance", "nan"], ["--size", "9"]))])
def test_wrong_usage_is_status_2(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(wrong)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- emotions
@pytest.fixture(scope="module")
def feeling(given):
    """Weights with experts: e.safetensors, which also hear voices, and deaf.safetensors."""
    models = small_models()
    torch.manual_seed(1)
    models["generator"] = Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=2, experts=4))
    models["voice"] = VoiceEmotion(VoiceConfig(width=8))
    for kind in ("generator", "voice"):
        for parameter in models[kind].parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    save_weights(given / "e.safetensors", models, META)
    del models["voice"]
    save_weights(given / "deaf.safetensors", models, META)
    return given


def comment(path):
    with av.open(str(path)) as container:
        return container.metadata["comment"]


def test_an_emotion_shows_and_is_written_down(feeling, tmp_path, capsys, frames):
    videos = {}
    for name, more in {"plain": [], "none": ["--emotion", "none"],
                       "happy": ["--emotion", "happy:0.6+sad, angry@0.4"],
                       "calm": ["--emotion", "happy", "--intensity", "0"],
                       "auto": ["--emotion", "auto"]}.items():
        out = tmp_path / f"{name}.mp4"
        assert sample.main(command(feeling, out, *more, ckpt="e.safetensors")) == 0
        said = capsys.readouterr().out
        videos[name] = torch.from_numpy(np.stack(frames)) / 127.5 - 1    # as made, not as coded
        frames.clear()
        assert ("Emotion" in comment(out)) == ("emotion:" in said) == (name not in ("plain", "none"))
    assert torch.equal(videos["plain"], videos["none"])
    for name in ("happy", "calm", "auto"):
        assert (videos[name] - videos["plain"]).abs().mean() > 1e-3
    assert comment(tmp_path / "happy.mp4").endswith("Emotion: happy 0.6, sad 0.4; from 0.4 s angry 1.")
    assert comment(tmp_path / "calm.mp4").endswith("Emotion: happy 1 (intensity 0).")
    assert "from the voice: " in said and "on average" in said


def test_experts_cost_nothing_where_no_emotion_is_asked_for(feeling):
    """The frames are those of the same weights without experts."""
    models, meta = sample.load_models(feeling / "e.safetensors")
    plain = Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=2))
    plain.load_state_dict({k: v for k, v in models["generator"].state_dict().items() if "experts" not in k})
    features = torch.randn(40, 320, generator=torch.Generator().manual_seed(0))
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    one, other = (np.stack(list(sample.animate_from_audio(given, meta, image, iter([features]))))
                  for given in (models, {**models, "generator": plain.eval()}))
    assert np.array_equal(one, other)


def test_words_become_an_emotion(feeling, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "text_palette", lambda *_: torch.tensor([0.1, 0, 0.46, 0.44, 0, 0, 0]))
    assert sample.main(command(feeling, tmp_path / "o.mp4", "--emotion-text", "a bitter smile",
                               ckpt="e.safetensors")) == 0
    said = capsys.readouterr()
    assert "emotion: sad 0.46, angry 0.44, neutral 0.1" in said.out and "two emotions" in said.err


def test_a_live_voice_may_tell_the_emotion(feeling, tmp_path, monkeypatch, capsys):
    pipe = io.BytesIO((3000 * np.random.default_rng(0).normal(size=16000)).clip(-32000,
        32000).astype("<i2").tobytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe, isatty=lambda: False))
    arguments = command(feeling, tmp_path / "o.mp4", "--wav", "-", "--emotion", "auto", wav=None,
                        ckpt="e.safetensors")
    assert sample.main(arguments) == 0
    assert "emotion: from the voice: " in capsys.readouterr().out and comment(tmp_path
        / "o.mp4").endswith("Emotion: from the voice.")


@pytest.mark.parametrize("more, words", [
    (["--emotion", "hapy"], ["hapy", "happy"]), (["--emotion", "happy:2"], ["at most 1"]),
    (["--emotion", "happy, sad@9"], ["past the end", "1.00 s"]),
    (["--emotion", " "], ["no emotion"]), (["--emotion-text", " "], ["empty"]),
    (["--emotion-text", "glad", "--text-model", "/nowhere"], ["cannot load", "/nowhere"])])
def test_emotions_that_cannot_be_meant_are_refused(feeling, tmp_path, capsys, more, words):
    refused(capsys, command(feeling, tmp_path / "o.mp4", *more, ckpt="e.safetensors"), *words)
    assert not os.listdir(tmp_path)


def test_weights_without_emotions_say_so(feeling, tmp_path, capsys):
    for emotion in ("happy", "auto"):
        refused(capsys, command(feeling, tmp_path / "o.mp4", "--emotion", emotion), "w.safetensors",
                "train_gen.py")
    arguments = command(feeling, tmp_path / "o.mp4", "--emotion", "auto", ckpt="deaf.safetensors")
    refused(capsys, arguments, "deaf.safetensors", "train_gen.py")


@pytest.mark.parametrize("more, word", [
    (["--emotion", "happy", "--emotion-text", "glad"], "not allowed"), (["--intensity", "1"], "--emotion"),
    (["--emotion", "happy", "--intensity", "2"], "1.5"),
    (["--emotion", "happy", "--intensity", "nan"], "1.5"),
    (["--emotion", "happy", "--intensity", "-0.1"], "1.5")])
def test_options_of_emotion_that_exclude_each_other(given, tmp_path, capsys, more, word):
    with pytest.raises(SystemExit) as end:
        sample.main(command(given, tmp_path / "o.mp4", *more))
    assert end.value.code == 2 and word in capsys.readouterr().err


def test_a_driving_video_takes_no_emotion(given, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        sample.main(command(given, tmp_path / "o.mp4", "--video", str(given / "d.mp4"), "--emotion", "happy",
                            wav=None))
    assert end.value.code == 2 and "--video" in capsys.readouterr().err


# ---- decode_frames -----------------------------------------------------------------------------------------

def painted(model, motion, sizes, **options):
    z_r, m_r, z_t, *_ = inputs(1)
    pictures = sample.decode_frames(model, z_r, m_r.flatten(1), iter(motion.split(sizes)), z_t, **options)
    return [picture.x for picture in pictures]


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_decode_frames_gives_a_frame_for_every_motion(count, frames, monkeypatch):
    monkeypatch.setattr(sample, "BATCH", 4)
    model, motion = small_decoder(lively=True, frames=frames), inputs(1, count)[4].flatten(1)
    z_r, m_r, z_t, *_ = inputs(1)
    parts = painted(model, motion, count, steps=2)
    cache = model.encode_reference(z_r, m_r)
    sizes = [3] * (count // 3) + [count % 3] if frames > 1 else [1, min(count - 1, 4), count - 5]
    for part, now in zip(parts, motion.split([size for size in sizes if size > 0]), strict=True):
        want = integrate(model, z_t.expand(len(now), -1, -1, -1), 2, m_t=now[:, None], cache=cache)
        torch.testing.assert_close(part, want.detach(), atol=1e-4, rtol=1e-4)
    assert sum(map(len, parts)) == count and not parts[0].requires_grad


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("sizes", [1, [2, 5], [3, 0, 4]])
def test_decode_frames_does_not_care_how_motion_arrives(sizes, frames):
    model, motion = small_decoder(lively=True, frames=frames), inputs(1, 7)[4].flatten(1)
    whole = torch.cat(painted(model, motion, 7))
    torch.testing.assert_close(torch.cat(painted(model, motion, sizes)), whole, atol=1e-4, rtol=1e-4)


def test_decode_frames_of_pictures_waits_for_nothing():
    """Each motion is decoded before the next is asked for; clips of the video model have to be full."""
    z_r, m_r, z_t, *_ = inputs(1)
    for frames, needed in [(1, 5), (3, 10)]:
        taken = []
        motions = (taken.append(1) or now for now in inputs(1, 20)[4].flatten(1).split(5))
        parts = sample.decode_frames(small_decoder(frames=frames), z_r, m_r.flatten(1), motions, z_t)
        assert len(next(parts).x) == frames and len(next(parts).x) == (4 if frames == 1 else 3)
        assert 5 * len(taken) == needed


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("change", [{}, {"predict": "v"}])
def test_pictures_are_the_end_of_the_walk_and_its_parts(change, steps):
    model, motion = small_decoder(lively=True, **change), inputs(1, 5)[4]
    z_r, m_r, z_t, *_ = inputs(1)
    cache = model.encode_reference(z_r, m_r)
    walk = integrate(model, z_t.expand(5, -1, -1, -1), steps, m_t=motion, cache=cache)
    parts = list(sample.decode_frames(model, z_r, m_r.flatten(1), iter([motion.flatten(1)]), z_t, steps))
    torch.testing.assert_close(torch.cat([part.x for part in parts]), walk.detach(), atol=1e-4, rtol=1e-4)
    if not change:
        residual = torch.cat([part.x - part.moved * (1 - part.alpha) for part in parts])
        assert residual.abs().max() > 1e-3 and torch.cat([part.field for part in parts]).shape == (5, 8, 8, 2)
    else:
        assert all(part.moved is None for part in parts)


def test_decode_frames_of_nothing_is_nothing():
    assert painted(small_decoder(), torch.zeros(0, 5), 1) == []
