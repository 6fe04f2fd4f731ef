"""Two thousand mutated recipes: each is refused in one clear sentence, or is a recipe that reads back as itself."""

import random
from copy import deepcopy

import pytest
import yaml

from asymflow_ft.recipe import load_recipe, save_recipe
from tests.conftest import REPOSITORY

SHIPPED = sorted((REPOSITORY / "recipes").glob("**/*.yaml"))
VALUES = [
    None, True, False, 0, 1, -1, 3.5, -0.0, 1e400, float("nan"), "", "no", "1e-4", "abc", "../..", [], [1], ["x"],
    [0.9, 0.95, 1], {}, {"rank": 4}, {"a": {"b": 1}}, 10**30, "\x00", "é" * 300, [None], [[]], "2024-01-01",
]  # fmt: skip


def sections(values, path=()):
    yield path, values
    for key, value in values.items():
        if isinstance(value, dict):
            yield from sections(value, (*path, key))


def mutate(values, rng):
    _, target = rng.choice(list(sections(values)))
    keys = list(target)
    kind = rng.randrange(6)
    if kind == 0 and keys:
        del target[rng.choice(keys)]
    elif kind == 1 and keys:  # a typing mistake
        key = rng.choice(keys)
        at = rng.randrange(len(str(key)) + 1)
        target[str(key)[:at] + rng.choice("abx_ ") + str(key)[at:]] = target.pop(key)
    elif kind == 2:
        target[rng.choice(["steps", "extra", "", 5, None, "base", "lora"])] = deepcopy(rng.choice(VALUES))
    elif keys:
        target[rng.choice(keys)] = deepcopy(rng.choice(VALUES))


@pytest.mark.parametrize("seed", range(20))
def test_mutated_recipes(seed, tmp_path):
    rng = random.Random(seed)
    accepted = 0
    for number in range(100):
        values = yaml.safe_load(rng.choice(SHIPPED).read_text())
        for _ in range(rng.randint(1, 2)):
            mutate(values, rng)
        text = yaml.safe_dump(values)
        if number % 10 == 0:  # and plain damage to the text
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(["{", ":", "\t", "- ", "'", "\x07", "&a"]) + text[at:]
        file = tmp_path / "mutated.yaml"
        file.write_text(text)
        try:
            recipe = load_recipe(file)
        except ValueError as error:
            assert 20 < len(str(error)) < 1500, error
        else:
            accepted += 1
            if accepted % 5 == 0:
                save_recipe(recipe, tmp_path / "saved.yaml")
                assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert 0 < accepted < 95


def test_mutated_overrides():
    rng = random.Random(0)
    file = REPOSITORY / "recipes/tiny/finetune.yaml"
    keys = ["train.lr", "train", "lora.rank", "pixels.mean", "data.held_out", "seed", "", ".", "a.b.c", "sample.shift"]
    values = [
        "1",
        "-1",
        "nan",
        "inf",
        "{",
        "[1",
        "'",
        "null",
        "{a: 1}",
        "[1, 2, 3]",
        "*x",
        "",
        "=",
        "1=2",
        "no",
        "1e309",
    ]
    for _ in range(500):
        try:
            load_recipe(file, [rng.choice(keys) + rng.choice(["=", "", "=="]) + rng.choice(values)])
        except ValueError as error:
            assert str(error)
