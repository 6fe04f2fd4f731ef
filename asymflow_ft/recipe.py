"""Recipes: YAML -> the frozen dataclasses of recipe_keys.py. An unknown key is an error with a suggestion.

Values can be overridden on the command line as `section.key=value`.
"""

import difflib
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from asymflow_ft.recipe_keys import Data, Part, Recipe, Train

__all__ = ["Data", "Part", "Recipe", "Train", "flat", "load_recipe", "override", "plain", "save_recipe"]


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
    return _with_overrides(values, overrides)


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key=value` overrides, as on the command line.

    Raises:
        ValueError: as `load_recipe`.
    """
    return _with_overrides(plain(recipe), overrides)


def _with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
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
        try:
            section[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: {value!r} is not a YAML value ({error})") from error
    recipe = _build(Recipe, values, "")
    check(recipe)
    return recipe


POSITIVE = (
    "data.resolution", "data.more_resolutions", "data.condition_resolution", "text.max_length", "align.num_images",
    "pixels.std", "lora.rank", "noise.shift", "noise.std", "loss.sigma_floor", "train.steps", "train.batch_size",
    "train.accumulation", "train.lr", "train.clip_norm", "train.ema_gamma", "train.max_bad_steps",
    "train.checkpoint_every", "train.keep_checkpoints", "sample.steps", "sample.count", "sample.shift",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "data.held_out", "data.workers", "data.max_unreadable", "loss.mse", "loss.perceptual_weight", "loss.kappa",
    "train.lr_ends", "train.lr_output", "train.weight_decay", "train.warmup", "train.clip_after", "train.ema_start",
    "sample.every", "sample.judge",
)  # fmt: skip
BELOW_ONE = ("train.caption_dropout", "train.betas", "lora.dropout")


def check(recipe: Recipe) -> None:
    """Refuse values that cannot work, alone or together.

    Raises:
        ValueError: names the key, its value, and what it may be.
    """
    values = flat(recipe)
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (POSITIVE, lambda value: value > 0, "positive"),
        (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (BELOW_ONE, lambda value: 0 <= value < 1, "in [0, 1)"),
    )
    for keys, holds, what in rules:
        for key in keys:
            value = values.get(key)  # keys of a section that is null are not there
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            if not all(map(holds, numbers)):
                raise ValueError(f"{key} is {value}; it must be {what}")
    for key, count in (("train.betas", 2), ("pixels.mean", 3)):
        if len(values[key]) != count:
            raise ValueError(f"{key} is {values[key]}; it must have {count} numbers")
    recipe.data.parts()
    every, lasting = recipe.train.checkpoint_every, recipe.train.keep_every
    if lasting is not None and (lasting <= 0 or lasting % every):
        raise ValueError(
            f"train.keep_every is {lasting}; checkpoints are made every {every} steps (train.checkpoint_every), "
            "so it must be a multiple of that"
        )
    if (recipe.align.path is None) == (recipe.init_from is None):
        given = "both given" if recipe.init_from else "missing, both"
        raise ValueError(
            f"align.path and init_from are {given}: a conversion starts from the aligned subspace in align.path, and "
            "init_from is a converted model that brings its own; keep one of them"
        )
    if recipe.is_style and recipe.init_from is None:
        raise ValueError(
            "lora.ends is false, but without init_from the end layers are those of a lifted base, which cannot draw "
            "what its latents do not carry; set init_from to a converted model, or lora.ends=true"
        )
    if recipe.is_style and recipe.loss.variance_reduction:
        raise ValueError(
            "lora.ends is false, so this is a style LoRA on a converted model, whose training has no latent base as "
            "a reference; set loss.variance_reduction=false and loss.perceptual=none"
        )
    if recipe.loss.perceptual not in ("lpips", "none") and ":" not in recipe.loss.perceptual:
        raise ValueError(f"loss.perceptual is {recipe.loss.perceptual!r}; it must be lpips, none, or file.py:function")
    if not recipe.loss.variance_reduction and recipe.loss.perceptual != "none":
        raise ValueError(
            f"loss.perceptual is {recipe.loss.perceptual!r}, whose weight comes from the variance reduction, and "
            "loss.variance_reduction is false; set loss.perceptual=none"
        )
    if recipe.train.compile and recipe.train.gradient_checkpointing == "selective":
        raise ValueError(
            "train.gradient_checkpointing is 'selective', which chooses among a block's operators, and train.compile "
            "hides them, so all would be computed again; set train.gradient_checkpointing=true or train.compile=false"
        )
    if recipe.lora is None and recipe.train.base_weights != "full":
        raise ValueError(
            f"train.base_weights is {recipe.train.base_weights!r}, but lora is null and all weights are trained; "
            "quantised weights cannot be. Set train.base_weights=full, or train adapters with lora={rank: 256}"
        )


def save_recipe(recipe: Recipe, file: str | Path, header: str = "") -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    text = yaml.safe_dump(plain(recipe), sort_keys=False)
    Path(file).write_text("".join(f"# {line}\n" for line in header.splitlines()) + text, encoding="utf-8")


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts and lists."""
    return {key: _listed(value) for key, value in asdict(recipe).items()}


def flat(recipe: Recipe) -> dict[str, Any]:
    """Values by dotted key, such as "train.lr"; a section that is null is one key."""
    found: dict[str, Any] = {}
    for key, value in plain(recipe).items():
        found |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, tuple) else value


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
        if any(value == option and type(value) is type(option) for option in get_args(kind)):
            return value
        named = [str(option).lower() if isinstance(option, bool) else repr(option) for option in get_args(kind)]
        raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(named)}")
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value))
        raise ValueError(f"{key} is {value!r}; it must be a list, such as [0.9, 0.95]")
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4, without a dot, as text
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    raise ValueError(f"{key} is {value!r}; it must be {names[kind]}")
