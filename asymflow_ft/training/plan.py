"""`--dry-run`: what a run would download, train, hold, store and cost, said before anything is loaded."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, model_info, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # of the HTTP library that this version uses

from asymflow_ft.data.source import open_sources
from asymflow_ft.families import family_of
from asymflow_ft.families.base import INDEX, MODULAR_INDEX, load_index, transformer_on_meta, vae_on_meta
from asymflow_ft.recipe import Data, Recipe, plain
from asymflow_ft.textfiles import read_prompts
from asymflow_ft.training.memory import MemoryPlan, advise, less_recomputation, plan_memory, steps_by_resolution
from asymflow_ft.training.rehearsal import Step, text_rows
from asymflow_ft.training.trainable import diffusers_name

# Sustained TFLOP/s in bf16 for the time estimate: the first from the paper's own GPU hours, the second a guess.
THROUGHPUTS = ((290.0, "H100, as the paper's GPU hours imply"), (70.0, "RTX 4090 class, an assumption"))
CHECKPOINTING = {True: "on", "selective": "selective", False: "off"}
OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth")


@dataclass(frozen=True)
class Repository:
    """Files of a base that a run reads, in bytes by name; those not on this disk yet; the licence its card states."""

    files: dict[str, int]
    missing: dict[str, int]
    licence: str | None

    def part(self, name: str) -> int:
        """Bytes of one part's weights."""
        return sum(n for file, n in self.files.items() if file.startswith(f"{name}/") and file.endswith("safetensors"))


def open_repository(base: str, revision: str | None) -> Repository | None:
    """A local folder, or what the Hub says of a repository; None when the Hub does not answer."""
    folder = Path(base)
    if folder.is_dir():
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*.*")}
        card = ModelCard.load(folder / "README.md").data if (folder / "README.md").is_file() else None
    else:
        try:
            info = model_info(base, revision=revision, files_metadata=True, timeout=10)
        except (OSError, HTTPError):
            return None
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        card = info.card_data
    parts = [name for name, value in load_index(base, revision).items() if isinstance(value, list)]
    files = {
        name: size for name, size in sizes.items()
        if name in (INDEX, MODULAR_INDEX) or (name.split("/")[0] in parts and not name.endswith(OTHER_FORMATS))
    }  # fmt: skip
    missing = {} if folder.is_dir() else {
        name: size for name, size in files.items()
        if not isinstance(try_to_load_from_cache(base, name, revision=revision), str)
    }  # fmt: skip
    names = [] if card is None else [card.get("license"), card.get("license_name"), card.get("license_link")]
    return Repository(files, missing, ", ".join(name for name in names if name) or None)


def dry_run(recipe: Recipe, tflops: float | None = None, card_gb: float | None = None) -> str:
    """The report of a run that is not made.

    Args:
        tflops: sustained TFLOP/s per GPU, None prints `THROUGHPUTS`.
        card_gb: memory of the card to fit; None takes this machine's GPU, if there is one.

    Raises:
        ValueError: whatever is wrong with the recipe, the base or the data and can be seen without weights.
    """
    family = family_of(recipe.base, recipe.revision)
    data = recipe.data
    # streams are counted, not downloaded
    opened = [open_sources(Data(mix=(part,))) for part in data.parts() if not part.streaming]
    streamed = sum(part.limit or 0 for part in data.parts() if part.streaming)
    numbers = [part.conditions(row) for part in opened for row in range(len(part))]
    unseen = [part.limit or 0 for part in data.parts() if part.streaming and part.condition_column is not None]
    conditions, most = sum(numbers) + sum(unseen), max([0, *numbers, *(1 for _ in unseen)])
    images = sum(map(len, opened)) + streamed
    captions = {caption for part in opened for row in range(len(part)) for caption in part.captions(row)}
    texts = len({"", *read_prompts(recipe.sample.prompts), *captions}) + streamed
    base = transformer_on_meta(family, recipe.base, recipe.revision)
    vae = vae_on_meta(recipe.base, recipe.revision)
    repository = open_repository(recipe.base, recipe.revision)
    plan = plan_memory(recipe, family, base, vae, _text_encoders(repository), most)
    if card_gb is None and torch.cuda.is_available():
        card_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    latents = latent_tokens(data, images, conditions, family.pixel_patch(vae)) * family.latent_dim(vae)
    disk = disk_need(plan, repository, latents, texts * text_rows(recipe, family) * family.text_dim(base))
    limit = 80.0 if card_gb is None else card_gb
    advice = advise(plan, family, base, vae, int(limit * 1e9))
    room = card_gb or plan.card_gb or 0.0
    faster = less_recomputation(plan, family, base, vae, int(room * 1e9))
    total = sum(p.numel() for p in base.parameters())
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            [json.dumps(plain(recipe), indent=2)],
            describe_base(recipe, repository, total),
            describe_trained(plan, family.OUTPUT_LAYER, family.TRAINED_ENDS, total),
            describe_memory(plan, card_gb),
            [f"to fit {limit:.0f} GB, these keys help most: ", *(f"  {one}" for one in advice)] if advice else [],
            [] if faster is None else describe_room(plan, faster, room),
            describe_disk(disk, Path(recipe.output_dir)),
            describe_time(plan, steps_by_resolution(plan, family, base, vae), tflops),
            [
                f"data {', '.join(part.source for part in data.parts())}: {images} images"
                f"{f', {streamed} of them streamed' if streamed else ''}, {texts} texts to encode",
                *(_describe_resolutions(data) if data.more_resolutions else ()),
                *(_describe_conditions(conditions, most, bool(unseen)) if conditions else ()),
            ],
        )
        if lines
    )


