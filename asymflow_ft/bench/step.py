"""One training step: how long it takes, which part of it takes how long, what it holds, and how fast it could be."""

from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from asymflow_ft.bench.architectures import Architecture
from asymflow_ft.bench.clock import Timing, now, ratio, summary
from asymflow_ft.bench.limits import largest_gemm, peak_rate, time_matmul
from asymflow_ft.bench.memory import measured_memory, memory_figures
from asymflow_ft.bench.run import ARITHMETIC, Run, losses, started
from asymflow_ft.bench.workload import Options
from asymflow_ft.training.distributed import limit_norm, whole
from asymflow_ft.training.objective import summarise
from asymflow_ft.training.optimizer import set_rates
from asymflow_ft.training.student import base_dtype

# In the order of a step; docs/performance.md says what belongs to each.
PARTS = (
    "data wait", "reference forward", "student forward", "recompute", "backward", "perceptual", ARITHMETIC,
    "optimizer", "EMA", "rest",
)  # fmt: skip


def train_step(run: Run, step: int) -> None:
    """An optimizer step as in the loop of finetune.py, without what is done for the user (log file, trackers, bar)."""
    watch, train = run.watch, run.recipe.train
    with watch.part("optimizer"):
        set_rates(run.optimizer, step, train)
        limit_norm(run.optimizer, train.clip_norm)
    with watch.part("data wait"):
        batch, noise = next(run.batches)
    with run.accelerator.accumulate(run.model.transformer):
        row = losses(run, batch, noise)
    with watch.part("optimizer"):
        norm = float(whole(run.accelerator.clip_grad_norm_(run.ema.parameters.values(), train.clip_norm)))
        run.optimizer.step()
        run.optimizer.zero_grad()
    with watch.part("EMA"):
        run.ema.update(step + 1)
    if not norm < float("inf"):
        raise ValueError(f"the gradient of step {step + 1} is not finite, so the figures would mean nothing")
    summarise(run.accelerator.gather(row))


def time_steps(run: Run, repeats: int, warmup: int) -> tuple[Timing, dict[str, Timing]]:
    """The whole step and its parts, of the same steps."""
    taken: list[dict[str, float]] = []
    processor: list[float] = []
    for step in tqdm(range(warmup + repeats), desc="steps", leave=False, mininterval=1):
        _, before = now()
        run.watch.start("rest")
        train_step(run, step)
        parts = run.watch.stop()
        _, after = now()
        if step >= warmup:
            taken.append(parts)
            processor.append(after - before)
    whole_step = summary([sum(parts.values()) for parts in taken], processor=processor)
    return whole_step, {part: summary([parts.get(part, 0.0) for parts in taken]) for part in PARTS}


def bench_step(architecture: Architecture, options: Options, device: torch.device) -> dict[str, Any]:
    """All figures of a training step, for bench.json.

    Raises:
        ValueError: options that cannot work; `NotEnoughMemory` for more memory than there is.
    """
    with started(architecture, options, device) as (run, plan):
        step, parts = time_steps(run, options.repeats, options.warmup)
        memory = measured_memory(run)
    figures = memory_figures(architecture, options, run, plan, memory)
    shape = largest_gemm(run.network, figures["tokens"])
    multiplied, product = time_matmul(shape, base_dtype(run.recipe), device, options.repeats)
    rate = multiplied / product.median
    forwards = 4 if run.reference is not None else 3
    floor = forwards * plan.step.forward_flops
    instead = multiplied * ratio(step, product, device)  # operations of such products in the time of a step
    peak, speed = peak_rate(device, base_dtype(run.recipe)), plan.step.flops / step.median
    return {
        "what": "step", **figures,
        "step": asdict(step), "samples_per_second": options.batch / step.median,
        "parts": {part: asdict(timing) for part, timing in parts.items()},
        "shares": {part: timing.median / step.median for part, timing in parts.items()},
        "operations": {"step": plan.step.flops, "forward": plan.step.forward_flops,
                       "reference": plan.step.reference_flops},
        "tflops": speed / 1e12,
        "matmul": {"shape": shape, "tflops": rate / 1e12, "product": asdict(product)},
        "floor": {"forwards": forwards, "seconds": floor / rate}, "over_floor": instead / floor,
        "share_of_matmul_rate": plan.step.flops / instead, "mfu": None if peak is None else speed / peak,
    }  # fmt: skip
