"""What the pictures of an evaluation depend on, and what they do not."""

import hashlib
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from asymflow_ft import drawing
from asymflow_ft.drawing import Drawing, Wanted, open_models
from asymflow_ft.families import flux2
from asymflow_ft.hub.write import export
from asymflow_ft.method.patches import to_image, to_tokens
from tests.converted import converted_lora
from tests.evaluate.conftest import TEXTS, assert_alike, pictures, stamps, suite
from tests.tiny import flux1


def test_batch_order_and_number_do_not_matter(run, drawn, tmp_path, models):
    run(tmp_path / "out", TEXTS[::-1], [str(models / "other")], per_prompt=2, batch_size=5)
    for name in ("mine", "other"):
        assert_alike(pictures(tmp_path / "out", name), pictures(drawn, name))
    own = pictures(drawn, "mine")
    assert len({own[key].tobytes() for key in own}) == 6  # no two of them alike


def test_another_seed_draws_others(run, drawn, tmp_path):
    run(tmp_path / "out", TEXTS[:1], [], how=Drawing(steps=2, seed=8, dtype="float32"))
    assert not np.array_equal(
        pictures(tmp_path / "out", "mine")["red apple", 0], pictures(drawn, "mine")["red apple", 0]
    )


@torch.no_grad()
def test_pictures_are_the_pipelines_and_the_bases_from_one_noise(drawn, models, tiny_base):
    pixels = drawing.load_pixel_pipeline(models / "mine/pipeline", torch.float32)
    stock = flux2.load_parts(tiny_base, ("vae", "text_encoder", "tokenizer", "transformer"), torch.float32)
    for text, number in (("red apple", 0), ("deer", 1)):
        seed = int(hashlib.sha256(f"7\0{number}\0{text}".encode()).hexdigest()[:16], 16) // 4
        noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        (expected,) = pixels(text, "", 64, 64, 2, latents=noise).images
        assert_alike({0: pictures(drawn, "mine")[text, number]}, {0: np.array(expected, int)})
        projected = to_image(to_tokens(noise, 16) @ pixels.subspace.basis, (4, 4), 1)  # as in validation
        (expected,) = stock(
            prompt=text, latents=projected, height=64, width=64, num_inference_steps=2, guidance_scale=4.0,
            max_sequence_length=32,
        ).images  # fmt: skip
        assert_alike({0: pictures(drawn, "base")[text, number]}, {0: np.array(expected, int)})


def test_the_text_encoder_is_gone_before_the_transformer_draws(run, tmp_path, monkeypatch):
    encode, noise, encoders, drew = drawing._encode, drawing.noise_of, [], []

    def encode_spy(model, parts, *rest):
        assert parts.transformer is None
        encoders.append(weakref.ref(parts.text_encoder))
        return encode(model, parts, *rest)

    def noise_spy(model, *rest):
        assert not any(encoder() for encoder in encoders)
        drew.append(model.name)
        return noise(model, *rest)

    monkeypatch.setattr(drawing, "_encode", encode_spy)
    monkeypatch.setattr(drawing, "noise_of", noise_spy)
    monkeypatch.setattr(drawing, "PROMPTS_AT_ONCE", 2)
    run(tmp_path / "out")
    assert drew == ["mine", "mine", "base", "base"] and len(encoders) == 4


def test_pictures_that_are_not_finite_are_named(run, tmp_path, models, tiny_base):
    export(converted_lora(tiny_base), tmp_path / "broken", "adapter")
    (file,) = (tmp_path / "broken").glob("*.safetensors")
    state = load_file(file)
    state["x_embedder.weight"] = torch.full_like(state["x_embedder.weight"], 3e38)  # so its sums are infinite
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        metadata = json.loads(handle.read(length))["__metadata__"]
    save_file(state, file, metadata)
    with pytest.warns(UserWarning, match="2 of 2 pictures hold"), pytest.warns(RuntimeWarning, match="invalid value"):
        result = run(tmp_path / "out", TEXTS[:2], [], pipeline=str(tmp_path / "broken"))
    (warning,) = [warning for warning in result.warnings if "NaN" in warning]
    assert "2 of 2 pictures of broken held NaN" in warning and f"{suite(TEXTS).prompts[1].id}-0" in warning
    assert not pictures(tmp_path / "out", "broken")["rocket", 0].any()


def test_sizes_that_differ_are_compared_at_the_smaller(run, tmp_path, models, tiny_base):
    larger = converted_lora(tiny_base)
    larger.provenance["settings"]["default_size"] = 96
    export(larger, tmp_path / "larger", "adapter")
    result = run(tmp_path / "out", TEXTS[:1], [str(models / "other"), f"base={tiny_base}"],
                 pipeline=str(tmp_path / "larger"))  # fmt: skip
    assert [model.size for model in result.models] == [(96, 96), (64, 64), (96, 96)]
    assert result.compared_at == (64, 64)
    assert "compared at 64x64" in result.warnings[0] and "larger 96x96, other 64x64" in result.warnings[0]
    same = run(tmp_path / "same", TEXTS[:1], [str(models / "other")], pipeline=str(tmp_path / "larger"), size=32)
    assert same.compared_at == (32, 32) and not any("compared at" in warning for warning in same.warnings)
    assert pictures(tmp_path / "same", "other")["red apple", 0].shape == (32, 32, 3)


def test_a_latent_pipeline_whose_tokens_do_not_fit_has_its_own_noise(run, tmp_path):
    flux1.build(tmp_path / "flux1")
    result = run(tmp_path / "out", TEXTS[:1], [str(tmp_path / "flux1")])
    assert "flux1 draws from noise of its own, for its 64 values per 16x16 pixels do not fit" in result.warnings[0]
    (model,), _ = open_models([("flux1", str(tmp_path / "flux1"))], 64)
    one, two = Wanted("rocket", 0, Path()), Wanted("deer", 0, Path())
    noise = drawing.noise_of(model, 7, [one, two])
    assert noise.shape == (2, 64, 4, 4) and torch.equal(drawing.noise_of(model, 7, [two])[0], noise[1])


def test_a_latent_pipeline_can_be_the_one_in_question(run, tmp_path, drawn, models, tiny_base):
    out = tmp_path / "out"
    result = run(out, TEXTS, [str(models / "mine/pipeline")], pipeline=f"base={tiny_base}", per_prompt=2)
    assert [(model.name, model.kind) for model in result.models] == [("base", "latent"), ("mine", "pixel")]
    assert_alike(pictures(out, "base"), pictures(drawn, "base"))
    alone = run(tmp_path / "alone", TEXTS[:1], [], pipeline=tiny_base, size=64)
    assert alone.compared_at == (64, 64)
    with pytest.raises(ValueError, match=r"only latent pipelines are given.*give --size"):
        run(tmp_path / "no size", TEXTS[:1], [], pipeline=tiny_base)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_too_little_memory_says_what_to_change(error, run, tmp_path, monkeypatch):
    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(flux2, "draw_base", fail)
    with pytest.raises(ValueError, match=r"with 2 pictures of 64x64 of base at once; .* smaller --batch-size"):
        run(tmp_path / "out")
    assert len(stamps(tmp_path / "out")) == 3  # the pixel model's
