"""Sound -> one feature vector per video frame.

    wave (B, S) at 16 kHz --normalise_loudness--> the same at one loudness --extract_features--> (B, F, A)

Two kinds: "mel", a log-mel spectrogram that needs no weights (A = 320), and "whisper", the states of a
Whisper encoder (arXiv 2212.04356), as in the paper (A = twice the model's width). F = num_frames(S). Long
recordings: `loudness_gain`, then `stream_features`, both over chunks of any sizes; the features equal those
of the whole file, and memory does not grow with its length. Live sound, whose end is not known, is levelled
by its past: `streaming_gain` in place of `loudness_gain`.
"""
import functools
import math
from array import array

import torch
import torch.nn.functional as F

from media.files import InputError
from media.sound import SAMPLE_RATE, SAMPLES_PER_FRAME, audio_chunks, rechunk
from media.weights import is_local

BINS, N_FFT, STEP = 80, 400, 160  # mel bins, window of 25 ms, hop of 10 ms
CONTEXT = N_FFT // 2 - STEP // 2  # samples that a frame's mel windows reach beyond the frame, on either side
MEL_FLOOR, MEL_MEAN, MEL_STD = 1e-4, -1.9, 1.5  # of log10 mel power: measured once, on levelled speech
WHISPER = "openai/whisper-tiny"
FEATURE_DIM = {"mel": BINS * SAMPLES_PER_FRAME // STEP, "whisper": 2 * 384}     # of WHISPER: 2 * d_model
LEVEL = 0.1         # RMS of the loud part of a levelled sound
GAIN_HISTORY = 3000  # frames of loudness that streaming_gain remembers


def num_frames(samples):
    """Number of video frames, and so of feature vectors, of a sound: rounded, at least one."""
    return max(1, round(samples / SAMPLES_PER_FRAME))


def loudness_gain(chunks):
    """Compute the factor that brings the loud part of a recording, an iterable of (S_i,), to RMS LEVEL.

    Loud means within 20 dB of the 95th percentile of 40 ms frames, so pauses do not count. Silence (below -66
    dB of full scale) is left alone, a sound without ups and downs (hum, hiss: under 6 dB between the 10th and
    the 95th percentile) is never raised, and nothing is raised by more than 40 dB.
    """
    frames = rechunk((chunk.float().cpu() for chunk in chunks), SAMPLES_PER_FRAME)
    power = array("f", (frame.square().mean().item() for frame in frames))
    return gain_from_power(torch.tensor(power))


def gain_from_power(power):
    """Compute the factor of `loudness_gain` from the power of each frame, (n,)."""
    power = power[power > 1e-12]  # digital silence says nothing about the noise floor
    if len(power) == 0:
        return 1.0
    low, high = power.sort().values[[int(q * (len(power) - 1)) for q in (0.1, 0.95)]].tolist()
    loud = math.sqrt(power[power > high / 100].mean())
    if loud < 10 ** (-66 / 20):
        return 1.0
    steady = high < low * 10 ** (6 / 10)
    return min(LEVEL / loud, 1.0 if steady else 100.0)


def streaming_gain(chunks):
    """Level live sound by its past alone: iterable of (S_i,) -> iterator of frames (640,), the last shorter.

    The gain follows the `loudness_gain` of the past, whatever the chunks: at first as its mean, later within
    a second upwards and a tenth downwards. So the first words of a quiet voice are still quiet. Two minutes
    of loudness are kept; whenever they are full, every other frame is dropped, so that old sound counts ever
    less and memory does not grow.
    """
    power, log_gain = torch.zeros(0), 0.0
    for frame in rechunk(chunks, SAMPLES_PER_FRAME):
        now = frame.square().mean().view(1)
        if now > 1e-12:
            power = torch.cat([power if len(power) < GAIN_HISTORY else power[::2], now])
            step = math.log(gain_from_power(power)) - log_gain
            log_gain += step * max(1 / len(power), 1 / 25 if step > 0 else 1 / 3)
        yield frame * math.exp(log_gain)


def scan_audio(path):
    """Read the sound once -> the gain that levels it, its length in video frames. Raises InputError."""
    sizes = []

    def counted():
        for chunk in audio_chunks(path):
            sizes.append(len(chunk))
            yield chunk

    gain, samples = loudness_gain(counted()), sum(sizes)
    if samples < 0.1 * SAMPLE_RATE:
        raise InputError(f"{path} holds only {samples / SAMPLE_RATE:.2f} s of sound; give 0.1 s or more")
    return gain, num_frames(samples)


def normalise_loudness(wave):
    """Scale whole recordings (..., S), each by its `loudness_gain`."""
    waves = wave.reshape(-1, wave.shape[-1])
    return torch.stack([sound * loudness_gain([sound]) for sound in waves]).view(wave.shape)


def mel_filters():
    """Triangles evenly spaced on the mel scale (O'Shaughnessy 1987), 0 to 8 kHz: (N_FFT/2+1, BINS)."""
    top = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, BINS + 2, dtype=torch.float64) / 2595) - 1)  # (BINS+2,)
    f = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)[:, None]
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    return torch.minimum((f - left) / (centre - left), (right - f) / (right - centre)).clamp(min=0).float()


