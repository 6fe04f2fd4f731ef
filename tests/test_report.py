"""report.html, values.csv and grid.png: self-contained, true to results.json, safe with any prompt."""

import csv
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from asymflow_ft.evaluation import gallery, paper
from asymflow_ft.evaluation.charts import forest, spectra_chart
from asymflow_ft.evaluation.report import best, comparisons, digits, number, signed, three_digits, write_report
from asymflow_ft.evaluation.results import Difference, Metric, Model, Results, Value, load_results, save_results

ERROR = Metric("picture_error", "picture error", "lower", "colour and layout")
SCORE = Metric("clip", "CLIP score", "higher", "text and picture", "reads 77 tokens")
SHARP = Metric("sharpness", "sharpness", "closer", "differences of neighbours")
PROMPTS = [
    "red apple",
    "<script>alert('x')</script><img src=http://x.test/y onerror=z> & \"both\" 'quotes' </style>",
    "صورة قطة تجلس على سجادة حمراء",
    "一只坐在窗边的猫 &amp; {{ results }}",
    "a very " + "very " * 300 + "long prompt",
]
NONE = "\u2013"
VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Text, tables, attributes and tags; every tag must be closed in order."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.attributes, self.tags, self.rows, self.styles = [], "", [], [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles += data
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, start):
        """Cells of the row whose first cell starts with `start`."""
        return next([" ".join(cell.split()) for cell in row] for row in self.rows if row[0].strip().startswith(start))


def results_of(prompts=PROMPTS, models=("pixels", "base"), size=(24, 24), per_prompt=1, **changes):
    first, *others = models
    values = [
        Value("picture_error", first, 3.1605, 3.013, 3.3288, 60), Value("clip", first, 0.2712, 0.269, 0.274, 60),
        Value("sharpness", first, 1.48, 1.31, 1.68, 60),
    ]  # fmt: skip
    differences = []
    for other in others:
        values += [
            Value("picture_error", other, 2.5092, 2.33, 2.68, 60), Value("clip", other, 0.2711, 0.268, 0.275, 60),
            Value("sharpness", other, 1.26, 1.10, 1.43, 60),
        ]  # fmt: skip
        differences += [
            Difference("picture_error", first, other, 0.6513, 0.542, 0.773, "worse"),
            Difference("clip", first, other, 0.0001, -0.0019, 0.0021, "no difference seen"),
            Difference("sharpness", first, other, -0.22, -0.33, -0.11, "better"),
        ]
    settings = {"steps": 12, "seed": 7, "models": {first: {"weights": "a3f9"}}}
    given = {
        "suite": "prompts.txt",
        "models": [
            Model(m, f"runs/{m}", "latent" if i else "pixel", size, 5_358_144 + i, 5, (0.3, 0.5 - i / 10, 0.6), 2.0)
            for i, m in enumerate(models)
        ],
        "prompts": [{"id": f"{i:04d}-x", "text": text, "category": None} for i, text in enumerate(prompts)],
        "per_prompt": per_prompt, "compared_at": size, "metrics": [ERROR, SCORE, SHARP], "values": values,
        "differences": differences, "spectra": {}, "settings": settings, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return Results(**given | changes)


def draw(results, out, references=False):
    """A colour per kind: reference green, first model red, others blue."""
    colours = {model.name: "red" if i == 0 else "blue" for i, model in enumerate(results.models)}
    for model in results.models:
        (out / "images" / model.name).mkdir(parents=True)
        for prompt in results.prompts:
            for k in range(results.per_prompt):
                Image.new("RGB", model.size, colours[model.name]).save(
                    out / f"images/{model.name}/{prompt['id']}-{k}.png"
                )
    if references:
        (out / "references").mkdir()
        for prompt in results.prompts[:2]:
            Image.new("RGB", results.compared_at, "lime").save(out / f"references/{prompt['id']}.png")


def page_of(results, out):
    write_report(results, out)
    return Page((out / "report.html").read_text(encoding="utf-8"))


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
    results = results_of(
        prompts=PROMPTS, warnings=[hostile], settings={"negative": hostile}, suite=hostile, versions={hostile: "1"},
        models=("pixels", "base"),
    )  # fmt: skip
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
    results = results_of(
        prompts=PROMPTS, values=results.values + values, differences=results.differences + differences
    )
    results = Results(**vars(results) | {"prompts": prompts})
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


@pytest.mark.parametrize("metric", [ERROR, SCORE, SHARP], ids=lambda m: m.better)
def test_in_the_forest_better_is_right(metric):
    """lower and closer: a negative difference is the better one."""
    sign = 1 if metric.better == "higher" else -1
    for verdict, value in (("better", sign * 2.0), ("worse", sign * -2.0)):
        svg = forest(Difference(metric.key, "a", "b", value, value - 1, value + 1, verdict), metric)
        low, high = (float(re.search(rf'class="bar"[^>]*{side}="([\d.]+)"', svg)[1]) for side in ("x1", "x2"))
        middle = float(re.search(r'cx="([\d.]+)"', svg)[1])
        assert low < middle < high and f'class="forest {verdict}"' in svg
        assert (low > 100) == (verdict == "better") and (high < 100) == (verdict == "worse")
    assert forest(Difference(metric.key, "a", "b", math.nan, math.nan, math.nan, "no difference seen"), metric) == ""


def test_spectra_are_in_decibel_of_the_real_ones():
    spectra = {"frequency": [0.125, 0.25, 0.5, 0.7], "real": [8.0, 4.0, 2.0, 1.0], "a": [8.0, 4.0, 20.0, 9e9]}
    chart = spectra_chart(spectra, ["a"])
    assert (chart.names, chart.zero) == (["a"], "real")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', chart.svg)[1].split()]
    zero = float(re.search(r'class="zero"[^>]*y1="([\d.]+)"', chart.svg)[1])
    top = float(re.search(r'y1="([\d.]+)"[^>]*/><text[^>]*>\+10 dB', chart.svg)[1])
    assert [y for _, y in points] == [zero, zero, top]  # tenfold power is 10 dB; beyond half a cycle is left out
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.1)  # octaves
    without = spectra_chart({k: v for k, v in spectra.items() if k != "real"} | {"b": spectra["real"]}, ["a", "b"])
    assert (without.names, without.zero) == (["a"], "b")
    assert spectra_chart({"frequency": [0.1, 0.2], "a": [1.0, 2.0]}, ["a"]).zero is None
    assert spectra_chart({}, ["a"]) is None


