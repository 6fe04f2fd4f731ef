"""Draw with several models, measure, report.

The unit of work is a picture, OUT/images/<model>/<prompt id>-<k>.png, which is there whole or not at all: the same
command draws what is missing, under `accelerate launch` shared between processes, and then scores everything anew.
"""

import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from asymflow_ft.data.buckets import fit_image
from asymflow_ft.data.scan import read_index, scan, stamp
from asymflow_ft.data.source import Images, open_sources
from asymflow_ft.drawing import Drawing, Drawn, Model, Wanted, draw, name_models, open_models
from asymflow_ft.evaluation import results as found
from asymflow_ft.evaluation.benchmarks import BENCHMARKS
from asymflow_ft.evaluation.features import open_features
from asymflow_ft.evaluation.gallery import picture_file
from asymflow_ft.evaluation.metrics import check_metrics, clip_of, default_metrics, measure
from asymflow_ft.evaluation.report import write_report
from asymflow_ft.evaluation.results import Results, save_results
from asymflow_ft.evaluation.scorers import Picture, check_scorers, open_picture
from asymflow_ft.evaluation.suites import Prompt, Suite, take
from asymflow_ft.hub.provenance import versions
from asymflow_ft.recipe import Data, load_recipe
from asymflow_ft.textfiles import read_lines
from asymflow_ft.training.checkpoint import write_whole
from asymflow_ft.training.run import PNG_BYTES_PER_PIXEL, claim_folder, process_state

SETTINGS, PROMPTS = "settings.json", "prompts.json"
Say = Callable[[str], None]
Pictures = dict[str, list[list[Path]]]  # files by model, prompt and number


@dataclass(frozen=True)
class Scoring:
    """How pictures are measured. real: a source as in docs/data.md, or a recipe, whose data it is then. metrics: keys,
    None for all that can be measured. features: see `open_features`, None: as the metrics need them."""

    real: str | None = None
    metrics: tuple[str, ...] | None = None
    features: str | None = None


def evaluate(
    pipeline: str, against: Sequence[str], suite: Suite, out: Path, how: Drawing, scoring: Scoring,
    num: int | None = None, per_prompt: int | None = None, size: int | None = None, batch_size: int = 4,
    say: Say = tqdm.write,
) -> Results | None:  # fmt: skip
    """Evaluate a model, beside others, on a suite of prompts; continues what is in `out`.

    Args:
        pipeline, against: [NAME=]MODEL, see `name_models` and `open_models`. num: prompts, see `take`; None: all.
        per_prompt: pictures; None: as the suite wants. size: see `open_models`.
        say: takes the lines to print; called in the main process alone.

    Returns:
        What was found, in the main process; None in the others.

    Raises:
        ValueError: a setting is out of range or differs from those of the pictures in `out`, a model or the real
            pictures cannot be opened, or the disk cannot hold the pictures.
    """
    per_prompt = suite.per_prompt if per_prompt is None else per_prompt
    if min(batch_size, per_prompt) < 1:
        raise ValueError(f"--per-prompt {per_prompt} and --batch-size {batch_size} must be positive")
    suite = replace(suite if num is None else take(suite, num), per_prompt=per_prompt)
    named = name_models([pipeline, *against])
    state = process_state()
    with state.main_process_first():
        images = None if scoring.real is None else _open_real(scoring.real)
        models, warnings = open_models(named, size)
        warnings += _check_scoring(scoring, suite, images, models)
        _claim(out, models, how, suite.prompts, per_prompt)
    pictures = draw_all(models, how, suite, out, batch_size, state, say)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    result = _score(models, how, suite, pictures, images, scoring, out, warnings, state.device, say)
    save_results(result, out / "results.json")
    write_report(result, out)
    return result


def files_of(out: Path, name: str, suite: Suite) -> list[list[Path]]:
    """Where a model's pictures lie, by prompt and number."""
    return [[picture_file(out, name, prompt.id, k) for k in range(suite.per_prompt)] for prompt in suite.prompts]


def draw_all(
    models: Sequence[Model], how: Drawing, suite: Suite, out: Path, batch_size: int, state: PartialState, say: Say
) -> Pictures:
    """Draw what is missing, this process its share of it, one model after another."""
    files = {model.name: files_of(out, model.name, suite) for model in models}
    todo = {
        model.name: [
            Wanted(prompt.text, k, file)
            for prompt, row in zip(suite.prompts, files[model.name], strict=True)
            for k, file in enumerate(row)
            if not file.is_file()
        ]
        for model in models
    }
    state.wait_for_everyone()  # before anyone finishes a picture, which would change the others' lists
    if state.is_main_process:
        say(_check_disk(out, [model.size for model in models for _ in todo[model.name]]))
    for model in models:
        own = todo[model.name][state.process_index :: state.num_processes]
        with tqdm(total=len(own), desc=model.name, unit="picture", disable=not (own and state.is_main_process)) as bar:
            for drawn in draw(model, how, own, batch_size, state.device, state.is_main_process):
                _keep(out, model.name, drawn)
                bar.update(len(drawn.wanted))
    return files


