"""One module per family of bases; docs/design.md says what a module provides."""

from types import ModuleType

import torch
from diffusers import DiffusionPipeline

from asymflow_ft.families import flux2
from asymflow_ft.families.base import load_index, opening

_MODULES = (flux2,)


def family_of(base: str, revision: str | None = None) -> ModuleType:
    """The family module that converts a base, by the pipeline class in its model_index.json.

    Raises:
        ValueError: the base cannot be read, or no family converts its class.
    """
    name = load_index(base, revision).get("_class_name")
    for module in _MODULES:
        if name in module.PIPELINES:
            return module
    known = ", ".join(name for module in _MODULES for name in module.PIPELINES)
    raise ValueError(f"{base} is a {name}; asymflow-ft converts {known}")


def family_named(name: str) -> ModuleType:
    """The family module of that name, as asymflow_ft.json states it.

    Raises:
        ValueError: there is none.
    """
    for module in _MODULES:
        if module.__name__.rpartition(".")[2] == name:
            return module
    raise ValueError(f"{name} is no family that this version of asymflow-ft knows; a newer version may")


def load_pixel_pipeline(path: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A converted pipeline from a folder or the Hub.

    Raises:
        ValueError: it cannot be read, or is no converted pipeline.
    """
    name = load_index(path).get("_class_name")
    for module in _MODULES:
        for kind in module.PIXEL_PIPELINES:
            if kind.__name__ == name:
                with opening(path):
                    return kind.from_pretrained(path, dtype=dtype)
    raise ValueError(
        f"{path} is a {name}, not a pixel pipeline; convert it first with `asymflow-ft align` and `finetune`"
    )
