"""asymflow_ft.json: where a converted model comes from, beside its weights. Cards and conversions are made from it."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = "asymflow_ft.json"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "asymflow-ft")
# Every key that is written (docs/formats.md); None where a source does not tell, as the official release.
UNKNOWN: Mapping[str, Any] = dict.fromkeys((
    "form", "family", "pipeline_class", "base", "revision", "licence", "init_from", "dtype", "weights", "step",
    "settings", "pixels", "recipe", "data", "alignment", "metrics", "versions",
))  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    return {package: version(package) for package in PACKAGES}


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """The provenance of an exported folder, with None for what is not known.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    file = Path(folder) / FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not an export: it has no {FILE}; make one with `asymflow-ft export`") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} does not hold a JSON object; export again")
    return {**UNKNOWN, **found}


def write_provenance(folder: str | Path, provenance: Mapping[str, Any]) -> None:
    file = Path(folder) / FILE
    file.write_text(json.dumps({**UNKNOWN, **provenance}, indent=2, default=str) + "\n", encoding="utf-8")


def without_folders(value: Any) -> Any:
    """The same with absolute paths cut to their last name: where files lie is nobody's business on the Hub."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
