"""The space in which the models work.

"pixel": pictures themselves, nothing to download. "sd": the latents of the frozen Stable Diffusion
autoencoder, as in the paper: diffusers' AutoencoderKL, by hub id or local folder.
"""
import torch

from media.files import InputError
from media.weights import is_local

SD = "stabilityai/sd-vae-ft-mse"


class Pixel:
    """Pictures (B, 3, H, W) in [-1, 1] are their own latents."""

    channels, factor = 3, 1

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents.clamp(-1, 1)


class StableDiffusion:
    """(B, 3, H, W) in [-1, 1] <-> (B, 4, H/8, W/8), scaled to about unit variance.

    Frozen; one picture at a time bounds its memory; in bf16 on GPUs.
    """

    channels, factor = 4, 8

    def __init__(self, source=SD, device="cpu"):
        from diffusers import AutoencoderKL
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        try:
            vae = AutoencoderKL.from_pretrained(source, torch_dtype=dtype,
                                                local_files_only=is_local(source))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the autoencoder {source!r}: download it once on a machine with "
                             "internet, or give the path of a local folder that holds it") from error
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.scale = vae.config.scaling_factor                                                     # 0.18215
        self.vae.enable_slicing()

    @torch.no_grad()
    def encode(self, images):
        """Compute the mean of the posterior (ours; the paper does not say).

        A sample would add noise that no motion explains.
        """
        z = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean
        return (z * self.scale).float()

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents.to(self.vae.dtype) / self.scale).sample.float().clamp(-1, 1)


SPACES = {"pixel": Pixel, "sd": StableDiffusion}


def load_latents(kind, source=SD, device="cpu"):
    """kind: "pixel" or "sd"."""
    if kind not in SPACES:
        raise ValueError(f"latents must be 'pixel' or 'sd', not {kind!r}")
    return Pixel() if kind == "pixel" else StableDiffusion(source, device)
