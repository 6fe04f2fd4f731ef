"""Charts, numbers as people write them, and the paper's tables."""

import math
import re

import pytest

from asymflow_ft.evaluation import paper
from asymflow_ft.evaluation.charts import forest, spectra_chart
from asymflow_ft.evaluation.report import best, digits, number, signed, three_digits
from asymflow_ft.evaluation.results import Difference, Metric, Results, Value
from tests.report.conftest import ERROR, SCORE, SHARP, draw, page_of, results_of

NONE = "\u2013"


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


def test_rounding_errors_are_not_shown_as_digits():
    exact = Value("retrieval_at_5", "a", 1.0, 1 - 1e-12, 1 + 1e-12, 100)
    assert number(exact.value, digits(exact)) == "1.00"
    assert digits(Value("kid", "a", 0.137, 0.129, 0.144, 100)) == 3


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
