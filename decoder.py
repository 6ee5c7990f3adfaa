"""Chapter 2, generation: a DiT that predicts the target frame from a photo and two motions (paper eq. 3).

    reference patches Z_r + motion M_r --> tokens without time t that attend only to themselves, once a video
                                                | keys and values of every layer
    noised target patches Z_t^n + motion M_t ---+--> tokens that attend to the reference and to themselves
                                                (a video model also over frames, temporal block) -> velocity V

One set of weights serves both rows. The paper lets all tokens attend to all (full_attention=True); the
default is faster, since one reference serves every frame and every sampling step.

In pixel space (predict="x", ours) the network predicts the picture x as an edit of the reference
(warp_and_blend): copying is the initial state, and turning a head needs few numbers. The velocity follows
from x (JiT, arXiv 2511.13720). In latent space (predict="v", the paper) the head gives the velocity itself.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from encoder import Attention, ViTConfig, attention, mlp, patchify, rms_norm, sincos, sincos_2d, unpatchify
from flow import x_to_v


@dataclass(frozen=True)
class DecoderConfig(ViTConfig):
    """Sizes and switches. Everything after `frames` is ours; PAPER of train_ae.py has the paper's values."""
    width: int = 256                # E
    depth: int = 6
    heads: int = 4
    frames: int = 1                 # F; above 1, the video model, with temporal blocks
    full_attention: bool = False    # the reference attends to the target, too
    predict: str = "x"              # "x": an edit of the reference (pixels), "v": the velocity (latents)
    tokens_per_motion: int = 8      # decoder tokens of each motion token; one narrow token is easily ignored
    motion_delta: bool = True       # M_t - M_r enters target patches and adaLN condition (class MotionDelta)
    ref_context: bool = True        # each target patch receives the reference patch at its place
    warp_grid: int = 1              # displacement vectors per side of a patch
    overlap: bool = False           # residual and alpha of a patch cover twice its side under a Hann window

    def __post_init__(self):
        super().__post_init__()
        if self.predict not in ("x", "v"):
            raise ValueError(f"predict must be 'x' or 'v', not {self.predict!r}")
        if self.overlap and self.patch_size % 2:
            raise ValueError(f"overlap needs an even patch_size, not {self.patch_size}")


class Picture(NamedTuple):
    """A predicted picture, and in pixel space how it was made from the reference."""
    x: Tensor                       # (B, C, H, W)
    moved: Tensor | None = None     # (B, C, H, W)  the warped reference
    alpha: Tensor | None = None     # (B, 1, H, W)  how much of it is removed
    field: Tensor | None = None     # (B, H, W, 2)  displacements x, y in halves of the picture


class TimeEmbed(nn.Module):
    """Embed t in [0, 1], (B,) -> (B, E). The sinusoid gets 1000 t, here and nowhere else."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", 1e-4 ** torch.linspace(0, 1, width // 2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = 1000 * t[:, None].float() * self.frequencies                           # (B, E/2)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))                  # (B, E)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale x (B, n, E) by (B, E) each."""
    return x * (1 + scale[:, None]) + shift[:, None]


