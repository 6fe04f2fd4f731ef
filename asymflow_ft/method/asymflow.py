"""AsymFlow in token space (arXiv 2605.12964; symbols in docs/method.md).

B batch, N tokens, D pixel-patch size (768), R subspace rank (128).
x_* are pixel tokens (B, N, D); z_* are latent tokens (B, N, R); eps is pixel noise (B, N, D).
sigma is the pixel noise level in [0, 1], broadcastable as (B, 1, 1): x_t = (1 - sigma) x0 + sigma eps.
basis A is (D, R) with orthonormal columns, P = A A^T; scale s > 0 is pixel units per latent unit.

The network predicts u = P eps - x0 / s. Inside the subspace that is a velocity, outside it is a clean image, so a
network that knows only R of D directions can start from a latent model. All functions here compute in the precision
of the basis, which is float32 or float64, whatever precision the network runs in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """How the network sees a pixel state: its input is gain * x_t at noise level tau."""

    gain: Tensor
    tau: Tensor


def calibrate(sigma: Tensor, scale: Tensor) -> Calibration:
    """Gain and noise level at which a network trained on latents sees a pixel state (paper Eqs. 11-13).

    gain = 1 / (s (1 - sigma) + sigma), tau = gain sigma. For x0 = s A z0 the projection of gain * x_t on the basis is
    then exactly the latent state (1 - tau) z0 + tau A^T eps.

    Args:
        sigma: pixel noise level in [0, 1], any shape. scale: (), positive.
    """
    gain = 1 / (scale + (1 - scale) * sigma)
    return Calibration(gain=gain, tau=gain * sigma)


def network_target(x0: Tensor, eps: Tensor, basis: Tensor, scale: Tensor) -> Tensor:
    """What the network predicts, u = P eps - x0 / s, (B, N, D) (paper Eq. 14)."""
    return project(eps, basis) - x0 / scale


def project(x: Tensor, basis: Tensor) -> Tensor:
    """P x, (B, N, D): the part of pixel tokens inside the subspace."""
    return (x.to(basis) @ basis) @ basis.mT


def recover_velocity(
    u: Tensor, x_t: Tensor, sigma: Tensor, basis: Tensor, scale: Tensor, sigma_min: float = 1e-4
) -> Tensor:
    """Full velocity eps - x0 from the network output (paper Eqs. 15-17).

    v = P[s k u + k (1 - s) (sigma / c) x_t] + (I - P)(x_t + s u) / c with c = max(sigma, sigma_min). The form
    (1 - s k) / sigma = k (1 - s) of the first bracket avoids a difference of nearly equal numbers at small sigma. As
    y + P(x - y), with x and y the two brackets, it takes one projection.

    Args:
        u: network output (B, N, D). x_t: noisy pixel tokens (B, N, D), not multiplied by the gain.
        sigma: (B, 1, 1). basis: (D, R). scale: ().
        sigma_min: floor of the division outside the subspace; 1e-4 samples text-to-image, 0.04 ImageNet, 1e-6 trains.

    Returns:
        Velocity (B, N, D) in the precision of the basis.
    """
    u, x_t, sigma = u.to(basis), x_t.to(basis), sigma.to(basis)
    gain = calibrate(sigma, scale).gain
    floor = sigma.clamp(min=sigma_min)
    inside = torch.addcmul(scale * gain * u, x_t, gain * (1 - scale) * (sigma / floor))
    outside = torch.addcmul(x_t, u, scale) / floor
    return outside + project(inside - outside, basis)


def recover_clean(u: Tensor, x_t: Tensor, sigma: Tensor, basis: Tensor, scale: Tensor) -> Tensor:
    """Estimate of x0 from the network output, with no division by sigma: s k P(x_t - sigma u) - s (I - P) u.

    Equals x_t - sigma * recover_velocity(...) wherever sigma is above that function's floor, without the
    cancellation of two large terms.
    """
    u, x_t, sigma = u.to(basis), x_t.to(basis), sigma.to(basis)
    seen = calibrate(sigma, scale)
    return scale * (project(torch.addcmul((1 - seen.tau) * u, x_t, seen.gain), basis) - u)


def velocity_to_clean(velocity: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - sigma v."""
    return x_t - sigma * velocity


def clean_to_velocity(x0: Tensor, x_t: Tensor, sigma: Tensor, sigma_min: float = 1e-4) -> Tensor:
    """v = (x_t - x0) / max(sigma, sigma_min)."""
    return (x_t - x0) / sigma.clamp(min=sigma_min)


def lift(z: Tensor, basis: Tensor, scale: Tensor) -> Tensor:
    """Latent tokens (B, N, R) -> the pixel tokens s A z (B, N, D) that the unfinetuned pixel model draws."""
    return scale * (z.to(basis) @ basis.mT)


def latent_state(z0: Tensor, eps: Tensor, sigma: Tensor, basis: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The latent state that belongs to the lifted image s A z0 under the pixel noise eps at level sigma.

    Returns:
        z_tau (B, N, R) = (1 - tau) z0 + tau A^T eps, and tau (B, 1, 1).
    """
    tau = calibrate(sigma.to(basis), scale).tau
    return torch.lerp(z0.to(basis), eps.to(basis) @ basis, tau), tau


def lift_weights(
    weight_in: Tensor, weight_out: Tensor, bias_out: Tensor | None, basis: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fold the basis into the end layers of a latent network: W_in A^T, A W_out, A b_out (paper section 4.2).

    Args:
        weight_in: (inner, R). weight_out: (R, inner). bias_out: (R,) or None. basis: (D, R).

    Returns:
        (inner, D), (D, inner) and (D,) or None, multiplied in the precision of the basis and cast back.

    Raises:
        ValueError: the layers do not have the rank of the basis.
    """
    rank = basis.shape[1]
    if weight_in.shape[1] != rank or weight_out.shape[0] != rank:
        raise ValueError(
            f"the basis has shape {tuple(basis.shape)} (pixel values, latent rank) but the base reads latent tokens "
            f"of {weight_in.shape[1]} and writes {weight_out.shape[0]} values; "
            "align again with this base (`asymflow-ft align --base ...`)"
        )
    bias = None if bias_out is None else (basis @ bias_out.to(basis)).to(bias_out)
    return (weight_in.to(basis) @ basis.mT).to(weight_in), (basis @ weight_out.to(basis)).to(weight_out), bias
