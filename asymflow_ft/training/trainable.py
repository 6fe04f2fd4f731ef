"""What is trained: LoRA factors plus whole end layers, or every weight; and the frozen reference beside it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from asymflow_ft.components.subspace import Cond, Grid, PixelSubspace, Predict
from asymflow_ft.method import asymflow

ADAPTER = "default"  # the name inside the official training state: lora_A.default.weight

# (z0 (B, N, R), eps (B, N, D), sigma (B, 1, 1), cond, grid) -> estimate of the lifted clean image (B, N, D)
Reference = Callable[[Tensor, Tensor, Tensor, Cond, Grid], Tensor]


def attach_lora(
    transformer: ModelMixin, targets: Sequence[str], ends: Sequence[str], rank: int, dropout: float
) -> None:
    """Freeze the transformer, put LoRA on `targets` and a float32 trained copy beside each module of `ends`.

    All names are exact. PEFT's own `modules_to_save` matches by suffix, which on other families would also train
    every block's proj_out; so its wrapper is placed by hand. alpha = rank, the only scale that adapter files without
    metadata can express.
    """
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=list(targets)
    )
    transformer.add_adapter(config, adapter_name=ADAPTER)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            # PEFT would copy its input to float32, and autocast that copy back to what the input was
            module.cast_input_dtype_enabled = False
    for name in ends:
        parent, _, last = name.rpartition(".")
        wrapper = ModulesToSaveWrapper(transformer.get_submodule(name), ADAPTER)
        wrapper.modules_to_save[ADAPTER].float().requires_grad_(True)  # the copy of a frozen layer is frozen
        setattr(transformer.get_submodule(parent), last, wrapper)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def untrained(transformer: nn.Module) -> Iterator[None]:
    """Inside, the network is the lifted base again: adapters off and original end layers in place.

    diffusers' `disable_adapters` leaves the trained end layers on, so both kinds of wrapper are switched here. The
    mode stays: LoRA dropout is off with its adapter, and quantised layers compute differently in eval mode.
    """
    wrappers = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:
        wrapper.enable_adapters(False)
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.enable_adapters(True)


def lora_reference(
    transformer: nn.Module, unwrapped: nn.Module, subspace: PixelSubspace, predict: Predict
) -> Reference:
    """The reference inside a LoRA run: the same network with its training switched off, at no memory.

    The lifted network is called on the embedded latent state A z_tau (and condition latents, embedded too) and read
    back on the basis, which is the base's own prediction. `transformer` is called (it may be prepared), `unwrapped` is
    switched.
    """

    @torch.no_grad()
    def reference(z0: Tensor, eps: Tensor, sigma: Tensor, cond: Cond, grid: Grid) -> Tensor:
        basis, scale = subspace.float32()
        z_tau, tau = asymflow.latent_state(z0, eps, sigma, basis, scale)
        with untrained(unwrapped):
            references = [(z @ basis.mT, shape) for z, shape in latent_references(cond, subspace)]
            g = predict(transformer, z_tau @ basis.mT, tau.flatten(), cond, grid, references) @ basis
        return asymflow.lift(z_tau - tau * g, basis, scale)

    return reference


def frozen_reference(base: nn.Module, subspace: PixelSubspace, predict: Predict) -> Reference:
    """The reference when all weights are trained: the untouched latent base, s A (z_tau - tau G(z_tau, tau))."""
    base.requires_grad_(False).eval()

    @torch.no_grad()
    def reference(z0: Tensor, eps: Tensor, sigma: Tensor, cond: Cond, grid: Grid) -> Tensor:
        basis, scale = subspace.float32()
        z_tau, tau = asymflow.latent_state(z0, eps, sigma, basis, scale)
        g = predict(base, z_tau, tau.flatten(), cond, grid, latent_references(cond, subspace))
        return asymflow.lift(z_tau - tau * g, basis, scale)

    return reference


def latent_references(cond: Cond, subspace: PixelSubspace) -> list[tuple[Tensor, Grid]]:
    """Condition images as the latent base sees them, the VAE's latents and not a projection of the pixels.

    Raises:
        ValueError: a condition image comes without its latents.
    """
    return list(zip(cond.z_references, cond.reference_grids(subspace.config["patch"]), strict=True))


def copy_for_full_training(lifted: ModelMixin) -> ModelMixin:
    """A float32 copy with every weight trainable. A copy, because the lifted network shares tensors with the base."""
    return copy.deepcopy(lifted).float().requires_grad_(True)


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, in module order."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def diffusers_name(name: str) -> str:
    """A trained parameter's name without PEFT's wrapper: `x_embedder.modules_to_save.default.weight` ->
    `x_embedder.weight`; LoRA factors keep their `lora_A.default.weight`."""
    return name.replace(f".modules_to_save.{ADAPTER}", "")


def adapter_name(name: str) -> str:
    """A trained parameter's name in an adapter file, where LoRA factors end in `lora_A.weight`."""
    return diffusers_name(name).replace(f".{ADAPTER}.", ".")
