"""Six small pictures with captions, and `asymflow-ft cache` on them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from asymflow_ft import cli
from asymflow_ft.data.source import open_sources
from asymflow_ft.families import flux2
from asymflow_ft.recipe import load_recipe
from asymflow_ft.training import encode as encode_module
from asymflow_ft.training import stages
from asymflow_ft.training.encode import Encoder

RECIPE = "recipes/tiny/finetune.yaml"
CAPTIONS = ["red apple", "rocket", "deer", "badger", "rainbow", "crescent moon"]
PROMPTS = ["owl"]


@pytest.fixture(autouse=True)
def small_shards(in_repository, monkeypatch):
    monkeypatch.setattr(stages, "TEXT_SHARD", 2)
    monkeypatch.setattr(stages, "LATENT_SHARD", 2)
    monkeypatch.setattr(encode_module, "free_memory", lambda: None)  # takes longer than all else on these models


def noise(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def write_table(folder, captions):
    rows = [{"file_name": f"{i}.bmp", "text": text} for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def data(tmp_path):
    """Six pictures of one size; as BMP, files of one size, too."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(len(CAPTIONS)):
        noise(i).save(folder / f"{i}.bmp")
    write_table(folder, CAPTIONS)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def keys(data, out, *overrides):
    values = {
        "output_dir": out, "data.source": data, "data.resolution": 64, "data.held_out": 1, "text.max_length": 32,
        "sample.prompts": data.parent / "prompts.txt",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()] + list(overrides)


def cache(data, out, *overrides, verify=False):
    return cli.main(["cache", "--recipe", RECIPE, *keys(data, out, *overrides), *["--verify"][: int(verify)]])


def recipe_of(data, out, *overrides):
    return load_recipe(RECIPE, keys(data, out, *overrides))


def prepared_of(data, out, *overrides):
    recipe = recipe_of(data, out, *overrides)
    return stages.prepare(recipe, flux2, open_sources(recipe.data), 16, Accelerator())


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for kind in ("text", "latents")
            for path in sorted((out / "cache" / kind).iterdir())}  # fmt: skip


@pytest.fixture
def encoded(monkeypatch):
    """Captions and image rows that the models were asked for since it was last emptied."""
    seen = SimpleNamespace(texts=set(), images=set())

    def captions(self, texts, original=Encoder.encode_captions):
        seen.texts |= set(texts)
        return original(self, texts)

    def image(self, entry, rgb, original=Encoder.encode_image):
        seen.images.add((entry.row, entry.size))
        return original(self, entry, rgb)

    monkeypatch.setattr(Encoder, "encode_captions", captions)
    monkeypatch.setattr(Encoder, "encode_image", image)
    return seen
