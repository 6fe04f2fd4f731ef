"""The training run as a user starts it, on the shipped tiny base."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors.torch import load_file

from asymflow_ft import cli, commands, finetune
from asymflow_ft.export import load_pixel_pipeline
from asymflow_ft.families import flux2
from asymflow_ft.textfiles import read_lines
from asymflow_ft.training.checkpoint import list_checkpoints, verify_checkpoint
from asymflow_ft.training.ema import PowerEma
from asymflow_ft.training.validation import WATCHED
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("in_repository")
RECIPE = "recipes/tiny/finetune.yaml"


@pytest.fixture(scope="module")
def small_data(tmp_path_factory, tiny_data):
    """Twelve pictures, one of which is broken."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(line) for line in open(f"{tiny_data}/metadata.jsonl")][:12]
    (folder / "images").mkdir()
    for row in rows:
        shutil.copy(f"{tiny_data}/{row['file_name']}", folder / row["file_name"])
    (folder / rows[3]["file_name"]).write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.txt").write_text("\n".join(row["text"] for row in rows[:2]))
    return folder


@pytest.fixture(scope="module")
def subspace(tmp_path_factory, tiny_data):
    out = tmp_path_factory.mktemp("align") / "subspace"
    base, recipe = str(REPOSITORY / "recipes/tiny/base"), str(REPOSITORY / RECIPE)
    arguments = ["--recipe", recipe, "--base", base, "--data", tiny_data, "--out", str(out)]
    assert cli.main(["align", *arguments, "--num-images", "40", "--resolution", "128"]) == 0
    return out


def run(out, small_data, subspace, *overrides):
    return finetune.main([
        RECIPE, f"output_dir={out}", f"data.source={small_data}", f"align.path={subspace}", "data.held_out=2",
        f"sample.prompts={small_data / 'prompts.txt'}", "sample.steps=2", "sample.count=2", "sample.judge=2",
        "sample.every=0", "data.max_unreadable=0.2", "data.workers=0",
        "train.batch_size=2", "train.warmup=2", "train.ema_start=1", "train.clip_after=1",
        *overrides,
    ])  # fmt: skip


def log_of(out):
    return [json.loads(line) for line in (out / "logs/train.jsonl").read_text().splitlines()]


def test_align_report(subspace, capsys):
    report = json.loads((subspace / "report.json").read_text())
    assert report["images"] == 40 and report["rank"] == 128 and report["patch"] == 16
    assert report["pixel_shift"] == pytest.approx(3 * report["scale"])
    assert report["orthonormality_error"] < 1e-6 and len(report["singular_values"]) == 128
    assert Image.open(subspace / "report.png").size[0] > 500
    again = ["align", "--recipe", RECIPE, "--out", str(subspace)]
    assert cli.main(again) == 1 and "already holds a subspace" in capsys.readouterr().err


