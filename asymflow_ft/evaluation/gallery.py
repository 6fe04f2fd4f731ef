"""Which pictures a report shows, and the pictures themselves, inside the page."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from asymflow_ft.evaluation.results import Metric, Results
from asymflow_ft.evaluation.retrieval import sharpness

EXTREMES, RANDOM = 4, 8  # rows of each kind
LIMIT = 12_000_000  # characters of all pictures in a page
SMALL, LARGE, CENTRE = 256, 512, 192  # sides in pixels: shown as it is; shown at most; of the part shown as it is
Place = tuple[int, int]  # index of the prompt, number of its picture


@dataclass(frozen=True)
class Cell:
    """A picture as data: URIs. `centre`: its middle, pixel for pixel, where `whole` was made smaller. `sharpness`: at
    the size at which pictures are compared; `sharper`: minus that of the model which the first one is held against."""

    label: str
    whole: str
    centre: str | None
    sharpness: float
    sharper: float | None


@dataclass(frozen=True)
class Row:
    """Pictures of one prompt and noise. `gain`: by how much the first model is better, in the metric of the group."""

    prompt: dict[str, Any]
    number: int
    cells: list[Cell]
    gain: float | None


@dataclass(frozen=True)
class Gallery:
    """groups: rows by title. metric: what gains are of. small: pictures are at most SMALL pixels wide and high."""

    groups: dict[str, list[Row]]
    shown: int
    total: int
    metric: Metric | None
    small: bool


def picture_file(out: Path, model: str, prompt: str, number: int) -> Path:
    return out / "images" / model / f"{prompt}-{number}.png"


def random_places(results: Results, count: int) -> list[Place]:
    """The same ones for the same prompts, whatever their order or number: those whose ids have the smallest hashes."""
    places = _places(results)
    digests = {
        (p, k): hashlib.sha256(f"{results.prompts[p]['id']}-{k}".encode()).hexdigest() for p, k in places
    }  # fmt: skip
    return sorted(places, key=lambda place: digests[place])[:count]


def gather(results: Results, out: Path) -> Gallery:
    """Pictures of an evaluation in `out`, by how the first model compares with the second: most gained, most lost
    (where out/pictures.jsonl has a metric of single pictures), and a fixed random choice; of few pictures all.

    Raises:
        ValueError: a picture is missing or cannot be read, or pictures.jsonl cannot.
    """
    metric, gains = _gains(results, out)
    places = _places(results)
    chosen: dict[str, list[Place]] = {}
    by_gain = sorted(gains, key=lambda place: (-gains[place], place))
    if len(places) <= 2 * EXTREMES + RANDOM:
        chosen["All pictures"] = by_gain if len(by_gain) == len(places) else places
    else:
        if metric is not None:
            first, other = (model.name for model in results.models[:2])
            best = [place for place in by_gain[:EXTREMES] if gains[place] > 0]
            worst = [place for place in by_gain[::-1][:EXTREMES] if gains[place] < 0]
            chosen[f"Where {first} gains most on {other}, by {metric.title}"] = best
            chosen[f"Where {first} loses most to {other}, by {metric.title}"] = worst
        chosen["A random choice, the same for every model and run"] = random_places(results, RANDOM)
    rows: dict[str, list[Row]] = {title: [] for title, listed in chosen.items() if listed}
    spent = 0
    depth = max(map(len, chosen.values()))
    for title, place in ((t, chosen[t][i]) for i in range(depth) for t in rows if i < len(chosen[t])):
        row = _row(results, out, place, gains.get(place))
        spent += sum(len(cell.whole) + len(cell.centre or "") for cell in row.cells)
        if spent > LIMIT and any(rows.values()):
            break
        rows[title].append(row)
    shown = {(row.prompt["id"], row.number) for group in rows.values() for row in group}
    small = max(side for model in results.models for side in model.size) <= SMALL
    return Gallery({t: group for t, group in rows.items() if group}, len(shown), len(places), metric, small)


def _places(results: Results) -> list[Place]:
    return [(p, k) for p in range(len(results.prompts)) for k in range(results.per_prompt)]


def _gains(results: Results, out: Path) -> tuple[Metric | None, dict[Place, float]]:
    """The first metric that out/pictures.jsonl has of single pictures of both models, and by how much the first model
    is better in it."""
    file = out / "pictures.jsonl"
    if len(results.models) < 2 or not file.is_file():
        return None, {}
    records: dict[tuple[str, str, int], dict[str, Any]] = {}
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n") if file.stat().st_size else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record["model"], record["prompt"], record["k"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} cannot be read ({error}); remove the file") from error
    first, other = (model.name for model in results.models[:2])
    for metric in results.metrics:
        if metric.better == "closer":
            continue
        sign = 1 if metric.better == "higher" else -1
        gains = {}
        for p, k in _places(results):
            id = results.prompts[p]["id"]
            own, others = (records.get((name, id, k), {}).get(metric.key) for name in (first, other))
            if own is not None and others is not None and math.isfinite(own - others):
                gains[p, k] = sign * (own - others)
        if any(gains.values()):
            return metric, gains
    return None, {}


def _row(results: Results, out: Path, place: Place, gain: float | None) -> Row:
    prompt, number = results.prompts[place[0]], place[1]
    pictures = show(results, out, place)
    measured = {name: sharpness([_fit(picture, results.compared_at)]) for name, picture in pictures.items()}
    first, *others = [model.name for model in results.models]
    cells = [
        Cell(
            name, *_inline(picture), measured[name],
            measured[first] - measured[others[0]] if name == first and others else None,
        )
        for name, picture in pictures.items()
    ]  # fmt: skip
    return Row(prompt, number, cells, gain)


def show(results: Results, out: Path, place: Place) -> dict[str, Image.Image]:
    """What is beside each other: the reference picture if there is one, the models held against, the first model."""
    prompt, number = results.prompts[place[0]]["id"], place[1]
    reference = out / "references" / f"{prompt}.png"
    files = {"reference": reference} if reference.is_file() else {}
    names = [model.name for model in results.models]
    files |= {name: picture_file(out, name, prompt, number) for name in (*names[1:], names[0])}
    return {name: _open(file) for name, file in files.items()}


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"the report needs {file}, which cannot be read ({error}); evaluate again") from error


def _fit(image: Image.Image, size: Sequence[int]) -> Image.Image:
    return image if image.size == tuple(size) else image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _inline(image: Image.Image) -> tuple[str, str | None]:
    """The picture, and its middle where the picture had to be made smaller."""
    if max(image.size) <= LARGE:
        return _uri(image, lossless=max(image.size) <= SMALL), None
    whole = image.copy()
    whole.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    width, height = (min(side, CENTRE) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return _uri(whole), _uri(image.crop((left, top, left + width, top + height)), lossless=True)


def _uri(image: Image.Image, lossless: bool = False) -> str:
    content = io.BytesIO()
    image.save(content, format="webp", lossless=lossless, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
