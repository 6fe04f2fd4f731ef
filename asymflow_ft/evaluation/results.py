"""What an evaluation found: the content of results.json."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

VERSION = 1


@dataclass(frozen=True)
class Model:
    """One that was drawn with. `size` of its pictures in pixels, (width, height); seconds per picture are the median
    and the quartiles; `memory_gb` is the peak while drawing, of the GPU if there was one and else of the process."""

    name: str
    path: str
    kind: Literal["pixel", "latent"]
    size: tuple[int, int]
    parameters: int
    pictures: int
    seconds: tuple[float, float, float]  # lower quartile, median, upper quartile
    memory_gb: float


@dataclass(frozen=True)
class Metric:
    """A column of the report. `better` "closer": to the real pictures' own value. `note`: its bias, and with what it
    can be compared."""

    key: str
    title: str
    better: Literal["higher", "lower", "closer"]
    what: str
    note: str = ""


@dataclass(frozen=True)
class Value:
    """A metric of a model ("real" for the real pictures themselves) with its 95 % interval, over all prompts or those
    of one category. `count`: pictures that it was computed from."""

    metric: str
    model: str
    value: float
    low: float
    high: float
    count: int
    category: str | None = None


@dataclass(frozen=True)
class Difference:
    """`value` = the first model's minus the other's, on the same prompts and noise, with its paired 95 % interval; of
    distances to the real pictures' value where that is the aim ("closer"). `verdict`: of the first model."""

    metric: str
    model: str
    against: str
    value: float
    low: float
    high: float
    verdict: Literal["better", "worse", "no difference seen"]
    category: str | None = None


@dataclass(frozen=True)
class Results:
    """One evaluation. The first of `models` is the one that was asked about; the others are what it is held against.

    prompts: {"id", "text", "category"} of each. spectra: {"frequency": cycles per pixel, name: power density} with
    "real" if there are real pictures. benchmarks: {name: {model: {score or category: value}}} of official scorers.
    settings: everything that the pictures depend on. compared_at: (width, height) at which metrics see pictures.
    """

    suite: str
    models: list[Model]
    prompts: list[dict[str, Any]]
    per_prompt: int
    compared_at: tuple[int, int]
    metrics: list[Metric]
    values: list[Value]
    differences: list[Difference]
    spectra: dict[str, list[float]]
    settings: dict[str, Any]
    versions: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    benchmarks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def value(self, metric: str, model: str, category: str | None = None) -> Value | None:
        found = (v for v in self.values if (v.metric, v.model, v.category) == (metric, model, category))
        return next(found, None)


def save_results(results: Results, file: Path) -> None:
    text = json.dumps({"version": VERSION, **asdict(results)}, indent=2, ensure_ascii=False)
    part = file.with_name(file.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)


def load_results(file: Path) -> Results:
    """Read results.json back; equal to what was saved.

    Raises:
        ValueError: no such file, or one that another version or program wrote.
    """
    if not file.is_file():
        raise ValueError(f"there is no {file}; `asymflow-ft evaluate` writes it")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            raise ValueError(f"{file} was written by another version; run the evaluation again")
        values["compared_at"] = tuple(values["compared_at"])
        return Results(**values | {
            "models": [Model(**_tuples(m, "size", "seconds")) for m in values["models"]],
            "metrics": [Metric(**m) for m in values["metrics"]],
            "values": [Value(**v) for v in values["values"]],
            "differences": [Difference(**d) for d in values["differences"]],
        })  # fmt: skip
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no results.json of `asymflow-ft evaluate` ({error})") from error


def _tuples(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: tuple(value) if key in keys else value for key, value in values.items()}
