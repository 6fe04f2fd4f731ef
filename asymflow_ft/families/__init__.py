"""One module per family of bases; docs/design.md says what a module provides."""

import textwrap
from types import ModuleType

from diffusers import DiffusionPipeline

from asymflow_ft.families import ernie_image, flux1, flux2, flux3, qwen_image, sd3, unsupported, z_image
from asymflow_ft.families.base import NoIndexError, load_index, load_json

_MODULES = (flux2, flux3, flux1, sd3, qwen_image, z_image, ernie_image)
# What tests/families states for every family, by the name of the test.
LAWS = {
    "test_the_family_is_found": "found by its index",
    "test_the_lifted_network_is_the_base_on_the_subspace": "lift exact in float64",
    "test_the_network_can_be_wrapped_and_in_bf16": "wrapped networks",
    "test_the_pixel_model_follows_the_stock_sampler": "trajectory of the stock sampler",
    "test_latents_are_those_that_the_stock_pipeline_decodes": "latents of the stock pipeline",
    "test_guidance_is_counted_alike": "guidance of the stock pipeline",
    "test_guidance_in_one_batch_is_guidance_in_two_calls": "guidance in one batch",
    "test_prompts_are_encoded_as_by_the_stock_pipeline": "prompts of the stock pipeline",
    "test_a_long_prompt_has_as_many_rows_as_are_planned": "rows of an embedding",
    "test_an_embedding_does_not_depend_on_its_batch": "prompts independent of their batch",
    "test_bfloat16_is_near_float32": "bfloat16",
    "test_exactly_the_ends_and_the_adapters_are_trained": "trained names exact",
    "test_gradient_checkpointing_changes_nothing": "gradient checkpointing",
    "test_all_repeated_blocks_are_compiled": "what is compiled",
    "test_compiled_is_eager": "compiled as eager",
    "test_a_lora_of_the_base_loads_on_the_pixel_pipeline": "LoRA of the base",
    "test_the_exported_code_stands_alone": "exported code alone",
    "test_align_finetune_sample_export": "align, finetune, export, sample",
}


def family_of(base: str, revision: str | None = None) -> ModuleType:
    """The family module that converts a base, by the pipeline class in its model_index.json.

    Raises:
        ValueError: the base cannot be read, or no family converts its class; the message says why, if known.
    """
    try:
        index = load_index(base, revision)
    except NoIndexError as no_index:
        try:
            config = load_json(base, "config.json", revision)
        except ValueError:
            raise no_index from no_index.__cause__
        raise ValueError(f"{base} cannot be converted: {unsupported.reason_without_index(config)}") from no_index
    name = index.get("_class_name")
    for module in _MODULES:
        if isinstance(name, str) and name in module.PIPELINES:
            return module
    if why := unsupported.reason(index):
        raise ValueError(f"{base} ({name}) cannot be converted: {why}")
    known = ", ".join(name for module in _MODULES for name in module.PIPELINES)
    raise ValueError(
        f"{base} is a {name}; asymflow-ft converts {known}. Another flow transformer can be added (docs/design.md), "
        "if its latents are close to pixels"
    )


def family_of_transformer(name: str) -> ModuleType:
    """The family whose bases have a transformer of this class.

    Raises:
        ValueError: there is none.
    """
    for module in _MODULES:
        if module.TRANSFORMER.__name__ == name:
            return module
    known = ", ".join(module.TRANSFORMER.__name__ for module in _MODULES)
    raise ValueError(f"a transformer of class {name} cannot be converted; asymflow-ft knows {known}")


def family_named(name: str) -> ModuleType:
    """The family module of a provenance.

    Raises:
        ValueError: there is none of that name.
    """
    for module in _MODULES:
        if name_of(module) == name:
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


def name_of(family: ModuleType) -> str:
    """A family's name, as a provenance holds it."""
    return family.__name__.rpartition(".")[2]


def describe_families(families: tuple[ModuleType, ...] = _MODULES) -> str:
    """A table for a terminal: names, latents, stock classes and known bases with licences; then what is tested."""
    rows = [("family", "latents", "stock pipeline", "well-known base (licence)")]
    for family in families:
        rank, patch = family.GEOMETRY
        bases = [f"{base} ({licence})" for base, licence in family.CHECKPOINTS]
        latents = [f"{3 * patch**2} -> {rank} values", f"per {patch}x{patch} pixels"]
        columns = ([name_of(family)], latents, list(family.PIPELINES), bases)
        height = max(map(len, columns))
        rows += zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    tested = f"Tested for each, on a tiny model of its kind: {'; '.join(LAWS.values())}. Real weights: not run."
    licences = "Licences are what we know of the bases' Hub pages; read them there."
    return "\n".join([table, "", *textwrap.wrap(tested, 119), licences])
