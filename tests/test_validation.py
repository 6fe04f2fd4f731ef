"""The curves of the metrics of a run's own samples."""

import json
from types import SimpleNamespace

from asymflow_ft.training.validation import Validation


def test_points_of_the_metrics_log_are_of_the_same_prompts_and_outlive_an_interruption(tmp_path):
    """A resumed run draws step 0 again, and whatever lies after its checkpoint."""
    tracked = []
    run = SimpleNamespace(
        out=tmp_path, recipe=SimpleNamespace(sample=SimpleNamespace(count=2)),
        measure=lambda pictures: ({}, {"pictures": len(pictures), "first": pictures[0]}),
        accelerator=SimpleNamespace(log=lambda values, step: tracked.append((step, values))),
    )  # fmt: skip
    for step, pictures in ((0, "abcd"), (100, "ef"), (200, "gh"), (0, "abcd"), (200, "ij"), (300, "klmn")):
        Validation.log(run, step, list(pictures))
    lines = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["first"]) for line in lines] == [(0, "a"), (100, "e"), (200, "i"), (300, "k")]
    assert {line["pictures"] for line in lines} == {2}
    assert tracked[1] == (100, {"metrics/pictures": 2, "metrics/first": "e"})
