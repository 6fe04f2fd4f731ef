"""Karras power-function EMA of the trained tensors (arXiv 2312.02696, section 3)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class PowerEma:
    """Float32 average of parameters with decay (1 - 1 / t)^(gamma + 1) at update t; a copy before `start`.

    Args:
        parameters: (name, parameter) pairs; the order is kept. gamma: 7 gives a mean age of 11 % of training.
        start: updates during which the average simply follows the weights. device: where the average is kept; None
            is beside each parameter.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        gamma: float = 7.0,
        start: int = 100,
        device: torch.device | str | None = None,
    ):
        self.parameters = dict(parameters)
        self.gamma, self.start = gamma, start
        self.average = {
            name: p.detach().to(device or p.device, torch.float32, copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (counted from 1)."""
        decay = 0.0 if step <= self.start else (1 - 1 / step) ** (self.gamma + 1)
        for name, parameter in self.parameters.items():
            average = self.average[name]
            average.lerp_(parameter.detach().to(average.device, torch.float32), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards their own values again, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
