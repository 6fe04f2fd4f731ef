"""The plan of a run against what torch, bitsandbytes and the published models really hold."""

import contextlib
import re
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from huggingface_hub.hf_api import ModelInfo
from torch.profiler import ProfilerActivity, profile

from asymflow_ft.bench.run import frozen_bytes
from asymflow_ft.components.norms import narrow_norms
from asymflow_ft.components.quantize import quantize_frozen
from asymflow_ft.components.subspace import Cond, PixelModel
from asymflow_ft.data.cache import pack
from asymflow_ft.families import flux2
from asymflow_ft.families.base import transformer_on_meta, vae_on_meta
from asymflow_ft.recipe import load_recipe, override
from asymflow_ft.training import memory, plan, rehearsal
from tests.conftest import REPOSITORY
from tests.fake_cuda import FusedKernels, fake_cuda

KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
SMALL = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 4, "joint_attention_dim": 384}
TEXT_ENCODER_4B = 8_044_936_192  # Qwen3-4B in bf16
LORA = "lora={rank: 16, dropout: 0.1}"


def on_meta(config):
    with init_empty_weights():
        return Flux2Transformer2DModel.from_config({**config, "guidance_embeds": False})


def published_vae():
    with init_empty_weights():
        vae = AutoencoderKLFlux2()
    assert sum(p.numel() for p in vae.parameters()) == 84_046_115
    return vae


def tiny_recipe(*overrides):
    return load_recipe(REPOSITORY / "recipes/tiny/finetune.yaml", overrides)


@pytest.fixture(scope="module")
def klein_4b():
    return on_meta(KLEIN_4B), published_vae()


@pytest.fixture(scope="module")
def small(tiny_base):
    return on_meta(SMALL), vae_on_meta(tiny_base)


@pytest.mark.parametrize(
    ("config", "total", "trained", "width"),
    [(KLEIN_4B, 3_875_544_576, 191_168_512, 3072), (KLEIN_9B, 9_078_581_248, 353_435_648, 4096)],
    ids=["4B", "9B"],
)
def test_published_models_are_counted_exactly(config, total, trained, width):
    recipe = load_recipe(REPOSITORY / "recipes/flux2_klein.yaml")
    network, base, _ = memory.build_networks(recipe, flux2, on_meta(config), published_vae())
    tensors = memory.count_tensors(flux2, network, (network, base))
    assert sum(number for _, number in tensors.trained) == trained
    # bf16; besides the base, the two lifted end layers of 768 values per token
    assert tensors.frozen == 2 * (total + 2 * 768 * width)
    ends = 2 * width * (128 + 768) + 2 * width**2
    norms = 128 * (4 * config["num_layers"] + 2 * config["num_single_layers"])
    assert sum(rows * columns for rows, columns, _ in tensors.linears) == tensors.frozen // 2 - ends - norms


def test_full_training_counts_a_float32_copy_beside_the_base(tiny_base):
    network, base, _ = memory.build_networks(
        tiny_recipe(), flux2, transformer_on_meta(flux2, tiny_base), vae_on_meta(tiny_base)
    )
    tensors = memory.count_tensors(flux2, network, (network, base))
    assert (sum(number for _, number in tensors.trained), tensors.frozen, tensors.linears) == (
        5_358_144, 4 * 5_112_384, (),
    )  # fmt: skip


def test_quantised_weights_and_moments_are_what_bitsandbytes_holds():
    for kind in ("nf4", "int8"):
        layer = torch.nn.Sequential(torch.nn.Linear(200, 384, bias=False))
        quantize_frozen(layer, kind, (), "cpu")
        assert memory.quantised_bytes(kind, 384, 200, 0) == frozen_bytes(layer)
    for kind, make in (("adamw8bit", bitsandbytes.optim.AdamW8bit), ("adamw", torch.optim.AdamW)):
        for number in (100, 4096, 5000):
            parameter = torch.nn.Parameter(torch.randn(number))
            parameter.grad = torch.ones(number)
            optimizer = make([parameter])
            optimizer.step()
            state = optimizer.state[parameter].items()
            held = sum(value.nbytes for name, value in state if name != "step" and not name.startswith("qmap"))
            assert memory.optimizer_bytes(kind, number) == held


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


