"""One module per family of bases; docs/design.md says what a module provides."""

from types import ModuleType

from diffusers import DiffusionPipeline

from asymflow_ft.families import ernie_image, flux1, flux2, qwen_image, sd3, z_image
from asymflow_ft.families.base import load_index

_MODULES = (flux2, flux1, sd3, qwen_image, z_image, ernie_image)


def family_of(base: str, revision: str | None = None) -> ModuleType:
    """The family module that converts a base, by the pipeline class in its model_index.json.

    Raises:
        ValueError: the base cannot be read, or no family converts its class.
    """
    name = load_index(base, revision).get("_class_name")
    if isinstance(name, list):
        raise ValueError(
            f"{base} brings code of its own ({name[-1]}), as converted models do; here the latent base is needed. "
            "init_from goes on from a converted model"
        )
    for module in _MODULES:
        if name in module.PIPELINES:
            return module
    known = ", ".join(name for module in _MODULES for name in module.PIPELINES)
    raise ValueError(f"{base} is a {name}; asymflow-ft converts {known}")


def family_named(name: str) -> ModuleType:
    """The family module of a provenance.

    Raises:
        ValueError: there is none of that name.
    """
    for module in _MODULES:
        if module.__name__.rpartition(".")[2] == name:
            return module
    raise ValueError(f"the family {name!r} is unknown to this version of asymflow-ft")


def pixel_pipeline_named(name: str) -> type[DiffusionPipeline]:
    """A pixel pipeline's class.

    Raises:
        ValueError: no family has one of that name.
    """
    for module in _MODULES:
        for kind in module.PIXEL_PIPELINES:
            if kind.__name__ == name:
                return kind
    raise ValueError(f"the pipeline class {name!r} is unknown to this version of asymflow-ft")
