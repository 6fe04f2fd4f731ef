"""Style LoRAs on a converted model, and the plain loss that trains them."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from asymflow_ft import cli
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import Cond, PixelModel
from asymflow_ft.data.prepare import Batch
from asymflow_ft.export import load_pixel_pipeline
from asymflow_ft.families import flux2
from asymflow_ft.hub.forms import LORA_WEIGHTS, add_loras, open_converted
from asymflow_ft.hub.provenance import read_provenance
from asymflow_ft.method.patches import to_tokens
from asymflow_ft.recipe import load_recipe
from asymflow_ft.training.objective import draw_noise, pixel_noise, training_terms
from tests.conftest import REPOSITORY
from tests.converted import converted_lora
from tests.init_from.conftest import RECIPE, STYLE, run

pytestmark = pytest.mark.usefixtures("in_repository")


@pytest.fixture(scope="module")
def styles(start, tmp_path_factory):
    """Two style LoRAs of other seeds on one converted model; the first interrupted after a step."""
    folder, here = tmp_path_factory.mktemp("styles"), pytest.MonkeyPatch()
    here.chdir(REPOSITORY)
    for i, steps in enumerate([(1, 3), (3,)]):
        for count in steps:
            assert run(folder / f"style_{i}", start / "pipeline", *STYLE, f"seed={i}", f"train.steps={count}") == 0
    here.undo()
    return folder


def test_a_style_is_the_blocks_adapters_alone(styles, start):
    for folder in (styles / "style_0/lora", styles / "style_1/lora"):
        state = load_file(folder / "pytorch_lora_weights.safetensors")
        assert all(name.startswith("transformer.") and ".lora_" in name for name in state)
        network = open_converted(start / "pipeline").transformer()
        assert {name.split(".lora_")[0] for name in state} == {
            f"transformer.{name}" for name in flux2.lora_targets(network)
        }
        stated = read_provenance(folder)
        assert stated["form"] == "lora" and stated["init_from"] == str(start / "pipeline")
        assert {f"torch.{stated['dtype']}"} == {str(tensor.dtype) for tensor in state.values()}
    (earlier,) = (styles / "style_0").glob("lora.before-*")  # of the first of its two runs
    assert read_provenance(earlier)["step"] == 1 and read_provenance(styles / "style_0/lora")["step"] == 3
    assert not (styles / "style_0/pipeline").exists() and not (styles / "style_0/samples/base").exists()
    assert not list((styles / "cache").glob("latents/*.safetensors"))  # plain flow matching needs none


def test_an_interrupted_style_is_the_same_style(styles, start, tmp_path):
    shutil.copytree(styles / "cache", tmp_path / "cache")
    assert run(tmp_path / "straight", start / "pipeline", *STYLE, "seed=0", "train.steps=3") == 0
    one, other = (
        load_file(folder / "lora/pytorch_lora_weights.safetensors")
        for folder in (styles / "style_0", tmp_path / "straight")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_several_styles_add_up_by_their_weights(styles, start):
    pipeline = load_pixel_pipeline(start / "pipeline", torch.float32)
    network = pipeline.transformer
    name = "transformer_blocks.0.ff.linear_in"
    before = network.get_submodule(name).weight.clone()
    generator = torch.Generator().manual_seed(0)
    x, embeds = torch.randn(1, 16, 768, generator=generator), torch.randn(1, 8, 192, generator=generator)

    def output():
        return flux2.predict(network, x, torch.tensor([0.5]), Cond(embeds), (4, 4))

    plain = output()
    folders = [styles / f"style_{i}/lora" for i in range(2)]
    add_loras(pipeline, [f"{folders[0]}=0.5", str(folders[1])])
    both = output()
    assert not torch.allclose(both, plain, atol=1e-5)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(output(), both, atol=1e-5, rtol=1e-4)
    expected = before
    for folder, weight in zip(folders, (0.5, 1.0), strict=True):
        state = load_file(folder / "pytorch_lora_weights.safetensors")
        up, down = (state[f"transformer.{name}.lora_{side}.weight"] for side in "BA")
        expected = expected + weight * up @ down
    torch.testing.assert_close(network.get_submodule(name).weight, expected, atol=1e-6, rtol=1e-5)


def test_sample_takes_styles(styles, start, tmp_path, capsys):
    base = ["sample", "--pipeline", str(start / "adapter"), "--prompt", "x", "--steps", "1"]
    style = str(styles / "style_0/lora")
    assert cli.main([*base, "--lora", style, "--lora", f"{style}=0.3", "--out", str(tmp_path / "a")]) == 0
    for wrong, message in ((f"{style}=much", "could not convert"), (str(tmp_path / "none"), "there is no file")):
        assert cli.main([*base, "--lora", wrong, "--out", str(tmp_path / "b")]) == 1
        assert message in capsys.readouterr().err
    model = ["--pipeline", str(styles / "style_0"), "--out", str(tmp_path / "b")]
    assert (
        cli.main(["sample", "--prompt", "x", *model]) == 1 and "trains a style LoRA; give" in capsys.readouterr().err
    )
    exported = ["export", str(styles / "style_0"), "--out", str(tmp_path / "c"), "--form"]
    assert cli.main([*exported, "merged"]) == 1 and "choose --form lora" in capsys.readouterr().err
    assert cli.main([*exported, "lora", "--dtype", "bfloat16"]) == 1 and "always float32" in capsys.readouterr().err
    assert cli.main([*exported, "lora"]) == 0
    one, other = (load_file(f"{f}/pytorch_lora_weights.safetensors") for f in (style, tmp_path / "c"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_lora_goes_on_whole_or_not_at_all(styles, start, tmp_path):
    """diffusers itself leaves out what has no place in a model, and says nothing if the rest has one."""
    pipeline = load_pixel_pipeline(start / "pipeline", torch.float32)
    state = load_file(styles / "style_0/lora" / LORA_WEIGHTS)
    surplus = {f"transformer.transformer_blocks.99.ff.linear_in.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    file = tmp_path / "wrong.safetensors"
    for wrong, message in (
        (state | surplus, r"has no place for its transformer\.transformer_blocks\.99"),
        ({name.removeprefix("transformer."): tensor for name, tensor in state.items()}, "has no place for its"),
        ({name.replace("transformer.", "unet.", 1): tensor for name, tensor in state.items()}, "has no place for its"),
        ({name: tensor for name, tensor in state.items() if "lora_A" in name}, "has no counterpart"),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=message):
            add_loras(pipeline, [str(file)])
        assert not hasattr(pipeline.transformer, "peft_config")
    with pytest.raises(ValueError, match="the weight nan is no finite number"):
        add_loras(pipeline, [f"{styles / 'style_0/lora'}=nan"])
    shutil.copytree(styles / "style_0/lora", tmp_path / "a=b")
    add_loras(pipeline, [str(tmp_path / "a=b"), f"{tmp_path / 'a=b'}=0.5"])
    assert pipeline.get_active_adapters() == ["lora_0", "lora_1"]


def test_plain_flow_matching_is_the_error_of_the_clean_estimate(tiny_base):
    """Its loss is w |x0_hat - x0|^2 / max(sigma, floor)^2 and does not look at latents."""
    overrides = ["align.path=x", "loss.variance_reduction=false", "lora={rank: 2}"]
    recipe = load_recipe(RECIPE, overrides)
    model = converted_lora(tiny_base)
    network = PixelModel(model.with_dtype(torch.float32).transformer(), model.subspace, flux2.predict)
    generator, codec = torch.Generator().manual_seed(1), PixelCodec()
    rgb, embeds = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1, torch.randn(2, 8, 192, generator=generator)
    batch = Batch(rgb, torch.empty(2, 0, 0), embeds, [3, 4], ["a", "b"])
    noise = pixel_noise(batch, 16, recipe.seed)
    terms = training_terms(recipe, network, None, codec, None, batch, noise, 3.0, torch.device("cpu"))
    x0 = to_tokens(codec.encode(rgb), 16)
    _, eps = draw_noise([3, 4], *x0.shape[1:], recipe.seed)
    sigma = terms.sigma[:, None, None]
    estimate = network.clean(torch.lerp(x0, eps, sigma), sigma, Cond(embeds), (4, 4))
    error = (estimate - x0).square().mean((1, 2)) / terms.sigma.clamp(min=0.05) ** 2
    torch.testing.assert_close(terms.mse, recipe.loss.mse * error)
    assert not terms.coefficient.any() and not terms.perceptual.any()
    batch = replace(batch, z0=torch.ones(2, 16, 128))
    again = training_terms(recipe, network, None, codec, None, batch, noise, 3.0, torch.device("cpu"))
    assert torch.equal(again.loss(), terms.loss())
