"""What an evaluation found, for a terminal."""

from pathlib import Path

from asymflow_ft.evaluation.report import comparisons
from asymflow_ft.evaluation.results import Results, Value


def describe(results: Results, report: Path) -> str:
    """The results in a few lines for a terminal."""
    names = [model.name for model in results.models]
    shown = [*names, "real"] if any(value.model == "real" for value in results.values) else names
    rows = [["", *shown]]
    for metric in results.metrics:
        values = [results.value(metric.key, name) for name in shown]
        rows.append([metric.title, *map(_cell, values)])
    for name, scores in results.benchmarks.items():
        rows.append([name, *(f"{scores[model]['overall']:.4g}" if model in scores else "" for model in names)])
    rows.append(["seconds per picture", *(f"{model.seconds[1]:.3g}" for model in results.models)])
    rows.append(["memory in GB", *(f"{model.memory_gb:.3g}" for model in results.models)])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(shown) + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    lines += [f"warning: {warning}" for warning in results.warnings]
    lines += [comparison.sentence for comparison in comparisons(results)]
    return "\n".join([*lines, f"report: {report}"])


def _cell(value: Value | None) -> str:
    if value is None:
        return ""
    # below 1e-9 is rounding
    middle, low, high = (f"{0.0 if abs(v) < 1e-9 else v:.4g}" for v in (value.value, value.low, value.high))
    return f"{middle} [{low}, {high}]"
