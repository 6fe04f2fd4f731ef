"""The optimizer and its learning rates."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from asymflow_ft.recipe import Recipe, Train
from asymflow_ft.training.trainable import diffusers_name


def make_optimizer(
    recipe: Recipe, parameters: dict[str, nn.Parameter], ends: Sequence[str], output_layer: str
) -> torch.optim.Optimizer:
    """AdamW in 8 or 32 bits with a learning rate each for the trunk, the end layers and the output projection.

    Args:
        ends: diffusers names of the end layers. output_layer: the one that writes pixels.
    """
    train = recipe.train
    rates = {
        "trunk": train.lr,
        "ends": train.lr if train.lr_ends is None else train.lr_ends,
        "output": train.lr_output,
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in parameters.items():
        layer = diffusers_name(name).rpartition(".")[0]
        members["output" if layer == output_layer else "ends" if layer in ends else "trunk"].append(parameter)
    groups = [{"params": members[name], "lr": rate, "peak": rate} for name, rate in rates.items() if members[name]]
    options = {"betas": tuple(train.betas), "weight_decay": train.weight_decay}
    if train.optimizer == "adamw8bit":
        import bitsandbytes  # not there on macOS

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    # one pass over weights and moments, and no copy of them aside
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    return torch.optim.AdamW(groups, fused=fused, **options)


def rate_factor(step: int, train: Train) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0): linear warm-up from a thousandth, then
    constant, or a half cosine that ends at a hundredth."""
    if step < train.warmup:
        return 1e-3 + (1 - 1e-3) * step / train.warmup
    if train.schedule == "constant":
        return 1.0
    done = (step - train.warmup) / max(train.steps - train.warmup, 1)
    return 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


def set_rates(optimizer: torch.optim.Optimizer, step: int, train: Train) -> None:
    """Set every group's rate for the step to come."""
    factor = rate_factor(step, train)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