def _describe_resolutions(data: Data) -> list[str]:
    sides = ", ".join(map(str, data.resolutions()))
    return [f"resolutions {sides}: the figures above take every image to fill each of them; smaller ones need less"]


def _describe_conditions(number: int, most: int, guessed: bool) -> list[str]:
    return [
        f"condition images: {number}, up to {most} of an image, which the figures above take every image to have"
        + (" (streams are taken to have one)" if guessed else "")
    ]


def out_of_memory(recipe: Recipe, error: Exception) -> str:
    """What to say after an error of too little memory; takes some seconds."""
    family = family_of(recipe.base, recipe.revision)
    base, vae = transformer_on_meta(family, recipe.base, recipe.revision), vae_on_meta(recipe.base, recipe.revision)
    conditions = int(any(part.condition_column is not None for part in recipe.data.parts()))
    plan = plan_memory(recipe, family, base, vae, 0, conditions)
    advice = "; ".join(map(str, advise(plan, family, base, vae))) or "none; it takes a larger card or machine"
    return f"{str(error) or 'out of memory'}\nthese recipe keys would help most: {advice}"


def describe_base(recipe: Recipe, repository: Repository | None, total: int) -> list[str]:
    lines = [f"base {recipe.base}: {total:,} parameters"]
    if recipe.init_from:
        lines.append(f"  goes on from {recipe.init_from}, which is not looked at here")
    if repository is None:
        return [
            *lines,
            "  the Hugging Face Hub does not answer: download and licence unknown, see the base's card",
        ]
    lines.append(f"  licence: {repository.licence or 'its card states none'}; a converted model keeps it")
    if not repository.missing:
        return [*lines, "  nothing to download"]
    lines.append(f"  to download: {_gb(sum(repository.missing.values()))}")
    folders = dict.fromkeys(name.split("/")[0] for name in repository.missing)
    sizes = {one: sum(n for name, n in repository.missing.items() if name.split("/")[0] == one) for one in folders}
    return [*lines, *(f"    {name:<20}{_gb(size):>10}" for name, size in sizes.items())]


def describe_trained(plan: MemoryPlan, output: str, ends: Sequence[str], total: int) -> list[str]:
    train, lora = plan.recipe.train, plan.recipe.lora
    groups: dict[str, int] = {}
    for name, number in plan.tensors.trained:
        own = [end for end in ends if diffusers_name(name).startswith(f"{end}.")]
        group = own[0] if own else "other weights" if lora is None else f"LoRA r={lora.rank}"
        groups[group] = groups.get(group, 0) + number

    def rate(name: str) -> float:
        if name == output:
            return train.lr_output
        return train.lr_ends if name in ends and train.lr_ends is not None else train.lr

    kind = "LoRA alone" if plan.recipe.is_style else "LoRA, and the end layers whole"
    kind = "all weights" if lora is None else kind
    return [
        f"{sum(groups.values()):,} will be trained ({kind}), {sum(groups.values()) / total:.1%} of the base",
        *(f"  {name:<22}{number:>15,}   learning rate {rate(name):g}" for name, number in groups.items()),
    ]


def describe_memory(plan: MemoryPlan, card_gb: float | None) -> list[str]:
    train = plan.recipe.train
    top = max(plan.phases, key=lambda name: plan.phases[name])
    items = {
        **plan.held,
        f"activations (checkpointing {CHECKPOINTING[train.gradient_checkpointing]})": plan.activations,
        "activations of the perceptual term": plan.perceptual_activations,
    }
    card = "no single common card" if plan.card_gb is None else f"a card of {plan.card_gb} GB"
    lines = [
        "GPU memory per process (estimated, not measured; 1 GB = 10^9 bytes)",
        *(f"  {name:<36}{_gb(size):>10}" for name, size in items.items()),
        "  most at a time, by phase; one after the other",
        *(f"    {name:<34}{_gb(size) if size else 'unknown':>10}" for name, size in plan.phases.items()),
        f"  {'allowance: CUDA context, allocator':<36}{_gb(plan.allowance):>10}",
        f"  {'total':<36}{_gb(plan.total):>10}   (the phase '{top}'; fits {card})",
    ]
    if train.ema_device == "cpu":
        lines.append(f"  EMA in host memory: {_gb(plan.trained_weights)}")
    if card_gb is not None:
        lines.append(f"  {'exceeds' if plan.total > card_gb * 1e9 else 'fits'} {card_gb:.0f} GB")
    return lines


