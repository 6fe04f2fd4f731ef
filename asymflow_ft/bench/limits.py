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
from asymflow_ft.components.memory import memory_is_full

Bench = Callable[[Architecture, Options, torch.device], dict[str, Any]]

WARMUP = 3
# Dense bf16 with float32 sums, from the makers' data sheets, by the whole name that the driver gives: a card with more
# in its name ("NVL", "Laptop GPU", "D", "MIG 1g.10gb") is another one.
PEAKS = {
    "NVIDIA B200": 2250e12, "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA RTX A6000": 154.8e12, "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 3090": 71e12,
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
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    calls = 10 if device.type == "cuda" else 1  # shorter ones would measure the launch

    def work() -> None:
        for _ in range(calls):
            nn.functional.linear(x, weight)

    return 2 * rows * inputs * outputs * calls, measure(work, repeats, WARMUP, device)


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of the data sheet in bf16, of cards that we know; None for any other precision."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


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
    except (RuntimeError, MemoryError, NotEnoughMemory) as error:
        if not isinstance(error, NotEnoughMemory) and not memory_is_full(error):
            raise
        return error.with_traceback(None)  # which holds the networks
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def check_memory(needed: float, device: torch.device, what: str) -> None:
    """Refuse what would get the process killed; a GPU says itself when it is full.

    Args:
        needed: bytes. what: needs them, for the message.

    Raises:
        NotEnoughMemory: on a CPU, if that many are not free.
    """
    free = psutil.virtual_memory().available
    if device.type == "cpu" and needed > free:
        raise NotEnoughMemory(
            f"{what} needs about {needed / 1e9:.1f} GB and the machine has {free / 1e9:.1f} GB free; use a smaller "
            "--arch, a GPU, or where the benchmark takes them a smaller --resolution or --quant nf4"
        )
