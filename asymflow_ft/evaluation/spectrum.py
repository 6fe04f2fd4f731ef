"""Power spectra: grain and blur, frequency by frequency."""

import torch
from torch import Tensor

from asymflow_ft.components.color import PixelCodec

BANDS = {"low_band": (0.0, 1 / 16), "middle_band": (1 / 16, 1 / 4), "high_band": (1 / 4, 1.0)}  # cycles per pixel
_OKLAB = PixelCodec(space="oklab", mean=(0.0, 0.0, 0.0), std=1.0)
_RINGS = 128  # per cycle per pixel; finer rings of a large picture say nothing more


def frequency_rings(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which ring each frequency of an (height, width) picture is in, (height, width) int64; and of every ring its
    mean frequency in cycles per pixel and the number of frequencies in it. The mean itself is in none (ring -1)."""
    f = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(height), torch.fft.fftfreq(width), indexing="ij")).double()
    width_of_ring = 1 / min(height, width, _RINGS)
    ring = (f / width_of_ring - 0.5).clamp(min=0).floor().long()
    ring[0, 0] = -1
    index, inside = ring.flatten() + 1, torch.ones(f.numel(), dtype=torch.float64)
    count = torch.zeros(int(ring.max()) + 2, dtype=torch.float64).index_add_(0, index, inside)[1:]
    total = torch.zeros(len(count) + 1, dtype=torch.float64).index_add_(0, index, f.flatten())[1:]
    return ring, total / count, count


def power_spectra(rgb: Tensor) -> Tensor:
    """Power density of each picture's lightness (Oklab L), averaged over the rings of `frequency_rings`.

    Summed over all frequencies and divided by their number, the density is the variance under the window. The window
    (Hann) is there because pictures do not wrap around: the jump between opposite edges has a spectrum of its own,
    which hides what blur takes away.

    Args:
        rgb: (B, 3, H, W) in [-1, 1].

    Returns:
        (B, rings) float64.
    """
    light = _OKLAB.encode(rgb)[:, 0].double()
    height, width = light.shape[-2:]
    hann = [torch.hann_window(n + 1, dtype=torch.float64)[1:] if n > 1 else torch.ones(1) for n in (height, width)]
    window = hann[0][:, None] * hann[1]
    mean = (window.square() * light).sum((1, 2), keepdim=True) / window.square().sum()
    power = torch.fft.fft2(window * (light - mean)).abs().square() / window.square().sum()
    ring, _, count = frequency_rings(height, width)
    total = torch.zeros(len(light), len(count) + 1, dtype=torch.float64)
    return total.index_add_(1, ring.flatten() + 1, power.flatten(1))[:, 1:] / count


def power_spectrum(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Frequency (rings,) in cycles per pixel, and the mean power density (rings,) of pictures (B, 3, H, W)."""
    return frequency_rings(*rgb.shape[-2:])[1], power_spectra(rgb).mean(0)


def spectrum_error(density: Tensor, real: Tensor) -> Tensor:
    """Mean absolute log10 ratio of spectra (..., rings) to the real one (rings,): 0 is equal, 1 a factor of ten."""
    return (density / real).log10().abs().mean(-1)


def band_level(density: Tensor, real: Tensor, size: tuple[int, int], band: str) -> Tensor:
    """Power of spectra (..., rings) of pictures of `size` (height, width) in a band of BANDS, in dB above the real
    one's (rings,); below 0 is blur, above 0 grain."""
    (low, high), (_, frequency, count) = BANDS[band], frequency_rings(*size)
    weight = count * ((frequency >= low) & (frequency < high))
    return 10 * (density @ weight / (real @ weight)).log10()
