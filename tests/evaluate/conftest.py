"""Two small converted models, and evaluations of them and their base."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from asymflow_ft.drawing import Drawing
from asymflow_ft.evaluate import Scoring, evaluate
from asymflow_ft.evaluation.suites import Prompt, Suite
from asymflow_ft.hub.write import export
from tests.converted import converted_lora

TEXTS = ["red apple", "rocket", "deer"]
HOW = Drawing(steps=2, seed=7, dtype="float32")


def suite(texts, per_prompt=1):
    ids = [f"{i:04d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" for i, text in enumerate(texts)]
    return Suite("prompts.txt", [Prompt(text, id) for text, id in zip(texts, ids, strict=True)], per_prompt, [])


def pictures(out, name):
    """Pixels by (text, number)."""
    ids = json.loads((out / "prompts.json").read_text())
    found = {}
    for file in sorted((out / "images" / name).iterdir()):
        id, _, number = file.stem.rpartition("-")
        found[ids[id], int(number)] = np.array(Image.open(file), dtype=int)
    return found


def assert_alike(left, right):
    """Up to the rounding of other batches."""
    assert left.keys() == right.keys()
    for key in left:
        difference = np.abs(left[key] - right[key])
        assert difference.max() <= 1 and difference.mean() < 0.01, key


def stamps(out):
    return {file: file.stat().st_mtime_ns for file in (out / "images").rglob("*.png")}


@pytest.fixture(scope="session")
def models(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    export(converted_lora(tiny_base), folder / "mine/pipeline", "pipeline")
    export(converted_lora(tiny_base, seed=1), folder / "other", "adapter")
    return folder


@pytest.fixture
def run(models, tiny_base):
    def run(out, texts=TEXTS, against=(f"base={tiny_base}",), how=HOW, per_prompt=1, batch_size=2, **more):
        pipeline = more.pop("pipeline", str(models / "mine/pipeline"))
        scoring = Scoring(real=more.pop("real", None))
        return evaluate(pipeline, against, suite(texts, per_prompt), out, how, scoring, per_prompt=per_prompt,
                        batch_size=batch_size, say=more.pop("say", lambda line: None), **more)  # fmt: skip

    return run


@pytest.fixture(scope="session")
def drawn(models, tiny_base, tmp_path_factory):
    """A finished evaluation of three prompts with two pictures each, one at a time."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    against = [str(models / "other"), f"base={tiny_base}"]
    evaluate(str(models / "mine/pipeline"), against, suite(TEXTS, 2), out, HOW, Scoring(), batch_size=1)
    return out
