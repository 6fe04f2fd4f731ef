"""The variance-reduced finetuning loss (paper section 4.3; method.md section 4).

All images are pixel tokens (B, N, C * p**2), channel first; sigma is (B, 1, 1). Statistics are taken per token and per
colour channel, over its p**2 values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_POWER = 1e-4  # floor of the mean squared reference residual, in squared pixel units


@dataclass(frozen=True)
class Target:
    """What the clean estimate is pulled to, and how far the reference could be trusted.

    image: (B, N, C * p**2), no gradient. coefficient: lambda in [0, 1], (B, N, C).
    gate: root mean square of lambda over the channels, (B, N, 1). trust: omega in [0, 1], (B, 1, 1).
    """

    image: Tensor
    coefficient: Tensor
    gate: Tensor
    trust: Tensor


def fade(sigma: Tensor, kappa: float | None) -> Tensor:
    """omega = (1 - sigma)^2 / ((1 - sigma)^2 + (kappa sigma)^2): 0 in noise, 1 in the clean image.

    Where it is 0 the control variate acts in full, where it is 1 the perceptual term takes over. kappa None: always 0.
    """
    if kappa is None:
        return sigma * 0
    signal = (1 - sigma).square()
    return signal / (signal + (kappa * sigma).square())


def variance_reduced_target(
    x0: Tensor,
    x0_hat: Tensor,
    x_low: Tensor,
    x_low_hat: Tensor,
    sigma: Tensor,
    kappa: float | None = 0.3,
    channels: int = 3,
) -> Target:
    """Clean target less the noise that the frozen reference also failed to predict.

    The reference sees the lifted image under the same noise; its residual x_low - x_low_hat correlates with the
    model's own. The explained part, lambda times it, is the control variate:
        lambda = clip(<x0 - x0_hat, r> / max(<r, r>, 1e-4), 0, 1),  r = x_low - x_low_hat
        target = x0 - (1 - omega) lambda r

    Args:
        x0: clean image. x0_hat: the model's estimate. x_low: lifted image s A z0. x_low_hat: the reference's estimate
            of it. sigma: (B, 1, 1). kappa: see `fade`.
    """
    residual = (x0 - x0_hat.detach()).unflatten(-1, (channels, -1))
    reference = (x_low - x_low_hat).unflatten(-1, (channels, -1))
    power = reference.square().mean(-1).clamp(min=MIN_POWER)
    coefficient = ((residual * reference).mean(-1) / power).clamp(0, 1)
    trust = fade(sigma, kappa)
    image = torch.addcmul(x0.unflatten(-1, (channels, -1)), ((trust - 1) * coefficient)[..., None], reference)
    gate = coefficient.square().mean(-1, keepdim=True).sqrt()
    return Target(image=image.flatten(-2), coefficient=coefficient, gate=gate, trust=trust)


def velocity_mse(x0_hat: Tensor, target: Tensor, sigma: Tensor, sigma_floor: float = 0.05) -> Tensor:
    """Mean of (x0_hat - target)^2 / max(sigma, floor)^2 of each sample, (B,): velocity matching, written on clean
    images. The recipe's weight of 5 multiplies it."""
    error = (x0_hat - target).square().mean((1, 2))  # F.mse_loss would keep two tensors for its backward pass
    return error / sigma.flatten().clamp(min=sigma_floor).square()


def perceptual_weight(target: Target, sigma: Tensor, sigma_floor: float = 0.05) -> Tensor:
    """Weight of the perceptual distance at each token, gate * omega / max(sigma, floor)^2, (B, N, 1).

    Spread over each token's pixels, multiplied with a distance map (B, 1, H, W) and averaged (not normalised by the
    weights) it gives the perceptual term.
    """
    return target.gate * target.trust / sigma.clamp(min=sigma_floor).square()
