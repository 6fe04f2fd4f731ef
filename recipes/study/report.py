"""Tables and pictures of the study: into docs/results.md, between marks, and docs/results_*.png."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from arms import ARMS, LADDER, Arm
from PIL import Image

from asymflow_ft.evaluation.pictures import sheet
from asymflow_ft.evaluation.results import Results, load_results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PAGE = Path("docs/results.md")
# (metric, column title, factor, digits)
COLUMNS = (
    ("kid", "KID x 1000", 1000, 1), ("feature_distance", "feature distance", 1, 3),
    ("picture_error", "picture error", 1, 2), ("retrieval_at_5", "retrieval@5, %", 100, 0),
    ("sharpness", "sharpness", 1, 2), ("spectrum_error", "spectrum error", 1, 3),
    ("high_band", "high band, dB", 1, 1),
)  # fmt: skip
SHOWN = ("green apple", "rocket", "parrot", "teddy bear", "lobster", "taxi", "house", "pizza")
PLOTTED = ("kid", "feature_distance", "picture_error", "high_band")


@dataclass(frozen=True)
class Study:
    """All that was evaluated: results by seed, results of the sampling shifts by (factor, seed), and run folders."""

    out: Path
    by_seed: dict[int, Results]
    shifts: dict[tuple[float, int], Results]

    def values(self, metric: str, model: str) -> list[float]:
        """One number per seed that has it."""
        found = (results.value(metric, model) for results in self.by_seed.values())
        return [value.value for value in found if value is not None]

    def facts(self, arm: Arm) -> list[dict]:
        """metrics.json of the arm's runs."""
        files = sorted((self.out / "runs").glob(f"{arm.name}_[0-9]/metrics.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def read(out: Path) -> Study:
    by_seed = {
        int(file.parent.name.rpartition("_")[2]): load_results(file)
        for file in sorted(out.glob("evaluation_*/results.json"))
    }
    shifts = {}
    for file in sorted(out.glob("shift_*/results.json")):
        _, factor, seed = file.parent.name.split("_")
        shifts[float(factor), int(seed)] = load_results(file)
    if not by_seed:
        raise ValueError(f"{out} holds no evaluation; run `study.py train` and `study.py evaluate` first")
    return Study(out, by_seed, shifts)


def report(out: Path, page: Path) -> None:
    """Fill in the tables of the page, and draw its pictures beside it."""
    study = read(out)
    text = page.read_text(encoding="utf-8")
    for name, table in {
        "ladder": ladder(study), "steps": differences(study), "sweeps": sweeps(study), "shifts": sampling(study),
    }.items():  # fmt: skip
        marks = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        text = re.sub(
            f"{marks[0]}.*?{marks[1]}", lambda _, t=table, m=marks: f"{m[0]}{t}\n{m[1]}", text, flags=re.DOTALL
        )
    page.write_text(text, encoding="utf-8")
    grid(study).quantize(256).save(page.with_name("results_grid.png"), optimize=True)
    plot_spectra(study, page.with_name("results_spectra.png"))
    plot_sweeps(study, page.with_name("results_sweeps.png"))
    print(f"tables in {page}, pictures beside it")


def spread(values: Sequence[float], factor: float, digits: int) -> str:
    """Mean over seeds, and half the distance between the smallest and the largest."""
    if not values:
        return ""
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {factor * (max(values) - min(values)) / 2:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(study: Study, model: str) -> list[str]:
    return [spread(study.values(metric, model), factor, digits) for metric, _, factor, digits in COLUMNS]


def ladder(study: Study) -> str:
    rows = [["real pictures", "", *row(study, "real"), "", ""], ["latent base", "", *row(study, "base"), "", ""]]
    step_0 = next(arm for arm in ARMS if arm.name == "step_0")
    for arm in (step_0, *LADDER):
        facts = study.facts(arm)
        held = [f["held_out_error"]["finetuned"]["0.7"] for f in facts if f.get("held_out_error", {}).get("finetuned")]
        seconds = [f["run"]["seconds"] for f in facts]
        rows.append(
            [arm.title, str(len(study.values("kid", arm.name))), *row(study, arm.name), spread(held, 1, 4),
             spread(seconds, 1, 0)]
        )  # fmt: skip
    titles = [title for _, title, _, _ in COLUMNS]
    return table(["", "seeds", *titles, "held-out error at 0.7", "seconds"], rows)


def differences(study: Study) -> str:
    """What each step of the ladder changes, seed by seed: the same seed has the same data order and noise."""
    pairs = [("c_plain", "b_scratch"), ("c_plain", "a_latent"), ("d_reduced", "c_plain"),
             ("e_perceptual", "d_reduced"), ("e_perceptual", "a_latent"), ("e_perceptual", "base")]  # fmt: skip
    titles = {arm.name: arm.title for arm in ARMS} | {"base": "latent base"}
    rows = []
    for one, other in pairs:
        cells = [f"{titles[one]} - {titles[other]}"]
        for metric, _, factor, digits in COLUMNS:
            changes = []
            for results in study.by_seed.values():
                a, b = results.value(metric, one), results.value(metric, other)
                if a is not None and b is not None:
                    changes.append(a.value - b.value)
            sure = len(changes) > 1 and (min(changes) > 0 or max(changes) < 0)
            cells.append(spread(changes, factor, digits) + (" *" if sure else ""))
        rows.append(cells)
    return table(["", *(title for _, title, _, _ in COLUMNS)], rows)


def sweeps(study: Study) -> str:
    rows = [["", "(e) itself", str(len(study.values("kid", "e_perceptual"))), *row(study, "e_perceptual")]]
    for arm in ARMS:
        if arm.factor not in (None, "none"):
            rows.append([arm.factor, arm.title, str(len(study.values("kid", arm.name))), *row(study, arm.name)])
    return table(["factor", "instead", "seeds", *(title for _, title, _, _ in COLUMNS)], rows)


def sampling(study: Study) -> str:
    factors = sorted({factor for factor, _ in study.shifts})
    rows = []
    for factor in sorted([*factors, 1.0]):
        cells, count = [], 0
        for metric, _, scale, digits in COLUMNS:
            if factor == 1.0:
                values = study.values(metric, "e_perceptual")[: max((seed for _, seed in study.shifts), default=0) + 1]
            else:
                found = [r.value(metric, "e_perceptual") for (f, _), r in study.shifts.items() if f == factor]
                values = [value.value for value in found if value is not None]
            count = max(count, len(values))
            cells.append(spread(values, scale, digits))
        rows.append([f"{factor:g} x", str(count), *cells])
    return table(["sampling shift", "seeds", *(title for _, title, _, _ in COLUMNS)], rows)


def grid(study: Study) -> Image.Image:
    """The same prompts and noise, a row per arm of the ladder."""
    seed, results = next(iter(study.by_seed.items()))
    ids = {prompt["text"]: prompt["id"] for prompt in results.prompts}
    shown = [prompt for prompt in SHOWN if prompt in ids] or list(ids)[:4]
    names = ["base", "step_0", *(arm.name for arm in LADDER)]
    titles = {arm.name: arm.title for arm in ARMS} | {"base": "latent base"}
    folder = study.out / f"evaluation_{seed}"
    rows = {}
    references = [folder / "references" / f"{ids[prompt]}.png" for prompt in shown]
    if all(file.is_file() for file in references):
        rows["real"] = [Image.open(file) for file in references]
    for name in names:
        files = [folder / "images" / name / f"{ids[prompt]}-0.png" for prompt in shown]
        if all(file.is_file() for file in files):
            rows[titles[name]] = [Image.open(file) for file in files]
    return sheet(rows, shown)


def plot_spectra(study: Study, file: Path) -> None:
    results = next(iter(study.by_seed.values()))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    titles = {arm.name: arm.title for arm in LADDER} | {"base": "latent base"}
    frequency, real = results.spectra["frequency"], results.spectra["real"]
    for name, title in titles.items():
        if name in results.spectra:
            ratio = [10 * _log10(a / b) for a, b in zip(results.spectra[name], real, strict=True)]
            axes.plot(frequency, ratio, label=title, linewidth=1.2, linestyle="--" if name == "base" else "-")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="cycles per pixel", ylabel="power against real pictures, dB", ylim=(-12, 12))
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_sweeps(study: Study, file: Path) -> None:
    """A dot per seed; the band is the range of (e). Without (b), which lies far off."""
    arms = [arm for arm in ARMS if arm.factor != "none" and arm.name != "b_scratch" and study.values("kid", arm.name)]
    figure, axes = plt.subplots(1, len(PLOTTED), figsize=(13, 0.28 * len(arms) + 1), sharey=True, layout="constrained")
    titles = {metric: (title, factor) for metric, title, factor, _ in COLUMNS}
    for axis, metric in zip(axes, PLOTTED, strict=True):
        title, factor = titles[metric]
        own = study.values(metric, "e_perceptual")
        axis.axvspan(factor * min(own), factor * max(own), color="tab:blue", alpha=0.2, linewidth=0)
        for place, arm in enumerate(arms):
            values = study.values(metric, arm.name)
            axis.plot([factor * v for v in values], [place] * len(values), "o", markersize=4, color="black")
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", linewidth=0.3)
    axes[0].set_yticks(range(len(arms)), [arm.title for arm in arms], fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _log10(value: float) -> float:
    return math.log10(max(value, 1e-12))
