"""GenEval (github.com/djghosh13/geneval): objects, counts, colours and positions, found by a detector.

<folder>/00000/metadata.jsonl, <folder>/00000/samples/0000.png to 0003.png, and so on. Scores: <folder>/results.jsonl.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from statistics import fmean

from asymflow_ft.evaluation.benchmarks.layout import check_pictures, check_scored, fill, last_parts
from asymflow_ft.evaluation.suites import Suite
from asymflow_ft.textfiles import json_lines

PROMPTS, PER_PROMPT = 553, 4
RESULTS = "results.jsonl"


def check(suite: Suite, size: tuple[int, int]) -> list[str]:
    """What makes scores of this suite at this (width, height) not comparable with published ones."""
    if (len(suite.prompts), suite.per_prompt) == (PROMPTS, PER_PROMPT):
        return []
    return [f"GenEval: published scores are of {PROMPTS} prompts with {PER_PROMPT} pictures each, not of "
            f"{len(suite.prompts)} with {suite.per_prompt}"]  # fmt: skip


def write_layout(suite: Suite, pictures: Sequence[Sequence[Path]], folder: Path) -> None:
    """Make `folder` what evaluate_images.py reads. What is there already stays.

    Args:
        pictures: [prompt][number], PNG files.

    Raises:
        ValueError: a picture is missing or cannot be written, or the folder holds pictures of others.
    """
    check_pictures(suite, pictures)
    own: dict[Path, Path] = {}
    for prompt, row in zip(suite.prompts, pictures, strict=True):
        own |= {folder / prompt.id / "samples" / f"{k:04d}.png": picture for k, picture in enumerate(row)}
    texts = {folder / prompt.id / "metadata.jsonl": json.dumps(prompt.extra) for prompt in suite.prompts}
    fill(folder, own, texts, _pictures(folder), "geneval")


def read_scores(folder: Path) -> dict[str, float] | None:
    """Fractions of right pictures by task, and "overall", their mean, as summary_scores.py prints them.

    Returns:
        None if there is no results.jsonl yet.

    Raises:
        ValueError: it is cut off, or not of the pictures in the folder.
    """
    file = folder / RESULTS
    if not file.is_file():
        return None
    tasks: dict[str, list[bool]] = defaultdict(list)
    names: list[str] = []
    for number, line in json_lines(file):
        name, tag, correct = (line.get(key) for key in ("filename", "tag", "correct"))
        if not isinstance(name, str) or not isinstance(tag, str) or not isinstance(correct, bool):
            raise ValueError(f"{file}, line {number} is not of GenEval: it needs filename, tag and correct")
        tasks[tag].append(correct)
        names.append(last_parts(name, 3))
    check_scored(names, (last_parts(str(picture), 3) for picture in _pictures(folder)), file)
    scores = {tag: fmean(results) for tag, results in tasks.items()}
    return {"overall": fmean(scores.values()), **scores}


def how_to_score(folder: Path) -> str:
    """Command lines for a clone of djghosh13/geneval."""
    place = folder.resolve()
    return (
        "# in a clone of https://github.com/djghosh13/geneval, set up as its README says\n"
        f"python evaluation/evaluate_images.py {quote(str(place))} --outfile {quote(str(place / RESULTS))} "
        '--model-path "<OBJECT_DETECTOR_FOLDER>"'
    )


def _pictures(folder: Path) -> list[Path]:
    """All that the scorer would score."""
    return [file for file in folder.glob("*/samples/*")
            if file.parent.parent.name.isdigit() and re.match(r"\d+\.png", file.name)]  # fmt: skip
