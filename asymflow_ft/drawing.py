"""Models to compare, and their pictures. Picture k of a prompt is drawn from noise that depends on the seed, the
prompt's text and k alone: a latent base gets the projection of the noise that a pixel model gets."""

import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from asymflow_ft.components.memory import free_memory, memory_is_full
from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.data.cache import content_key
from asymflow_ft.export import is_run, load_pixel_pipeline, open_source, subspace_key
from asymflow_ft.families import family_of
from asymflow_ft.families.base import NoIndexError, component_id, load_index, vae_on_meta
from asymflow_ft.hub.cards import hub_commit
from asymflow_ft.hub.forms import Converted, fetch_converted
from asymflow_ft.training.checkpoint import newest_whole
from asymflow_ft.training.encode import encode_texts, load_text_parts
from asymflow_ft.training.run import peak_memory_gb, reset_peak_memory, synchronise
from asymflow_ft.training.validation import base_noise, prompt_noise

PROMPTS_AT_ONCE = 512  # embeddings held in memory: 8 to 13 MB each for a large base
RESERVED = ("real", "reference", "frequency")  # what stands beside models in results and report
MAX_LENGTH = 512  # text tokens of a latent pipeline that is compared with no pixel model
Batch = Callable[[Tensor, Tensor], tuple[list[Image.Image], list[bool]]]  # (noise, embeddings) -> pictures, finite


@dataclass(frozen=True)
class Model:
    """One to draw with, not loaded.

    given: as the user named it. source, revision: what is loaded, of a run its newest checkpoint. content: a hash that
    changes with the weights. rank, patch: of a token. size: side of its pictures in pixels. max_length: text tokens.
    subspace: of a pixel model its own; of a latent one that which the noise is projected on, or None.
    """

    name: str
    given: str
    kind: Literal["pixel", "latent"]
    family: ModuleType
    source: str
    revision: str | None
    content: str
    rank: int
    patch: int
    size: int
    max_length: int
    subspace: PixelSubspace | None

    def settings(self) -> dict[str, object]:
        """What its pictures depend on beside `Drawing`."""
        noise = "own" if self.subspace is None else subspace_key(self.subspace)
        return {"kind": self.kind, "weights": self.content, "size": self.size, "max_length": self.max_length,
                "noise": noise}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """How all models draw. guidance, shift: None is each pipeline's own; shift is for pixel models."""

    steps: int = 38
    guidance: float | None = None
    negative: str = ""
    shift: float | None = None
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.seed < 2**62:
            raise ValueError(f"--steps {self.steps} must be positive and --seed {self.seed} lie between 0 and 2**62")
        if self.shift is not None and not self.shift > 0:
            raise ValueError(f"--shift {self.shift} must be positive")


class Wanted(NamedTuple):
    """A picture to draw: the prompt's text, which of its pictures, from 0, and where it will lie."""

    text: str
    number: int
    file: Path


@dataclass(frozen=True)
class Drawn:
    """A batch of pictures. finite: which hold no NaN or infinity. seconds: per picture. first: the first batch after
    loading, which takes longer. memory_gb: the peak so far."""

    wanted: Sequence[Wanted]
    pictures: list[Image.Image]
    finite: list[bool]
    seconds: float
    first: bool
    memory_gb: float
    parameters: int


def name_models(given: Sequence[str]) -> list[tuple[str, str]]:
    """(name, model) of each [NAME=]MODEL; without a name it is that of the folder or repository.

    Raises:
        ValueError: a name that is given twice, or that no file may have.
    """
    taken, named = {*RESERVED}, []
    for one in given:
        name, model = one.split("=", 1) if "=" in one and not Path(one).exists() else ("", one)
        if name and (not re.fullmatch(r"\w[\w .-]{0,63}", name) or name.casefold() in taken):
            raise ValueError(
                f"{one}: the name {name!r} cannot be used; names are letters, digits, spaces, dots and dashes, "
                f"different from each other (in more than case) and from {', '.join(RESERVED)}"
            )
        plain = name or _plain_name(model)
        numbered = itertools.chain([plain], (f"{plain}-{i}" for i in itertools.count(2)))
        name = next(free for free in numbered if free.casefold() not in taken)
        taken.add(name.casefold())
        named.append((name, model))
    return named


def _plain_name(model: str) -> str:
    path = Path(model).resolve()
    while path.name == "pipeline" or path.is_file():
        path = path.parent
    return re.sub(r"[^\w.-]+", "-", path.name).strip("-.") or "model"


