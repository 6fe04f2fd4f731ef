"""report.html, values.csv and grid.png: self-contained, true to results.json, safe with any prompt."""

import csv
import json
import math
import os
import re

import numpy as np
import pytest
from PIL import Image

from asymflow_ft.evaluation import gallery
from asymflow_ft.evaluation.report import comparisons, write_report
from asymflow_ft.evaluation.results import Difference, Results, Value, load_results, save_results
from tests.report.conftest import PROMPTS, draw, page_of, results_of


def test_page_holds_all_it_needs_and_no_script(tmp_path):
    results = results_of()
    draw(results, tmp_path, references=True)
    page = page_of(results, tmp_path)
    links = [
        (tag, value) for tag, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")
    ]
    assert all(value.startswith("data:image/" if tag == "img" else "#") for tag, value in links)
    assert sum(tag == "img" for tag, _ in links) == 5 * 2 + 2
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "url(" not in page.styles and "@import" not in page.styles
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_prompts_are_shown_as_they_are(tmp_path):
    hostile = "<b>w</b> & {{ 7 * 7 }}"
    results = results_of(warnings=[hostile], settings={"negative": hostile}, suite=hostile, versions={hostile: "1"})
    draw(results, tmp_path)
    page = page_of(results, tmp_path)
    for prompt in PROMPTS:
        assert prompt in page.text
    assert page.text.count(hostile) == 6  # suite and negative prompt twice, warning, version
    paragraphs = [tag for tag, name, value in page.attributes if (name, value) == ("dir", "auto")]
    assert paragraphs.count("p") == 5 and paragraphs.count("summary") == 1  # right-to-left text; the long prompt folds


def test_numbers_verdicts_and_costs_are_those_of_the_results(tmp_path):
    results = results_of()
    draw(results, tmp_path)
    page = page_of(results, tmp_path)
    assert page.row("picture error") == [
        "picture error lower is better", "▼ worse", "3.163.01 to 3.33", "2.512.33 to 2.68", "+0.65+0.54 to +0.77", "",
    ]  # fmt: skip
    assert page.row("CLIP score") == [
        "CLIP score higher is better", "○ no difference seen", "0.27120.2690 to 0.2740", "0.27110.2680 to 0.2750",
        "+0.0001\u22120.0019 to +0.0021", "",
    ]  # fmt: skip
    assert page.row("sharpness")[1] == "▲ better" and page.row("sharpness")[4] == "\u22120.22\u22120.33 to \u22120.11"
    text = " ".join(page.text.split())
    assert "Did pixels beat base? ▲ better in sharpness ▼ worse in picture error ○ no difference seen in CLIP" in text
    assert (
        "Cost. 0.500 s per picture against 0.400 s (1.2 times); 2.00 GB of memory against 2.00 GB (the same)." in text
    )
    assert comparisons(results)[0].sentence == (
        "pixels against base: better in sharpness; worse in picture error; no difference seen in CLIP score"
    )
    assert page.row("pixels")[1:5] == ["pixel", "5,358,144", "24 \u00d7 24", "5"]
    assert ["models.pixels.weights", "a3f9"] in page.rows and ["torch", "2.13.0"] in page.rows


def test_a_model_alone_needs_no_comparison(tmp_path):
    results = results_of(models=("pixels",))
    draw(results, tmp_path)
    page = page_of(results, tmp_path)
    assert page.row("picture error") == ["picture error lower is better", "3.163.01 to 3.33"]
    assert "pixels was drawn alone" in page.text and "worse ←" not in page.text


def test_several_models_and_sizes(tmp_path):
    results = results_of(models=("pixels", "base", "finetune"), compared_at=(16, 16))
    draw(results, tmp_path)
    page = page_of(results, tmp_path)
    assert page.row("metric") == ["metric", "pixels", "base", "finetune"]
    assert "Did pixels beat base?" in page.text and "Did pixels beat finetune?" in page.text
    assert "compared at 16 \u00d7 16 pixels" in page.text


def test_categories(tmp_path):
    values = [
        Value("picture_error", "pixels", 3.35, 3.1, 3.6, 3, "animals"),
        Value("picture_error", "pixels", 2.89, 2.6, 3.1, 2, "a<b>"),
    ]
    differences = [
        Difference("picture_error", "pixels", "base", 0.81, 0.50, 1.17, "worse", "animals"),
        Difference("picture_error", "pixels", "base", -0.66, -0.85, -0.49, "better", "a<b>"),
    ]
    results = results_of()
    prompts = [prompt | {"category": "animals" if i < 3 else "a<b>"} for i, prompt in enumerate(results.prompts)]
    more = {"prompts": prompts, "values": results.values + values, "differences": results.differences + differences}
    results = Results(**vars(results) | more)
    draw(results, tmp_path)
    page = page_of(results, tmp_path)
    assert page.row("category") == ["category", "picture error"]
    assert page.row("animals") == ["animals3 prompts", "3.35▼ +0.81+0.50 to +1.17"]
    assert page.row("a<b>") == ["a<b>2 prompts", "2.89▲ \u22120.66\u22120.85 to \u22120.49"]
    text = " ".join(page.text.split())
    assert "Where. More metrics better than worse: a<b>. More metrics worse than better: animals." in text


