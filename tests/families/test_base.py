"""What holds for every family: lifted and coupled with its own sampler, it is the base that the stock pipeline has."""

from importlib import import_module
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.families import family_named, family_of
from asymflow_ft.families.base import scheduler_shift
from asymflow_ft.method.asymflow import calibrate
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.training.encode import encode_texts, load_text_parts
from tests.families.conftest import LENGTH, PROMPTS, SIDE, pixel_pipeline


def test_the_family_is_found(tiny):
    assert family_of(tiny.folder) is tiny.family
    vae = tiny.parts.vae
    assert (tiny.family.latent_dim(vae), tiny.family.pixel_patch(vae)) == tiny.family.GEOMETRY


@torch.no_grad()
def test_the_lifted_network_is_the_base_on_the_subspace(tiny):
    """predict(lifted, z A^T) A = predict(base, z), to rounding in float64; and nothing outside the subspace."""
    base = type(tiny.parts.transformer).from_config(tiny.parts.transformer.config).double()
    base.load_state_dict(tiny.parts.transformer.state_dict())
    subspace = PixelSubspace.from_fit(tiny.subspace.basis, tiny.subspace.scale).double()
    subspace.basis.copy_(torch.linalg.qr(subspace.basis).Q)
    lifted, z, grid = tiny.family.lift(base, subspace), tiny.latents(2, seed=1).double(), tiny.grid
    tau, cond = torch.tensor([0.3, 0.85], dtype=torch.float64), Cond(tiny.texts().double(), tiny.guidance())
    expected = tiny.family.predict(base.eval(), z, tau, cond, grid)
    pixels = tiny.family.predict(lifted, z @ subspace.basis.mT, tau, cond, grid)
    torch.testing.assert_close(pixels @ subspace.basis, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(pixels, expected @ subspace.basis.mT, rtol=0, atol=1e-12)
    assert expected.abs().max() > 0.1 and (expected[0] - expected[1]).abs().max() > 1e-3


class Wrapped(nn.Module):
    """As DDP and others wrap a network: its config and submodules are not where they were."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **named):
        return self.module(*arguments, **named)


@torch.no_grad()
def test_the_network_can_be_wrapped_and_in_bf16(tiny):
    base = type(tiny.parts.transformer).from_config(tiny.parts.transformer.config).to(torch.bfloat16).eval()
    base.load_state_dict(tiny.parts.transformer.state_dict())
    z, tau, cond = tiny.latents(2, seed=8), torch.tensor([0.3, 0.85]), Cond(tiny.texts().bfloat16(), tiny.guidance())
    expected = tiny.family.predict(base, z, tau, cond, tiny.grid)
    lifted, basis = tiny.family.lift(base, tiny.subspace), tiny.subspace.basis
    pixels = tiny.family.predict(Wrapped(lifted), z @ basis.mT, tau, cond, tiny.grid)
    assert pixels.dtype == expected.dtype == torch.float32
    assert (pixels @ basis - expected).std() < 0.03 * expected.std()


@torch.no_grad()
def test_the_pixel_model_follows_the_stock_sampler(tiny):
    """From the same noise, step by step through the pixel network: the latents that the stock pipeline gets."""
    z, grid, embeds, basis = tiny.latents(2, seed=2), tiny.grid, tiny.texts(), tiny.subspace.basis
    noise = to_image(z, grid, 1)
    empty = next(iter(encode_texts(tiny.family, tiny.parts, [""], LENGTH)))
    _, expected = tiny.family.draw_base(tiny.parts, noise, embeds, empty, (SIDE, SIDE), 4, 1.0, "latent")
    lifted = tiny.family.lift(tiny.parts.transformer, tiny.subspace)
    model = PixelModel(lifted, tiny.subspace, tiny.family.predict, tiny.guidance())
    levels = tiny.parts.scheduler.sigmas  # of the run just made
    for level, following in pairwise(levels):
        sigma = pixel_level(level, tiny.subspace.scale).expand(2, 1, 1)
        x_t = (z @ basis.mT) / calibrate(sigma, tiny.subspace.scale).gain
        u = model.network(x_t, sigma, Cond(embeds, tiny.guidance()), grid)
        z = z + (following - level) * (u @ basis)
    torch.testing.assert_close(z, expected, rtol=0, atol=2e-4)
    assert (to_image(z, grid, 1) - noise).abs().max() > 0.1


def pixel_level(tau: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The pixel noise level that the base sees as tau: the inverse of tau = sigma / (s + (1 - s) sigma)."""
    return scale * tau / (1 - (1 - scale) * tau)


@torch.no_grad()
def test_latents_are_those_that_the_stock_pipeline_decodes(tiny):
    rank, grid, embeds = tiny.subspace.config["rank"], tiny.grid, tiny.texts()[:1]
    noise = to_image(tiny.latents(1, seed=3), grid, 1)
    (picture,), z = tiny.family.draw_base(tiny.parts, noise, embeds, embeds[0], (SIDE, SIDE), 2, 1.0)
    decoded = tiny.family.decode_latents(tiny.parts.vae, z, grid)
    ours = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().byte()
    stock = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(SIDE, SIDE, 3)
    assert (ours.int() - stock.int()).abs().max() <= 1
    rgb = torch.rand(2, 3, SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(4)) * 2 - 1
    tokens = tiny.family.encode_latents(tiny.parts.vae, rgb)
    assert tokens.shape == (2, 2 * grid[0] * grid[1], rank) and tokens.dtype == torch.float32
    # packing and normalisation undo each other
    expected = import_module(f"tests.tiny.{tiny.name}").round_trip(tiny.parts.vae, rgb).clamp(-1, 1)
    there_and_back = tiny.family.decode_latents(tiny.parts.vae, tokens, (grid[0], 2 * grid[1]))
    torch.testing.assert_close(there_and_back, expected, rtol=0, atol=1e-4)
    sampled = tiny.family.encode_latents(tiny.parts.vae, rgb, torch.Generator().manual_seed(0))
    again = tiny.family.encode_latents(tiny.parts.vae, rgb, torch.Generator().manual_seed(0))
    assert torch.equal(sampled, again) and not torch.equal(sampled, tokens)


@torch.no_grad()
def test_guidance_is_counted_alike(tiny, monkeypatch):
    """The stock pipeline's first step goes along v_uncond + w (v - v_uncond) for our w, whatever it calls that and
    however it scales the sum."""
    predictions, step = [], type(tiny.parts.scheduler).step

    def spy(scheduler, prediction, *arguments, **options):
        predictions.append(prediction)
        return step(scheduler, prediction, *arguments, **options)

    monkeypatch.setattr(type(tiny.parts.scheduler), "step", spy)
    z, grid, embeds = tiny.latents(1, seed=8), tiny.grid, tiny.texts()[:1]
    empty = next(iter(encode_texts(tiny.family, tiny.parts, [""], LENGTH)))
    for guidance in (1.0, 3.0):
        tiny.family.draw_base(
            tiny.parts, to_image(z, grid, 1), embeds, empty, (SIDE, SIDE), 2, guidance, "latent"
        )  # fmt: skip
    plain, guided = (v if v.ndim == 3 else to_tokens(v, v.shape[-1] // grid[1]) for v in predictions[::2])
    v, uncond = (
        tiny.family.predict(tiny.parts.transformer, z, torch.ones(1), Cond(rows, tiny.guidance()), grid)
        for rows in (embeds, empty[None])
    )
    expected = uncond + 3 * (v - uncond)
    torch.testing.assert_close(plain, v, rtol=0, atol=1e-4)
    torch.testing.assert_close(F.normalize(guided, dim=-1), F.normalize(expected, dim=-1), rtol=0, atol=1e-4)
    assert (F.normalize(v, dim=-1) - F.normalize(expected, dim=-1)).abs().max() > 0.01


def test_guidance_in_one_batch_is_guidance_in_two_calls(tiny):
    """Prompts shorter and longer than the negative one, one that a callback brings in, and condition images where the
    base takes them."""
    pipeline, batches = pixel_pipeline(tiny), []
    picture = Image.effect_noise((SIDE, SIDE + 16), 90) if tiny.name in ("flux2", "flux3") else None
    prompts, length = tiny.texts(), 2 * LENGTH if pipeline.zeros_are_padding else LENGTH
    (short,) = encode_texts(tiny.family, tiny.parts, ["sea"], LENGTH)
    (long,) = encode_texts(tiny.family, tiny.parts, ["blurry picture of a house and of nothing else"], length)

    def draw(negative, other, batch_guidance):
        batches.clear()
        return pipeline(
            prompt_embeds=prompts, negative_prompt_embeds=negative.expand(2, -1, -1), image=picture, height=SIDE,
            width=SIDE, num_inference_steps=3, guidance_scale=3.0, output_type="latent",
            generator=torch.Generator().manual_seed(0), batch_guidance=batch_guidance,
            callback_on_step_end=lambda pipe, step, *_: {"prompt_embeds": other.expand(2, -1, -1)} if step else {},
        ).images  # fmt: skip

    def watch(network, arguments, options):
        batches.append(len(arguments[0] if arguments else options["hidden_states"]))

    pipeline.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    drawn = []
    for texts in ((short, long), (long, short)):
        drawn.append(draw(*texts, False))
        assert sum(batches) == 12
        torch.testing.assert_close(draw(*texts, True), drawn[-1], rtol=0, atol=1e-4)
        assert batches == ([1] * 12 if tiny.name == "flux3" else [4] * 3)  # FLUX.3's is called prompt by prompt
    assert (drawn[0] - drawn[1]).abs().max() > 0.01
    if pipeline.zeros_are_padding:
        assert len(short) < len(long) > prompts.shape[1]
    else:
        with pytest.raises(ValueError, match=f"prompt of {len(prompts[0])} rows and a negative one of 5 into"):
            draw(short[:5], long, True)


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_stock_pipeline(tiny):
    """By the pixel pipeline, and by the text encoder without what prompts do not use: bit for bit."""
    prompts = [*PROMPTS, ""]
    expected = tiny.family.embed(tiny.parts, prompts, LENGTH)
    assert prompts == [*PROMPTS, ""] and (expected[0] - expected[1]).abs().max() > 0.1
    assert torch.equal(pixel_pipeline(tiny).embed(prompts, LENGTH), expected)
    short = load_text_parts(tiny.family, tiny.folder, None, torch.float32, torch.device("cpu"))
    assert torch.equal(tiny.family.embed(short, prompts, LENGTH), expected)


@torch.no_grad()
def test_a_long_prompt_has_as_many_rows_as_are_planned(tiny):
    """So memory and disk are planned for the most that there can be; all families cut a prompt at `max_length`."""
    rows = next(iter(encode_texts(tiny.family, tiny.parts, ["a red apple " * LENGTH], LENGTH)))
    assert len(rows) == LENGTH + tiny.family.EXTRA_TEXT_ROWS


@torch.no_grad()
def test_an_embedding_does_not_depend_on_its_batch(tiny):
    together = list(encode_texts(tiny.family, tiny.parts, [*PROMPTS, ""], LENGTH))
    for prompt, embeds in zip([*PROMPTS, ""], together, strict=True):
        (alone,) = encode_texts(tiny.family, tiny.parts, [prompt], LENGTH)
        torch.testing.assert_close(alone, embeds, rtol=0, atol=1e-4)
    assert together[0].shape[1] == tiny.family.text_dim(tiny.parts.transformer)
    z, tau, grid = tiny.latents(1, seed=5), torch.tensor([0.6]), tiny.grid
    shortest = min(together, key=len)
    padded = pad_sequence([shortest, max(together, key=len)], batch_first=True)[:1]
    one, other = (
        tiny.family.predict(tiny.parts.transformer, z, tau, Cond(embeds, tiny.guidance()), grid)
        for embeds in (shortest[None], padded)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # rows of zeros are not seen


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_condition_images_are_refused(name):
    tokens = torch.zeros(1, 1, 768)
    with pytest.raises(ValueError, match="takes no condition images"):
        family_named(name).predict(None, tokens, torch.ones(1), Cond(tokens), (1, 1), [(tokens, (1, 1))])


def test_turbo_loads_with_a_warning(tmp_path):
    folder = tmp_path / "Z-Image-Turbo"
    import_module("tests.tiny.z_image").build(folder)
    with pytest.warns(UserWarning, match="step-distilled"):
        parts = family_named("z_image").load_parts(str(folder), ("scheduler",), torch.float32)
    assert family_named("z_image").latent_shift(parts) == 6.0


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_shift_of_a_dynamic_scheduler(kind):
    """What the scheduler does to a level of 0.5 at 1024x1024."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, time_shift_type=kind
    )
    scheduler.set_timesteps(sigmas=[0.5], mu=calculate_shift(4096, 256, 8192, 0.5, 0.9))
    shift = scheduler_shift(scheduler)
    assert scheduler.sigmas[0].item() == pytest.approx(shift / (1 + shift))
