"""The study's arms are recipes, and all of it runs from start to page."""

import subprocess
import sys

import pytest

from asymflow_ft.evaluation.results import load_results
from asymflow_ft.recipe import flat, load_recipe
from tests.conftest import REPOSITORY

STUDY = REPOSITORY / "recipes/study"


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import arms

    return arms.ARMS


def test_every_arm_is_another_recipe(arms):
    recipes = [load_recipe(STUDY / "conversion.yaml", arm.overrides) for arm in arms]
    for i, recipe in enumerate(recipes):
        assert not any(recipe == other and arms[i].latent == arms[j].latent for j, other in enumerate(recipes[:i]))


def test_a_sweep_changes_its_own_factor_alone(arms):
    """A subspace of another kind, pixels and LoRA bring a second key with them; all else is that of arm (e)."""
    center = flat(load_recipe(STUDY / "conversion.yaml"))
    allowed = {
        "basis": {"align.path"}, "scale": {"align.path"}, "kappa": {"loss.kappa"},
        "data": {"data.source", "data.held_out"},
        "pixels": {"align.path", "pixels.space", "pixels.mean", "pixels.std"},
        "perceptual weight": {"loss.perceptual_weight"}, "training shift": {"noise.shift"},
        "LoRA rank": {"lora", "lora.rank", "lora.dropout", "lora.ends", "train.lr"},
        "none": {"train.steps", "train.lr", "train.lr_output"},
    }  # fmt: skip
    swept = [arm for arm in arms if arm.factor is not None]
    assert len(swept) > 10
    for arm in swept:
        own = flat(load_recipe(STUDY / "conversion.yaml", arm.overrides))
        changed = {key for key in own.keys() | center.keys() if own.get(key) != center.get(key)}
        assert changed and changed <= allowed[arm.factor], (arm.name, changed)


@pytest.mark.slow
def test_the_whole_study_runs_in_small(tmp_path):
    command = [sys.executable, STUDY / "study.py", "all", "--smoke", "--out", tmp_path]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = load_results(tmp_path / "evaluation_0/results.json")
    assert [model.name for model in results.models] == ["e_perceptual", "base", "a_latent", "b_scratch"]
    assert results.value("kid", "b_scratch").count == 4
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| (b) pixels from scratch, plain | 1 |" in page
    for name in ("grid", "spectra", "sweeps"):
        assert (tmp_path / f"results_{name}.png").stat().st_size > 5000
