"""The memory that benchmarks ask for before they begin, and what they say where there is too little."""

import psutil
import pytest
import torch

from asymflow_ft import cli, commands
from asymflow_ft.bench import run, sample
from asymflow_ft.bench.architectures import NAMED
from asymflow_ft.bench.limits import NotEnoughMemory
from asymflow_ft.bench.run import accelerator_on, frozen_bytes, planned
from asymflow_ft.bench.workload import Options, make_recipe
from asymflow_ft.components.memory import memory_is_full

CPU = torch.device("cpu")
PETABYTE = 1 << 50  # more than a process can address


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes the machine has free."""
    machine = psutil.virtual_memory()
    return lambda size: monkeypatch.setattr(psutil, "virtual_memory", lambda: machine._replace(available=size))


def test_a_run_is_refused_for_its_training_step_alone(tmp_path, free, monkeypatch):
    """Not for what finetune.py does before it, since no benchmark does."""
    options = Options(resolution=512, precision="no", rank=2, perceptual="none")
    recipe = make_recipe(NAMED["tiny"], options, tmp_path, CPU)
    plan = planned(NAMED["tiny"], recipe, accelerator_on(CPU))
    monkeypatch.setattr(run, "plan_memory", lambda *_, **__: plan)
    step = plan.phases["training step"]
    assert step < plan.peak
    free(step)
    planned(NAMED["tiny"], recipe, accelerator_on(CPU))
    free(step - 1)
    with pytest.raises(NotEnoughMemory, match=rf"^a training step needs about {step / 1e9:.1f} GB and"):
        planned(NAMED["tiny"], recipe, accelerator_on(CPU))


@pytest.mark.parametrize(("what", "needs"), [("align", "the VAE with one picture"), ("cache", "encoding a picture")])
def test_pictures_that_cannot_be_encoded(what, needs, free, capsys):
    free(int(4e6))  # of 4.1 MB for encoding one
    assert cli.main(["bench", what, "--resolution", "64"]) == 1
    assert f"error: {needs} needs about 0.0 GB" in capsys.readouterr().err


class Built(Exception):
    pass


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("quant", ["full", "int8", "nf4"])
def test_drawing_asks_for_the_networks_that_it_holds(quant, precision, monkeypatch):
    asked, held = [], []

    def built(architecture, stock, lifted):
        held.append(frozen_bytes(lifted, stock.transformer))
        raise Built

    monkeypatch.setattr(sample, "check_memory", lambda needed, *_: asked.append(needed))
    monkeypatch.setattr(sample, "pixel_pipeline", built)
    with pytest.raises(Built):
        sample.bench_sample(NAMED["tiny"], Options(resolution=64, precision=precision, quant=quant), CPU)
    assert asked == held


def full_machine(*_):
    torch.empty(PETABYTE)


@pytest.mark.parametrize("work", [full_machine, lambda *_: bytearray(1 << 60)], ids=["torch", "python"])
def test_a_full_machine_is_explained(work, monkeypatch, capsys):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        work()
    assert memory_is_full(raised.value)
    monkeypatch.setitem(commands.BENCHES, "step", work)
    assert cli.main(["bench", "step"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: too little memory: ") and "--resolution" in said and "GPU" not in said
    monkeypatch.setitem(commands.COMMANDS, "bench", work)
    assert cli.main(["bench", "step"]) == 1
    said = capsys.readouterr().err
    assert "memory" in said and "smaller pictures, batches" in said


def test_a_picture_larger_than_the_memory_is_explained(capsys):
    assert cli.main(["bench", "sample", "--resolution", "16000000"]) == 1
    assert "error: too little memory: " in capsys.readouterr().err


def test_which_errors_say_that_memory_is_full():
    windows = "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
    assert memory_is_full(RuntimeError(windows)) and memory_is_full(torch.OutOfMemoryError("full"))
    shared = "unable to mmap 12582912 bytes from file <filename not specified>: Cannot allocate memory (12)"
    assert memory_is_full(RuntimeError(shared))  # a batch of a data worker
    assert not memory_is_full(RuntimeError("sizes do not match")) and not memory_is_full(ValueError("out of memory"))
