"""Several training runs side by side: their curves in one picture, final figures and recipes in a table."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from asymflow_ft.evaluation.metrics import METRICS
from asymflow_ft.recipe import Recipe, flat, load_recipe
from asymflow_ft.textfiles import read_lines

SOFTWARE = "asymflow-ft compare-runs"  # in the picture's metadata
POINTS = 60  # of the longest run's smoothed curve
LOSS_KEYS = (
    "base",
    "data.source",
    "data.mix",
    "data.resolution",
    "pixels.",
    "noise.",
    "loss.",
)  # what it is a loss of
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a run folder holds. train: logs/train.jsonl. metrics: logs/metrics.jsonl, of evaluations on the way, []
    without any. status: status.json. final: metrics.json, {} of a run that is not finished. held_out: errors at step 0
    by noise level."""

    name: str
    recipe: Recipe
    train: Lines
    metrics: Lines
    status: dict[str, Any]
    final: dict[str, Any]
    held_out: dict[str, float]


def compare_runs(folders: Sequence[Path], file: Path) -> str:
    """Draw the loss, held-out errors and metrics of runs into `file`.

    A picture that is there is replaced if this command made it, since it goes out of date as runs go on.

    Returns:
        Final figures and the recipe keys in which the runs differ, for a terminal.

    Raises:
        ValueError: a folder is no training run or has no step yet, or `file` is no .png or another picture.
    """
    check_target(file)
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    _draw(runs, file)
    return describe(runs)


def check_target(file: Path) -> None:
    """Raise ValueError if `file` cannot be the picture."""
    if file.suffix.lower() != ".png":
        raise ValueError(f"--out {file} must be a .png")
    if not file.exists():
        return
    try:
        with Image.open(file) as picture:
            own = picture.info.get("Software") == SOFTWARE
    except OSError:
        own = False
    if not own:
        raise ValueError(f"--out {file} is there and was not made by this command; choose another name")


