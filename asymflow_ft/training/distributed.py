"""Runs spread over processes: sharded tensors (FSDP2) and whole ones, so that every run writes the same checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from asymflow_ft.training.zero import gather_zero, load_zero


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or a sharded one put together, for which all processes must call at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, whole and the same on every process, in the layout of `like`. Nothing is sent."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU where `keep` is true, {} elsewhere; all processes must call.

    One tensor at a time, so that no device holds more than its shard and one whole tensor. In a run on the CPU the
    result shares memory with the run: write it before the next step.
    """
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            gathered[name] = value.cpu()
    return gathered


def limit_norm(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Tell DeepSpeed, which steps inside the last backward pass, how to clip; under it `Accelerator.clip_grad_norm_`
    only reads the norm. Others clip there."""
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        optimizer.optimizer.clip_grad = limit


def gather_optimizer(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors on the CPU where `keep` is true; all processes must call."""
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return gather_zero(optimizer, keep)
    packed = optimizer.state_dict()
    state = {}
    for index, entry in packed["state"].items():
        tensors = gather({name: value for name, value in entry.items() if isinstance(value, Tensor)}, keep)
        state[index] = {**entry, **tensors}
    return {**packed, "state": state} if keep else {}


def load_optimizer(optimizer: torch.optim.Optimizer, packed: Mapping[str, Any]) -> None:
    """Undo `gather_optimizer`, whatever the layout of the parameters is now; they must have been restored."""
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return load_zero(optimizer, packed)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: shard_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entry.items()
        }
        for index, entry in packed["state"].items()
    }
    optimizer.load_state_dict({**packed, "state": state})
