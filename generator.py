"""Chapter 3, reasoning: a DiT over time writes the motion tokens of 16 frames at once from speech (eq. 7).

    past motion M_p (P frames) + noised motion M_t^n (K frames) --> tokens, one a frame, attend over time
    speech features A (P + K + lookahead frames) -----------------> cross-attention, positions of the tokens
    motion of the reference photo M_r ----------------------------> cross-attention
    mood, seven emotion weights a frame (optional) ---------------> scale the experts beside each MLP
                                                                    -> velocity of the K new frames

One pass writes K frames; the last P of what is written are the past of the next pass, so a recording of any
length needs constant memory. The first past is the reference motion, repeated: the video starts from the
photo. Section 3.2 of the paper.
"""
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from decoder import TimeEmbed, modulate, zero_init
from encoder import Attention, attention, mlp, rms_norm, sincos
from flow import integrate, with_cfg

EMOTIONS = 7     # neutral, happy, sad, angry, afraid, disgusted, surprised: a mood is a weight for each


@dataclass(frozen=True)
class GeneratorConfig:
    num_tokens: int = 1         # L
    token_dim: int = 64         # D
    audio_dim: int = 320        # A, features per video frame
    width: int = 128            # E
    depth: int = 5
    heads: int = 4
    window: int = 16            # K, new frames a pass (paper: 16)
    past: int = 16              # P, earlier frames seen (the paper gives no number)
    lookahead: int = 3          # rows of speech after the window: the mouth prepares the next sound (ours)
    experts: int = 0            # hidden units of each emotion's expert in a block; 0: no experts
    mood_table: bool = False    # ablation: a learned vector per emotion, added to the tokens
    learned_gates: bool = False     # ablation: experts gated by the features, as in MoEE; needs mood_table
    truncated: int = 0          # directions of the token in which sampling starts without noise (ours)

    def __post_init__(self):
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 2")
        if min(self.window, self.past) < 1 or min(self.lookahead, self.experts, self.truncated) < 0:
            raise ValueError(f"window {self.window} and past {self.past} must be at least 1, lookahead "
                             f"{self.lookahead}, experts {self.experts} and truncated {self.truncated} at "
                             "least 0")

    @property
    def rows(self):
        """Frames of speech that one pass sees."""
        return self.past + self.window + self.lookahead


