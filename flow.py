"""Rectified flow: the path, the loss, the sampler (paper section 3.3; Liu et al. 2022, arXiv 2209.03003).

The one convention, used everywhere: t = 0 is data, t = 1 is noise,

    z_t = (1 - t) z + t eps      eqs. (2), (6)          v = z - eps = -dz_t/dt      eqs. (8), (9)

so a sampler walks t from 1 down to 0, adding v * (step). This file knows no model: a model is any callable
model(z_t, t (B,), **cond) -> v.
"""
import torch


def _per_sample(t, z):
    """(B,) -> (B, 1, ..., 1), to multiply z."""
    return t.view(-1, *[1] * (z.dim() - 1)).to(z.dtype)


def interpolate(z, eps, t):
    """The straight path from data z to noise eps, both (B, ...), at times t (B,) in [0, 1]."""
    t = _per_sample(t, z)
    return (1 - t) * z + t * eps                                                       # eqs. (2), (6)


def sample_timesteps(batch, generator=None, p_pure_noise=0.5, mean=0.8, std=0.8):
    """Draw training times (batch,): a share at exactly t = 1, the rest logit-normal, leaning to noise (ours).
    At pure noise a picture can be told only from the condition; low noise teaches nothing but denoising
    (logit-normal: Esser et al. 2024)."""
    t = torch.sigmoid(mean + std * torch.randn(batch, generator=generator))
    pure = torch.rand(batch, generator=generator) < p_pure_noise
    return torch.where(pure, torch.ones_like(t), t)


def flow_loss(model, z, eps, t, weight=None, **cond):
    """Mean squared error of the velocity, in fp32 -> scalar. weight (B,): of each sample."""
    v = model(interpolate(z, eps, t), t, **cond)
    error = (v.float() - (z - eps).float()).square().flatten(1).mean(1)                # (B,)   eqs. (8), (9)
    return (error if weight is None else weight * error).mean()


def x_to_v(x, z_t, t, t_min=0.05):
    """Velocity v = (x - z_t) / t towards predicted data x at time t (JiT, arXiv 2511.13720).
    t is taken as at least t_min. In training this bounds the gradient. In sampling it must lie below the last
    step's time, 1 / steps, so that the last step ends at x."""
    return (x - z_t) / _per_sample(t.clamp(min=t_min), z_t)


def with_cfg(model, guidance, null):
    """Classifier-free guidance, u + s (c - u), where u has the conditions `null` (Ho and Salimans 2022)."""
    if guidance == 1:
        return model

    def guided(z, t, **cond):
        uncond = model(z, t, **{**cond, **null})
        return uncond + guidance * (model(z, t, **cond) - uncond)

    return guided


def integrate(model, noise, steps, skip_last=0, **cond):
    """Walk from noise (t = 1) to data (t = 0) in equal Euler steps -> the same shape as noise.
    skip_last: so many steps are left to take."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    z, dt = noise, 1 / steps
    for k in range(steps - skip_last):
        z = z + model(z, z.new_full((len(z),), 1 - k / steps), **cond) * dt
    return z
