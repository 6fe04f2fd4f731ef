"""Training with and without the cache, and while its images change."""

import json
import multiprocessing
import re

import pytest

from asymflow_ft import cli, finetune
from tests.conftest import REPOSITORY
from tests.prepare.conftest import CAPTIONS, RECIPE, keys, noise, prepared_of, write_table


@pytest.fixture(scope="module")
def subspace(tmp_path_factory, tiny_base, tiny_data):
    out = tmp_path_factory.mktemp("align") / "subspace"
    arguments = ["--recipe", str(REPOSITORY / RECIPE), "--base", tiny_base, "--data", tiny_data, "--out", str(out)]
    assert cli.main(["align", *arguments, "--num-images", "12", "--resolution", "128"]) == 0
    return out


@pytest.fixture
def train(subspace):
    def train(data, out, *overrides):
        settings = [
            f"align.path={subspace}", "lora={rank: 2, dropout: 0.0}", "train.steps=3", "train.batch_size=2",
            "train.caption_dropout=0.4", "train.warmup=0", "sample.steps=1", "sample.count=1", "sample.judge=0",
            "sample.guidance=1", "sample.every=0", "data.workers=0",
        ]  # fmt: skip
        return finetune.main([RECIPE, *keys(data, out, *settings, *overrides)])

    return train


def test_an_image_that_changes_during_the_run_ends_it_with_one_message(train, data, tmp_path, monkeypatch, capsys):
    def loader(recipe, samples, *rest, original=finetune.loader):
        for entry in samples.entries:
            noise(90 + entry.row).save(data / f"{entry.row}.bmp")
        first = samples[0, 0]
        assert isinstance(first, ValueError) and "changed since the run looked at it" in str(first)
        return original(recipe, samples, *rest)

    monkeypatch.setattr(finetune, "loader", loader)
    assert train(data, tmp_path / "run", "data.workers=1") == 1
    assert not multiprocessing.active_children()  # whom the program would wait for at its end, for ever
    error = capsys.readouterr().err
    assert error.count("changed since") == 1 and "Traceback" not in error
    assert re.search(r"error: .*\.bmp changed since the run looked at it; start the command again", error)


def test_cached_uncached_and_fp8_training_agree(train, data, tmp_path, capsys):
    write_table(data, [[text, f"a drawn {text}"] for text in CAPTIONS])
    losses = {}
    for name, *overrides in (("cached",), ("live", "cache.enabled=false"), ("fp8", "cache.text=fp8")):
        assert train(data, tmp_path / name, *overrides) == 0
        lines = (tmp_path / name / "logs/train.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["cached"]) == 3 and losses["live"] == pytest.approx(losses["cached"], rel=1e-5)
    assert losses["fp8"] == pytest.approx(losses["cached"], rel=0.05) and losses["fp8"] != losses["cached"]
    assert not (tmp_path / "live/cache/text").exists()
    told = float(re.search(r"rounded by ([\d.]+)% \(root mean square\)", capsys.readouterr().out)[1])
    exact, narrow = (prepared_of(data, tmp_path / name, *o).encoded
                     for name, *o in (("cached",), ("fp8", "cache.text=fp8")))  # fmt: skip
    for caption in CAPTIONS:
        error = (narrow.embeds(caption) - exact.embeds(caption)).norm() / exact.embeds(caption).norm()
        assert 0.005 < error < 0.04 and error == pytest.approx(told / 100, rel=0.2)