def test_numbers():
    assert [number(x, 2) for x in (-0.001, 1234.5, -1.5, math.inf, math.nan)] == [
        "0.00", "1,234.50", "\u22121.50", "∞", "not a number",
    ]  # fmt: skip
    assert [signed(x, 1) for x in (0.04, 0.06, -0.04, -2)] == ["0.0", "+0.1", "0.0", "\u22122.0"]
    assert [three_digits(x) for x in (0.01234, 12.34, 1234.0, 0)] == ["0.0123", "12.3", "1,234", "0.00"]


def test_best_is_nearest_to_real_where_closer_is_better():
    results = results_of()
    assert best(ERROR, results) == {"base"} and best(SCORE, results) == {"pixels"}
    assert best(SHARP, results) == set()
    real = Results(**vars(results) | {"values": [*results.values, Value("sharpness", "real", 2.5, 2, 3, 60)]})
    assert best(SHARP, real) == {"pixels"}


PAPER = [
    (paper.TABLE_3, ("HPSv3", "HPSv2.1", "VQA", "CLIP", "FID", "pFID"), """
        10.70 0.290 0.936 0.276 15.0 18.8
        10.33 0.291 0.922 0.273 20.4 26.0
        12.03 0.293 0.922 0.277 20.2 25.4
        12.99 0.296 0.925 0.280 18.5 27.8
        13.06 0.297 0.925 0.278 19.1 22.5"""),
    (paper.TABLE_4, ("HPSv3", "DPG-Bench", "GenEval"), """
        8.20 74.7 0.55
        9.37 80.5 0.54
        8.19 78.9 0.63
        10.43 84.0 0.67
        9.52 87.8 0.86
        9.50 85.2 0.80
        8.95 83.5 0.74
        10.66 86.8 0.82"""),
]  # fmt: skip


def test_the_papers_tables(tmp_path):
    results = results_of()
    draw(results, tmp_path)
    page = page_of(results, tmp_path)
    for table, columns, text in PAPER:
        rows = [line.split() for line in text.split("\n") if line.strip()]
        assert tuple(column.title for column in table.columns) == columns
        assert [list(map(float, row)) for row in rows] == [list(numbers) for numbers in table.rows.values()]
        for name, row in zip(table.rows, rows, strict=True):
            assert page.row(name) == [name, *row]
    assert [c.better for c in paper.TABLE_3.columns] == ["higher"] * 4 + ["lower"] * 2


def test_a_run_stands_in_the_papers_tables(tmp_path):
    results = results_of(
        metrics=[SCORE, Metric("fid", "FID", "lower", "")],
        values=[Value("clip", "base", 0.2712, 0.26, 0.28, 5), Value("fid", "base", 17.25, 16, 19, 5)],
        benchmarks={"geneval": {"pixels": {"overall": 0.815, "two_object": 0.91}}, "dpg": {}}, differences=[],
        settings={"steps": 38, "guidance": 4.0, "negative": "ugly"},
    )  # fmt: skip
    draw(results, tmp_path)
    page = page_of(results, tmp_path)
    assert paper.own_rows(paper.TABLE_3, results) == {"base": [None, None, None, 0.2712, 17.25, None]}
    assert paper.own_rows(paper.TABLE_4, results) == {"pixels": [None, None, 0.815]}
    assert page.row("this run: base") == ["this run: base", *3 * [NONE], "0.271", "17.2", NONE]
    assert page.row("two_object") == ["two_object", "0.910"]
    unlike = paper.unlike(paper.TABLE_3, results)
    assert unlike == [
        "pixels draws 24 x 24 pixels, not 1024 x 1024", "base draws 24 x 24 pixels, not 1024 x 1024",
        "prompts: 5, not 10,000", "steps 38, not 32", "negative 'ugly', not ''",
    ]  # fmt: skip
    assert all(line in page.text for line in unlike)


def test_rounding_errors_are_not_shown_as_digits():
    exact = Value("retrieval_at_5", "a", 1.0, 1 - 1e-12, 1 + 1e-12, 100)
    assert number(exact.value, digits(exact)) == "1.00"
    assert digits(Value("kid", "a", 0.137, 0.129, 0.144, 100)) == 3
