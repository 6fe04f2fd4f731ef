"""The benchmarks: what they count against hand counts, what they time against planted delays, and the commands."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from asymflow_ft import cli, commands
from asymflow_ft.bench import clock
from asymflow_ft.bench import step as bench
from asymflow_ft.bench.architectures import NAMED, find_architecture, random_transformer, transformer_on_meta
from asymflow_ft.bench.clock import Stopwatch, Timing, interleaved, ratio, summary
from asymflow_ft.bench.limits import figures_or_error
from asymflow_ft.bench.run import build_run, frozen_bytes, watched_perceptual
from asymflow_ft.bench.workload import Options, make_recipe
from asymflow_ft.components.quantize import quantize_frozen
from asymflow_ft.families import flux2
from asymflow_ft.training.rehearsal import Meter
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")
TINY = Options(resolution=64, precision="no", rank=8, perceptual="none", repeats=2)


def parameters(name):
    return sum(p.numel() for p in transformer_on_meta(find_architecture(name)).parameters())


def test_architectures_have_their_published_sizes():
    assert parameters("klein-4b") == 3_875_544_576
    assert parameters("klein-9b") == 9_078_581_248
    assert 95e6 < parameters("100m") < 105e6
    own = json.loads((REPOSITORY / "recipes/tiny/base/transformer/config.json").read_text())
    tiny = NAMED["tiny"].transformer
    assert {key: own[key] for key in tiny} == tiny


def test_a_config_names_its_family(tmp_path, tiny_base):
    found = find_architecture(f"{tiny_base}/transformer/config.json")
    assert found.family is flux2 and found.vae["block_out_channels"] == [16, 16, 32, 64]
    other = tmp_path / "transformer/config.json"
    other.parent.mkdir()
    other.write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match="UNet2DConditionModel cannot be converted"):
        find_architecture(str(other))
    other.write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match=r"VAE of .* is not known.*vae/config.json"):
        find_architecture(str(other))
    for text in ("[]", "{}", "no JSON"):
        other.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            find_architecture(str(other))
    own = json.loads(Path(f"{tiny_base}/transformer/config.json").read_text())
    assert find_architecture(f"{tiny_base}/transformer").transformer == own  # the folder does as well
    vae = tmp_path / "vae/config.json"
    vae.parent.mkdir()
    for changes, text in (
        ({"num_layers": "four"}, '{"_class_name": "AutoencoderKLFlux2"}'),
        ({"axes_dims_rope": [8, 8]}, '{"_class_name": "AutoencoderKLFlux2"}'),
        ({"attention_head_dim": 48}, '{"_class_name": "AutoencoderKLFlux2"}'),
        ({"in_channels": 64}, '{"_class_name": "AutoencoderKLFlux2"}'),
        ({}, '{"_class_name": "AutoencoderFoo"}'),
        ({}, '{"_class_name": "AutoencoderKL"}'),
    ):
        other.write_text(json.dumps(own | changes)), vae.write_text(text)
        with pytest.raises(ValueError, match=r"describes no network: "):
            find_architecture(str(other))
    other.write_text(json.dumps(own)), vae.write_text('{"_class_name": "AutoencoderKLFlux2", "latent_channels": 16}')
    with pytest.raises(ValueError, match="is not one that Flux2Transformer2DModel has latents of"):
        find_architecture(str(other))


def test_random_weights_keep_activations_near_unit_size():
    network = random_transformer(NAMED["tiny"], torch.float32, CPU)
    tokens, text = torch.randn(1, 16, 128), torch.randn(1, 8, 192)
    cond = flux2.Cond(text)
    out = flux2.predict(network, tokens, torch.tensor([0.5]), cond, (4, 4))
    assert 0.1 < out.std() < 10


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_repeated_weights_are_made_once_and_quantised_apart(kind):
    network = random_transformer(NAMED["tiny"], torch.float32, CPU, repeated=True)
    apart = random_transformer(NAMED["tiny"], torch.float32, CPU)
    linears = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    assert len({weight.data_ptr() for weight in linears}) == len({weight.shape for weight in linears}) < len(linears)
    for one in (network, apart):
        quantize_frozen(one, kind, flux2.TRAINED_ENDS, CPU)
    assert frozen_bytes(network) == frozen_bytes(apart)


def block_operations(image, text, width, mlp):
    """Operations of a double and of a single FLUX.2 block, by hand: 2 a multiplication. All but attention are
    matrix products with `width`; a product with a mlp input is doubled, for its gate."""
    n = image + text
    attention = 2 * (2 * n * n * width)  # scores, and values weighted by them
    double = 2 * n * width * (3 * width + width) + 2 * n * width * (2 * mlp + mlp) + attention
    single = 2 * n * width * (3 * width + 2 * mlp) + 2 * n * (width + mlp) * width + attention
    return double, single


def test_operations_are_those_of_a_hand_count():
    network = random_transformer(NAMED["tiny"], torch.float32, CPU)
    image, text, width, mlp = 64, 32, 192, 3 * 192
    double, single = block_operations(image, text, width, mlp)
    ends = 2 * image * width * 128 * 2 + 2 * text * 192 * width  # tokens in and out, text in
    time_and_modulation = 2 * width * (256 + width) + 2 * width * width * (6 + 6 + 3 + 2)
    with Meter() as meter, torch.no_grad():
        flux2.predict(
            network, torch.randn(1, image, 128), torch.tensor([0.5]), flux2.Cond(torch.randn(1, text, 192)), (8, 8)
        )
    assert meter.flops == 2 * double + 5 * single + ends + time_and_modulation


def test_summary_and_ratio():
    assert summary([4.0, 1.0, 2.0, 3.0, 5.0]) == Timing(3.0, 2.0, 4.0, 5)
    one, other = Timing(9.0, 9.0, 9.0, 1, processor=2.0), Timing(3.0, 3.0, 3.0, 1, processor=1.0)
    assert ratio(one, other, CPU) == 2 and ratio(one, other, torch.device("cuda")) == 3


def test_works_take_turns_and_warm_up():
    calls = []
    taken = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2, 1, CPU)
    assert calls == ["a", "b"] * 3 and taken["a"].repeats == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    recipe = make_recipe(NAMED["tiny"], replace(TINY, perceptual="vgg"), folder, CPU)
    recipe = replace(recipe, data=replace(recipe.data, workers=0))
    return build_run(NAMED["tiny"], recipe, accelerator, Stopwatch(CPU))


class Hands:
    """A clock that moves only when somebody spends time."""

    now = 0.0

    def spend(self, *_):
        self.now += 1


@pytest.fixture
def hands(monkeypatch):
    hands = Hands()
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: hands.now))
    return hands


def test_a_stopwatch_leaves_no_gap(hands):
    watch = Stopwatch(CPU)
    watch.start("rest")
    hands.spend()
    with watch.part("outer"):
        hands.spend()
        with watch.part("inner"):
            hands.spend()
        hands.spend()
    watch.switch("after")
    hands.spend()
    assert watch.stop() == {"rest": 1, "outer": 2, "inner": 1, "after": 1} and hands.now == 5


class Spend(torch.autograd.Function):
    """Spends time in its backward pass."""

    @staticmethod
    def forward(ctx, x, hands):
        ctx.hands = hands
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.hands.spend()
        return gradient, None


def slow_down(run, part, hands, monkeypatch):
    """Make something that belongs to `part` take time, once a step, or once in each direction."""
    block = run.network.single_transformer_blocks[0]
    if part == "data wait":
        batches = run.batches
        monkeypatch.setattr(run, "batches", (hands.spend() or batch for batch in batches))
    elif part == "perceptual":

        def distance(image, target):
            hands.spend()
            return Spend.apply(image - target, hands).mean(1, keepdim=True)

        monkeypatch.setattr(run, "perceptual", watched_perceptual(distance, run.watch))
    elif part == "recovery + loss arithmetic":
        decode = run.codec.decode
        monkeypatch.setattr(run.codec, "decode", lambda pixels: hands.spend() or Spend.apply(decode(pixels), hands))
    elif part in ("reference forward", "student forward", "recompute"):
        return block.register_forward_pre_hook(lambda *_: hands.spend() if run.watch.running == part else None)
    elif part == "backward":
        return block.attn.to_out.register_full_backward_pre_hook(hands.spend)
    elif part == "optimizer":
        return run.optimizer.optimizer.register_step_pre_hook(hands.spend)
    elif part == "EMA":
        update = run.ema.update
        monkeypatch.setattr(run.ema, "update", lambda step: hands.spend() or update(step))
    elif part == "rest":
        monkeypatch.setattr(bench, "summarise", hands.spend)
    return None


@pytest.mark.parametrize("part", bench.PARTS)
def test_every_delay_is_found_in_its_part(part, run, hands, monkeypatch):
    hook = slow_down(run, part, hands, monkeypatch)
    run.watch.start("rest")
    bench.train_step(run, 1)
    parts = run.watch.stop()
    if hook is not None:
        hook.remove()
    assert set(parts) == {*bench.PARTS}
    spent = 2.0 if part in ("perceptual", "recovery + loss arithmetic") else 1.0
    assert {name: seconds for name, seconds in parts.items() if seconds} == {part: spent}


@pytest.mark.parametrize("trained", [("--rank", "8", "--perceptual", "vgg"), ("--rank", "8"), ("--full",)])
def test_parts_are_the_whole_and_memory_is_the_plan(trained, capsys, tmp_path):
    options = ["--resolution", "64", "--perceptual", "none", *trained, "--repeats", "2"]
    assert cli.main(["bench", "step", *options, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert list(result["parts"]) == list(bench.PARTS) and (tmp_path / "chart.png").stat().st_size > 1000
    assert sum(part["median"] for part in result["parts"].values()) == pytest.approx(result["step"]["median"])
    for name, item in result["memory"].items():
        assert item["measured"] == pytest.approx(item["planned"], rel=0.06, abs=1000), name
    counted = result["operations"]
    assert result["tflops"] * result["step"]["median"] == pytest.approx(counted["step"] / 1e12)
    assert result["floor"]["seconds"] == pytest.approx(4 * counted["forward"] / result["matmul"]["tflops"] / 1e12)
    product = result["matmul"]["product"]  # on a CPU by the process's own clock, and the rate by the one on the wall
    rate = result["matmul"]["tflops"] * 1e12 * product["median"] / product["processor"]
    assert result["over_floor"] == pytest.approx(result["step"]["processor"] / (4 * counted["forward"] / rate))
    assert result["share_of_matmul_rate"] == pytest.approx(counted["step"] / result["step"]["processor"] / rate)
    assert result["mfu"] is None and result["machine"]["versions"]["torch"] == torch.__version__
    assert result["machine"]["attention"] == os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")
    shown = capsys.readouterr().out
    assert "  recompute" in shown and "MFU not measured" in shown


@pytest.mark.parametrize("quant", ["full", "int8", "nf4"])
def test_memory_alone_is_that_of_a_timed_step(quant, tmp_path, capsys):
    options = ["--resolution", "64", "--rank", "8", "--precision", "bf16", "--optimizer", "adamw8bit",
               "--perceptual", "none", "--quant", quant]  # fmt: skip
    for what in ("memory", "step"):
        own = ["--repeats", "1", "--warmup", "1"] if what == "step" else []
        assert cli.main(["bench", what, *options, *own, "--out", str(tmp_path / what)]) == 0
        if what == "memory":
            shown = capsys.readouterr().out
    alone, timed = (json.loads((tmp_path / what / "bench.json").read_text()) for what in ("memory", "step"))
    assert alone["memory"] == timed["memory"] and alone["memory"]["activations"]["measured"] > 1e6
    assert alone["tokens"] == 16 + 32 and alone["trained"] == timed["trained"]
    assert (tmp_path / "memory/chart.png").stat().st_size > 1000
    assert f"{sum(item['measured'] for item in alone['memory'].values()) / 1e6:.3g} MB" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "klein4b"], "did you mean klein-4b?"),
        (["--arch", "nowhere/config.json"], "cannot read nowhere/config.json"),
        (["--resolution", "0"], "--resolution is 0; it must be 16 or a multiple of it"),
        (["--out", "README.md/folder"], "--out README.md/folder cannot be made"),
        (["--resolution", "100"], "--resolution 100 is not a multiple of the patch, 16; the nearest is 96"),
        (["--repeats", "0"], "--repeats is 0; it must be 1 or more"),
        (["--warmup", "-1"], "--warmup is -1; it must be 0 or more"),
        (["--full", "--quant", "nf4"], "quantised weights cannot be"),
        (["--full"], "use a smaller --arch"),
        (["--no-reference", "--perceptual", "vgg"], "set loss.perceptual=none"),
        (
            ["--batch-guidance", "--images", "3"],
            "bench step has no use for --batch-guidance, --images; it takes --batch",
        ),
    ],
)
def test_messages(options, message, capsys, monkeypatch):
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine._replace(available=int(8e6)))
    assert cli.main(["bench", "step", *options]) == 1
    assert message in capsys.readouterr().err


FULL = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED in a call")]


@pytest.mark.parametrize("error", FULL, ids=["torch", "cublas"])
def test_a_full_gpu_is_explained(error, capsys, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setitem(commands.BENCHES, "step", full)
    assert cli.main(["bench", "step"]) == 1
    assert "too little memory: " in capsys.readouterr().err
    assert figures_or_error(full, NAMED["tiny"], TINY, CPU) is error
    error = RuntimeError("another one")
    with pytest.raises(RuntimeError, match="another one"):
        figures_or_error(full, NAMED["tiny"], TINY, CPU)
