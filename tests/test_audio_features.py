"""Sound features: transformers' numbers, in time with the video, the same in chunks as at once."""
import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from media import audio_features

torch.manual_seed(0)
SPEECHLIKE = 0.05 * torch.randn(2, 50000) * (torch.arange(50000) / 2500).sin().abs()


def test_mel_filters_equal_transformers():
    theirs = mel_filter_bank(201, 80, 0.0, 8000.0, 16000, norm=None, mel_scale="htk")
    np.testing.assert_allclose(audio_features.mel_filters().numpy(), theirs, atol=1e-5)


def test_mel_values_equal_transformers():
    x = SPEECHLIKE[0, :640 * 20]
    padded = torch.nn.functional.pad(x, (audio_features.CONTEXT, audio_features.CONTEXT)).numpy()
    theirs = spectrogram(padded, window_function(400, "hann"), 400, 160, power=2.0, center=False,
                         mel_floor=1e-4,
                         mel_filters=mel_filter_bank(201, 80, 0.0, 8000.0, 16000, norm=None, mel_scale="htk"))
    theirs = (np.log10(theirs.T) - audio_features.MEL_MEAN) / audio_features.MEL_STD  # (80 spectra, 80 bins)
    ours = audio_features.extract_features(x[None])[0]
    assert ours.shape == (20, audio_features.FEATURE_DIM["mel"])
    np.testing.assert_allclose(ours.reshape(80, 80).numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("samples, count",
                         [(1, 1), (319, 1), (640, 1), (959, 1), (961, 2), (1600, 2), (16000, 25)])
def test_one_row_per_video_frame(samples, count):
    rows = audio_features.extract_features(torch.ones(3, samples) * 0.1)
    assert rows.shape == (3, count, 320) and audio_features.num_frames(samples) == count
    assert rows.isfinite().all()


def test_a_click_lands_in_its_own_frame():
    wave = torch.zeros(1, 640 * 9)
    wave[0, 640 * 4 + 320] = 1  # the middle of frame 4
    loudness = audio_features.extract_features(wave)[0].amax(1)
    assert loudness.argmax() == 4
    floor = (-4 - audio_features.MEL_MEAN) / audio_features.MEL_STD
    torch.testing.assert_close(loudness[[0, 1, 2, 3, 5, 6, 7, 8]], torch.full((8,), floor))


def test_a_tone_peaks_at_its_mel_bin():
    tone = 0.1 * torch.sin(2 * torch.pi * 1000 * torch.arange(6400) / 16000)
    spectra = audio_features.extract_features(tone[None])[0].view(-1, 80)
    peak = audio_features.mel_filters()[25].argmax()  # 1000 Hz is FFT bin 25
    assert (spectra[2:-2].argmax(1) == peak).all()


def test_rows_of_a_batch_are_independent():
    both, second = (audio_features.extract_features(x) for x in (SPEECHLIKE, SPEECHLIKE[1:]))
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)


def pieces(wave, sizes):
    """Cut (S,) into chunks whose sizes cycle through `sizes`."""
    at, i = 0, 0
    while at < len(wave):
        yield wave[at:at + sizes[i % len(sizes)]]
        at, i = at + sizes[i % len(sizes)], i + 1


@pytest.mark.parametrize("sizes", [(1000,), (640,), (7, 0, 5000, 1), (50000,), (121,)])
@pytest.mark.parametrize("samples", [50000, 50001, 640 * 70 + 200, 500, 100])
def test_chunks_equal_whole(sizes, samples):
    wave = SPEECHLIKE[0, :samples]
    rows = torch.cat(list(audio_features.stream_features(pieces(wave, sizes))))
    torch.testing.assert_close(rows, audio_features.extract_features(wave[None])[0], atol=1e-5, rtol=0)


def test_streaming_keeps_little_and_answers_early():
    largest = 0
    given = 0

    def source():
        nonlocal given
        for _ in range(200):
            given += 1
            yield SPEECHLIKE[0, :1600]

    for i, rows in enumerate(audio_features.stream_features(source())):
        largest = max(largest, len(rows))
        assert given <= i + 2  # each chunk is answered before the next but one is asked for
    assert largest <= 3