def test_align_judges_how_close_latents_are_to_pixels(subspace, tmp_path, monkeypatch, capsys):
    assert json.loads((subspace / "report.json").read_text())["linear_shares"] is None  # of 2,560 tokens
    encode, order = flux2.encode_latents, torch.randperm(64, generator=torch.Generator().manual_seed(0))
    controls = {
        "the VAE's": encode,
        "of other places": lambda *arguments: encode(*arguments)[:, order],
        "noise": lambda *arguments: torch.randn(encode(*arguments).shape),
    }
    shares = {}
    for name, latents in controls.items():
        monkeypatch.setattr(flux2, "encode_latents", latents)
        assert cli.main(["align", "--recipe", RECIPE, "--out", str(tmp_path / name), "--num-images", "96"]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["verdict"].startswith("promising" if latents is encode else "not promising")
        assert report["verdict"] in capsys.readouterr().out
        shares[name] = report["linear_shares"]
    assert shares["the VAE's"]["latents_from_pixels"] > 0.75 and shares["the VAE's"]["pixels_from_latents"] > 0.8
    assert abs(shares["noise"]["latents_from_pixels"]) < 0.01 and abs(shares["noise"]["pixels_from_latents"]) < 0.01


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_run_interrupted_and_resumed_is_the_same_run(kind, tmp_path, small_data, subspace, capsys):
    options = ["train.checkpoint_every=2"] + (["lora={rank: 4, dropout: 0.1}"] if kind == "lora" else [])
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    assert run(straight, small_data, subspace, "train.steps=4", *options) == 0
    assert run(halved, small_data, subspace, "train.steps=2", *options) == 0
    assert run(halved, small_data, subspace, "train.steps=4", *options) == 0
    assert "continuing from step-000002" in capsys.readouterr().out
    assert [line["step"] for line in log_of(halved)] == [1, 2, 3, 4]
    assert log_of(halved) == log_of(straight)
    newest = [list_checkpoints(out / "checkpoints")[-1] for out in (straight, halved)]
    for name in ("trained.safetensors", "ema.safetensors"):
        one, other = (load_file(path / name) for path in newest)
        assert all(torch.equal(one[key], other[key]) for key in one | other)

    metrics = json.loads((halved / "metrics.json").read_text())
    assert metrics["run"]["steps"] == 4 and set(metrics["finetuned"]) == set(WATCHED)
    assert [line["step"] for line in read_lines(halved / "logs/metrics.jsonl")] == [0, 2, 4]
    assert metrics["held_out_error"].keys() == {"step 0", "finetuned"}
    assert (halved / "samples/step-000004.png").is_file() and (halved / "recipe.yaml").is_file()
    pipeline = load_pixel_pipeline(str(halved / "pipeline"), torch.float32)
    assert pipeline("rocket", num_inference_steps=1).images[0].size == (128, 128)

    assert run(halved, small_data, subspace, "train.steps=4", *options) == 0
    assert "holds a finished run of 4 steps" in capsys.readouterr().out
    assert json.loads((halved / "status.json").read_text()) == {"state": "finished", "step": 4, "images_per_step": 2}
    assert run(halved, small_data, subspace, "train.steps=4", "train.lr=1e-5", *options) == 1
    assert "choose another output_dir" in capsys.readouterr().err


def test_a_run_falls_back_over_a_broken_checkpoint(tmp_path, small_data, subspace, capsys):
    out, every = tmp_path / "run", ["train.checkpoint_every=1", "train.keep_checkpoints=3"]
    assert run(out, small_data, subspace, "train.steps=2", *every) == 0
    one, two = list_checkpoints(out / "checkpoints")
    (two / "ema.safetensors").write_bytes(b"")
    assert run(out, small_data, subspace, "train.steps=3", *every) == 0
    printed = capsys.readouterr().out
    assert f"broken checkpoint: {two / 'ema.safetensors'} has 0 bytes" in printed
    assert f"continuing from {one.name}" in printed and [line["step"] for line in log_of(out)] == [1, 2, 3]
    whole = list_checkpoints(out / "checkpoints")
    assert len(whole) == 3 and not any(map(verify_checkpoint, whole))
    for path in whole:
        (path / "state.json").unlink()
    assert run(out, small_data, subspace, "train.steps=4", *every) == 1
    assert "no checkpoint is whole" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_material(tmp_path, small_data, subspace, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_data, data)
    assert run(out, data, subspace, "train.steps=1") == 0
    (data / "prompts.txt").write_text("rocket")
    for change, message in (
        (lambda: None, "other prompts"),
        (lambda: add_image(data), "images to train on and prompts"),
    ):
        change()
        assert run(out, data, subspace, "train.steps=2") == 1
        assert message in capsys.readouterr().err


def add_image(data):
    Image.new("RGB", (128, 128), "red").save(data / "images/red.png")
    with open(data / "metadata.jsonl", "a") as file:
        file.write("\n" + json.dumps({"file_name": "images/red.png", "text": "red"}))


def test_a_start_that_failed_leaves_the_folder_free(tmp_path, small_data, subspace, capsys):
    out = tmp_path / "run"
    assert run(out, small_data, subspace, "train.steps=1", "data.held_out=11", "train.batch_size=4") == 1
    assert "leave none to train on" in capsys.readouterr().err and (out / "status.json").is_file()
    assert run(out, small_data, subspace, "train.steps=1", "train.batch_size=2", "seed=5") == 0


def test_align_takes_the_latents_that_training_takes(tmp_path, tiny_data, capsys):
    recipe = yaml.safe_load((REPOSITORY / RECIPE).read_text())
    bases = []
    for i, latents in enumerate(("mode", "sample", "sample")):
        recipe["data"] |= {"latents": latents, "limit": 8}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        arguments = ["--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / str(i))]
        assert cli.main(["align", *arguments]) == 0
        bases.append(load_file(next((tmp_path / str(i)).glob("*.safetensors")))["basis"])
    assert torch.equal(bases[1], bases[2]) and not torch.allclose(bases[0], bases[1], atol=1e-4)
    assert cli.main(["align", *arguments[:2], "--out", str(tmp_path / "none"), "--num-images", "0"]) == 1
    assert "--num-images 0 must be positive" in capsys.readouterr().err


def test_accumulation_and_no_held_out_images(tmp_path, small_data, subspace):
    out = tmp_path / "run"
    assert run(out, small_data, subspace, "train.steps=1", "train.accumulation=3", "data.held_out=0") == 0
    (line,) = log_of(out)
    assert line["loss"] == pytest.approx(line["mse"])


def test_bad_input_is_one_message(tmp_path, small_data, subspace, capsys):
    cases = {
        "not a multiple of the patch": ["data.resolution=100"],
        "no column 'label'": ["data.caption_column=label"],
        "no prompt file": ["sample.prompts=nowhere.txt"],
        "no aligned subspace": [f"align.path={tmp_path / 'nothing'}", "align.mode=require"],
        "leave none to train on": ["data.held_out=11"],
        "did you mean train.lr": ["train.lrr=1"],
        "was aligned with pixels": ["pixels.std=0.2"],
        "cannot open 'no/such-base'": ["base=no/such-base"],
    }
    for i, (message, overrides) in enumerate(cases.items()):
        assert run(tmp_path / str(i), small_data, subspace, "train.steps=1", *overrides) == 1, message
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1 and "Traceback" not in error


def test_bad_steps_are_skipped_and_then_stop_the_run(tmp_path, small_data, subspace, capsys):
    out = tmp_path / "run"
    options = ["train.steps=9", "train.lr=1e30", "train.warmup=0", "train.max_bad_steps=3", "train.checkpoint_every=1"]
    assert run(out, small_data, subspace, *options) == 1
    error = capsys.readouterr().err
    assert "not finite in 3 steps in a row" in error and "Lower train.lr" in error and "images/" in error
    lines = log_of(out)
    assert [line["grad_norm"] is None for line in lines[-3:]] == [True] * 3 and lines[0]["grad_norm"] > 0
    kept = [load_file(path / "trained.safetensors") for path in list_checkpoints(out / "checkpoints")]
    assert all(torch.equal(kept[-1][name], kept[-2][name]) for name in kept[-1])  # a skipped step changes nothing


FULL = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]  # fmt: skip


@pytest.mark.parametrize("given", FULL, ids=["torch", "cublas"])
def test_out_of_memory_names_the_keys_that_help(given, tmp_path, small_data, subspace, capsys, monkeypatch):
    def too_large(*_):
        raise given

    monkeypatch.setattr(finetune, "training_terms", too_large)
    assert run(tmp_path / "run", small_data, subspace, "train.steps=1") == 1
    error = capsys.readouterr().err
    assert str(given) in error and "these recipe keys would help most" in error and "GB less" in error
    assert "Traceback" not in error


def test_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    assert finetune.main([RECIPE, f"output_dir={tmp_path / 'run'}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "5,358,144 will be trained (all weights)" in printed and "533 images" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [finetune.main, lambda words: cli.main(["finetune", *words])])
def test_overrides_may_stand_on_both_sides_of_an_option(command, tmp_path, capsys):
    out = tmp_path / "run"
    assert command([RECIPE, f"output_dir={out}", "--dry-run", "train.steps=77", "--card", "24", "lora={rank: 2}"]) == 0
    printed = capsys.readouterr().out
    assert '"steps": 77' in printed and '"rank": 2' in printed and not out.exists()


def test_a_word_that_is_no_override_is_refused(capsys):
    for words in (["finetune", RECIPE, "--dry-run", "--crad=24"], ["sample", "--pipeline", "x", "train.steps=1"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_dry_run_of_a_mix_downloads_no_stream(tmp_path, small_data, capsys):
    mix = f"[{{source: {small_data}}}, {{source: {small_data}, limit: 5}}, {{source: x/y, streaming: true, limit: 7}}]"
    overrides = ["data.source=null", f"data.mix={mix}", f"output_dir={tmp_path / 'run'}"]
    assert finetune.main([RECIPE, *overrides, "--dry-run"]) == 0
    assert "24 images, 7 of them streamed" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_ema_follows_the_power_function():
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = PowerEma([("p", parameter)], gamma=7.0, start=2)
    expected = 0.0
    for step in range(1, 20):
        parameter.data.fill_(step)
        ema.update(step)
        expected = step if step <= 2 else expected + (1 - (1 - 1 / step) ** 8) * (step - expected)
    assert ema.average["p"].item() == pytest.approx(expected, rel=1e-6)
    with ema.applied():
        assert parameter.item() == pytest.approx(expected, rel=1e-6)
    assert parameter.item() == 19


def test_sample_command(tmp_path, small_data, subspace, capsys, monkeypatch):
    assert run(tmp_path / "run", small_data, subspace, "train.steps=1") == 0
    arguments = ["sample", "--pipeline", str(tmp_path / "run/pipeline"), "--prompts", str(small_data / "prompts.txt")]
    arguments += ["--prompt", "rocket", "--steps", "1", "--sheet", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.png", "00001.png", "00002.png", "sheet.png",
    ]  # fmt: skip
    assert cli.main(arguments) == 1 and "exists; choose another --out" in capsys.readouterr().err
    calls, forward = [], flux2.TRANSFORMER.forward
    monkeypatch.setattr(commands, "compile_blocks", calls.append)
    monkeypatch.setattr(
        flux2.TRANSFORMER, "forward",
        lambda network, **inputs: calls.append(len(inputs["hidden_states"])) or forward(network, **inputs),
    )  # fmt: skip
    assert cli.main([*arguments[:-1], str(tmp_path / "fast"), "--batch-guidance", "--compile"]) == 0
    assert isinstance(calls[0], flux2.TRANSFORMER) and calls[1:] == [2, 2, 2]
    assert "compiling: the first step takes longer" in capsys.readouterr().out
    for name in ("00000.png", "00002.png"):
        both = [Image.open(tmp_path / out / name) for out in ("out", "fast")]
        assert max(high for _, high in ImageChops.difference(*both).getextrema()) <= 1
