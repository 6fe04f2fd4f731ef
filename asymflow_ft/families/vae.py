"""Latent tokens of VAEs that several families share; a family says which it has."""

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional as F

from asymflow_ft.components.subspace import Grid
from asymflow_ft.method.patches import to_image, to_tokens

KL_PACK = 2  # side of the square of AutoencoderKL's latents that is one token


def whitened_patch(vae: AutoencoderKLFlux2) -> int:
    """Side in pixels of the image patch that one latent token stands for."""
    return 2 ** (len(vae.config.block_out_channels) - 1) * vae.config.patch_size[0]


def whitened_dim(vae: AutoencoderKLFlux2) -> int:
    """Values of one latent token, the rank R of the subspace."""
    return vae.config.latent_channels * vae.config.patch_size[0] * vae.config.patch_size[1]


def _whitening(vae: AutoencoderKLFlux2, like: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    mean, eps = vae.bn.running_mean.to(like)[:, None, None], vae.config.batch_norm_eps if eps is None else eps
    return mean, (vae.bn.running_var.to(like) + eps).sqrt()[:, None, None]


def encode_whitened(
    vae: AutoencoderKLFlux2, rgb: Tensor, generator: torch.Generator | None = None, eps: float | None = None
) -> Tensor:
    """RGB in [-1, 1], (B, 3, H, W) -> float32 latent tokens (B, N, R), packed 2x2 and whitened by the VAE's batch-norm
    statistics: the posterior's mode, or with a generator a sample of it.

    Args:
        eps: added to the variances; None: the VAE config's.
    """
    posterior = vae.encode(rgb.to(vae.device, vae.dtype)).latent_dist
    z = (posterior.mode() if generator is None else posterior.sample(generator)).float()
    packed = F.pixel_unshuffle(z, vae.config.patch_size[0])
    mean, std = _whitening(vae, packed, eps)
    return to_tokens((packed - mean) / std, 1)


def decode_whitened(vae: AutoencoderKLFlux2, z: Tensor, grid: Grid, eps: float | None = None) -> Tensor:
    """Latent tokens (B, N, R) -> RGB in [-1, 1], float32; `grid` is (rows, columns) of tokens."""
    packed = to_image(z.to(vae.device), grid, 1)
    mean, std = _whitening(vae, packed, eps)
    latents = F.pixel_shuffle(packed * std + mean, vae.config.patch_size[0])
    return vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)


# pixel_patch, latent_dim, encode_latents and decode_latents of a family with such latents
WHITENED_LATENTS = (whitened_patch, whitened_dim, encode_whitened, decode_whitened)


def kl_pixel_patch(vae: AutoencoderKL) -> int:
    """Side in pixels of the image patch that one token of 2x2 latents stands for."""
    return 2 ** (len(vae.config.block_out_channels) - 1) * KL_PACK


def kl_latent_dim(vae: AutoencoderKL) -> int:
    """Values of one token of 2x2 latents, the rank R of the subspace."""
    return vae.config.latent_channels * KL_PACK**2


def kl_encode_latents(vae: AutoencoderKL, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """RGB in [-1, 1], (B, 3, H, W) -> normalised float32 latent tokens (B, N, R) of 2x2 latents: the posterior's mode,
    or with a generator a sample of it."""
    posterior = vae.encode(rgb.to(vae.device, vae.dtype)).latent_dist
    z = (posterior.mode() if generator is None else posterior.sample(generator)).float()
    return to_tokens((z - vae.config.shift_factor) * vae.config.scaling_factor, KL_PACK)


def kl_decode_latents(vae: AutoencoderKL, z: Tensor, grid: Grid) -> Tensor:
    """Latent tokens (B, N, R) of 2x2 latents -> RGB in [-1, 1], float32; `grid` is (rows, columns) of tokens."""
    latents = to_image(z.to(vae.device), grid, KL_PACK) / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)


# pixel_patch, latent_dim, encode_latents and decode_latents of a family with such latents
KL_LATENTS = (kl_pixel_patch, kl_latent_dim, kl_encode_latents, kl_decode_latents)
