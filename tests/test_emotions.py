"""measure/emotions.py on faces, moods and readings whose answer is known."""
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_emotion import bert  # noqa: F401
from test_evaluate import META, given, refused, run  # noqa: F401

import emotion
from emotion import VoiceConfig, VoiceEmotion
from encoder import EncoderConfig, MotionEncoder
from generator import Generator, GeneratorConfig
from measure import checkpoint, emotions, evaluate
from measure.emotions import EYE, FACE, FRAMES, LIDS, MOUTH, NAMES, PAIRS, PICKS, YAW
from media.latents import Pixel
from media.weights import save_weights
from sample import load_models
from world.people import EMOTION_FACE
from world.render import MOTION
from world.speech import EMOTIONS

# ---- moods -> tokens ---------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch):
    """A checkpoint of small random networks with experts that act, without autocast."""
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(token_dim=8, width=32, depth=1, heads=1, window=8, past=4,
                                          lookahead=1, experts=2, truncated=1))
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    generator.truncated[0] = 1
    encoder = MotionEncoder(EncoderConfig(image_size=32, patch_size=8, width=32, depth=1, heads=1,
                                          token_dim=8))
    monkeypatch.setattr(checkpoint, "autocast", lambda device: nullcontext())
    return SimpleNamespace(encoder=encoder.eval(), generator=generator.eval(), space=Pixel(), meta=META,
                           device=torch.device("cpu"))


