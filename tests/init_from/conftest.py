"""Training that starts from a converted model of the tiny base."""

import pytest

from asymflow_ft import finetune
from asymflow_ft.hub.write import export
from tests.conftest import REPOSITORY
from tests.converted import converted_lora

RECIPE = str(REPOSITORY / "recipes/tiny/finetune.yaml")
PIXELS = ["pixels.mean=[0.5, 0.0, 0.0]", "pixels.std=0.25"]
STYLE = ["lora={rank: 2, ends: false}", "loss.variance_reduction=false", "noise.shift=3"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def start(tiny_base, tmp_path_factory):
    """A conversion of rank 3, as an adapter and as a pipeline."""
    folder = tmp_path_factory.mktemp("start")
    for form in ("adapter", "pipeline"):
        export(converted_lora(tiny_base), folder / form, form)
    return folder


def arguments(out, init_from, *overrides):
    return [
        RECIPE, f"output_dir={out}", f"init_from={init_from}", "align.path=null", "align.mode=require", "data.limit=6",
        "data.held_out=2", "data.resolution=64", "sample.steps=1", "sample.count=1", "sample.judge=0",
        "sample.every=0", "train.batch_size=2", "train.warmup=1", "train.ema_start=1", "train.checkpoint_every=1",
        f"cache.folder={out.parent / 'cache'}", *PIXELS, *overrides,
    ]  # fmt: skip


def run(out, init_from, *overrides):
    return finetune.main(arguments(out, init_from, *overrides))
