"""One micro-batch's loss: noise it, predict, compare with the variance-reduced target (docs/method.md)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import Cond, PixelModel
from asymflow_ft.data.prepare import Batch
from asymflow_ft.method import asymflow
from asymflow_ft.method import loss as losses
from asymflow_ft.method.noise import logit_normal_sigmas
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.recipe import Recipe
from asymflow_ft.training.perceptual import PerceptualMap
from asymflow_ft.training.trainable import Reference

SIGMA_BINS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Terms:
    """Weighted loss terms and the mean of lambda per sample, (B,) each, with the samples' noise levels (B,)."""

    mse: Tensor
    perceptual: Tensor
    coefficient: Tensor
    sigma: Tensor

    def loss(self) -> Tensor:
        """What is minimised, ()."""
        return (self.mse + self.perceptual).mean()

    def rows(self) -> Tensor:
        """(B, 4) without gradient, for the log: the fields in order."""
        return torch.stack([self.mse, self.perceptual, self.coefficient, self.sigma], dim=1).detach()


def draw_noise(serials: list[int], tokens: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Standard normal draws of each sample, a function of the seed and its serial number alone.

    Returns:
        level (B, 1, 1), from which the noise level is made, and eps (B, tokens, dim); float32 on the CPU.
    """
    level, eps = torch.empty(len(serials), 1, 1), torch.empty(len(serials), tokens, dim)
    for i, serial in enumerate(serials):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + serial) % 2**63)
        level[i].normal_(generator=generator)
        eps[i].normal_(generator=generator)
    return level, eps


def pixel_noise(batch: Batch, patch: int, seed: int) -> tuple[Tensor, Tensor]:
    """`draw_noise` of a micro-batch in pixel tokens."""
    return draw_noise(batch.serials, batch.rgb[0, 0].numel() // patch**2, 3 * patch**2, seed)


def condition_of(batch: Batch, codec: PixelCodec, guidance: float | None, device: torch.device) -> Cond:
    """What the predictions of a batch are conditioned on, for the pixel model and for the latent reference."""
    references = tuple(codec.encode(rgb.to(device)) for rgb in batch.references)
    return Cond(batch.embeds.to(device), guidance, references, tuple(z.to(device) for z in batch.z_references))


def training_terms(
    recipe: Recipe, model: PixelModel, reference: Reference | None, codec: PixelCodec,
    perceptual: PerceptualMap | None, batch: Batch, noise: tuple[Tensor, Tensor], shift: float, device: torch.device,
) -> Terms:  # fmt: skip
    """The terms of the loss on one micro-batch.

    Args:
        reference: None for plain flow matching, which has no perceptual term. noise: the batch's `pixel_noise`.
        shift: timestep shift of the noise levels.
    """
    patch = model.subspace.config["patch"]
    grid = (batch.rgb.shape[-2] // patch, batch.rgb.shape[-1] // patch)
    level, eps = (tensor.to(device) for tensor in noise)
    rgb, z0, cond = batch.rgb.to(device), batch.z0.to(device), condition_of(batch, codec, model.guidance, device)
    x0 = to_tokens(codec.encode(rgb), patch)
    sigma = logit_normal_sigmas(level, shift, recipe.noise.mean, recipe.noise.std)

    x_t = torch.lerp(x0, eps, sigma)
    if reference is None:
        x0_hat = model.clean(x_t, sigma, cond, grid)
        mse = recipe.loss.mse * losses.velocity_mse(x0_hat, x0, sigma, recipe.loss.sigma_floor)
        return Terms(mse, torch.zeros_like(mse), torch.zeros_like(mse), sigma.flatten())
    x_low = asymflow.lift(z0, *model.subspace.float32())
    x_low_hat = reference(z0, eps, sigma, cond, grid)
    x0_hat = model.clean(x_t, sigma, cond, grid)
    target = losses.variance_reduced_target(x0, x0_hat, x_low, x_low_hat, sigma, recipe.loss.kappa)
    mse = recipe.loss.mse * losses.velocity_mse(x0_hat, target.image, sigma, recipe.loss.sigma_floor)
    distance = torch.zeros_like(mse)
    if perceptual is not None:
        weight = losses.perceptual_weight(target, sigma, recipe.loss.sigma_floor)
        per_pixel = to_image(weight.expand(-1, -1, patch**2), grid, patch)
        between = perceptual(codec.decode(to_image(x0_hat, grid, patch)), rgb)
        distance = recipe.loss.perceptual_weight * (between * per_pixel).mean((1, 2, 3))
    return Terms(mse, distance, target.coefficient.mean((1, 2)), sigma.flatten())


def summarise(rows: Tensor) -> dict[str, float]:
    """Means of `Terms.rows()` over all samples of a step (N, 4), and the loss per bin of noise levels that has any."""
    mse, perceptual, coefficient, sigma = rows.double().cpu().unbind(1)
    loss = mse + perceptual
    shown = {"loss": loss.mean().item(), "mse": mse.mean().item(), "lambda": coefficient.mean().item()}
    if perceptual.any():
        shown["perceptual"] = perceptual.mean().item()
    for low, high in pairwise(SIGMA_BINS):
        inside = (sigma > low) & (sigma <= high)
        if inside.any():
            shown[f"loss_sigma/{low:.2f}-{high:.2f}"] = loss[inside].mean().item()
    return shown
