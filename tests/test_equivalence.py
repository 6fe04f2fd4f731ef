"""One run, whatever way it is made: cut into micro-batches or over processes, recomputed, killed and continued."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from asymflow_ft import cli, finetune
from asymflow_ft.components.subspace import load_subspace
from asymflow_ft.textfiles import read_lines
from asymflow_ft.training.checkpoint import newest_whole
from tests.conftest import REPOSITORY

RECORDED = REPOSITORY / "tests/golden/trajectories.json"
KINDS = {"lora": ["lora={rank: 4, dropout: 0.0}"], "full": ["lora=null"]}
STEPS = 4


def arguments(out, subspace, *options):
    return [
        "recipes/tiny/finetune.yaml", f"output_dir={out}", f"align.path={subspace}", "data.limit=24",
        "data.held_out=2", "data.workers=0", f"cache.folder={out.parent / 'cache'}", "sample.steps=1",
        "sample.count=1", "sample.judge=0", "sample.every=0", "train.batch_size=4", f"train.steps={STEPS}",
        "train.warmup=2", "train.ema_start=1", "train.clip_after=1", "train.clip_norm=1.0",
        "train.checkpoint_every=2", "train.trackers=[]", "train.schedule=constant", *options,
    ]  # fmt: skip


def log_of(out):
    return [json.loads(line) for line in (out / "logs/train.jsonl").read_text().splitlines()]


def weights_of(out, name="trained"):
    return load_file(newest_whole(out / "checkpoints")[0] / f"{name}.safetensors")


def launched(config, *options):
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"recipes/accelerate/{config}.yaml",
    ]
    command += ["--num_processes", "2", "--main_process_port", "0", *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_base, tiny_data):
    """A folder whose subspace and cache all runs use."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=KINDS)
def plain(request, shared, monkeypatch_module):
    """The run that all others must equal: batches of four in one process."""
    out = shared / request.param
    assert finetune.main(arguments(out, shared / "subspace", *KINDS[request.param])) == 0
    return request.param, out


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        yield patch


