"""report.html, values.csv and grid.png of an evaluation.

The page is one file without a script or a link to anything outside, so that it can be sent, kept and printed.
"""

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from asymflow_ft.evaluation import paper
from asymflow_ft.evaluation.charts import MINUS, forest, spectra_chart
from asymflow_ft.evaluation.gallery import gather, random_places, show
from asymflow_ft.evaluation.pictures import sheet
from asymflow_ft.evaluation.results import Difference, Metric, Model, Results, Value

VERDICTS = {"better": "better in", "worse": "worse in", "no difference seen": "no difference seen in"}
GRID_COLUMNS = 8
COLUMNS = ("model", "metric", "category", "value", "low", "high", "count")


def write_report(results: Results, out: Path) -> None:
    """Write report.html, values.csv and grid.png into `out`, where the pictures are.

    Reads out/images/<model>/<prompt id>-<k>.png, out/references/<prompt id>.png where there are any, and
    out/pictures.jsonl if it is there, with lines {"model", "prompt": id, "k", metric key: value of this picture, ...}.

    Raises:
        ValueError: a picture is missing or cannot be read.
    """
    _write(out / "report.html", render(results, out).encode())
    _write(out / "values.csv", values_csv(results).encode())
    content = io.BytesIO()
    grid(results, out).save(content, format="png")
    _write(out / "grid.png", content.getvalue())


def _write(file: Path, content: bytes) -> None:
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    part.replace(file)


def values_csv(results: Results) -> str:
    """One row a value; an empty category is all prompts."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([v.model, v.metric, v.category, v.value, v.low, v.high, v.count] for v in results.values)
    return text.getvalue()


def grid(results: Results, out: Path) -> Any:
    """The report's random choice as one picture, a row per model."""
    columns = [show(results, out, place) for place in random_places(results, GRID_COLUMNS)]
    names = list(dict.fromkeys(name for column in columns for name in column))
    names.sort(key=lambda name: (name != "reference", name == results.models[0].name))
    prompts = [results.prompts[p] for p, _ in random_places(results, GRID_COLUMNS)]
    # the font of the sheet has Latin letters alone
    captions = [" ".join((p["text"] if p["text"].isascii() else p["id"]).split()) for p in prompts]
    return sheet({name: [column.get(name) for column in columns] for name in names}, captions)


@dataclass(frozen=True)
class Comparison:
    """The first model held against another. verdicts: metrics by verdict. categories: names by what most of their
    differences say."""

    first: Model
    other: Model
    verdicts: dict[str, list[Metric]]
    categories: dict[str, list[str]]

    @property
    def sentence(self) -> str:
        """Such as "a against b: better in FID; worse in PSNR"."""
        parts = [f"{VERDICTS[v]} {', '.join(m.title for m in ms)}" for v, ms in self.verdicts.items() if ms]
        return f"{self.first.name} against {self.other.name}: {'; '.join(parts) or 'no metric compares them'}"


def comparisons(results: Results) -> list[Comparison]:
    """The first model against each of the others."""
    found = []
    for other in results.models[1:]:
        own = [d for d in results.differences if d.against == other.name]
        whole = {d.metric: d.verdict for d in own if d.category is None}
        verdicts = {v: [m for m in results.metrics if whole.get(m.key) == v] for v in VERDICTS}
        counts: dict[str, Counter] = {}
        for d in own:
            if d.category is not None:
                counts.setdefault(d.category, Counter())[d.verdict] += 1
        categories: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
        for name, count in counts.items():
            more = count["better"] - count["worse"]
            categories["better" if more > 0 else "worse" if more < 0 else "no difference seen"].append(name)
        found.append(Comparison(results.models[0], other, verdicts, categories))
    return found


def render(results: Results, out: Path) -> str:
    """The page. Its parts are in report.html; what it calls is below."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "signed": signed, "digits": digits, "three": three_digits}
    values = {(v.metric, v.model, v.category): v for v in results.values}
    differences = {(d.metric, d.against, d.category): d for d in results.differences}
    names = [model.name for model in results.models]
    return environment.get_template("report.html").render(
        results=results, first=results.models[0], others=results.models[1:], comparisons=comparisons(results),
        has_real=any(v.model == "real" for v in results.values),
        categories=list(dict.fromkeys(p["category"] for p in results.prompts if p["category"] is not None)),
        value=lambda metric, model, category=None: values.get((metric, model, category)),
        difference=lambda metric, against, category=None: differences.get((metric, against, category)),
        best={metric.key: best(metric, results) for metric in results.metrics},
        decimals={
            m.key: max((digits(v) for v in results.values if v.metric == m.key and v.category is None), default=2)
            for m in results.metrics
        },
        forest=forest, spectra=spectra_chart(results.spectra, names), gallery=gather(results, out),
        tables=[(table, paper.own_rows(table, results), paper.unlike(table, results)) for table in paper.TABLES],
        settings=flatten(results.settings), ratio=ratio,
    )  # fmt: skip


def best(metric: Metric, results: Results) -> set[str]:
    """Models with the best value; several if it is the same."""
    found = [value for model in results.models if (value := results.value(metric.key, model.name)) is not None]
    real = results.value(metric.key, "real")
    if len(found) < 2 or (metric.better == "closer" and real is None):
        return set()

    def badness(value: Value) -> float:
        if metric.better == "closer":
            assert real is not None
            return abs(value.value - real.value)
        return value.value if metric.better == "lower" else -value.value

    least = min(map(badness, found))
    return {value.model for value in found if badness(value) == least}


def digits(found: Value | Difference) -> int:
    """Decimals that show two digits of the interval's width, or three of the value where it has none."""
    width = found.high - found.low
    if math.isfinite(width) and width > 1e-6 * abs(found.value):  # less is rounding
        return min(max(1 - math.floor(math.log10(width)), 0), 8)
    if math.isfinite(found.value) and found.value:
        return min(max(2 - math.floor(math.log10(abs(found.value))), 0), 8)
    return 2


def number(value: float, decimals: int) -> str:
    """With a real minus sign."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    text = number(value, decimals)
    return f"+{text}" if value > 0 and text != number(0, decimals) else text


def three_digits(value: float) -> str:
    return number(value, digits(Value("", "", value, value, value, 0)))


def ratio(own: float, other: float) -> str:
    """Such as "1.4 times"; nothing where it cannot be said."""
    if not (math.isfinite(own) and math.isfinite(other)) or min(own, other) <= 0:
        return ""
    return "the same" if 0.995 <= own / other < 1.005 else f"{own / other:.2g} times"


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