def test_gains_and_losses_come_first(tmp_path):
    prompts = [f"prompt {i}" for i in range(20)]
    results = results_of(prompts=prompts)
    draw(results, tmp_path)
    order = [3, 7, 11, 2, 19]  # gain most
    error = {i: -(5 - order.index(i)) if i in order else i / 100 for i in range(20)}
    with open(tmp_path / "pictures.jsonl", "w") as file:
        for i in range(20):
            for model, value in (("pixels", 10 + error[i]), ("base", 10)):
                line = {"model": model, "prompt": f"{i:04d}-x", "k": 0, "picture_error": value, "sharpness": 1.0}
                file.write(json.dumps(line) + "\n")
    found = gallery.gather(results, tmp_path)
    titles = list(found.groups)
    shown = [[int(row.prompt["text"].split()[1]) for row in rows] for rows in found.groups.values()]
    assert shown[0] == [3, 7, 11, 2] and "gains most" in titles[0] and "picture error" in titles[0]
    assert shown[1] == [18, 17, 16, 15] and "loses most" in titles[1]
    assert [found.groups[title][0].gain for title in titles[:2]] == [5, pytest.approx(-0.18)]
    assert (found.shown, found.total) == (len({i for group in shown for i in group}), 20)
    (tmp_path / "pictures.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"pictures\.jsonl, line 1 cannot be read"):
        write_report(results, tmp_path)


def test_the_random_choice_stays_when_prompts_come_and_move():
    few = results_of(prompts=[f"prompt {i}" for i in range(40)])
    many = Results(**vars(few) | {"prompts": [{"id": "new", "text": "", "category": None}, *few.prompts[::-1]]})
    ids = [[r.prompts[p]["id"] for p, _ in gallery.random_places(r, 8)] for r in (few, many)]
    assert [id for id in ids[1] if id != "new"] == ids[0][: 8 - ids[1].count("new")]
    assert ids[0] != sorted(ids[0])


def test_thousands_of_prompts_with_large_pictures_stay_below_the_limit(tmp_path):
    results = results_of(prompts=[f"prompt {i}" for i in range(2500)], models=("a", "b", "c", "d"), size=(600, 600))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")  # what compresses worst
    for model in results.models:
        (tmp_path / "images" / model.name).mkdir(parents=True)
        for p, k in gallery.random_places(results, 8):
            os.link(tmp_path / "noise.png", gallery.picture_file(tmp_path, model.name, results.prompts[p]["id"], k))
    page = page_of(results, tmp_path)
    assert 5e6 < (tmp_path / "report.html").stat().st_size < 15e6
    shown = re.search(r"([\d,]+) of 2,500 are in this page", page.text)
    assert 1 < int(shown[1]) < 8
    assert sum(tag == "article" for tag in page.tags) == int(shown[1])


def test_a_missing_picture_is_named(tmp_path):
    results = results_of()
    draw(results, tmp_path)
    (tmp_path / "images/base/0002-x-0.png").unlink()
    with pytest.raises(ValueError, match=r"0002-x-0\.png"):
        write_report(results, tmp_path)


def test_csv_holds_the_values(tmp_path):
    values = [*results_of().values, Value("clip", 'a, "b"\n', 1 / 3, -math.inf, 1e-17, 12, "ünï")]
    results = results_of(values=values)
    draw(results, tmp_path)
    write_report(results, tmp_path)
    with open(tmp_path / "values.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["model", "metric", "category", "value", "low", "high", "count"]
    read = [
        Value(r["metric"], r["model"], float(r["value"]), float(r["low"]), float(r["high"]), int(r["count"]),
              r["category"] or None)
        for r in rows
    ]  # fmt: skip
    assert read == values


def test_grid_shows_reference_then_base_then_the_model(tmp_path):
    results = results_of()
    draw(results, tmp_path, references=True)
    write_report(results, tmp_path)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    rows = {
        name: np.argwhere((pixels == colour).all(-1))
        for name, colour in {"reference": (0, 255, 0), "base": (0, 0, 255), "pixels": (255, 0, 0)}.items()
    }
    assert [len(found) for found in rows.values()] == [2 * 24 * 24, 5 * 24 * 24, 5 * 24 * 24]
    tops = [found[:, 0].min() for found in rows.values()]
    assert tops == sorted(tops)


def test_saved_results_make_the_same_page(tmp_path):
    results = results_of()
    draw(results, tmp_path)
    write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_bytes()
    save_results(results, tmp_path / "results.json")
    write_report(load_results(tmp_path / "results.json"), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == page
