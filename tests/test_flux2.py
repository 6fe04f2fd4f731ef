"""The FLUX.2 family: counts and names of the real sizes, the shipped tiny base, and what is refused."""

import itertools
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace, load_subspace
from asymflow_ft.export import load_pixel_pipeline
from asymflow_ft.families import family_of, flux2
from asymflow_ft.hub.official import apply_adapter
from asymflow_ft.hub.write import export
from asymflow_ft.method import asymflow
from asymflow_ft.training import trainable
from tests.converted import adapter_of, as_converted

# (config, parameters, trained parameters, LoRA modules) as published
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
KLEIN = {"4B": (KLEIN_4B, 3_875_544_576, 191_168_512, 42), "9B": (KLEIN_9B, 9_078_581_248, 353_435_648, 58)}


@pytest.fixture(scope="module")
def parts(tiny_base):
    return flux2.load_parts(tiny_base, ("vae", "text_encoder", "tokenizer", "transformer", "scheduler"), torch.float32)


@pytest.fixture(scope="module")
def subspace():
    g = torch.Generator().manual_seed(0)
    return PixelSubspace.from_fit(torch.linalg.qr(torch.randn(768, 128, generator=g)).Q, torch.tensor(2.4))


@pytest.mark.parametrize("size", KLEIN)
def test_klein_sizes_and_trained_names(size):
    config, total, trained, lora_modules = KLEIN[size]
    with init_empty_weights():
        base = Flux2Transformer2DModel(guidance_embeds=False, **config)
    with torch.device("meta"):
        subspace = PixelSubspace()
    assert sum(p.numel() for p in base.parameters()) == total
    assert base.x_embedder.weight.shape == (base.inner_dim, 128)
    lifted = flux2.lift(base, subspace)
    targets = flux2.lora_targets(lifted)
    trainable.attach_lora(lifted, targets, flux2.TRAINED_ENDS, rank=256, dropout=0.05)
    parameters = trainable.trained_parameters(lifted)
    expected = {f"{target}.lora_{f}.default.weight" for target in targets for f in "AB"}
    expected |= {"x_embedder.weight", "proj_out.weight", "norm_out.linear.weight"}
    assert len(targets) == lora_modules
    assert {trainable.diffusers_name(name) for name in parameters} == expected
    assert sum(p.numel() for p in parameters.values()) == trained


@torch.no_grad()
def test_lifted_tiny_base_follows_the_latent_trajectory(parts, subspace):
    """Euler in pixels over sigma and in latents over tau(sigma): same picture, up to float32 rounding."""
    lifted = flux2.lift(parts.transformer, subspace)
    basis, scale = subspace.float32()
    cond, grid = Cond(parts.encode_prompt(["red apple"], max_sequence_length=32)[0]), (8, 8)
    model = PixelModel(lifted, subspace, flux2.predict)
    x = torch.randn(1, 64, 768, generator=torch.Generator().manual_seed(0))
    z = x @ basis
    levels = torch.linspace(1, 0, 13)
    for high, low in itertools.pairwise(levels):
        x = x + (low - high) * model.velocity(x, high.reshape(1, 1, 1), cond, grid)
        tau = [asymflow.calibrate(level, scale).tau for level in (high, low)]
        z = z + (tau[1] - tau[0]) * flux2.predict(parts.transformer, z, tau[0][None], cond, grid)
    expected = asymflow.lift(z, basis, scale)
    assert expected.abs().max() > 1
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_lora_reference_is_the_frozen_base_while_training(parts, subspace):
    lifted = flux2.lift(parts.transformer, subspace)
    trainable.attach_lora(lifted, flux2.lora_targets(lifted), flux2.TRAINED_ENDS, rank=4, dropout=0.1)
    g = torch.Generator().manual_seed(1)
    z, eps = torch.randn(1, 64, 128, generator=g), torch.randn(1, 64, 768, generator=g)
    arguments = (z, eps, torch.tensor([0.7]).reshape(1, 1, 1), Cond(torch.randn(1, 8, 192, generator=g)), (8, 8))
    by_switching = trainable.lora_reference(lifted, lifted, subspace, flux2.predict)
    expected = trainable.frozen_reference(parts.transformer, subspace, flux2.predict)(*arguments)
    before = by_switching(*arguments)
    torch.testing.assert_close(before, expected, rtol=0, atol=1e-4)
    model = PixelModel(lifted.train(), subspace, flux2.predict)
    own = model.clean(eps, *arguments[2:])
    with torch.no_grad():
        for parameter in trainable.trained_parameters(lifted).values():
            parameter.add_(0.05)
    assert torch.equal(by_switching(*arguments), before)
    assert not torch.allclose(model.clean(eps, *arguments[2:]), own, atol=1e-3)


