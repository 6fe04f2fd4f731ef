"""Gradient checkpointing: what of a block's forward pass is not kept, but computed again in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}


def product_shape(operator: Any, arguments: Any) -> tuple[int, int]:
    """(inputs, outputs) of a matrix product with weights, quantised or not; (0, 0) of any other operator."""
    if operator in (_aten.mm.default, _aten.addmm.default):
        inputs, outputs = arguments[-1].shape
        return inputs, outputs
    match str(operator):  # these are there once bitsandbytes is imported; their weights are (outputs, inputs)
        case "bitsandbytes.gemm_4bit.default":
            outputs, inputs = arguments[2]
        case "bitsandbytes.int8_mixed_scaled_mm.default":
            outputs, inputs = arguments[2].shape
        case _:
            inputs = outputs = 0
    return inputs, outputs


def keep_dear(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """The policy of "selective": keep what takes most arithmetic for each byte that it costs. In bf16 that is
    attention (2 N operations a byte, for N tokens) and products that make tokens narrower (one for each input). Of
    attention torch's own fused kernels are known, not those of other packages."""
    inputs, outputs = product_shape(operator, arguments)
    dear = operator in _ATTENTION or inputs > outputs
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(kind: Literal[True, "selective"]) -> Callable[..., Any]:
    """What a diffusers model calls in the place of a block: for its `enable_gradient_checkpointing`.

    Args:
        kind: True recomputes the whole block, "selective" all of it but what `keep_dear` keeps. Gradients are the
            same bit for bit.
    """
    contexts = noop_context_fn if kind is True else partial(create_selective_checkpoint_contexts, keep_dear)

    def call(block: Callable[..., Any], *arguments: Any) -> Any:
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)

    return call
