"""Chapter 2, generation: a DiT that paints the target frame from a reference photo and two motions (section 3.1, eq. 3).

    reference patches Z_r + motion M_r ---> tokens that know no time t and see only themselves: computed once a video
                                                | keys and values of every layer
    noised target patches Z_t^n + motion M_t ---+--> tokens that see the reference and themselves -> velocity V
                                    (and, in a video model, the same patch of the other frames: temporal align block)

One set of weights serves both rows. The paper lets all tokens see all (full_attention=True); ours is faster, as one
reference serves every frame and every step. In pixel space the output is what to do with the reference: move it, fade
it, paint over it. Copying is then free and turning a head cheap, and the velocity follows from the picture
(x-prediction, JiT, arXiv 2511.13720).
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from encoder import Attention, attention, mlp, patchify, rms_norm, sincos, sincos_2d, unpatchify
from flow import integrate, x_to_v


@dataclass(frozen=True)
class DecoderConfig:
    image_size: int = 128           # H = W, pixels or latent cells
    channels: int = 3               # C
    patch_size: int = 16            # p
    width: int = 256                # E
    depth: int = 6
    heads: int = 4
    num_tokens: int = 1             # L
    token_dim: int = 64             # D
    tokens_per_motion: int = 8      # decoder tokens made of one motion token (ours; a lone narrow token is easily ignored)
    frames: int = 1                 # F; above 1, the video model: a temporal align block after each transfer block
    full_attention: bool = False    # the paper's attention: the reference sees the target too
    predict: str = "x"              # "x" (pixels) or "v" (latents)

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")
        if self.predict not in ("x", "v"):
            raise ValueError(f"predict must be 'x' or 'v', not {self.predict!r}")


class Picture(NamedTuple):
    """A picture of the decoder, and in pixel space how it was made of the reference."""
    x: torch.Tensor                         # (B, C, H, W)
    moved: torch.Tensor | None = None       # (B, C, H, W)   the reference, moved
    alpha: torch.Tensor | None = None       # (B, 1, H, W)   how far that is faded out
    field: torch.Tensor | None = None       # (B, H, W, 2)   displacements x, y in halves of the picture


class TimeEmbed(nn.Module):
    """t in [0, 1] -> (B, E). The sinusoid gets 1000 t, here and nowhere else."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("frequencies", 1e-4 ** torch.linspace(0, 1, width // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = 1000 * t[:, None].float() * self.frequencies                           # (B, E/2)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))                  # (B, E)


def modulate(x, shift, scale):
    """x (B, n, E); shift, scale (B, E)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by a condition, identity at first (adaLN-zero, DiT)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition, kv_cache=None):
        """x (B, n, E), condition (B, E), kv_cache: keys and values (B, heads, m, d) seen beside x's own -> x, its own (k, v)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        q, k, v = self.attention.project(modulate(self.norm1(x), shift1, scale1))
        kv = (k, v)
        if kv_cache is not None:
            k, v = (torch.cat([cached, new], dim=2) for cached, new in zip(kv_cache, kv, strict=True))
        attn_out = self.attention.out(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))
        x = x + gate1[:, None] * attn_out
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x, kv


