"""Tables 3 and 4 of "Asymmetric Flow Models" (arXiv 2605.12964 v2), and where a run stands in them."""

from dataclasses import dataclass
from typing import Literal

from asymflow_ft.evaluation.results import Results

SIZE, STEPS, GUIDANCE, NEGATIVE = (1024, 1024), 32, 4.0, ""  # of all pictures in both tables


@dataclass(frozen=True)
class Column:
    """What stands in a run's own row: the overall value of `metric`, or the overall score of the official `benchmark`;
    nothing of a run where both are None."""

    title: str
    better: Literal["higher", "lower"]
    decimals: int
    metric: str | None = None
    benchmark: str | None = None


@dataclass(frozen=True)
class Table:
    """rows: numbers by model, one per column. prompts: how many, where that is one number for the whole table."""

    title: str
    columns: tuple[Column, ...]
    rows: dict[str, tuple[float, ...]]
    comparable: str
    prompts: int | None = None


TABLE_3 = Table(
    "Table 3: finetuned from FLUX.2 klein Base 9B on the same data, 10,000 steps",
    (
        Column("HPSv3", "higher", 2, metric="hpsv3"), Column("HPSv2.1", "higher", 3, metric="hpsv2"),
        Column("VQA", "higher", 3), Column("CLIP", "higher", 3, metric="clip"),
        Column("FID", "lower", 1, metric="fid"), Column("pFID", "lower", 1, metric="pfid"),
    ),
    {
        "latent finetune": (10.70, 0.290, 0.936, 0.276, 15.0, 18.8),
        "pixel finetune with a DDT head": (10.33, 0.291, 0.922, 0.273, 20.4, 26.0),
        "AsymFLUX, plain flow matching": (12.03, 0.293, 0.922, 0.277, 20.2, 25.4),
        "AsymFLUX, + variance reduction": (12.99, 0.296, 0.925, 0.280, 18.5, 27.8),
        "AsymFLUX, + variance reduction + LPIPS": (13.06, 0.297, 0.925, 0.278, 19.1, 22.5),
    },
    "10,000 COCO captions. FID and pFID depend on the real pictures, their number, the extractor and the patches, "
    "CLIP on which CLIP, HPSv3 on the prompts. So a number here says something only beside one of the same "
    "evaluation, and what can be held against the paper is the difference between two rows. The paper's pixel models "
    "win on preference (HPS) and lose VQA, FID and pFID to the latent finetune.",
    prompts=10_000,
)  # fmt: skip

TABLE_4 = Table(
    "Table 4: whole systems",
    (
        Column("HPSv3", "higher", 2, benchmark="hpsv3"), Column("DPG-Bench", "higher", 1, benchmark="dpg"),
        Column("GenEval", "higher", 2, benchmark="geneval"),
    ),
    {
        "SDXL": (8.20, 74.7, 0.55),
        "PixArt-Σ": (9.37, 80.5, 0.54),
        "Hunyuan-DiT": (8.19, 78.9, 0.63),
        "FLUX.1-dev": (10.43, 84.0, 0.67),
        "Qwen-Image": (9.52, 87.8, 0.86),
        "FLUX.2 klein Base 9B": (9.50, 85.2, 0.80),
        "PixelDiT-T2I": (8.95, 83.5, 0.74),
        "AsymFLUX.2 klein 9B": (10.66, 86.8, 0.82),
    },
    "Official prompts as they are and official scorers: GenEval and DPG-Bench with four pictures per prompt, HPSv3 on "
    "the prompts of its own benchmark (so its numbers here and in Table 3 do not compare). A run of such a benchmark "
    "in full is comparable; one of a part of the prompts, or scored with other models, is not.",
)  # fmt: skip

TABLES = (TABLE_3, TABLE_4)


def own_rows(table: Table, results: Results) -> dict[str, list[float | None]]:
    """A run's numbers in the columns of a table, by model; models without any are left out."""
    rows: dict[str, list[float | None]] = {}
    for model in results.models:
        row: list[float | None] = []
        for column in table.columns:
            value = None if column.metric is None else results.value(column.metric, model.name)
            score = results.benchmarks.get(column.benchmark or "", {}).get(model.name, {}).get("overall")
            row.append(score if value is None else value.value)
        if any(number is not None for number in row):
            rows[model.name] = row
    return rows


def unlike(table: Table, results: Results) -> list[str]:
    """How a run's pictures were made otherwise than those of a table, as far as its results tell."""
    found = [
        f"{model.name} draws {model.size[0]} x {model.size[1]} pixels, not {SIZE[0]} x {SIZE[1]}"
        for model in results.models
        if model.size != SIZE
    ]
    if table.prompts is not None and len(results.prompts) != table.prompts:
        found.append(f"prompts: {len(results.prompts):,}, not {table.prompts:,}")
    paper = {"steps": STEPS, "guidance": GUIDANCE, "negative": NEGATIVE}
    return found + [
        f"{key} {results.settings[key]!r}, not {value!r}"
        for key, value in paper.items()
        if results.settings.get(key) not in (None, value)  # None: a pipeline's own, of an undistilled base the paper's
    ]
