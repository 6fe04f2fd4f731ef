"""What `--dry-run` makes of data.more_resolutions."""

import re
from dataclasses import replace

import pytest

from asymflow_ft.families import flux2
from asymflow_ft.families.base import transformer_on_meta, vae_on_meta
from asymflow_ft.recipe import override
from asymflow_ft.training import memory, plan
from tests.conftest import REPOSITORY
from tests.test_memory import tiny_recipe


@pytest.fixture(scope="module")
def parts(tiny_base):
    return transformer_on_meta(flux2, tiny_base), vae_on_meta(tiny_base)


@pytest.fixture(scope="module")
def planned(parts):
    def plan_of(resolution, *more):
        keys = f"data.resolution={resolution}", f"data.more_resolutions={[*more]}", "train.batch_size=2"
        return memory.plan_memory(tiny_recipe(*keys), flux2, *parts, text_encoder=0)

    return {sides: plan_of(*sides) for sides in ((64,), (128,), (64, 96, 128), (128, 64))}


def test_memory_is_that_of_the_largest_resolution(planned):
    low, high = planned[64,], planned[128,]
    for sides, drawn in (((64, 96, 128), low), ((128, 64), high)):
        both = planned[sides]
        assert (both.step, both.encoding) == (high.step, high.encoding) != (low.step, low.encoding)
        assert (both.drawing, both.decoding) == (drawn.drawing, drawn.decoding)  # at data.resolution
    assert low.drawing < high.drawing and low.decoding < high.decoding


def test_time_is_the_mean_over_the_resolutions(planned, parts):
    def hours(*sides, **keys):
        one = planned[sides]
        steps = memory.steps_by_resolution(one, flux2, *parts)
        assert set(steps) == {*sides}
        recipe = override(one.recipe, [f"{section}={value}" for section, value in keys.items()])
        lines = "".join(plan.describe_time(replace(one, recipe=recipe), steps, tflops=1e-6))
        assert ("TFLOP per step and process on average: " in lines) == (len(sides) > 1)
        return float(re.search(r"([\d.e+]+) hours at", lines)[1])

    training = {"sample": "{prompts: x, every: 0, judge: 0, steps: 1, count: 1}"}
    low, high, both = hours(64, **training), hours(128, **training), hours(128, 64, **training)
    assert both == pytest.approx((low + high) / 2, rel=0.01) and high > 2 * low
    # pictures are drawn at data.resolution
    pictures = {"train.steps": 1, "train.accumulation": 1, "sample": "{prompts: x, every: 0, judge: 0, count: 900}"}
    assert hours(128, 64, **pictures) == pytest.approx(hours(128, **pictures), rel=0.01)


def test_the_report_says_what_it_takes_for_granted(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(plan, "advise", lambda *_: [])  # rehearses many more
    monkeypatch.setattr(plan, "less_recomputation", lambda *_: None)
    keys = f"output_dir={tmp_path}", "data.resolution=64", "data.more_resolutions=[32]"
    text = plan.dry_run(tiny_recipe(*keys), tflops=1.0)
    assert "resolutions 64, 32: the figures above take every image to fill each of them" in text


def test_latents_on_disk_are_counted_once_for_each_size():
    data = tiny_recipe("data.resolution=64", "data.more_resolutions=[128,64]", "data.held_out=3").data
    assert plan.latent_tokens(data, 10, 2, 16) == 7 * (16 + 64) + 3 * 16 + 2 * (16 + 64)
    fixed = replace(data, condition_resolution=32)
    assert plan.latent_tokens(fixed, 10, 2, 16) == 7 * (16 + 64) + 3 * 16 + 2 * 4
    assert plan.latent_tokens(replace(data, more_resolutions=()), 10, 2, 16) == 12 * 16


@pytest.mark.parametrize(
    ("overrides", "advised"),
    [
        (("data.resolution=512", "data.more_resolutions=[768,256,640]"), "data.more_resolutions=[256,640]"),
        (("data.resolution=512", "data.more_resolutions=[768]"), "data.more_resolutions=[]"),
        (("data.resolution=768", "data.more_resolutions=[512]"), "data.resolution=576"),
        (("data.resolution=128",), None),
    ],
)
def test_the_resolution_that_is_advised_is_the_one_that_takes_the_memory(overrides, advised):
    recipe = tiny_recipe(*overrides)
    found = [keys[0] for keys in memory.options(recipe) if "resolution" in keys[0]]
    assert found == ([] if advised is None else [advised])
    for key in found:
        assert max(override(recipe, [key]).data.resolutions()) < max(recipe.data.resolutions())
