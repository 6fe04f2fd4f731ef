"""The denoising loop, over any velocity function; it never sees a network."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]


class Solver(Protocol):
    """The part of a diffusers scheduler that the loop uses."""

    sigmas: Tensor
    timesteps: Tensor

    def set_timesteps(self, *args: object, **kwargs: object) -> None: ...
    def set_begin_index(self, begin_index: int) -> None: ...
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool) -> tuple[Tensor]: ...


def prepare_solver(solver: Solver, sigmas: Tensor, device: torch.device | str = "cpu") -> None:
    """Hand the levels `sigmas` (steps + 1, from 1 to 0) to a UniPC multistep solver with flow sigmas.

    The solver's first level is 1 - 1e-4, because its log-SNR is infinite at 1; the network still sees 1.
    """
    capped = sigmas[:-1].clamp(max=1 - 1e-4)
    solver.set_timesteps(sigmas=capped.double().numpy(), device=device)
    # It would look for the first step by its timestep, rounded to thousandths, and where the second has the same one
    # begin there and run over the end.
    solver.set_begin_index(0)
    solver.sigmas = solver.sigmas.to(device)  # they would be copied at every step, each time waiting for a GPU


def denoise(
    velocity: VelocityFn,
    x: Tensor,
    solver: Solver,
    sigmas: Tensor,
    on_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Integrate dx/dsigma = v from noise (sigma 1) to an image (sigma 0).

    Args:
        velocity: (x (B, ...), sigma ()) -> guided velocity (B, ...).
        x: noise N(0, 1), (B, ...), float32. solver: prepared by `prepare_solver` with the same sigmas.
        sigmas: (steps + 1,) from 1 to 0.
        on_step: called with (step index, new state), returns the state to go on with.

    Returns:
        The clean state (B, ...).
    """
    levels = sigmas.to(x)  # once: a copy in every step would have the host wait for the GPU
    for i, timestep in enumerate(solver.timesteps):
        x = solver.step(velocity(x, levels[i]), timestep, x, return_dict=False)[0]
        if on_step is not None:
            x = on_step(i, x)
    return x
