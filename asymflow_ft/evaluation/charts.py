"""Charts of the report as SVG; the page's style sheet gives their colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from asymflow_ft.evaluation.results import Difference, Metric

MINUS = "\u2212"
FINEST = 0.5  # cycles per pixel; what is beyond lies in the corners, in diagonal directions alone


def forest(difference: Difference, metric: Metric) -> Markup:
    """A difference and its interval on a scale of its own around zero; better is right."""
    sign = 1 if metric.better == "higher" else -1  # "closer": a difference of distances from the real value
    bounds = [sign * x for x in (difference.low, difference.value, difference.high)]
    if not all(map(math.isfinite, bounds)):
        return Markup()
    scale = max(map(abs, bounds)) or 1.0
    low, middle, high = (100 + 92 * x / scale for x in bounds)
    return Markup(
        '<svg class="forest {kind}" viewBox="0 0 200 20" role="img" aria-label="{label}">'
        '<line class="zero" x1="100" x2="100" y1="0" y2="20"/>'
        '<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="10" y2="10"/>'
        '<circle cx="{middle:.1f}" cy="10" r="4.5"/></svg>'
    ).format(
        kind=difference.verdict.split()[0],
        label=difference.verdict,
        low=min(low, high),
        middle=middle,
        high=max(low, high),
    )


@dataclass(frozen=True)
class SpectraChart:
    """svg; the names of its lines in the order of their colours; what 0 dB is (None: an absolute density)."""

    svg: Markup
    names: list[str]
    zero: str | None


def spectra_chart(spectra: dict[str, list[float]], names: Sequence[str]) -> SpectraChart | None:
    """Power over spatial frequency in dB relative to the real pictures, else to the second of `names`, the models; a
    single one alone is drawn as it is. None without spectra."""
    lines = [name for name in names if name in spectra]
    if not lines:
        return None
    zero = "real" if "real" in spectra else lines[1] if len(lines) > 1 else None
    frequency = spectra["frequency"]
    kept = [i for i, f in enumerate(frequency) if 0 < f <= FINEST]
    base = spectra[zero] if zero else [1.0] * len(frequency)
    curves = {
        name: [
            (frequency[i], 10 * math.log10(spectra[name][i] / base[i]))
            for i in kept
            if spectra[name][i] > 0 and base[i] > 0
        ]
        for name in lines if name != zero
    }  # fmt: skip
    levels = [level for curve in curves.values() for _, level in curve] + ([0.0] if zero else [])
    if not kept or not levels:
        return None
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if (max(levels) - min(levels)) / s <= 6)
    bottom, top = step * math.floor(min(levels) / step), step * math.ceil(max(levels) / step)
    top = max(top, bottom + step)
    left, right, upper, lower = 62, 752, 12, 268
    coarsest = math.log2(frequency[kept[0]])

    def x(f: float) -> float:
        return left + (right - left) * (math.log2(f) - coarsest) / ((math.log2(FINEST) - coarsest) or 1)

    def y(level: float) -> float:
        return lower - (lower - upper) * (level - bottom) / (top - bottom)

    parts = [Markup('<svg class="spectra" viewBox="0 0 760 320" role="img" aria-label="power spectra">')]
    for level in range(bottom, top + 1, step):
        name = f"{level:+d} dB" if zero else f"{level} dB"
        parts.append(Markup(
            '<line class="{kind}" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            '<text x="{end}" y="{base:.1f}" text-anchor="end">{name}</text>'
        ).format(kind="zero" if zero and level == 0 else "grid", left=left, right=right, y=y(level), end=left - 8,
                 base=y(level) + 4, name="0 dB" if level == 0 else name.replace("-", MINUS)))  # fmt: skip
    for octave in range(math.ceil(coarsest - 1e-9), 0):
        parts.append(Markup(
            '<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{upper}" y2="{lower}"/>'
            '<text x="{x:.1f}" y="{base}" text-anchor="middle">{pixels}</text>'
        ).format(x=x(2.0**octave), upper=upper, lower=lower, base=lower + 20, pixels=2**-octave))  # fmt: skip
    parts.append(Markup(
        '<text x="{x}" y="{y}" text-anchor="middle">pixels per wave: coarse shapes left, finest detail right</text>'
    ).format(x=(left + right) / 2, y=lower + 44))  # fmt: skip
    for i, curve in enumerate(curves.values()):
        points = " ".join(f"{x(f):.1f},{y(level):.1f}" for f, level in curve)
        parts.append(Markup('<polyline class="line s{i}" points="{points}"/>').format(i=i % 6, points=points))
    return SpectraChart(Markup("").join([*parts, Markup("</svg>")]), list(curves), zero)
