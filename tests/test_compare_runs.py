"""asymflow-ft compare-runs: figures as they are in the run folders, differences of recipes, refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from asymflow_ft import cli
from asymflow_ft.evaluation.compare import SOFTWARE, compare_runs, curve, smooth
from asymflow_ft.recipe import load_recipe, save_recipe
from tests.conftest import REPOSITORY


def make_run(folder, losses, *overrides, state="finished", batch=8, sharpness=None, metrics=()):
    """A run folder as finetune writes it; `sharpness` makes it a finished one."""
    (folder / "logs").mkdir(parents=True)
    recipe = load_recipe(REPOSITORY / "recipes/tiny/finetune.yaml", [f"output_dir={folder}", *overrides])
    save_recipe(recipe, folder / "recipe.yaml", "resolved recipe")
    lines = [{"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses, 1)]
    (folder / "logs/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    step = {"state": state, "step": len(losses), "images_per_step": batch}
    (folder / "status.json").write_text(json.dumps(step))
    (folder / "logs/held_out_step_0.json").write_text(json.dumps({"0.3": 0.25, "0.7": 0.5}))
    if sharpness is not None:
        final = {
            "held_out_error": {"step 0": {"0.3": 0.25, "0.7": 0.5}, "finetuned": {"0.3": 0.125, "0.7": 0.375}},
            "finetuned": {"sharpness": sharpness}, "run": {"steps": len(losses), "seconds": 30.1},
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(final))
    if metrics:
        (folder / "logs/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def rows(text):
    """Cells by the first one, which alone may hold spaces; they are set apart by two."""
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


def test_figures_are_those_of_the_run_folders(tmp_path, capsys):
    make_run(tmp_path / "a", [4.0, 3.0, 2.0, 1.5], "train.steps=4", sharpness=1.25,
             metrics=[{"step": 2, "fid": 80.0}, {"step": 4, "fid": 61.5}])  # fmt: skip
    make_run(tmp_path / "b", [5.0, None, 2.5], "train.steps=9", state="running", batch=16)
    out = tmp_path / "new/picture.png"
    assert cli.main(["compare-runs", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    table = rows(capsys.readouterr().out)
    assert table["a"] == ["b"]
    assert table["state"] == ["finished", "running"]
    assert table["step"] == ["4 of 4", "3 of 9"]
    assert table["images per step"] == ["8", "16"]
    assert table["loss, last 1 steps"] == ["1.5", "2.5"]
    assert table["held-out error at sigma 0.3"] == ["0.125"]  # of the finished one alone
    assert table["held-out error at sigma 0.7"] == ["0.375"]
    assert (table["sharpness"], table["fid, last"], table["seconds"]) == (["1.25"], ["61.5"], ["30.1"])
    assert "retrieval@5" not in table and "peak memory in GB" not in table
    with Image.open(out) as picture:
        assert picture.info["Software"] == SOFTWARE and picture.width > 1000


def test_keys_that_differ_are_listed_and_no_others(tmp_path):
    make_run(tmp_path / "a", [1.0])
    make_run(tmp_path / "b", [1.0], "lora={rank: 4}", "train.lr=1e-5", "loss.kappa=null")
    make_run(tmp_path / "c", [1.0], "train.betas=[0.9, 0.99]")
    text = compare_runs([tmp_path / name for name in "abc"], tmp_path / "p.png")
    changed = rows(text.partition("recipe keys that differ")[2].rpartition("\n\n")[0])
    changed.pop("a")
    assert changed == {
        "lora.rank": ["null", "4", "null"], "lora.dropout": ["null", "0.05", "null"],
        "lora.ends": ["null", "true", "null"], "train.lr": ["0.0003", "1e-05", "0.0003"],
        "train.betas": ["[0.9, 0.95]", "[0.9, 0.95]", "[0.9, 0.99]"], "loss.kappa": ["0.3", "null", "0.3"],
    }  # fmt: skip
    assert "the losses are of different things (loss.kappa)" in text
    text = compare_runs([tmp_path / "a", tmp_path / "c"], tmp_path / "p.png")
    assert "different things" not in text
    make_run(tmp_path / "d", [1.0])
    assert "the recipes are the same" in compare_runs([tmp_path / "a", tmp_path / "d"], tmp_path / "p.png")


def test_runs_of_one_name_are_told_apart(tmp_path):
    for seed in ("s0", "s1"):
        make_run(tmp_path / seed / "run", [1.0], f"seed={seed[1]}")
    text = compare_runs([tmp_path / "s0/run", tmp_path / "s1/run"], tmp_path / "p.png")
    assert text.splitlines()[0].split() == ["s0/run", "s1/run"]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = make_run(tmp_path / "a", [3.0, 2.0])
    with open(folder / "logs/train.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert rows(compare_runs([folder], tmp_path / "p.png"))["step"] == ["2 of 1200"]


def test_smoothing_keeps_the_mean_and_the_windows_of_all_runs_alike():
    steps, values = np.arange(1, 48), np.random.default_rng(0).normal(size=47)
    at, means = smooth(steps, values, 10)
    assert at.tolist() == [5.5, 15.5, 25.5, 35.5, 44.0]
    assert (means[:4] * 10).sum() + means[4] * 7 == pytest.approx(values.sum())
    assert means[1] == pytest.approx(values[10:20].mean())
    gaps = np.delete(steps, range(10, 20))  # a window without any step has no point
    assert smooth(gaps, values[gaps - 1], 10)[0].tolist() == [5.5, 25.5, 35.5, 44.0]
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": float("nan")}]
    assert [x.tolist() for x in curve(lines, "loss")] == [[1], [1.0]]


def test_its_own_picture_is_replaced_and_no_other(tmp_path):
    folder, out = make_run(tmp_path / "a", [3.0, 2.0]), tmp_path / "p.png"
    compare_runs([folder], out)
    before = out.read_bytes()
    make_run(tmp_path / "b", [9.0, 1.0])
    compare_runs([folder, tmp_path / "b"], out)
    assert out.read_bytes() != before
    for content in (b"text", None):
        if content is None:
            Image.new("RGB", (8, 8)).save(out)
        else:
            out.write_bytes(content)
        kept = out.read_bytes()
        with pytest.raises(ValueError, match=r"p\.png is there and was not made by this command"):
            compare_runs([folder], out)
        assert out.read_bytes() == kept


def test_what_cannot_be_compared_is_told_why(tmp_path, capsys):
    run = make_run(tmp_path / "a", [3.0])
    out = tmp_path / "p.png"
    with pytest.raises(ValueError, match=r"nothing is no training run: it has no recipe\.yaml"):
        compare_runs([run, tmp_path / "nothing"], out)
    with pytest.raises(ValueError, match="no training step yet"):
        compare_runs([make_run(tmp_path / "new", [])], out)
    with pytest.raises(ValueError, match="one run is given twice"):
        compare_runs([run, tmp_path / "x/../a"], out)
    with pytest.raises(ValueError, match=r"p\.jpg must be a \.png"):
        compare_runs([run], tmp_path / "p.jpg")
    damaged = make_run(tmp_path / "damaged", [3.0])
    (damaged / "status.json").write_text("{")
    with pytest.raises(ValueError, match="damaged cannot be read"):
        compare_runs([damaged], out)
    (damaged / "recipe.yaml").write_text("colour: 1")
    with pytest.raises(ValueError, match="damaged cannot be read: unknown recipe key colour"):
        compare_runs([damaged], out)
    assert not out.exists()
    assert cli.main(["compare-runs", str(tmp_path), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no training run")