def read_run(folder: Path, name: str) -> Run:
    """What a run has written so far.

    Raises:
        ValueError: it is no training run, is damaged, or has no step yet.
    """
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} is no training run: it has no recipe.yaml; give the output_dir of a finetune")
    try:
        recipe = load_recipe(folder / "recipe.yaml")
        status, final, held_out = (
            json.loads((folder / part).read_text(encoding="utf-8")) if (folder / part).is_file() else {}
            for part in ("status.json", "metrics.json", "logs/held_out_step_0.json")
        )
        train, metrics = (read_lines(folder / "logs" / part) for part in ("train.jsonl", "metrics.jsonl"))
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    if not train:
        raise ValueError(f"{folder} has no training step yet (logs/train.jsonl); wait for one or leave it out")
    return Run(name, recipe, train, metrics, status, final, held_out)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(f"one run is given twice: {', '.join(map(str, folders))}")
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def curve(lines: Lines, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a figure, without those that are missing or not finite."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    kept = [pair for pair in pairs if math.isfinite(pair[1])]
    return np.array([step for step, _ in kept]), np.array([value for _, value in kept], dtype=float)


def window_of(runs: Sequence[Run]) -> int:
    """Steps that a point of a smoothed curve is the mean of: the same for all runs, or their noise would differ."""
    return max(1, max(run.train[-1]["step"] for run in runs) // POINTS)


def smooth(steps: np.ndarray, values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean steps and values of the steps 1 to `window`, the next `window`, and so on."""
    if not len(steps):
        return steps, values
    starts = np.unique((steps - 1) // window, return_index=True)[1]
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Recipe keys whose values are not the same in all runs; the values by run. Where a run writes is no difference,
    and a key that a recipe has not (the section is null) is None."""
    recipes = [flat(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    found = {key: [recipe.get(key) for recipe in recipes] for key in keys if key != "output_dir"}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def describe(runs: Sequence[Run]) -> str:
    """Final figures by run, and the recipe keys in which the runs differ."""
    names, window = [run.name for run in runs], window_of(runs)
    losses = [curve(run.train, "loss")[1][-window:] for run in runs]
    rows = {
        "state": [run.status.get("state", "unknown") for run in runs],
        "step": [f"{run.train[-1]['step']} of {run.recipe.train.steps}" for run in runs],
        "images per step": [str(run.status.get("images_per_step", "")) for run in runs],
        f"loss, last {window} steps": [_figure(loss.mean() if loss.size else None) for loss in losses],
    }
    levels = dict.fromkeys(level for run in runs for level in run.held_out)
    for level in levels:
        errors = [run.final.get("held_out_error", {}).get("finetuned", {}) for run in runs]
        rows[f"held-out error at sigma {level}"] = [_figure(error.get(level)) for error in errors]
    finals = [run.final.get("finetuned", {}) for run in runs]
    for key in (key for key in METRICS if any(key in final for final in finals)):
        rows[METRICS[key].title] = [_figure(final.get(key)) for final in finals]
    for key in dict.fromkeys(key for run in runs for line in run.metrics for key in line if key != "step"):
        rows[f"{key}, last"] = [_figure(curve(run.metrics, key)[1][-1:]) for run in runs]
    for key, title in {"seconds": "seconds", "peak_memory_gb": "peak memory in GB"}.items():
        rows[title] = [_figure(run.final.get("run", {}).get(key)) for run in runs]
    rows = {title: row for title, row in rows.items() if any(row)}
    changed = {key: list(map(_text, values)) for key, values in differing(runs).items()}
    parts = [_table(["", *names], rows)]
    if changed:
        parts.append("recipe keys that differ\n" + _table(["", *names], changed))
    elif len(runs) > 1:
        parts.append("the recipes are the same")
    if found := [key for key in changed if key.startswith(LOSS_KEYS)]:
        parts.append(f"the losses are of different things ({', '.join(found)}): compare samples and metrics instead")
    return "\n\n".join(parts)


def _figure(value: float | np.ndarray | None) -> str:
    """Four digits; nothing where there is no number."""
    if isinstance(value, np.ndarray):
        value = value.item() if value.size else None
    return "" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, list | bool) else str(value)


def _table(head: Sequence[str], rows: dict[str, list[str]]) -> str:
    table = [list(head), *([title, *row] for title, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in table
    )


def _draw(runs: Sequence[Run], file: Path) -> None:
    window = window_of(runs)
    batches = [run.status.get("images_per_step", 1) for run in runs]
    per_step = batches if len(set(batches)) > 1 else [1] * len(runs)
    axis = "images seen" if len(set(batches)) > 1 else "step"
    keys = list(dict.fromkeys(key for run in runs for line in run.metrics for key in line if key != "step"))
    panels = ["loss", "held-out error", *keys]
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(5.2 * columns, 3.6 * height + 0.6), squeeze=False, layout="constrained"
    )
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    styles = [(colours[i % len(colours)], ("-", "--", ":", "-.")[i // len(colours) % 4]) for i in range(len(runs))]
    loss, held_out, *others = grid.flat
    for run, times, (colour, style) in zip(runs, per_step, styles, strict=True):
        steps, values = smooth(*curve(run.train, "loss"), window)
        dots = "." if len(steps) < 3 else ""
        loss.plot(steps * times, values, color=colour, linestyle=style, marker=dots, label=run.name)
        before, after = run.held_out, run.final.get("held_out_error", {}).get("finetuned", {})
        for errors, alpha in ((before, 0.35), (after, 1.0)):
            held_out.plot([float(x) for x in errors], list(errors.values()), color=colour, linestyle=style,
                          marker="o", markersize=3.5, alpha=alpha)  # fmt: skip
        for key, axes in zip(keys, others, strict=False):
            steps, values = curve(run.metrics, key)
            axes.plot(steps * times, values, color=colour, linestyle=style, marker="o", markersize=3.5)
    loss.set(title="training loss" + (f" (mean of {window} steps)" if window > 1 else ""), xlabel=axis)
    held_out.set(title="held-out error: pale at step 0, full when finished", xlabel="noise level sigma")
    for key, axes in zip(keys, others, strict=False):
        axes.set(title=key, xlabel=axis)
    for axes in others[len(keys) :]:
        axes.remove()
    for axes in grid.flat[: len(panels)]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (loss, held_out):
        if axes.lines and all(y > 0 for line in axes.lines for y in line.get_ydata()):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:.2g}")
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    figure.savefig(part, dpi=110, format="png", metadata={"Software": SOFTWARE})
    plt.close(figure)
    part.replace(file)
