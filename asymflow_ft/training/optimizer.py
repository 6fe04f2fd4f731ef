"""The optimizer and its learning rates."""

import torch
from torch import nn

from asymflow_ft.recipe import Recipe
from asymflow_ft.training.trainable import diffusers_name


def make_optimizer(recipe: Recipe, parameters: dict[str, nn.Parameter], output_layer: str) -> torch.optim.Optimizer:
    """AdamW in 8 or 32 bits; the output projection has its own rate.

    Args:
        output_layer: diffusers name of that projection, `proj_out` in FLUX.2.
    """
    train = recipe.train
    last = [p for name, p in parameters.items() if diffusers_name(name).startswith(output_layer + ".")]
    rest = [p for p in parameters.values() if all(p is not other for other in last)]
    groups = [{"params": rest, "lr": train.lr}, {"params": last, "lr": train.lr_output}]
    for group in groups:
        group["peak"] = group["lr"]
    if train.optimizer == "adamw8bit":
        import bitsandbytes  # not there on macOS

        kind = bitsandbytes.optim.AdamW8bit
    else:
        kind = torch.optim.AdamW
    return kind(groups, betas=tuple(train.betas), weight_decay=train.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, step: int, warmup: int) -> None:
    """Linear warm-up from a thousandth, then constant."""
    factor = 1.0 if step >= warmup else 1e-3 + (1 - 1e-3) * step / warmup
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
