"""A synthetic voice whose mouth is known: speech without data.

    random phones -> smoothed articulators --+--> jaw, lip_width                       what the renderer draws
    (a seed fixes     (jaw, lips, tongue,    |
     every draw)       lip closure)          +--> formants -> pulses and noise, filtered -> wave

Sound and mouth come from the same trajectories, so they cannot disagree. Recovering the mouth from the sound
is still not easy: voices differ in pitch, vocal-tract length, tilt, loudness and effort, the microphone
colours the sound and adds noise, neighbouring sounds blend, and people breathe in pauses with the mouth shut.

Sources of the numbers: vowel formants, Peterson & Barney 1952 (means over men); resonators and the
consonants' formants and noise bands, after Klatt 1980, rounded; band-limited pulses, Winham & Steiglitz 1970;
how emotion moves a voice, Murray & Arnott 1993 and Scherer 2003 (directions theirs, sizes ours). The rest is
our choice.
"""
import math

import torch
import torch.nn.functional as F

from media.sound import FPS, SAMPLE_RATE

HOP = 128  # samples per control step (8 ms): five steps are one video frame
STEPS = SAMPLE_RATE // FPS // HOP
WINDOW, FFT = 2 * HOP, 4 * HOP  # a filtered window of 256 samples rings for up to 256 more

# What each emotion adds to the voice: log pitch, log pitch range, log energy, log rate, tilt (dB an octave).
EMOTION_VOICE = {
    "neutral": (0, 0, 0, 0, 0), "happy": (0.22, 0.4, 0.2, 0.1, 1.0), "sad": (-0.12, -0.6, -0.4, -0.2, -2.0),
    "angry": (0.18, 0.4, 0.4, 0.12, 2.0), "afraid": (0.28, 0.1, 0.05, 0.2, -1.0),
    "disgusted": (-0.1, 0.1, -0.05, -0.15, 0.5), "surprised": (0.32, 0.6, 0.15, 0.0, 0.5)}
EMOTIONS = tuple(EMOTION_VOICE)

# F1 F2 F3 in Hz of a man, lips (-1 rounded .. 1 spread), milliseconds, and for consonants: voicing, breath
# (noise through the formants), hiss (noise at teeth or lips) and its centre and width in Hz.
REST = (1.0, 0.0, 0.0, 3000, 2000)
VOWELS = {
    "i": (270, 2290, 3010, 1.0, 110), "I": (390, 1990, 2550, 0.7, 90), "e": (530, 1840, 2480, 0.6, 110),
    "ae": (660, 1720, 2410, 0.5, 130), "a": (730, 1090, 2440, 0.1, 140), "o": (570, 840, 2410, -0.7, 130),
    "U": (440, 1020, 2240, -0.8, 90), "u": (300, 870, 2240, -1.0, 110), "uh": (500, 1400, 2450, 0.0, 70),
    "y": (270, 1850, 2150, -1.0, 110)}
CONSONANTS = {
    "m": (200, 1000, 2200, 0.0, 90, 0.35, *REST[1:]), "n": (280, 1500, 2500, 0.1, 70, 0.35, *REST[1:]),
    "b": (200, 900, 2100, 0, 90, 0.1, 0, 0.2, 1000, 800),
    "p": (200, 900, 2100, 0, 100, 0, 0.4, 0.3, 1000, 800),
    "d": (270, 1750, 2700, 0.2, 70, 0.1, 0, 0.5, 4000, 1500),
    "t": (270, 1750, 2700, 0.2, 80, 0, 0.4, 0.8, 4500, 1500),
    "g": (300, 1900, 2300, 0.1, 70, 0.1, 0, 0.5, 2000, 600),
    "k": (300, 1900, 2300, 0.1, 80, 0, 0.4, 0.7, 2200, 600),
    "s": (290, 1500, 2550, 0.5, 100, 0, 0, 0.7, 6000, 1200),
    "z": (290, 1500, 2550, 0.5, 80, 0.3, 0, 0.35, 6000, 1200),
    "sh": (310, 1750, 2500, -0.6, 100, 0, 0, 0.9, 3200, 900),
    "f": (250, 1100, 2200, 0, 90, 0, 0, 0.15, 5000, 3500),
    "h": (450, 1450, 2450, 0.0, 60, 0, 0.45, *REST[2:]), "l": (350, 1150, 2650, 0.1, 60, 0.6, *REST[1:]),
    "r": (350, 1150, 1600, -0.4, 60, 0.6, *REST[1:]), "w": (290, 700, 2200, -1.0, 70, 0.5, *REST[1:])}
