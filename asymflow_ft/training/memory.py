"""The GPU memory of a run, item by item, from the recipe and the base's configs alone; and what would lower it.

One process without sharding. 1 GB is 10^9 bytes: a card sold with 24 GB has at least that much free for programs.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from diffusers import ModelMixin
from torch import nn
from tqdm import tqdm

from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.recipe import Recipe, override
from asymflow_ft.training import trainable
from asymflow_ft.training.rehearsal import Step, VggMap, rehearse_drawing, rehearse_step, rehearse_vae

CARDS_GB = (8, 12, 16, 24, 32, 40, 48, 80)
# Assumed, not measured: CUDA context with cuBLAS and cuDNN work spaces, and what the allocator loses to gaps.
CONTEXT = 750_000_000
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Tensors:
    """What a run holds. frozen: bytes of all frozen weights in the run's precision. linears: (outputs, inputs, bytes)
    of the frozen linear layers that can be quantised. trained: (name, number) of each trained tensor's weights."""

    frozen: int
    linears: tuple[tuple[int, int, int], ...]
    trained: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by item. `held` all the time of training, and the peaks that come on top of it or before it.

    step: one rehearsed micro-batch at the largest resolution. drawing: peak of drawing as many pictures as are trained
    on, at data.resolution. encoding, decoding: peaks of the VAE before training, its weights included. text_encoder:
    its weights; 0 where they are not known. conditions: condition images of each image, at most.
    """

    recipe: Recipe
    text_encoder: int
    tensors: Tensors
    step: Step
    drawing: int
    encoding: int
    decoding: int
    conditions: int = 0

    @property
    def frozen_weights(self) -> int:
        kind = self.recipe.train.base_weights
        saved = sum(size - quantised_bytes(kind, rows, columns, size) for rows, columns, size in self.tensors.linears)
        return self.tensors.frozen - saved

    @property
    def trained_weights(self) -> int:
        return 4 * sum(number for _, number in self.tensors.trained)

    @property
    def optimizer(self) -> int:
        return sum(optimizer_bytes(self.recipe.train.optimizer, number) for _, number in self.tensors.trained)

    @property
    def held(self) -> dict[str, int]:
        perceptual = sum(p.nbytes for p in vgg_on_meta().parameters()) if self.recipe.loss.perceptual == "lpips" else 0
        return {
            "frozen weights": self.frozen_weights,
            "trained weights": self.trained_weights,
            "gradients": self.trained_weights,
            "optimizer state": self.optimizer,
            "EMA": self.trained_weights if self.recipe.train.ema_device == "same" else 0,
            "perceptual network": perceptual,
        }

    @property
    def dequantised(self) -> int:
        """A quantised layer is unpacked when it is used, one at a time."""
        linears = self.tensors.linears if self.recipe.train.base_weights != "full" else ()
        return max((size for *_, size in linears), default=0)

    @property
    def activations(self) -> int:
        return self.step.network + self.dequantised

    @property
    def perceptual_activations(self) -> int:
        return max(0, self.step.perceptual - self.activations)

    @property
    def phases(self) -> dict[str, int]:
        """Most bytes in use in each phase of a run."""
        held = sum(self.held.values())
        before = {"encoding the captions": self.text_encoder}
        if self.recipe.loss.variance_reduction:
            before["encoding the images"] = self.encoding
        if not self.recipe.is_style:
            before["pictures of the base"] = self.frozen_weights + self.decoding
        return before | {
            "training step": held + self.activations + self.perceptual_activations,
            "optimizer step": held,  # in place
            # gradients are gone by then, but the trained weights lie aside while the EMA is in their place
            "validation pictures": held + self.drawing + self.dequantised,
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def allowance(self) -> int:
        return CONTEXT + int(FRAGMENTATION * self.peak)

    @property
    def total(self) -> int:
        return self.peak + self.allowance

    @property
    def card_gb(self) -> int | None:
        """The smallest common card that holds the total, None if there is none."""
        return next((size for size in CARDS_GB if self.total <= size * 10**9), None)


def quantised_bytes(kind: str, rows: int, columns: int, size: int) -> int:
    """Bytes of a linear weight (rows, columns) of `size` bytes as bitsandbytes holds it."""
    if kind == "nf4":  # two weights a byte, a byte for every 64 as their scale, a float32 for every 256 of those
        blocks = math.ceil(rows * columns / 64)
        return math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / 256)
    if kind == "int8":  # a byte a weight, and a float32 scale per row
        return rows * columns + 4 * rows
    return size


def optimizer_bytes(kind: str, number: int) -> int:
    """Bytes of Adam's two moments for a tensor of `number` weights."""
    if kind == "adamw8bit" and number >= 4096:  # smaller tensors keep float32 moments
        return 2 * (number + 4 * math.ceil(number / 256))
    return 8 * number