def mel_features(wave):
    """(B, F * 640 + 2 * CONTEXT) -> (B, F, 320): four log-mel spectra a frame, at 5, 15, 25, 35 ms of it."""
    windows = wave.unfold(-1, N_FFT, STEP) * torch.hann_window(N_FFT, device=wave.device)  # (B, 4F, N_FFT)
    power = torch.fft.rfft(windows).abs().square()  # (B, 4F, N_FFT/2+1)
    mel = (power @ mel_filters().to(wave.device)).clamp(min=MEL_FLOOR).log10()  # (B, 4F, BINS)
    mel = (mel - MEL_MEAN) / MEL_STD
    return mel.unflatten(1, (-1, SAMPLES_PER_FRAME // STEP)).flatten(2)  # (B, F, 320)


def pad_or_trim(wave, count):
    """Cut or zero-pad the end of (..., S), which begins CONTEXT early, to `count` frames and CONTEXT."""
    return F.pad(wave, (0, count * SAMPLES_PER_FRAME + 2 * CONTEXT - wave.shape[-1]))


def stream_mel(chunks):
    """Iterable of (S_i,) -> iterator of (n, 320)."""
    held, samples, done = None, 0, 0
    for chunk in chunks:
        held = F.pad(chunk.float(), (CONTEXT, 0)) if held is None else torch.cat([held, chunk.float()])
        samples += len(chunk)
        ready = (len(held) - 2 * CONTEXT) // SAMPLES_PER_FRAME
        if ready > 0:
            yield mel_features(pad_or_trim(held, ready)[None])[0]
            held, done = held[ready * SAMPLES_PER_FRAME:], done + ready
    if held is not None and num_frames(samples) > done:
        yield mel_features(pad_or_trim(held, num_frames(samples) - done)[None])[0]


@functools.lru_cache(maxsize=2)
def load_whisper(name):
    """The frozen encoder of a Whisper model, by hub id or local folder."""
    from transformers import WhisperModel
    try:
        model = WhisperModel.from_pretrained(name, local_files_only=is_local(name))
        return model.encoder.eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the Whisper model {name!r}: it is neither a folder with config.json "
                         "and model.safetensors nor reachable on the hub; to work offline, download it "
                         "elsewhere and pass the folder's path instead of the id") from error


@torch.no_grad()
def stream_whisper(chunks, model=None):
    """Iterable of (S_i,) -> iterator of (n, 2 * d_model); model: hub id or local folder, None: WHISPER.

    The encoder sees fixed windows (30 s). Windows overlap, and only frames at least an eighth of a window
    away from an inner edge are kept. The encoder gives 50 states a second: two for a frame.
    """
    from transformers import WhisperFeatureExtractor
    encoder = load_whisper(model or WHISPER)
    positions = encoder.config.max_source_positions  # states per window: 1500
    window, margin = positions // 2, positions // 16  # in video frames
    extract = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins, chunk_length=positions // 50)

    def encode(sound):
        spectrum = extract(sound.cpu().numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        encoder.to(sound.device)
        states = encoder(spectrum.to(encoder.conv1.weight)).last_hidden_state  # (1, 2 * window, d_model)
        return states.float().unflatten(1, (-1, 2)).flatten(2)[0]  # (window, 2 * d_model)

    held, samples, skip, done = torch.zeros(0), 0, 0, 0
    for chunk in chunks:
        held, samples = torch.cat([held.to(chunk.device), chunk.float()]), samples + len(chunk)
        while len(held) > window * SAMPLES_PER_FRAME:
            yield encode(held[:window * SAMPLES_PER_FRAME])[skip:window - margin]
            done += window - margin - skip
            held, skip = held[(window - 2 * margin) * SAMPLES_PER_FRAME:], margin
    if samples and num_frames(samples) > done:
        yield encode(held)[skip:skip + num_frames(samples) - done]


def stream_features(chunks, kind="mel", model=None):
    """Iterable of (S_i,) of one levelled recording -> iterator of (n, A), together extract_features' own."""
    if kind not in FEATURE_DIM:
        raise ValueError(f"audio features must be one of {sorted(FEATURE_DIM)}, got {kind!r}")
    return stream_mel(chunks) if kind == "mel" else stream_whisper(chunks, model)


def extract_features(wave, kind="mel", model=None):
    """(B, S) float at 16 kHz, levelled -> (B, F, A), F = num_frames(S)."""
    if wave.ndim != 2 or wave.shape[1] == 0:
        raise ValueError(f"wave must be (B, S) with S > 0, got {tuple(wave.shape)}")
    if kind == "mel":
        return mel_features(pad_or_trim(F.pad(wave.float(), (CONTEXT, 0)), num_frames(wave.shape[1])))
    features = [torch.cat(list(stream_features([sound], kind, model))) for sound in wave]
    return torch.stack(features)  # (B, F, A)


# ---- variation in training ---------------------------------------------------------------------------------

def change_tempo(rows, count):
    """Resample what is known of each frame, (F, n), to `count` frames; mel features as four spectra."""
    if count == len(rows):
        return rows
    parts = 4 if rows.shape[1] == FEATURE_DIM["mel"] else 1
    x = rows.view(len(rows) * parts, -1).T[None]                                       # (1, n/parts, F*parts)
    return F.interpolate(x, size=count * parts, mode="linear")[0].T.reshape(count, -1)


def vary_sound(audio, silence_features, rng):
    """Vary mel features (B, rows, 320) as speakers, microphones and rooms do, alike in all rows of a window.
    The length of the vocal tract (Jaitly & Hinton 2013), loudness, a tilt and gentle waves of the spectrum,
    and for 4 in 10 a floor of noise."""
    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    count, rows, _ = audio.shape
    mel = audio.view(count, rows, -1, BINS)                                            # (B, rows, 4, BINS)
    stretch = torch.exp(0.15 * (2 * torch.rand(count, 1, generator=rng) - 1))          # of the mel axis
    position = (torch.arange(BINS) * stretch).clamp(max=BINS - 1)                      # (B, BINS)
    low, share = position.floor().long(), position.frac()[:, None, None]
    low, high = (k[:, None, None].expand_as(mel) for k in (low, (low + 1).clamp(max=BINS - 1)))
    mel = mel.gather(3, low) * (1 - share) + mel.gather(3, high) * share
    waves = F.interpolate(normal(count, 1, 6), size=BINS, mode="linear", align_corners=True)    # (B, 1, BINS)
    tilt = normal(count, 1, 1) * torch.linspace(-1, 1, BINS)
    mel = mel + (0.25 * normal(count, 1, 1) + 0.2 * tilt + 0.1 * waves)[:, None]
    per_unit = math.log(10) * MEL_STD                                   # natural log of power
    floor = -1.2 + 0.6 * torch.rand(count, 1, 1, 1, generator=rng) + 0.1 * normal(mel.shape)
    floor = torch.where(torch.rand(count, 1, 1, 1, generator=rng) < 0.4, floor, torch.tensor(-10.0))
    mel = torch.logaddexp(mel * per_unit, floor * per_unit) / per_unit
    return mel.flatten(2).maximum(silence_features)
