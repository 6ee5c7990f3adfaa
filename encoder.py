"""Chapter 1, abstraction: one frame in, its motion out as L tokens of D numbers (paper section 3.1, eq. 1).

    frame (B, C, H, W) -> patches (B, N, p*p*C) -> drop a random share -> ViT, joined by L learnable tokens
                                                                -> the L outputs, normalised: motion (B, L, D)

The mask and the narrow output force the token to describe motion and not to copy the picture: identity,
clothes and background reach the decoder by the reference photo.

Shape key: B batch, F frames, N patches, L motion tokens per frame, D motion width, A audio features,
C H W image or latent, E model width.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    """Sizes that encoder and decoder share. Raises ValueError for those that no ViT can have."""
    image_size: int = 128       # H = W, pixels or latent cells
    channels: int = 3           # C
    patch_size: int = 16        # p
    width: int = 192            # E
    depth: int = 4
    heads: int = 3
    num_tokens: int = 1         # L
    token_dim: int = 64         # D

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")


@dataclass(frozen=True)
class EncoderConfig(ViTConfig):
    token_init: int = 16        # ours: numbers of each patch from which the tokens start (TokenInit); 0: none
    running_norm: bool = True   # ours: motion normalised by running statistics; False: LayerNorm alone
    view_shift: int = 0         # ours: in use, the mean of views so many pixels apart; 0: the frame alone

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.view_shift < self.patch_size:
            raise ValueError(f"view_shift {self.view_shift} must be less than patch_size {self.patch_size}")


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p*p*C), patches in reading order."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """(B, N, p*p*C) -> (B, C, H, W), square; the inverse of patchify."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=int(x.shape[1] ** 0.5))


