"""What a machine can do at most: its rate of multiplication, measured and by the data sheet, and its memory."""

import gc
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn

from asymflow_ft.bench.architectures import Architecture
from asymflow_ft.bench.clock import Timing, measure
from asymflow_ft.bench.workload import Options
from asymflow_ft.training.memory import MemoryPlan

Bench = Callable[[Architecture, Options, torch.device], dict[str, Any]]

WARMUP = 3
# Dense bf16 with float32 sums, from the makers' data sheets, by a piece of the name that the driver gives.
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def largest_gemm(network: nn.Module, tokens: int) -> tuple[int, int, int]:
    """(rows, inputs, outputs) of the largest matrix product of a forward pass over `tokens` tokens."""
    shapes = [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)]
    return (tokens, *max(shapes, key=lambda shape: shape[0] * shape[1]))


def time_matmul(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[int, Timing]:
    """Operations of some matrix products of this shape, and their time."""
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs, device=device).to(dtype), torch.randn(outputs, inputs, device=device)
    weight = weight.to(dtype)
    calls = 10 if device.type == "cuda" else 1  # shorter ones would measure the launch

    def work() -> None:
        for _ in range(calls):
            nn.functional.linear(x, weight)

    return 2 * rows * inputs * outputs * calls, measure(work, repeats, WARMUP, device)


def peak_rate(device: torch.device) -> float | None:
    """Operations per second of the data sheet, of cards that we know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for piece, rate in PEAKS.items() if piece in name), None)


class NotEnoughMemory(ValueError):
    """The machine has less memory than a benchmark needs."""


def figures_or_error(
    bench: Bench, architecture: Architecture, options: Options, device: torch.device
) -> dict[str, Any] | Exception:
    """The figures of a benchmark among several, or what said that there is not enough memory for it."""
    if options.compile:  # or a second shape would be compiled for all shapes, which a run of its own is not
        torch.compiler.reset()
    try:
        return bench(architecture, options, device)
    except (torch.OutOfMemoryError, NotEnoughMemory) as error:
        return error.with_traceback(None)  # which holds the networks
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def check_memory(plan: MemoryPlan, device: torch.device) -> None:
    """Refuse what would get the process killed; a GPU says itself when it is full.

    Raises:
        NotEnoughMemory: on a CPU, if the plan does not fit.
    """
    free = psutil.virtual_memory().available
    if device.type == "cpu" and plan.peak > free:
        raise NotEnoughMemory(
            f"this needs about {plan.peak / 1e9:.1f} GB and the machine has {free / 1e9:.1f} GB free; "
            "use a smaller --arch, a GPU, or for a step alone a smaller --resolution or --quant nf4"
        )
