"""Pixel representations: fixed, invertible colour maps that stand where a latent pipeline has its VAE.

Runs without the rest of this package (the exporter ships the file as it is).
"""

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

# Bjorn Ottosson's Oklab matrices (https://bottosson.github.io/posts/oklab/): linear sRGB -> LMS, LMS^(1/3) -> Oklab.
RGB_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
LMS_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def _beside(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """A few numbers of the CPU where the image is, in its precision. A GPU is not waited for: CUDA has read them when
    the call returns. Not so Apple's."""
    return values.to(image, non_blocking=image.device.type != "mps")


def _mix(matrix: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij,...jhw->...ihw", _beside(matrix, image), image)


def _srgb_to_linear(y: torch.Tensor) -> torch.Tensor:
    # Both arms of `where` are evaluated and differentiated, so each must stay finite where the other is taken.
    return torch.where(y <= 0.04045, y / 12.92, ((y.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)


def _linear_to_srgb(v: torch.Tensor) -> torch.Tensor:
    return torch.where(v <= 0.0031308, 12.92 * v, 1.055 * v.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def _cube_root(lms: torch.Tensor) -> torch.Tensor:
    # The slope is infinite at 0 and black pixels sit exactly there; below 1e-30, whose root is 1e-10, there is none.
    return lms.clamp(min=1e-30) ** (1 / 3)


def rgb_tensor(image: Image.Image) -> torch.Tensor:
    """A picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


class PixelCodec(ModelMixin, ConfigMixin):
    """RGB in [-1, 1] <-> the pixel space that the transformer models, (B, 3, H, W) both ways; no weights.

    `space="oklab"`: sRGB -> linear RGB -> LMS -> cube root -> Oklab, then (value - mean) / std. With the defaults the
    three channels together have mean 0 and variance about 1, and lightness carries most of it (method.md, 2.4).
    `space="rgb"`: only (value - mean) / std; mean 0 and std 1 leave RGB as it is.

    Args:
        space: "oklab" or "rgb".
        mean, std: the affine map that follows, per channel mean and one std for all.

    Raises:
        ValueError: unknown space, or std not positive.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, space: str = "oklab", mean: tuple[float, ...] = (0.56, 0.0, 0.01), std: float = 0.16):
        super().__init__()
        if space not in ("oklab", "rgb"):
            raise ValueError(f"pixel space {space!r} is unknown; use 'oklab' or 'rgb'")
        if not std > 0 or len(mean) != 3:
            raise ValueError(f"the affine map needs three means and a positive std, got mean {mean}, std {std}")
        self.space, self.mean, self.std = space, tuple(mean), float(std)
        # diffusers saves no model without tensors. Nothing reads this one: `.to(bfloat16)` would round it by 0.4 %.
        self.register_buffer("affine", torch.tensor([*mean, std]))

    def _mean(self, image: torch.Tensor) -> torch.Tensor:
        return _beside(torch.tensor(self.mean, dtype=image.dtype), image)[:, None, None]

    def encode(self, rgb: torch.Tensor) -> torch.Tensor:
        """RGB in [-1, 1], (B, 3, H, W) -> pixel space, same shape; values outside that range are not clamped."""
        rgb = _at_least_float32(rgb)
        if self.space == "rgb":
            return (rgb - self._mean(rgb)) / self.std
        return self._from_linear(_srgb_to_linear(rgb / 2 + 0.5))

    def decode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixel space (B, 3, H, W) -> RGB in [-1, 1]; colours that a display cannot show are clamped in linear RGB."""
        pixels = _at_least_float32(pixels)
        if self.space == "rgb":
            return (pixels * self.std + self._mean(pixels)).clamp(-1, 1)
        return 2 * _linear_to_srgb(self._to_linear(pixels).clamp(0, 1)) - 1

    def clamp(self, pixels: torch.Tensor) -> torch.Tensor:
        """The nearest state whose decoded colours a display can show: encode(decode(pixels)), in Oklab without the
        sRGB curve and its inverse."""
        if self.space == "rgb":
            return self.encode(self.decode(pixels))
        return self._from_linear(self._to_linear(_at_least_float32(pixels)).clamp(0, 1))

    def _from_linear(self, linear: torch.Tensor) -> torch.Tensor:
        lms = _mix(torch.tensor(RGB_TO_LMS, dtype=torch.float64), linear)
        lab = _mix(torch.tensor(LMS_TO_OKLAB, dtype=torch.float64), _cube_root(lms))
        return (lab - self._mean(lab)) / self.std

    def _to_linear(self, pixels: torch.Tensor) -> torch.Tensor:
        lab = pixels * self.std + self._mean(pixels)
        lms = _mix(torch.tensor(LMS_TO_OKLAB, dtype=torch.float64).inverse(), lab) ** 3
        return _mix(torch.tensor(RGB_TO_LMS, dtype=torch.float64).inverse(), lms)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    # cubes and cube roots multiply bf16's 0.4 % rounding
    return x if x.dtype == torch.float64 else x.float()
