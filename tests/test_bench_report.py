"""Figures as a terminal shows them: the unit is that of the rounded figure, and none is a power of ten."""

import re
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from asymflow_ft.bench.architectures import NAMED
from asymflow_ft.bench.clock import Timing
from asymflow_ft.bench.report import digits, rate, seconds, size, step_table
from asymflow_ft.bench.step import bench_step
from asymflow_ft.bench.workload import Options
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (seconds(0.9994), "999 ms"),
        (seconds(0.9996), "1 s"),
        (seconds(1234.0), "1230 s"),
        (seconds(0.0), "0 ms"),
        (seconds(1.234e-8), "0.0000123 ms"),
        (rate(0.9996), "1 TFLOP/s"),
        (rate(0.1234), "123 GFLOP/s"),
        (rate(2345.0), "2340 TFLOP/s"),  # half to even
        (size(99.94e6), "99.9 MB"),
        (size(99.96e6), "0.1 GB"),
        (size(1.234e12), "1230 GB"),
        (size(12), "0.000012 MB"),
        (size(None), "not measured"),
        (digits(1e15), "1000000000000000"),
    ],
)
def test_a_figure_and_its_unit(shown, expected):
    assert shown == expected


def test_every_power_of_ten_is_written_out():
    for power in range(-12, 16):
        for show in (seconds, size, rate, digits):
            assert re.fullmatch(r"[\d.]+( \S+)?", show(9.996 * 10.0**power)), (show, power)


def test_a_table_of_a_large_network():
    options = Options(resolution=64, precision="no", rank=2, perceptual="none", repeats=1, warmup=0)
    step = bench_step(NAMED["tiny"], options, CPU)
    large = {"operations": {"step": 1.3e15, "forward": 3.25e14}, "samples_per_second": 1234.0, "tflops": 2340.0}
    shown = step_table(step | large)
    assert "1230 samples/s" in shown
    assert "counted: 1300 TFLOP a step, 4.00 forward passes of 325; 2340 TFLOP/s" in shown


def test_the_rows_of_the_docs(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    pairs = import_module("performance_pairs")
    timing = Timing(1.0, 1.0, 1.0, 1, processor=0.9996)
    timings = {"before": timing, "after": replace(timing, processor=1234.0)}
    monkeypatch.setattr(pairs, "interleaved", lambda *_: timings)
    monkeypatch.setattr(pairs, "peak_megabytes", lambda work: 1234.0)
    same = pairs.Pair("same", lambda: torch.ones(1), lambda: torch.ones(1), memory=True)
    assert "| 1 s; 1230 MB | 1230 s; 1230 MB |" in pairs.measure("row", same, small=True)
