"""Chapter 1, abstraction: one frame in, its motion out as L tokens of D numbers (paper section 3.1, eq. 1).

    frame (B, C, H, W) -> patches (B, N, p*p*C) -> drop a random share -> ViT, joined by L learnable tokens
                                                                       -> the L outputs, normalised: motion (B, L, D)

The mask and the narrow output make the token a description of the state rather than a copy of the picture: what a
reference photo can supply (identity, clothes, background) is not worth its place in 1 x D numbers.

Shape key: B batch, F frames, N patches, L motion tokens per frame, D motion width, A audio features,
C H W image or latent, E model width.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class EncoderConfig:
    image_size: int = 128     # H = W, pixels or latent cells
    channels: int = 3         # C
    patch_size: int = 16      # p
    width: int = 192          # E
    depth: int = 4
    heads: int = 3
    num_tokens: int = 1       # L
    token_dim: int = 64       # D
    patch_summary: int = 16   # S, numbers of each patch that enter token_init (ours)

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")


def patchify(x, p):
    """(B, C, H, W) -> (B, N, p*p*C), patches in reading order."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def unpatchify(x, p):
    """(B, N, p*p*C) -> (B, C, H, W), square; the inverse of patchify."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=int(x.shape[1] ** 0.5))


def sincos(positions, width):
    """Fixed sinusoidal embedding of positions (n,) -> (n, width), wavelengths 2 pi .. 2 pi 10^4 (Vaswani et al. 2017)."""
    freq = 1e-4 ** torch.linspace(0, 1, width // 2)
    angle = positions[:, None].float() * freq                                          # (n, width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)                                # (n, width)


def sincos_2d(side, width):
    """Embedding of a side x side grid in reading order -> (side*side, width): one half for rows, one for columns."""
    axis = sincos(torch.arange(side), width // 2)                                      # (side, width/2)
    return torch.cat([axis.repeat_interleave(side, 0), axis.repeat(side, 1)], dim=1)   # (N, width)


def attention(q, k, v):
    """Softmax attention, (B, heads, n, d) -> (B, heads, n, d).

    torch's fused kernel, except when training on a CPU: its backward pass there is slower than two plain products
    at our short lengths (bench.py measures it).
    """
    if q.device.type == "cpu" and q.requires_grad:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rms_norm(x):
    """Scale the last axis to unit mean square (no learned gain; in x's own precision)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys (stable in bf16). Keys and values can come from elsewhere."""

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
        return self.out(rearrange(attention(*self.project(x)), "b h n d -> b n (h d)"))                # (B, n, E)


def mlp(width, ratio=4):
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


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
    """Give every number of the token zero mean and unit variance over the data, by running statistics (ours).

    A freshly made ViT answers every frame with nearly the same token; the decoder then learns to ignore it and the
    mouth stays dead. Subtracting what all frames share makes the differences the signal from the first step, and gives
    stage 2 unit-scale targets. No learned scale; training and inference use the same statistics; with several
    processes, those of the whole batch.
    """

    def __init__(self, dim, momentum=0.02):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("square", torch.ones(dim))                                # running mean of x^2
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, x):
        moments = torch.stack([x.mean(0), x.square().mean(0)])                         # (2, D)
        if dist.is_initialized():
            dist.all_reduce(moments)
            moments /= dist.get_world_size()
        self.count += 1
        rate = torch.clamp(1 / self.count, min=self.momentum)                          # a plain average at first, then a moving one
        self.mean.lerp_(moments[0], rate)
        self.square.lerp_(moments[1], rate)

    def forward(self, x):
        x = x.float()
        if self.training:
            self.update(x.detach().flatten(0, -2))
        deviation = (self.square - self.mean**2).clamp(min=1e-6).sqrt()
        return (x - self.mean) / deviation


class MotionEncoder(nn.Module):
    """Frame -> motion tokens (B, L, D). `ids_keep` names the patches that stay; None keeps all of them.

    The learnable tokens start from token_init, linear in a few numbers of each patch, each place with weights of its own
    (ours). Without it a new token holds the mean over all patches, in which a mouth is a
    fiftieth of what varies, and finding it takes several times the steps.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = c = config
        grid_size = c.image_size // c.patch_size
        self.embed = nn.Linear(c.patch_size**2 * c.channels, c.width)
        self.tokens = nn.Parameter(0.02 * torch.randn(c.num_tokens, c.width))
        self.patch_summary = nn.Linear(c.width, c.patch_summary)
        self.token_init = nn.Linear(grid_size**2 * c.patch_summary, c.num_tokens * c.width, bias=False)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.depth))
        self.head = nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, c.token_dim),
                                  nn.LayerNorm(c.token_dim, elementwise_affine=False))
        self.running_norm = RunningNorm(c.token_dim)
        self.register_buffer("position", sincos_2d(grid_size, c.width), persistent=False)   # (N, E)

    def forward(self, x, ids_keep=None):
        """x (B, C, H, W), ids_keep (B, n) sorted patch numbers -> motion (B, L, D), fp32."""
        z = self.embed(patchify(x, self.config.patch_size)) + self.position            # (B, N, E)
        if ids_keep is None:
            summaries = self.patch_summary(z)                                          # (B, N, S)
        else:
            patches, index = z.shape[1], ids_keep[..., None]
            z = z.gather(1, index.expand(-1, -1, z.shape[-1]))                         # (B, n, E)     Z^m
            kept = self.patch_summary(z) * (patches / z.shape[1])                      # (B, n, S)
            summaries = kept.new_zeros(len(z), patches, kept.shape[-1]).scatter(1, index.expand_as(kept), kept)
        init = rearrange(self.token_init(summaries.flatten(1)), "b (l e) -> b l e", l=self.config.num_tokens)
        tokens = self.tokens + init                                                    # (B, L, E)     T
        z = torch.cat([z, tokens], dim=1)                                              # (B, n+L, E)   Z^m + T
        for block in self.blocks:
            z = block(z)
        return self.running_norm(self.head(z[:, -self.config.num_tokens:]))            # (B, L, D)     eq. (1)


def random_masking(batch, patches, ratio, generator=None, device=None):
    """Sorted numbers of the patches that a mask of share `ratio` leaves, a different subset for each sample.

    -> (batch, n), n = patches - floor(ratio * patches), at least 1. One ratio for all, so that the batch stays a rectangle.
    """
    num_keep = max(1, patches - int(ratio * patches))
    order = torch.rand(batch, patches, generator=generator, device=device).argsort(1)
    return order[:, :num_keep].sort(1).values                                          # (batch, n)