def same(one, other, loss=1e-5, weights=1e-3):
    """Equal up to rounding, which Adam blows up where gradients vanish."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss), a["step"]
        assert a["lambda"] == pytest.approx(b["lambda"], rel=1e-3)
    for what in ("trained", "ema"):
        first, second = weights_of(one, what), weights_of(other, what)
        assert first.keys() == second.keys()
        for name in first:
            assert (first[name] - second[name]).norm() <= weights * first[name].norm() + 1e-6, (what, name)


def test_recorded_trajectory(plain):
    """A refactor keeps these losses; `python -m tests.test_equivalence` records new ones."""
    kind, out = plain
    recorded = json.loads(RECORDED.read_text())[kind]
    assert [line["loss"] for line in log_of(out)] == pytest.approx(recorded, rel=2e-4)


@pytest.mark.parametrize("cut", [(2, 2), (1, 4)], ids=["2x2", "1x4"])
def test_accumulation(plain, shared, cut):
    kind, out = plain
    other = shared / f"{kind}-{cut[0]}x{cut[1]}"
    options = [f"train.batch_size={cut[0]}", f"train.accumulation={cut[1]}", *KINDS[kind]]
    assert finetune.main(arguments(other, shared / "subspace", *options)) == 0
    same(out, other)


def test_gradient_checkpointing(plain, shared):
    kind, out = plain
    other = shared / f"{kind}-checkpointing"
    options = ["train.gradient_checkpointing=true", *KINDS[kind]]
    assert finetune.main(arguments(other, shared / "subspace", *options)) == 0
    assert [line["loss"] for line in log_of(out)] == [line["loss"] for line in log_of(other)]


@pytest.mark.parametrize("config", ["cpu", "fsdp2"])
def test_two_processes(plain, shared, config):
    kind, out = plain
    other = shared / f"{kind}-{config}"
    options = ["train.batch_size=2", *KINDS[kind]]
    printed = launched(config, "tests/launch_finetune.py", *arguments(other, shared / "subspace", *options))
    assert "pictures in" in printed and (other / "pipeline/model_index.json").is_file()
    same(out, other)
    one, both = (json.loads((folder / "metrics.json").read_text())["held_out_error"] for folder in (out, other))
    for part in ("step 0", "finetuned"):
        assert both[part] == pytest.approx(one[part], rel=1e-4)


def test_two_processes_align_as_one(shared, monkeypatch_module):
    options = ["align", "--recipe", "recipes/tiny/finetune.yaml", "--num-images", "30", "--out"]
    assert cli.main([*options, str(shared / "alone")]) == 0
    printed = launched("cpu", "-m", "asymflow_ft.cli", *options, str(shared / "both"))
    assert printed.count("30 images") == 1
    one, both = (load_subspace(shared / name) for name in ("alone", "both"))
    torch.testing.assert_close(both.basis, one.basis, rtol=0, atol=1e-6)
    torch.testing.assert_close(both.scale, one.scale)
    reports = [json.loads((shared / name / "report.json").read_text()) for name in ("alone", "both")]
    assert reports[1]["images"] == 30 and reports[1]["tokens"] == reports[0]["tokens"]
    assert reports[1]["explained_total"] == pytest.approx(reports[0]["explained_total"])


def test_two_processes_fill_the_cache_as_one(shared, monkeypatch_module):
    folders = [shared / "cache-alone", shared / "cache-both"]
    options = [
        ["--recipe", "recipes/tiny/finetune.yaml", "data.limit=200", f"cache.folder={f}", f"output_dir={f}"]
        for f in folders
    ]
    assert cli.main(["cache", *options[0]]) == 0
    assert "verified: no fault found" in launched("cpu", "-m", "asymflow_ft.cli", "cache", *options[1], "--verify")
    for kind in ("text", "latents"):
        one, both = ({file.name: file.read_bytes() for file in (f / kind).iterdir()} for f in folders)
        assert one.keys() == both.keys() and len(one) == {"text": 5, "latents": 1}[kind]
        differing = [name for name in one if one[name] != both[name]]
        assert not differing


def test_a_run_goes_on_with_another_number_of_processes(plain, shared, capsys):
    kind, out = plain
    other = shared / f"{kind}-moved"
    options = arguments(other, shared / "subspace", *KINDS[kind])
    launched("cpu", "tests/launch_finetune.py", *options, "train.batch_size=2", "train.steps=2")
    assert finetune.main([*options, "train.batch_size=2"]) == 1
    assert "holds a run of 4 images per step, and this is one of 2" in capsys.readouterr().err
    assert finetune.main([*options, "train.batch_size=1", "train.accumulation=4"]) == 0
    same(out, other)


@pytest.mark.slow
def test_deepspeed_and_one_process_continue_each_other(plain, shared, tmp_path, monkeypatch):
    """The package is installed into a folder of its own, since it is not part of the tests' environment."""
    packages = ["deepspeed==0.19.8", "einops", "hjson", "msgpack", "ninja", "py-cpuinfo"]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*install, "--target", str(tmp_path), *packages], check=True, env=os.environ | {"DS_BUILD_OPS": "0"}
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    kind, out = plain
    first, last = shared / f"{kind}-zero-first", shared / f"{kind}-zero-last"
    cut = ["train.batch_size=1", "train.accumulation=2"]
    for other, start, end in ((first, True, False), (last, False, True)):
        for zero, steps in ((start, 2), (end, STEPS)):
            options = arguments(other, shared / "subspace", *KINDS[kind], f"train.steps={steps}")
            if zero:
                launched("deepspeed", "tests/launch_finetune.py", *options, *cut)
            else:
                assert finetune.main(options) == 0
        same(out, other)


def test_bf16_8_bit_adam_checkpointing_and_quantised_weights_train(shared, monkeypatch_module):
    """The options of small cards, which run on the CPU as well: finite, and close to the run in full precision."""
    losses = {}
    for name, options in {
        "float32": [],
        "bf16": ["train.precision=bf16", "train.optimizer=adamw8bit", "train.gradient_checkpointing=true"],
        "int8": ["train.base_weights=int8"],
        "nf4": ["train.base_weights=nf4", "train.ema_device=cpu"],
    }.items():
        out = shared / f"small-{name}"
        options = [*options, *KINDS["lora"], "train.steps=2", f"cache.folder={shared / name}"]
        assert finetune.main(arguments(out, shared / "subspace", *options)) == 0
        losses[name] = [line["loss"] for line in log_of(out)]
    for name, tolerance in {"bf16": 0.02, "int8": 0.05, "nf4": 0.3}.items():
        assert losses[name] == pytest.approx(losses["float32"], rel=tolerance) and losses[name] != losses["float32"]


