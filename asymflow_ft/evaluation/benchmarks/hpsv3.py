"""HPSv3's benchmark (github.com/MizzenAI/HPSv3): what people would prefer, by a vision language model.

<folder>/<category>/<prompt id>-0.png with its prompt in <prompt id>-0.txt. Scores: <folder>/results.json.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import Any

from asymflow_ft.evaluation.benchmarks.layout import check_pictures, check_scored, fill, last_parts
from asymflow_ft.evaluation.suites import Suite
from asymflow_ft.textfiles import text_of

CATEGORIES, PROMPTS = 12, 12_000
RESULTS = "results.json"


def check(suite: Suite, size: tuple[int, int]) -> list[str]:
    """What makes scores of this suite at this (width, height) not comparable with published ones."""
    categories = len({prompt.category for prompt in suite.prompts})
    if (len(suite.prompts), categories, suite.per_prompt) == (PROMPTS, CATEGORIES, 1):
        return []
    return [f"HPSv3: published scores are of {PROMPTS:,} prompts in {CATEGORIES} categories with one picture each, "
            f"not of {len(suite.prompts):,} in {categories} with {suite.per_prompt}"]  # fmt: skip


def write_layout(suite: Suite, pictures: Sequence[Sequence[Path]], folder: Path) -> None:
    """Make `folder` what evaluate/benchmark.py reads. What is there already stays.

    Args:
        pictures: [prompt][number], PNG files.

    Raises:
        ValueError: a picture is missing or cannot be written, or the folder holds pictures of others.
    """
    check_pictures(suite, pictures)
    own: dict[Path, Path] = {}
    texts: dict[Path, str] = {}
    for prompt, row in zip(suite.prompts, pictures, strict=True):
        files = [folder / str(prompt.category) / f"{prompt.id}-{k}.png" for k in range(len(row))]
        own |= dict(zip(files, row, strict=True))
        texts |= {file.with_suffix(".txt"): prompt.text for file in files}
    fill(folder, own, texts, _pictures(folder), "hpsv3")


def read_scores(folder: Path) -> dict[str, float] | None:
    """Mean score by category, and "overall", the mean of these.

    Returns:
        None if there is no results.json yet.

    Raises:
        ValueError: it is cut off, or not of the pictures in the folder.
    """
    file = folder / RESULTS
    if not file.is_file():
        return None
    names: list[str] = []
    scores: dict[str, float] = {}
    try:
        content = json.loads(text_of(file))
        for place, rows in content["data"].items():
            category = last_parts(place, 1)
            rewards = [row["reward"] for row in rows]
            names += [f"{category}/{last_parts(row['image_path'], 1)}" for row in rows]
            if rewards:
                scores[category] = fmean(rewards)
                _same(scores[category], content["statistics"][place], file, category)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no result of HPSv3's evaluate/benchmark.py ({error!r})") from error
    check_scored(names, (last_parts(str(picture), 2) for picture in _pictures(folder)), file)
    overall = fmean(scores.values())
    _same(overall, content["statistics"]["OVERALL"], file, "OVERALL")
    return {"overall": overall, **scores}


def how_to_score(folder: Path) -> str:
    """Command lines for a clone of MizzenAI/HPSv3.

    Raises:
        ValueError: there is no layout yet.
    """
    categories = sorted({picture.parent.resolve() for picture in _pictures(folder)})
    if not categories:
        raise ValueError(f"{folder} holds no pictures")
    return (
        "# in a clone of https://github.com/MizzenAI/HPSv3 with its environment, hpsv2 and image-reward\n"
        f"python evaluate/benchmark.py --mode hpsv3 --num_processes 1 --output_path "
        f"{quote(str(folder.resolve() / RESULTS))} --image_folders {' '.join(quote(str(c)) for c in categories)}"
    )


def _same(mean: float, statistics: dict[str, Any], file: Path, what: str) -> None:
    if not math.isclose(mean, statistics["mean"], abs_tol=1e-6):
        raise ValueError(f"{file}: the scores of {what} have the mean {mean}, and the file says {statistics['mean']}; "
                         "remove it and score again")  # fmt: skip


def _pictures(folder: Path) -> list[Path]:
    """All that the scorer would score."""
    return sorted(file for file in folder.glob("*/*") if file.suffix in (".png", ".jpg"))