def test_unknown_kind_and_bad_shape_are_refused():
    with pytest.raises(ValueError, match="mel.*whisper.*'mfcc'"):
        audio_features.extract_features(SPEECHLIKE, kind="mfcc")
    for bad in (torch.zeros(100), torch.zeros(1, 0)):
        with pytest.raises(ValueError, match="S > 0"):
            audio_features.extract_features(bad)


# ---- loudness ----------------------------------------------------------------------------------------------

def loud_rms(wave):
    power = wave[..., :len(wave) // 640 * 640].view(-1, 640).square().mean(1)
    return power[power > power.max() / 30].mean().sqrt().item()


def test_level_makes_recordings_alike():
    a, b = (audio_features.normalise_loudness(wave) for wave in (SPEECHLIKE[0], SPEECHLIKE[0] / 20))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert 0.09 < loud_rms(a) < 0.12
    torch.testing.assert_close(audio_features.normalise_loudness(SPEECHLIKE)[0], a)
    torch.testing.assert_close(audio_features.extract_features(a[None]),
                               audio_features.extract_features(b[None]), atol=1e-3, rtol=0)


def test_pauses_do_not_count_as_quiet_speech():
    pause = torch.zeros(3 * 50000)
    padded = torch.cat([pause, SPEECHLIKE[0], pause + 1e-5 * torch.randn(len(pause))])
    ours, plain = audio_features.loudness_gain([padded]), audio_features.loudness_gain([SPEECHLIKE[0]])
    assert 0.7 < ours / plain < 1.4


@pytest.mark.parametrize("wave", [torch.zeros(16000), 1e-4 * torch.randn(16000), 0.003 * torch.randn(16000),
                                  torch.zeros(1), 0.01 * torch.sin(torch.arange(16000) * 0.05)])
def test_silence_and_noise_floor_are_not_raised(wave):
    torch.testing.assert_close(audio_features.normalise_loudness(wave), wave)
    assert audio_features.extract_features(audio_features.normalise_loudness(wave)[None]).isfinite().all()


def test_gain_of_chunks_equals_whole():
    whole = audio_features.loudness_gain([SPEECHLIKE[0]])
    gain = audio_features.loudness_gain(pieces(SPEECHLIKE[0], (333, 4000, 0, 1)))
    assert gain == pytest.approx(whole, rel=1e-5)
    assert audio_features.loudness_gain([]) == 1.0


def gains(wave, given):
    """What streaming_gain did to each frame of `given`, in dB."""
    return torch.stack([10 * (y.square().mean() / x.square().mean()).log10()
                        for y, x in zip(wave, given.split(640), strict=True)])


@pytest.mark.parametrize("sizes", [(1000,), (640,), (7, 0, 5000, 1), (50000,)])
def test_running_level_does_not_depend_on_the_pieces(sizes):
    """Bit for bit: the sound, and as it always comes in the same frames, its features."""
    for samples in (50000, 639, 0):
        wave = SPEECHLIKE[0, :samples]
        whole = list(audio_features.streaming_gain([wave]))
        parts = list(audio_features.streaming_gain(pieces(wave, sizes)))
        assert [len(frame) for frame in parts] == [len(frame) for frame in wave.split(640) if len(frame)]
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_running_level_hears_nothing_of_the_future():
    """Sound comes out before more is asked for, and what comes later changes nothing."""
    taken = []
    frames = (taken.append(k) or SPEECHLIKE[0, 640 * k:640 * (k + 1)] for k in range(70))
    live = audio_features.streaming_gain(frames)
    for k in range(70):
        next(live)
        assert len(taken) == k + 1
    other = torch.cat([SPEECHLIKE[0, :32000], 0.9 * torch.randn(18000)])
    a, b = (list(audio_features.streaming_gain([wave])) for wave in (SPEECHLIKE[0], other))
    assert all(torch.equal(x, y) for x, y in zip(a[:50], b[:50], strict=True))
    assert not torch.equal(a[50], b[50])


@pytest.mark.parametrize("scale", [0.05, 1, 15])
def test_running_level_comes_to_the_level_of_the_whole(scale):
    wave = scale * torch.cat([SPEECHLIKE[0], SPEECHLIKE[1]])
    whole = 20 * np.log10(audio_features.loudness_gain([wave]))
    live = gains(list(audio_features.streaming_gain([wave])), wave)
    assert (live[75:] - whole).abs().max() < 1.5 and (live[25:] - whole).abs().max() < 6


def test_running_level_holds_through_a_pause_and_turns_down_at_once():
    hiss = 1e-3 * torch.randn(640 * 500)
    pause = gains(list(audio_features.streaming_gain([SPEECHLIKE[0], hiss])),
                  torch.cat([SPEECHLIKE[0], hiss]))
    assert abs(pause[-1] - pause[75]) < 2
    shout = torch.cat([0.05 * SPEECHLIKE[0], 5 * SPEECHLIKE[1]])
    gain = gains(list(audio_features.streaming_gain([shout])), shout)           # the shout begins in frame 78
    assert gain[75] > 15 and gain[88:].max() < 0


@pytest.mark.parametrize("wave", [torch.zeros(16000), 1e-4 * torch.randn(16000), 0.003 * torch.randn(16000)])
def test_running_level_does_not_raise_silence_and_noise_floor(wave):
    torch.testing.assert_close(torch.cat(list(audio_features.streaming_gain([wave]))), wave)


def test_running_level_keeps_little(monkeypatch):
    most, gain_of = [], audio_features.gain_from_power
    monkeypatch.setattr(audio_features, "GAIN_HISTORY", 20)

    def count(power):
        most.append(len(power))
        return gain_of(power)

    monkeypatch.setattr(audio_features, "gain_from_power", count)
    assert len(list(audio_features.streaming_gain([SPEECHLIKE[0]] * 3))) == 235
    assert max(most) == 20 and min(most[20:]) >= 10


# ---- whisper -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    """A tiny random Whisper in the hub's own format; its window is 2 s (100 states, 50 video frames)."""
    torch.manual_seed(1)
    config = WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                           vocab_size=32,
                           decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=80,
                           max_source_positions=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                           decoder_start_token_id=1)
    folder = tmp_path_factory.mktemp("whisper")
    WhisperModel(config).save_pretrained(folder)
    return str(folder)


