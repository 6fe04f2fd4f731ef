"""Evaluation up to the scores: what a picture depends on, what survives an interruption, what is refused."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from asymflow_ft import drawing
from asymflow_ft import evaluate as module
from asymflow_ft.cli import main
from asymflow_ft.drawing import Drawing, Wanted, name_models, open_models
from asymflow_ft.evaluate import Scoring, evaluate
from asymflow_ft.evaluation.results import Difference, Metric, Results, Value, load_results
from asymflow_ft.evaluation.results import Model as EvaluatedModel
from asymflow_ft.evaluation.suites import Prompt, Suite
from asymflow_ft.evaluation.summary import describe
from asymflow_ft.families import flux2
from asymflow_ft.hub.write import export
from asymflow_ft.method.patches import to_image, to_tokens
from tests.conftest import REPOSITORY
from tests.converted import converted_lora
from tests.tiny import flux1

TEXTS = ["red apple", "rocket", "deer"]
HOW = Drawing(steps=2, seed=7, dtype="float32")


def suite(texts, per_prompt=1):
    ids = [f"{i:04d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" for i, text in enumerate(texts)]
    return Suite("prompts.txt", [Prompt(text, id) for text, id in zip(texts, ids, strict=True)], per_prompt, [])


def pictures(out, name):
    """Pixels by (text, number)."""
    ids = json.loads((out / "prompts.json").read_text())
    found = {}
    for file in sorted((out / "images" / name).iterdir()):
        id, _, number = file.stem.rpartition("-")
        found[ids[id], int(number)] = np.array(Image.open(file), dtype=int)
    return found


def assert_alike(left, right):
    """Up to the rounding of other batches."""
    assert left.keys() == right.keys()
    for key in left:
        difference = np.abs(left[key] - right[key])
        assert difference.max() <= 1 and difference.mean() < 0.01, key


def stamps(out):
    return {file: file.stat().st_mtime_ns for file in (out / "images").rglob("*.png")}


@pytest.fixture(scope="module")
def models(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    export(converted_lora(tiny_base), folder / "mine/pipeline", "pipeline")
    export(converted_lora(tiny_base, seed=1), folder / "other", "adapter")
    return folder


@pytest.fixture
def run(models, tiny_base):
    def run(out, texts=TEXTS, against=(f"base={tiny_base}",), how=HOW, per_prompt=1, batch_size=2, **more):
        pipeline = more.pop("pipeline", str(models / "mine/pipeline"))
        scoring = Scoring(real=more.pop("real", None))
        return evaluate(pipeline, against, suite(texts, per_prompt), out, how, scoring, per_prompt=per_prompt,
                        batch_size=batch_size, say=more.pop("say", lambda line: None), **more)  # fmt: skip

    return run


@pytest.fixture(scope="module")
def drawn(models, tiny_base, tmp_path_factory):
    """A finished evaluation of three prompts with two pictures each, one at a time."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    against = [str(models / "other"), f"base={tiny_base}"]
    evaluate(str(models / "mine/pipeline"), against, suite(TEXTS, 2), out, HOW, Scoring(), batch_size=1)
    return out


def test_batch_order_and_number_do_not_matter(run, drawn, tmp_path, models):
    run(tmp_path / "out", TEXTS[::-1], [str(models / "other")], per_prompt=2, batch_size=5)
    for name in ("mine", "other"):
        assert_alike(pictures(tmp_path / "out", name), pictures(drawn, name))
    own = pictures(drawn, "mine")
    assert len({own[key].tobytes() for key in own}) == 6  # no two of them alike


def test_another_seed_draws_others(run, drawn, tmp_path):
    run(tmp_path / "out", TEXTS[:1], [], how=Drawing(steps=2, seed=8, dtype="float32"))
    assert not np.array_equal(
        pictures(tmp_path / "out", "mine")["red apple", 0], pictures(drawn, "mine")["red apple", 0]
    )