def describe_room(plan: MemoryPlan, faster: MemoryPlan, card_gb: float) -> list[str]:
    kind, saved = faster.recipe.train.gradient_checkpointing, 1 - faster.step.flops / plan.step.flops
    return [
        f"{card_gb:.0f} GB have room for train.gradient_checkpointing={str(kind).lower()}: {_gb(faster.total)}, "
        f"{saved:.0%} less arithmetic a step"
    ]


def latent_tokens(data: Data, images: int, conditions: int, patch: int) -> int:
    """Tokens of all latents that a run encodes, at most: of each image at each resolution, of held-out ones at one."""
    each = sum((side // patch) ** 2 for side in data.resolutions())
    held_out = min(data.held_out, images)
    beside = each if data.condition_resolution is None else (data.condition_resolution // patch) ** 2
    return (images - held_out) * each + held_out * (data.resolution // patch) ** 2 + conditions * beside


def disk_need(plan: MemoryPlan, repository: Repository | None, latent_values: int, text_values: int) -> dict[str, int]:
    """Bytes that a run writes, at most.

    Args:
        latent_values: of all images. text_values: of the embeddings of all captions and prompts.
    """
    recipe, cached = plan.recipe, plan.recipe.cache.enabled
    text_width = 1 if recipe.cache.text == "fp8" else 2 if recipe.train.precision == "bf16" else 4
    latent_width = {"fp8": 1, "float16": 2, "float32": 4}[recipe.cache.latents]
    checkpoint = 2 * plan.trained_weights + plan.optimizer  # weights, their average, moments
    need = {
        "download": 0 if repository is None else sum(repository.missing.values()),
        "text embeddings": text_values * text_width if cached else 0,
        "latents": latent_values * latent_width if cached and recipe.loss.variance_reduction else 0,
        # a new one is whole before the oldest goes
        f"checkpoints, {recipe.train.keep_checkpoints} + 1": checkpoint * (recipe.train.keep_checkpoints + 1),
        "pipeline": 0 if recipe.is_style else plan.tensors.frozen + _text_encoders(repository),
    }
    return {name: size for name, size in need.items() if size}


def describe_disk(need: dict[str, int], folder: Path) -> list[str]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, total = shutil.disk_usage(existing).free, sum(need.values())
    return [
        f"disk: at most {_gb(total)}, {_gb(free)} free{'' if total <= free else ' - NOT ENOUGH'}",
        *(f"  {name:<36}{_gb(size):>10}" for name, size in need.items()),
    ]


def describe_time(plan: MemoryPlan, steps: Mapping[int, Step], tflops: float | None) -> list[str]:
    """steps: a micro-batch at each resolution. A step draws one with its share of the entries, which are as many at
    each where every image fills all."""
    recipe, train, sample = plan.recipe, plan.recipe.train, plan.recipe.sample
    flops = sum(step.flops for step in steps.values()) // len(steps)
    forward = sum(step.forward_flops for step in steps.values()) // len(steps)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    grids = max(0, (train.steps - 1) // sample.every) if sample.every else 0
    pictures = 3 * max(sample.count, sample.judge) + grids * sample.count
    passes = 2 if sample.guidance is None or sample.guidance > 1 else 1
    training = train.steps * train.accumulation * flops
    drawing = pictures * sample.steps * passes * steps[recipe.data.resolution].forward_flops // train.batch_size
    images = train.batch_size * train.accumulation
    passes_named = ["forward", *(["reference"] if recipe.loss.variance_reduction else []), "backward"]
    passes_named += ["recomputation"] if train.gradient_checkpointing else []
    lines = [
        f"{train.steps} steps of {train.batch_size} x {train.accumulation} images per process"
        f"{f', {images * processes} on {processes} processes' if processes > 1 else ''} -> {recipe.output_dir}",
        f"  {flops * train.accumulation / 1e12:.4g} TFLOP per step and process"
        f"{' on average' if len(steps) > 1 else ''}: {flops / forward:.2f} x a forward pass of "
        f"{forward / train.batch_size / 1e12:.3g} TFLOP per image (counted: {', '.join(passes_named)})",
        f"  {pictures} pictures of {sample.steps} steps: {drawing / (training + drawing):.0%} of all arithmetic",
    ]
    for rate, what in THROUGHPUTS if tflops is None else ((tflops, "as given"),):
        hours = (training + drawing) / (rate * 1e12) / 3600
        lines.append(f"  {hours:.3g} hours at {rate:g} TFLOP/s per GPU ({what}), {hours * processes:.3g} GPU hours")
    return lines


def _text_encoders(repository: Repository | None) -> int:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return 0 if repository is None else sum(map(repository.part, names))


def _gb(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e8 else f"{size / 1e9:,.2f} GB"
