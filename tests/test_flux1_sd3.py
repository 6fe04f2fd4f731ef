"""FLUX.1 and Stable Diffusion 3: what they refuse, and what the laws of all families do not see."""

import json
from importlib import import_module

import pytest
import torch
from PIL import Image
from torch.nn.functional import pixel_shuffle

from asymflow_ft.components.subspace import Cond, PixelSubspace
from asymflow_ft.families import flux1, sd3
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.recipe import Recipe
from asymflow_ft.recipe_keys import Data, Lora, Loss, Sample, Text
from asymflow_ft.training import plan
from asymflow_ft.training.encode import encode_texts
from tests.tiny.flux1 import build


@pytest.fixture(scope="module", params=[flux1, sd3], ids=["flux1", "sd3"])
def base(request, tmp_path_factory):
    """(family, folder, stock pipeline)"""
    family = request.param
    folder = tmp_path_factory.mktemp("tiny") / "base"
    import_module(f"tests.tiny.{family.__name__.rpartition('.')[2]}").build(folder)
    parts = family.load_parts(str(folder), (*family.TEXT_PARTS, "vae", "transformer"), torch.float32)
    parts.set_progress_bar_config(disable=True)
    return family, folder, parts


@torch.no_grad()
def test_guidance_of_the_base_is_classifier_free(base):
    family, _, parts = base
    embeds, empty = (torch.stack(list(encode_texts(family, parts, [text], 8))) for text in ("a red apple", ""))
    z = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    _, drawn = family.draw_base(parts, to_image(z, (2, 3), 1), embeds, empty[0], (32, 48), 1, 3.0, "latent")
    with_text, without = (
        family.predict(parts.transformer, z, torch.ones(1), Cond(text), (2, 3)) for text in (embeds, empty)
    )
    assert (with_text - without).abs().max() > 0.05
    torch.testing.assert_close(drawn, z - (without + 3 * (with_text - without)), rtol=0, atol=1e-4)


@torch.no_grad()
def test_embeddings_do_what_the_prompt_does_in_the_stock_pipeline(base):
    family, _, parts = base
    embeds, empty = (torch.stack(list(encode_texts(family, parts, [text], 8))) for text in ("a red apple", ""))
    noise = to_image(torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)), (2, 3), 1)
    _, drawn = family.draw_base(parts, noise, embeds, empty[0], (32, 48), 2, 3.0, "latent")
    scale = {"true_cfg_scale": 3.0} if family is flux1 else {"guidance_scale": 3.0}
    latents = to_tokens(noise, 1) if family is flux1 else pixel_shuffle(noise, 2)
    stock = parts(
        "a red apple", negative_prompt="", latents=latents, height=32, width=48, num_inference_steps=2,
        max_sequence_length=8, output_type="latent", **scale,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn, stock if family is flux1 else to_tokens(stock, 2), rtol=0, atol=1e-5)


def test_a_run_is_planned_with_all_rows_of_its_text(base, tmp_path, monkeypatch):
    family, folder, parts = base
    seen, values, predict = set(), [], family.predict

    def watched(network, x, tau, cond, *more):
        seen.add(cond.embeds.shape[1])
        return predict(network, x, tau, cond, *more)

    monkeypatch.setattr(family, "predict", watched)
    monkeypatch.setattr(plan, "disk_need", lambda *arguments: values.append(arguments[-1]) or {})
    monkeypatch.setattr(plan, "advise", lambda *_: [])  # rehearses many more
    monkeypatch.setattr(plan, "less_recomputation", lambda *_: None)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for name in ("a.txt", "prompts"):
        (tmp_path / name).write_text("a red apple")
    plan.dry_run(Recipe(
        base=str(folder), data=Data(source=str(tmp_path), resolution=64), text=Text(8), loss=Loss(perceptual="none"),
        lora=Lora(2), sample=Sample(prompts=str(tmp_path / "prompts")), output_dir=str(tmp_path / "run"),
    ))  # fmt: skip
    (embedding,) = encode_texts(family, parts, ["a red apple"], 8)
    assert seen == {len(embedding)} and len(embedding) == {flux1: 9, sd3: 86}[family]
    assert values == [2 * embedding.numel()]  # that of "" too


def test_condition_images_are_refused(base):
    family, _, parts = base
    z = torch.zeros(1, 6, 64)
    with pytest.raises(ValueError, match=r"takes no condition images: .* data.condition_column"):
        family.predict(parts.transformer, z, torch.ones(1), Cond(torch.zeros(1, 9, 40)), (2, 3), [(z, (2, 3))])


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-schnell", "/models/flux.1-schnell/snapshot"])
def test_schnell_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"timestep-distilled.*; use black-forest-labs/FLUX.1-dev$"):
        flux1.load_parts(name, ("vae",), torch.float32)


@pytest.mark.parametrize(("guidance_embeds", "dynamic"), [(False, False), (False, True), (True, False)])
def test_schnell_is_refused_by_its_configuration(guidance_embeds, dynamic, tmp_path):
    build(tmp_path, guidance_embeds, shift=1.0, use_dynamic_shifting=dynamic)
    if guidance_embeds or dynamic:
        parts = flux1.load_parts(str(tmp_path), ("scheduler",), torch.float32)
        assert flux1.latent_shift(parts) == pytest.approx(3.158 if dynamic else 1.0, abs=1e-3)
    else:
        with pytest.raises(ValueError, match=r"configured as FLUX.1-schnell.*set use_dynamic_shifting"):
            flux1.load_parts(str(tmp_path), ("scheduler",), torch.float32)


def test_sd3_turbo_is_refused():
    with pytest.raises(ValueError, match=r"step-distilled.*; use stabilityai/stable-diffusion-3.5-large$"):
        sd3.load_parts("stabilityai/stable-diffusion-3.5-large-turbo", ("vae",), torch.float32)


def test_sd3_without_t5_is_refused(tmp_path):
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has no text_encoder_3"):
        sd3.load_parts(str(tmp_path), sd3.TEXT_PARTS, torch.float32)


def test_sd3_lifted_config_has_the_same_position_embeddings(tmp_path):
    import_module("tests.tiny.sd3").build(tmp_path / "base")
    transformer = sd3.load_parts(str(tmp_path / "base"), ("transformer",), torch.float32).transformer
    basis = torch.linalg.qr(torch.randn(768, 64, generator=torch.Generator().manual_seed(0))).Q
    lifted = sd3.lift(transformer, PixelSubspace.from_fit(basis, torch.tensor(2.0)))
    fresh = type(lifted).from_config(lifted.config)
    assert torch.equal(fresh.pos_embed.pos_embed, transformer.pos_embed.pos_embed)
