"""Converted models from training runs: the finished one, and `asymflow-ft export` of a checkpoint."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import PixelSubspace, load_subspace
from asymflow_ft.data.cache import content_key
from asymflow_ft.families import family_of, name_of, pixel_pipeline_named
from asymflow_ft.hub.cards import card_licence, hub_commit
from asymflow_ft.hub.forms import Converted, open_converted
from asymflow_ft.hub.provenance import UNKNOWN, without_folders
from asymflow_ft.hub.write import FORMS, SHARD_SIZE, export, whole_folder
from asymflow_ft.recipe import Recipe, flat, load_recipe
from asymflow_ft.training.checkpoint import newest_whole, verify_checkpoint, write_json
from asymflow_ft.training.run import begun
from asymflow_ft.training.student import open_start
from asymflow_ft.training.trainable import adapter_name

ORIGIN = "logs/origin.json"  # of a run: "revision" (commit of the base) and "licence"


@dataclass(frozen=True)
class Result:
    """What a run has trained by a step.

    tensors: by the names of `trainable.trained_parameters`. weights: "ema", or "trained" for those of the last step.
    pipeline_class, settings: of the pixel pipeline.
    """

    recipe: Recipe
    step: int
    tensors: Mapping[str, Tensor]
    weights: str
    subspace: PixelSubspace
    pipeline_class: str
    settings: Mapping[str, Any]


def result_folder(recipe: Recipe) -> Path:
    """Where a finished run lies: a pipeline, or the style LoRA."""
    return Path(recipe.output_dir) / ("lora" if recipe.is_style else "pipeline")


def keep_origin(recipe: Recipe, start: Converted | None) -> str | None:
    """Note where a run comes from when it begins: at its end the Hub may not answer, and `main` may be another commit.

    Args:
        start: the model in `init_from`, whose terms hold: they may be stricter than the base's.

    Returns:
        The revision of the base to load, now and when the run continues: a commit if the base is on the Hub.
    """
    file = Path(recipe.output_dir) / ORIGIN
    if not (file.is_file() and begun(Path(recipe.output_dir))):
        revision = hub_commit(recipe.base, recipe.revision)
        licence = card_licence(recipe.base, revision)
        if start is not None:
            licence = card_licence(str(recipe.init_from)) or start.provenance["licence"] or licence
        write_json(file, {"revision": revision, "licence": licence})
    return json.loads(file.read_text(encoding="utf-8"))["revision"]


def save_result(result: Result, family: ModuleType, metrics: Mapping[str, Any]) -> None:
    """Write the finished run's folder; an earlier one is renamed.

    Raises:
        ValueError: it cannot be written.
    """
    folder = result_folder(result.recipe)
    new = folder.with_name(f"{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        if result.recipe.is_style:
            export_lora(result, family, new, metrics)
        else:
            export(converted(result, family, metrics), new, "pipeline")
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.before-{int(time.time())}"))
        new.rename(folder)
    except ValueError as error:
        raise ValueError(
            f"{error}. The last checkpoint is whole: mend this and run the same command again, or `asymflow-ft export "
            f"{result.recipe.output_dir}`"
        ) from error


def converted(result: Result, family: ModuleType, metrics: Mapping[str, Any] | None) -> Converted:
    """A run's result as an opened model."""
    provenance = _provenance(result, family, metrics)
    trained = {adapter_name(name): tensor.detach().cpu() for name, tensor in result.tensors.items()}
    codec = PixelCodec(**provenance["pixels"])
    return Converted(family, result.subspace, codec, provenance, trained, None, _pictures(result.recipe))


