"""What a training benchmark runs on: a recipe, a data set on disk with its caches filled, and the networks."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from asymflow_ft.bench.architectures import Architecture, random_embeds
from asymflow_ft.data.cache import TensorCache
from asymflow_ft.data.prepare import Entry, PreparedData
from asymflow_ft.data.source import open_sources
from asymflow_ft.recipe import Recipe, check
from asymflow_ft.recipe_keys import Align, Checkpointing, Data, Lora, Loss, Sample, Text, Train
from asymflow_ft.training.encode import Encoder
from asymflow_ft.training.stages import LATENT_SHARD, TEXT_SHARD, prepare

IMAGES = 8


@dataclass(frozen=True)
class Options:
    """What is measured, as the command line has it. rank: of the LoRA, None trains all weights. optimizer: None is
    the recipes' default on a GPU, and 32 bits on a CPU. warmup: training steps before those that are timed. images:
    pictures to align, or entries of the largest cache; None is the benchmark's own number. batch_guidance: of the
    pixel pipeline."""

    resolution: int | None = None
    batch: int = 1
    precision: str = "bf16"
    quant: str = "full"
    compile: bool = False
    rank: int | None = 256
    checkpointing: Checkpointing = True
    perceptual: str = "vgg"
    reference: bool = True
    optimizer: str | None = None
    repeats: int = 10
    warmup: int = 3
    images: int | None = None
    batch_guidance: bool = False


def resolution_of(architecture: Architecture, options: Options) -> int:
    """Side of the pictures in pixels.

    Raises:
        ValueError: the patch does not divide it, or another number cannot be worked with.
    """
    patch = architecture.family.GEOMETRY[1]
    side = architecture.resolution if options.resolution is None else options.resolution
    if side < 1:
        raise ValueError(f"--resolution is {side}; it must be {patch} or a multiple of it")
    if side % patch:
        near = max(round(side / patch), 1) * patch
        raise ValueError(f"--resolution {side} is not a multiple of the patch, {patch}; the nearest is {near}")
    for name, value in (("--batch", options.batch), ("--repeats", options.repeats), ("--rank", options.rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    if options.warmup < 0:
        raise ValueError(f"--warmup is {options.warmup}; it must be 0 or more")
    return side


def make_recipe(architecture: Architecture, options: Options, folder: Path, device: torch.device) -> Recipe:
    """The recipe of a run in `folder` that would do what is measured.

    Raises:
        ValueError: options that exclude each other; the message names the recipe's keys.
    """
    perceptual = "lpips" if options.perceptual == "vgg" else "none"
    recipe = Recipe(
        base=str(folder / "base"), output_dir=str(folder / "run"),
        data=Data(source=str(folder / "images"), resolution=resolution_of(architecture, options), held_out=0),
        sample=Sample(prompts=str(folder / "prompts.txt")), align=Align(path=str(folder / "subspace")),
        text=Text(architecture.max_length), lora=None if options.rank is None else Lora(options.rank),
        loss=Loss(perceptual=perceptual, variance_reduction=options.reference),
        train=Train(
            batch_size=options.batch, precision=options.precision, base_weights=options.quant,
            gradient_checkpointing=options.checkpointing, compile=options.compile,
            optimizer=options.optimizer or ("adamw" if device.type == "cpu" else "adamw8bit"),
        ),
    )  # fmt: skip
    check(recipe)
    return recipe


def picture(side: int, seed: int) -> bytes:
    """A JPEG file of smooth noise; photographs take about as long to decode."""
    rough = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def make_data(recipe: Recipe, architecture: Architecture, accelerator: Accelerator) -> PreparedData:
    """A data set in the recipe's folders, prepared by the very functions that a run calls; its caches hold random
    latents and embeddings, so that no VAE and no text encoder is asked."""
    base, images, side = Path(recipe.base), Path(recipe.data.source or ""), recipe.data.resolution
    for folder in (*(base / part for part in (*architecture.family.TEXT_PARTS, "vae")), images):
        folder.mkdir(parents=True)
    files = [picture(side, number) for number in range(IMAGES)]
    captions = [f"picture {number}" for number in range(IMAGES)]
    for number, (content, caption) in enumerate(zip(files, captions, strict=True)):
        (images / f"{number}.jpg").write_bytes(content)
        (images / f"{number}.txt").write_text(caption)
    Path(recipe.sample.prompts).write_text(captions[0])

    encoder = Encoder(recipe, architecture.family, accelerator.device)
    rank, patch = architecture.family.GEOMETRY
    embeds = random_embeds(architecture, 1 + IMAGES, encoder.dtype)
    entries = [Entry(0, (side, side), hashlib.sha256(content).hexdigest(), 1.0) for content in files]
    latents = torch.randn(IMAGES, (side // patch) ** 2, rank, generator=torch.Generator().manual_seed(0))
    folder = recipe.cache_folder
    _fill(TensorCache(folder / "text", encoder.text_storage, TEXT_SHARD),
          [encoder.keys.of_caption(caption) for caption in ("", *captions)], embeds)  # fmt: skip
    _fill(TensorCache(folder / "latents", recipe.cache.latents, LATENT_SHARD),
          [encoder.keys.of_image(entry) for entry in entries], latents)  # fmt: skip
    return prepare(recipe, architecture.family, open_sources(recipe.data), patch, accelerator).train


def _fill(cache: TensorCache, keys: Sequence[str], values: Tensor) -> None:
    cache.write(keys, list(values))
