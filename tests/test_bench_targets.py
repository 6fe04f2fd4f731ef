"""`asymflow-ft bench targets`: its verdicts, what it leaves out, and a short run of all of it in every CI."""

import json
import math

import psutil
import pytest
import torch
from PIL import Image

from asymflow_ft import cli
from asymflow_ft.bench import targets
from asymflow_ft.bench.architectures import NAMED
from asymflow_ft.bench.limits import NotEnoughMemory
from asymflow_ft.bench.report import targets_table
from asymflow_ft.bench.targets import Target, bench_targets, memory_target
from asymflow_ft.bench.workload import Options

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def figures(reserved=None, over_floor=1.2, mfu=None):
    shares = dict.fromkeys(("recovery + loss arithmetic", "EMA", "data wait"), 0.01)
    options = {"precision": "bf16", "compile": False, "batch": 1, "rank": 256, "perceptual": "vgg"}
    return {"shares": shares, "over_floor": over_floor, "mfu": mfu, "reserved_bytes": reserved, "resolution": 1024,
            "options": options}  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """Benchmarks of a card that holds a training step on an nf4 base alone."""
    monkeypatch.setattr(
        targets, "bench_step", lambda _, options, *__: full() if options.quant == "full" else figures(15.2e9, mfu=0.4)
    )
    monkeypatch.setattr(targets, "bench_sample", lambda *_: {
        "eager": {"pixel_over_latent": 1.01}, "compiled": {"pixel_over_latent": 1.03}})  # fmt: skip
    monkeypatch.setattr(targets, "bench_align", lambda *_: {"align_over_decode_encode": 1.1})
    monkeypatch.setattr(targets, "planned", lambda *_: None)  # whether it fits this machine


def verdicts(architecture="klein-4b", device=GPU, **options):
    table = targets_table(bench_targets(NAMED[architecture], Options(**options), device))
    lines = [line.split("  ") for line in table.splitlines()[3:]]
    return {line[0]: line[-1].strip() for line in lines}


def test_what_a_card_reaches(measured):
    assert verdicts() == {
        "recovery, loss and EMA, share of a step (nf4 base)": "met",
        "data wait, share of a step (nf4 base)": "met",
        "step over floor (nf4 base)": "met",
        "MFU of a step (nf4 base)": "missed",
        "memory of a step, bf16 base, reserved": "not measured: not enough memory",
        "memory of a step, nf4 base, reserved": "met",
        "pixel over latent step, drawing": "met",
        "align over decoding and encoding": "met",
    }
    assert verdicts(compile=True)["pixel over latent step, drawing"] == "missed"
    result = bench_targets(NAMED["klein-4b"], Options(), GPU)
    assert result["steps"]["full"] is None and "15.2 GB" in targets_table(result)
    assert targets_table(result).startswith(
        "klein-4b at 1024 px, batch 1, bf16; training LoRA of rank 256, perceptual"
    )


def test_targets_of_memory_are_of_the_networks_that_they_name(measured, monkeypatch):
    assert [what for what in verdicts("klein-9b") if "memory" in what] == ["memory of a step, nf4 base, reserved"]
    monkeypatch.setattr(targets, "bench_step", lambda *_: figures())
    assert not [what for what in verdicts("100m") if "memory" in what]
    on_cpu = verdicts(device=CPU)
    assert [why for what, why in on_cpu.items() if "memory" in what] == ["not measured: a CPU's has no allocator"]


def test_what_was_measured_outlives_a_benchmark_that_does_not_fit(measured, monkeypatch):
    for name in ("bench_align", "bench_sample"):
        monkeypatch.setattr(targets, name, full)
    found = verdicts()
    assert found["pixel over latent step, drawing"] == "not measured: not enough memory"
    assert found["align over decoding and encoding"] == "not measured: not enough memory"
    assert found["step over floor (nf4 base)"] == "met"


def test_too_little_memory_for_any_step_is_an_error(measured, monkeypatch):
    def step(*_):
        raise NotEnoughMemory("this needs about 12 GB")

    monkeypatch.setattr(targets, "bench_step", step)
    with pytest.raises(NotEnoughMemory, match="12 GB"):
        bench_targets(NAMED["klein-4b"], Options(), GPU)


def test_what_cannot_work_is_said_before_anything_long_begins(monkeypatch, capsys):
    monkeypatch.setattr(targets, "bench_step", lambda *_: pytest.fail("a step was measured"))
    monkeypatch.setattr(targets, "bench_sample", lambda *_: pytest.fail("a picture was drawn"))
    assert cli.main(["bench", "targets", "--images", "1"]) == 1
    assert "--images is 1" in capsys.readouterr().err
    assert cli.main(["bench", "targets", "--perceptual", "vgg"]) == 1
    assert "bench targets has no use for --perceptual" in capsys.readouterr().err
    monkeypatch.setattr(targets, "bench_align", lambda *_: pytest.fail("a picture was aligned"))
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine._replace(available=int(8e6)))
    assert cli.main(["bench", "targets"]) == 1
    assert "use a smaller --arch" in capsys.readouterr().err


def test_a_target_and_its_limit():
    assert Target("more is worse", 2, 3).over_limit == 1.5
    assert Target("less is worse", 50, 40, at_least=True).over_limit == 1.25
    assert Target("not measured", 2, None).over_limit is None
    assert memory_target("nf4", 16, figures(8e9)).over_limit == 0.5


def test_figures_of_an_earlier_benchmark_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(targets, "bench_align", lambda *_: pytest.fail("it began"))
    (tmp_path / "bench.json").write_text("{}")
    for out in (tmp_path, tmp_path / "bench.json"):
        assert cli.main(["bench", "targets", "--out", str(out)]) == 1
        assert "holds an earlier benchmark; name another folder" in capsys.readouterr().err
    assert (tmp_path / "bench.json").read_text() == "{}"


# What no machine should exceed, however busy; docs/performance.md has what an idle one reaches, and the run's log what
# this one did. On the tiny network, whose forward pass takes milliseconds, all that lies beside it counts.
ROOM = {
    "100m": {"recovery, loss and EMA, share of a step": 10, "data wait, share of a step": 10, "step over floor": 5,
             "pixel over latent step, drawing": 1.6, "align over decoding and encoding": 3},
    "tiny": {"recovery, loss and EMA, share of a step": 40, "data wait, share of a step": 50, "step over floor": 20,
             "pixel over latent step, drawing": 3, "align over decoding and encoding": 6},
}  # fmt: skip


@pytest.mark.speed
@pytest.mark.parametrize("architecture", ROOM)
def test_a_cpu_shows_its_targets(architecture, tmp_path, capsys):
    command = ["bench", "targets", "--arch", architecture, "--out", str(tmp_path)]
    assert cli.main([*command, "--images", "2", "--warmup", "1", "--repeats", "3"]) == 0
    with capsys.disabled():
        print(f"\n{architecture}\n{capsys.readouterr().out}")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert Image.open(tmp_path / "chart.png").width > 500
    reached = {target["what"]: target["reached"] for target in result["targets"]}
    assert reached.pop("MFU of a step") is None  # not of a CPU
    assert reached.keys() == ROOM[architecture].keys()
    for what, limit in ROOM[architecture].items():
        assert 0 < reached[what] < limit and math.isfinite(reached[what]), what
