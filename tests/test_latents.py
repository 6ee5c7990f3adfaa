"""The spaces: pixels are themselves, Stable Diffusion's autoencoder is diffusers' own, failures explained."""
import pytest
import torch

from media.latents import load_latents

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A tiny random autoencoder in the hub's own format, with factor 8 and 4 channels as the real one."""
    from diffusers import AutoencoderKL
    torch.manual_seed(1)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, sample_size=32,
                        scaling_factor=0.18215)
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return str(path)


def test_pixels_are_their_own_latents():
    space = load_latents("pixel")
    assert (space.channels, space.factor) == (3, 1)
    assert torch.equal(space.encode(IMAGES), IMAGES) and torch.equal(space.decode(IMAGES), IMAGES)
    # what a model paints may be too bright
    assert torch.equal(space.decode(3 * IMAGES), (3 * IMAGES).clamp(-1, 1))


def test_sd_latents_equal_diffusers(vae_folder):
    from diffusers import AutoencoderKL
    space, vae = load_latents("sd", vae_folder), AutoencoderKL.from_pretrained(vae_folder).eval()
    latents = space.encode(IMAGES)
    assert latents.shape == (3, space.channels, 32 // space.factor, 32 // space.factor) == (3, 4, 4, 4)
    with torch.no_grad():
        mean = vae.encode(IMAGES).latent_dist.mode() * 0.18215
        torch.testing.assert_close(latents, mean, atol=1e-5, rtol=0)
        noisy = 0.18215 * torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        pictures = vae.decode(noisy / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(space.decode(noisy), pictures, atol=1e-5, rtol=0)
    assert torch.equal(space.encode(IMAGES), latents)                        # the mean: no noise of its own


def test_sd_is_frozen_and_one_at_a_time_is_the_same(vae_folder):
    space = load_latents("sd", vae_folder)
    assert not any(p.requires_grad for p in space.vae.parameters()) and not space.vae.training
    latents = space.encode(IMAGES)
    assert not latents.requires_grad and latents.dtype == torch.float32
    for k in range(3):
        torch.testing.assert_close(space.encode(IMAGES[k:k + 1])[0], latents[k], atol=1e-5, rtol=0)
    pictures = space.decode(50 * latents)
    assert pictures.shape == IMAGES.shape and pictures.abs().max() <= 1


@pytest.mark.parametrize("there", [False, True], ids=["no folder", "an empty folder"])
def test_a_missing_autoencoder_is_explained(tmp_path, there):
    source = tmp_path / "nowhere"
    if there:
        source.mkdir()
    with pytest.raises(ValueError, match="nowhere.*local folder") as error:
        load_latents("sd", str(source))
    assert "\n" not in str(error.value)


def test_an_unknown_space_is_refused():
    with pytest.raises(ValueError, match="'pixel' or 'sd', not 'jpeg'"):
        load_latents("jpeg")