def sincos(positions: Tensor, width: int) -> Tensor:
    """Embed positions (n,) -> (n, width), wavelengths 2 pi .. 2 pi 10^4 (Vaswani et al. 2017)."""
    freq = 1e-4 ** torch.linspace(0, 1, width // 2, device=positions.device)
    angle = positions[:, None].float() * freq                                          # (n, width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)                                # (n, width)


def sincos_2d(grid_size: int, width: int) -> Tensor:
    """Embed a square grid in reading order -> (grid_size^2, width): one half for rows, one for columns."""
    axis = sincos(torch.arange(grid_size), width // 2)                                 # (grid_size, width/2)
    return torch.cat([axis.repeat_interleave(grid_size, 0), axis.repeat(grid_size, 1)], dim=1)   # (N, width)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax attention, (B, heads, n, d) -> (B, heads, n, d): by torch's fused kernel; in training
    on a CPU by two plain products, whose backward pass is faster there at these short lengths."""
    if q.device.type == "cpu" and q.requires_grad:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last axis to unit mean square (no learned gain; in the precision of x)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys (stable in bf16)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def project(self, x):
        """x (B, n, E) -> q, k, v, each (B, heads, n, d)."""
        q, k, v = rearrange(self.qkv(x), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        return rms_norm(q), rms_norm(k), v

    def forward(self, x):
        return self.out(rearrange(attention(*self.project(x)), "b h n d -> b n (h d)"))   # (B, n, E)


def mlp(width: int) -> nn.Sequential:
    """Two linear layers with a GELU between them, four times as wide inside."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                         nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), mlp(width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class RunningNorm(nn.Module):
    """Normalise each number of the token to zero mean and unit variance by running statistics (ours).

    BatchNorm without learned scale; training, too, uses the running statistics, those of all processes. A new
    ViT gives nearly the same token for every frame, and the decoder then learns to ignore it; without what
    all frames share, the differences are the signal from the first step. Stage 2 gets targets of unit scale.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("square", torch.ones(dim))      # running mean of x^2
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, x):
        moments = torch.stack([x.mean(0), x.square().mean(0)])                         # (2, D)
        if dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        self.count += 1
        rate = torch.clamp(1 / self.count, min=0.02)             # a plain average at first, then a moving one
        self.mean.lerp_(moments[0], rate)
        self.square.lerp_(moments[1], rate)

    def forward(self, x):
        x = x.float()
        if self.training:
            self.update(x.detach().flatten(0, -2))
        deviation = (self.square - self.mean**2).clamp(min=1e-6).sqrt()
        return (x - self.mean) / deviation


class TokenInit(nn.Module):
    """Add to the learnable tokens a linear function of the visible patches, with weights per position (ours).
    Without it a token first holds the mean over all patches, in which a mouth is a fiftieth of the variation;
    learning to attend to it takes several times the steps."""

    def __init__(self, patches: int, c: EncoderConfig):
        super().__init__()
        self.num_tokens = c.num_tokens
        self.patch_summary = nn.Linear(c.width, c.token_init)
        self.project = nn.Linear(patches * c.token_init, c.num_tokens * c.width, bias=False)

    def forward(self, z, ids_keep, patches: int):
        """Visible patches z (B, n, E) and their numbers ids_keep (B, n), None: all -> (B, L, E)."""
        summary = self.patch_summary(z)                                                # (B, n, dim)
        if ids_keep is not None:                      # each at its place, scaled up for those that are hidden
            index = ids_keep[..., None].expand_as(summary)
            summary = summary * (patches / z.shape[1])
            summary = summary.new_zeros(len(z), patches, summary.shape[-1]).scatter(1, index, summary)
        return rearrange(self.project(summary.flatten(1)), "b (l e) -> b l e", l=self.num_tokens)


class MotionEncoder(nn.Module):
    """Frame -> motion tokens (B, L, D), eq. (1)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = c = config
        grid_size = c.image_size // c.patch_size
        self.embed = nn.Linear(c.patch_size**2 * c.channels, c.width)
        self.tokens = nn.Parameter(0.02 * torch.randn(c.num_tokens, c.width))
        self.token_init = TokenInit(grid_size**2, c) if c.token_init else None
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.depth))
        self.head = nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, c.token_dim),
                                  nn.LayerNorm(c.token_dim, elementwise_affine=False))
        self.running_norm = RunningNorm(c.token_dim) if c.running_norm else nn.Identity()
        self.register_buffer("pos_embed", sincos_2d(grid_size, c.width), persistent=False)     # (N, E)

    def forward(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode x (B, C, H, W) -> motion (B, L, D), fp32.
        ids_keep (B, n): sorted numbers of the visible patches, see random_masking; None: all are visible.

        With view_shift, out of training and without a mask: the mean over the frame and four copies of it,
        moved by that many pixels (test-time augmentation). It averages out much of what the place of the face
        in the grid of patches adds to the token.
        """
        s = self.config.view_shift
        if self.training or ids_keep is not None or not s:
            return self.encode_view(x, ids_keep)
        wide, (height, width) = F.pad(x, (s, s, s, s), mode="replicate"), x.shape[-2:]
        views = [wide[..., top:top + height, left:left + width]
                 for top, left in ((s, s), (0, s), (2 * s, s), (s, 0), (s, 2 * s))]
        return self.encode_view(torch.cat(views)).unflatten(0, (5, len(x))).mean(0)

    def encode_view(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Encode x as it is; shapes as of forward."""
        z = self.embed(patchify(x, self.config.patch_size)) + self.pos_embed           # (B, N, E)
        patches = z.shape[1]
        if ids_keep is not None:
            z = z.gather(1, ids_keep[..., None].expand(-1, -1, z.shape[-1]))           # (B, n, E)     Z^m
        tokens = self.tokens.expand(len(z), -1, -1)                                    # (B, L, E)     T
        if self.token_init is not None:
            tokens = tokens + self.token_init(z, ids_keep, patches)
        z = torch.cat([z, tokens], dim=1)                                              # (B, n+L, E)   Z^m + T
        for block in self.blocks:
            z = block(z)
        return self.running_norm(self.head(z[:, -self.config.num_tokens:])).float()    # (B, L, D)     eq. (1)


def random_masking(batch: int, patches: int, ratio: float, generator=None, device=None) -> Tensor:
    """Choose the patches that stay visible, a different subset for each sample (MAE, He et al. 2022).
    -> ids_keep (batch, n) sorted, n = patches - floor(ratio * patches), at least 1. One ratio for all, so
    that the batch stays a rectangle."""
    visible = max(1, patches - int(ratio * patches))
    order = torch.rand(batch, patches, generator=generator, device=device).argsort(1)
    return order[:, :visible].sort(1).values                                           # (batch, n)
