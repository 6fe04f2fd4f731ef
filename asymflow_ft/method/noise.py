"""Noise levels for training and for sampling, and how a timestep shift moves them."""

import math

import torch
from torch import Tensor


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Timestep shift: S sigma / (1 + (S - 1) sigma), [0, 1] -> [0, 1]; S > 1 moves levels towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def logit_normal_sigmas(normal: Tensor, shift: float, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Training noise levels from standard normal draws: shift_sigma(sigmoid(mean + std * normal)).

    The paper at 1024x1024 uses shift 17, mean 0, std 1 (section 5).
    """
    return shift_sigma(torch.sigmoid(mean + std * normal), shift)


def inference_sigmas(steps: int, shift: float) -> Tensor:
    """(steps + 1,) float32 levels from 1 to 0: shift_sigma of 1, (steps-1)/steps, ..., 1/steps, then 0.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    if steps < 1 or not shift > 0:
        raise ValueError(f"sampling needs at least one step and a positive shift, got {steps} steps, shift {shift}")
    raw = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shift_sigma(raw, shift), raw.new_zeros(1)]).float()


def dynamic_shift(
    pixels: int,
    mode: str = "sqrt",
    base_pixels: int = 1024**2,
    base_shift: float = 17.0,
    max_pixels: int = 2048**2,
    max_shift: float = 34.0,
) -> float:
    """Timestep shift for an image of `pixels` = height * width.

    "sqrt": linear in the square root of the pixel count; the released settings (17 at 1024^2, 34 at 2048^2) give
    17 sqrt(pixels) / 1024. "exp": the logarithm of the shift is linear in the pixel count.
    Both extend beyond the two anchors.

    Raises:
        ValueError: unknown mode, or a size at which "sqrt" gives no positive shift.
    """
    if mode == "sqrt":
        low, high = math.sqrt(base_pixels), math.sqrt(max_pixels)
        shift = base_shift + (max_shift - base_shift) * (math.sqrt(pixels) - low) / (high - low)
        if shift <= 0:
            raise ValueError(f"{pixels} pixels give the shift {shift:.3g}, which is not positive; use a fixed shift")
        return shift
    if mode == "exp":
        share = (pixels - base_pixels) / (max_pixels - base_pixels)
        return math.exp(math.log(base_shift) * (1 - share) + math.log(max_shift) * share)
    raise ValueError(f"dynamic shift {mode!r} is unknown; use 'sqrt' or 'exp'")
