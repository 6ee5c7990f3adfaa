"""Chapter 3, reasoning: a DiT over time writes the motion tokens of 16 frames at once from speech (section
3.2, eq. 7).

    past motion M_p (P frames) + noised motion M_t^n (K frames) --> tokens, one a frame, attend over time
    speech features A (P + K + lookahead frames) -----------------> cross-attention, positions of the tokens
    motion of the reference photo M_r ----------------------------> cross-attention
    mood, seven emotion weights a frame (optional) ---------------> scale the experts beside each MLP
                                                                    -> velocity of the K new frames

One pass writes K frames; the last P of what is written are the past of the next pass, so a recording of any
length needs constant memory. The first past is the reference motion, repeated: the video starts from the
photo.
"""
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from decoder import TimeEmbed, modulate
from encoder import Attention, attention, mlp, rms_norm, sincos
from flow import integrate, with_cfg

EMOTIONS = 7     # neutral, happy, sad, angry, afraid, disgusted, surprised: a mood is a weight for each


@dataclass(frozen=True)
class GeneratorConfig:
    num_tokens: int = 1       # L
    token_dim: int = 64       # D
    audio_dim: int = 320      # A, features per video frame
    width: int = 128          # E
    depth: int = 5
    heads: int = 4
    window: int = 16          # K, new frames a pass (paper: 16)
    past: int = 16            # P, earlier frames seen (paper gives no number)
    lookahead: int = 3        # rows of speech seen beyond the window: the mouth prepares the next sound
                              # (ours)
    experts: int = 0          # hidden units of each emotion's expert in a block; 0: no experts
    mood_table: bool = False  # ablation: a learned vector for each emotion, added to the tokens, in place of
                              # experts

    def __post_init__(self):
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 2")
        if min(self.window, self.past) < 1 or min(self.lookahead, self.experts) < 0:
            raise ValueError(f"window {self.window} and past {self.past} must be at least 1, lookahead "
                             f"{self.lookahead} and "
                             f"experts {self.experts} at least 0")


class CrossAttention(nn.Module):
    """Queries from x (B, n, E), keys and values from context (B, m, E)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width,
            width)

    def forward(self, x, context):
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(context), "b m (s h d) -> s b h m d", s=2, h=self.heads)
        return self.out(rearrange(attention(rms_norm(q), rms_norm(k), v), "b h n d -> b n (h d)"))


class Experts(nn.Module):
    """Seven small MLPs, one for each emotion, scaled by its weight at each frame and added up: a mixture of
    experts whose gates are given (MoEE, arXiv 2501.01808, learns them). An expert gets no gradient from
    frames without its emotion."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, EMOTIONS * hidden)
        self.down = nn.Linear(EMOTIONS * hidden, width, bias=False)

    def forward(self, x, mood):
        """x (B, n, E), mood (B, n, 7) -> (B, n, E); zero where the mood is zero."""
        h = F.gelu(self.up(x), approximate="tanh").unflatten(-1, (EMOTIONS, -1))                # (B, n, 7, H)
        return self.down((h * mood[..., None].to(h)).flatten(-2))