PAUSE = (200, 1500, 2500, 0, 0, 0, *REST[1:])
PHONES = {"pause": PAUSE, **{k: (*x, *REST) for k, x in VOWELS.items()}, **CONSONANTS}
PHONES = {k: (*x, k in "mbp", k in "bpdtgk") for k, x in PHONES.items()}  # lips closed; stops: a late noise
F1_CLOSED, F1_SPAN, F2_LIPS = 200.0, 560.0, 300.0  # F1 rises with the jaw, F2 with the spread of the lips


def _mix(x):
    """The finaliser of splitmix64 on int64 tensors (products wrap, shifts are made logical)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - 2**64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(seeds, n, stream):
    """Draw numbers in [0, 1): seeds (B,) int64 -> (B, n) float32.

    Draw i of a seed and stream is a hash of the three: the same on every device, in every batch, for every n.
    """
    golden = 0x9E3779B97F4A7C15 - 2**64
    key = _mix(_mix(seeds) + torch.full_like(seeds, stream) * golden)
    counter = torch.arange(1, n + 1, device=seeds.device) * golden
    return ((_mix(key[:, None] + counter) >> 40) & 0xFFFFFF).float() / 2**24  # (B, n)


def smooth(x, width):
    """Weighted mean over `width` (odd) control steps under a raised cosine: (B, T, K) -> (B, T, K)."""
    weight = torch.hann_window(width + 2, periodic=False, device=x.device)[1:-1]
    half = width // 2
    x = torch.cat([x[:, :1].expand(-1, half, -1), x, x[:, -1:].expand(-1, half, -1)], 1)
    return (x.unfold(1, width, 1) * (weight / weight.sum())).sum(-1)


def voice(seeds, emotion=None):
    """Draw who speaks, how, into what microphone -> dict of (B, 1) numbers, tract (B, 3), emotion (B, 7).

    emotion: weights (B, 7) in the order of EMOTIONS in place of those that the seeds draw.
    """
    u = uniform(seeds, 22, 1)[..., None]  # (B, 22, 1)
    strength, share = u[:, 0] ** 1.5, 0.7 + 0.3 * u[:, 1]  # most clips are mostly neutral
    first, second = (1 + (6 * u[:, i, 0]).long() for i in (2, 3))
    if emotion is None:
        one_hot = torch.eye(7, device=seeds.device)
        mixed = share * one_hot[first] + (1 - share) * one_hot[second]
        emotion = (1 - strength) * one_hot[0] + strength * mixed
    effects = torch.tensor(list(EMOTION_VOICE.values()), device=seeds.device)
    mood = (emotion[:, :, None] * effects).sum(1)  # (B, 5)
    size = u[:, 4]  # 0 a large man .. 1 a small woman: pitch and formants rise together, loosely
    return {
        "emotion": emotion,
        "pitch": (math.log(90) + 0.95 * size + 0.25 * (u[:, 5] - 0.5) + mood[:, 0:1]).exp().clamp(80, 300),
        "range": 0.18 * (0.6 + 0.8 * u[:, 6]) * mood[:, 1:2].exp(),
        "tract": 0.94 + 0.17 * size + 0.16 * u[:, [7, 20, 21], 0],  # (B, 3): each formant has its own factor
        "effort": (0.78 + 0.4 * u[:, 8]) * (0.5 * mood[:, 2:3]).exp(),  # a louder voice opens the mouth wider
        "energy": mood[:, 2:3].exp() * 10 ** ((u[:, 8] - 0.5) * 0.4),
        "rate": (0.75 + 0.6 * u[:, 9]) * mood[:, 3:4].exp(),
        "tilt": -7.5 + 5 * u[:, 10] + mood[:, 4:5],  # dB per octave, of glottis and radiation together
        "breath": 0.02 + 0.10 * u[:, 11] ** 2,
        "lips": 0.7 + 0.3 * u[:, 12],
        "gain": 10 ** (-1.0 * u[:, 13] - 1.3),  # the microphone: 20 dB between recordings
        "snr": 15 + 45 * u[:, 14],
        "noise_tilt": -4 * u[:, 15],
        "eq_tilt": 4 * (u[:, 16] - 0.5),
        "eq_bump": 0.8 * (u[:, 17] - 0.5),
        "eq_place": 300 * 20 ** u[:, 18],
        "cutoff": 3800 * 2.2 ** u[:, 19],
    }


def phones(seeds, v, steps):
    """Draw what is said -> PHONES (B, T, 12); stress, loudness, accent (B, T, 3); steps since a pause (B, T).

    A syllable is [pause] [consonant] vowel [consonant]; a part that is absent lasts no time.
    """
    syllables = 2 + steps * HOP // 800  # none is shorter than 50 ms
    u = uniform(seeds, syllables * 10, 2).view(len(seeds), syllables, 10)
    table = torch.tensor(list(PHONES.values()), device=seeds.device)
    vowel = 1 + (len(VOWELS) * u[..., 0]).long()  # rows of PHONES
    onset, coda = (1 + len(VOWELS) + (len(CONSONANTS) * u[..., i]).long() for i in (1, 2))
    kind = torch.stack([torch.zeros_like(vowel), onset, vowel, coda], 2)  # (B, Y, 4)
    stress = u[..., 3]
    stretch = (0.8 + 0.4 * u[..., 4] + 0.5 * stress ** 2) / v["rate"]  # (B, Y)
    seconds = table[kind, 4] / 1000 * stretch[..., None]  # (B, Y, 4)
    pausing = u[..., 5] < 0.13
    pausing[:, 0] = u[:, 0, 5] < 0.6
    seconds[..., 0] = pausing * (0.2 + 0.8 * u[..., 6] ** 1.5)
    seconds[..., 1] *= u[..., 7] < 0.85
    seconds[..., 3] *= u[..., 8] < 0.35
    ends = seconds.flatten(1).cumsum(1).contiguous()  # (B, 4Y)
    now = (torch.arange(steps, device=seeds.device) + 0.5) * (HOP / SAMPLE_RATE)
    index_of_phone = torch.searchsorted(ends, now.expand(len(seeds), -1).contiguous(),
                                        right=True).clamp(max=ends.shape[1] - 1)
    phone = table[kind.flatten(1).gather(1, index_of_phone)]  # (B, T, 12)
    left = ends.gather(1, index_of_phone) - now  # seconds until this phone ends
    closing = (phone[..., 11] > 0) & (left > 0.024)  # a stop is silent, then releases
    released = (phone[..., 11] > 0) & ~closing
    phone[..., 6:8] *= ~closing[..., None]
    phone[..., 10] *= ~released
    power = 10 ** (0.8 * (u[..., 9] - 0.7) + 0.15 * stress)
    how = torch.stack([0.75 + 0.35 * stress, power, stress - 0.5], 2)
    index = torch.arange(steps, device=seeds.device).expand_as(index_of_phone)
    since = index - torch.where(index_of_phone % 4 == 0, index, 0).cummax(1).values
    return phone, how.gather(1, (index_of_phone // 4)[..., None].expand(-1, -1, 3)), since


def excitation(seeds, pitch):
    """Pitch (B, T) in Hz at control steps -> (pulses, noise), each (B, T * HOP), of about unit power."""
    pitch = F.interpolate(pitch[:, None], scale_factor=HOP, mode="linear")[:, 0]  # (B, S)
    cycle = (pitch.double() / SAMPLE_RATE).cumsum(1)
    angle = math.pi * (cycle - cycle.round()).float()  # half the phase, in [-pi/2, pi/2]
    harmonics = (7800 / pitch).floor()
    angle = torch.where(angle.abs() < 1e-5, 1e-5, angle)
    pulses = ((2 * harmonics + 1) * angle).sin() / (2 * angle.sin()) - 0.5  # sum of cosines 1 .. harmonics
    noise = uniform(seeds, pitch.shape[1], 3) - 0.5
    return pulses * (2 / harmonics).sqrt(), noise * math.sqrt(12)


def resonances(formants, bandwidths):
    """Formants (B, T, 3) in Hz -> complex response (B, T, FFT/2+1) of three resonators.

    It is relative to three broad ones at 500, 1500 and 2500 Hz, which stand for the resonances above, so that
    the response stays level at high frequency.
    """
    f = torch.arange(FFT // 2 + 1, device=formants.device) * (SAMPLE_RATE / FFT)
    top, bottom = 1, 1
    for i, (neutral, width) in enumerate(zip((500.0, 1500.0, 2500.0), bandwidths, strict=True)):
        top = top * torch.complex(1 - (f / neutral) ** 2, f * 700 / neutral ** 2)
        inverse = 1 / formants[..., i:i + 1] ** 2
        bottom = bottom * torch.complex(1 - f ** 2 * inverse, f * width * inverse)
    return top / bottom


def source_filter(seeds, v, pitch, levels, formants, hiss_band):
    """Shape pulses and noise window by window and overlap-add them -> sound (B, T * HOP).

    levels (B, T, 3): voicing, breath, hiss; formants (B, T, 3), hiss_band (centre, width) (B, T, 2) in Hz.
    """
    B, T = pitch.shape
    hann = torch.hann_window(WINDOW, device=pitch.device)
    pad = (WINDOW - HOP) // 2  # window t is centred on control step t
    pulses, noise = (torch.fft.rfft(F.pad(x, (pad, pad)).unfold(1, WINDOW, HOP) * hann, FFT)
                     for x in excitation(seeds, pitch))  # (B, T, FFT/2+1)
    f = torch.arange(FFT // 2 + 1, device=pitch.device) * (SAMPLE_RATE / FFT)
    octaves = (f.clamp(min=100) / 1000).log2()
    decibels = {name: v[name] * octaves for name in ("tilt", "noise_tilt", "eq_tilt")}  # (B, FFT/2+1)
    bump = v["eq_bump"] * (-((f.clamp(min=50) / v["eq_place"]).log2() ** 2)).exp()
    microphone = 10 ** (decibels["eq_tilt"] / 20) * bump.exp() * f ** 2 / (f ** 2 + 70 ** 2)
    microphone = microphone * v["gain"] / (1 + (f / v["cutoff"]) ** 8)
    tract = resonances(formants, (80, 100, 150))
    tilt = 10 ** (decibels["tilt"] / 20)[:, None]
    room = 1.5 * 10 ** ((decibels["noise_tilt"] - v["snr"]) / 20)[:, None]
    voicing, breath, hiss = levels[..., None].unbind(2)
    rush = hiss * (-0.5 * ((f - hiss_band[..., :1]) / hiss_band[..., 1:]) ** 2).exp()
    spectrum = (pulses * (voicing * tilt) + noise * breath) * tract + noise * (rush + room)
    blocks = torch.fft.irfft(spectrum * microphone[:, None], FFT).view(B, T, FFT // HOP, HOP)
    sound = torch.zeros(B, T + FFT // HOP, HOP, device=pitch.device)
    for i in range(FFT // HOP):
        sound[:, i:i + T] += blocks[:, :, i]
    return sound.flatten(1)[:, pad:pad + T * HOP]


@torch.no_grad()
def speak(seeds, frames, emotion=None):
    """Speak, (B,) int64 -> dict of wave (B, frames * 640), jaw and lip_width (B, frames), emotion (B, 7).

    wave: 16 kHz, in [-1, 1]; jaw: in [0, 1], 0 is shut; lip_width: in [-1, 1], rounded to spread, 0 at rest;
    emotion: weights in the order of EMOTIONS.

    Everything is a function of the seed alone, and a longer clip begins with the shorter one. emotion (B, 7):
    the mood of the voice in place of the seed's own.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    steps = (frames + 4) * STEPS  # the extra frames let the mouth prepare what is said after the end
    v = voice(seeds, emotion)
    phone, how, since = phones(seeds, v, steps)
    F1, F2, F3, lips, _, voicing, breath, hiss, centre, width, closed, _ = phone.unbind(2)  # each (B, T)
    stress, loud, accent = how.unbind(2)
    opening = ((F1 - F1_CLOSED) / F1_SPAN * stress * v["effort"]).clamp(0, 1)
    slow = [opening, lips * v["lips"], F2 - F2_LIPS * lips, F3]
    opening, lips, tongue, F3 = smooth(torch.stack(slow, 2), 15).unbind(2)  # 64 ms wide at half height
    inhaling = 0.2 * loud * (since == 0)
    breath = breath * loud + voicing * v["breath"] + inhaling
    quick = [voicing * loud * v["energy"], breath, hiss * loud, closed]
    *levels, closed = smooth(torch.stack(quick, 2), 5).unbind(2)
    jaw = opening * (1 - closed)

    F1 = F1_CLOSED + F1_SPAN * jaw
    formants = torch.stack([F1, (tongue + F2_LIPS * lips).clamp(min=600), F3], 2) * v["tract"][:, None]
    seconds = since * (HOP / SAMPLE_RATE)
    melody = 2 * v["range"] * accent - 0.08 * seconds.clamp(max=3)  # accents, and a fall over each phrase
    jitter = 0.02 * (uniform(seeds, steps, 4) - 0.5)
    pitch = v["pitch"] * (smooth(melody[..., None], 25)[..., 0] + jitter).exp()
    wave = source_filter(seeds, v, pitch, torch.stack(levels, 2), formants, torch.stack([centre, width], 2))

    def per_frame(x):
        return x.unflatten(1, (-1, STEPS)).mean(2)[:, :frames]  # (B, F)

    return {"wave": wave[:, :frames * STEPS * HOP].tanh(), "jaw": per_frame(jaw),
            "lip_width": per_frame(lips), "emotion": v["emotion"]}