class Allocations(rehearsal.Meter):
    """A Meter beside which torch's profiler writes down what the CPU allocator did, but for what is gone when a matrix
    product ends: some CPUs (those with AMX) take a work space for it."""

    peak_of_allocator = 0

    def __enter__(self):
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.profiler.__exit__(*error)
        events = self.profiler.profiler.kineto_results.events()
        products = [(event.start_ns(), event.end_ns()) for event in events if event.name() in PRODUCTS]
        now = 0
        for event in (event for event in events if event.name() == "[memory]"):
            outside = not any(start <= event.start_ns() <= end for start, end in products)
            before, now = now, now + event.nbytes()
            if outside:
                Allocations.peak_of_allocator = max(Allocations.peak_of_allocator, before, now)


@pytest.mark.parametrize(
    "overrides",
    [
        (LORA, "train.precision=bf16"),
        (LORA, "train.precision=bf16", "train.gradient_checkpointing=true", "train.batch_size=3"),
        (LORA, "train.precision=bf16", "train.gradient_checkpointing=selective"),
        (LORA, "train.precision=bf16", "data.condition_resolution=96", "train.batch_size=2"),
        (LORA, "train.precision=bf16", "loss.perceptual=lpips", "train.batch_size=2"),
        ("lora=null", "train.precision=no", "data.resolution=192", "train.batch_size=2"),
        ("lora=null", "train.precision=bf16", "train.gradient_checkpointing=true"),
    ],
    ids=[
        "lora",
        "lora-checkpointing",
        "lora-selective",
        "lora-conditions",
        "lora-lpips",
        "full",
        "full-checkpointing",
    ],
)
def test_rehearsal_holds_what_a_real_step_allocates(overrides, small, monkeypatch):
    recipe = tiny_recipe(*overrides)
    conditions = 2 if recipe.data.condition_resolution else 0

    def step():
        return rehearsal.rehearse_step(recipe, flux2, *memory.build_networks(recipe, flux2, *small), conditions)

    for_gpu = step()
    monkeypatch.setattr(rehearsal, "as_on_cuda", contextlib.nullcontext)
    for_cpu = step()
    monkeypatch.setattr(rehearsal, "FakeTensorMode", lambda **options: contextlib.nullcontext())
    monkeypatch.setattr(rehearsal, "Meter", Allocations)
    Allocations.peak_of_allocator = 0
    assert step() == for_cpu  # real tensors
    real = Allocations.peak_of_allocator
    assert max(for_cpu.network, for_cpu.perceptual) == pytest.approx(real, rel=0.02)
    assert max(for_gpu.network, for_gpu.perceptual) == pytest.approx(real, rel=0.15)


def test_drawing_is_planned_as_cuda_draws(small):
    """With norms in 16 bits; CUDA's autocast alone takes a quarter more."""
    recipe = tiny_recipe(LORA, "train.precision=bf16", "data.resolution=512")
    network, base, subspace = memory.build_networks(recipe, flux2, *small)
    rehearsal.rehearse_step(recipe, flux2, network, base, subspace)
    planned = rehearsal.rehearse_drawing(recipe, flux2, network, subspace, 2)
    network, _, subspace = memory.build_networks(recipe, flux2, *small)
    with fake_cuda(), FusedKernels(), torch.no_grad():
        for module in (network.requires_grad_(False), subspace):  # a torch without CUDA has no gradients there
            module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        model = PixelModel(narrow_norms(network).eval(), subspace, flux2.predict)
        with rehearsal.Meter([*network.parameters(), *subspace.buffers()]) as meter:
            length, width = recipe.text.max_length, flux2.text_dim(network)
            embeds = torch.empty(2, length, width, dtype=torch.bfloat16, device="cuda")
            x, sigma = (torch.empty(2, *shape, device="cuda") for shape in ((32**2, 768), (1, 1)))
            guided = [model.velocity(x, sigma, Cond(embeds), (32, 32)) for _ in range(2)]
    assert len(guided) == 2 and planned == pytest.approx(meter.peak, rel=0.035)


