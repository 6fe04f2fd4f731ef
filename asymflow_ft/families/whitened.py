"""Latents of AutoencoderKLFlux2: 2x2 packed, channel first, whitened by the VAE's batch-norm statistics; rank 128, one
token per 16x16 pixels. More than one family has them."""

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional as F

from asymflow_ft.components.subspace import Grid
from asymflow_ft.method.patches import to_image, to_tokens


def pixel_patch(vae: AutoencoderKLFlux2) -> int:
    """Side in pixels of the image patch that one latent token stands for."""
    return 2 ** (len(vae.config.block_out_channels) - 1) * vae.config.patch_size[0]


def latent_dim(vae: AutoencoderKLFlux2) -> int:
    """Values of one latent token, the rank R of the subspace."""
    return vae.config.latent_channels * vae.config.patch_size[0] * vae.config.patch_size[1]


def _whitening(vae: AutoencoderKLFlux2, like: Tensor) -> tuple[Tensor, Tensor]:
    mean = vae.bn.running_mean.to(like)[:, None, None]
    return mean, (vae.bn.running_var.to(like) + vae.config.batch_norm_eps).sqrt()[:, None, None]


def encode_latents(vae: AutoencoderKLFlux2, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """RGB in [-1, 1], (B, 3, H, W) -> whitened float32 latent tokens (B, N, 128): the posterior's mode, or with a
    generator a sample of it."""
    posterior = vae.encode(rgb.to(vae.device, vae.dtype)).latent_dist
    z = (posterior.mode() if generator is None else posterior.sample(generator)).float()
    packed = F.pixel_unshuffle(z, vae.config.patch_size[0])
    mean, std = _whitening(vae, packed)
    return to_tokens((packed - mean) / std, 1)


def decode_latents(vae: AutoencoderKLFlux2, z: Tensor, grid: Grid) -> Tensor:
    """Latent tokens (B, N, 128) -> RGB in [-1, 1], float32; `grid` is (rows, columns) of tokens."""
    packed = to_image(z.to(vae.device), grid, 1)
    mean, std = _whitening(vae, packed)
    latents = F.pixel_shuffle(packed * std + mean, vae.config.patch_size[0])
    return vae.decode(latents.to(vae.dtype)).sample.float().clamp(-1, 1)
