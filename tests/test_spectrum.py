"""Power spectra of pictures whose spectrum is known."""

import torch
from torch.nn import functional as F

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.evaluation.spectrum import band_level, frequency_rings, power_spectra, power_spectrum, spectrum_error

LAB = PixelCodec(space="oklab", mean=(0.0, 0.0, 0.0), std=1.0)


def grey(light):
    """RGB whose Oklab L is `light` (B, H, W)."""
    lab = torch.stack([light, torch.zeros_like(light), torch.zeros_like(light)], 1)
    return LAB.decode(lab)


def noise(count, height, width, exponent=0.0, contrast=0.05, seed=0):
    """Grey pictures with power ~ frequency^exponent; they wrap around."""
    g = torch.Generator().manual_seed(seed)
    f = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(height), torch.fft.fftfreq(width), indexing="ij")).double()
    f[0, 0] = torch.inf if exponent < 0 else 1
    white = torch.randn(count, height, width, generator=g, dtype=torch.float64)
    shaped = torch.fft.ifft2(torch.fft.fft2(white) * f ** (exponent / 2)).real
    return grey(0.5 + contrast * shaped / shaped.std())


def slope(frequency, density):
    x, y = frequency.log(), density.log()
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def test_white_noise_is_flat_at_its_variance():
    _, density = power_spectrum(noise(40, 64, 48))
    assert (density / 0.05**2 - 1).abs().max() < 0.2
    assert abs(slope(*power_spectrum(noise(40, 64, 48)))) < 0.03


def test_slope_of_coloured_noise():
    for exponent in (-1.0, -2.0):
        frequency, density = power_spectrum(noise(40, 64, 64, exponent))
        middle = (frequency > 0.06) & (frequency < 0.5)
        assert abs(slope(frequency[middle], density[middle]) - exponent) < 0.12


def test_sinusoid_peaks_at_its_frequency():
    x, y = torch.meshgrid(torch.arange(96.0), torch.arange(64.0), indexing="ij")
    for fx, fy in ((0.125, 0.0), (0.1, 0.17), (0.0, 0.4)):
        wave = 0.5 + 0.05 * torch.sin(2 * torch.pi * (fx * x + fy * y))
        frequency, density = power_spectrum(grey(wave[None]))
        at = (fx**2 + fy**2) ** 0.5
        assert abs(frequency[density.argmax()].item() - at) < 1 / 64
        assert density.median() < 1e-4 * density.max()


def test_density_integrates_to_the_variance_under_the_window():
    light = 0.5 + 0.1 * torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    light[:, :20] += 0.1
    rgb = grey(light)
    light = LAB.encode(rgb)[:, 0]
    hann = lambda n: torch.sin(torch.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)) ** 2  # noqa: E731
    weight = (hann(40)[:, None] * hann(56)).square()
    weight = weight / weight.sum()
    mean = (weight * light).sum((1, 2), keepdim=True)
    variance = (weight * (light - mean).square()).sum((1, 2))
    ring, _, count = frequency_rings(40, 56)
    assert count.sum() == 40 * 56 - 1 and ring.max() == len(count) - 1
    total = power_spectra(rgb) @ count / (40 * 56)
    torch.testing.assert_close(total, variance, rtol=0.01, atol=0)  # the ring of the mean holds what is left


def test_a_smooth_picture_has_no_fine_detail_although_its_edges_differ():
    ramp = grey(torch.linspace(0.2, 0.8, 64, dtype=torch.float64).expand(1, 64, 64))
    frequency, density = power_spectrum(ramp)
    assert density[frequency > 0.25].max() < 1e-6 * density.max()


def test_blur_lowers_and_grain_raises_the_high_band():
    natural = noise(16, 64, 64, -2.0, contrast=0.08)
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=natural.dtype) / 4
    blurred = F.conv2d(F.pad(natural, (1, 1, 1, 1), mode="replicate"), (kernel[:, None] * kernel).expand(3, 1, 3, 3),
                       groups=3)  # fmt: skip
    grainy = natural + 0.1 * torch.randn(natural.shape, generator=torch.Generator().manual_seed(3))
    real = power_spectrum(natural)[1]
    level = {
        name: [band_level(power_spectrum(rgb)[1], real, (64, 64), band).item() for band in ("low_band", "high_band")]
        for name, rgb in (("same", natural), ("blurred", blurred), ("grainy", grainy))
    }
    assert level["same"] == [0.0, 0.0]
    assert level["blurred"][1] < -5 and level["grainy"][1] > 0.5
    assert all(abs(level[name][0]) < 0.5 for name in level)


def test_levels_and_errors_of_known_ratios():
    real = torch.rand(45, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    assert len(frequency_rings(64, 64)[2]) == 45
    for factor in (0.1, 10.0):
        decades = 1.0 if factor > 1 else -1.0
        for band in ("low_band", "middle_band", "high_band"):
            assert abs(band_level(factor * real, real, (64, 64), band).item() - 10 * decades) < 1e-9
        assert abs(spectrum_error(factor * real, real).item() - 1) < 1e-12
