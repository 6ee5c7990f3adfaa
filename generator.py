"""Chapter 3, reasoning: a DiT over time writes the motion tokens of 16 frames at once from speech (section 3.2, eq. 7).

    past motion M_p (P frames) + noised motion M_t^n (K frames) ---> tokens, one a frame, self-attention over time
    speech features A (P + K + lookahead frames) ----------------------> cross-attention, same positions as the tokens
    motion of the reference photo M_r -----------------------------> cross-attention
                                                                     -> velocity of the K new frames

One pass writes K frames; the last P of what is written are the past of the next pass, so a recording of any length
needs constant memory. The first past is the reference motion, repeated: the video starts from the photo.
"""
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn

from decoder import TimeEmbed, modulate
from encoder import Attention, attention, mlp, rms_norm, sincos
from flow import integrate, with_cfg


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
    lookahead: int = 3        # rows of speech seen beyond the window: the mouth prepares the next sound (ours)

    def __post_init__(self):
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 2")
        if min(self.window, self.past) < 1 or self.lookahead < 0:
            raise ValueError(f"window {self.window} and past {self.past} must be at least 1, lookahead {self.lookahead} at least 0")


class CrossAttention(nn.Module):
    """Queries from x (B, n, E), keys and values from context (B, m, E)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, context):
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(context), "b m (s h d) -> s b h m d", s=2, h=self.heads)
        return self.out(rearrange(attention(rms_norm(q), rms_norm(k), v), "b h n d -> b n (h d)"))


class GeneratorBlock(nn.Module):
    """DiT block with two cross-attentions between self-attention and MLP: to the speech, to the reference motion."""

    def __init__(self, width, heads):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(4))
        self.attention = Attention(width, heads)
        self.cross_attn_audio = CrossAttention(width, heads)
        self.cross_attn_ref = CrossAttention(width, heads)
        self.mlp = mlp(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition, pos_embed, audio, reference):
        """x (B, P+K, E), condition (B, E), pos_embed (P+K, E), audio (B, m, E), reference (B, L, E) -> x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norms[0](x), shift1, scale1))
        x = x + self.cross_attn_audio(self.norms[1](x) + pos_embed, audio)
        x = x + self.cross_attn_ref(self.norms[2](x), reference)
        return x + gate2[:, None] * self.mlp(modulate(self.norms[3](x), shift2, scale2))


class Generator(nn.Module):
    """Velocity of the motion tokens of K frames. Motion of a frame is one row of L*D numbers here."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = c = config
        motion = c.num_tokens * c.token_dim
        self.embed = nn.Linear(motion, c.width)
        self.ref_embed = nn.Linear(c.token_dim, c.width)
        self.audio = nn.Sequential(nn.Linear(c.audio_dim, c.width), nn.GELU(approximate="tanh"), nn.Linear(c.width, c.width))
        self.segment_embed = nn.Parameter(0.02 * torch.randn(2, c.width))              # past, new
        self.null_audio = nn.Parameter(0.02 * torch.randn(c.width))                    # stands for speech left out (guidance)
        self.time = TimeEmbed(c.width)
        self.blocks = nn.ModuleList(GeneratorBlock(c.width, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        self.head = nn.Linear(c.width, motion)
        self.register_buffer("pos_embed", sincos(torch.arange(c.past + c.window + c.lookahead), c.width), persistent=False)
        for block in [*self.blocks, self]:                                             # adaLN-zero
            nn.init.zeros_(block.modulation[1].weight)
            nn.init.zeros_(block.modulation[1].bias)
        for layer in [*(b.cross_attn_audio.out for b in self.blocks), *(b.cross_attn_ref.out for b in self.blocks), self.head]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, m_t, t, past, reference, audio=None, drop=None):
        """m_t (B, K, L*D) noised, t (B,), past (B, P, L*D), reference (B, L*D), audio (B, P+K+lookahead, A) -> (B, K, L*D).

        audio None, or rows of it where drop (B,) is true: the model without speech, for guidance.
        """
        c, (B, K, _) = self.config, m_t.shape
        num_rows = c.past + c.window + c.lookahead
        if K != c.window or past.shape[1] != c.past or (audio is not None and audio.shape[1] != num_rows):
            raise ValueError(f"want {c.window} new and {c.past} past frames and {num_rows} rows of speech, not {K}, "
                             f"{past.shape[1]} and {None if audio is None else audio.shape[1]}")
        x = torch.cat([self.embed(past) + self.segment_embed[0], self.embed(m_t) + self.segment_embed[1]], dim=1)  # (B, P+K, E)
        pos_embed = self.pos_embed[: x.shape[1]]
        x = x + pos_embed
        audio_tokens = self.null_audio.expand(B, num_rows, -1)
        if audio is not None:
            embedded = self.audio(audio)                                               # (B, rows, E)
            audio_tokens = embedded if drop is None else torch.where(drop[:, None, None], audio_tokens.to(embedded), embedded)
        audio_tokens = audio_tokens + self.pos_embed
        reference = self.ref_embed(rearrange(reference, "b (l d) -> b l d", d=c.token_dim))            # (B, L, E)
        condition = self.time(t)                                                       # (B, E)
        for block in self.blocks:
            x = block(x, condition, pos_embed, audio_tokens, reference)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        return self.head(modulate(self.norm(x[:, -K:]), shift, scale)).float()         # eq. (7)


@torch.no_grad()
def generate_motion(generator, m_ref, audio_features, rng, silence_features, steps=4, guidance=1.0):
    """Motion for speech of any length. m_ref (1, L*D): the photo's motion; audio_features: iterator of (n, A) speech features, any n
    -> iterator of (n', L*D), in all one row for every row of speech; memory does not grow.

    rng: torch.Generator of the noise; silence_features (A,): features of no sound, for what comes before the first row and after
    the last. Yields outside of any autocast: the caller's holds during a pass only if it is entered around each next().
    """
    c, device = generator.config, m_ref.device
    model = with_cfg(generator, guidance, null={"audio": None})
    past = m_ref[:, None].expand(1, c.past, -1)                                        # (1, P, L*D)
    pending = silence_features.to(device).expand(c.past, -1)                           # (P.., A) what is still needed
    audio_features, ended = iter(audio_features), False
    while True:
        while not ended and len(pending) < c.past + c.window + c.lookahead:
            new = next(audio_features, None)
            ended = new is None
            pending = pending if ended else torch.cat([pending, new.to(device)])
        count = min(c.window, len(pending) - c.past)                                   # new frames to hand out
        if count <= 0:
            return
        num_rows = c.past + c.window + c.lookahead
        padding = silence_features.to(device).expand(max(0, num_rows - len(pending)), -1)
        window_features = torch.cat([pending[:num_rows], padding])                     # (P+K+lookahead, A)
        noise = torch.randn(1, c.window, m_ref.shape[1], generator=rng).to(device)
        motion = integrate(model, noise, steps, past=past, reference=m_ref, audio=window_features[None])  # (1, K, L*D)
        past = torch.cat([past, motion], dim=1)[:, -c.past:]                           # (1, P, L*D)
        pending = pending[c.window:]
        yield motion[0, :count]