def test_each_mood_is_generated_as_by_its_schedule(small):
    photo, waves = torch.rand(3, 32, 32) * 2 - 1, 0.1 * torch.randn(2, 27 * 640)
    schedule = emotion.Schedule([(0.0, EYE[1]), (0.5, EYE[2])])
    moods = torch.stack([EYE[3].expand(27, -1), schedule(torch.zeros(27, 1))])
    with torch.inference_mode():
        tokens = emotions.generate_moods(small, photo, waves, moods, 5)
        for k, stops in enumerate(([(0.0, EYE[3])], [(0.0, EYE[1]), (0.5, EYE[2])])):
            want = checkpoint.generate(small, photo, waves[k:k + 1], 5, emotion=emotion.Schedule(stops))
            torch.testing.assert_close(tokens[k], want, atol=1e-4, rtol=1e-4)
        plain = checkpoint.generate(small, photo, waves[:1], 5)
        one_voice = emotions.generate_moods(small, photo, waves[:1], EYE[[1, 3]], 5)
        alone = emotions.generate_moods(small, photo, waves[:1], EYE[3:4], 5)
    torch.testing.assert_close(one_voice[1], tokens[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, one_voice[1:], atol=1e-4, rtol=1e-4)
    assert (tokens[0] - tokens[1]).abs().max() > 0.05 < (tokens[0] - plain).abs().max()


# ---- faces -> numbers --------------------------------------------------------------------------------------

@pytest.fixture
def faces():
    """Motion (2, 7, 40, M) of two people who show exactly EMOTION_FACE, sad lids, a moving mouth and head."""
    motion = torch.zeros(2, 7, 40, len(NAMES))
    for k, name in enumerate(EMOTIONS):
        for factor, value in EMOTION_FACE[name].items():
            motion[:, k, :, NAMES.index(factor)] = value
    wave = torch.sin(torch.arange(40) * 0.5)
    motion[..., MOUTH] = wave[:, None].expand(-1, 2)
    motion[..., YAW] = 0.1 * wave
    motion[:, 2, :, LIDS] = 0.2
    motion[:, :, 20, LIDS] = 0.9                                            # a blink in every clip
    return motion, motion[0, :, 0, FACE]


def test_a_face_that_shows_all_is_measured_as_perfect(faces):
    truth, means = faces
    row = emotions.measure_rows(truth, truth, means)
    assert row["crosstalk"] == row["mouth_worst"] == 0 and row["per_emotion"] == [1] * 7
    intervals = {name: list(value.values()) for name, value in row.items() if isinstance(value, dict)}
    assert intervals == {name: pytest.approx([1, 1, 1]) for name in (
        "accuracy", "gain_corner", "gain_raise", "gain_furrow", "lids_sad", "yaw_std", "blinks", "mouth")}


def test_a_calm_face_is_measured_as_calm(faces):
    truth, means = faces
    row = emotions.measure_rows(truth[:, :1].expand_as(truth), truth, means)
    assert row["accuracy"]["mean"] == pytest.approx(1 / 7) and row["per_emotion"] == [1, 0, 0, 0, 0, 0, 0]
    assert [row["gain_" + name]["mean"] for name in ("corner", "raise", "furrow")] == [0, 0, 0]
    assert row["lids_sad"]["mean"] == 0 and row["mouth"]["mean"] == pytest.approx(1)


def test_sizes_and_other_factors_are_measured_by_themselves(faces):
    truth, means = faces
    x = truth.clone()
    x[..., FACE[0]] *= 0.5                                                  # lip corners at half
    x[0, ..., FACE[1]] = 0                                                  # brows of one of two people
    x[..., YAW] *= 0.3
    roll, (low, high) = NAMES.index("roll"), MOTION["roll"]
    x[:, 3, :, roll] += 0.1 * (high - low)                                  # angry heads lean
    x[:, 4, :, MOUTH] *= -1                                                 # the mouth of the afraid is wrong
    x[1, :, 20, LIDS] = 0                                                   # one person never blinks
    row = emotions.measure_rows(x, truth, means)
    assert row["gain_corner"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    assert row["gain_raise"] == pytest.approx({"mean": 0.5, "low": 0, "high": 1})
    assert row["gain_furrow"]["mean"] == pytest.approx(1)
    assert row["yaw_std"]["mean"] == pytest.approx(0.3) and row["crosstalk"] == pytest.approx(0.1)
    assert row["mouth"]["mean"] == pytest.approx(5 / 7) and row["mouth_worst"] == pytest.approx(-2)
    assert row["blinks"]["mean"] == pytest.approx(0.5)


def test_the_means_are_the_expressions_of_the_world():
    means = emotions.face_means(40)
    want = torch.tensor([[EMOTION_FACE[e].get(NAMES[k], 0.0) for k in FACE] for e in EMOTIONS])
    assert (means - means[0] - want).abs().max() < 0.2                    # factors are clamped to their range
    assert means[1, 0] - means[0, 0] > 0.7 and means[2, 0] - means[0, 0] < -0.6     # happy, sad: corners


def test_ranks():
    assert emotions.rank_correlation(torch.tensor([0.0, 0.1, 0.5, 3.0])) == pytest.approx(1)
    assert emotions.rank_correlation(torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(-1)


def test_a_switch_has_its_time_and_its_largest_step():
    """From 2 to 1 in ten equal steps that begin at frame 25: above four fifths at the ninth."""
    course = 2 - (torch.arange(75.0) - 25).div(10).clamp(0, 1)
    seconds, largest = emotions.switch_time(course)
    assert seconds == pytest.approx(9 / 25) and largest == pytest.approx(0.1, abs=1e-4)


# ---- a person of the world ---------------------------------------------------------------------------------

@pytest.fixture
def person(monkeypatch):
    """A person of whom a perfect generator is read: it shows the true motion of every mood."""
    person = emotions.Person(SimpleNamespace(meta={"size": 16}), None, 1, 0)
    monkeypatch.setattr(person, "generated",
                        lambda waves, moods, picks: person.true_motion(moods)[:, picks])
    return person


def test_a_person_is_neutral_on_the_photo_and_speaks_in_each_mood(person):
    assert person.truth.shape == (7, FRAMES, len(NAMES)) and person.waves.shape == (7, FRAMES * 640)
    torch.testing.assert_close(person.truth[1:, :, MOUTH], person.truth[:1, :, MOUTH].expand(6, -1, -1))
    torch.testing.assert_close(person.mouths[0], person.truth[0][:, MOUTH], atol=1e-5, rtol=0)
    assert (person.mouths[1] - person.mouths[0]).abs().max() > 0.1          # happy speech has another tempo
    assert person.photo.shape == (3, 16, 16)


def test_perfect_compounds_and_intensities(person):
    calm = person.truth[0, PICKS][::2][:, FACE].mean(0)
    shift, truth = person.compounds(calm)
    assert shift.shape == truth.shape == (len(PAIRS), 3)
    assert (shift - truth).norm(dim=1).max() < 0.1 < truth.norm(dim=1).mean()
    slope = person.slopes(calm).mean(0)
    torch.testing.assert_close(slope[:5], torch.tensor([0, 0.25, 0.5, 0.75, 1]), atol=0.05, rtol=0)
    assert emotions.rank_correlation(slope) == pytest.approx(1)


# ---- the command -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def with_experts(given):                                                # noqa: F811
    """Weights with experts that do nothing yet."""
    models, _ = load_models(given / "w.safetensors")
    models["generator"] = Generator(GeneratorConfig(**{**vars(models["generator"].config), "experts": 2}))
    models["voice"] = VoiceEmotion(VoiceConfig(width=4))
    save_weights(given / "e.safetensors", models, META)
    return given


def test_emotions_are_read_off_frames(with_experts, tmp_path, monkeypatch, capsys):
    """The world's own factors are at the ceiling; fresh experts change nothing."""
    monkeypatch.setattr(emotions, "INTENSITIES", (0, 1))
    monkeypatch.setattr(emotions, "PICKS", slice(25, None, 25))
    monkeypatch.setattr(emotions, "SLOW_PICKS", slice(25, None, 50))
    monkeypatch.setattr(emotions, "voice_ceiling", lambda: (0.7, 0.2))
    out = tmp_path / "e.json"
    assert run(with_experts, "emotion", "--clips", "1", "--json", str(out), ckpt="e.safetensors") == 0
    report = json.loads(out.read_text())
    truth, ours, plain = (report["rows"][name] for name in ("true factors", "ours", "no emotion"))
    assert truth["accuracy"]["mean"] > 0.8
    assert truth["gain_corner"]["mean"] == truth["lids_sad"]["mean"] == pytest.approx(1)
    assert ours["accuracy"]["mean"] == plain["accuracy"]["mean"] == pytest.approx(1 / 7)
    assert abs(ours["gain_corner"]["mean"]) < 1e-4 and ours["crosstalk"] < 1e-4
    assert report["rows"]["other label"]["accuracy"]["mean"] == pytest.approx(1 / 7)
    assert report["compounds_true_size"] == pytest.approx(0.64, abs=0.1)
    assert report["voice_ceiling"] == 0.7 and report["voice_ceiling_shift"] == 0.2
    assert "voice of another emotion" in capsys.readouterr().out


def test_names_and_phrases_are_listed_with_what_came_out(bert, tmp_path, capsys):      # noqa: F811
    """By a random encoder: names are prompts, so they are right; phrases are whatever it makes of them."""
    out = tmp_path / "t.json"
    assert evaluate.main(["text", "--text-model", str(bert), "--json", str(out)]) == 0
    report, said = json.loads(out.read_text()), capsys.readouterr().out
    assert report["names"] == 1 and len(emotions.PHRASES) == 20 and len(report["palettes"]) == 27
    right = 0
    for text, meant in emotions.PHRASES:
        palette = torch.tensor(report["palettes"][text])
        torch.testing.assert_close(palette, emotion.text_palette(text, bert), atol=1e-5, rtol=1e-4)
        right += EMOTIONS[palette.argmax()] == meant
        line, = (line for line in said.splitlines() if line.startswith(text + " "))
        assert meant in line and emotion.describe(palette) in line
    assert report["phrases"] == pytest.approx(right / 20)


def test_a_text_model_that_is_not_there_is_refused(tmp_path, capsys):
    refused(capsys, evaluate.main(["text", "--text-model", str(tmp_path / "none")]), "cannot load the text")


def test_the_exact_voice_tells_the_emotion():
    accuracy, shift = emotions.voice_ceiling(train=4000, test=700, steps=150)
    assert accuracy > 0.5 and 0.1 < shift < 0.5


def test_emotions_need_experts(given, capsys):                          # noqa: F811
    refused(capsys, run(given, "emotion", "--clips", "1"), "w.safetensors", "without emotions",
            "train_gen.py")


def test_real_photos_are_compared_with_their_own_neutral_face(monkeypatch, capsys):
    """A decoder whose brightness is the number of the emotion, a mesh to which brightness is everything."""
    monkeypatch.setattr(emotions, "generate_moods", lambda checkpoint, photo, wave, moods, seed:
                        torch.arange(7.0)[:, None, None].expand(7, 60, 1) / 10)
    monkeypatch.setattr(emotions, "decode_clip", lambda checkpoint, photo, tokens, steps, seed:
                        tokens[:, :, None, None].expand(-1, 3, 4, 4))

    def read_faces(args, clips):
        light = [x.mean((1, 2, 3)).numpy() for x in clips]
        assert len(light) == 7 and len(light[0]) == 28                      # every 2nd of the last 55 frames
        opening = np.sin(np.arange(len(light[0])))
        return [{"corners": x + k, "width": x, "lids": -x, "opening": opening}
                for k, x in zip([0, 1, 2, 3, 4, 5, 6], light, strict=True)]

    clips = [SimpleNamespace(number=k, person=name, images=torch.zeros(2, 3, 4, 4), wave=None, face=None)
             for k, name in enumerate("ab")]
    nets = {"csim": lambda photo, frames, face: 1 - frames.mean((1, 2, 3)),         # below: neutral is happy
            "expression": lambda frames, face: EYE[(10 * frames.mean((1, 2, 3))).round().long().clamp(min=1)]}
    monkeypatch.setattr(emotions, "open_with_experts", lambda args: SimpleNamespace(meta=META, device="cpu"))
    monkeypatch.setattr(emotions, "test_clips", lambda *_, sound: iter(clips))
    monkeypatch.setattr(emotions.perceptual, "load", lambda *_: (nets, []))
    monkeypatch.setattr(emotions, "read_faces", read_faces)
    args = SimpleNamespace(steps=1, data="a folder", landmarks="python", networks="nets")
    rows = emotions.real_people(args)["rows"]
    for k, name in enumerate(EMOTIONS):
        medians = {measure: x["value"] for measure, x in rows[name].items()}
        assert medians == pytest.approx({"corners": 1.1 * k, "width": 0.1 * k, "lids": -0.1 * k, "opening": 1,
                                       "csim": 1 - 0.1 * k, "recognised": float(k > 0)}, abs=1e-6)
    assert "2 clips of 2 unseen people of a folder" in capsys.readouterr().out
    args.landmarks = None
    assert set(emotions.real_people(args)["rows"]["happy"]) == {"csim", "recognised"}
