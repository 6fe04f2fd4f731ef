"""Every recorded output of the official code against ours, within the tolerances of the data's README.md.

Its sections are the cases here, by number. All sizes, seeds and settings come from the files, so `pytest tests/parity
--golden DIR` checks any other folder of the same format. Nothing is skipped: a missing file or tensor fails the test
that reads it.
"""

import json
import math
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from asymflow_ft.components.subspace import Cond, Grid, PixelModel, PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.method.patches import to_image, to_tokens

TRAINING_SIGMA_MIN = 1e-6
STATIC_SHIFT = 17.0


def close(
    got: Tensor, expected: Tensor, name: str, *, abs: float = 0.0, rel: float | None = None, per_sample: bool = False
) -> None:
    """Same shape, finite, and max |got - expected| within `abs`, or within `rel` of the largest expected entry.

    Args:
        per_sample: take both maxima of `rel` separately for each leading index; the worst one counts.
    """
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(got).all() and torch.isfinite(expected).all(), f"{name}: not all values are finite"
    rows = len(expected) if per_sample else 1
    got, expected = (t.detach().double().reshape(rows, -1) for t in (got, expected))
    error, size = (got - expected).abs().amax(1), expected.abs().amax(1)
    kind, tolerance = ("abs", abs) if rel is None else ("rel", rel)
    # some expected tensors are all zero, and then only zero will do
    worst = (error if rel is None else error / size.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
    assert worst <= tolerance, f"{name}: {kind} error {worst:.3g}, tolerance {tolerance:g}"


def read(golden: Path, name: str) -> dict[str, Tensor]:
    return load_file(golden / f"{name}.safetensors")


def read_config(golden: Path, name: str) -> dict[str, object]:
    """A JSON configuration without the one entry that may differ."""
    config = json.loads((golden / name).read_text())
    config.pop("_diffusers_version", None)
    return config


def patch_side(features: int, channels: int) -> int:
    return math.isqrt(features // channels)


def grid_of(image: Tensor, patch: int) -> Grid:
    return image.shape[-2] // patch, image.shape[-1] // patch


def load_base(golden: Path) -> Flux2Transformer2DModel:
    base = Flux2Transformer2DModel.from_config(json.loads((golden / "transformer_base_config.json").read_text()))
    base.load_state_dict(read(golden, "transformer_base"), strict=True)
    return base.eval()


def load_subspace(golden: Path) -> PixelSubspace:
    fit = read(golden, "procrustes")
    return PixelSubspace.from_fit(fit["A"], fit["s"])


def load_lifted(golden: Path) -> PixelModel:
    subspace = load_subspace(golden)
    return PixelModel(flux2.lift(load_base(golden), subspace), subspace, flux2.predict)


def load_student(golden: Path) -> PixelModel:
    model, overrides = load_lifted(golden), read(golden, "student_overrides")
    state = model.transformer.state_dict()
    assert overrides.keys() <= state.keys()
    model.transformer.load_state_dict(state | overrides, assign=True)
    return model


def image_velocity(
    model: PixelModel, x_t: Tensor, sigma: Tensor, cond: Cond, sigma_min: float = TRAINING_SIGMA_MIN
) -> Tensor:
    patch = model.subspace.config["patch"]
    grid = grid_of(x_t, patch)
    return to_image(model.velocity(to_tokens(x_t, patch), level(sigma), cond, grid, sigma_min), grid, patch)


def level(sigma: Tensor) -> Tensor:
    return sigma[:, None, None]
