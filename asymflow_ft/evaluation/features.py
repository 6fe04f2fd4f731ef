"""What FID and KID are computed from: a vector per picture. (Signatures; the content follows.)"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """rgb (B, 3, H, W) in [-1, 1] -> (B, dim) float32 on the CPU. `note`: with what its distances can be compared."""

    name: str
    dim: int
    note: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, rgb: Tensor) -> Tensor:
        raise NotImplementedError


def open_features(name: str, device: torch.device | str = "cpu") -> Features:
    raise NotImplementedError