def vgg_on_meta() -> VggMap:
    with torch.device("meta"):
        return VggMap()


def build_networks(
    recipe: Recipe, family: ModuleType, base: ModelMixin, vae: ModelMixin
) -> tuple[ModelMixin, ModelMixin, PixelSubspace]:
    """(network to train, latent base, subspace) on the meta device, as a run of the recipe holds them."""
    base = copy.deepcopy(base).requires_grad_(False)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    patch = family.pixel_patch(vae)
    with torch.device("meta"):
        subspace = PixelSubspace(3 * patch**2, family.latent_dim(vae), patch)
    network = family.lift(base, subspace)
    if recipe.lora is None:
        return trainable.copy_for_full_training(network), base, subspace
    targets = family.lora_targets(network)
    ends = family.TRAINED_ENDS if recipe.lora.ends else ()
    trainable.attach_lora(network, targets, ends, recipe.lora.rank, recipe.lora.dropout)
    return network, base, subspace


def count_tensors(family: ModuleType, network: ModelMixin, held: Sequence[ModelMixin]) -> Tensors:
    """What `build_networks` made, counted; weights that two networks share count once.

    Args:
        held: all networks that stay on the GPU.
    """
    frozen = [p for module in held for p in module.parameters() if not p.requires_grad]
    storages = {p.untyped_storage()._cdata: p.nbytes for p in frozen}
    linears = tuple(
        (*module.weight.shape, module.weight.nbytes)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
        and not any(name == end or name.startswith(f"{end}.") for end in family.TRAINED_ENDS)
    )  # fmt: skip
    trained = trainable.trained_parameters(network).items()
    return Tensors(sum(storages.values()), linears, tuple((name, p.numel()) for name, p in trained))


def plan_memory(
    recipe: Recipe, family: ModuleType, base: ModelMixin, vae: ModelMixin, text_encoder: int, conditions: int = 0,
    wide_perceptual: bool = False,
) -> MemoryPlan:  # fmt: skip
    """Rehearse a run of the recipe: some seconds, and no memory for weights or activations.

    Args:
        base, vae: transformer and VAE of the base on the meta device; they are not changed.
        text_encoder: bytes of its weights, which are alone on the GPU before all else; 0 if not known.
        conditions: condition images of each image.
        wide_perceptual: as `rehearse_step` takes it.
    """
    network, latent, subspace = build_networks(recipe, family, base, vae)
    held = (network, latent) if recipe.loss.variance_reduction else (network,)
    tensors = count_tensors(family, network, held)
    step = rehearse_step(recipe, family, network, latent, subspace, conditions, wide_perceptual)
    drawing = rehearse_drawing(recipe, family, network, subspace, recipe.train.batch_size)
    encoding, decoding = rehearse_vae(recipe, family, vae, recipe.train.batch_size)
    return MemoryPlan(recipe, text_encoder, tensors, step, drawing, encoding, decoding, conditions)


def steps_by_resolution(plan: MemoryPlan, family: ModuleType, base: ModelMixin, vae: ModelMixin) -> dict[int, Step]:
    """One micro-batch at each resolution that is trained at, data.resolution first."""
    recipe, sides = plan.recipe, plan.recipe.data.resolutions()
    return {
        side: plan.step if side == max(sides) else
        rehearse_step(recipe, family, *build_networks(recipe, family, base, vae), plan.conditions, resolution=side)
        for side in sides
    }  # fmt: skip