def zero_init(*layers: nn.Module) -> None:
    """Set weights and biases to zero: a block then starts as identity, the decoder as a copy."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class DiTBlock(nn.Module):
    """Transformer block with norms shifted, scaled and gated by a condition (adaLN-zero, DiT)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = mlp(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        zero_init(self.modulation)

    def forward(self, x, condition, ref_kv=None):
        """x (B, n, E), condition (B, E) -> x, its own (k, v).
        ref_kv: keys and values (B, heads, m, d) that are attended to beside x's own."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        q, k, v = self.attention.project(modulate(self.norm1(x), shift1, scale1))
        kv = (k, v)
        if ref_kv is not None:
            k, v = (torch.cat([ref, own], dim=2) for ref, own in zip(ref_kv, kv, strict=True))
        attn_out = self.attention.out(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))
        x = x + gate1[:, None] * attn_out
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x, kv


class TemporalBlock(nn.Module):
    """Temporal align block: each patch position attends over the F frames of its clip; adds zero at first.
    Its cost is the o(f) that the paper gives. A single frame passes unchanged, so an image model becomes a
    video model without forgetting."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        zero_init(self.attention.out)

    def forward(self, x, frames: int):
        if frames == 1:
            return x
        time = sincos(torch.arange(frames, device=x.device), self.width).to(x)         # (F, E)
        y = rearrange(self.norm(x), "(b f) n e -> (b n) f e", f=frames) + time
        return x + rearrange(self.attention(y), "(b n) f e -> (b f) n e", b=len(x) // frames)


class MotionDelta(nn.Module):
    """Give M_t - M_r directly to the adaLN condition and to every target patch (ours).

    The difference is also given at unit length, so that small motions (a lip, a lid) have an effect of their
    own. Each patch position mixes K views of it with weights of its own.
    """

    def __init__(self, motion: int, width: int, patches: int, views: int):
        super().__init__()
        self.views = views
        self.project = nn.Linear(2 * motion, (1 + views) * width, bias=False)
        self.mix = nn.Parameter(views**-0.5 * torch.randn(patches, views))
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)

    def forward(self, m_t, m_r):
        """Motions (B, L, D) -> (B, E) for the condition, (B, N, E) for the patches."""
        delta = (m_t - m_r).flatten(1)                                                 # (B, L*D)
        delta = self.project(torch.cat([delta, rms_norm(delta)], dim=1))
        delta = rearrange(delta, "b (k e) -> b k e", k=1 + self.views)                 # (B, 1+K, E)
        return delta[:, 0], self.mix @ delta[:, 1:]


class Decoder(nn.Module):
    """Velocity of the target frame, eq. (3)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = c = config
        grid_size, patch = c.image_size // c.patch_size, c.patch_size**2
        self.embed = nn.Linear(patch * c.channels, c.width)
        self.motion = nn.Linear(c.token_dim, c.tokens_per_motion * c.width)
        self.motion_pos_embed = nn.Parameter(0.02 * torch.randn(c.num_tokens * c.tokens_per_motion, c.width))
        self.segment_embed = nn.Parameter(0.02 * torch.randn(2, c.width))              # reference, target
        self.time = TimeEmbed(c.width)
        if not c.full_attention:
            self.ref_condition = nn.Parameter(torch.zeros(c.width))                # the reference has no time
        if c.ref_context:
            self.ref_patch_embed = nn.Linear(patch * c.channels, c.width, bias=False)
        if c.motion_delta:
            motion = c.num_tokens * c.token_dim
            self.motion_delta = MotionDelta(motion, c.width, grid_size**2, c.tokens_per_motion)
        self.blocks = nn.ModuleList(DiTBlock(c.width, c.heads) for _ in range(c.depth))
        temporal_blocks = c.depth if c.frames > 1 else 0
        self.temporal = nn.ModuleList(TemporalBlock(c.width, c.heads) for _ in range(temporal_blocks))
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        if c.predict == "v":
            self.head = nn.Linear(c.width, patch * c.channels)
        else:
            painted = (4 if c.overlap else 1) * patch * (c.channels + 1)               # residual and alpha
            self.head = nn.Linear(c.width, painted + 2 * c.warp_grid**2)
            self.affine_head = nn.Linear(c.width, 6)
            zero_init(self.affine_head)
            if c.overlap:
                angle = torch.pi * (torch.arange(2 * c.patch_size) + 0.5) / (2 * c.patch_size)
                hann = torch.sin(angle) ** 2
                self.register_buffer("window", (hann[:, None] * hann).flatten(), persistent=False)
                window_sum = self.overlap_add(self.window.expand(1, grid_size**2, -1))
                self.register_buffer("window_sum", window_sum, persistent=False)       # below 1 at the border
        zero_init(self.modulation, self.head)
        self.register_buffer("pos_embed", sincos_2d(grid_size, c.width), persistent=False)     # (N, E)

    def embed_tokens(self, z, motion, segment: int):
        """Embed picture z (B, C, H, W) and motion (B, L, D) as one sequence of N patches and L*K tokens."""
        patches = self.embed(patchify(z, self.config.patch_size)) + self.pos_embed     # (B, N, E)
        tokens = rearrange(self.motion(motion), "b l (k e) -> b (l k) e", k=self.config.tokens_per_motion)
        return torch.cat([patches, tokens + self.motion_pos_embed], dim=1) + self.segment_embed[segment]

    def embed_target(self, z_t, t, m_t, z_r, m_r):
        """-> sequence (B, n, E) and condition (B, E) of the target. The two shortcuts enter here alone."""
        x, condition = self.embed_tokens(z_t, m_t, segment=1), self.time(t)            # (B, n, E), (B, E)
        patches, tokens = x.split([len(self.pos_embed), x.shape[1] - len(self.pos_embed)], dim=1)
        context = torch.zeros_like(patches)
        if self.config.ref_context:
            context = context + self.ref_patch_embed(patchify(z_r, self.config.patch_size))
        if self.config.motion_delta:
            delta, delta_patches = self.motion_delta(m_t, m_r)
            condition, context = condition + delta, context + delta_patches
        return torch.cat([patches + context, tokens], dim=1), condition

    def encode_reference(self, z_r, m_r) -> dict:
        """Compute what all frames of a video share, of photo z_r (B, C, H, W) and motion m_r (B, L, D)."""
        x = self.embed_tokens(z_r, m_r, segment=0)
        if self.config.full_attention:                                       # only the tokens can be shared
            return {"z": z_r, "m": m_r, "tokens": x}
        kv_cache, condition = [], self.ref_condition.expand(len(x), -1)
        for block in self.blocks:
            x, kv = block(x, condition)
            kv_cache.append(kv)
        return {"z": z_r, "m": m_r, "kv": kv_cache}

    def forward(self, z_t, t, m_t, cache, as_picture=False):
        """Velocity of the target (B*F, C, H, W), or with as_picture (predict="x" only) the Picture.
        z_t (B*F, C, H, W), t (B*F,), m_t (B*F, L, D), cache: encode_reference of B references. The F frames
        of a clip are consecutive in the batch: (b f)."""
        c, frames = self.config, len(z_t) // len(cache["z"])
        z_r, m_r = (repeat(cache[k], "b ... -> (b f) ...", f=frames) for k in ("z", "m"))
        x, condition = self.embed_target(z_t, t, m_t, z_r, m_r)                        # (B*F, n, E), (B*F, E)
        n = x.shape[1]
        if c.full_attention:
            x = torch.cat([repeat(cache["tokens"], "b n e -> (b f) n e", f=frames), x], dim=1)
        for k, block in enumerate(self.blocks):
            ref_kv = None
            if not c.full_attention:
                ref_kv = [repeat(part, "b h n d -> (b f) h n d", f=frames) for part in cache["kv"][k]]
            x, _ = block(x, condition, ref_kv)
            if c.frames > 1:
                x = self.temporal[k](x, frames)
        x = x[:, -n:][:, : len(self.pos_embed)]                                 # (B*F, N, E)   target patches
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        out = self.head(modulate(self.norm(x), shift, scale)).float()                  # (B*F, N, ...)
        if c.predict == "v":
            return unpatchify(out, c.patch_size)                                       # eq. (3)
        picture = warp_and_blend(z_r, *self.split_head(out, condition))
        if as_picture:
            return picture
        return x_to_v(picture.x, z_t, t, t_min=0.05 if self.training else 1e-3)        # eq. (3), from x

    def split_head(self, out, condition):
        """Head's output (B, N, ...) -> affine, displacement, alpha, residual of warp_and_blend."""
        c, p = self.config, self.config.patch_size
        k = (4 if c.overlap else 1) * p * p
        painted, displacement = out.split([(c.channels + 1) * k, 2 * c.warp_grid**2], dim=2)
        if c.overlap:
            windows = painted.unflatten(2, (-1, k)) * self.window                      # (B, N, C+1, 4*p*p)
            painted = self.overlap_add(windows.flatten(2)) / self.window_sum
        else:
            residual, alpha = painted.split([c.channels * k, k], dim=2)
            painted = torch.cat([unpatchify(residual, p), unpatchify(alpha, p)], dim=1)       # (B, C+1, H, W)
        affine = 0.1 * self.affine_head(condition).float().unflatten(1, (2, 3))
        return affine, unpatchify(displacement, c.warp_grid), painted[:, -1:], painted[:, :-1]

    def overlap_add(self, x):
        """Windows of twice a patch (B, N, C*4*p*p), channel first -> their sum (B, C, H, W)."""
        p = self.config.patch_size
        return F.fold(x.transpose(1, 2), self.config.image_size, 2 * p, stride=p, padding=p // 2)


def warp_and_blend(z_r, affine, displacement, alpha, residual) -> Picture:
    """Compose the picture x = warp(z_r) (1 - alpha) + residual (ours).

    z_r (B, C, H, W); affine (B, 2, 3), added to the identity, and displacement (B, 2, g, g), bilinear between
    its points, in halves of the picture; alpha (B, 1, H, W); residual (B, C, H, W). Outside the picture its
    border is repeated. Compare FOMM (Siarohin et al. 2019): a displacement field and an occlusion map.
    """
    affine, displacement = affine.nan_to_num(), displacement.nan_to_num()          # NaN crashes grid_sample
    displacement = F.interpolate(displacement, size=z_r.shape[-2:], mode="bilinear", align_corners=False)
    displacement = rearrange(displacement.clamp(-1, 1), "b c h w -> b h w c")
    field = F.affine_grid(affine, z_r.shape, align_corners=False) + displacement       # (B, H, W, 2)
    grid = F.affine_grid(torch.eye(2, 3, device=z_r.device)[None], z_r[:1].shape, align_corners=False)
    moved = F.grid_sample(z_r, grid + field, padding_mode="border", align_corners=False)
    return Picture(moved * (1 - alpha) + residual, moved, alpha, field)