def test_merging_keeps_the_trained_function(parts, subspace):
    lifted = flux2.lift(parts.transformer, subspace)
    network = flux2.lift(parts.transformer, subspace)
    trainable.attach_lora(network, flux2.lora_targets(network), flux2.TRAINED_ENDS, rank=4, dropout=0.1)
    with torch.no_grad():
        for parameter in trainable.trained_parameters(network).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    network.eval()
    merged = apply_adapter(flux2, parts.transformer, adapter_of(network, subspace))
    assert type(merged) is Flux2Transformer2DModel and merged.state_dict().keys() == lifted.state_dict().keys()
    x, cond = torch.randn(1, 64, 768, generator=torch.Generator().manual_seed(2)), Cond(torch.randn(1, 8, 192))
    with torch.no_grad():
        got, expected, untrained = (
            flux2.predict(net, x, torch.tensor([0.6]), cond, (8, 8)) for net in (merged, network, lifted)
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(got, untrained, atol=1e-2)


def test_block_lora_of_the_base_works_on_the_lifted_network(parts, subspace, tmp_path):
    base = Flux2Transformer2DModel.from_config(parts.transformer.config)
    base.load_state_dict(parts.transformer.state_dict())
    base.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    Flux2KleinPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(base))
    pipeline = pixel_pipeline(parts, subspace)
    x, cond = torch.randn(1, 64, 768), Cond(torch.randn(1, 8, 192))
    with torch.no_grad():
        before = flux2.predict(pipeline.transformer, x, torch.tensor([0.5]), cond, (8, 8))
        pipeline.load_lora_weights(tmp_path)
        after = flux2.predict(pipeline.transformer, x, torch.tensor([0.5]), cond, (8, 8))
        basis = subspace.basis
        expected = flux2.predict(base, x @ basis, torch.tensor([0.5]), cond, (8, 8)) @ basis.mT
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)


def pixel_pipeline(parts, subspace):
    pipeline = flux2.PixelFlux2KleinPipeline(
        scheduler=flow_solver(), text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
        transformer=flux2.lift(parts.transformer, subspace), subspace=subspace, codec=PixelCodec(),
        shift=7.0, shift_mode="static", default_size=128, max_sequence_length=32,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_pipeline_round_trip_draws_identical_pictures(parts, subspace, tiny_base, tmp_path):
    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(["red apple", "rocket"], num_inference_steps=3, generator=torch.Generator().manual_seed(0),
                    output_type="pt").images  # fmt: skip

    pipeline = pixel_pipeline(parts, subspace)
    export(as_converted(pipeline, tiny_base), tmp_path, "pipeline")
    again = load_pixel_pipeline(tmp_path, torch.float32)
    assert torch.equal(again.subspace.basis, subspace.basis) and torch.equal(again.subspace.scale, subspace.scale)
    first, second = draw(pipeline), draw(again)
    assert first.shape == (2, 3, 128, 128) and torch.equal(first, second)


def test_pipeline_arguments(parts, subspace):
    pipeline = pixel_pipeline(parts, subspace)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        return tensors

    images = pipeline(
        "rocket", height=64, width=96, num_inference_steps=2, num_images_per_prompt=2, guidance_scale=1.0,
        callback_on_step_end=callback,
    ).images  # fmt: skip
    assert [image.size for image in images] == [(96, 64)] * 2
    assert seen == [(0, (2, 3, 64, 96)), (1, (2, 3, 64, 96))]
    with pytest.raises(ValueError, match="multiples of 16"):
        pipeline("rocket", height=100)
    with pytest.raises(ValueError, match="either `prompt` or `prompt_embeds`"):
        pipeline()
    with pytest.raises(ValueError, match="2 prompts need one negative prompt or 2"):
        pipeline(["a", "b"], negative_prompt=["x", "y", "z"])


def test_tiny_base_loads_in_the_stock_pipeline(tiny_base):
    pipeline = Flux2KleinPipeline.from_pretrained(tiny_base, dtype=torch.float32)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    assert len(pipeline.text_encoder.model.layers) >= 28
    length = len(pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": "beaming face with smiling eyes"}], add_generation_prompt=True,
        enable_thinking=False)["input_ids"])  # fmt: skip
    assert length <= 32


def test_unfit_bases_are_refused(tiny_base, tmp_path, parts):
    with pytest.raises(ValueError, match=r"FLUX\.2-klein-base-4B"):
        flux2.load_parts("black-forest-labs/FLUX.2-klein-4B", ("vae",), torch.float32)
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        family_of(str(tmp_path))
    with pytest.raises(ValueError, match="cannot open 'no/such-model'"):
        family_of("no/such-model")
    distilled = tmp_path / "distilled"
    shutil.copytree(tiny_base, distilled)
    index = distilled / "model_index.json"
    index.write_text(index.read_text().replace('"is_distilled": false', '"is_distilled": true'))
    with pytest.raises(ValueError, match="step-distilled"):
        flux2.load_parts(str(distilled), ("vae",), torch.float32)
    thin = PixelSubspace.from_fit(torch.eye(768, 64), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"\(768, 64\).*latent tokens of 128"):
        flux2.lift(parts.transformer, thin)
    with pytest.raises(ValueError, match="is a latent pipeline; convert it first"):
        load_pixel_pipeline(tiny_base, torch.float32)


def test_subspace_files(tmp_path, subspace):
    official = tmp_path / "subspace.pth"
    torch.save({"proj_mat_p16": subspace.basis, "scale_p16": subspace.scale}, official)
    assert torch.equal(load_subspace(official).basis, subspace.basis)
    subspace.save_pretrained(tmp_path / "own")
    own = load_subspace(tmp_path / "own")
    assert torch.equal(own.basis, subspace.basis) and torch.equal(own.scale, subspace.scale)
    assert own.to(torch.bfloat16).float32()[0].dtype == torch.float32
    with pytest.raises(ValueError, match="asymflow-ft align"):
        load_subspace(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not a usable subspace"):
        PixelSubspace.from_fit(torch.ones(768, 128), torch.tensor(1.0))
