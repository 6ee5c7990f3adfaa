"""emotion.py: what is accepted and refused, moods in time, what is heard in a voice, what is read in
words."""
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, BertTokenizer

import emotion
from media.files import InputError
from media.sound import FPS
from world.speech import EMOTIONS


def weights(**given):
    return torch.tensor([given.get(name, 0.0) for name in EMOTIONS])


# ---- names -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, want", [
    ("happy", weights(happy=1)), ("Joy", weights(happy=1)), (" fear ", weights(afraid=1)),
    ("anger:1", weights(angry=1)),
    ("happy:0.6+surprised:0.4", weights(happy=0.6, surprised=0.4)),
    ("sad:0.3", weights(sad=0.3, neutral=0.7)),
    ("happy + sad", weights(happy=0.5, sad=0.5)), ("happy:0.6+sad", weights(happy=0.6, sad=0.4)),
    ("neutral", weights(neutral=1)), ("calm:0.5+disgust:0.25", weights(neutral=0.75, disgusted=0.25)),
    ("happy:0", weights(neutral=1))])
def test_a_palette_is_its_weights_and_the_rest_neutral(text, want):
    torch.testing.assert_close(emotion.parse_palette(text), want)


def test_every_name_and_alias_has_its_own_place():
    for k, name in enumerate(EMOTIONS):
        assert emotion.parse_palette(name).argmax() == k and emotion.parse_palette(name.upper()).sum() == 1
    assert set(emotion.ALIASES.values()) == set(EMOTIONS) and len(emotion.PROMPTS) == len(EMOTIONS)
    for prompts, name in zip(emotion.PROMPTS, EMOTIONS, strict=True):
        assert prompts[0] == name


def test_times():
    stops = emotion.parse_emotion("neutral, happy@2.5, sad:0.5+angry:0.5@6", seconds=7)
    assert [start for start, _ in stops] == [0, 2.5, 6]
    torch.testing.assert_close(stops[2][1], weights(sad=0.5, angry=0.5))
    assert emotion.parse_emotion("happy@1")[0][0] == 1                       # one palette: from the beginning


@pytest.mark.parametrize("text, said", [
    ("hapy", "happy"), ("", "no emotion ''"), ("happy,", "needs a time"), ("happy+", "no emotion ''"),
    ("happy:x", "'x'"), ("happy:", "''"), ("happy:nan", "'nan'"), ("happy:inf", "'inf'"),
    ("happy:-0.1", "'-0.1'"),
    ("happy:1.2", "1.2"), ("happy:0.7+sad:0.5", "1.2"), ("happy:0.5+joy:0.2", "twice"),
    ("happy, sad", "needs a time"), ("happy, sad@x", "'x'"), ("happy@-1, sad@2", "'-1'"),
    ("happy, sad@2, angry@2", "rise"),
    ("happy, sad@3, angry@2", "rise"), ("happy, sad@8", "past the end"), ("happy, sad@nan", "'nan'")])
def test_what_cannot_be_meant_is_refused_with_a_sentence(text, said):
    with pytest.raises(InputError) as error:
        emotion.parse_emotion(text, seconds=8)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name_is_answered_with_the_seven():
    with pytest.raises(InputError) as error:
        emotion.parse_palette("content")
    assert all(name in str(error.value) for name in EMOTIONS)


def test_describe():
    schedule = emotion.Schedule(emotion.parse_emotion("calm, happy:0.6+surprised:0.4@2.5"), 0.5)
    assert schedule.describe() == "neutral 1; from 2.5 s happy 0.6, surprised 0.4 (intensity 0.5)"
    assert emotion.describe(weights(happy=0.4, surprised=0.56, sad=0.04)) == "surprised 0.56, happy 0.4"
    assert emotion.describe(torch.zeros(7)) == "none"


# ---- time --------------------------------------------------------------------------------------------------

def moods(text, parts, intensity=1.0):
    schedule = emotion.Schedule(emotion.parse_emotion(text), intensity)
    return torch.cat([schedule(torch.zeros(n, 5)) for n in parts])


def test_moods_do_not_depend_on_how_the_rows_come():
    whole = moods("happy, sad@1, angry:0.5@3", [100])
    assert whole.shape == (100, 7) and torch.equal(whole,
                                                   moods("happy, sad@1, angry:0.5@3", [1, 0, 24, 30, 45]))


def test_a_fade_is_a_raised_cosine_of_ten_frames_from_the_time_given():
    x = moods("happy, sad@1", [50])
    assert torch.equal(x[: FPS + 1], weights(happy=1).expand(FPS + 1, 7))
    torch.testing.assert_close(x[FPS + 5], weights(happy=0.5, sad=0.5))
    assert torch.allclose(x[FPS + 10:], weights(sad=1), atol=1e-6)
    share = x[FPS:FPS + 11, EMOTIONS.index("sad")]
    torch.testing.assert_close(share, 0.5 - 0.5 * torch.cos(math.pi * torch.arange(11) / 10))
    torch.testing.assert_close(x.sum(1), torch.ones(50))


def test_fades_that_overlap_stay_weights():
    x = moods("happy, sad@1, angry@1.1, afraid@1.2, neutral@1.3", [60])
    assert x.min() > -1e-6 and x.max() < 1 + 1e-6
    torch.testing.assert_close(x.sum(1), torch.ones(60))
    torch.testing.assert_close(x[-1], weights(neutral=1), atol=1e-6, rtol=0)