@torch.no_grad()
def test_pictures_are_the_pipelines_and_the_bases_from_one_noise(drawn, models, tiny_base):
    pixels = drawing.load_pixel_pipeline(models / "mine/pipeline", torch.float32)
    stock = flux2.load_parts(tiny_base, ("vae", "text_encoder", "tokenizer", "transformer"), torch.float32)
    for text, number in (("red apple", 0), ("deer", 1)):
        seed = int(hashlib.sha256(f"7\0{number}\0{text}".encode()).hexdigest()[:16], 16) // 4
        noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        (expected,) = pixels(text, "", 64, 64, 2, latents=noise).images
        assert_alike({0: pictures(drawn, "mine")[text, number]}, {0: np.array(expected, int)})
        projected = to_image(to_tokens(noise, 16) @ pixels.subspace.basis, (4, 4), 1)  # as in validation
        (expected,) = stock(
            prompt=text, latents=projected, height=64, width=64, num_inference_steps=2, guidance_scale=4.0,
            max_sequence_length=32,
        ).images  # fmt: skip
        assert_alike({0: pictures(drawn, "base")[text, number]}, {0: np.array(expected, int)})


def test_more_prompts_models_and_pictures_draw_only_what_is_missing(run, tmp_path, drawn, models, tiny_base):
    out, said = tmp_path / "out", []
    run(out, TEXTS[:2], [])
    before = stamps(out)
    run(out, [*TEXTS[:2], "badger"], [f"base={tiny_base}"], per_prompt=2, say=said.append)
    assert "10 pictures to draw" in said[0]
    now = stamps(out)
    assert len(now) == 12 and now | before == now
    said.clear()
    run(out, TEXTS[:2], [], say=said.append)
    assert said == [f"{out} holds all pictures"] and stamps(out) == now
    for name in ("mine", "base"):
        assert_alike({key: value for key, value in pictures(out, name).items() if key[0] != "badger"},
                     {key: value for key, value in pictures(drawn, name).items() if key[0] != "deer"})  # fmt: skip
    result = run(out, TEXTS[:2], [])
    assert result == load_results(out / "results.json")
    assert [p["text"] for p in result.prompts] == TEXTS[:2] and result.models[0].pictures == 2


