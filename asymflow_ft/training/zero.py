"""DeepSpeed ZeRO, stages 1 and 2: every process holds all weights and a flat piece of each group's optimizer state.

DeepSpeed is not imported unless a run uses it. It steps inside the last `accelerator.backward` of a step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from asymflow_ft.recipe import Train

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, the one optimizer that `set_up_zero` lets through


def set_up_zero(accelerator: Accelerator, train: Train) -> None:
    """Fill in what the recipe decides, before the network is prepared.

    Raises:
        ValueError: a stage, precision or offload that would not give the run of one process.
    """
    config = accelerator.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    offloads = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    if zero["stage"] not in (1, 2) or set(offloads) != {"none"}:
        raise ValueError(
            f"the launch configuration asks for DeepSpeed ZeRO stage {zero['stage']} with offload of the optimizer to "
            f"{offloads[0]} and of weights to {offloads[1]}; supported are stages 1 and 2 without offload "
            "(recipes/accelerate/deepspeed.yaml). fsdp2.yaml beside it spreads the weights too"
        )
    for precision in ("bf16", "fp16"):
        if config.get(precision, {}).get("enabled") is True:
            raise ValueError(
                f"the launch configuration has DeepSpeed's {precision} on, which rounds the trained weights; turn "
                "it off, and set train.precision in the recipe, or use recipes/accelerate/deepspeed.yaml"
            )
    config["train_micro_batch_size_per_gpu"] = train.batch_size
    config["gradient_accumulation_steps"] = train.accumulation


def gather_zero(optimizer: Any, keep: bool) -> dict[str, Any]:
    """What `gather_optimizer` gives, of a prepared optimizer under ZeRO; all processes must call."""
    from deepspeed.utils import safe_get_full_optimizer_state

    zero, state, groups = _linked(optimizer), {}, []
    for weights, group in zip(zero.bit16_groups, zero.param_groups, strict=True):
        (piece,) = group["params"]
        members = range(len(state), len(state) + len(weights))
        for index, weight in zip(members, weights, strict=True):
            state[index] = {"step": zero.optimizer.state[piece]["step"].clone()}
            for name in MOMENTS:
                moment = safe_get_full_optimizer_state(weight, name)
                if keep:
                    state[index][name] = moment.cpu()
        groups.append({**group, "params": list(members)})
    return {"state": state, "param_groups": groups} if keep else {}


def load_zero(optimizer: Any, packed: Mapping[str, Any]) -> None:
    """Undo `gather_zero` or `gather_optimizer`, after the weights have been restored."""
    from deepspeed.utils import safe_set_full_optimizer_state

    zero = optimizer.optimizer
    zero.refresh_fp32_params()  # the pieces that it steps are copies of the weights
    for (piece,) in (group["params"] for group in zero.param_groups):
        zero.optimizer.state[piece] = {name: torch.zeros_like(piece) for name in MOMENTS}
    _linked(optimizer)
    for weights, group, saved in zip(zero.bit16_groups, zero.param_groups, packed["param_groups"], strict=True):
        (piece,) = group["params"]
        for index, weight in zip(saved["params"], weights, strict=True):
            entry = packed["state"][index]
            for name in MOMENTS:
                safe_set_full_optimizer_state(weight, entry[name].to(weight.device), name)
            zero.optimizer.state[piece]["step"] = entry["step"].clone()
        group.update({key: value for key, value in saved.items() if key != "params"})


def _linked(optimizer: Any) -> Any:
    """DeepSpeed's optimizer, whose accessors see the state of every group: it links them after the step of the first
    group, when the others have none yet, and they would raise."""
    zero = optimizer.optimizer
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
    return zero
