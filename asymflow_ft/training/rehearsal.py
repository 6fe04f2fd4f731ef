"""A training step rehearsed on tensors that have shapes and no memory; what it would hold and compute is counted.

Fake tensors run the real code of the model, the loss and autograd, so the counts need no formula per architecture.
They are fake CPU tensors (a torch without CUDA cannot differentiate fake CUDA ones); `as_on_cuda` puts in what a GPU
runs otherwise. The inside of a kernel is not seen: attention is counted as fused, without its N x N matrix, and work
spaces are left to the plan's allowance.
"""

import copy
import warnings
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.norms import narrow_norms
from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.data.prepare import Batch
from asymflow_ft.recipe import Recipe
from asymflow_ft.training import trainable
from asymflow_ft.training.objective import pixel_noise, training_terms
from asymflow_ft.training.perceptual import image_by_image
from asymflow_ft.training.recompute import checkpointed

# VGG-16's published channels; LPIPS compares what enters each pooling, and what leaves the last convolution.
VGG_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_aten = torch.ops.aten
_FLOPS = {
    **flop_registry,  # it knows the fused attentions of GPUs alone
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Meter(TorchDispatchMode):
    """Counts bytes of new storages that are alive (`now`, `peak`) and floating-point operations (`flops`).

    Args:
        held: tensors from before, which do not count.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in held}
        self._alive: dict[int, tuple[weakref.ref[Any], int, int]] = {}
        self._gone: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in _FLOPS:
            self.flops += _FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        tree_map_only(Tensor, self._add, out)
        return out

    def take_peak(self) -> int:
        """The peak until now; the next one starts from here."""
        self._forget()
        peak, self.peak = self.peak, self.now
        return peak

    def _add(self, tensor: Tensor) -> None:
        self._forget()
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            # no callback in Python, which would lose a Ctrl-C that comes just then
            watched = weakref.ref(storage, self._gone.append)
            self._alive[id(watched)] = watched, key, size

    def _forget(self) -> None:
        while self._gone:
            _, key, size = self._alive.pop(id(self._gone.pop()))
            self._seen.discard(key)
            self.now -= size


class _FusedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)  # type: ignore[return-value]


def as_on_cuda() -> AbstractContextManager[Any]:
    """Three functions allocate as on CUDA: layer norm in float32 under autocast, RMS norm and dropout fused."""
    layer_norm, rms_norm, dropout = F.layer_norm, F.rms_norm, F.dropout

    def wide_layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(x, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return layer_norm(x.float(), shape, *(None if t is None else t.float() for t in (weight, bias)), eps)

    def fused_rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        if weight is None or weight.dtype != x.dtype:  # CUDA has no kernel for two precisions either
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it cannot is known
                return rms_norm(x, shape, weight, eps)
        return _FusedRmsNorm.apply(x, weight)

    def fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and not inplace else dropout(x, p, training, inplace)

    return patch.multiple(F, layer_norm=wide_layer_norm, rms_norm=fused_rms_norm, dropout=fused_dropout)


def full_length() -> AbstractContextManager[Any]:
    """Prompts of as many tokens as their tensor has rows, since fake tensors have no values to look for zeros in."""
    return patch.object(Cond, "lengths", lambda cond: [cond.embeds.shape[1]] * len(cond.embeds))


def text_rows(recipe: Recipe, family: ModuleType) -> int:
    """Rows of a prompt's embedding, at most."""
    return recipe.text.max_length + family.EXTRA_TEXT_ROWS


def fake(module: nn.Module) -> nn.Module:
    """Change a module's tensors (on the meta device, say) into fake CPU ones; inside a FakeTensorMode."""
    return module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


class VggMap(nn.Module):
    """The work of LPIPS-VGG with `spatial=True`: two images (B, 3, H, W) -> a map (B, 1, H, W); no trained weights."""

    def __init__(self) -> None:
        super().__init__()
        inputs = [3] + [channels for stage in VGG_CHANNELS for channels in stage]
        outputs = iter(inputs[1:])
        sources = iter(inputs)
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(next(sources), next(outputs), 3, padding=1) for _ in stage)
            for stage in VGG_CHANNELS
        )
        self.weights = nn.ModuleList(nn.Conv2d(stage[-1], 1, 1, bias=False) for stage in VGG_CHANNELS)
        self.requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for one, other, weight in zip(self._features(image), self._features(target), self.weights, strict=True):
            difference = weight((_unit(one) - _unit(other)) ** 2)
            total = total + F.interpolate(difference, image.shape[-2:], mode="bilinear")
        return total  # type: ignore[return-value]

    def _features(self, image: Tensor) -> list[Tensor]:
        taps: list[Tensor] = []
        for stage in self.stages:
            image = F.max_pool2d(image, 2) if taps else image
            for convolution in stage:
                image = F.relu_(convolution(image))
            taps.append(image)
        return taps


def _unit(features: Tensor) -> Tensor:
    # squares and sums are float32 under CUDA's autocast
    return features / ((features.float() ** 2).sum(dim=1, keepdim=True).sqrt() + 1e-10)


@dataclass(frozen=True)
class Step:
    """Bytes and operations of one micro-batch of one process, beside weights, gradients and optimizer.

    network: most bytes alive in forward and backward outside the perceptual term. perceptual: most bytes alive inside
    it, which includes what the network keeps for its backward pass. reference: in the pass of the frozen reference,
    which comes first. reference_flops, forward_flops: one pass of the frozen and of the trained network. flops: the
    whole micro-batch.
    """

    network: int
    perceptual: int
    reference: int
    reference_flops: int
    forward_flops: int
    flops: int


