"""What every base family shares: reading a saved pipeline's index, and building the lifted network."""

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    ModularPipeline,
    ModularPipelineBlocks,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.schedulers import UniPCMultistepScheduler
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,  # of the HTTP library that this version uses
)
from safetensors import SafetensorError
from torch import Tensor, nn

from asymflow_ft.components.pipelines import PixelPipelineMixin
from asymflow_ft.components.subspace import Cond, Grid

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"


class NoIndexError(ValueError):
    """A folder or repository that holds no diffusers pipeline."""


@contextmanager
def opening(base: str) -> Iterator[None]:
    """Around reading a pipeline's files: what goes wrong there is a ValueError that says what to change."""
    try:
        yield
    except (OSError, HTTPError, HFValidationError, SafetensorError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        if Path(base).exists():
            raise ValueError(f"cannot open {base}: {reason}") from error
        raise ValueError(
            f"cannot open {base!r}: it is no local folder, and the Hugging Face Hub answered: {reason} "
            "Check the spelling; gated models need `hf auth login` and an accepted licence."
        ) from error


def load_index(base: str, revision: str | None = None) -> dict[str, Any]:
    """model_index.json of a diffusers folder or Hub repository, or in its place modular_model_index.json of one that
    has modular blocks alone, in the form of the former: every part with the library and the name of its class.

    Raises:
        ValueError: there is no such folder or repository.
        NoIndexError: it is not a diffusers pipeline.
    """
    absent = EntryNotFoundError, FileNotFoundError, NotADirectoryError
    try:
        return load_json(base, INDEX, revision)
    except ValueError as error:
        if not isinstance(error.__cause__, absent):
            raise
        no_index = error
    try:
        index = load_json(base, MODULAR_INDEX, revision)
    except ValueError as error:
        if not isinstance(error.__cause__, absent):
            raise
        local = f"{base} is not a diffusers pipeline folder: it has no {INDEX}"
        raise NoIndexError(local if Path(base).exists() else str(no_index)) from no_index
    return {key: value[2]["type_hint"] if isinstance(value, list) else value for key, value in index.items()}


def load_json(base: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """A configuration file of a folder or Hub repository.

    Raises:
        ValueError: it cannot be fetched or read.
    """
    with opening(base):  # without diffusers' load_config, whose errors call a gated or silent repository unknown
        file = Path(base) / name if Path(base).exists() else Path(hf_hub_download(base, name, revision=revision))
        return json.loads(file.read_text(encoding="utf-8"))


def component_id(base: str, revision: str | None, component: str) -> str:
    """Identifies the weights of one part of a base: the commit on the Hub, or size and time of every local file.

    Raises:
        ValueError: the base cannot be read.
    """
    folder = Path(base) / component
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return f"{folder.resolve()} {hashlib.sha256(repr(stats).encode()).hexdigest()}"
    load_index(base, revision)  # now in the local cache, in a folder named after the commit
    files = [try_to_load_from_cache(base, name, revision=revision) for name in (INDEX, MODULAR_INDEX)]
    commit = next(Path(file).parent.name for file in files if isinstance(file, str))
    return f"{base}@{commit}/{component}"


def on_meta(kind: type[ModelMixin], base: str, part: str, revision: str | None = None) -> ModelMixin:
    """A part of the base without weights, from its config alone."""
    config = load_json(base, f"{part}/config.json", revision)
    with init_empty_weights():
        return kind.from_config(config)


def transformer_on_meta(family: ModuleType, base: str, revision: str | None = None) -> ModelMixin:
    """The base's transformer without weights."""
    return on_meta(family.TRANSFORMER, base, "transformer", revision)


def vae_on_meta(base: str, revision: str | None = None) -> ModelMixin:
    """The base's VAE without weights."""
    library, name = load_index(base, revision)["vae"]
    return on_meta(getattr(importlib.import_module(library), name), base, "vae", revision)


def stock_parts(
    kinds: Mapping[str, type[DiffusionPipeline]], base: str, parts: tuple[str, ...], dtype: torch.dtype,
    revision: str | None,
) -> DiffusionPipeline:  # fmt: skip
    """The stock pipeline of a base with its scheduler and only the named parts; the others are None and are not
    downloaded.

    Args:
        kinds: a family's PIPELINES.

    Raises:
        ValueError: another pipeline class, or files that cannot be fetched or read.
    """
    index = load_index(base, revision)
    name = index["_class_name"]
    if name not in kinds:
        raise ValueError(f"{base} is a {name}; this family converts {', '.join(kinds)}")
    absent = {
        part: None for part, value in index.items()
        if isinstance(value, list) and part not in parts and part not in ("_class_name", "scheduler")
    }  # fmt: skip
    with opening(base):
        return kinds[name].from_pretrained(base, revision=revision, dtype=dtype, **absent)


def modular_parts(
    kind: type[ModularPipeline], blocks: ModularPipelineBlocks, base: str, parts: tuple[str, ...], dtype: torch.dtype,
    revision: str | None,
) -> ModularPipeline:  # fmt: skip
    """As `stock_parts`, of a base that diffusers has modular blocks for instead of a pipeline.

    Raises:
        ValueError: files that cannot be fetched or read.
    """
    with opening(base):
        pipeline = kind(blocks=blocks, pretrained_model_name_or_path=base, revision=revision)
        for part in {*parts, "scheduler"}:
            spec = pipeline.get_component_spec(part)
            if spec.default_creation_method == "from_pretrained":  # else made with the blocks, as a scheduler may be
                own = {"revision": revision} if spec.pretrained_model_name_or_path == base else {}
                pipeline.update_components(**{part: spec.load(dtype=dtype, **own)})
    return pipeline


def run_stock(
    pipeline: DiffusionPipeline, on_step: Callable[[int], None] | None, **arguments: Any
) -> tuple[Any, Tensor]:
    """Images of a stock pipeline, and its float32 latents before decoding.

    Args:
        on_step: called with each finished step's index. arguments: the pipeline's own.
    """
    last: dict[str, Tensor] = {}

    def keep(pipeline: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        # taken here because a pipeline's "latent" output may be no longer normalised, and rounded once more in bf16
        last.update(tensors)
        if on_step is not None:
            on_step(step)
        return {}

    images = pipeline(callback_on_step_end=keep, **arguments).images
    return images, last["latents"].float()


def scheduler_shift(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int = 64**2) -> float:
    """The timestep shift that a scheduler is configured for; of a dynamic one, that of an image of `tokens` tokens."""
    c = scheduler.config
    if not c.use_dynamic_shifting:
        return float(c.shift)
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    return math.exp(mu) if c.time_shift_type == "exponential" else mu


def autocast(tokens: Tensor, cond: Cond) -> torch.autocast:
    """Around a network call, in the precision of the text embeddings. Not a cast: tau stays float32 (near 1, bf16 has
    steps of 0.004), and the trained end layers may be float32."""
    width = cond.embeds.dtype
    return torch.autocast(tokens.device.type, dtype=width, enabled=width in (torch.bfloat16, torch.float16))


class OneEncoderPipeline(PixelPipelineMixin):
    """The pixel pipeline of a family with one text encoder, to be mixed into its stock pipeline.

    default_guidance: the distilled value of networks that embed one, None if the family has no such.
    """

    _optional_components: list[str] = []
    default_guidance: float | None = None

    def __init__(
        self, scheduler: UniPCMultistepScheduler, text_encoder: Any, tokenizer: Any, transformer: ModelMixin,
        subspace: ModelMixin, codec: ModelMixin, shift: float = 17.0, shift_mode: str = "sqrt",
        base_pixels: int = 1024**2, max_pixels: int = 2048**2, max_shift: float = 34.0, default_size: int = 1024,
        max_sequence_length: int = 512, distilled_guidance: float | None = None,
    ):  # fmt: skip
        # without a value a network with embedded guidance would silently skip it
        guided = transformer is not None and transformer.config.get("guidance_embeds", False)
        self.set_up(
            {"scheduler": scheduler, "text_encoder": text_encoder, "tokenizer": tokenizer, "transformer": transformer,
             "subspace": subspace, "codec": codec},
            shift=shift, shift_mode=shift_mode, base_pixels=base_pixels, max_pixels=max_pixels, max_shift=max_shift,
            default_size=default_size, max_sequence_length=max_sequence_length,
            distilled_guidance=self.default_guidance if distilled_guidance is None and guided else distilled_guidance,
        )  # fmt: skip


@contextmanager
def exact_time(embedder: nn.Module, time: Tensor) -> Iterator[None]:
    """Inside, a network's time embedder is given `time` (B,), whatever the network's forward made of it: some round it
    to the precision of their activations, which in bf16 is a step of 4 between 512 and 1024."""
    hook = embedder.register_forward_pre_hook(lambda module, arguments: (time, *arguments[1:]))
    try:
        yield
    finally:
        hook.remove()


def build_lifted(transformer: ModelMixin, changes: dict[str, Any], state: dict[str, Tensor]) -> ModelMixin:
    """The same diffusers class with some config fields changed, holding `state` without a copy."""
    config = {key: value for key, value in transformer.config.items() if key != "_use_default_values"}
    with init_empty_weights():  # with that key, diffusers would put defaults in the place of our changes
        lifted = type(transformer).from_config(config | changes)
    lifted.load_state_dict(state, assign=True)
    return lifted.eval()


def compile_blocks(transformer: ModelMixin) -> None:
    """torch.compile the repeated blocks, at their first call; also where diffusers names none, as for SD3."""
    if not transformer._repeated_blocks:
        transformer._repeated_blocks = transformer._no_split_modules
    transformer.compile_repeated_blocks()


def inner(transformer: nn.Module, kind: type[ModelMixin]) -> ModelMixin:
    """The diffusers model inside what DDP, DeepSpeed or torch.compile made of it."""
    return next(module for module in transformer.modules() if isinstance(module, kind))


def refuse_references(references: Sequence[tuple[Tensor, Grid]]) -> None:
    """For a family without condition images.

    Raises:
        ValueError: there are some.
    """
    if references:
        raise ValueError(
            "this base takes no condition images: leave out `image` when drawing and data.condition_column when "
            "training, or use a base that takes them, such as black-forest-labs/FLUX.2-klein-base-4B"
        )


def join_pooled(pooled: Tensor, rows: Tensor) -> Tensor:
    """A pooled embedding (B, P), P <= E, filled up with zeros, in front of text embeddings (B, L, E)."""
    first = rows.new_zeros(len(rows), 1, rows.shape[2])
    first[:, 0, : pooled.shape[1]] = pooled
    return torch.cat([first, rows], dim=1)


def split_pooled(embeds: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of `join_pooled`: (B, P) and (B, L, E), for the width P of the pooled embedding."""
    return embeds[:, 0, :width], embeds[:, 1:]
