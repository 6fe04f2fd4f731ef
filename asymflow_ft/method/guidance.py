"""Classifier-free guidance and the gamut clamp, on velocities of any shape (B, ...)."""

from collections.abc import Callable

from torch import Tensor

from asymflow_ft.method.asymflow import clean_to_velocity, velocity_to_clean


def guide(cond: Tensor, uncond: Tensor, scale: float, direction: Tensor, orthogonal: float = 1.0) -> Tensor:
    """Guided velocity cond + b with b = (scale - 1)(cond - uncond), less its part along `direction`.

    b <- b - orthogonal * (mean(b d) / max(mean(d d), 1e-6)) d, means over everything but the batch. With the
    conditional clean estimate as direction this is the projection of APG (arXiv 2410.02416): guidance may turn an
    image but not scale it, which is what oversaturates.

    Args:
        cond, uncond: velocities (B, ...). scale: guidance scale, 1 = none.
        direction: (B, ...). orthogonal: 0 = plain classifier-free guidance, 1 = fully orthogonal.
    """
    bias = (scale - 1) * (cond - uncond)
    axes = tuple(range(1, cond.ndim))
    along = (bias * direction).mean(axes, keepdim=True) / direction.square().mean(axes, keepdim=True).clamp(min=1e-6)
    return cond + bias - orthogonal * along * direction


def clamp_velocity(
    velocity: Tensor, x_t: Tensor, sigma: Tensor, clamp: Callable[[Tensor], Tensor], sigma_min: float = 1e-4
) -> Tensor:
    """The velocity whose clean estimate is clamp(x_t - sigma v): colours that a display can show, at every step."""
    return clean_to_velocity(clamp(velocity_to_clean(velocity, x_t, sigma)), x_t, sigma, sigma_min)
