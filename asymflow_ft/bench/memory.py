"""What a training step holds, item by item, as it is and as planned."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from asymflow_ft.bench.architectures import Architecture, transformer_on_meta
from asymflow_ft.bench.run import Run, losses, started
from asymflow_ft.bench.workload import Options
from asymflow_ft.training.memory import MemoryPlan
from asymflow_ft.training.rehearsal import Meter


def measured_memory(run: Run) -> dict[str, int | None]:
    """Bytes by item, in the names of `MemoryPlan.held`, of one more micro-batch, on top of gradients as all but the
    first one of a step have it. Activations: the most bytes of tensors alive, on a GPU the allocator's peak less all
    else."""
    parameters = list(run.ema.parameters.values())
    trained = sum(p.nbytes for p in parameters)
    state = [value for entry in run.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    held = {
        "frozen weights": run.frozen, "trained weights": trained, "gradients": trained,
        "optimizer state": sum({value.untyped_storage().data_ptr(): value.nbytes for value in state}.values()),
        "EMA": sum(average.nbytes for average in run.ema.average.values()),
        "perceptual network": run.perceptual_bytes,
    }  # fmt: skip
    cuda = run.accelerator.device.type == "cuda"
    if run.recipe.train.compile and not cuda:  # what compiled code allocates is not seen
        return {**held, "activations": None}
    batch, noise = next(run.batches)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        losses(run, batch, noise)
        return {**held, "activations": torch.cuda.max_memory_allocated() - sum(held.values())}
    known = [tensor for network in run.networks for tensor in (*network.parameters(), *network.buffers())]
    with Meter([*known, *run.model.subspace.buffers(), *gradients, batch.rgb, batch.z0, batch.embeds]) as meter:
        losses(run, batch, noise)
    return {**held, "activations": meter.peak}


def planned_memory(plan: MemoryPlan) -> dict[str, int]:
    """The estimate of the same items."""
    return {**plan.held, "activations": plan.activations + plan.perceptual_activations}


def memory_figures(
    architecture: Architecture, options: Options, run: Run, plan: MemoryPlan, measured: dict[str, int | None]
) -> dict[str, Any]:
    """What was measured, and its memory beside the plan, for bench.json."""
    recipe, patch = run.recipe, architecture.family.GEOMETRY[1]
    return {
        "architecture": architecture.name, "options": asdict(options), "recipe": asdict(recipe.train),
        "resolution": recipe.data.resolution,
        "tokens": options.batch * ((recipe.data.resolution // patch) ** 2 + architecture.text_length),
        "parameters": sum(p.numel() for p in transformer_on_meta(architecture).parameters()),
        "trained": sum(p.numel() for p in run.ema.parameters.values()),
        "memory": {name: {"planned": planned, "measured": measured[name]}
                   for name, planned in planned_memory(plan).items()},
        "reserved_bytes": torch.cuda.max_memory_reserved() if run.accelerator.device.type == "cuda" else None,
    }  # fmt: skip


def bench_memory(architecture: Architecture, options: Options, device: torch.device) -> dict[str, Any]:
    """The memory of a training step without its time: of a micro-batch, after an optimizer step on gradients of zero.

    Raises:
        ValueError: options that cannot work; `NotEnoughMemory` for more memory than there is.
    """
    with started(architecture, options, device) as (run, plan):
        for parameter in run.ema.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()  # makes the moments
        run.optimizer.zero_grad()
        measured = measured_memory(run)
    return {"what": "memory", **memory_figures(architecture, options, run, plan, measured)}
