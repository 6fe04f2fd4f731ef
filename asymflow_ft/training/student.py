"""The network that a recipe trains: the lifted base, or a converted model to go on from."""

from collections.abc import Callable
from types import ModuleType

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import safe_open

from asymflow_ft.components.norms import narrow_norms
from asymflow_ft.components.quantize import quantize_frozen
from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.data.cache import content_key
from asymflow_ft.hub.forms import Converted, open_converted
from asymflow_ft.recipe import Recipe
from asymflow_ft.training import trainable
from asymflow_ft.training.checkpoint import restore


def open_start(recipe: Recipe) -> Converted | None:
    """The converted model in `init_from`, None without it.

    Raises:
        ValueError: it cannot be opened, is in another pixel space than the recipe, or cannot be trained as it says.
    """
    if recipe.init_from is None:
        return None
    start = open_converted(recipe.init_from, recipe.base, recipe.revision, text=False)
    pixels = (recipe.pixels.space, recipe.pixels.mean, recipe.pixels.std)
    theirs = (start.codec.space, start.codec.mean, start.codec.std)
    if theirs != pixels:
        raise ValueError(
            f"init_from {recipe.init_from} works in pixels.space={theirs[0]} pixels.mean={list(theirs[1])} "
            f"pixels.std={theirs[2]}, and the recipe has {pixels[0]}, {list(pixels[1])}, {pixels[2]}; set the former"
        )
    if recipe.lora is None or recipe.is_style:
        return start
    if start.trained is None or not start.has_lora:
        raise ValueError(
            f"init_from {recipe.init_from} has no LoRA factors to go on with: it is a full finetune. Train all "
            "weights (lora=null), or a style LoRA on top of it (lora.ends=false)"
        )
    ranks = {tensor.shape[0] for name, tensor in start.trained.items() if ".lora_A." in name}
    if ranks != {recipe.lora.rank}:
        raise ValueError(f"init_from {recipe.init_from} has LoRA of rank {max(ranks)}; set lora.rank={max(ranks)}")
    return start


def start_key(start: Converted) -> str:
    """Tells what a run began with from other weights under the same name, wherever they lie: by the trained tensors,
    or of a whole transformer by its end layers, which every training changes."""
    trained = start.trained
    if trained is None:
        assert start.folder is not None
        files = sorted((start.folder / "transformer").glob("*.safetensors"))
        stored = {name: file for file in files for name in safe_open(file, "pt").keys()}
        ends = [name for name in stored if name.rpartition(".")[0] in start.family.TRAINED_ENDS]
        trained = {name: safe_open(stored[name], "pt").get_tensor(name) for name in ends}
    return content_key(*(trained[name].double().sum().item() for name in sorted(trained)))


def build_student(
    recipe: Recipe, family: ModuleType, subspace: PixelSubspace, start: Converted | None,
    base: Callable[[], ModelMixin], device: torch.device,
) -> ModelMixin:  # fmt: skip
    """The network on `device`, with exactly what the recipe trains requiring gradients.

    Args:
        base: makes the latent base that is lifted; its weights are shared, and released when they are quantised.
    """
    if start is not None and (recipe.lora is None or recipe.is_style):
        network = start.with_dtype(base_dtype(recipe)).transformer()
    else:
        network = family.lift(base(), subspace)
    narrow_norms(network)
    if recipe.train.base_weights != "full":
        quantize_frozen(network, recipe.train.base_weights, family.TRAINED_ENDS, device)
    network.to(device)
    if recipe.lora is None:
        return trainable.copy_for_full_training(network)
    targets, ends = family.lora_targets(network), family.TRAINED_ENDS if recipe.lora.ends else ()
    trainable.attach_lora(network, targets, ends, recipe.lora.rank, recipe.lora.dropout)
    if start is not None and recipe.lora.ends:
        parameters = trainable.trained_parameters(network)
        assert start.trained is not None
        names = {trainable.adapter_name(name): name for name in parameters}
        stored = {names.get(key, key): tensor for key, tensor in start.trained.items()}
        restore(parameters, stored, f"init_from {recipe.init_from}")
    return network


def load_transformer(recipe: Recipe, family: ModuleType) -> ModelMixin:
    """The base's transformer as stored, in host memory."""
    return family.load_parts(recipe.base, ("transformer",), base_dtype(recipe), recipe.revision).transformer


def on_device(recipe: Recipe, family: ModuleType, names: tuple[str, ...], device: torch.device) -> DiffusionPipeline:
    """Parts of the base, with the transformer quantised as the recipe says."""
    parts = family.load_parts(recipe.base, names, base_dtype(recipe), recipe.revision)
    if recipe.train.base_weights != "full":
        quantize_frozen(parts.transformer, recipe.train.base_weights, family.TRAINED_ENDS, device)
    return parts.to(device)


def base_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
