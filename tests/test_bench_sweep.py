"""`asymflow-ft bench ... --sweep`: its rows are single runs, its growth is what was planted, and no row is lost."""

import json
import runpy
import shutil
import weakref
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from asymflow_ft import cli, commands
from asymflow_ft.bench.architectures import NAMED
from asymflow_ft.bench.charts import sweep_chart
from asymflow_ft.bench.growth import fit_growth
from asymflow_ft.bench.limits import NotEnoughMemory
from asymflow_ft.bench.report import sweep_table
from asymflow_ft.bench.step import bench_step
from asymflow_ft.bench.sweep import bench_sweep, parse_sweep, total_memory
from asymflow_ft.bench.workload import Options
from tests.conftest import REPOSITORY

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = Options(resolution=64, precision="no", rank=2, perceptual="none", repeats=1, warmup=0)
MACHINE_IS_FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
COMMAND = ("bench", "step", "--resolution", "64", "--perceptual", "none", "--repeats", "1", "--warmup", "0")


def counted(run):
    """The figures that no clock is in."""
    names = ("architecture", "options", "recipe", "resolution", "tokens", "parameters", "trained", "memory")
    return {name: run[name] for name in names} | {"operations": run["operations"], "shape": run["matmul"]["shape"]}


def test_rows_are_single_runs(tmp_path, capsys):
    assert cli.main([*COMMAND, "--sweep", "rank=4,2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["runs"]) == ["2", "4"] and Image.open(tmp_path / "chart.png").width > 500
    for value, run in found["runs"].items():
        single = json.loads(json.dumps(bench_step(NAMED["tiny"], replace(TINY, rank=int(value)), CPU)))
        assert counted(run) == counted(single) and run.keys() == single.keys()
        assert run["step"]["processor"] > 0
    runs = list(found["runs"].values())
    for name, kind in (("memory", "measured"), ("planned memory", "planned")):
        assert found["growth"][name]["costs"] == [total_memory(run, kind) for run in runs]
    assert found["growth"]["step"]["costs"] == [run["step"]["processor"] for run in runs]
    # weights, gradients, two moments and the average of one more rank
    one_rank = 4 * 5 * (runs[1]["trained"] - runs[0]["trained"]) // 2
    assert found["growth"]["memory"]["each"] == pytest.approx(one_rank, rel=0.05)
    shown = capsys.readouterr().out
    assert "against rank:" in shown and f"{runs[0]['step']['processor'] * 1000:.3g} ms" in shown


def planted(law, memory):
    """A step that costs what the laws of its size say, by the process's clock and, a thousand times that, by the
    one on the wall."""

    def step(architecture, options, device):
        tokens = options.batch * ((options.resolution // 16) ** 2 + architecture.text_length)
        size = {"tokens": tokens, "samples": options.batch, "rank": options.rank}
        timing = {"median": 1000 * law(**size), "low": 1.0, "high": 1.0, "processor": law(**size)}
        item = {"planned": memory(**size) + 5, "measured": memory(**size)}
        return {
            "what": "step", "tokens": tokens, "step": timing,
            "memory": {"all": item, "none": {"planned": 0, "measured": 0}},
            "operations": {"step": 7 * tokens**2}, "over_floor": 1.0,
            "parts": dict.fromkeys(("reference forward", "student forward", "recompute", "backward"), timing),
        }  # fmt: skip

    return step


@pytest.mark.parametrize(
    ("key", "values", "against"),
    [("resolution", [64, 128, 256], "tokens"), ("batch", [1, 2, 4], "samples"), ("rank", [2, 8, 32], "rank")],
)
def test_growth_is_what_was_planted(key, values, against, monkeypatch):
    bench = planted(lambda **size: 3 + 0.5 * size[against], lambda **size: 100 + 10 * size[against])
    for device, scale in ((CPU, 1), (GPU, 1000)):
        found = bench_sweep(bench, NAMED["tiny"], TINY, device, key, values)
        step, memory = found["growth"]["step"], found["growth"]["memory"]
        assert (step["fixed"], step["each"]) == pytest.approx((3 * scale, 0.5 * scale))
        assert (memory["fixed"], memory["each"]) == pytest.approx((100, 10)) and found["against"] == against
    sizes = [run["tokens"] for run in found["runs"].values()] if key == "resolution" else values
    assert step["sizes"] == sizes
    if key == "resolution":
        assert found["growth"]["operations"]["exponent"] == pytest.approx(2)


def test_running_out_of_memory_loses_nothing(monkeypatch, tmp_path, capsys):
    cheap, held = planted(lambda **size: 1.0, lambda **size: 1), []

    class Network:
        def __init__(self):
            self.self = self  # as modules and their hooks do

    def step(architecture, options, device):
        assert all(network() is None for network in held), "the networks before are still in memory"
        network = Network()
        held.append(weakref.ref(network))
        if options.batch in full:
            raise full[options.batch]
        return cheap(architecture, options, device)

    monkeypatch.setitem(commands.BENCHES, "step", step)
    full = {2: torch.OutOfMemoryError("full"), 8: NotEnoughMemory("full"), 16: MACHINE_IS_FULL, 32: MemoryError()}
    assert cli.main([*COMMAND, "--sweep", "batch=1,2,4,8,16,32", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [value for value, run in found["runs"].items() if run is None] == ["2", "8", "16", "32"]
    assert found["growth"]["step"]["sizes"] == [1, 4] and capsys.readouterr().out.count(": out of memory") == 4
    full = {2: torch.OutOfMemoryError("full")}
    one_left = bench_sweep(step, NAMED["tiny"], TINY, CPU, "batch", [1, 2])
    assert one_left["growth"] == {} and "2: out of memory" in sweep_table(one_left)
    assert not any(axes.lines for axes in sweep_chart(one_left).axes)
    full = {1: torch.OutOfMemoryError("full"), 2: torch.OutOfMemoryError("full")}
    assert cli.main([*COMMAND, "--sweep", "batch=1,2"]) == 1
    assert "too little memory: " in capsys.readouterr().err


def test_memory_alone(tmp_path, capsys):
    options = ["--resolution", "64", "--perceptual", "none", "--sweep", "rank=2,4", "--out", str(tmp_path)]
    assert cli.main(["bench", "memory", *options]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["of"] == "memory" and list(found["growth"]) == ["memory", "planned memory"]
    assert Image.open(tmp_path / "chart.png").width < 700
    shown = capsys.readouterr().out
    total = sum(item["measured"] for item in found["runs"]["2"]["memory"].values())
    assert f"{total / 1e6:.3g} MB" in shown and "memory grows" in shown


def test_values_ascend():
    assert parse_sweep("resolution=256,128,192,128") == ("resolution", [128, 192, 256])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["step", "--sweep", "resolutoin=64,128"], "no 'resolutoin'; did you mean resolution?"),
        (["step", "--sweep", "steps=1,2"], "no 'steps'; it takes resolution, batch, rank, as in resolution=128,192"),
        (["step", "--sweep", "rank"], "--sweep rank: the values must be integers, as in rank=1,2,4"),
        (["step", "--sweep", "batch=1,two"], "--sweep batch=1,two: the values must be integers"),
        (["step", "--sweep", "batch=2,2"], "--sweep batch=2,2: growth is measured from one value to another"),
        (["step", "--sweep", "resolution=64,100"], "--resolution 100 is not a multiple of the patch, 16"),
        (["step", "--sweep", "batch=0,1"], "--batch is 0; it must be 1 or more"),
        (["step", "--sweep", "batch=1,2", "--batch", "1"], "--sweep batch=1,2 sets batch, and another option"),
        (["step", "--sweep", "rank=1,2", "--full"], "--sweep rank=1,2 sets rank, and another option"),
        (
            ["cache", "--sweep", "batch=1,2"],
            "--sweep is of training steps (bench step, bench memory); bench cache cannot take it",
        ),
    ],
)
def test_messages(options, message, capsys, monkeypatch):
    monkeypatch.setitem(commands.BENCHES, "step", lambda *_: pytest.fail("measured before all values were looked at"))
    assert cli.main(["bench", *options]) == 1
    assert message in capsys.readouterr().err


def test_the_figure_of_the_docs(monkeypatch, tmp_path):
    bench = planted(lambda **size: 3.0 + size["rank"], lambda **size: 1)
    result = {"machine": {}, **bench_sweep(bench, NAMED["tiny"], TINY, CPU, "rank", [2, 4])}
    line = asdict(fit_growth({1: 1.0, 10: 10.0}))
    written = (result, result, result, {"growth": line}, {"growth": {"start": line, "first look": line}})
    for number, figures in enumerate(written):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "bench.json").write_text(json.dumps(figures))
    script = shutil.copy(REPOSITORY / "docs/performance_growth.py", tmp_path)
    monkeypatch.setattr("sys.argv", [script, *(str(tmp_path / str(number)) for number in range(len(written)))])
    runpy.run_path(script)
    assert Image.open(tmp_path / "performance_growth.png").size == (800, 900)