def test_arithmetic_is_that_of_the_paper(klein_4b):
    """34.8 and 75.5 TFLOP per image of 1024x1024 with 512 text tokens; training takes about four times that."""
    recipe = load_recipe(REPOSITORY / "recipes/flux2_klein.yaml", ["loss.perceptual=none"])
    for base, tflop in ((klein_4b[0], 34.8), (on_meta(KLEIN_9B), 75.5)):
        step = rehearsal.rehearse_step(recipe, flux2, *memory.build_networks(recipe, flux2, base, klein_4b[1]))
        assert step.reference_flops == pytest.approx(tflop * 1e12, rel=0.03)
        assert step.flops == pytest.approx(4 * step.forward_flops, rel=0.1)


def test_vgg_has_its_published_size():
    assert sum(p.numel() for p in memory.vgg_on_meta().parameters()) == 14_714_688 + 1_472


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora=null", "data.more_resolutions=[192]"),
        ("lora={rank: 64}", "loss.perceptual=lpips", "data.resolution=512"),
    ],
    ids=["full", "lora"],
)
def test_each_advice_saves_what_it_says(overrides, small):
    recipe = tiny_recipe(*overrides, "train.precision=bf16", "train.batch_size=6")
    before = memory.plan_memory(recipe, flux2, *small, text_encoder=0)
    advice = memory.advise(before, flux2, *small, count=20)
    keys = [one.overrides[0].partition("=")[0] for one in advice]
    assert {"train.gradient_checkpointing", "train.batch_size", "train.optimizer", "train.ema_device"} <= {*keys}
    assert ("data.more_resolutions" if recipe.lora is None else "data.resolution") in keys
    assert len({*keys}) == len(keys) and ("lora" in keys) == (recipe.lora is None)
    assert advice == sorted(advice, key=lambda one: -one.saved)
    for one in advice:
        changed = override(recipe, one.overrides)
        after = memory.plan_memory(changed, flux2, *small, text_encoder=0)
        assert before.total - after.total == one.saved > 0, one
        assert changed.train.batch_size * changed.train.accumulation == 6
    assert memory.advise(before, flux2, *small, free_bytes=before.total) == []


def test_room_is_used_for_the_least_recomputation(small):
    plans = {
        kind: memory.plan_memory(tiny_recipe(LORA, f"train.gradient_checkpointing={kind}"), flux2, *small, 0)
        for kind in ("true", "selective", "false")
    }
    everything, selective, nothing = plans.values()
    assert nothing.step.flops < selective.step.flops < everything.step.flops
    for free, found in (
        (nothing.total, nothing), (nothing.total - 1, selective), (selective.total - 1, None),
    ):  # fmt: skip
        assert memory.less_recomputation(everything, flux2, *small, free) == found
    assert memory.less_recomputation(selective, flux2, *small, nothing.total) == nothing
    assert memory.less_recomputation(nothing, flux2, *small, nothing.total) is None
    compiled = tiny_recipe(LORA, "train.compile=true", "train.gradient_checkpointing=true")
    compiled_plan = replace(everything, recipe=compiled)
    assert memory.less_recomputation(compiled_plan, flux2, *small, nothing.total - 1) is None
    no_checkpoints = replace(nothing, recipe=override(compiled, ["train.gradient_checkpointing=false"]))
    advice = [one.overrides[0] for one in memory.advise(no_checkpoints, flux2, *small, count=20)]
    assert "train.gradient_checkpointing=true" in advice
    (line,) = plan.describe_room(everything, selective, 24.0)
    assert "24 GB have room for train.gradient_checkpointing=selective: " in line and "% less arithmetic" in line


def test_nf4_is_proposed_only_where_int8_is_not_enough(small):
    now = memory.plan_memory(tiny_recipe(LORA), flux2, *small, text_encoder=0)
    int8 = replace(now, recipe=tiny_recipe(LORA, "train.base_weights=int8"))
    for free, kind in ((int8.total, "int8"), (int8.total - 1, "nf4"), (None, "nf4")):
        advice = memory.advise(now, flux2, *small, free, count=20)
        assert [one.overrides for one in advice if "base_weights" in str(one)] == [(f"train.base_weights={kind}",)]


