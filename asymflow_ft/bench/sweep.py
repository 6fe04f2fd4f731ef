"""A training step, or its memory, at several resolutions, batches or ranks, and how its cost grows."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from asymflow_ft.bench.architectures import Architecture
from asymflow_ft.bench.growth import fit_growth
from asymflow_ft.bench.limits import Bench, figures_or_error
from asymflow_ft.bench.workload import Options, make_recipe

AGAINST = {"resolution": "tokens", "batch": "samples", "rank": "rank"}  # what growth is seen against


def parse_sweep(text: str) -> tuple[str, list[int]]:
    """Option and ascending values of `resolution=128,192,256`.

    Raises:
        ValueError: another form, an option that cannot be swept, or fewer than two values.
    """
    key, _, listed = text.partition("=")
    if key not in AGAINST:
        near = difflib.get_close_matches(key, AGAINST, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(AGAINST)}, as in resolution=128,192,256"
        raise ValueError(f"--sweep has no {key!r}; {hint}")
    try:
        values = sorted({int(value) for value in listed.split(",")})
    except ValueError:
        raise ValueError(f"--sweep {text}: the values must be integers, as in {key}=1,2,4") from None
    if len(values) < 2:
        raise ValueError(f"--sweep {text}: growth is measured from one value to another, so give two or more")
    return key, values


def total_memory(run: dict[str, Any], kind: str) -> int | None:
    """Bytes of all items of a step's figures; None where one was not measured."""
    items = [item[kind] for item in run["memory"].values()]
    return None if None in items else sum(items)


def bench_sweep(
    bench: Bench, architecture: Architecture, options: Options, device: torch.device, key: str, values: Sequence[int]
) -> dict[str, Any]:
    """The figures of `bench` (a training step, or its memory) with each of `values` for the option `key`, and how they
    grow, for bench.json. A value that there is not enough memory for has no figures, None.

    Raises:
        ValueError: options that cannot work, before anything is measured.
        torch.OutOfMemoryError, NotEnoughMemory: of the first value, if there is not enough memory for any.
    """
    several = {value: replace(options, **{key: value}) for value in values}
    for own in several.values():
        make_recipe(architecture, own, Path(), device)
    found = {
        value: figures_or_error(bench, architecture, own, device)
        for value, own in tqdm(several.items(), desc=key, leave=False)
    }
    measured = {value: run for value, run in found.items() if not isinstance(run, Exception)}
    if not measured:
        raise next(error for error in found.values() if isinstance(error, Exception))
    sizes = {value: run["tokens"] if key == "resolution" else value for value, run in measured.items()}
    clock = "processor" if device.type == "cpu" else "median"
    costs: dict[str, Callable[[dict[str, Any]], Any]] = {
        "memory": lambda run: total_memory(run, "measured"),
        "planned memory": lambda run: total_memory(run, "planned"),
    }
    if all("step" in run for run in measured.values()):
        costs["step"] = lambda run: run["step"][clock]
        costs["operations"] = lambda run: run["operations"]["step"]
    growth = {}
    for name, cost in costs.items():
        grown = {sizes[value]: cost(run) for value, run in measured.items()}
        if len(grown) > 1 and None not in grown.values():
            growth[name] = asdict(fit_growth(grown))
    return {
        "what": "sweep", "of": next(iter(measured.values()))["what"], "architecture": architecture.name,
        "options": asdict(options), "key": key, "against": AGAINST[key], "clock": clock,
        "runs": {value: measured.get(value) for value in several}, "growth": growth,
    }  # fmt: skip
