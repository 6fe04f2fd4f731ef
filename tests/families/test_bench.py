"""Benchmarks take the configs of every family."""

from asymflow_ft.bench.architectures import find_architecture


def test_a_benchmark_takes_its_config(tiny):
    found = find_architecture(f"{tiny.folder}/transformer")
    assert found.family is tiny.family
    assert found.guidance is None or tiny.guidance() is not None
