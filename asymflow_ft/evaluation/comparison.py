"""Models against each other in one metric: values with intervals over prompts, differences with verdicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from asymflow_ft.evaluation import statistics
from asymflow_ft.evaluation.distribution import Reference, frechet_distance, kernel_distance
from asymflow_ft.evaluation.results import Difference, Metric, Value
from asymflow_ft.evaluation.suites import Prompt

FEW_PROMPTS, CATEGORY_PROMPTS = 10, 8
BIAS_SHARE = 0.1  # of FID, from which on its bias is worth a warning


@dataclass(frozen=True)
class Column:
    """A metric that is a number of an average: `rows` (P, c) of each model, NaN where a prompt has no reference, whose
    mean over prompts `reduce` makes a number. `target`: the real pictures' own, if there is one. `real`: rows (M, c)
    of the real pictures, for their own value. `by_category`: it needs no real pictures, which have no categories."""

    rows: dict[str, Tensor]
    reduce: Callable[[Tensor], Tensor]
    target: float | None = None
    real: Tensor | None = None
    by_category: bool = True


def compare_means(
    metric: Metric, column: Column, prompts: Sequence[Prompt], per_prompt: int, seed: int
) -> tuple[list[Value], list[Difference]]:
    """Over all prompts, and over those of each category that has enough of them."""
    usable = next(iter(column.rows.values())).isfinite().all(1).nonzero()[:, 0].tolist()
    groups: dict[str | None, list[int]] = {None: usable}
    for p in usable:
        category = prompts[p].category
        if category is not None and column.by_category:
            groups.setdefault(category, []).append(p)
    values: list[Value] = []
    differences: list[Difference] = []

    def estimate(rows: Tensor) -> tuple[statistics.Estimate, statistics.Interval]:
        value = column.reduce(rows.mean(0, keepdim=True)).item()
        found = statistics.Estimate(value, column.reduce(statistics.bootstrap_means(rows, seed)))
        return found, statistics.bootstrap_interval(found, len(rows))

    for category, members in groups.items():
        if category is not None and len(members) < CATEGORY_PROMPTS:
            continue
        found = {}
        for model, rows in column.rows.items():
            found[model], interval = estimate(rows[members])
            count = len(members) * per_prompt
            values.append(Value(metric.key, model, found[model].value, *interval, count, category))
        asked, *others = found
        if metric.better == "closer" and column.target is None:
            continue  # nothing to be close to
        for other in others:
            pair = (found[asked], found[other])
            if metric.better == "closer" and column.target is not None:
                pair = (pair[0].distance(column.target), pair[1].distance(column.target))
            change = pair[0].minus(pair[1])
            interval = statistics.bootstrap_interval(change, len(members))
            better: Literal["higher", "lower"] = "higher" if metric.better == "higher" else "lower"
            word = statistics.verdict(interval, better) if len(members) > 1 else "no difference seen"
            differences.append(Difference(metric.key, asked, other, change.value, *interval, word, category))
    if column.real is not None:
        own, interval = estimate(column.real)
        values.append(Value(metric.key, "real", own.value, *interval, len(column.real)))
    return values, differences


def compare_sets(
    metric: Metric, sets: dict[str, Tensor], real: Reference, per_prompt: int, seed: int
) -> tuple[list[Value], list[Difference], list[str]]:
    """FID or KID of features (P, K, d) of each model, and warnings of their bias."""
    prompts, vectors, dim = next(iter(sets.values())).shape
    weights = statistics.jackknife_weights(prompts, seed)
    found: dict[str, statistics.Estimate] = {}
    values, differences, warnings, biases = [], [], [], []
    for model, features in sets.items():
        if metric.key == "kid":
            found[model] = statistics.estimate(lambda w, x=features: kernel_distance(x, real, w), weights)
        else:
            title = f"{metric.title} of {model}"
            found[model] = statistics.estimate(lambda w, x=features, t=title: frechet_distance(x, real, w, t), weights)
            bias = statistics.jackknife_bias(found[model])
            if bias > BIAS_SHARE * found[model].value:
                biases.append(f"{bias:.2g} of {found[model].value:.4g} ({model})")
        interval = statistics.jackknife_interval(found[model])
        values.append(Value(metric.key, model, found[model].value, *interval, prompts * per_prompt))
    if biases:
        warnings.append(
            f"{metric.title} is too high for want of pictures, by about {', '.join(biases)}: compare it with equal "
            f"numbers of pictures alone; KID has no such bias ({prompts * vectors} vectors of {dim} features)"
        )
    if metric.key != "kid" and len(real.features) <= dim:
        warnings.append(
            f"{metric.title}: {len(real.features)} real vectors of {dim} features do not fill their space, which "
            "raises it further; use more real pictures, or KID"
        )
    asked, *others = found
    for other in others:
        change = found[asked].minus(found[other])
        interval = statistics.jackknife_interval(change)
        word = statistics.verdict(interval, "lower")
        differences.append(Difference(metric.key, asked, other, change.value, *interval, word))
    return values, differences, warnings
