"""FLUX.3: what the laws of families leave open, prompts of several windows, condition images, and refusals."""

import json
import shutil

import pytest
import torch
from diffusers import ClassifierFreeGuidance, Flux3ModularPipeline
from torch.nn.utils.rnn import pad_sequence

from asymflow_ft.components.subspace import Cond, PixelSubspace
from asymflow_ft.families import family_of, flux3
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.training.encode import encode_texts
from tests.tiny.flux3 import build

PARTS = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")
PROMPTS = ["red apple", "a rocket over the sea " * 12]  # of the windows 80 and 160
GRID = (4, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Moved after it was saved: a modular index names the folder in which it was."""
    made = tmp_path_factory.mktemp("flux3") / "made"
    build(made)
    return str(made.rename(made.parent / "moved"))


@pytest.fixture(scope="module")
def parts(folder):
    return flux3.load_parts(folder, PARTS, torch.float32)


@pytest.fixture(scope="module")
def texts(parts):
    return pad_sequence(list(encode_texts(flux3, parts, PROMPTS, 512)), batch_first=True)


def latents(count, seed, grid=GRID):
    return torch.randn(count, grid[0] * grid[1], 128, generator=torch.Generator().manual_seed(seed))


def test_prompts_have_the_windows_of_the_stock_blocks(parts, texts):
    assert Cond(texts).lengths() == [80, 160]
    blocks = parts.blocks
    for name in ("vae_encoder", "denoise", "decode"):
        blocks.sub_blocks.pop(name)
    stock = Flux3ModularPipeline(blocks=blocks)
    stock.update_components(text_encoder=parts.text_encoder, tokenizer=parts.tokenizer)
    for prompt, embeds, length in zip(PROMPTS, texts, (80, 160), strict=True):
        assert torch.equal(stock(prompt=prompt, output="prompt_embeds"), embeds[None, :length])
    assert flux3.embed(parts, PROMPTS, 100).shape[1] == 100  # a window is cut at the greatest length


@torch.no_grad()
def test_every_prompt_is_seen_in_its_own_window(parts, texts):
    z, tau = latents(2, 0), torch.tensor([0.3, 0.8])
    together = flux3.predict(parts.transformer, z, tau, Cond(texts), GRID)
    for i, length in enumerate((80, 160)):
        alone = flux3.predict(parts.transformer, z[i : i + 1], tau[i : i + 1], Cond(texts[i : i + 1, :length]), GRID)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    seen_padding = parts.transformer(
        z[:1], texts[:1], tau[:1], flux3._ids(GRID, 0, z.device),
        torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(160.0)),
    ).sample  # fmt: skip
    assert (together[:1] - seen_padding).abs().max() > 1e-3


@torch.no_grad()
def test_condition_images_are_seen_as_by_the_stock_blocks(parts, texts):
    """One step of the stock blocks from noise is z - v; and the lifted network says the same of lifted conditions."""
    z, text = latents(1, 1), texts[:1, :80]
    references = [(latents(1, 2, (2, 3)), (2, 3)), (latents(1, 3, (3, 1)), (3, 1))]
    blocks = parts.blocks
    for name in ("text_encoder", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    stock = Flux3ModularPipeline(blocks=blocks)
    guider = ClassifierFreeGuidance(1.0)
    stock.update_components(transformer=parts.transformer, scheduler=parts.scheduler, guider=guider)
    drawn = stock(
        prompt_embeds=text, latents=to_image(z, GRID, 1), height=64, width=64, num_inference_steps=1, output="latents",
        image_cond_latents=[to_image(reference, shape, 1) for reference, shape in references],
    )  # fmt: skip
    v = flux3.predict(parts.transformer, z, torch.ones(1), Cond(text), GRID, references)
    torch.testing.assert_close(z - v, to_tokens(drawn, 1), rtol=0, atol=1e-5)
    plain = flux3.predict(parts.transformer, z, torch.ones(1), Cond(text), GRID)
    swapped = flux3.predict(parts.transformer, z, torch.ones(1), Cond(text), GRID, references[::-1])
    assert (v - plain).abs().max() > 1e-3 and (v - swapped).abs().max() > 1e-4

    basis = torch.linalg.qr(torch.randn(768, 128, generator=torch.Generator().manual_seed(4))).Q
    lifted = flux3.lift(parts.transformer, PixelSubspace.from_fit(basis, torch.tensor(2.4)))
    lifted_references = [(reference @ basis.mT, shape) for reference, shape in references]
    pixels = flux3.predict(lifted, z @ basis.mT, torch.ones(1), Cond(text), GRID, lifted_references)
    torch.testing.assert_close(pixels, v @ basis.mT, rtol=0, atol=1e-4)


@torch.no_grad()
def test_prompts_of_several_windows_are_drawn_as_alone(parts, texts):
    noise, empty, steps = to_image(latents(2, 5), GRID, 1), texts[0, :80], []
    pictures, z = flux3.draw_base(parts, noise, texts, empty, (64, 64), 2, 3.0, on_step=steps.append)
    assert steps == [0, 1, 0, 1] and [picture.size for picture in pictures] == [(64, 64)] * 2
    for i, length in enumerate((80, 160)):
        one = noise[i : i + 1], texts[i : i + 1, :length], empty
        _, alone = flux3.draw_base(parts, *one, (64, 64), 2, 3.0, "latent")
        torch.testing.assert_close(z[i : i + 1], alone, rtol=0, atol=1e-5)


def test_parts_come_alone_and_from_where_the_base_is(folder):
    assert family_of(folder) is flux3
    only = flux3.load_parts(folder, (), torch.float32)
    assert all(only.components[name] is None for name in PARTS[:-1])
    assert flux3.latent_shift(only) == pytest.approx(6.93)
    vae = flux3.load_parts(folder, ("vae",), torch.bfloat16).vae
    assert vae.dtype == torch.bfloat16


def test_distilled_ones_are_refused(folder, tmp_path):
    base = tmp_path / "flow_map"
    shutil.copytree(folder, base)
    config = base / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"flow_map": True}))
    with pytest.raises(ValueError, match=r"step-distilled \(flow_map is true"):
        flux3.load_parts(str(base), (), torch.float32)
    index = base / "modular_model_index.json"
    index.write_text(index.read_text().replace("Flux3ModularPipeline", "Flux3DistilledModularPipeline"))
    with pytest.raises(ValueError, match="cannot be converted: it is step-distilled"):
        family_of(str(base))
    (base / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    index.write_text(index.read_text().replace("Flux3DistilledModularPipeline", "Flux3ModularPipeline"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"flow_map": False}))
    with pytest.raises(ValueError, match="Unable to load vae"):
        flux3.load_parts(str(base), ("vae",), torch.float32)
