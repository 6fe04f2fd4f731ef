"""One run, however it is spread: two processes give the losses of one, and every checkpoint continues every run."""

import os
import subprocess
import sys

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator

from asymflow_ft.training.distributed import gather, gather_optimizer, load_optimizer
from tests.conftest import REPOSITORY
from tests.spread_training import SAVED, run


@pytest.fixture(scope="module")
def alone():
    return run(Accelerator(cpu=True, mixed_precision="no"))


def close(one, other, tolerance):
    """Relative distance of two sets of tensors, seen as vectors; Adam blows rounding up where gradients vanish."""
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= tolerance * one[name].norm(), name


@pytest.mark.parametrize(
    ("config", "kind"), [("cpu", "DistributedDataParallel"), ("fsdp2", "FSDPFlux2Transformer2DModel")]
)
def test_two_processes_train_as_one(alone, tmp_path, config, kind):
    torch.save(alone["saved"], tmp_path / "alone.pt")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", f"recipes/accelerate/{config}.yaml", "tests/spread_training.py"]
    command = [*launch, tmp_path / "alone.pt", tmp_path / "results.pt"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    spread = results["run"]
    assert spread["kind"] == kind

    assert spread["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert spread["norms"] == pytest.approx(alone["norms"], rel=1e-3)
    for what in ("trained", "ema"):
        close(alone[what], spread[what], 1e-3)
    close({"drawn": alone["drawn"]}, {"drawn": spread["drawn"]}, 1e-3)

    # its own checkpoint continues it bit for bit
    own = results["own"]
    assert own["losses"] == spread["losses"][SAVED:]
    for what in ("trained", "ema"):
        assert all(torch.equal(value, spread[what][name]) for name, value in own[what].items())
    # and the checkpoint of a single process continues there
    assert results["other"]["losses"] == pytest.approx(alone["losses"][SAVED:], rel=1e-4)
    close(alone["trained"], results["other"]["trained"], 1e-3)

    one = run(Accelerator(cpu=True, mixed_precision="no"), dtype=torch.bfloat16)
    assert results["bf16"]["losses"] == pytest.approx(one["losses"], rel=1e-2)
    assert {value.dtype for value in results["bf16"]["trained"].values()} == {torch.float32}


def test_a_single_run_continues_bit_for_bit(alone):
    again = run(Accelerator(cpu=True, mixed_precision="no"), alone["saved"])
    assert again["losses"] == alone["losses"][SAVED:]
    assert all(torch.equal(value, alone["trained"][name]) for name, value in again["trained"].items())


@pytest.mark.parametrize("bits", [8, 32])
def test_optimizer_state_survives_a_file_bit_for_bit(tmp_path, bits):
    kind = bitsandbytes.optim.AdamW8bit if bits == 8 else torch.optim.AdamW

    def start():
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (3,), (16, 512))]
        groups = [{"params": weights[:2], "lr": 1e-3, "peak": 1.0}, {"params": weights[2:], "lr": 3e-3, "peak": 2.0}]
        return weights, kind(groups, weight_decay=0.01)

    def steps(weights, optimizer, numbers):
        for number in numbers:
            torch.manual_seed(number)
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()

    weights, optimizer = start()
    steps(weights, optimizer, range(3))
    torch.save(gather_optimizer(optimizer, keep=True), tmp_path / "optimizer.pt")
    halfway = [weight.detach().clone() for weight in weights]
    steps(weights, optimizer, range(3, 6))

    others, other = start()
    load_optimizer(other, torch.load(tmp_path / "optimizer.pt", weights_only=True))
    with torch.no_grad():
        for weight, value in zip(others, halfway, strict=True):
            weight.copy_(value)
    steps(others, other, range(3, 6))
    assert all(torch.equal(one, two) for one, two in zip(weights, others, strict=True))
    assert other.param_groups[1]["peak"] == 2.0
    if bits == 8:
        moments = [entry["__bnb_optimizer_quant_state__"] for entry in other.state_dict()["state"].values()]
        assert [entry["state1"].dtype for entry in moments] == [torch.uint8, torch.float32, torch.uint8]


def test_only_the_keeper_holds_whole_tensors():
    assert gather({"a": torch.ones(2)}, keep=False) == {}
    assert gather_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]), keep=False) == {}