class GeneratorBlock(nn.Module):
    """DiT block with two cross-attentions between self-attention and MLP: to the speech, to the reference
    motion."""

    def __init__(self, width, heads, experts=0):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(4))
        self.attention = Attention(width, heads)
        self.cross_attn_audio = CrossAttention(width, heads)
        self.cross_attn_ref = CrossAttention(width, heads)
        self.mlp = mlp(width)
        self.experts = Experts(width, experts) if experts else None
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition, pos_embed, audio, reference, mood=None):
        """x (B, P+K, E), condition (B, E), pos_embed (P+K, E), audio (B, m, E), reference (B, L, E), mood (B,
        P+K, 7) -> x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norms[0](x), shift1, scale1))
        x = x + self.cross_attn_audio(self.norms[1](x) + pos_embed, audio)
        x = x + self.cross_attn_ref(self.norms[2](x), reference)
        h = modulate(self.norms[3](x), shift2, scale2)
        if mood is None or self.experts is None:
            return x + gate2[:, None] * self.mlp(h)
        return x + gate2[:, None] * (self.mlp(h) + self.experts(h, mood))


class Generator(nn.Module):
    """Velocity of the motion tokens of K frames. Motion of a frame is one row of L*D numbers here."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = c = config
        motion = c.num_tokens * c.token_dim
        self.embed = nn.Linear(motion, c.width)
        self.ref_embed = nn.Linear(c.token_dim, c.width)
        self.audio = nn.Sequential(nn.Linear(c.audio_dim, c.width), nn.GELU(approximate="tanh"),
                                   nn.Linear(c.width, c.width))
        self.segment_embed = nn.Parameter(0.02 * torch.randn(2, c.width))              # past, new
        self.null_audio = nn.Parameter(0.02 * torch.randn(c.width))    # stands for speech left out (guidance)
        self.time = TimeEmbed(c.width)
        self.mood = nn.Parameter(torch.zeros(EMOTIONS, c.width)) if c.mood_table else None
        self.blocks = nn.ModuleList(GeneratorBlock(c.width, c.heads, c.experts) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        self.head = nn.Linear(c.width, motion)
        self.register_buffer("pos_embed", sincos(torch.arange(c.past + c.window + c.lookahead), c.width),
                             persistent=False)
        for block in [*self.blocks, self]:                                             # adaLN-zero
            nn.init.zeros_(block.modulation[1].weight)
            nn.init.zeros_(block.modulation[1].bias)
        for layer in [*(b.cross_attn_audio.out for b in self.blocks),
                      *(b.cross_attn_ref.out for b in self.blocks), self.head]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in self.blocks if c.experts else ():                       # begins as the generator without
            nn.init.zeros_(block.experts.down.weight)

    def forward(self, m_t, t, past, reference, audio=None, drop=None, mood=None):
        """m_t (B, K, L*D) noised, t (B,), past (B, P, L*D), reference (B, L*D), audio (B, P+K+lookahead, A),
        mood (B, P+K, 7) -> (B, K, L*D).

        audio None, or rows of it where drop (B,) is true: the model without speech, for guidance. mood None
        is all zeros: no opinion on the emotion.
        """
        c, (B, K, _) = self.config, m_t.shape
        num_rows = c.past + c.window + c.lookahead
        if K != c.window or past.shape[1] != c.past or (audio is not None and audio.shape[1] != num_rows):
            raise ValueError(f"want {c.window} new and {c.past} past frames and {num_rows} rows of speech, "
                             f"not {K}, "
                             f"{past.shape[1]} and {None if audio is None else audio.shape[1]}")
        x = torch.cat([self.embed(past) + self.segment_embed[0],
                       self.embed(m_t) + self.segment_embed[1]], dim=1)                # (B, P+K, E)
        pos_embed = self.pos_embed[: x.shape[1]]
        x = x + pos_embed
        if mood is not None and self.mood is not None:
            x = x + mood.to(x) @ self.mood
        audio_tokens = self.null_audio.expand(B, num_rows, -1)
        if audio is not None:
            embedded = self.audio(audio)                                               # (B, rows, E)
            audio_tokens = embedded if drop is None else torch.where(drop[:, None, None],
                                                                     audio_tokens.to(embedded), embedded)
        audio_tokens = audio_tokens + self.pos_embed
        reference = self.ref_embed(rearrange(reference, "b (l d) -> b l d", d=c.token_dim))        # (B, L, E)
        condition = self.time(t)                                                       # (B, E)
        for block in self.blocks:
            x = block(x, condition, pos_embed, audio_tokens, reference, mood)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        return self.head(modulate(self.norm(x[:, -K:]), shift, scale)).float()         # eq. (7)


@torch.no_grad()
def generate_motion(generator, m_ref, audio_features, rng, silence_features, steps=4, guidance=1.0,
                    emotion=None):
    """Motion for speech of any length. m_ref (1, L*D): the photo's motion; audio_features: iterator of (n, A)
    speech features, any n -> iterator of (n', L*D), in all one row for every row of speech; memory does not
    grow.

    rng: torch.Generator of the noise; silence_features (A,): features of no sound, for what comes before the
    first row and after the last. emotion: called with each part of audio_features in turn, (n, A) -> mood (n,
    7) of its frames (emotion.py); None: no opinion. Yields outside of any autocast: the caller's holds during
    a pass only if it is entered around each next().
    """
    c, device = generator.config, m_ref.device
    model = with_cfg(generator, guidance, null={"audio": None})
    past = m_ref[:, None].expand(1, c.past, -1)                                # (1, P, L*D)
    pending = silence_features.to(device).expand(c.past, -1)                   # (P.., A) what is still needed
    moods = None                                                               # (P.., 7) in step with pending
    audio_features, ended = iter(audio_features), False
    while True:
        while not ended and len(pending) < c.past + c.window + c.lookahead:
            new = next(audio_features, None)
            ended = new is None
            if ended or not len(new):
                continue
            pending = torch.cat([pending, new.to(device)])
            if emotion is not None:                                         # before the first frame: as in it
                mood = emotion(new).to(device)
                moods = torch.cat([mood[:1].expand(c.past, -1) if moods is None else moods, mood])
        count = min(c.window, len(pending) - c.past)                                  # new frames to hand out
        if count <= 0:
            return
        num_rows = c.past + c.window + c.lookahead
        padding = silence_features.to(device).expand(max(0, num_rows - len(pending)), -1)
        window_features = torch.cat([pending[:num_rows], padding])                     # (P+K+lookahead, A)
        cond = {"past": past, "reference": m_ref, "audio": window_features[None]}
        if emotion is not None:                                               # after the last frame: as in it
            # (1, P+K, 7)
            cond["mood"] = moods[torch.arange(c.past + c.window).clamp(max=len(moods) - 1)][None]
            moods = moods[c.window:]
        noise = torch.randn(1, c.window, m_ref.shape[1], generator=rng).to(device)
        motion = integrate(model, noise, steps, **cond)                                # (1, K, L*D)
        past = torch.cat([past, motion], dim=1)[:, -c.past:]                           # (1, P, L*D)
        pending = pending[c.window:]
        yield motion[0, :count]