def export_lora(result: Result, family: ModuleType, out: Path, metrics: Mapping[str, Any] | None) -> None:
    """Write a style run's adapters as diffusers' own pipelines do, with `pipe.load_lora_weights` to read them."""
    lora = result.recipe.lora
    assert lora is not None
    kind = pixel_pipeline_named(result.pipeline_class)
    tensors = {adapter_name(name): tensor.detach().cpu().contiguous() for name, tensor in result.tensors.items()}
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    config = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": modules}
    provenance = {**_provenance(result, family, metrics), "form": "lora", "dtype": "float32"}
    with whole_folder(out, provenance, _pictures(result.recipe)) as folder:
        kind.save_lora_weights(
            folder, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=config
        )  # fmt: skip


def open_result(source: str | Path, ema: bool = True) -> tuple[Result, ModuleType, Mapping[str, Any] | None]:
    """What a run, or one of its checkpoints, holds; with its family, and its metrics if they are of that step.

    Raises:
        ValueError: there is no whole checkpoint, or the run's subspace is gone.
    """
    path = Path(source)
    run = path.parent.parent if (path / "manifest.json").is_file() else path
    if run != path:
        if fault := verify_checkpoint(path):
            raise ValueError(f"{fault}; choose another checkpoint")
        checkpoint = path
    else:
        found, broken = newest_whole(run / "checkpoints")
        if found is None:
            raise ValueError(f"{run} has no whole checkpoint{f' ({broken[0]})' if broken else ''}; train it first")
        checkpoint = found
    recipe = replace(load_recipe(run / "recipe.yaml"), output_dir=str(run))
    recipe = replace(recipe, revision=_origin(run)["revision"])
    start = open_start(recipe)
    subspace = load_subspace(str(recipe.align.path)) if start is None else start.subspace
    material = json.loads((run / "logs/material.json").read_text(encoding="utf-8"))
    if material["subspace"] != subspace_key(subspace):
        raise ValueError(
            f"the subspace {recipe.align.path or recipe.init_from} is not the one that {run} was trained with; "
            "restore it"
        )
    family = family_of(recipe.base, recipe.revision)
    parts = family.load_parts(recipe.base, ("scheduler",), torch.float32, recipe.revision)
    shift = recipe.noise.shift
    if shift is None:
        shift = family.latent_shift(parts) * subspace.scale.item()
    step = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"]
    tensors = load_file(checkpoint / ("ema.safetensors" if ema else "trained.safetensors"))
    result = Result(
        recipe, step, tensors, "ema" if ema else "trained", subspace, family.pixel_pipeline_class(parts).__name__,
        pipeline_settings(recipe, shift),
    )  # fmt: skip
    file = run / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return result, family, metrics if metrics and metrics["run"]["steps"] == step and ema else None


def export_any(
    source: str, out: Path, form: str, ema: bool | None = None, dtype: torch.dtype | None = None,
    base: str | None = None, revision: str | None = None, shard_size: str = SHARD_SIZE,
) -> None:  # fmt: skip
    """Write what `source` is in another form.

    Args:
        source: see open_source. form: one of FORMS, or "lora" for a style run. ema: of a run, None: yes.

    Raises:
        ValueError: the source cannot be opened, has no such form, or an argument does not apply to it.
    """
    if not is_run(source):
        if ema is not None:
            raise ValueError(f"{source} holds one set of weights; --ema and --no-ema choose between those of a run")
        if form == "lora":
            raise ValueError(f"{source} is a converted model; a LoRA comes from a run with lora.ends=false")
        return export(open_source(source, base, revision), out, form, dtype, shard_size)
    _check_base(source, base, revision)
    result, family, metrics = open_result(source, ema is not False)
    if result.recipe.is_style != (form == "lora"):
        has, wants = ("a style LoRA", "--form lora") if result.recipe.is_style else ("a model", ", ".join(FORMS))
        raise ValueError(f"{source} trains {has}, and --form is {form}; choose {wants}")
    if form == "lora":
        if dtype is not None:
            raise ValueError("a LoRA file is always float32; leave out --dtype")
        return export_lora(result, family, out, metrics)
    return export(converted(result, family, metrics), out, form, dtype, shard_size)