def test_equal_palettes_in_a_row_are_one():
    torch.testing.assert_close(moods("happy:0.6, happy:0.6@0.5, happy:0.6@1", [40]), moods("happy:0.6", [40]))


def test_intensity_goes_to_calm_and_beyond():
    torch.testing.assert_close(moods("happy:0.6+sad:0.4", [1], 0.5)[0],
                               weights(happy=0.3, sad=0.2, neutral=0.5))
    torch.testing.assert_close(moods("happy", [1], 0)[0], weights(neutral=1))
    torch.testing.assert_close(moods("happy", [1], 1.5)[0], weights(happy=1.5))
    assert torch.equal(emotion.intensify(torch.zeros(3, 7), 1.5), torch.zeros(3, 7))   # no opinion stays none


# ---- voice -------------------------------------------------------------------------------------------------

@pytest.fixture
def voice():
    torch.manual_seed(0)
    model = emotion.VoiceEmotion(emotion.VoiceConfig(audio_dim=12, parts=2, width=8, memory=1.0)).eval()
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def loud(count, seed=1):
    return 0.5 + torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def test_statistics_are_those_of_the_loud_rows():
    """A second half of silence changes nothing; without forgetting they are plain means."""
    voice = emotion.VoiceEmotion(emotion.VoiceConfig(audio_dim=12, parts=2, width=8, memory=1e9))
    rows, pause = 3 + torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), torch.full((40, 12),
        -5.0)
    pooled, speech_frames, _ = voice.pool(torch.cat([rows, pause])[None])
    x = rows.unflatten(1, (2, 6)) @ voice.cepstrum
    want = torch.cat([x.mean((0, 1)), x.mean(1).std(0, correction=0), (x[:, 1] - x[:, 0]).abs().mean(0),
                      F.pad(x.mean(1).diff(dim=0).abs(), (0, 0, 1, 0)).mean(0)])
    torch.testing.assert_close(pooled[0, 39], want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pooled[0, -1], want, atol=1e-3, rtol=1e-3)
    assert speech_frames[0, -1].item() == pytest.approx(40, abs=0.1)


def test_what_is_heard_does_not_depend_on_how_the_rows_come(voice):
    rows = loud(700)
    one, other = emotion.FromVoice(voice), emotion.FromVoice(voice)
    whole = one(rows)
    assert whole.shape == (700, 7)
    torch.testing.assert_close(whole, torch.cat([other(part) for part in rows.split([1, 0, 12, 300, 387])]),
                               atol=1e-5, rtol=1e-4)
    assert one.describe() == f"from the voice: {emotion.describe(whole.mean(0))} on average"
    assert [part.shape for part in one.state] == [(1, 1, 4 * 6 + 1), (1, 1, 1), (1, 1, 6)]   # constant memory


def test_the_past_alone_decides(voice):
    rows = loud(60)
    changed = torch.cat([rows[:40], rows[40:] + 1])
    torch.testing.assert_close(emotion.FromVoice(voice)(rows)[:40], emotion.FromVoice(voice)(changed)[:40])


def test_weights_grow_with_what_was_heard_and_add_up_to_one(voice):
    total = emotion.FromVoice(voice)(2 + loud(100)).sum(1)
    assert total[0] < 0.1 and (total.diff() > -1e-6).all() and total[-1] == pytest.approx(1, abs=1e-5)
    assert emotion.FromVoice(voice)(torch.full((100, 12), -2.0)).sum(1).max() < 0.01       # nobody has spoken


def test_a_pause_keeps_the_last_mood(voice):
    mood = emotion.FromVoice(voice)(torch.cat([2 + loud(50), torch.full((60, 12), -2.0)]))
    torch.testing.assert_close(mood[50:], mood[49].expand(60, 7), atol=2e-3, rtol=0)
    assert (mood[30] - mood[49]).abs().max() > 1e-3                          # while somebody speaks it moves


def test_an_old_mood_is_forgotten(voice):
    hear, fresh, later = emotion.FromVoice(voice), emotion.FromVoice(voice), 1 + loud(300, 2)
    hear(3 + loud(100))
    torch.testing.assert_close(hear(later)[-1], fresh(later)[-1], atol=1e-3, rtol=0)


def test_emotions_scale_what_is_heard(voice):
    rows = 2 + loud(60)
    plain = emotion.FromVoice(voice)(rows)
    torch.testing.assert_close(emotion.FromVoice(voice, 0.5)(rows), emotion.intensify(plain, 0.5))


# ---- words -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random text encoder, saved as the hub serves one."""
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word.strip(",") for prompts in emotion.PROMPTS for prompt in prompts
                    for word in prompt.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *words])
                                      + "\n")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=6 + len(words), hidden_size=32, num_hidden_layers=2,
                         num_attention_heads=2, intermediate_size=64)).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_prompt_is_its_emotion(bert):
    for k, prompts in enumerate(emotion.PROMPTS):
        for prompt in (prompts[0], prompts[2].upper()):
            palette = emotion.text_palette(prompt, bert)
            assert palette.argmax() == k and palette.sum() == pytest.approx(1,
                abs=1e-5) and palette.min() >= 0


def test_words_that_cannot_be_read_are_refused(bert, tmp_path):
    with pytest.raises(InputError, match="is empty"):
        emotion.text_palette("  ", bert)
    with pytest.raises(InputError, match="cannot load the text model"):
        emotion.text_palette("a smile", tmp_path / "none")
