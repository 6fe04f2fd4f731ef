"""The habits of a diffusers pipeline, on the lifted tiny base."""

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from asymflow_ft.components.pipelines import encode_condition
from asymflow_ft.components.subspace import Cond
from asymflow_ft.method.noise import inference_sigmas
from asymflow_ft.method.patches import to_tokens


@pytest.fixture(scope="module")
def pictures(tiny_data):
    return [Image.open(file).convert("RGB") for file in sorted(Path(tiny_data, "images").iterdir())[:2]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipeline, prompt="red apple", **options):
    options = {"num_inference_steps": 2, "generator": seeded(), "output_type": "pt"} | options
    return pipeline(prompt, **options).images


def test_noise_and_embeddings_can_be_passed_in(pipeline):
    drawn = draw(pipeline, negative_prompt="low quality")
    noise = torch.randn(1, 3, 64, 64, generator=seeded())
    assert torch.equal(draw(pipeline, negative_prompt="low quality", latents=noise, generator=seeded(5)), drawn)
    embeds, negative = (
        pipeline.encode_prompt(text, max_sequence_length=32)[0] for text in ("red apple", "low quality")
    )
    assert torch.equal(draw(pipeline, None, prompt_embeds=embeds, negative_prompt_embeds=negative), drawn)
    assert not torch.allclose(draw(pipeline), drawn, atol=1e-3)
    with pytest.raises(ValueError, match=r"noise of shape \(1, 3, 64, 64\)"):
        draw(pipeline, latents=noise[..., :32])


def test_a_batch_is_its_pictures(pipeline):
    prompts, generators = ["red apple", "rocket"], [seeded(i) for i in range(4)]
    together = draw(pipeline, prompts, num_images_per_prompt=2, generator=generators)
    for i, picture in enumerate(together):
        alone = draw(pipeline, prompts[i // 2], generator=seeded(i))[0]
        torch.testing.assert_close(picture, alone, rtol=0, atol=1e-4)


def test_output_types_agree(pipeline):
    pt = draw(pipeline)
    assert pt.shape == (1, 3, 64, 64) and pt.min() >= 0 and pt.max() <= 1
    assert (draw(pipeline, output_type="np") == pt.permute(0, 2, 3, 1).numpy()).all()
    (pil,) = draw(pipeline, output_type="pil")
    assert pil.tobytes() == (pt[0].permute(1, 2, 0) * 255).round().byte().numpy().tobytes()
    latent = draw(pipeline, output_type="latent")
    assert torch.equal(VaeImageProcessor().postprocess(pipeline.codec.decode(latent), "pt"), pt)
    (images,) = pipeline("red apple", num_inference_steps=2, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, pt)


def test_a_callback_can_change_state_and_prompt(pipeline):
    asked = ["latents", "prompt_embeds"]

    def last_is_grey(pipe, step, timestep, tensors):
        assert sorted(tensors) == asked
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    def other_prompt(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0}

    options = {"callback_on_step_end_tensor_inputs": asked, "output_type": "latent"}
    assert not draw(pipeline, callback_on_step_end=last_is_grey, **options).any()
    changed = draw(pipeline, callback_on_step_end=other_prompt, **options)
    assert not torch.allclose(changed, draw(pipeline, output_type="latent"), atol=1e-2)
    with pytest.raises(ValueError, match="not for \\['noise'\\]"):
        draw(pipeline, callback_on_step_end=other_prompt, callback_on_step_end_tensor_inputs=["noise"])


def test_a_callback_sees_every_step_s_clean_estimate(pipeline):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(dict(tensors))
        return {"clean": torch.zeros_like(tensors["clean"])}

    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "clamp": False, "output_type": "latent"}
    asked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents", "clean"]}
    drawn = draw(pipeline, **options, **asked)
    assert torch.equal(drawn, draw(pipeline, **options))  # what it returns as `clean` is for nobody
    torch.testing.assert_close(seen[-1]["clean"], drawn, rtol=0, atol=1e-4)
    sigmas = inference_sigmas(4, 7.0)
    before = [torch.randn(1, 3, 64, 64, generator=seeded()), *(step["latents"] for step in seen)]
    cond = Cond(pipeline.encode_prompt("red apple", max_sequence_length=32)[0])
    with torch.no_grad():
        for i, step in enumerate(seen):
            expected = pipeline.pixel_model.clean(to_tokens(before[i], 16), sigmas[i].reshape(1, 1, 1), cond, (4, 4))
            torch.testing.assert_close(to_tokens(step["clean"], 16), expected, rtol=0, atol=1e-4)

    def inside(pipe, step, timestep, tensors):
        torch.testing.assert_close(pipe.codec.clamp(tensors["clean"]), tensors["clean"], rtol=0, atol=2e-3)
        return {}

    draw(pipeline, callback_on_step_end=inside, callback_on_step_end_tensor_inputs=["clean"])


def test_lora_files_come_and_go(pipeline, parts, tmp_path):
    base = Flux2Transformer2DModel.from_config(parts.transformer.config)
    torch.manual_seed(0)
    base.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    Flux2KleinPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(base))
    before = draw(pipeline)
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    styled = draw(pipeline)
    pipeline.set_adapters(["style"], [0.0])
    assert torch.equal(draw(pipeline), before)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), before)
    assert not torch.allclose(styled, before, atol=1e-2)


