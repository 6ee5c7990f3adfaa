"""Emotion: seven weights for every frame, from a name, from words or from the voice (after MoEE, arXiv
2501.01808).

    "neutral, happy:0.6+sad:0.4@3"  --parse_emotion--> palettes and times --Schedule--+
    "a bitter smile"  --text_palette, a frozen text encoder--> one palette --Schedule--+--> mood (n, 7)
    speech features   --VoiceEmotion, trained by train_gen.py--> FromVoice ------------+

A mood (..., 7) has the order of EMOTIONS; the experts of generator.py are scaled by it. All zero: no opinion,
the generator without experts. Neutral is an emotion like the others: a calm face. Errors of a user end in
InputError.
"""
import difflib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from media.files import InputError
from media.sound import FPS
from media.weights import is_local
from world.speech import EMOTIONS

ALIASES = {"calm": "neutral", "happiness": "happy", "joy": "happy", "sadness": "sad", "anger": "angry",
           "fear": "afraid", "fearful": "afraid", "disgust": "disgusted", "surprise": "surprised"}
FADE = 0.4                # seconds from one palette to the next
TEXT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PROMPTS = (       # each emotion in words, in the order of EMOTIONS; a text counts by the nearest of the three
    ("neutral", "a calm face without emotion", "serious and composed"),
    ("happy", "smiling with joy", "cheerful, amused, delighted"),
    ("sad", "a face full of sorrow", "unhappy, crying"),
    ("angry", "a face full of rage", "furious, annoyed, outraged"),
    ("afraid", "a face full of fear", "scared, anxious"),
    ("disgusted", "a face full of disgust", "repelled, revolted"),
    ("surprised", "a face full of surprise", "astonished, shocked"))


