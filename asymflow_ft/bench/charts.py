"""A benchmark's figures as bench.json and chart.png."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from asymflow_ft.bench.report import digits, seconds, size, targets_title, verdict

FIGURES = "bench.json"


def step_chart(result: Mapping[str, Any]) -> Figure:
    """Where a step's time and memory go."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    memory_bars(result, right)
    parts = list(result["parts"])
    left.barh(parts[::-1], [1000 * result["parts"][part]["median"] for part in parts[::-1]])
    left.axvline(1000 * result["floor"]["seconds"], color="black", linestyle=":", label="floor of the whole step")
    left.set_xlabel(f"ms of {1000 * result['step']['median']:,.1f} ms")
    left.legend(loc="lower right")
    return figure


def memory_chart(result: Mapping[str, Any]) -> Figure:
    """Where a step's memory goes."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    memory_bars(result, figure.subplots())
    return figure


def memory_bars(result: Mapping[str, Any], axes: Axes) -> None:
    items = list(result["memory"])
    for shift, kind in ((0.2, "planned"), (-0.2, "measured")):
        axes.barh([i + shift for i in range(len(items))],
                  [(result["memory"][name][kind] or 0) / 1e9 for name in items], height=0.4, label=kind)  # fmt: skip
    axes.set_yticks(range(len(items)), items)
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.legend()


def sample_chart(result: Mapping[str, Any]) -> Figure:
    """A step of each pipeline, inside and outside the network."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name in ("eager", "compiled"):
        for kind in ("pixel", "latent") if name in result else ():
            own, label = result[name][kind], f"{kind}, {name}"
            inside = 1000 * own["network"]["median"]
            axes.barh(label, inside, color="tab:blue")
            axes.barh(label, 1000 * own["step"]["median"] - inside, left=inside, color="tab:orange")
    axes.set_xlabel("ms a step: network, all else")
    return figure


def align_chart(result: Mapping[str, Any]) -> Figure:
    """A picture's stages, and how aligning grows."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    stages = list(result["stages"])[::-1]
    left.barh(stages, [1000 * result["stages"][stage]["median"] for stage in stages])
    left.set_xlabel("ms a picture")
    growth_lines(right, {"align": result["growth"]}, "pictures")
    return figure


def cache_chart(result: Mapping[str, Any]) -> Figure:
    """A training sample's stages, and how the start of a run grows."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    parts = [part for part in result["read"] if part != "whole"][::-1]
    left.barh(parts, [1000 * result["read"][part]["median"] for part in parts])
    left.set_xlabel("ms a training sample")
    growth_lines(right, result["growth"], "pictures in the data set")
    return figure


def sweep_chart(result: Mapping[str, Any]) -> Figure:
    """How a step's time and memory grow, or its memory alone."""
    names = PANELS if result["of"] == "step" else ("memory",)
    figure = Figure(figsize=(5 * len(names), 3.5), layout="constrained")
    sweep_panels(result, dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)))
    return figure


PANELS = {"step": ("s a step", 1, seconds), "memory": ("GB", 1e9, size)}


def sweep_panels(result: Mapping[str, Any], panels: Mapping[str, Axes]) -> None:
    """Costs from zero, so that a fixed part is seen as one.

    Args:
        panels: one for each cost, with a name of PANELS.
    """
    for name, axes in panels.items():
        unit, scale, shown = PANELS[name]
        axes.set(xlabel=result["against"], ylabel=unit)
        if name not in result["growth"]:  # not measured, or with one value alone
            continue
        found = result["growth"][name]
        (line,) = axes.plot(found["sizes"], [cost / scale for cost in found["costs"]], "o", label="measured")
        axes.plot(found["sizes"], [cost / scale for cost in found["fitted"]], color=line.get_color(), linewidth=1,
                  label=law(found, shown))  # fmt: skip
        if name == "memory":
            planned = result["growth"]["planned memory"]["costs"]
            axes.plot(found["sizes"], [cost / scale for cost in planned], "x", color="black", label="planned")
        axes.set_xticks(found["sizes"])
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.legend(loc="lower right", fontsize="small")


def growth_lines(axes: Axes, curves: Mapping[str, Mapping[str, Any]], of: str) -> None:
    for name, found in curves.items():
        (line,) = axes.loglog(found["sizes"], found["costs"], "o", label=f"{name}: power {found['exponent']:.2f}")
        axes.loglog(found["sizes"], found["fitted"], color=line.get_color(), linewidth=1)
        axes.set_xticks(found["sizes"], [f"{n:,}" for n in found["sizes"]])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=of, ylabel="s")
    axes.legend()


def law(found: Mapping[str, Any], shown: Callable[[float], str]) -> str:
    """What the line through `fitted` is."""
    if found["fixed"] > 0:
        return f"{shown(found['fixed'])} + {shown(found['each'])} each"
    return f"power {found['exponent']:.2f}"


def targets_chart(result: Mapping[str, Any]) -> Figure:
    """Each target against its limit, with the figures beside the bars; far beyond the limit bars are cut."""
    most = 3.0
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    axes = figure.subplots()
    for target in result["targets"][::-1]:
        over, reached = target["over_limit"] or 0.0, target["reached"]
        axes.barh(target["what"], min(over, most), color="tab:orange" if over > 1 else "tab:blue")
        shown = "not measured" if reached is None else f"{digits(reached)}{target['unit']}, {verdict(target)}"
        axes.text(min(over, most) + 0.02, target["what"], shown, va="center", fontsize="small")
    axes.axvline(1, color="black", linestyle=":")
    axes.set(xlim=(0, most + 0.9), xlabel="share of what the target allows; beyond 1 it is missed")
    axes.set_title(targets_title(result), fontsize="medium")
    return figure


CHARTS: dict[str, Callable[[Mapping[str, Any]], Figure]] = {
    "step": step_chart, "memory": memory_chart, "align": align_chart, "cache": cache_chart, "sample": sample_chart,
    "sweep": sweep_chart, "targets": targets_chart,
}  # fmt: skip


def save(out: Path, result: Mapping[str, Any], on: Mapping[str, Any]) -> None:
    """bench.json and chart.png.

    Args:
        on: what `machine` said before the benchmark.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / FIGURES).write_text(json.dumps({"machine": on, **result}, indent=2) + "\n", encoding="utf-8")
    CHARTS[result["what"]](result).savefig(out / "chart.png", dpi=120)