def rehearse_step(
    recipe: Recipe, family: ModuleType, network: ModelMixin, base: ModelMixin, subspace: PixelSubspace,
    conditions: int = 0, wide_perceptual: bool = False, resolution: int | None = None,
) -> Step:  # fmt: skip
    """One micro-batch of the recipe.

    Args:
        conditions: condition images of each image.
        wide_perceptual: the perceptual term in float32, as on a CPU.
        resolution: one that is trained at; None is the largest.
        network: the network to train, on the meta device; its tensors become fake. base: the latent base, likewise.
    """
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    size, side, count = subspace.config["patch"], resolution or max(recipe.data.resolutions()), recipe.train.batch_size
    grid = (side // size, side // size)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda(), full_length():
        for module in (network, base, subspace):
            fake(module)
        vgg = VggMap() if recipe.loss.perceptual == "lpips" else None
        network.train()
        if recipe.train.gradient_checkpointing:
            network.enable_gradient_checkpointing(checkpointed(recipe.train.gradient_checkpointing))
        reference: trainable.Reference | None = None
        if not recipe.loss.variance_reduction:
            pass
        elif recipe.lora is None:
            reference = trainable.frozen_reference(base, subspace, family.predict)
        else:
            reference = trainable.lora_reference(network, network, subspace, family.predict)
        codec = PixelCodec(recipe.pixels.space, recipe.pixels.mean, recipe.pixels.std)
        model = PixelModel(network, subspace, family.predict)
        trained = trainable.trained_parameters(network).values()
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # from the second micro-batch on they are there
        held = [*network.parameters(), *base.parameters(), *subspace.buffers(), *(p.grad for p in trained)]
        held += [] if vgg is None else list(vgg.parameters())

        peaks: list[int] = []
        marks: list[tuple[int, int]] = []  # (peak, operations) after the reference and after the forward pass

        def watched_reference(*arguments: Any) -> Tensor:
            assert reference is not None
            estimate = reference(*arguments)
            marks.append((meter.peak, meter.flops))
            return estimate

        def watched_vgg(image: Tensor, target: Tensor) -> Tensor:
            marks.append((meter.peak, meter.flops))
            peaks.append(meter.take_peak())
            image.register_hook(lambda gradient: peaks.append(meter.take_peak()))  # its backward pass is done
            with torch.autocast("cpu", torch.bfloat16, enabled=not wide_perceptual):
                return image_by_image(vgg)(image, target).float()

        with Meter(held) as meter:
            embeds = torch.empty(count, text_rows(recipe, family), family.text_dim(base), dtype=dtype)
            z0 = torch.empty(count, grid[0] * grid[1], subspace.config["rank"])
            beside = recipe.data.condition_resolution or side
            references = (torch.empty(count, 3, beside, beside),) * conditions
            z_references = (torch.empty(count, (beside // size) ** 2, subspace.config["rank"]),) * conditions
            rgb = torch.empty(count, 3, side, side)
            batch = Batch(rgb, z0, embeds, list(range(count)), [], references, z_references)
            noise = pixel_noise(batch, size, recipe.seed)
            perceptual = None if vgg is None else watched_vgg
            cpu = torch.device("cpu")
            if reference is None:
                marks.append((0, 0))
            watched = None if reference is None else watched_reference
            terms = training_terms(recipe, model, watched, codec, perceptual, batch, noise, 1.0, cpu)
            marks.append((meter.peak, meter.flops))
            terms.loss().backward()
    (reference_peak, reference_flops), (_, forward_flops), *_ = marks
    before, inside, after = (*peaks, meter.peak) if vgg is not None else (meter.peak, 0, 0)
    return Step(
        max(before, after), inside, reference_peak, reference_flops, forward_flops - reference_flops, meter.flops
    )


@torch.no_grad()
def rehearse_drawing(
    recipe: Recipe, family: ModuleType, network: ModelMixin, subspace: PixelSubspace, count: int
) -> int:
    """Peak bytes of one solver step for `count` pictures with the training network, whose tensors are fake already."""
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    size = subspace.config["patch"]
    side = recipe.data.resolution // size
    mode = next(network.parameters()).fake_mode
    with mode, as_on_cuda(), full_length(), Meter([*network.parameters(), *subspace.buffers()]) as meter:
        x = torch.empty(count, side**2, 3 * size**2)
        cond = Cond(torch.empty(count, text_rows(recipe, family), family.text_dim(network), dtype=dtype))
        model, sigma = PixelModel(narrow_norms(network).eval(), subspace, family.predict), torch.empty(count, 1, 1)
        guided = [model.velocity(x, sigma, cond, (side, side)) for _ in range(2)]
        del guided
    return meter.peak


@torch.no_grad()
def rehearse_vae(recipe: Recipe, family: ModuleType, vae: ModelMixin, count: int) -> tuple[int, int]:
    """Peak bytes of encoding one picture in float32 at the largest resolution, and of decoding `count` in the recipe's
    precision, which are drawn at data.resolution; the weights of the VAE (on the meta device) included."""
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    largest, side = max(recipe.data.resolutions()), recipe.data.resolution // family.pixel_patch(vae)
    whole, half = (nn.Module.to(copy.deepcopy(vae), kind).eval() for kind in (torch.float32, dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake(whole), fake(half)
        with Meter([*whole.parameters(), *whole.buffers()]) as encoding:
            encoding.now = sum(p.nbytes for p in whole.parameters())
            family.encode_latents(whole, torch.empty(1, 3, largest, largest))
        with Meter([*half.parameters(), *half.buffers()]) as decoding:
            decoding.now = sum(p.nbytes for p in half.parameters())
            family.decode_latents(half, torch.empty(count, side**2, family.latent_dim(half)), (side, side))
    return encoding.peak, decoding.peak