class CrossAttention(nn.Module):
    """Queries from x (B, n, E), keys and values from context (B, m, E)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context):
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(context), "b m (s h d) -> s b h m d", s=2, h=self.heads)
        return self.out(rearrange(attention(rms_norm(q), rms_norm(k), v), "b h n d -> b n (h d)"))


class Experts(nn.Module):
    """Seven small MLPs, one for each emotion, scaled by its weight at each frame and added up.
    A mixture of experts whose gates are given. MoEE (arXiv 2501.01808) learns them (learned_gates): a sigmoid
    of each frame scales what enters an expert, a softmax of the mean frame what leaves it."""

    def __init__(self, width, hidden, learned_gates=False):
        super().__init__()
        self.up = nn.Linear(width, EMOTIONS * hidden)
        self.down = nn.Linear(EMOTIONS * hidden, width, bias=False)
        self.gates = nn.Linear(width, 2 * EMOTIONS) if learned_gates else None
        zero_init(self.down)

    def forward(self, x, mood):
        """x (B, n, E), mood (B, n, 7) -> (B, n, E); zero where the mood is zero."""
        h = self.up(x).unflatten(-1, (EMOTIONS, -1))                                   # (B, n, 7, hidden)
        if self.gates is not None:
            local_gate, global_gate = self.gates(x).chunk(2, dim=-1)                   # (B, n, 7)
            h = h * local_gate.sigmoid()[..., None]
            mood = global_gate.mean(1, keepdim=True).softmax(-1)                       # (B, 1, 7)
        h = F.gelu(h, approximate="tanh") * mood[..., None].to(h)
        return self.down(h.flatten(-2))


class GeneratorBlock(nn.Module):
    """DiT block with two cross-attentions between self-attention and MLP: to speech and reference motion."""

    def __init__(self, width, heads, experts=0, learned_gates=False):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(4))
        self.attention = Attention(width, heads)
        self.cross_attn_audio = CrossAttention(width, heads)
        self.cross_attn_ref = CrossAttention(width, heads)
        self.mlp = mlp(width)
        self.experts = Experts(width, experts, learned_gates) if experts else None
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        zero_init(self.cross_attn_audio.out, self.cross_attn_ref.out, self.modulation)

    def forward(self, x, condition, pos_embed, audio, reference, mood=None):
        """x (B, P+K, E), condition (B, E), pos_embed (P+K, E), audio (B, m, E), reference (B, L, E),
        mood (B, P+K, 7) -> x."""
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
        self.blocks = nn.ModuleList(GeneratorBlock(c.width, c.heads, c.experts, c.learned_gates)
                                    for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        self.head = nn.Linear(c.width, motion)
        self.register_buffer("pos_embed", sincos(torch.arange(c.rows), c.width), persistent=False)
        if c.truncated:                                       # orthonormal, or zero: no direction
            self.register_buffer("truncated", torch.zeros(motion, c.truncated))
        zero_init(self.modulation, self.head)

    def truncate(self, noise):
        """Remove what moves the mouth from the noise (..., L*D) that sampling starts from (ours).

        Speech tells the mouth, chance the head and the lids. Like the truncation trick (Brock et al. 2019),
        but in the few directions that train_gen.py finds for the mouth alone.
        """
        return noise - noise @ self.truncated @ self.truncated.T if self.config.truncated else noise

    def forward(self, m_t, t, past, reference, audio=None, drop=None, mood=None):
        """Velocity of the noised motion m_t (B, K, L*D) -> (B, K, L*D).

        t (B,), past (B, P, L*D), reference (B, L*D), audio (B, P+K+lookahead, A), mood (B, P+K, 7). audio
        None, or rows of it where drop (B,) is true: the model without speech, for guidance. mood None is all
        zeros: no opinion on the emotion.
        """
        c, (B, K, _) = self.config, m_t.shape
        rows = c.rows if audio is None else audio.shape[1]
        if (K, past.shape[1], rows) != (c.window, c.past, c.rows):
            raise ValueError(f"want {c.window} new and {c.past} past frames and {c.rows} rows of speech, "
                             f"not {K}, {past.shape[1]} and {rows}")
        x = torch.cat([self.embed(past) + self.segment_embed[0],
                       self.embed(m_t) + self.segment_embed[1]], dim=1)                # (B, P+K, E)
        pos_embed = self.pos_embed[: x.shape[1]]
        x = x + pos_embed
        if mood is None and c.learned_gates:
            mood = x.new_zeros(B, x.shape[1], EMOTIONS)
        if mood is not None and self.mood is not None:
            x = x + mood.to(x) @ self.mood
        null = self.null_audio.expand(B, c.rows, -1)
        audio_tokens = null if audio is None else self.audio(audio)                    # (B, rows, E)
        if audio is not None and drop is not None:
            audio_tokens = torch.where(drop[:, None, None], null.to(audio_tokens), audio_tokens)
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
    """Generate motion for speech of any length; memory does not grow.

    m_ref (B, L*D): the photo's motion; audio_features: iterator of (n, A) or (B, n, A) speech features, any n
    -> iterator of (B, n', L*D), or (n', L*D) where B = 1, in all one row for every row of speech. rng:
    torch.Generator of the noise, which is the same for all B; silence_features (A,): features of no sound,
    for what comes before the first row and after the last. emotion: called with each part of audio_features
    in turn -> mood (n, 7) or (B, n, 7) of its frames (emotion.py); None: no opinion.
    """
    c, device, B = generator.config, m_ref.device, len(m_ref)
    model = with_cfg(generator, guidance, null={"audio": None})
    silence_features = silence_features.to(device)
    past = m_ref[:, None].expand(B, c.past, -1)                                        # (B, P, L*D)
    pending = silence_features.expand(B, c.past, -1)                       # (B, P.., A) what is still needed
    moods = None                                                           # (B, P.., 7) in step with pending
    audio_features, ended = iter(audio_features), False
    while True:
        while not ended and pending.shape[1] < c.rows:
            new = next(audio_features, None)
            ended = new is None
            if ended or not new.shape[-2]:
                continue
            pending = torch.cat([pending, new.to(device).expand(B, -1, -1)], dim=1)
            if emotion is not None:                                         # before the first frame: as in it
                mood = emotion(new).to(device).expand(B, -1, -1)
                before = mood[:, :1].expand(B, c.past, -1) if moods is None else moods
                moods = torch.cat([before, mood], dim=1)
        count = min(c.window, pending.shape[1] - c.past)                       # new frames to hand out
        if count <= 0:
            return
        padding = silence_features.expand(B, max(0, c.rows - pending.shape[1]), -1)
        audio = torch.cat([pending[:, :c.rows], padding], dim=1)                       # (B, P+K+lookahead, A)
        cond = {"past": past, "reference": m_ref, "audio": audio}
        if emotion is not None:                                             # after the last frame: as in it
            frames = torch.arange(c.past + c.window).clamp(max=moods.shape[1] - 1)
            cond["mood"] = moods[:, frames]                                            # (B, P+K, 7)
            moods = moods[:, c.window:]
        noise = generator.truncate(torch.randn(1, c.window, m_ref.shape[1], generator=rng).to(device))
        motion = integrate(model, noise.expand(B, -1, -1), steps, **cond)              # (B, K, L*D)
        past = torch.cat([past, motion], dim=1)[:, -c.past:]                           # (B, P, L*D)
        pending = pending[:, c.window:]
        yield motion[:, :count].squeeze(0)
