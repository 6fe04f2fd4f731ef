"""What runs once before the first step: captions to embeddings, images to latents; each model freed after its use."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from asymflow_ft.data.prepare import PreparedData, TensorCache, content_key, prepare_images
from asymflow_ft.data.source import Source
from asymflow_ft.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """Training images, held-out images, the sampling prompts, and every prompt's embedding."""

    train: PreparedData
    held_out: PreparedData
    prompts: list[str]
    embed: Callable[[str], Tensor]
    unreadable: list[str]


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_prompts(file: str) -> list[str]:
    """One prompt a line; empty lines and lines starting with # are left out.

    Raises:
        ValueError: no such file, or no prompts in it.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no prompt file at {path}; it is a text file with one prompt a line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def prepare(recipe: Recipe, family: ModuleType, source: Source, patch: int, accelerator: Accelerator) -> Prepared:
    """Cache all text embeddings, then all latents, under output_dir/cache; processes wait for the first to finish.

    Raises:
        ValueError: too few images, or none readable.
    """
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    cache = Path(recipe.output_dir) / "cache"
    text, latents = TensorCache(cache / "text"), TensorCache(cache / "latents")
    origin = f"{recipe.base}@{recipe.revision}"
    prompts = read_prompts(recipe.sample.prompts)

    def key(caption: str) -> str:
        return content_key(origin, recipe.text.max_length, dtype, caption)

    with accelerator.main_process_first(), torch.no_grad():
        missing = [c for c in dict.fromkeys(["", *prompts, *source.captions()]) if key(c) not in text]
        if missing:
            _encode_texts(
                recipe, family, missing, dtype, accelerator, lambda c, value: text.__setitem__(key(c), value)
            )
        vae = family.load_parts(recipe.base, ("vae",), torch.float32, recipe.revision).vae.to(accelerator.device)
        entries, unreadable = prepare_images(
            source, recipe.data.resolution, patch, origin, latents, key,
            lambda rgb: family.encode_latents(vae, rgb), show=accelerator.is_main_process,
        )  # fmt: skip
    split = len(entries) - recipe.data.held_out
    if split < 1:
        raise ValueError(
            f"{len(entries)} usable images leave none to train on after data.held_out={recipe.data.held_out}; "
            "use more images or hold out fewer"
        )
    train, held_out = (PreparedData(source, part, latents, text) for part in (entries[:split], entries[split:]))
    return Prepared(train, held_out, prompts, lambda prompt: text[key(prompt)], unreadable)


def _encode_texts(
    recipe: Recipe, family: ModuleType, captions: Sequence[str], dtype: torch.dtype, accelerator: Accelerator,
    store: Callable[[str, Tensor], None],
) -> None:  # fmt: skip
    parts = family.load_parts(recipe.base, ("text_encoder", "tokenizer"), dtype, recipe.revision)
    parts.to(accelerator.device)
    batches = [captions[i : i + 16] for i in range(0, len(captions), 16)]
    for batch in tqdm(batches, desc="captions", disable=not accelerator.is_main_process, mininterval=1):
        embeds = parts.encode_prompt(list(batch), max_sequence_length=recipe.text.max_length)[0]
        for caption, value in zip(batch, embeds, strict=True):
            store(caption, value)
    del parts
    free_memory()
