"""The denoising loop alone, without a network."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.method.noise import inference_sigmas
from asymflow_ft.method.sampling import denoise, prepare_solver


@pytest.mark.parametrize(("steps", "shift"), [(2, 17.0), (38, 17.0), (38, 34.0), (200, 34.0)])
def test_every_level_is_met_once_and_the_field_of_one_image_leads_there(steps, shift):
    """Also where several levels are the same in thousandths, as with 38 steps at 2048x2048 pixels."""
    x0, noise = (torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    solver, sigmas, met = flow_solver(), inference_sigmas(steps, shift), []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        met.append(sigma.item())
        return (x - x0) / sigma

    prepare_solver(solver, sigmas)
    torch.testing.assert_close(denoise(velocity, noise, solver, sigmas), x0, rtol=0, atol=1e-5)
    assert met == sigmas[:-1].tolist()


class Waits(TorchDispatchMode):
    """Operators that take tensors of the CPU elsewhere and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        read, written = ({t.device.type for t in tree_leaves(some) if isinstance(t, Tensor)} for some in (args, out))
        if "cpu" in read and "meta" in written and not kwargs.get("non_blocking"):
            self.found.append(str(function))
        return out


def test_no_step_waits_for_a_copy_from_the_cpu():
    """The meta device in the place of a GPU's."""
    solver, codec, sigmas, waits = flow_solver(), PixelCodec(), inference_sigmas(4, 17.0), []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return codec.clamp(x * sigma)

    def on_step(i: int, x: Tensor) -> Tensor:
        waits.append(len(mode.found))
        return x

    prepare_solver(solver, sigmas, "meta")
    with Waits() as mode:
        denoise(velocity, torch.empty(1, 3, 8, 8, device="meta"), solver, sigmas, on_step)
    assert waits == [1] * 4 and mode.found == ["aten._to_copy.default"]  # all levels, once
