"""The habits of a diffusers pipeline, on the lifted tiny base."""

import copy
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.components.pipelines import fit_condition
from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.families import flux2
from asymflow_ft.method.asymflow import calibrate, lift
from asymflow_ft.method.noise import inference_sigmas
from asymflow_ft.method.patches import to_image, to_tokens


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
    with pytest.raises(ValueError, match="guidance_scale 1 makes one alone"):
        draw(pipeline, guidance_scale=1.0, batch_guidance=True)


def test_a_batch_is_its_pictures(pipeline):
    prompts, generators = ["red apple", "rocket"], [seeded(i) for i in range(4)]
    together = draw(pipeline, prompts, num_images_per_prompt=2, generator=generators)
    for i, picture in enumerate(together):
        alone = draw(pipeline, prompts[i // 2], generator=seeded(i))[0]
        torch.testing.assert_close(picture, alone, rtol=0, atol=1e-4)


class SmallMemory(ModelHook):
    """Keeps what a block gets in diffusers' cache, as caching hooks do, and has memory for a batch of `most`."""

    _is_stateful = True

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.batches, self.failed = most, error, [], []
        self.state_manager = StateManager(SimpleNamespace, init_kwargs={"reset": lambda: None})

    def new_forward(self, block, hidden_states, **inputs):
        assert all(tensor() is None for tensor in self.failed)
        self.state_manager.get_state().cached = cached = hidden_states + 0
        self.batches.append(len(hidden_states))
        if len(hidden_states) > self.most:
            self.failed.extend(map(weakref.ref, (hidden_states, cached)))
            raise type(self.error)(str(self.error))  # one that is kept keeps the tensors
        return self.fn_ref.original_forward(hidden_states=hidden_states, **inputs)

    def reset_state(self, block):
        self.state_manager.reset()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_guidance_goes_on_with_two_calls_where_one_batch_is_too_large(error, pipeline):
    """Without the tensors of the call that failed, those in diffusers' caches included."""
    memory, prompts = SmallMemory(2, error), ["red apple", "rocket"]
    HookRegistry.check_if_exists_or_initialize(pipeline.transformer.transformer_blocks[-1]).register_hook(memory, "")
    two_calls = draw(pipeline, prompts)
    assert memory.batches == [2] * 4
    with pytest.warns(UserWarning, match="memory does not suffice .* batch of 4, .* goes on with two calls") as said:
        assert torch.equal(draw(pipeline, prompts, batch_guidance=True), two_calls)
    assert len(said) == 1 and len(memory.failed) == 2 and memory.batches[4:] == [4, 2, 2, 2, 2]
    draw(pipeline, batch_guidance=True)  # the next pictures may be smaller
    assert memory.batches[9:] == [2, 2]
    memory.most = 0
    with pytest.warns(UserWarning, match="batch of 2"), pytest.raises(type(error), match=str(error)):
        draw(pipeline, batch_guidance=True)
    assert memory.batches[11:] == [2, 1]
    memory.failed.clear()  # of an error that ended the drawing and that pytest keeps
    memory.error = RuntimeError("another one")
    with pytest.raises(RuntimeError, match="another one"):
        draw(pipeline, batch_guidance=True)
    assert memory.batches[13:] == [2]


def test_a_picture_that_is_no_number_is_said(pipeline):
    noise = torch.randn(3, 3, 64, 64, generator=seeded())
    noise[1, 0, 0, 0] = torch.inf
    with pytest.warns(
        UserWarning, match=r"^1 of 3 pictures hold values that are not finite, .* torch\.float32 is too"
    ):
        drawn = draw(pipeline, ["red apple"] * 3, latents=noise)
    assert drawn.isfinite().flatten(1).all(1).tolist() == [True, False, True]


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
@pytest.mark.parametrize("tau", [0.05, 0.6, 1.0])
def test_condition_images_inside_the_subspace_are_condition_latents_of_the_base(tau, parts):
    """In float64: for x_c = s A z_c the lifted network's output is A times the base's, at every noise level."""
    g = seeded()
    basis = torch.linalg.qr(torch.randn(768, 128, generator=g, dtype=torch.float64)).Q
    subspace = PixelSubspace.from_fit(basis, torch.tensor(2.4)).double()
    subspace.basis.copy_(basis)
    base = copy.deepcopy(parts.transformer).double()
    model = PixelModel(flux2.lift(base, subspace), subspace, flux2.predict)
    scale = subspace.scale
    sigma = (scale * tau / (1 + (scale - 1) * tau)).reshape(1, 1, 1)
    seen, grids = calibrate(sigma, scale), [(4, 5), (6, 2)]
    z, embeds = (torch.randn(1, n, e, generator=g, dtype=torch.float64) for n, e in ((12, 128), (8, 192)))
    z_references = [torch.randn(1, h * w, 128, generator=g, dtype=torch.float64) for h, w in grids]
    references = tuple(
        to_image(lift(one, basis, scale), grid, 16) for one, grid in zip(z_references, grids, strict=True)
    )
    got = model.network(z @ basis.mT / seen.gain, sigma, Cond(embeds, references=references), (3, 4))
    stock = Flux2KleinPipeline
    expected = base(
        hidden_states=torch.cat([z, *z_references], 1), timestep=seen.tau.flatten(), encoder_hidden_states=embeds,
        txt_ids=stock._prepare_text_ids(embeds),
        img_ids=torch.cat(
            [stock._prepare_latent_ids(torch.empty(1, 1, 3, 4)),
             stock._prepare_image_ids([torch.empty(1, 1, *grid) for grid in grids])], 1),
        return_dict=False,
    )[0][:, :12]  # fmt: skip
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected @ basis.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "size", [(64, 64), (79, 65), (1024, 1024), (1025, 1024), (1500, 900), (640, 4100), (5000, 700)]
)
def test_condition_images_are_fitted_as_in_the_stock_pipeline(size):
    picture = Image.effect_noise(size, 90).convert("RGB")
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    processor.check_image_input(picture)
    seen = processor._resize_if_exceeds_area(picture)
    width, height = (side // 16 * 16 for side in seen.size)
    seen = processor.preprocess(seen, height=height, width=width, resize_mode="crop")
    torch.testing.assert_close(rgb_tensor(fit_condition(picture, 16))[None], seen, rtol=0, atol=1e-6)


def calls_of(transformer, run):
    """What the transformer is given in each call."""
    calls = []
    handle = transformer.register_forward_pre_hook(
        lambda module, args, options: calls.append({**options}), with_kwargs=True
    )
    run()
    handle.remove()
    return calls


def test_image_has_the_habits_of_the_stock_pipeline(pipeline, tiny_base, pictures, monkeypatch):
    """Both are called alike, with a stand-in for the VAE: the projection on the subspace. Then the first calls of the
    networks, guided and unguided, agree: size of the picture, tokens and their order, position ids, the batch."""
    basis, scale = pipeline.subspace.float32()
    stock = flux2.load_parts(tiny_base, ("vae", "text_encoder", "tokenizer", "transformer"), torch.float32)
    stock.set_progress_bar_config(disable=True)

    def projection(image, generator):
        tokens = torch.nn.functional.pixel_unshuffle(pipeline.codec.encode(image), 16).movedim(1, 3)
        return (tokens @ basis / scale).movedim(3, 1)

    monkeypatch.setattr(stock, "_encode_vae_image", projection)
    image = [pictures[0].resize((90, 70)), pictures[1].resize((64, 128)).convert("L")]
    options = {
        "prompt": ["red apple", "rocket"], "image": image, "num_inference_steps": 1, "guidance_scale": 3.0,
        "num_images_per_prompt": 2, "max_sequence_length": 32,
    }  # fmt: skip
    noise = torch.randn(4, 3, 64, 80, generator=seeded())
    latents = torch.nn.functional.pixel_unshuffle(noise, 16).movedim(1, 3) @ basis
    theirs = calls_of(stock.transformer, lambda: stock(latents=latents.movedim(3, 1), **options))
    ours = calls_of(pipeline.transformer, lambda: pipeline(latents=noise, **options))
    assert len(ours) == len(theirs) == 2
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own["hidden_states"] @ basis, other["hidden_states"], rtol=0, atol=1e-5)
        torch.testing.assert_close(own["encoder_hidden_states"], other["encoder_hidden_states"])
        assert torch.equal(own["img_ids"].expand(4, -1, -1), other["img_ids"].expand(4, -1, -1))
        torch.testing.assert_close(own["timestep"], other["timestep"])
    one = {**options, "image": image[1], "output_type": "pt", "height": 96}
    assert pipeline(**one).images.shape == stock(**one).images.shape == (4, 3, 96, 64)


def test_condition_images_that_cannot_be_used(pipeline, pictures):
    for image, message in (
        (pictures[0].resize((40, 80)), "at least 64 pixels and a shape of at most 8:1, got 40x80"),
        ([pictures[0], pictures[0].resize((64, 520))], "at most 8:1, got 64x520"),
        (torch.zeros(3, 64, 64), "must be a PIL image, got Tensor"),
        ([[pictures[0]], [pictures[1]]], "must be a PIL image, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipeline, image=image)


def test_condition_images_change_the_picture(pipeline, pictures):
    one, other = (picture.resize((64, 64)) for picture in pictures)
    drawn = [draw(pipeline, image=image) for image in (None, one, [one], [one, other], [other, one])]
    assert torch.equal(drawn[1], drawn[2])
    for a, b in itertools.combinations([0, 1, 3, 4], 2):
        assert not torch.allclose(drawn[a], drawn[b], atol=1e-2)
    batch = draw(pipeline, ["red apple"] * 2, image=[one, other], generator=[seeded(), seeded(1)])
    torch.testing.assert_close(batch[:1], drawn[3], rtol=0, atol=1e-4)


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
