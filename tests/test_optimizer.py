"""Who learns at which rate, and when."""

from dataclasses import replace

import pytest
import torch

from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.families.base import transformer_on_meta
from asymflow_ft.recipe import load_recipe
from asymflow_ft.training import trainable
from asymflow_ft.training.optimizer import make_optimizer, rate_factor, set_rates
from tests.conftest import REPOSITORY

RATES = ["train.lr=1e-4", "train.lr_ends=2e-4", "train.lr_output=3e-4", "train.warmup=10", "train.steps=110"]


def recipe_of(*overrides):
    return load_recipe(REPOSITORY / "recipes/tiny/finetune.yaml", [*RATES, *overrides])


@pytest.fixture(scope="module")
def network():
    network = flux2.lift(transformer_on_meta(flux2, str(REPOSITORY / "recipes/tiny/base")), PixelSubspace().to("meta"))
    trainable.attach_lora(network, flux2.lora_targets(network), flux2.TRAINED_ENDS, rank=4, dropout=0.0)
    return network


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_trunk_ends_and_output_have_their_own_rates(network, kind):
    parameters = trainable.trained_parameters(network)
    recipe = recipe_of(f"train.optimizer={kind}")
    optimizer = make_optimizer(recipe, parameters, flux2.TRAINED_ENDS, flux2.OUTPUT_LAYER)
    names = {id(p): trainable.diffusers_name(name) for name, p in parameters.items()}
    groups = {group["lr"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups[3e-4] == {"proj_out.weight"}
    assert groups[2e-4] == {"x_embedder.weight", "norm_out.linear.weight"}
    assert groups[1e-4] == {name for name in names.values() if "lora_" in name} and len(groups) == 3

    set_rates(optimizer, 0, recipe.train)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-7, 2e-7, 3e-7])
    set_rates(optimizer, 10, recipe.train)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 2e-4, 3e-4])


def test_ends_follow_the_trunk_unless_told_otherwise(network):
    parameters = trainable.trained_parameters(network)
    recipe = recipe_of("train.lr_ends=null")
    optimizer = make_optimizer(recipe, parameters, flux2.TRAINED_ENDS, flux2.OUTPUT_LAYER)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-4, 3e-4]


def test_schedules():
    constant = replace(recipe_of().train, schedule="constant")
    cosine = replace(constant, schedule="cosine")
    for train in (constant, cosine):
        assert [rate_factor(step, train) for step in (0, 5, 10)] == pytest.approx([1e-3, 0.5005, 1.0])
    assert {rate_factor(step, constant) for step in range(10, 500)} == {1.0}
    assert [rate_factor(step, cosine) for step in (35, 60, 110, 500)] == pytest.approx(
        [0.855, 0.505, 0.01, 0.01], abs=1e-3
    )
    falling = torch.tensor([rate_factor(step, cosine) for step in range(10, 111)])
    assert (falling.diff() < 0).all()
