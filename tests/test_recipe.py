"""Recipes: shipped ones load, what is saved reads back, and mistakes are answered."""

from dataclasses import replace

import pytest
import yaml

from asymflow_ft.recipe import Part, load_recipe, save_recipe
from tests.conftest import REPOSITORY

SHIPPED = sorted(f for f in (REPOSITORY / "recipes").rglob("*.yaml") if f.parent.name != "accelerate")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_round_trip(file, tmp_path):
    recipe = load_recipe(file)
    save_recipe(recipe, tmp_path / "saved.yaml", header="one\ntwo")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_paper_constants():
    recipe = load_recipe(REPOSITORY / "recipes/flux2_klein_9b_paper.yaml")
    train = recipe.train
    assert (recipe.noise.shift, recipe.loss.mse, recipe.loss.kappa, recipe.loss.sigma_floor) == (17.0, 5.0, 0.3, 0.05)
    assert (train.steps, train.lr, train.lr_output, train.betas) == (15000, 1e-4, 1e-3, (0.9, 0.95))
    assert (train.clip_norm, train.clip_after, train.warmup, train.ema_gamma) == (200.0, 100, 100, 7.0)
    assert (recipe.lora.rank, recipe.lora.dropout, recipe.sample.steps, recipe.sample.guidance) == (256, 0.05, 32, 4.0)


def test_overrides():
    file = REPOSITORY / "recipes/tiny/finetune.yaml"
    recipe = load_recipe(file, ["train.steps=7", "train.lr=1e-5", "lora={rank: 4}", "loss.kappa=null", "seed=3"])
    assert (recipe.train.steps, recipe.train.lr, recipe.lora.rank, recipe.loss.kappa, recipe.seed) == (
        7,
        1e-5,
        4,
        None,
        3,
    )
    assert replace(recipe, seed=0) != recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=3", r"unknown recipe key train.stpes; did you mean train.steps\?"),
        ("outputdir=x", r"did you mean output_dir\?"),
        ("train.steps=many", "train.steps is 'many'; it must be a whole number"),
        ("train.steps=0", "train.steps is 0; it must be positive"),
        ("train.optimizer=sgd", "must be one of 'adamw8bit', 'adamw'"),
        ("train.betas=0.9", "it must be a list"),
        ("train=5", "must be a section"),
        ("seed.x=5", "seed is 0 in the recipe, not a section"),
        ("steps", "not of the form key=value"),
        ("train.keep_every=100", r"train.keep_every is 100; checkpoints are made every 300 steps"),
        ("train.keep_every=0", "must be a multiple of that"),
        ("train.gradient_checkpointing=1", "train.gradient_checkpointing is 1; it must be one of true, false"),
        (
            "train.gradient_checkpointing=some",
            "train.gradient_checkpointing is 'some'; it must be one of true, false, 'selective'",
        ),
        ("train.base_weights=nf4", "all weights are trained; quantised weights cannot be"),
        ("train.ema_device=gpu", "must be one of 'same', 'cpu'"),
        ("train.caption_dropout=1.5", r"must be in \[0, 1\)"),
        ("data.source=null", "the recipe lacks data.source"),
        ("data.mix=[{source: x}]", "data.source is 'recipes/tiny/data' and data.mix is given too"),
        (
            "data.mix=[{source: x}, {source: y, wieght: 2}]",
            r"key data.mix\[1\].wieght; did you mean data.mix\[1\].weight",
        ),
        ("data.mix=[{weight: 2}]", r"the recipe lacks data.mix\[0\].source"),
        ("data.streaming=true", "data.streaming of recipes/tiny/data needs data.limit"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(REPOSITORY / "recipes/tiny/finetune.yaml", [override])


def test_a_mix_is_saved_and_read_back(tmp_path):
    mix = "[{source: a, weight: 2}, {source: b/c, weight: 0.5, split: test, limit: 3, streaming: true}]"
    recipe = load_recipe(REPOSITORY / "recipes/tiny/finetune.yaml", ["data.source=null", f"data.mix={mix}"])
    assert recipe.data.parts() == (Part("a", 2.0), Part("b/c", 0.5, split="test", limit=3, streaming=True))
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_missing_keys_and_files(tmp_path):
    with pytest.raises(ValueError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"base": "x"}))
    with pytest.raises(ValueError, match="the recipe lacks output_dir, data, sample"):
        load_recipe(tmp_path / "short.yaml")
