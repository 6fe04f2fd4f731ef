"""What holds for every family: it is trained, compiled, exported and loaded."""

import copy
import json

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

from asymflow_ft import cli
from asymflow_ft.components.subspace import Cond
from asymflow_ft.export import load_pixel_pipeline
from asymflow_ft.families.base import compile_blocks
from asymflow_ft.hub.bundle import bundle
from asymflow_ft.training import trainable
from asymflow_ft.training.recompute import checkpointed
from tests.families.conftest import LENGTH, PROMPTS, SIDE, pixel_pipeline


def test_bfloat16_is_near_float32(tiny):
    """Frozen weights and text in bfloat16, trained weights in float32, tokens and tau in float32 in and out; times are
    not rounded, which would make 1000 of 998.3."""
    grid, x, tau = tiny.grid, tiny.latents(2, seed=9) @ tiny.subspace.basis.mT, torch.tensor([0.4013, 0.9983])
    outputs = []
    # a guidance value that a network's own rounding of 1000 x it to bfloat16 leaves alone
    guidance = None if tiny.guidance() is None else 4.096
    for dtype in (torch.float32, torch.bfloat16):
        network = tiny.family.lift(copy.deepcopy(tiny.parts.transformer).to(dtype), tiny.subspace)
        trainable.attach_lora(network, tiny.family.lora_targets(network), tiny.family.TRAINED_ENDS, 2, 0.0)
        outputs.append(tiny.family.predict(network, x, tau, Cond(tiny.texts().to(dtype), guidance), grid))
        outputs[-1].square().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in trainable.trained_parameters(network).values())
    assert outputs[1].dtype == torch.float32
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 1e-5 < error < 0.05


def test_exactly_the_ends_and_the_adapters_are_trained(tiny):
    lifted = tiny.family.lift(tiny.parts.transformer, tiny.subspace)
    modules, targets = dict(lifted.named_modules()), tiny.family.lora_targets(lifted)
    assert len(set(targets)) == len(targets) and targets
    ends = {f"{end}.{name}" for end in tiny.family.TRAINED_ENDS for name, _ in modules[end].named_parameters()}
    trainable.attach_lora(lifted, targets, tiny.family.TRAINED_ENDS, 2, 0.0)
    trained = {trainable.adapter_name(name) for name in trainable.trained_parameters(lifted)}
    assert trained == ends | {f"{name}.lora_{side}.weight" for name in targets for side in "AB"}
    assert tiny.family.OUTPUT_LAYER in tiny.family.TRAINED_ENDS


def test_gradient_checkpointing_changes_nothing(tiny):
    grid, x = tiny.grid, tiny.latents(2, seed=6) @ tiny.subspace.basis.mT
    embeds, tau, gradients = tiny.texts().detach(), torch.tensor([0.4, 0.7]), []
    for checkpointing in (False, True, "selective"):
        network = tiny.family.lift(tiny.parts.transformer, tiny.subspace)
        torch.manual_seed(0)
        trainable.attach_lora(network, tiny.family.lora_targets(network), tiny.family.TRAINED_ENDS, 2, 0.0)
        network.train()
        if checkpointing:
            network.enable_gradient_checkpointing(checkpointed(checkpointing))
        tiny.family.predict(network, x, tau, Cond(embeds, tiny.guidance()), grid).square().mean().backward()
        parameters = trainable.trained_parameters(network)
        gradients.append({name: parameter.grad for name, parameter in parameters.items()})
        assert all(gradient is not None for gradient in gradients[-1].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
        assert torch.equal(gradients[2][name], gradients[1][name])
    assert any(gradient.any() for name, gradient in gradients[0].items() if ".lora_B." in name)


def test_all_repeated_blocks_are_compiled(tiny):
    """And nothing else is: all weights in lists of blocks are in modules that will be compiled."""
    network = tiny.family.lift(tiny.parts.transformer, tiny.subspace)
    compile_blocks(network)
    compiled = [block for block in network.modules() if block._compiled_call_impl is not None]
    lists = [block for block in network.modules() if isinstance(block, nn.ModuleList)]
    inside = [{id(p) for module in modules for p in module.parameters()} for modules in (compiled, lists)]
    assert inside[0] == inside[1] and inside[0]


@torch.no_grad()
@pytest.mark.slow
def test_compiled_is_eager(tiny):
    network = tiny.family.lift(tiny.parts.transformer, tiny.subspace)
    x, tau = tiny.latents(2, seed=10) @ tiny.subspace.basis.mT, torch.tensor([0.3, 0.85])
    cond = Cond(tiny.texts(), tiny.guidance())
    eager = tiny.family.predict(network, x, tau, cond, tiny.grid)
    compile_blocks(network)
    counters.clear()
    compiled = tiny.family.predict(network, x, tau, cond, tiny.grid)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5 * eager.abs().max().item())
    assert counters["frames"]["ok"] > 0


