"""Fake CUDA tensors on a torch that may have no CUDA: the operators that a GPU would run, under CUDA's autocast."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asymflow_ft.training.rehearsal import full_length

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten._scaled_dot_product_flash_attention}


class _WithoutGuard(TorchFunctionMode):
    """Some functions ask for the device of a CUDA tensor, which a torch without CUDA does not know; the operators that
    they stand for do not."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            values = torch.tensor(*args, **{name: value for name, value in kwargs.items() if name != "device"})
            return torch.empty(values.shape, dtype=values.dtype, device=kwargs["device"])
        if function is Tensor.to and args[0].device.type == "cpu":  # it may have values, which cannot go there
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            return torch.empty(args[0].shape, dtype=dtype or args[0].dtype, device=device)
        if function is Tensor.contiguous and args[0].device.type == "cuda":
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if function is Tensor.__getitem__ and args[0].device.type == "cuda":
            return _item(*args)
        return function(*args, **kwargs)


def _item(x: Tensor, index: Any) -> Tensor:
    """x[index]."""
    parts = index if isinstance(index, tuple) else (index,)
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), None)
    if at is not None:
        whole = x.ndim - sum(part is not None for part in parts) + 1
        parts = parts[:at] + (slice(None),) * whole + parts[at + 1 :]
    tensors: list[Tensor | None] = []
    for part in parts:
        if isinstance(part, int):
            x = x.select(len(tensors), part)
            continue
        if part is None:
            x = x.unsqueeze(len(tensors))
        elif isinstance(part, slice):
            x = _aten.slice.Tensor(x, len(tensors), part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, Tensor) else None)
    return _aten.index.Tensor(x, tensors) if any(part is not None for part in tensors) else x


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, new tensors may be on "cuda", and autocast believes in it."""
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.is_available", lambda: True))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), full_length(), _WithoutGuard()):
            stack.enter_context(mode)
        yield


class FusedKernels(TorchFunctionMode):
    """One kernel each for RMS norms and for attention without a mask, as CUDA has, in the precision that its autocast
    gives them; a torch without CUDA takes them apart."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, narrow = kwargs or {}, torch.get_autocast_dtype("cuda")
        autocast = torch.is_autocast_enabled("cuda")
        if function is F.rms_norm:
            x, shape, weight, eps = (*args, *kwargs.values())
            if autocast:
                x, weight = x.float(), None if weight is None else weight.float()
            return _aten.native_layer_norm(x, shape, weight, None, eps)[0]  # which reads and writes as much
        if function is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            parts = [part.to(narrow) if autocast else part for part in (*args, *kwargs.values())[:3]]
            return _aten._scaled_dot_product_flash_attention(*parts)[0]
        return function(*args, **kwargs)


def put_on(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a module fake tensors on "cuda" in the place of its own; inside `fake_cuda`."""
    for module in network.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                fake = torch.empty(tensor.shape, dtype=dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                width = dtype if tensor.is_floating_point() else tensor.dtype
                module._buffers[name] = torch.empty(tensor.shape, dtype=width, device="cuda")
    return network


class Moved(TorchDispatchMode):
    """Counts the bytes that operators read and write, other than views, products and attention.

    moved: by operator. operators: all of them, with the precisions of their inputs, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[Any] = Counter()
        self.operators: list[tuple[Any, tuple[torch.dtype, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(some) if isinstance(t, Tensor)] for some in ((args, kwargs), out))
        held = {tensor.untyped_storage()._cdata for tensor in read}
        new = [tensor for tensor in written if tensor.untyped_storage()._cdata not in held]
        if new or (written and function._schema.is_mutable):
            self.operators.append((function, tuple(tensor.dtype for tensor in read)))
            if function._overloadpacket not in _PRODUCTS:
                self.moved[function] += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read, *written))
        return out