def is_run(source: str | Path) -> bool:
    """Whether this is a run's folder or one of its checkpoints."""
    path = Path(source)
    return (path / "recipe.yaml").is_file() or (path / "manifest.json").is_file()


def open_source(source: str, base: str | None = None, revision: str | None = None) -> Converted:
    """A run's newest averaged weights, a checkpoint's, or a converted model of any form.

    Raises:
        ValueError: it cannot be opened, is a style LoRA, or brings its base and another is given.
    """
    if not is_run(source):
        opened = open_converted(source, base, revision)
        if opened.provenance["form"] == "pipeline":
            _check_base(source, base, revision)
        elif opened.folder is not None and base is not None:
            opened = replace(opened, provenance={**opened.provenance, "base": base, "revision": revision})
        return opened
    _check_base(source, base, revision)
    result, family, metrics = open_result(source)
    if result.recipe.is_style:
        raise ValueError(
            f"{source} trains a style LoRA; give the converted model that it belongs to ({result.recipe.init_from}), "
            f"and {result_folder(result.recipe)} as a LoRA"
        )
    return converted(result, family, metrics)


def _check_base(source: str, base: str | None, revision: str | None) -> None:
    if base is not None or revision is not None:
        raise ValueError(f"{source} has its base in itself; --base and --revision are for adapters and merged models")


def load_pixel_pipeline(
    source: str | Path, dtype: torch.dtype, base: str | None = None, revision: str | None = None
) -> DiffusionPipeline:
    """The whole pixel pipeline of what `open_source` opens, in the host's memory."""
    model = open_source(str(source), base, revision).with_dtype(dtype)
    return model.pipeline(model.transformer())


def subspace_key(subspace: PixelSubspace) -> str:
    """Tells one subspace from another."""
    return content_key(*subspace.float32()[0].sum(0).tolist())


def pipeline_settings(recipe: Recipe, shift: float) -> dict[str, Any]:
    """Sampling defaults of the saved pipeline; a dynamic shift is anchored at the training resolution.

    Args:
        shift: timestep shift of training.
    """
    pixels, shift = recipe.data.resolution**2, shift if recipe.sample.shift is None else recipe.sample.shift
    return {
        "shift": shift, "shift_mode": recipe.sample.shift_mode, "base_pixels": pixels, "max_pixels": 4 * pixels,
        "max_shift": 2 * shift, "default_size": recipe.data.resolution, "max_sequence_length": recipe.text.max_length,
    }  # fmt: skip


def _provenance(result: Result, family: ModuleType, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    recipe = result.recipe
    run = Path(recipe.output_dir)
    return {
        **UNKNOWN, **_origin(run), "family": name_of(family), "pipeline_class": result.pipeline_class,
        "base": recipe.base,
        "init_from": recipe.init_from, "dtype": "bfloat16" if recipe.train.precision == "bf16" else "float32",
        "weights": result.weights, "step": result.step, "settings": dict(result.settings),
        "pixels": {"space": recipe.pixels.space, "mean": list(recipe.pixels.mean), "std": recipe.pixels.std},
        "recipe": without_folders(flat(recipe)), "metrics": metrics,
        "data": _facts(run / "logs/data.json"),
        "alignment": None if recipe.align.path is None else _facts(Path(recipe.align.path) / "report.json"),
    }  # fmt: skip


def _origin(run: Path) -> dict[str, Any]:
    return json.loads((run / ORIGIN).read_text(encoding="utf-8"))


def _facts(file: Path) -> Any:
    return without_folders(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _pictures(recipe: Recipe) -> dict[str, Path]:
    grids = sorted((Path(recipe.output_dir) / "samples").glob("step-*.png"))
    found = {"samples.png": grids[-1]} if grids else {}
    report = None if recipe.align.path is None else Path(recipe.align.path) / "report.png"
    return found | ({"alignment.png": report} if report and report.is_file() else {})