def test_a_prompt_that_moved_keeps_its_pictures(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(out, TEXTS, [])
    before = pictures(out, "mine")
    drawn, draw = [], module.draw

    def spy(model, how, wanted, *rest):
        drawn.extend(one.text for one in wanted)
        return draw(model, how, wanted, *rest)

    monkeypatch.setattr(module, "draw", spy)
    run(out, ["badger", *TEXTS], [])
    assert drawn == ["badger"]
    ids = [prompt.id for prompt in suite(["badger", *TEXTS]).prompts]
    now = {id: np.array(Image.open(out / f"images/mine/{id}-0.png")) for id in ids}
    for id, text in zip(ids[1:], TEXTS, strict=True):
        assert np.array_equal(now[id], before[text, 0])


def test_any_interrupted_write_leaves_what_the_same_command_completes(run, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    write, calls = os.fsync, 0

    def fail(handle):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt  # the .part file is there, the file itself is not
        write(handle)

    monkeypatch.setattr(os, "fsync", fail)
    for survived in (0, 2, 5):  # of prompts.json and 6 pictures
        out = tmp_path / f"after {survived}"
        calls = survived
        with pytest.raises(KeyboardInterrupt):
            run(out)
        assert len(stamps(out)) == max(survived - 1, 0) and not (out / "results.json").exists()
        calls = 99
        done = stamps(out)
        assert run(out) is not None
        assert stamps(out) | done == stamps(out)
        for name in ("mine", "base"):
            assert_alike(pictures(out, name), pictures(tmp_path / "whole", name))


def test_ctrl_c_says_how_to_go_on(run, models, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("red apple\n")

    def stop(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    command = ["evaluate", "--pipeline", str(models / "other"), "--prompts", str(tmp_path / "p.txt"), "--out",
               str(tmp_path / "out"), "--steps", "1"]  # fmt: skip
    assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_two_processes_killed_and_continued_draw_what_one_draws(models, tiny_base, tmp_path, drawn):
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    out = tmp_path / "two"
    code = "import sys, asymflow_ft.evaluation; from asymflow_ft import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [
        sys.executable, "-c", code, "evaluate", "--pipeline", str(models / "mine/pipeline"), "--against",
        f"base={tiny_base}", "--prompts", str(tmp_path / "p.txt"), "--out", str(out), "--steps", "2", "--seed", "7",
        "--per-prompt", "2", "--dtype", "float32", "--batch-size", "1",
    ]  # fmt: skip

    def launch():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        ranks = [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [
            subprocess.Popen(command, env=rank, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for rank in ranks
        ]

    processes = launch()
    while not list(out.glob("images/*/*.png")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()
    assert not (out / "results.json").exists()
    before = stamps(out)

    processes = launch()
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "pictures to draw" in said[0] and said[1] == ""
    assert said[0].endswith(f"report: {out / 'report.html'}\n")
    assert stamps(out) | before == stamps(out)
    for name in ("mine", "base"):
        assert_alike(pictures(out, name), pictures(drawn, name))


def test_the_text_encoder_is_gone_before_the_transformer_draws(run, tmp_path, monkeypatch):
    encode, noise, encoders, drew = drawing._encode, drawing.noise_of, [], []

    def encode_spy(model, parts, *rest):
        assert parts.transformer is None
        encoders.append(weakref.ref(parts.text_encoder))
        return encode(model, parts, *rest)

    def noise_spy(model, *rest):
        assert not any(encoder() for encoder in encoders)
        drew.append(model.name)
        return noise(model, *rest)

    monkeypatch.setattr(drawing, "_encode", encode_spy)
    monkeypatch.setattr(drawing, "noise_of", noise_spy)
    monkeypatch.setattr(drawing, "PROMPTS_AT_ONCE", 2)
    run(tmp_path / "out")
    assert drew == ["mine", "mine", "base", "base"] and len(encoders) == 4


def test_costs_leave_out_the_first_batch(run, tmp_path):
    result = run(tmp_path / "out", batch_size=1)
    lines = [json.loads(line) for line in (tmp_path / "out/costs/mine.jsonl").read_text().splitlines()]
    assert [line["first"] for line in lines] == [True, False, False]
    assert [line["pictures"] for line in lines] == [[f"{prompt.id}-0"] for prompt in suite(TEXTS).prompts]
    cost = result.models[0]
    later = sorted(line["seconds"] for line in lines[1:])
    assert cost.seconds[1] == pytest.approx(sum(later) / 2) and later[0] < cost.seconds[0] < cost.seconds[2] < later[1]
    assert cost.memory_gb > 0 and cost.parameters == lines[0]["parameters"] > 5_000_000
    assert [model.kind for model in result.models] == ["pixel", "latent"]
    one = run(tmp_path / "one", TEXTS[:1], [])  # nothing but the first
    assert one.models[0].seconds[0] == one.models[0].seconds[2] > 0


def test_pictures_that_are_not_finite_are_named(run, tmp_path, models, tiny_base):
    export(converted_lora(tiny_base), tmp_path / "broken", "adapter")
    (file,) = (tmp_path / "broken").glob("*.safetensors")
    state = load_file(file)
    state["x_embedder.weight"] = torch.full_like(state["x_embedder.weight"], 3e38)  # so its sums are infinite
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        metadata = json.loads(handle.read(length))["__metadata__"]
    save_file(state, file, metadata)
    result = run(tmp_path / "out", TEXTS[:2], [], pipeline=str(tmp_path / "broken"))
    (warning,) = [warning for warning in result.warnings if "NaN" in warning]
    assert "2 of 2 pictures of broken held NaN" in warning and f"{suite(TEXTS).prompts[1].id}-0" in warning
    assert not pictures(tmp_path / "out", "broken")["rocket", 0].any()


def test_sizes_that_differ_are_compared_at_the_smaller(run, tmp_path, models, tiny_base):
    larger = converted_lora(tiny_base)
    larger.provenance["settings"]["default_size"] = 96
    export(larger, tmp_path / "larger", "adapter")
    result = run(tmp_path / "out", TEXTS[:1], [str(models / "other"), f"base={tiny_base}"],
                 pipeline=str(tmp_path / "larger"))  # fmt: skip
    assert [model.size for model in result.models] == [(96, 96), (64, 64), (96, 96)]
    assert result.compared_at == (64, 64)
    assert "compared at 64x64" in result.warnings[0] and "larger 96x96, other 64x64" in result.warnings[0]
    same = run(tmp_path / "same", TEXTS[:1], [str(models / "other")], pipeline=str(tmp_path / "larger"), size=32)
    assert same.compared_at == (32, 32) and not any("compared at" in warning for warning in same.warnings)
    assert pictures(tmp_path / "same", "other")["red apple", 0].shape == (32, 32, 3)


def test_a_latent_pipeline_whose_tokens_do_not_fit_has_its_own_noise(run, tmp_path):
    flux1.build(tmp_path / "flux1")
    result = run(tmp_path / "out", TEXTS[:1], [str(tmp_path / "flux1")])
    assert "flux1 draws from noise of its own, for its 64 values per 16x16 pixels do not fit" in result.warnings[0]
    (model,), _ = open_models([("flux1", str(tmp_path / "flux1"))], 64)
    one, two = Wanted("rocket", 0, Path()), Wanted("deer", 0, Path())
    noise = drawing.noise_of(model, 7, [one, two])
    assert noise.shape == (2, 64, 4, 4) and torch.equal(drawing.noise_of(model, 7, [two])[0], noise[1])


def test_a_latent_pipeline_can_be_the_one_in_question(run, tmp_path, drawn, models, tiny_base):
    out = tmp_path / "out"
    result = run(out, TEXTS, [str(models / "mine/pipeline")], pipeline=f"base={tiny_base}", per_prompt=2)
    assert [(model.name, model.kind) for model in result.models] == [("base", "latent"), ("mine", "pixel")]
    assert_alike(pictures(out, "base"), pictures(drawn, "base"))
    alone = run(tmp_path / "alone", TEXTS[:1], [], pipeline=tiny_base, size=64)
    assert alone.compared_at == (64, 64)
    with pytest.raises(ValueError, match=r"only latent pipelines are given.*give --size"):
        run(tmp_path / "no size", TEXTS[:1], [], pipeline=tiny_base)


def test_real_images_are_paired_by_caption(run, tmp_path, monkeypatch):
    real = tmp_path / "real"
    real.mkdir()
    for i, (name, text) in enumerate({"a": "rocket", "b": "a hat", "c": "deer"}.items()):
        Image.new("RGB", (200, 100), (50 * i, 0, 0)).save(real / f"{name}.png")
        (real / f"{name}.txt").write_text(f"{text}\n")
    (real / "c.png").write_bytes(b"no image")
    seen = {}

    def measure(files, prompts, real, references, names, features, at, seed, device):
        seen.update(real=[open_it().size for open_it in real], at=at, seed=seed)
        seen["references"] = [one and one() for one in references]
        seen["files"] = {name: [[file.is_file() for file in row] for row in rows] for name, rows in files.items()}
        return SimpleNamespace(
            metrics=[], values=[], differences=[], spectra={}, warnings=["from measure"], pictures={}
        )

    asked = []
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "default_metrics", lambda *arguments: asked.append(arguments) or [])
    result = run(tmp_path / "out", real=str(real))
    assert seen["real"] == [(200, 100)] * 2 and seen["at"] == (64, 64) and seen["seed"] == 7
    assert [one and one.getpixel((0, 0)) for one in seen["references"]] == [None, (0, 0, 0), None]
    assert seen["files"] == {"mine": [[True]] * 3, "base": [[True]] * 3} and asked == [(True, True, None)] * 2
    assert "1 real images cannot be used" in result.warnings[0] and result.warnings[1] == "from measure"
    for file in real.glob("*.txt"):
        file.unlink()
    (reference,) = (tmp_path / "out/references").iterdir()
    assert reference.stem == suite(TEXTS).prompts[1].id and Image.open(reference).size == (64, 64)
    run(tmp_path / "out", real=str(real))
    assert not (tmp_path / "out/references").exists()
    assert seen["real"] == [(200, 100)] * 2 and seen["references"] == [None] * 3
    assert asked[2:] == [(True, False, None)] * 2


def test_official_layouts_are_written_and_their_scores_read(run, tmp_path, monkeypatch):
    written = []

    def write_layout(suite, rows, folder):
        written.append((folder.name, [len(row) for row in rows]))
        if len(suite.prompts) == 1:
            raise ValueError("it holds pictures of another evaluation")

    benchmark = SimpleNamespace(
        check=lambda suite, size: [f"not comparable at {size}"], write_layout=write_layout,
        read_scores=lambda folder: {"overall": 0.5} if folder.name == "base" else None,
        how_to_score=lambda folder: f"score {folder}",
    )  # fmt: skip
    monkeypatch.setitem(module.BENCHMARKS, "prompts.txt", benchmark)
    said = []
    result = run(tmp_path / "out", TEXTS[:2], per_prompt=2, say=said.append)
    assert written == [("mine", [2, 2]), ("base", [2, 2])]
    assert said[-1] == f"score {tmp_path / 'out/prompts.txt/mine'}"
    assert result.benchmarks == {"prompts.txt": {"base": {"overall": 0.5}}}
    assert result.warnings[0] == "not comparable at (64, 64)"
    fewer = run(tmp_path / "out", TEXTS[:1], per_prompt=2)
    assert fewer.benchmarks == {} and fewer.warnings.count("it holds pictures of another evaluation") == 2


def test_names(tmp_path):
    (tmp_path / "a=b").mkdir()
    given = ["runs/x/pipeline/", "user/x", "My one=runs/y", "runs/my", f"{tmp_path}/a=b", "real", "runs/f oo!"]
    assert [name for name, _ in name_models(given)] == ["x", "x-2", "My one", "my", "a-b", "real-2", "f-oo"]
    assert name_models(given)[2][1] == "runs/y"
    for bad in ("../up=x", "real=x", "Frequency=x", "reference=x", ".=x", "a/b=x", "X=y"):
        with pytest.raises(ValueError, match="cannot be used; names are letters"):
            name_models(["x", bad])


def test_other_settings_and_other_weights_are_refused(run, tmp_path, models, tiny_base):
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(models / "other", copy)
    run(out, TEXTS[:1], [str(copy)])
    before = stamps(out)
    steps = Drawing(steps=3, seed=7, dtype="float32")
    with pytest.raises(ValueError, match=r"holds pictures with steps=2, and now it is 3; use the same settings"):
        run(out, TEXTS[:1], [str(copy)], how=steps)
    with pytest.raises(ValueError, match=r"with mine.size=64, and now it is 32 \(and copy.size differ"):
        run(out, TEXTS[:1], [str(copy)], size=32)
    renamed = Suite("prompts.txt", [Prompt("rocket", suite(TEXTS).prompts[0].id)], 1, [])
    with pytest.raises(ValueError, match=r"prompt 0000-\w+ with the text 'red apple', and now it is 'rocket'"):
        evaluate(str(models / "mine/pipeline"), [], renamed, out, HOW, Scoring(), say=print)
    (file,) = copy.glob("*.safetensors")
    os.utime(file, (1, 1))
    with pytest.raises(ValueError, match=r"with copy.weights=.*another name \(NAME=MODEL\)"):
        run(out, TEXTS[:1], [str(copy)])
    assert stamps(out) == before
    run(out, TEXTS[:1], [f"new={copy}"])


def test_bad_input_is_named(tmp_path, models, tiny_base, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("red apple\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/photo.jpg").write_text("")
    (tmp_path / "empty").mkdir()
    good = {
        "--pipeline": str(models / "other"), "--prompts": str(tmp_path / "p.txt"), "--out": str(tmp_path / "out"),
        "--steps": "1",
    }  # fmt: skip
    for option, value, message in (
        ("--pipeline", str(tmp_path / "none"), "it is no local folder"),
        ("--pipeline", str(tmp_path / "empty"), "is no converted model"),
        ("--against", "real=x", "the name 'real' cannot be used"),
        ("--against", str(tmp_path / "empty"), "is no converted model"),
        ("--size", "60", "cannot draw 60x60: --size must be a multiple of 16, such as 64"),
        ("--size", "0", "cannot draw 0x0"),
        ("--steps", "0", "--steps 0 must be positive"),
        ("--seed", "-1", "--seed -1 lie between"),
        ("--shift", "0", "--shift 0.0 must be positive"),
        ("--batch-size", "0", "--batch-size 0 must be positive"),
        ("--per-prompt", "0", "--per-prompt 0 and"),
        ("--metrics", "beauty", "unknown metrics beauty"),
        ("--metrics", "sharpness,hpsv3", "export ASYMFLOW_HPSV3_PYTHON="),
        ("--real", str(tmp_path / "empty"), "empty"),
        ("--out", str(tmp_path / "p.txt"), "cannot write to --out"),
        ("--out", str(tmp_path / "other"), "holds other files and no settings.json"),
    ):
        arguments = [part for pair in (good | {option: value}).items() for part in pair]
        assert main(["evaluate", *arguments]) == 1, option
        error = capsys.readouterr().err
        assert "error: " in error and message in error, error
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000))
    assert main(["evaluate", *(part for pair in good.items() for part in pair)]) == 1
    assert "1 pictures to draw: about 0 MB" in capsys.readouterr().err


def test_too_little_memory_says_what_to_change(run, tmp_path, monkeypatch):
    def fail(*arguments, **more):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(flux2, "draw_base", fail)
    with pytest.raises(ValueError, match=r"with 2 pictures of 64x64 of base at once; .* smaller --batch-size"):
        run(tmp_path / "out")
    assert len(stamps(tmp_path / "out")) == 3  # the pixel model's


def test_the_summary_says_who_is_better():
    def of(metric, verdict, category=None):
        return Difference(metric, "mine", "base", 1.0, 0.5, 1.5, verdict, category)

    metrics = [Metric(key, key.upper(), "higher", "") for key in ("clip", "sharp", "kid", "fid")]
    model = {"path": "x", "kind": "pixel", "size": (64, 64), "parameters": 1, "pictures": 3, "memory_gb": 2.0}
    results = Results(
        "s", [EvaluatedModel("mine", seconds=(1, 2, 3), **model), EvaluatedModel("base", seconds=(1, 4, 3), **model)],
        [], 1, (64, 64), metrics, [Value("clip", "mine", 0.25, 0.2, 0.3, 3), Value("clip", "real", 0.5, 0.4, 0.6, 3)],
        [of("clip", "better"), of("sharp", "better"), of("kid", "worse"), of("fid", "no difference seen"),
         of("fid", "better", "animals")], {}, {}, {}, ["few pictures"],
        {"geneval": {"base": {"overall": 0.82, "colors": 0.9}}},
    )  # fmt: skip
    lines = describe(results, Path("out/report.html")).split("\n")
    assert lines[0].split() == ["mine", "base", "real"]
    assert lines[1].split() == ["CLIP", "0.25", "[0.2,", "0.3]", "0.5", "[0.4,", "0.6]"]
    assert lines[5].split() == ["geneval", "0.82"] and lines[5].index("0.82") == lines[0].index("base")
    assert lines[6].split() == ["seconds", "per", "picture", "2", "4"]
    assert lines[-3] == "warning: few pictures" and lines[-1] == "report: out/report.html"
