"""`asymflow-ft evaluate`: what survives an interruption, what stands in its results, what is refused."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from asymflow_ft import evaluate as module
from asymflow_ft.cli import main
from asymflow_ft.drawing import Drawing, name_models
from asymflow_ft.evaluate import Scoring, evaluate
from asymflow_ft.evaluation.results import Difference, Metric, Results, Value, load_results
from asymflow_ft.evaluation.results import Model as EvaluatedModel
from asymflow_ft.evaluation.suites import Prompt, Suite
from asymflow_ft.evaluation.summary import describe
from tests.evaluate.conftest import HOW, TEXTS, assert_alike, pictures, stamps, suite
from tests.interruptions import interrupted_after, kill_at_the_first_picture, printed_by_two


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


def test_any_interrupted_write_leaves_what_the_same_command_completes(run, tmp_path):
    run(tmp_path / "whole")
    for survived in (0, 2, 5):  # of prompts.json and 6 pictures
        out = tmp_path / f"after {survived}"
        with interrupted_after(survived):
            run(out)
        assert len(stamps(out)) == max(survived - 1, 0) and not (out / "results.json").exists()
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

    kill_at_the_first_picture(command, out)
    assert not (out / "results.json").exists()
    before = stamps(out)
    said = printed_by_two(command)
    assert "pictures to draw" in said[0] and said[1] == ""
    assert said[0].endswith(f"report: {out / 'report.html'}\n")
    assert stamps(out) | before == stamps(out)
    for name in ("mine", "base"):
        assert_alike(pictures(out, name), pictures(drawn, name))


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
