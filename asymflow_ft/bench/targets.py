"""The targets of docs/performance.md, and what this machine reaches of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from asymflow_ft.bench.align import bench_align
from asymflow_ft.bench.architectures import Architecture, stock_kind
from asymflow_ft.bench.limits import Bench, figures_or_error
from asymflow_ft.bench.run import ARITHMETIC, accelerator_on, planned
from asymflow_ft.bench.sample import bench_sample
from asymflow_ft.bench.step import bench_step
from asymflow_ft.bench.workload import Options, make_recipe

TOO_LITTLE = "not enough memory"


@dataclass(frozen=True)
class Target:
    """limit: what `reached` must not exceed, or with `at_least` not fall below. reached: None where this machine
    cannot show it; `why` then says so."""

    what: str
    limit: float
    reached: float | None
    unit: str = ""
    at_least: bool = False
    why: str = TOO_LITTLE

    @property
    def over_limit(self) -> float | None:
        """1 is the limit itself, more is worse; None where not measured."""
        if self.reached is None:
            return None
        return self.limit / self.reached if self.at_least else self.reached / self.limit


def step_targets(step: Mapping[str, Any], base: str) -> list[Target]:
    """Those of the time of a training step on a base of this kind."""
    shares, mfu = step["shares"], step["mfu"]
    return [
        Target(f"recovery, loss and EMA, share of a step{base}", 3, 100 * (shares[ARITHMETIC] + shares["EMA"]), " %"),
        Target(f"data wait, share of a step{base}", 2, 100 * shares["data wait"], " %"),
        Target(f"step over floor{base}", 1.35, step["over_floor"]),
        Target(
            f"MFU of a step{base}", 50, None if mfu is None else 100 * mfu, " %", at_least=True,
            why="no data sheet for this device in bf16",
        ),
    ]  # fmt: skip


def memory_target(quant: str, limit: int, step: Mapping[str, Any] | None) -> Target:
    """That of the memory that a training step takes from a card, its context aside; None had not enough."""
    peak = None if step is None else step["reserved_bytes"]
    return Target(
        f"memory of a step, {'bf16' if quant == 'full' else quant} base, reserved", limit,
        None if peak is None else peak / 1e9, " GB", why=TOO_LITTLE if step is None else "a CPU's has no allocator",
    )  # fmt: skip


def bench_targets(architecture: Architecture, options: Options, device: torch.device) -> dict[str, Any]:
    """Aligning, drawing and steps, and how they do against the targets, for bench.json. What there is not enough
    memory for has no figures, None; steps of an nf4 base come in where there is a target for them.

    Raises:
        ValueError: options that cannot work, or no stock pipeline to compare with.
        torch.OutOfMemoryError, NotEnoughMemory: if there is not enough memory for any step.
    """
    stock_kind(architecture)
    planned(architecture, make_recipe(architecture, options, Path(), device), accelerator_on(device))
    errors = []

    def figures(bench: Bench, quant: str = "full") -> dict[str, Any] | None:
        found = figures_or_error(bench, architecture, replace(options, quant=quant), device)
        if isinstance(found, Exception):
            errors.append(found)
            return None
        return found

    # what takes least time first, since options that cannot work are found by all of them
    align, sample = figures(bench_align), figures(bench_sample)
    limits = architecture.step_gb
    kinds = ["full", *(kind for kind in limits if kind != "full" and device.type == "cuda")]
    steps = {kind: figures(bench_step, kind) for kind in kinds}
    timed = [(step, "" if kind == "full" else f" ({kind} base)") for kind, step in steps.items() if step is not None]
    if not timed:
        raise errors[-1]

    drawn = None if sample is None else sample["compiled" if options.compile else "eager"]["pixel_over_latent"]
    targets = [
        *step_targets(*timed[0]),
        *(memory_target(kind, limits[kind], steps[kind]) for kind in kinds if kind in limits),
        Target("pixel over latent step, drawing", 1.02, drawn),
        Target("align over decoding and encoding", 1.15, None if align is None else align["align_over_decode_encode"]),
    ]
    return {
        "what": "targets", "architecture": architecture.name, "options": asdict(options),
        "targets": [asdict(target) | {"over_limit": target.over_limit} for target in targets],
        "steps": steps, "sample": sample, "align": align,
    }  # fmt: skip
