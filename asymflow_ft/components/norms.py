"""Norms that answer in the precision of their input while a network draws, as in a network that runs in 16 bits."""

from typing import Any

import torch
from torch import Tensor, nn


class _Narrow(nn.Module):
    """Mixed into a norm: outside of training it leaves autocast, unless its weights have another precision than its
    input, which no kernel takes."""

    weight: Tensor | None

    def forward(self, x: Tensor) -> Any:
        kind = x.device.type
        training = self.training or torch.is_grad_enabled()
        mixed = self.weight is not None and self.weight.dtype != x.dtype
        if training or mixed or not torch.is_autocast_enabled(kind):
            return super().forward(x)
        torch.set_autocast_enabled(kind, False)  # a torch.autocast would take four times as long
        try:
            return super().forward(x)
        finally:
            torch.set_autocast_enabled(kind, True)


class _NarrowLayerNorm(_Narrow, nn.LayerNorm):
    pass


class _NarrowRMSNorm(_Narrow, nn.RMSNorm):
    pass


_NARROW: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: _NarrowLayerNorm, nn.RMSNorm: _NarrowRMSNorm}


def narrow_norms(network: nn.Module) -> None:
    """Let a network's norms answer in the precision of their input while it draws, in place; twice is as once.

    CUDA's autocast gives norms float32 and lets them answer in it, so what is added to or multiplied with the answer
    is float32 as well, and moves twice the bytes. The kernels sum in float32 without that. In training mode and where
    there are gradients nothing changes. Classes do, so compiled code is compiled anew; weights and their names stay.
    """
    for module in network.modules():
        module.__class__ = _NARROW.get(type(module), type(module))
