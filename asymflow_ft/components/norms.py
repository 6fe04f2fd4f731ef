"""Norms that answer in the precision of their input, as in a network that runs in 16 bits."""

from typing import Any

import torch
from torch import Tensor, nn


class _Narrow(nn.Module):
    """Mixed into a norm: it leaves autocast, unless its weights have another precision than its input, which no kernel
    takes."""

    weight: Tensor | None

    def forward(self, x: Tensor) -> Any:
        kind = x.device.type
        mixed = self.weight is not None and self.weight.dtype != x.dtype
        if mixed or not torch.is_autocast_enabled(kind):
            return super().forward(x)
        with torch.autocast(kind, enabled=False):
            return super().forward(x)


class _NarrowRMSNorm(_Narrow, nn.RMSNorm):
    pass


class _NarrowLayerNorm(_Narrow, nn.LayerNorm):
    def forward(self, x: Tensor) -> Any:
        wide = self.training or torch.is_grad_enabled()
        return nn.LayerNorm.forward(self, x) if wide else super().forward(x)


_NARROW: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: _NarrowLayerNorm, nn.RMSNorm: _NarrowRMSNorm}


def narrow_norms(network: nn.Module) -> nn.Module:
    """Let a network's RMS norms answer in the precision of their input, and while it draws its layer norms too; in
    place, twice is as once.

    CUDA's autocast gives layer norms, and since torch 2.12 RMS norms, float32 and lets them answer in it, so what is
    added to or multiplied with the answer is float32 as well, and moves twice the bytes. The kernels sum in float32
    without that. In training mode and where there are gradients layer norms stay with autocast, as in the official
    training. Classes do change, so compiled code is compiled anew; weights and their names stay.
    """
    for module in network.modules():
        module.__class__ = _NARROW.get(type(module), type(module))
    return network