@pytest.mark.slow
def test_the_documented_table(klein_4b):
    """docs/training.md: | 24 GB | `key=value key=value` | 15.7 GB |"""
    text = (REPOSITORY / "docs/training.md").read_text()
    rows = re.findall(r"^\| (\d+) GB \| (.*?) \| ([\d.]+) GB \|", text, re.MULTILINE)
    assert len(rows) >= 6
    for card, keys, total in rows:
        recipe = load_recipe(REPOSITORY / "recipes/flux2_klein.yaml", re.findall(r"[\w.]+=\w+", keys))
        planned = memory.plan_memory(recipe, flux2, *klein_4b, TEXT_ENCODER_4B)
        assert planned.card_gb <= int(card) and planned.total / 1e9 == pytest.approx(float(total), abs=0.06), keys


def test_repository_on_the_hub(monkeypatch):
    sizes = {
        "model_index.json": 1, "README.md": 2, "whole.safetensors": 7000, "transformer/config.json": 3,
        "transformer/a.safetensors": 700, "transformer/a.bin": 800, "text_encoder/b.safetensors": 90,
    }  # fmt: skip
    siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    card = {"license": "other", "license_name": "some-licence"}
    monkeypatch.setattr(plan, "model_info", lambda *a, **k: ModelInfo(id="a/b", siblings=siblings, cardData=card))
    index = {"_class_name": "P", "transformer": ["diffusers", "T"], "text_encoder": ["transformers", "Q"]}
    monkeypatch.setattr(plan, "load_index", lambda base, revision: index)
    monkeypatch.setattr(
        plan, "try_to_load_from_cache", lambda base, name, revision: name if "config" in name else None
    )
    found = plan.open_repository("a/b", None)
    assert found.missing == {
        "model_index.json": 1, "transformer/a.safetensors": 700, "text_encoder/b.safetensors": 90,
    }  # fmt: skip
    assert found.part("text_encoder") == 90 and found.licence == "other, some-licence"

    def no_answer(*a, **k):
        raise ConnectionError

    monkeypatch.setattr(plan, "model_info", no_answer)
    assert plan.open_repository("a/b", None) is None


@pytest.mark.parametrize("latents", ["float16", "float32", "fp8"])
@pytest.mark.parametrize(("precision", "text"), [("bf16", "bfloat16"), ("no", "float32"), ("bf16", "fp8")])
def test_disk_is_what_the_cache_stores(latents, precision, text):
    def need(*overrides):
        keys = f"cache.latents={latents}", f"cache.text={'fp8' if text == 'fp8' else 'exact'}"
        recipe = tiny_recipe(f"train.precision={precision}", *keys, *overrides)
        empty = memory.MemoryPlan(recipe, 0, memory.Tensors(0, (), ()), rehearsal.Step(0, 0, 0, 0, 0, 0), 0, 0, 0)
        return plan.disk_need(empty, None, 600, 400)

    assert need() == {"text embeddings": pack(torch.ones(400), text)[""].nbytes,
                      "latents": pack(torch.ones(600), latents)[""].nbytes}  # fmt: skip
    assert need("cache.enabled=false") == {}


def test_report_names_what_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    recipe = tiny_recipe(f"output_dir={tmp_path}", "train.steps=1000", "sample.every=0", "sample.judge=0")
    text = plan.dry_run(recipe, tflops=1.0, card_gb=0.9)
    step = memory.plan_memory(
        recipe, flux2, transformer_on_meta(flux2, recipe.base), vae_on_meta(recipe.base), text_encoder=0
    ).step
    pictures = 3 * 8 * 20 * 2 * step.forward_flops / 8
    assert f"{(1000 * step.flops + pictures) / 1e12 / 3600:.3g} hours at 1 TFLOP/s per GPU (as given)" in text
    assert "exceeds 1 GB" in text and "train.gradient_checkpointing=true (about 0.1 GB less)" in text
    assert re.search(r"proj_out +147,456   learning rate 0.001\n", text)
    # 3 checkpoints of weights, average and two moments in float32
    assert re.search(rf"checkpoints, 2 \+ 1 +{3 * 4 * 4 * 5_358_144 / 1e9:.2f} GB\n", text)
    assert "nothing to download" in text and not list(tmp_path.iterdir())


def test_out_of_memory_message(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert re.fullmatch(
        r"CUDA out of memory\.\nthese recipe keys would help most: \S+=.* \(about [\d.]+ GB less\)(; .*){2}",
        plan.out_of_memory(tiny_recipe(), torch.OutOfMemoryError("CUDA out of memory.")),
    )