def _keep(out: Path, name: str, drawn: Drawn) -> None:
    """Write a batch: first what it cost, so that no picture is without."""
    files = [one.file for one in drawn.wanted]
    line = {
        "pictures": [file.stem for file in files], "seconds": drawn.seconds, "first": drawn.first,
        "memory_gb": drawn.memory_gb, "parameters": drawn.parameters,
        "not_finite": [file.stem for file, finite in zip(files, drawn.finite, strict=True) if not finite],
    }  # fmt: skip
    costs = out / "costs" / f"{name}.jsonl"
    costs.parent.mkdir(exist_ok=True)
    with open(costs, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    for file, picture in zip(files, drawn.pictures, strict=True):
        _save(picture, file)


def _save(picture: Image.Image, file: Path) -> None:
    content = io.BytesIO()
    picture.save(content, format="png")
    write_whole(file, content.getvalue())


def _claim(out: Path, models: Sequence[Model], how: Drawing, prompts: Sequence[Prompt], per_prompt: int) -> None:
    """Make `out`, or check that its pictures were drawn alike; models and prompts may come to those there."""
    settings = asdict(how)
    for model in models:
        settings |= {f"{model.name}.{key}": value for key, value in model.settings().items()}
    advice = (
        "use the same settings to continue, give a changed model another name (NAME=MODEL), or choose another --out"
    )
    claim_folder(out, SETTINGS, settings, advice, may_grow=True)
    file = out / PROMPTS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for prompt in prompts:
        if before.get(prompt.id, prompt.text) != prompt.text:
            raise ValueError(
                f"{out} holds pictures of the prompt {prompt.id} with the text {before[prompt.id]!r}, and now it is "
                f"{prompt.text!r}; give it another id, or choose another --out"
            )
    ids = {text: id for id, text in before.items()}
    for prompt in prompts:  # one that has moved in its file has another id, and its pictures are there
        if prompt.id not in before and prompt.text in ids:
            for model in models:
                for k in range(per_prompt):
                    old, new = (picture_file(out, model.name, id, k) for id in (ids[prompt.text], prompt.id))
                    if old.is_file() and not new.is_file():
                        write_whole(new, old.read_bytes())
    now = before | {prompt.id: prompt.text for prompt in prompts}
    if now != before:
        write_whole(file, (json.dumps(now, indent=1, ensure_ascii=False) + "\n").encode())


def _check_disk(out: Path, sides: Sequence[int]) -> str:
    """One line about the pictures to draw, given by their sides, and their space on the disk."""
    if not sides:
        return f"{out} holds all pictures"
    need, free = PNG_BYTES_PER_PIXEL * sum(side**2 for side in sides), shutil.disk_usage(out).free
    line = f"{len(sides)} pictures to draw: about {need / 1e6:,.0f} MB in {out}, where {free / 1e6:,.0f} MB are free"
    if need > free:
        raise ValueError(f"{line}; free some space, or choose another --out, a smaller --num or --per-prompt")
    return line


def _check_scoring(scoring: Scoring, suite: Suite, images: Images | None, models: Sequence[Model]) -> list[str]:
    """Warnings; raises ValueError for what would only fail after hours of drawing."""
    paired = [] if images is None else [row for row in _paired(images, range(len(images)), suite) if row is not None]
    check_metrics(scoring.metrics or (), images is not None, bool(paired), scoring.features)
    if process_state().is_main_process:
        if scoring.features is not None:
            open_features(scoring.features)
        has_real, features = images is not None, scoring.features
        check_scorers(scoring.metrics or default_metrics(has_real, bool(paired), features), clip_of(features))
    if suite.name not in BENCHMARKS:
        return []
    notes = [note for model in models for note in BENCHMARKS[suite.name].check(suite, (model.size, model.size))]
    return list(dict.fromkeys(notes))


def _open_real(source: str) -> Images:
    if source.endswith((".yaml", ".yml")):
        recipe = load_recipe(source)
        return open_sources(recipe.data, stream_folder=recipe.stream_folder)
    data = Data(source=source)
    try:
        return open_sources(data)
    except ValueError:
        return open_sources(data, captions=False)  # raises for what is no set of images either


def _paired(images: Images, rows: Sequence[int], suite: Suite) -> list[int | None]:
    """The first of the rows that has each prompt as a caption."""
    by_caption = {caption.strip(): row for row in reversed(rows) for caption in images.captions(row)}
    return [by_caption.get(prompt.text.strip()) for prompt in suite.prompts]


def _usable(images: Images, out: Path) -> tuple[list[int], list[str]]:
    """Rows of the real images that can be read, and a warning about the others."""
    scan(images, range(len(images)), out / "real")
    index = read_index(out / "real")
    faults = {row: index[stamp(images, row)].error for row in range(len(images))}
    bad = [fault for fault in faults.values() if fault]
    if len(bad) == len(images):
        raise ValueError(f"none of the {len(bad)} real images can be used, such as {bad[0]}; give others with --real")
    warnings = [f"{len(bad)} real images cannot be used and are left out, such as {bad[0]}"] if bad else []
    return [row for row, fault in faults.items() if not fault], warnings


def _keep_references(references: Sequence[Picture | None], suite: Suite, at: tuple[int, int], out: Path) -> None:
    """Write OUT/references/<prompt id>.png for the report."""
    shutil.rmtree(out / "references", ignore_errors=True)
    kept = tqdm(references, "references", leave=False, mininterval=1)
    for prompt, picture in zip(suite.prompts, kept, strict=True):
        if picture is not None:
            _save(fit_image(open_picture(picture), at), out / "references" / f"{prompt.id}.png")


def _score(
    models: Sequence[Model], how: Drawing, suite: Suite, pictures: Pictures, images: Images | None, scoring: Scoring,
    out: Path, warnings: Sequence[str], device: torch.device, say: Say,
) -> Results:  # fmt: skip
    sides = {model.name: model.size for model in models}
    at = (min(sides.values()),) * 2
    notes = [*suite.warnings, *warnings]
    if len(set(sides.values())) > 1:
        listed = ", ".join(f"{name} {side}x{side}" for name, side in sides.items())
        notes.append(f"pictures of different sizes ({listed}) are compared at {at[0]}x{at[1]}, after resizing")
    usable: list[int] = []
    paired: list[int | None] = [None] * len(suite.prompts)
    if images is not None:
        usable, more = _usable(images, out)
        paired = _paired(images, usable, suite)
        notes += more
    real = [partial(images.image, row) for row in usable] if images is not None else None
    references = [None if images is None or row is None else partial(images.image, row) for row in paired]
    _keep_references(references, suite, at, out)
    features = None if scoring.features is None else open_features(scoring.features, device)
    has_references = any(row is not None for row in paired)
    names = scoring.metrics or default_metrics(real is not None, has_references, scoring.features)
    measured = measure(pictures, suite.prompts, real, references, names, features, at, how.seed, device)
    _write_pictures(out / "pictures.jsonl", suite, measured.pictures)
    costs = [_model(out, model, suite) for model in models]
    benchmarks, faults = _benchmarks(suite, pictures, out, say)
    return Results(
        suite.name, [cost for cost, _ in costs],
        [{"id": p.id, "text": p.text, "category": p.category} for p in suite.prompts], suite.per_prompt, at,
        measured.metrics, measured.values, measured.differences, measured.spectra,
        {**asdict(how), "models": {model.name: model.settings() for model in models}}, versions(),
        [*notes, *(note for _, more in costs for note in more), *measured.warnings, *faults], benchmarks,
    )  # fmt: skip


def _write_pictures(file: Path, suite: Suite, values: dict[str, dict[str, list[float]]]) -> None:
    """A line for every picture of every model with its own values, null where a prompt has no reference."""
    places = [(prompt.id, k) for prompt in suite.prompts for k in range(suite.per_prompt)]
    lines = []
    for model, columns in values.items():
        for i, (id, k) in enumerate(places):
            own = {key: column[i] if math.isfinite(column[i]) else None for key, column in columns.items()}
            lines.append(json.dumps({"model": model, "prompt": id, "k": k, **own}) + "\n")
    write_whole(file, "".join(lines).encode())


def _model(out: Path, model: Model, suite: Suite) -> tuple[found.Model, list[str]]:
    """What a model's pictures cost, and a warning of those that are not finite."""
    lines = read_lines(out / "costs" / f"{model.name}.jsonl")
    steady = [line["seconds"] for line in lines if not line["first"] for _ in line["pictures"]]
    seconds = steady or [line["seconds"] for line in lines] or [math.nan]
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    parameters, memory = (max((line[key] for line in lines), default=0) for key in ("parameters", "memory_gb"))
    side, names = model.size, {file.stem for row in files_of(out, model.name, suite) for file in row}
    broken = sorted({name for line in lines for name in line["not_finite"]} & names)
    warnings = []
    if broken:
        warnings.append(
            f"{len(broken)} of {len(names)} pictures of {model.name} held NaN or infinity and count as they came out: "
            f"{', '.join(broken[:5])}{' ...' if broken[5:] else ''}; --dtype float32 may help"
        )
    return found.Model(
        model.name, model.given, model.kind, (side, side), parameters, len(names), (low, middle, high), memory
    ), warnings  # fmt: skip


def _benchmarks(
    suite: Suite, pictures: Pictures, out: Path, say: Say
) -> tuple[dict[str, dict[str, dict[str, float]]], list[str]]:  # fmt: skip
    """The official layout of each model's pictures, the official scores that lie there by now, and what is wrong with
    them."""
    kind = BENCHMARKS.get(suite.name)
    scores: dict[str, dict[str, float]] = {}
    faults = []
    for name, rows in pictures.items() if kind else ():
        folder = out / suite.name / name
        try:
            kind.write_layout(suite, rows, folder)
            scored = kind.read_scores(folder)
        except ValueError as error:  # the rest of the evaluation is whole
            faults.append(str(error))
            continue
        if scored is None:
            say(kind.how_to_score(folder))
        else:
            scores[name] = scored
    return ({suite.name: scores} if scores else {}), faults