def train_and_tell(pipe, *argv):
    """The program, which says when it begins to write a checkpoint or the finished pipeline."""

    def telling(write):
        def write_and_tell(*arguments):
            pipe.send("writing")
            return write(*arguments)

        return write_and_tell

    finetune.save_checkpoint, finetune.save_result = map(telling, (finetune.save_checkpoint, finetune.save_result))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        sys.exit(finetune.main(arguments(*argv)))


def kill_often(shared, pipe):
    """Start the program again and again, each time until a SIGKILL: anywhere, or while it writes a checkpoint or the
    finished pipeline. Then let it end, and run it once without kills.

    For a process of its own, from which the starts are forked: the imports take longer than a start. Sends how many
    kills there were, and how many of them came before the end of a write."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork cannot use a device that its parent has used
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that a kill would leave behind
    tqdm.monitor_interval = 0  # a thread, which might hold the lock at a fork
    options = [*KINDS["lora"], "lora.dropout=0.2", "train.batch_size=1", "train.checkpoint_every=2"]
    assert finetune.main(arguments(shared / "warm", shared / "subspace", *options, "train.steps=1")) == 0
    killed, rng, newest, until_write = shared / "killed", random.Random(0), 0, 1.0
    kills = inside = 0
    for where in ["checkpoint", "anywhere"] * 15 + ["pipeline"] * 5:
        steps = f"train.steps={newest if where == 'pipeline' else 1000}"
        receiver, sender = multiprocessing.Pipe(duplex=False)
        run = multiprocessing.get_context("fork").Process(
            target=train_and_tell, args=(sender, killed, shared / "subspace", *options, steps)
        )
        began = time.perf_counter()
        run.start()
        sender.close()
        if where != "anywhere":
            assert receiver.recv() == "writing"
            until_write = time.perf_counter() - began
        time.sleep(rng.uniform(0, 1.5 * until_write if where == "anywhere" else 0.015))
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        found, broken = newest_whole(killed / "checkpoints")
        before, newest = newest, int(found.name[5:]) if found else 0
        logged = len(read_lines(killed / "logs/train.jsonl"))
        assert not broken and max(before, logged - 2) <= newest <= logged
        kills += 1
        inside += where == "checkpoint" and newest == before
    for out in (killed, shared / "straight"):
        assert finetune.main(arguments(out, shared / "subspace", *options, f"train.steps={newest}")) == 0
    pipe.send((kills, inside))


def test_kill_9_at_random_instants_loses_only_what_is_after_the_last_checkpoint(shared, monkeypatch_module):
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=kill_often, args=(shared, sender))
    process.start()
    process.join()
    assert process.exitcode == 0
    kills, inside = receiver.recv()
    assert kills >= 30 and inside >= 5

    straight, killed = shared / "straight", shared / "killed"
    assert log_of(killed) == log_of(straight) and len(log_of(killed)) > 5
    for name in ("trained", "ema"):
        one, other = weights_of(straight, name), weights_of(killed, name)
        assert all(torch.equal(one[key], other[key]) for key in one | other)
    one, other = (json.loads((out / "metrics.json").read_text()) for out in (straight, killed))
    assert one["held_out_error"] == other["held_out_error"] and one["finetuned"] == other["finetuned"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_so(shared, monkeypatch_module, number):
    out = shared / f"signal-{number}"
    options = arguments(out, shared / "subspace", *KINDS["lora"], "train.steps=500", "train.checkpoint_every=500")
    run = subprocess.Popen(
        [sys.executable, "-m", "asymflow_ft.finetune", *options, "data.workers=1"], cwd=REPOSITORY,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while run.poll() is None and not (out / "logs/train.jsonl").is_file():
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(run.pid, number)  # a terminal and a scheduler signal the data workers too
    error = run.communicate()[1]
    assert run.returncode == 75 and "the same command continues" in error and "Traceback" not in error
    step = json.loads((out / "status.json").read_text())
    assert step["state"] == "stopped" and newest_whole(out / "checkpoints")[0].name == f"step-{step['step']:06d}"
    assert [line["step"] for line in log_of(out)] == list(range(1, step["step"] + 1))


def record() -> None:
    import tempfile
    from pathlib import Path

    os.chdir(REPOSITORY)
    folder, recorded = Path(tempfile.mkdtemp()), {}
    for kind, options in KINDS.items():
        assert finetune.main(arguments(folder / kind, folder / "subspace", *options)) == 0
        recorded[kind] = [line["loss"] for line in log_of(folder / kind)]
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    record()
