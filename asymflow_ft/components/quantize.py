"""A frozen base in 4 or 8 bits, so that it fits smaller cards (bitsandbytes; the trained weights stay float32)."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

INT8_OUTLIER = 6.0  # inputs above it are multiplied in full precision (LLM.int8(), arXiv 2208.07339)


def quantize_frozen(
    transformer: nn.Module, kind: Literal["nf4", "int8"], keep: Sequence[str], device: torch.device | str
) -> None:
    """Quantise every linear layer that is not in `keep`, in place, and move the whole network to `device`.

    One layer after the other: `device` never holds a full-precision copy of more than one, and the source of each is
    released at once, unless somebody else holds it (as a base does that shares its weights with a lifted network).
    Call it after the lift and before LoRA is attached. nf4 takes 4.127 bits a weight: 4 for the value, 8 per block of
    64 and 32 per 256 blocks for the scales. int8 takes 8 bits a weight and a float32 per row.

    Args:
        keep: exact module names that stay as they are, such as the lifted end layers.
    """
    names = [name for name, module in transformer.named_modules() if type(module) is nn.Linear and name not in keep]
    for name in tqdm(names, desc=f"{kind} weights", leave=False, mininterval=1):
        parent, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(parent), last, _quantized(transformer.get_submodule(name), kind, device))
    transformer.to(device)


def round_frozen(transformer: nn.Module, kind: Literal["nf4", "int8"], keep: Sequence[str]) -> None:
    """Give every linear layer that is not in `keep` the full-precision weights that its quantised form stands for, in
    place. A network trained over `quantize_frozen` is then the same function without it (int8: but for the rounding of
    its inputs)."""
    from bitsandbytes import functional  # not there on macOS

    for name, module in transformer.named_modules():
        if type(module) is not nn.Linear or name in keep:
            continue
        weight = _quantized(module, kind, "cpu").weight
        if kind == "nf4":
            value = functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            value = weight.CB.float() * weight.SCB[:, None] / 127
        module.weight = nn.Parameter(value.to(module.weight), requires_grad=module.weight.requires_grad)


def _quantized(layer: nn.Linear, kind: str, device: torch.device | str) -> nn.Linear:
    import bitsandbytes as bnb  # not there on macOS

    weight = layer.weight.detach().cpu()  # bitsandbytes quantises int8 on the way from the CPU, and only there
    bias = layer.bias is not None
    if kind == "nf4":
        new = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        new.weight = bnb.nn.Params4bit(weight, quant_type="nf4", module=new).to(device)
        # Its AVX512 path repacks the weight at the first call in eval mode and has no gradient afterwards.
        new.support_avx512bf16_for_cpu = False
    else:
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a warning at every call
        new = _frozen_int8()(
            layer.in_features, layer.out_features, bias, has_fp16_weights=False, threshold=INT8_OUTLIER, device="meta"
        )
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False).to(device)
    if bias:
        new.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
    new.register_forward_pre_hook(_in_autocast_precision)
    return new.train(layer.training)


@cache
def _frozen_int8() -> type[nn.Linear]:
    import bitsandbytes as bnb

    class FrozenInt8(bnb.nn.Linear8bitLt):
        """int8 weights without a gradient of their own."""

        def forward(self, x: Tensor) -> Tensor:
            return _FrozenProduct.apply(x, self, super().forward)

    return FrozenInt8


class _FrozenProduct(torch.autograd.Function):
    """The layer's own forward pass with a backward pass that needs no input. bitsandbytes' function holds its input
    until the backward pass, for a gradient of the weights, and where gradient checkpointing cannot see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, product: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.state = layer.state
        return product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight = ctx.state.CB.to(gradient.dtype, copy=True).mul_(ctx.state.SCB[:, None] / 127)
        return gradient @ weight, None, None


def _in_autocast_precision(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """autocast does not know these layers: they answer in the precision of their input, which behind a norm is
    float32. A plain linear layer answers in bf16 there, and what follows takes half the memory."""
    (x,) = inputs
    kind = x.device.type
    return (x.to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else inputs
