"""The targets of docs/performance.md, and what this machine reaches of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from asymflow_ft.bench.align import bench_align
from asymflow_ft.bench.architectures import Architecture
from asymflow_ft.bench.sample import bench_sample
from asymflow_ft.bench.step import ARITHMETIC
from asymflow_ft.bench.sweep import step_or_error
from asymflow_ft.bench.workload import Options

# Peak memory in GB by architecture and precision of the base: LoRA rank 256, 1024 px, batch 1.
MEMORY = {"klein-4b": {"full": 24, "nf4": 16}, "klein-9b": {"nf4": 24}}


@dataclass(frozen=True)
class Target:
    """limit: what `reached` must not exceed, or with `at_least` not fall below. reached: None where this machine
    cannot show it; `why` then says so."""

    what: str
    limit: float
    reached: float | None
    unit: str = ""
    at_least: bool = False
    why: str = ""

    @property
    def over_limit(self) -> float | None:
        """1 is the limit itself, more is worse; None where not measured."""
        if self.reached is None:
            return None
        return self.limit / self.reached if self.at_least else self.reached / self.limit


def step_targets(step: Mapping[str, Any]) -> list[Target]:
    """Those of the time of a training step."""
    shares, mfu = step["shares"], step["mfu"]
    return [
        Target("recovery, loss and EMA, share of a step", 3, 100 * (shares[ARITHMETIC] + shares["EMA"]), "%"),
        Target("data wait, share of a step", 2, 100 * shares["data wait"], "%"),
        Target("step over floor", 1.35, step["over_floor"]),
        Target("MFU of a step", 50, None if mfu is None else 100 * mfu, "%", True, "no data sheet of this device"),
    ]


def memory_target(quant: str, limit: int, step: Mapping[str, Any] | Exception) -> Target:
    """That of a step's peak memory in GB."""
    what = f"peak memory, {'bf16' if quant == 'full' else quant} base"
    if isinstance(step, Exception):
        return Target(what, limit, None, " GB", why="out of memory")
    peak = step["step"]["peak_bytes"]
    return Target(what, limit, None if peak is None else peak / 1e9, " GB", why="a CPU has no allocator to ask")


def bench_targets(architecture: Architecture, options: Options, device: torch.device) -> dict[str, Any]:
    """Step, drawing and aligning, and how they do against the targets, for bench.json.

    Raises:
        ValueError: options that cannot work.
        torch.OutOfMemoryError, NotEnoughMemory: if there is not enough memory for any step.
    """
    limits = MEMORY.get(architecture.name, {})
    kinds = ["full", *(kind for kind in limits if kind != "full" and device.type == "cuda")]
    steps = {kind: step_or_error(architecture, replace(options, quant=kind), device) for kind in kinds}
    timed = next((step for step in steps.values() if not isinstance(step, Exception)), None)
    if timed is None:
        raise next(error for error in steps.values() if isinstance(error, Exception))
    sample, align = (bench(architecture, options, device) for bench in (bench_sample, bench_align))
    drawn = sample["compiled" if options.compile else "eager"]
    targets = [
        *step_targets(timed),
        *(memory_target(kind, limit, steps.get(kind, timed)) for kind, limit in limits.items()),
        Target("pixel over latent step, drawing", 1.02, drawn["pixel_over_latent"]),
        Target("align over decoding and encoding", 1.15, align["align_over_decode_encode"]),
    ]
    return {
        "what": "targets", "architecture": architecture.name, "options": asdict(options),
        "targets": [asdict(target) | {"over_limit": target.over_limit} for target in targets],
        "steps": {kind: None if isinstance(step, Exception) else step for kind, step in steps.items()},
        "sample": sample, "align": align,
    }  # fmt: skip