def open_models(named: Sequence[tuple[str, str]], size: int | None) -> tuple[list[Model], list[str]]:
    """The models, without their weights on a device.

    Args:
        size: side of all pictures in pixels; None: each pixel model's own, which latent ones take over from the first.

    Returns:
        The models, and warnings about their noise.

    Raises:
        ValueError: one cannot be opened, or cannot draw at the size.
    """
    models = [_open_latent(*one) if _is_latent(one[1]) else _open_pixel(*one) for one in named]
    pixel = next((model for model in models if model.kind == "pixel"), None)
    warnings: list[str] = []
    if pixel is None and size is None:
        raise ValueError("only latent pipelines are given, which have no size of their own here; give --size")
    for i, model in enumerate(models):
        if model.kind == "latent" and pixel is not None:
            fits = (model.rank, model.patch) == (pixel.rank, pixel.patch)
            models[i] = model = replace(
                model, size=pixel.size, max_length=pixel.max_length, subspace=pixel.subspace if fits else None
            )
            if not fits:
                warnings.append(
                    f"{model.name} draws from noise of its own, for its {model.rank} values per {model.patch}x"
                    f"{model.patch} pixels do not fit the subspace of {pixel.name} ({pixel.rank} per {pixel.patch}x"
                    f"{pixel.patch}): its pictures of a prompt show other scenes"
                )
        side = model.size if size is None else size
        if side < 1 or side % model.patch:
            near = max(round(side / model.patch), 1) * model.patch
            raise ValueError(f"{model.name} cannot draw {side}x{side}: --size must be a multiple of {model.patch}, "
                             f"such as {near}")  # fmt: skip
        models[i] = replace(model, size=side)
    return models, warnings


def _is_latent(given: str) -> bool:
    """Whether it is a stock pipeline; what else it is, is found when it is opened."""
    if is_run(given) or Path(given).is_file():
        return False
    try:
        return "subspace" not in load_index(given)
    except NoIndexError:
        return False


def _open_latent(name: str, given: str) -> Model:
    family, revision = family_of(given), hub_commit(given)
    family.load_parts(given, (), torch.float32, revision)  # raises for a distilled one
    vae = vae_on_meta(given, revision)
    content = content_key(
        *(component_id(given, revision, part) for part in ("transformer", "vae", *family.TEXT_PARTS))
    )
    return Model(name, given, "latent", family, given, revision, content, family.latent_dim(vae),
                 family.pixel_patch(vae), 0, MAX_LENGTH, None)  # fmt: skip


def _open_pixel(name: str, given: str) -> Model:
    source = given
    if not is_run(given):
        source = str(fetch_converted(given))
    elif (Path(given) / "recipe.yaml").is_file():  # training may go on meanwhile and replace its newest
        newest, _ = newest_whole(Path(given) / "checkpoints")
        source = given if newest is None else str(newest)
    opened = open_source(source)
    settings = opened.provenance["settings"] or {}
    config = opened.subspace.config
    return Model(
        name, given, "pixel", opened.family, source, None, _content(Path(source), opened), config["rank"],
        config["patch"], settings.get("default_size", 1024), settings.get("max_sequence_length", 512), opened.subspace,
    )  # fmt: skip


def _content(path: Path, opened: Converted) -> str:
    """A hash of what the pictures of a converted model depend on: weights by size and time of their files."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    stats = [(file.relative_to(path), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    base = opened.provenance["base"], opened.provenance["revision"]
    behind = component_id(*base, "transformer") if opened.folder is None else ""
    return content_key(
        stats, behind, subspace_key(opened.subspace), dict(opened.codec.config), opened.provenance["settings"]
    )


def picture_seed(seed: int, text: str, number: int) -> int:
    """The seed of one picture's noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{number}\0{text}".encode()).digest()[:8], "big") // 4


def noise_of(model: Model, seed: int, wanted: Sequence[Wanted]) -> Tensor:
    """Noise of pictures, (B, 3, H, W) for a pixel model, (B, R, rows, columns) for a latent one."""
    seeds = [picture_seed(seed, one.text, one.number) for one in wanted]
    if model.subspace is None:
        side = model.size // model.patch
        made = [torch.randn(model.rank, side, side, generator=torch.Generator().manual_seed(one)) for one in seeds]
        return torch.stack(made)
    pixels = torch.cat([prompt_noise(1, (model.size, model.size), one) for one in seeds])
    return pixels if model.kind == "pixel" else base_noise(pixels, model.subspace)


