"""`asymflow-ft bench sample` at its smallest: what it draws, with which weights, and what its figures say; and the
rates of the data sheets."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from asymflow_ft import cli
from asymflow_ft.bench import sample
from asymflow_ft.bench.limits import peak_rate
from asymflow_ft.families import flux2


def run(out, *options):
    assert cli.main(["bench", "sample", "--resolution", "64", "--out", str(out), *options]) == 0
    return json.loads((out / "bench.json").read_text())


@pytest.mark.parametrize("batch_guidance", [False, True])
def test_the_sampling_benchmark(batch_guidance, capsys, tmp_path, monkeypatch):
    batches, forward = [], flux2.TRANSFORMER.forward
    monkeypatch.setattr(
        flux2.TRANSFORMER, "forward",
        lambda network, **inputs: batches.append(len(inputs["hidden_states"])) or forward(network, **inputs),
    )  # fmt: skip
    result = run(tmp_path, "--repeats", "2", *(["--batch-guidance"] if batch_guidance else []))
    pairs = 2 + 2  # with the warm-up
    steps = 6 * (pairs + 1)  # with the picture whose memory is taken
    assert batches.count(2) == pairs + steps * batch_guidance
    # the stock pipeline has two calls a step whatever is asked
    assert batches.count(1) == 2 * pairs + 2 * steps + 2 * steps * (not batch_guidance)
    eager = result["eager"]
    assert eager["pixel"]["step"]["repeats"] == eager["latent"]["step"]["repeats"] == 2 * 5
    for kind in ("pixel", "latent"):
        own = eager[kind]
        assert own["network"]["processor"] / own["step"]["processor"] == pytest.approx(1 - own["outside_network"])
        assert 0 < own["outside_network"] < 1
    assert set(result["arithmetic"]) == {"recovery", "guidance", "clamp"}
    assert "pixel over latent step" in capsys.readouterr().out and (tmp_path / "chart.png").is_file()


def test_memory_of_drawing(tmp_path, capsys):
    plain = run(tmp_path / "plain", "--repeats", "1")["memory"]
    batched = run(tmp_path / "batched", "--repeats", "1", "--batch-guidance")["memory"]
    wider_ends = 2 * 192 * (768 - 128) * 4  # bytes: both end layers of the tiny network, from 128 values to 768
    assert plain["pixel"]["network"] - plain["latent"]["network"] == wider_ends
    assert batched["latent"] == plain["latent"]
    pixel, latent = plain["pixel"]["drawing"], plain["latent"]["drawing"]
    picture = 3 * 64 * 64 * 4
    assert 0 < pixel - latent < 10 * picture  # the solver's states; the network holds the same
    assert batched["pixel"]["drawing"] - pixel == pytest.approx(latent, rel=0.2)  # a second picture in the network
    assert "memory: pixel step" in capsys.readouterr().out


class Work(nn.Module):
    """A network and a scheduler, each call of which takes a GPU `milliseconds`."""

    def __init__(self, gpu, milliseconds):
        super().__init__()
        self.gpu, self.milliseconds = gpu, milliseconds

    def forward(self):
        self.gpu.clock += self.milliseconds

    step = forward


def test_a_gpu_is_waited_for_once_a_picture(monkeypatch):
    gpu = SimpleNamespace(clock=0.0, waited=0)

    class Event:
        def __init__(self, enable_timing=False):
            self.timed = enable_timing

        def record(self):
            self.at, self.waited = gpu.clock, gpu.waited

        def elapsed_time(self, end):
            assert self.timed and end.timed and end.waited < gpu.waited  # or CUDA says that it has not happened
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(sample, "synchronise", lambda device: vars(gpu).update(waited=gpu.waited + 1))
    pipeline = SimpleNamespace(transformer=Work(gpu, 40), scheduler=Work(gpu, 3))

    def picture():
        for _ in range(3):
            pipeline.transformer(), pipeline.transformer(), pipeline.scheduler.step()

    with sample.traced(pipeline, torch.device("cuda")) as draw:
        for count in (1, 2):
            trace = draw(picture)
            assert gpu.waited == count
            assert [wall for wall, _ in trace.steps] == pytest.approx([0.083] * 2)
            assert [wall for wall, _ in trace.network] == pytest.approx([0.080] * 2)
            assert [wall for wall, _ in trace.first] == pytest.approx([0.083])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_both_networks_are_quantised(kind, tmp_path, monkeypatch):
    networks, quantize = [], sample.quantize_frozen

    def watched(network, *arguments):
        quantize(network, *arguments)
        linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
        networks.append([type(linear.weight).__name__ for linear in linears])

    monkeypatch.setattr(sample, "quantize_frozen", watched)
    result = run(tmp_path, "--repeats", "1", "--quant", kind)
    name, ends = {"nf4": "Params4bit", "int8": "Int8Params"}[kind], len(flux2.TRAINED_ENDS)
    assert networks[0] == networks[1] and len(networks) == 2
    assert networks[0].count(name) == len(networks[0]) - ends
    assert result["eager"]["pixel_over_latent"] > 0
    most = {"nf4": 4.1e6, "int8": 6.6e6}[kind]  # bytes, of 21.4 MB in float32
    assert all(held["network"] < most for held in result["memory"].values())


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ],
)
def test_a_data_sheet_is_of_one_card_and_of_bf16(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    card = torch.device("cuda", 0)
    assert peak_rate(card, torch.bfloat16) == (tflops and tflops * 1e12)
    assert peak_rate(card, torch.float32) is None and peak_rate(torch.device("cpu"), torch.bfloat16) is None