def parse_number(text, what):
    """Read a float of at least 0 from text; `what` begins the sentence of the error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"{what} is {text.strip()!r}; give a number of at least 0")
    return value


def parse_palette(text):
    """Read "happy:0.6+surprised:0.4" -> weights (7,), the rest neutral. Names without a weight share what the
    others leave. Raises InputError."""
    weights = {}
    for part in text.split("+"):
        name, colon, weight = part.partition(":")
        name = ALIASES.get(name.strip().lower(), name.strip().lower())
        if name not in EMOTIONS:
            near = difflib.get_close_matches(name, [*EMOTIONS, *ALIASES], n=1)
            perhaps = f" (perhaps {near[0]}?)" if near else ""
            raise InputError(f"--emotion: no emotion {name!r}{perhaps}; there are {', '.join(EMOTIONS)}")
        if name in weights:
            raise InputError(f"--emotion names {name} twice in {text.strip()!r}; give one weight")
        weights[name] = parse_number(weight, f"--emotion: the weight of {name}") if colon else None
    total, bare = sum(w or 0 for w in weights.values()), list(weights.values()).count(None)
    if total > 1 + 1e-6:
        raise InputError(f"--emotion: the weights in {text.strip()!r} add up to {total:.3g}; give at most 1 "
                         f"in all")
    weights = {name: (1 - total) / bare if weight is None else weight for name, weight in weights.items()}
    palette = torch.tensor([weights.get(name, 0.0) for name in EMOTIONS])
    palette[0] += (1 - palette.sum()).clamp(min=0)
    return palette


def parse_emotion(text, seconds=math.inf):
    """Read "neutral, happy@2.5, sad@6" -> [(0.0, weights (7,)), (2.5, ...), ...].

    seconds: length of the video, if known. Raises InputError.
    """
    stops = []
    for part in text.split(","):
        palette, at, when = part.partition("@")
        if stops and not at:
            raise InputError(f"--emotion: {palette.strip()!r} needs a time in seconds, as in happy@2.5")
        start = parse_number(when, f"--emotion: the time of {palette.strip()!r}") if at else 0.0
        if stops and start <= stops[-1][0]:
            raise InputError(f"--emotion: times must rise, but {start:g} s comes after {stops[-1][0]:g} s")
        if start >= seconds:
            raise InputError(f"--emotion: {start:g} s is past the end of the sound, {seconds:.2f} s")
        stops.append((start, parse_palette(palette)))
    return stops


def describe(palette):
    """Write weights (7,) as "happy 0.6, surprised 0.4": the largest first, without those below 0.05."""
    ranked = sorted(zip(palette.tolist(), EMOTIONS, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {weight:.2g}" for weight, name in ranked if weight >= 0.05) or "none"


def intensify(mood, intensity):
    """Scale the emotions of mood (..., 7); neutral takes what remains of the sum. 0: a calm face; above 1:
    beyond training."""
    emotions = intensity * mood[..., 1:]
    neutral = mood.sum(-1, keepdim=True) - emotions.sum(-1, keepdim=True)
    return torch.cat([neutral.clamp(min=0), emotions], -1)


class Schedule:
    """Moods of weights in time, each fading into the next: called with speech features (n, A), part after
    part, it returns (n, 7)."""

    def __init__(self, stops, intensity=1.0):
        self.times = FPS * torch.tensor([start for start, _ in stops[1:]])                     # (S-1,) frames
        self.palettes = intensify(torch.stack([palette for _, palette in stops]), intensity)     # (S, 7)
        self.stops, self.intensity, self.done = stops, intensity, 0                        # frames handed out

    def describe(self):
        """Write the schedule as "neutral 1; from 2.5 s happy 0.6, surprised 0.4 (intensity 0.5)"."""
        parts = [f"from {start:g} s " * (k > 0) + describe(palette)
                 for k, (start, palette) in enumerate(self.stops)]
        return "; ".join(parts) + f" (intensity {self.intensity:g})" * (self.intensity != 1)

    def __call__(self, rows):
        frames = self.done + torch.arange(len(rows))
        self.done += len(rows)
        share = ((frames[:, None] - self.times) / (FADE * FPS)).clamp(0, 1)                      # (n, S-1)
        return self.palettes[0] + (0.5 - 0.5 * torch.cos(math.pi * share)) @ self.palettes.diff(dim=0)


@dataclass(frozen=True)
class VoiceConfig:
    audio_dim: int = 320      # A, features per video frame
    parts: int = 4            # spectra (or states) that make such a row
    width: int = 64
    memory: float = 5.0       # seconds


class VoiceEmotion(nn.Module):
    """A classifier of the emotion of a voice so far.

    Mean, standard deviation and rates of change of each feature over the past (statistics pooling, Snyder et
    al. 2018), loud rows counting more and old ones less; from them a small network gives the weights of the
    seven.
    """

    def __init__(self, config: VoiceConfig):
        super().__init__()
        self.config, size = config, config.audio_dim // config.parts
        self.forget = math.exp(-1 / (config.memory * FPS))
        place = torch.arange(size)
        self.register_buffer("cepstrum", torch.cos(math.pi * place[:, None] * (place + 0.5) / size).T / 9,
                             persistent=False)
        self.register_buffer("mean", torch.zeros(4 * size))      # of the statistics, over the training voices
        self.register_buffer("std", torch.ones(4 * size))
        self.head = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(4 * size, config.width), nn.GELU(approximate="tanh"),
            nn.Dropout(0.3), nn.Linear(config.width, len(EMOTIONS)))

    def pool(self, rows, state=None):
        """Pool rows (B, n, A) over the past of each -> statistics (B, n, 4*A/parts), the frames of speech so
        far (B, n, 1), and the state from which the rows that follow go on: three tensors (B, 1, ...)."""
        gate = torch.sigmoid(6 * (rows.mean(-1, keepdim=True) + 0.4))                      # (B, n, 1) loud: 1
        x = rows.unflatten(-1, (self.config.parts, -1)) @ self.cepstrum                    # (B, n, parts, C)
        inner, x = x.diff(dim=2).abs().mean(2), x.mean(2)                                  # (B, n, C)
        before = torch.cat([x[:, :1] if state is None else state[2], x[:, :-1]], 1)
        time = torch.arange(x.shape[1], device=x.device)
        age = time[:, None] - time
        decay = (age >= 0) * self.forget ** age.clamp(min=0)                                     # (n, n)
        moments = torch.cat([x, x.square(), inner, (x - before).abs(), torch.ones_like(gate)], -1)
        sums, speech_frames = decay @ (gate * moments), gate.cumsum(1)
        if state is not None:
            sums = sums + self.forget ** (time[:, None] + 1) * state[0]
            speech_frames = speech_frames + state[1]
        mean, square, inner, outer = (sums[..., :-1] / (sums[..., -1:] + 1e-6)).chunk(4, -1)     # (B, n, C)
        std = (square - mean.square()).clamp(min=1e-6).sqrt()
        state = sums[:, -1:], speech_frames[:, -1:], x[:, -1:]
        return torch.cat([mean, std, inner, outer], -1), speech_frames, state

    def forward(self, statistics):
        """Statistics (..., 4*A/parts) -> logits (..., 7)."""
        return self.head((statistics - self.mean) / self.std)


class FromVoice:
    """Moods by a VoiceEmotion: called with speech features (n, A), part after part, it returns (n, 7). The
    weights grow over the first half second of speech; a pause keeps them."""

    def __init__(self, voice, intensity=1.0):
        self.voice, self.intensity, self.state, self.sum, self.count = voice, intensity, None, 0, 0

    @torch.no_grad()
    def __call__(self, rows):
        rows = rows.to(self.voice.mean.device)
        moods = [torch.zeros(0, len(EMOTIONS), device=rows.device)]
        with torch.autocast(rows.device.type, enabled=False):
            for part in rows.split(250) if len(rows) else ():
                statistics, speech_frames, self.state = self.voice.pool(part[None].float(), self.state)
                sure = (speech_frames[0] / (FPS / 2)).clamp(max=1)                         # (n, 1)
                moods.append(self.voice(statistics[0]).softmax(-1) * sure)
        mood = torch.cat(moods)
        self.sum, self.count = self.sum + mood.sum(0).cpu(), self.count + len(mood)
        return intensify(mood, self.intensity)

    def describe(self):
        """Write the mean of the moods so far."""
        so_far = f": {describe(self.sum / self.count)} on average" if self.count else ""
        return f"from the voice{so_far}" + f" (intensity {self.intensity:g})" * (self.intensity != 1)


@functools.lru_cache(maxsize=1)
def load_text_model(name):
    """Load a frozen text encoder, by hub id or local folder -> tokenizer, encoder. Raises InputError."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel
    try:
        local = is_local(name)
        clip = AutoConfig.from_pretrained(name, local_files_only=local).model_type.startswith("clip")
        model_class = CLIPTextModel if clip else AutoModel                    # CLIP has a part for pictures
        model = model_class.from_pretrained(name, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        return tokenizer, model.eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the text model {name!r}: it is neither a folder with config.json, "
                         f"model.safetensors and tokenizer files nor reachable on the hub; to work offline, "
                         f"download it elsewhere and pass --text-model FOLDER") from error


@torch.no_grad()
def text_palette(text, model=TEXT_MODEL):
    """Compare words with the prompts -> weights (7,): cosine to the nearest prompt of each emotion,
    standardised over the seven, softmax(z / 0.5). Raises InputError."""
    if not text.strip():
        raise InputError('--emotion-text is empty; give a few words, such as "a bitter smile"')
    tokenizer, encoder = load_text_model(str(model))
    texts = [text.strip().lower(), *(prompt for prompts in PROMPTS for prompt in prompts)]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    vectors = (encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)                  # (1 + 21, E)
    vectors = F.normalize(vectors - vectors[1:].mean(0), dim=1)       # what all prompts share says nothing
    cosine = (vectors[1:] @ vectors[0]).view(len(EMOTIONS), -1).amax(1)                          # (7,)
    return ((cosine - cosine.mean()) / cosine.std(correction=0).clamp(min=1e-6) / 0.5).softmax(0)