@torch.no_grad()
def test_a_lora_of_the_base_loads_on_the_pixel_pipeline(tiny, tmp_path):
    base = type(tiny.parts.transformer).from_config(tiny.parts.transformer.config)
    base.load_state_dict(tiny.parts.transformer.state_dict())
    targets = tiny.family.lora_targets(base)
    torch.manual_seed(1)
    base.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    kind = type(tiny.parts)
    kind.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(base))
    pipeline = pixel_pipeline(tiny)
    z, grid = tiny.latents(1, seed=7), tiny.grid
    tau, cond, basis = torch.tensor([0.5]), Cond(tiny.texts()[:1], tiny.guidance()), tiny.subspace.basis
    before = tiny.family.predict(pipeline.transformer, z @ basis.mT, tau, cond, grid)
    pipeline.load_lora_weights(tmp_path)
    after = tiny.family.predict(pipeline.transformer, z @ basis.mT, tau, cond, grid)
    expected = tiny.family.predict(base.eval(), z, tau, cond, grid) @ basis.mT
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-4)
    assert not torch.allclose(before, after, atol=1e-3)


def test_the_exported_code_stands_alone(tiny):
    code = bundle(tiny.family.pixel_pipeline_class(tiny.parts), "pipeline")
    assert "asymflow_ft." not in code.source.replace("asymflow-ft", "")


def test_align_finetune_sample_export(tiny, tmp_path, tiny_data):
    rows = [json.loads(line) for line in open(f"{tiny_data}/metadata.jsonl")][:12]
    (tmp_path / "data").mkdir()
    for row in rows:
        name = row["file_name"].split("/")[-1]
        Image.open(f"{tiny_data}/{row['file_name']}").save(tmp_path / "data" / name)
        (tmp_path / "data" / name).with_suffix(".txt").write_text(row["text"])
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = {
        "base": tiny.folder, "output_dir": str(tmp_path / "run"), "text": {"max_length": LENGTH},
        "data": {"source": str(tmp_path / "data"), "resolution": SIDE, "held_out": 1, "workers": 0},
        "align": {"path": str(tmp_path / "subspace"), "num_images": 12}, "lora": {"rank": 2},
        "loss": {"perceptual": "none"},
        "train": {"steps": 3, "precision": "no", "optimizer": "adamw", "batch_size": 2, "lr": 0.01, "warmup": 1},
        "sample": {"prompts": str(tmp_path / "prompts.txt"), "steps": 2, "count": 2, "every": 0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["align", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    assert cli.main(["finetune", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    assert cli.main(["finetune", str(tmp_path / "recipe.yaml")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/logs/train.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["grad_norm"] > 0 for line in lines)
    drawn = []
    for form in ("adapter", "pipeline"):
        assert cli.main(["export", str(tmp_path / "run"), "--form", form, "--out", str(tmp_path / form)]) == 0
        pipeline = load_pixel_pipeline(tmp_path / form, torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn.append(pipeline(PROMPTS, num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(*drawn) and drawn[0].shape == (2, 3, SIDE, SIDE)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = stock(PROMPTS, num_inference_steps=2, generator=generator, output_type="pt").images
    assert torch.equal(images, drawn[0])
