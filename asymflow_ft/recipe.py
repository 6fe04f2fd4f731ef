"""Recipes: YAML -> frozen dataclasses. Every key is listed here; an unknown one is an error with a suggestion.

docs/recipes.md describes each key for users. Values can be overridden on the command line as `section.key=value`.
"""

import difflib
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


@dataclass(frozen=True)
class Data:
    """Images with captions. `source`: an image folder (metadata.jsonl, metadata.csv or one .txt beside each image),
    or a Hub dataset. Images are resized to about `resolution`**2 pixels in multiples of the patch."""

    source: str
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    resolution: int = 1024
    held_out: int = 16  # last images, never trained on; the held-out error is measured on them


@dataclass(frozen=True)
class Text:
    """Text embeddings are computed once, before the transformer is loaded. `max_length`: tokens per prompt."""

    max_length: int = 512


@dataclass(frozen=True)
class Align:
    """`path`: the aligned subspace (folder or official file). `mode` "require" stops without it, "auto" makes it."""

    path: str
    mode: Literal["require", "auto"] = "require"
    num_images: int = 1000


@dataclass(frozen=True)
class Pixels:
    """Pixel representation that the model learns: normalised Oklab, or RGB."""

    space: Literal["oklab", "rgb"] = "oklab"
    mean: tuple[float, ...] = (0.56, 0.0, 0.01)
    std: float = 0.16


@dataclass(frozen=True)
class Lora:
    """Adapters on the family's target modules; the end layers are trained in full beside them."""

    rank: int = 256
    dropout: float = 0.05


@dataclass(frozen=True)
class Noise:
    """Training noise levels: logit-normal, then a timestep shift. `shift` null: scale x the base's native shift."""

    shift: float | None = None
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Loss:
    """Weights of the two terms. `kappa` null turns the fade off; `perceptual` "none" trains on the first alone."""

    mse: float = 5.0
    perceptual: Literal["lpips", "none"] = "lpips"
    perceptual_weight: float = 1.0
    kappa: float | None = 0.3
    sigma_floor: float = 0.05


@dataclass(frozen=True)
class Train:
    """The optimizer's run. `batch_size` is per process and micro-batch; the effective batch is batch_size x
    accumulation x processes."""

    steps: int = 15000
    batch_size: int = 1
    accumulation: int = 1
    lr: float = 1e-4
    lr_output: float = 1e-3  # proj_out, which starts from a rank-R matrix
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    warmup: int = 100
    clip_norm: float = 200.0
    clip_after: int = 100
    caption_dropout: float = 0.0
    precision: Literal["bf16", "no"] = "bf16"
    gradient_checkpointing: bool = True
    ema_gamma: float = 7.0  # Karras power-function EMA; mean age of the average is about 11 % of training
    ema_start: int = 100
    checkpoint_every: int = 500
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class Sample:
    """Validation grids and the saved pipeline's defaults. `prompts`: a text file, one prompt a line. `every`: steps
    between grids (0: only before and after training). `shift` null: as `noise.shift`."""

    prompts: str
    every: int = 500
    count: int = 8
    steps: int = 38
    guidance: float = 4.0
    orthogonal: float = 1.0
    clamp: bool = True
    shift: float | None = None
    shift_mode: Literal["sqrt", "exp", "static"] = "sqrt"
    judge: int = 0  # prompts of the retrieval measurement, which needs captions that name images of the data set


@dataclass(frozen=True)
class Recipe:
    """One conversion, from base to pipeline. `lora` null: train all weights, beside one frozen reference."""

    base: str
    output_dir: str
    data: Data
    align: Align
    sample: Sample
    revision: str | None = None
    seed: int = 0
    text: Text = field(default_factory=Text)
    pixels: Pixels = field(default_factory=Pixels)
    lora: Lora | None = field(default_factory=Lora)
    noise: Noise = field(default_factory=Noise)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)


def load_recipe(file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Raises:
        ValueError: no such file, not YAML, an unknown key, a missing key, or a value of the wrong type.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}; the shipped ones are in recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; a recipe is a YAML mapping")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form key=value, such as train.steps=1000")
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ValueError(f"override {override!r}: {parent} is {section!r} in the recipe, not a section")
        section[last] = yaml.safe_load(value)
    recipe = _build(Recipe, values, "")
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Refuse values that cannot work together.

    Raises:
        ValueError: names the key, its value, and what it may be.
    """
    positive = {
        "data.resolution": recipe.data.resolution,
        "train.steps": recipe.train.steps,
        "train.batch_size": recipe.train.batch_size,
        "train.accumulation": recipe.train.accumulation,
        "train.lr": recipe.train.lr,
        "train.checkpoint_every": recipe.train.checkpoint_every,
        "train.keep_checkpoints": recipe.train.keep_checkpoints,
        "train.clip_norm": recipe.train.clip_norm,
        "align.num_images": recipe.align.num_images,
        "sample.steps": recipe.sample.steps,
        "sample.count": recipe.sample.count,
        "pixels.std": recipe.pixels.std,
        "noise.shift": 1.0 if recipe.noise.shift is None else recipe.noise.shift,
        "lora.rank": 1 if recipe.lora is None else recipe.lora.rank,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"{key} is {value}; it must be positive")
    if not 0 <= recipe.train.caption_dropout < 1:
        raise ValueError(f"train.caption_dropout is {recipe.train.caption_dropout}; it must be in [0, 1)")
    if recipe.data.held_out < 0:
        raise ValueError(f"data.held_out is {recipe.data.held_out}; it must be 0 or more images")


def save_recipe(recipe: Recipe, file: str | Path, header: str = "") -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    text = yaml.safe_dump(plain(recipe), sort_keys=False)
    Path(file).write_text("".join(f"# {line}\n" for line in header.splitlines()) + text, encoding="utf-8")


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts and lists."""
    return {key: _listed(value) for key, value in asdict(recipe).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _build(kind: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} is {values!r}; it must be a section of keys")
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown recipe key {prefix}{key}; {hint}")
    hints = get_type_hints(kind)
    given = {key: _coerce(hints[key], value, f"{prefix}{key}") for key, value in values.items()}
    try:
        return kind(**given)
    except TypeError as error:
        missing = [n for n in known if n not in given and f"'{n}'" in str(error)]
        raise ValueError(f"the recipe lacks {', '.join(prefix + n for n in missing)}") from error


def _coerce(kind: Any, value: Any, key: str) -> Any:
    if get_origin(kind) in (types.UnionType, Union):
        inner = [option for option in get_args(kind) if option is not type(None)]
        return None if value is None else _coerce(inner[0], value, key)
    if is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, f"{key}.")
    if get_origin(kind) is Literal:
        if value is False and "no" in get_args(kind):
            value = "no"  # YAML reads a bare `no` as false
        if value in get_args(kind):
            return value
        raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(map(repr, get_args(kind)))}")
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(get_args(kind)[0], item, key) for item in value)
        raise ValueError(f"{key} is {value!r}; it must be a list, such as [0.9, 0.95]")
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4, without a dot, as text
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise ValueError(f"{key} is {value!r}; it must be {names[kind]}")