@torch.no_grad()
def test_condition_images_enter_as_in_the_stock_pipeline(pipeline, parts, pictures):
    """The lifted network sees condition images where the base would see their projections, with its position ids."""
    (basis, scale), codec, g = pipeline.subspace.float32(), pipeline.codec, seeded()
    references = tuple(encode_condition(one, codec, 16) for one in (pictures[0], pictures[1].resize((96, 64))))
    x, tau, embeds = torch.randn(1, 12, 768, generator=g), torch.tensor([0.6]), torch.randn(1, 8, 192, generator=g)
    sigma = (scale * tau / (1 + (scale - 1) * tau)).reshape(1, 1, 1)
    got = pipeline.pixel_model.network(x, sigma, Cond(embeds, references=references), (3, 4))

    def latents(image):
        return torch.nn.functional.pixel_unshuffle(image, 16).movedim(1, 3) @ basis / scale  # (1, h, w, 128)

    seen = [latents(one) for one in references]
    stock = Flux2KleinPipeline
    gain = 1 / (scale + (1 - scale) * sigma)
    expected = parts.transformer(
        hidden_states=torch.cat([gain * x @ basis, *(one.flatten(1, 2) for one in seen)], 1), timestep=tau,
        encoder_hidden_states=embeds, txt_ids=stock._prepare_text_ids(embeds),
        img_ids=torch.cat(
            [stock._prepare_latent_ids(torch.empty(1, 1, 3, 4)),
             stock._prepare_image_ids([one.movedim(3, 1) for one in seen])], 1),
        return_dict=False,
    )[0][:, :12]  # fmt: skip
    torch.testing.assert_close(got @ basis, expected, rtol=0, atol=1e-4)


def test_condition_images_change_the_picture(pipeline, pictures):
    one, other = pictures
    drawn = [draw(pipeline, image=image) for image in (None, one, [one], [one, other], [other, one])]
    assert torch.equal(drawn[1], drawn[2])
    for a, b in itertools.combinations([0, 1, 3, 4], 2):
        assert not torch.allclose(drawn[a], drawn[b], atol=1e-2)
    batch = draw(pipeline, ["red apple"] * 2, image=[one, other], generator=[seeded(), seeded(1)])
    torch.testing.assert_close(batch[:1], drawn[3], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at least 64 pixels, got 40x80"):
        draw(pipeline, image=one.resize((40, 80)))


def test_model_offload(pipeline):
    """With the CPU in the accelerator's place: the hooks of every call are there, and the picture is the same."""
    assert all(name in pipeline.components for name in pipeline.model_cpu_offload_seq.split("->"))
    before = draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipeline), before) and torch.equal(draw(pipeline), before)
    pipeline.remove_all_hooks()


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offload_places_what_is_read_outside_of_a_forward_call(kind, pipeline, monkeypatch):
    """With "meta" in the accelerator's place: hooks bring the weights, but nothing would bring the subspace."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.empty_device_cache", lambda _: None)  # "meta" has no cache
    pipeline.text_encoder = None  # shared with the other tests
    enable = pipeline.enable_model_cpu_offload if kind == "model" else pipeline.enable_sequential_cpu_offload
    enable(device="meta")
    assert pipeline._execution_device.type == "meta"
    assert {tensor.device.type for tensor in pipeline.subspace.float32()} == {"meta"}


def test_bf16_draws_nearly_the_same(pipeline):
    embeds = pipeline.encode_prompt(["red apple", "rocket", ""], max_sequence_length=32)[0]
    pipeline.text_encoder = None  # shared with the other tests

    def draw_in(dtype):
        prompts, empty = embeds[:2].to(dtype), embeds[2:].expand(2, -1, -1).to(dtype)
        return draw(pipeline.to(dtype), None, prompt_embeds=prompts, negative_prompt_embeds=empty)

    before = draw_in(torch.float32)
    error = (draw_in(torch.bfloat16) - before).abs().mean()
    assert error < 0.02