class TemporalBlock(nn.Module):
    """Temporal align block: each patch position attends over the F frames of its clip; adds zero at first (ours).

    A lone frame passes unchanged, so a model made for pictures becomes one for video without forgetting.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, x, frames):
        if frames == 1:
            return x
        time = sincos(torch.arange(frames, device=x.device), self.width).to(x)         # (F, E)
        y = rearrange(self.norm(x), "(b f) n e -> (b n) f e", f=frames) + time
        return x + rearrange(self.attention(y), "(b n) f e -> (b f) n e", b=len(x) // frames)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = c = config
        grid_size = c.image_size // c.patch_size
        patch = c.patch_size**2 * c.channels
        self.warp_grid = max(1, c.patch_size // 8)                                     # a patch has so many displacements a side
        self.embed = nn.Linear(patch, c.width)
        self.ref_patch_embed = nn.Linear(patch, c.width, bias=False)
        self.motion = nn.Linear(c.token_dim, c.tokens_per_motion * c.width)
        self.time = TimeEmbed(c.width)
        self.motion_delta = nn.Linear(2 * c.num_tokens * c.token_dim, (1 + c.tokens_per_motion) * c.width, bias=False)
        self.delta_mix = nn.Parameter(torch.randn(grid_size**2, c.tokens_per_motion) * c.tokens_per_motion**-0.5)  # of each patch
        self.segment_embed = nn.Parameter(0.02 * torch.randn(2, c.width))              # reference row, target row
        if not c.full_attention:
            self.ref_condition = nn.Parameter(torch.zeros(c.width))                    # the reference row's condition: no time
        self.motion_pos_embed = nn.Parameter(0.02 * torch.randn(c.num_tokens * c.tokens_per_motion, c.width))
        self.blocks = nn.ModuleList(DiTBlock(c.width, c.heads) for _ in range(c.depth))
        self.temporal = nn.ModuleList(TemporalBlock(c.width, c.heads) for _ in range(c.depth if c.frames > 1 else 0))
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        self.head = nn.Linear(c.width, patch if c.predict == "v" else patch + c.patch_size**2 + 2 * self.warp_grid**2)
        self.affine_head = nn.Linear(c.width, 6) if c.predict == "x" else None
        self.register_buffer("position", sincos_2d(grid_size, c.width), persistent=False)   # (N, E)
        self.init_weights()

    def init_weights(self):
        for block in [*self.blocks, self]:                                             # adaLN-zero: every block starts as identity
            nn.init.zeros_(block.modulation[1].weight)
            nn.init.zeros_(block.modulation[1].bias)
        for block in self.temporal:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.attention.out.bias)
        nn.init.normal_(self.motion_delta.weight, std=self.motion_delta.in_features**-0.5)
        for layer in [self.head, *([self.affine_head] if self.affine_head else [])]:   # output 0: at first the reference is copied
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def embed_tokens(self, z, motion, segment):
        """Picture z (B, C, H, W) and motion (B, L, D) as one sequence of N patches and L*K tokens -> (B, n, E)."""
        patches = self.embed(patchify(z, self.config.patch_size)) + self.position      # (B, N, E)
        tokens = rearrange(self.motion(motion), "b l (k e) -> b (l k) e", k=self.config.tokens_per_motion) + self.motion_pos_embed
        return torch.cat([patches, tokens], dim=1) + self.segment_embed[segment]

    def embed_target(self, z_t, t, m_t, z_r, m_r):
        """The target's sequence (B, n, E) and condition (B, E).

        Ours: a target patch knows from the start what lies beneath it in the reference, and what has changed since, each
        place mixing K views of the change in its own way. All of this could be learned by attention alone, in ten times
        the steps.
        """
        delta = (m_t - m_r).flatten(1)                                                 # (B, L*D)
        delta = self.motion_delta(torch.cat([delta, rms_norm(delta)], dim=1))
        delta = rearrange(delta, "b (k e) -> b k e", e=self.config.width)              # (B, 1+K, E)
        x = self.embed_tokens(z_t, m_t, segment=1)                                     # (B, n, E)
        ref_context = self.ref_patch_embed(patchify(z_r, self.config.patch_size)) + self.delta_mix @ delta[:, 1:]  # (B, N, E)
        x = torch.cat([x[:, : len(self.position)] + ref_context, x[:, len(self.position):]], dim=1)
        return x, self.time(t) + delta[:, 0]

    def encode_reference(self, z_r, m_r):
        """What every frame of a video needs of its reference, z_r (B, C, H, W) and m_r (B, L, D): computed once."""
        cache = {"z": z_r, "m": m_r, "kv": []}
        x = self.embed_tokens(z_r, m_r, segment=0)
        if self.config.full_attention:                                                 # nothing to precompute but the tokens
            return {**cache, "kv": x}
        condition = self.ref_condition.expand(len(x), -1)
        for block in self.blocks:
            x, kv = block(x, condition)
            cache["kv"].append(kv)
        return cache

    def forward(self, z_t, t, m_t, cache, as_picture=False):
        """Velocity of the target. z_t (B*F, C, H, W), t (B*F,), m_t (B*F, L, D), cache of B references -> (B*F, C, H, W).

        The F frames of a clip stand side by side in the batch: (b f). as_picture: the Picture itself, in pixel space.
        """
        frames = len(z_t) // len(cache["z"])
        z_r, m_r = (repeat(cache[k], "b ... -> (b f) ...", f=frames) for k in ("z", "m"))
        x, condition = self.embed_target(z_t, t, m_t, z_r, m_r)                        # (B*F, n, E), (B*F, E)
        n = x.shape[1]
        if self.config.full_attention:
            x = torch.cat([repeat(cache["kv"], "b n e -> (b f) n e", f=frames), x], dim=1)
        for k, block in enumerate(self.blocks):
            kv = None
            if not self.config.full_attention:
                kv = [repeat(part, "b h n d -> (b f) h n d", f=frames) for part in cache["kv"][k]]
            x, _ = block(x, condition, kv)
            if self.config.frames > 1:
                x = self.temporal[k](x, frames)
        x = x[:, -n:][:, : len(self.position)]                                         # (B*F, N, E)   target patches
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        out = self.head(modulate(self.norm(x), shift, scale)).float()                  # (B*F, N, ...)
        if self.config.predict == "v":
            return unpatchify(out, self.config.patch_size)                             # eq. (3)
        affine = 0.1 * self.affine_head(condition).float().unflatten(1, (2, 3))        # (B*F, 2, 3)
        picture = self.warp_and_blend(z_r, affine, out)
        return picture if as_picture else x_to_v(picture.x, z_t, t)                    # eq. (3), from x

    def warp_and_blend(self, z_r, affine, out):
        """The Picture: z_r (B, C, H, W) moved, faded and painted over as the head's out (B, N, p*p*C + p*p + 2*q*q) says:
        residual, alpha, displacement.

        Ours. A moving face takes its looks along, which E numbers a patch could not repaint in detail. Displacements are in
        halves of the picture: an affine map of the whole (B, 2, 3), and one for each of q x q cells a patch, interpolated
        between them, so that patches do not show.
        """
        p, q = self.config.patch_size, self.warp_grid
        residual, alpha, displacement = out.split([self.config.channels * p * p, p * p, 2 * q * q], dim=2)
        displacement = F.interpolate(unpatchify(displacement, q), size=z_r.shape[-2:], mode="bilinear", align_corners=False)
        displacement = rearrange(displacement.nan_to_num().clamp(-1, 1), "b c h w -> b h w c")         # NaN crashes grid_sample
        field = F.affine_grid(affine.nan_to_num(), z_r.shape, align_corners=False) + displacement      # (B, H, W, 2)
        identity = F.affine_grid(torch.eye(2, 3, device=z_r.device)[None], z_r[:1].shape, align_corners=False)
        moved = F.grid_sample(z_r, identity + field, padding_mode="border", align_corners=False)
        alpha = unpatchify(alpha, p)
        return Picture(moved * (1 - alpha) + unpatchify(residual, p), moved, alpha, field)


@torch.no_grad()
def decode_frames(decoder, z_r, m_ref, motions, noise, steps=1, batch=16, as_pictures=False):
    """Frames for motions. z_r (1, C, H, W), m_ref (1, L*D): the photo and its motion; motions: iterator of (n, L*D)
    -> iterator of (n', C, H, W), in all one for every motion; memory does not grow. as_pictures: of Pictures instead,
    in pixel space with the parts of the last step.

    Every frame starts from the same noise (1, C, H, W), so that what noise decides stands still (ours). The video model
    paints its F frames at a time. The image model paints what is there, up to `batch`, and waits for nothing; the first
    frame alone, so that it leaves early.
    """
    c = decoder.config
    size = c.frames
    cache = decoder.encode_reference(z_r, m_ref.unflatten(1, (c.num_tokens, c.token_dim)))
    buffer, motions, ended = m_ref[:0], iter(motions), False
    while True:
        while not ended and len(buffer) < c.frames:
            new = next(motions, None)
            ended = new is None
            buffer = buffer if ended else torch.cat([buffer, new])
        chunk, buffer = buffer[:size], buffer[size:]
        size = c.frames if c.frames > 1 else batch
        if not len(chunk):
            return
        start = noise.expand(len(chunk), *noise.shape[1:])
        cond = {"m_t": chunk.unflatten(1, (c.num_tokens, c.token_dim)), "cache": cache}
        if not as_pictures:
            yield integrate(decoder, start, steps, **cond)
        elif c.predict == "v":
            yield Picture(integrate(decoder, start, steps, **cond))
        else:                                                     # the last Euler step ends at the picture predicted there
            z = integrate(decoder, start, steps, skip_last=1, **cond)
            yield decoder(z, z.new_full((len(z),), 1 / steps), **cond, as_picture=True)
