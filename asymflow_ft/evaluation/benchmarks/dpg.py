"""DPG-Bench (github.com/TencentQQGYLab/ELLA): questions about long prompts, answered by a VQA model.

<folder>/pictures/<prompt file's name>.png, four square pictures in a 2x2 grid each. Scores: <folder>/results.txt,
outside of the pictures' folder, since the scorer takes every file in there for a picture.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from statistics import fmean

from PIL import Image
from tqdm import tqdm

from asymflow_ft.evaluation.benchmarks.layout import check_pictures, check_scored, last_parts, refuse_others, replace
from asymflow_ft.evaluation.suites import Suite
from asymflow_ft.textfiles import text_of

PROMPTS, PER_PROMPT = 1065, 4
RESULTS = "results.txt"
LEFT_OUT = "partiprompts97.png"  # the scorer skips the first line of its questions, then fails on it (ELLA issue 61)
NUMBER = r"[-+.\de]+|nan"


def check(suite: Suite, size: tuple[int, int]) -> list[str]:
    """What makes scores of this suite at this (width, height) not comparable with published ones.

    Raises:
        ValueError: the scorer cannot read such pictures.
    """
    if suite.per_prompt != PER_PROMPT:
        raise ValueError(f"DPG-Bench needs --per-prompt {PER_PROMPT}, a grid of 2x2, not {suite.per_prompt}")
    if size[0] != size[1]:
        raise ValueError(f"DPG-Bench cuts square pictures out of its grids, not {size[0]}x{size[1]}; give one --size")
    if len(suite.prompts) == PROMPTS:
        return []
    return [f"DPG-Bench: published scores are of {PROMPTS} prompts, not of {len(suite.prompts)}"]


def write_layout(suite: Suite, pictures: Sequence[Sequence[Path]], folder: Path) -> None:
    """Make `folder` what compute_dpg_bench.py reads. Grids that are newer than their pictures stay.

    Args:
        pictures: [prompt][number], PNG files of one square size.

    Raises:
        ValueError: a picture is missing, of another size or cannot be written, or the folder holds others.
    """
    check_pictures(suite, pictures)
    own = {folder / "pictures" / f"{prompt.id}.png": row for prompt, row in zip(suite.prompts, pictures, strict=True)}
    refuse_others(_pictures(folder), own, folder)
    with Image.open(pictures[0][0]) as image:
        size = image.size
    check(suite, size)
    for file, row in tqdm(own.items(), desc="dpg", mininterval=1):
        if not file.is_file() or file.stat().st_mtime_ns < max(picture.stat().st_mtime_ns for picture in row):
            grid = _grid(row, size)
            # level 1: a grid of 2048x2048 takes a third of the time, and some more space
            replace(file, lambda part: grid.save(part, "PNG", compress_level=1))  # noqa: B023 called at once


def _grid(row: Sequence[Path], size: tuple[int, int]) -> Image.Image:
    """First row: pictures 0 and 1."""
    page = Image.new("RGB", (2 * size[0], 2 * size[1]))
    for k, picture in enumerate(row):
        with Image.open(picture) as image:
            if image.size != size:
                raise ValueError(f"{picture} is {image.width}x{image.height}, the first {size[0]}x{size[1]}; the "
                                 "scorer of DPG-Bench takes one size")  # fmt: skip
            page.paste(image.convert("RGB"), (k % 2 * size[0], k // 2 * size[1]))
    return page


def read_scores(folder: Path) -> dict[str, float] | None:
    """Percentages: "overall" and both levels of categories, "entity" and "entity - whole", from the end of the file.

    Returns:
        None if there is no results.txt yet.

    Raises:
        ValueError: it is cut off, of two runs, or not of the pictures in the folder.
    """
    file = folder / RESULTS
    if not file.is_file():
        return None
    names: list[str] = []
    averages: list[float] = []
    categories: dict[str, float] = {}
    overall = None
    for number, line in enumerate(text_of(file).splitlines(), 1):
        if match := re.fullmatch(rf"(.+), (?:(?:{NUMBER}), ){{{PER_PROMPT}}}({NUMBER})", line):
            names.append(last_parts(match[1], 1))
            averages.append(_number(match[2], file, number))
        elif match := re.fullmatch(rf"\t(.+): ({NUMBER})", line):
            categories.setdefault(match[1], _number(match[2], file, number))
        elif match := re.fullmatch(rf"DPG-Bench score: ({NUMBER})", line):
            overall = _number(match[1], file, number)
        elif not line.startswith(("Model: ", "L1 category", "L2 category", "Image path: ", "Save results to: ")):
            raise ValueError(f"{file}, line {number} is not of DPG-Bench with --pic-num {PER_PROMPT}: {line[:80]!r}")
    if overall is None:
        raise ValueError(f'{file} has no line "DPG-Bench score": the scorer is not done, or was stopped')
    check_scored(names, (picture.name for picture in _pictures(folder)), file, excused=LEFT_OUT)
    if not math.isclose(fmean(averages) * 100, overall, abs_tol=1e-6):
        raise ValueError(
            f"{file}: its pictures' scores have the mean {fmean(averages) * 100:.4f}, but it ends with {overall:.4f}; "
            "lines were lost or are of another run. Remove it and score again"
        )
    return {"overall": overall, **categories}


def how_to_score(folder: Path) -> str:
    """Command lines for a clone of TencentQQGYLab/ELLA.

    Raises:
        ValueError: there is no layout yet.
    """
    grids = _pictures(folder)
    if not grids:
        raise ValueError(f"{folder} holds no pictures")
    with Image.open(grids[0]) as image:
        side = image.width // 2
    place = folder.resolve()
    return (
        "# in a clone of https://github.com/TencentQQGYLab/ELLA, with modelscope (mPLUG) and accelerate installed\n"
        "PYTHONHASHSEED=0 accelerate launch --num_machines 1 --num_processes 1 --mixed_precision fp16 "
        f"dpg_bench/compute_dpg_bench.py --image-root-path {quote(str(place / 'pictures'))} --resolution {side} "
        f"--pic-num {PER_PROMPT} --vqa-model mplug --res-path {quote(str(place / RESULTS))}"
    )


def _number(text: str, file: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{file}, line {line}: {text!r} is no score")
    return value


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in (folder / "pictures").glob("*.png") if not file.name.startswith("."))
