"""The space in which the models work.

"pixel": pictures themselves, nothing to download. "sd": the latents of the frozen Stable Diffusion autoencoder, as in
the paper: diffusers' AutoencoderKL, by hub id or local folder.
"""
import torch

SD = "stabilityai/sd-vae-ft-mse"


class Pixel:
    """Pictures (B, 3, H, W) in [-1, 1] are their own latents."""

    channels, factor = 3, 1

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents.clamp(-1, 1)


class StableDiffusion:
    """(B, 3, H, W) in [-1, 1] <-> (B, 4, H/8, W/8), scaled to about unit variance. Frozen; one picture at a time."""

    channels, factor = 4, 8

    def __init__(self, source=SD, device="cpu", dtype=torch.float32):
        from diffusers import AutoencoderKL
        try:
            self.vae = AutoencoderKL.from_pretrained(source, torch_dtype=dtype).to(device).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the autoencoder {source!r}: download it once on a machine with internet, or "
                             "give the path of a local folder that holds it") from error
        self.vae.enable_slicing()

    @torch.no_grad()
    def encode(self, images):
        """The mean of the posterior: motion should not hold the autoencoder's noise."""
        z = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean
        return (z * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float().clamp(-1, 1)


def load_latents(kind="pixel", source=SD, device="cpu"):
    """kind: "pixel" or "sd"."""
    if kind not in ("pixel", "sd"):
        raise ValueError(f"latents must be 'pixel' or 'sd', not {kind!r}")
    return Pixel() if kind == "pixel" else StableDiffusion(source, device)