def direct(folder, wave):
    """States of one window, straight from transformers: (100, 16)."""
    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    inputs = extract(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        return WhisperModel.from_pretrained(folder).eval().encoder(inputs).last_hidden_state[0]


def test_whisper_rows_are_pairs_of_encoder_states(whisper_folder):
    wave = SPEECHLIKE[:, :640 * 30]
    rows = audio_features.extract_features(wave, kind="whisper", model=whisper_folder)
    assert rows.shape == (2, 30, 32)
    for row, sound in zip(rows, wave, strict=True):
        states = direct(whisper_folder, sound)
        torch.testing.assert_close(row[7], torch.cat([states[14], states[15]]), atol=1e-5, rtol=0)
        torch.testing.assert_close(row.reshape(60, 16), states[:60], atol=1e-5, rtol=0)


def test_whisper_windows_overlap_and_keep_their_centres(whisper_folder):
    wave = SPEECHLIKE[0]  # 78 frames: two windows of 50, overlapping by 12
    rows = audio_features.extract_features(wave[None], kind="whisper", model=whisper_folder)[0]
    assert rows.shape == (78, 32)
    first, second = direct(whisper_folder, wave[:32000]), direct(whisper_folder, wave[38 * 640:])
    torch.testing.assert_close(rows[:44].reshape(88, 16), first[:88], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[44:].reshape(68, 16), second[12:80], atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [50000, 32000, 32200, 100])
def test_whisper_chunks_equal_whole(whisper_folder, samples):
    wave = SPEECHLIKE[0, :samples]
    whole = audio_features.extract_features(wave[None], "whisper", whisper_folder)[0]
    rows = torch.cat(list(audio_features.stream_features(pieces(wave, (900, 12345)), "whisper",
                                                         whisper_folder)))
    assert len(rows) == audio_features.num_frames(samples)
    torch.testing.assert_close(rows, whole, atol=1e-5, rtol=0)


def test_whisper_runs_where_the_sound_is(whisper_folder, monkeypatch):
    encoder, places = audio_features.load_whisper(whisper_folder), []
    monkeypatch.setattr(encoder, "to", places.append)
    audio_features.extract_features(SPEECHLIKE[:1, :16000], "whisper", whisper_folder)
    assert places == [SPEECHLIKE.device]


def test_a_missing_whisper_is_explained(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere.*folder") as error:
        audio_features.extract_features(SPEECHLIKE, kind="whisper", model=missing)
    assert "\n" not in str(error.value)