def checkpointing_levels(recipe: Recipe, less: bool) -> list[str]:
    """Values of train.gradient_checkpointing that take less memory than the recipe's, or more; ascending in what they
    compute again. Those that the recipe allows: compiled blocks cannot be chosen from."""
    levels = ["false", "selective", "true"]
    own = levels.index(str(recipe.train.gradient_checkpointing).lower())
    found = levels[own + 1 :] if less else levels[:own]
    return [level for level in found if not (recipe.train.compile and level == "selective")]


def less_recomputation(
    plan: MemoryPlan, family: ModuleType, base: ModelMixin, vae: ModelMixin, free_bytes: int
) -> MemoryPlan | None:
    """The plan that recomputes least of those that fit; None where that is the plan itself or none fits."""
    keys = [f"train.gradient_checkpointing={kind}" for kind in checkpointing_levels(plan.recipe, less=False)]
    for key in tqdm(keys, desc="looking for room", leave=False):
        recipe = override(plan.recipe, (key,))
        changed = plan_memory(recipe, family, base, vae, plan.text_encoder, plan.conditions)
        if changed.total <= free_bytes:
            return changed
    return None


@dataclass(frozen=True)
class Advice:
    """`overrides` of the recipe that lower its plan's total by `saved` bytes, each advice taken alone."""

    overrides: tuple[str, ...]
    saved: int

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)} (about {self.saved / 1e9:.1f} GB less)"


def options(recipe: Recipe) -> list[tuple[str, ...]]:
    """Overrides that could lower the recipe's memory."""
    train, lora, found = recipe.train, recipe.lora, []
    found += [(f"train.gradient_checkpointing={kind}",) for kind in checkpointing_levels(recipe, less=True)]
    if lora is None:
        found.append(("lora={rank: 256}",))
    else:
        kinds = {"full": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}[train.base_weights]
        found += [(f"train.base_weights={kind}",) for kind in kinds]
        if lora.rank >= 32:
            found.append((f"lora.rank={lora.rank // 2}",))
    if train.optimizer == "adamw":
        found.append(("train.optimizer=adamw8bit",))
    if train.batch_size > 1:
        parts = 2 if train.batch_size % 2 == 0 else train.batch_size
        batch, accumulation = train.batch_size // parts, train.accumulation * parts
        found.append((f"train.batch_size={batch}", f"train.accumulation={accumulation}"))
    resolution, largest = recipe.data.resolution, max(recipe.data.resolutions())
    if resolution < largest:
        smaller = ",".join(str(side) for side in recipe.data.more_resolutions if side < largest)
        found.append((f"data.more_resolutions=[{smaller}]",))
    elif resolution >= 512:
        found.append((f"data.resolution={resolution * 3 // 4 // 64 * 64}",))
    if train.ema_device == "same":
        found.append(("train.ema_device=cpu",))
    if recipe.loss.perceptual != "none":
        found.append(("loss.perceptual=none",))
    return found


def advise(
    plan: MemoryPlan, family: ModuleType, base: ModelMixin, vae: ModelMixin, free_bytes: int | None = None,
    count: int = 3,
) -> list[Advice]:  # fmt: skip
    """The recipe keys that would lower a plan most, largest saving first; one advice per key.

    Args:
        free_bytes: memory of the card. A plan that fits needs no advice, and where int8 weights suffice, nf4 is not
            proposed. None: advise in any case.
    """
    if free_bytes is not None and plan.total <= free_bytes:
        return []
    best: dict[str, Advice] = {}
    for overrides in tqdm(options(plan.recipe), desc="looking for savings", leave=False):
        recipe, key = override(plan.recipe, overrides), overrides[0].partition("=")[0]
        if key in ("train.base_weights", "train.optimizer", "train.ema_device"):
            changed = replace(plan, recipe=recipe)  # the step is the same
        else:
            changed = plan_memory(recipe, family, base, vae, plan.text_encoder, plan.conditions)
        before = best.get(key)
        enough = before is not None and free_bytes is not None and plan.total - before.saved <= free_bytes
        if plan.total > changed.total and not enough:
            best[key] = Advice(overrides, plan.total - changed.total)
    return sorted(best.values(), key=lambda advice: -advice.saved)[:count]
