"""The finished pipeline: trained weights folded in, the base's text encoder beside them."""

import shutil
import time
from pathlib import Path
from types import ModuleType

from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError

from asymflow_ft.recipe import Recipe


def pipeline_settings(recipe: Recipe, shift: float) -> dict[str, object]:
    """Sampling defaults of the saved pipeline; a dynamic shift is anchored at the training resolution."""
    pixels, shift = recipe.data.resolution**2, shift if recipe.sample.shift is None else recipe.sample.shift
    return {
        "shift": shift, "shift_mode": recipe.sample.shift_mode, "base_pixels": pixels, "max_pixels": 4 * pixels,
        "max_shift": 2 * shift, "default_size": recipe.data.resolution, "max_sequence_length": recipe.text.max_length,
    }  # fmt: skip


def save_pipeline(
    recipe: Recipe, family: ModuleType, pipeline: DiffusionPipeline, transformer: ModelMixin, folder: Path
) -> None:
    """The finished pipeline with the base's text encoder; written beside, then renamed.

    Raises:
        ValueError: it cannot be written.
    """
    parts = family.load_parts(recipe.base, ("text_encoder", "tokenizer"), transformer.dtype, recipe.revision)
    settings = {name: pipeline.config[name] for name in pipeline_settings(recipe, 1.0)}
    whole = type(pipeline)(
        scheduler=pipeline.scheduler, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
        transformer=transformer, subspace=pipeline.subspace, codec=pipeline.codec, **settings,
    )  # fmt: skip
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        whole.save_pretrained(part)
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.before-{int(time.time())}"))
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"could not save the pipeline {folder}: {error}. The last checkpoint is whole; "
            "free some space and run the same command again"
        ) from error