@torch.no_grad()
def draw(
    model: Model, how: Drawing, wanted: Sequence[Wanted], batch_size: int, device: torch.device, show: bool = True
) -> Iterator[Drawn]:  # fmt: skip
    """Draw pictures, batch by batch. The text encoder is gone before the transformer comes to the device.

    Raises:
        ValueError: the model cannot be loaded, or a batch needs more memory than there is.
    """
    texts = list(dict.fromkeys(one.text for one in wanted))
    for start in range(0, len(texts), PROMPTS_AT_ONCE):
        some = dict.fromkeys(texts[start : start + PROMPTS_AT_ONCE])
        load = _load_pixel if model.kind == "pixel" else _load_latent
        embeds, run, parameters = load(model, how, [how.negative, *some], device, show)
        mine = [one for one in wanted if one.text in some]
        reset_peak_memory(device)
        for i in range(0, len(mine), batch_size):
            batch = mine[i : i + batch_size]
            noise = noise_of(model, how.seed, batch)
            text = pad_sequence([embeds[one.text] for one in batch], batch_first=True)
            synchronise(device)
            began = time.perf_counter()
            try:
                pictures, finite = run(noise.to(device), text.to(device))
            except RuntimeError as error:
                if not memory_is_full(error):
                    raise
                raise ValueError(
                    f"out of memory with {len(batch)} pictures of {model.size}x{model.size} of {model.name} at once; "
                    "run the same command with a smaller --batch-size, which changes nothing else"
                ) from error
            synchronise(device)
            seconds = (time.perf_counter() - began) / len(batch)
            yield Drawn(batch, pictures, finite, seconds, i == 0, peak_memory_gb(device), parameters)
        del run
        free_memory()


def _load_pixel(
    model: Model, how: Drawing, texts: Sequence[str], device: torch.device, show: bool
) -> tuple[dict[str, Tensor], Batch, int]:
    pipeline = load_pixel_pipeline(model.source, getattr(torch, how.dtype))
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    pipeline.register_modules(transformer=None)
    embeds = _encode(model, pipeline.to(device), texts, show)
    pipeline.register_modules(transformer=transformer, **dict.fromkeys(model.family.TEXT_PARTS))
    free_memory()
    pipeline.to(device)
    negative = embeds[how.negative].to(device)

    codec, finite = pipeline.codec, []

    def watched(work: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def watching(pixels: Tensor) -> Tensor:
            finite.append(pixels.isfinite().flatten(1).all(dim=1))
            return work(pixels)

        return watching

    # the pipeline clamps every step's estimate, which makes black of what is not finite
    codec.decode, codec.clamp = watched(codec.decode), watched(codec.clamp)

    def run(noise: Tensor, text: Tensor) -> tuple[list[Image.Image], list[bool]]:
        finite.clear()
        pictures = pipeline(
            prompt_embeds=text, negative_prompt_embeds=negative.expand(len(text), -1, -1), latents=noise,
            height=model.size, width=model.size, num_inference_steps=how.steps, guidance_scale=how.guidance,
            shift=how.shift,
        ).images  # fmt: skip
        return pictures, torch.stack(finite).all(dim=0).tolist()

    return embeds, run, sum(p.numel() for p in transformer.parameters())


def _load_latent(
    model: Model, how: Drawing, texts: Sequence[str], device: torch.device, show: bool
) -> tuple[dict[str, Tensor], Batch, int]:
    family, dtype = model.family, getattr(torch, how.dtype)
    parts = load_text_parts(family, model.source, model.revision, dtype, device)
    embeds = _encode(model, parts, texts, show)
    del parts
    free_memory()
    stock = family.load_parts(model.source, ("vae", "transformer", "scheduler"), dtype, model.revision).to(device)
    stock.set_progress_bar_config(disable=True)
    negative = embeds[how.negative].to(device)

    def run(noise: Tensor, text: Tensor) -> tuple[list[Image.Image], list[bool]]:
        size = (model.size, model.size)
        pictures, latents = family.draw_base(stock, noise, text, negative, size, how.steps, how.guidance)
        return pictures, latents.isfinite().flatten(1).all(dim=1).tolist()

    return embeds, run, sum(p.numel() for p in stock.transformer.parameters())


def _encode(model: Model, parts: DiffusionPipeline, texts: Sequence[str], show: bool) -> dict[str, Tensor]:
    """Embeddings (L, E) by text, in the host's memory."""
    texts = list(dict.fromkeys(texts))
    encoded = encode_texts(model.family, parts, texts, model.max_length)
    bar = tqdm(encoded, f"prompts for {model.name}", len(texts), disable=not show, mininterval=1, leave=False)
    return {text: value.cpu() for text, value in zip(texts, bar, strict=True)}
