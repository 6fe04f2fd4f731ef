"""FLUX.2-dev, the base with embedded guidance and a Mistral text encoder: a tiny one of random weights, converted."""

import itertools
import json
import shutil

import pytest
import torch
import yaml
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2TimestepGuidanceEmbeddings
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from asymflow_ft import cli
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.export import load_pixel_pipeline
from asymflow_ft.families import family_of, flux2
from asymflow_ft.hub.write import export
from asymflow_ft.method import asymflow
from asymflow_ft.training import trainable
from tests.converted import as_converted

LENGTH = 48  # tokens of a prompt, of which the pipeline's system message takes 32
PARTS = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Words of `texts`, with the chat form that the stock pipeline speaks.

    It stands for PixtralProcessor, whose import needs torchvision; the pipeline calls nothing but the chat template.
    """
    words = Tokenizer(WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = ["<unk>", "<pad>", "[IMG]"]
    words.train_from_iterator([*texts, SYSTEM_MESSAGE, "[system] [user]"], WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", padding_side="left",
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content[0].text }} {% endfor %}",
    )  # fmt: skip


@torch.no_grad()
def build_dev(texts: list[str]) -> Flux2Pipeline:
    tokenizer = build_tokenizer(texts)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    text = {"model_type": "mistral", "num_hidden_layers": 30, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    vision = {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    image_token = tokenizer.convert_tokens_to_ids("[IMG]")
    mistral = Mistral3Config(text_config=text | sizes, vision_config=vision | sizes, image_token_index=image_token)
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=3 * 32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=True,
    )  # fmt: skip
    for parameter in transformer.parameters():
        parameter.mul_(2)  # else prompts would hardly matter
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, tokenizer=tokenizer,
        text_encoder=Mistral3ForConditionalGeneration(mistral), transformer=transformer,
    )  # fmt: skip


@pytest.fixture(scope="session")
def dev_base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("dev") / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_dev(["red apple", "rocket", "low quality"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def parts(dev_base):
    pipeline = flux2.load_parts(dev_base, PARTS, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def subspace():
    g = torch.Generator().manual_seed(0)
    return PixelSubspace.from_fit(torch.linalg.qr(torch.randn(768, 128, generator=g)).Q, torch.tensor(2.4))


@pytest.fixture
def guidance_seen(monkeypatch):
    """The guidance values that guidance embedders were given, one per call of a network; None is a call without."""
    seen = []
    forward = Flux2TimestepGuidanceEmbeddings.forward

    def recording(self, timestep, guidance):
        seen.append(None if guidance is None else tuple(set((guidance / 1000).tolist())))
        return forward(self, timestep, guidance)

    monkeypatch.setattr(Flux2TimestepGuidanceEmbeddings, "forward", recording)
    return seen


def pixel_pipeline(parts, subspace):
    pipeline = flux2.pixel_pipeline_class(parts)(
        scheduler=flow_solver(), text_encoder=parts.text_encoder, tokenizer=parts.tokenizer,
        transformer=flux2.lift(parts.transformer, subspace), subspace=subspace, codec=PixelCodec(),
        shift=7.0, shift_mode="static", default_size=64, max_sequence_length=LENGTH,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt="red apple", **options):
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"} | options
    return pipeline(prompt, **options).images


def test_dev_is_a_flux2_base_and_loads_in_parts(dev_base, parts):
    assert family_of(dev_base) is flux2
    assert type(parts) is Flux2Pipeline and flux2.pixel_pipeline_class(parts) is flux2.PixelFlux2Pipeline
    assert flux2.latent_shift(parts) == 7.0
    assert (flux2.pixel_patch(parts.vae), flux2.latent_dim(parts.vae)) == (16, 128)
    one = flux2.load_parts(dev_base, ("text_encoder", "tokenizer"), torch.float32)
    assert one.vae is None and one.transformer is None
    with torch.no_grad():
        embeds = one.encode_prompt(["red apple", "rocket", "red apple"], max_sequence_length=LENGTH)[0]
    assert embeds.shape == (3, LENGTH, 96)
    assert torch.equal(embeds[0], embeds[2]) and not torch.allclose(embeds[0], embeds[1], atol=0.1)


def test_missing_torchvision_matters_to_the_tokenizer_alone(dev_base, tmp_path, monkeypatch):
    monkeypatch.setattr(flux2, "is_torchvision_available", lambda: False)
    base = tmp_path / "base"
    shutil.copytree(dev_base, base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "PixtralProcessor"]}))
    assert flux2.load_parts(str(base), ("vae",), torch.float32).vae is not None
    with pytest.raises(ValueError, match="`pip install torchvision`"):
        flux2.load_parts(str(base), ("tokenizer",), torch.float32)


@torch.no_grad()
def test_lift_is_the_base_on_the_subspace_at_any_guidance(dev_base, subspace):
    base = flux2.load_parts(dev_base, ("transformer",), torch.float64).transformer
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(768, 128, generator=g, dtype=torch.float64)).Q
    wide = PixelSubspace.from_fit(basis, torch.tensor(2.4)).double()
    wide.basis.copy_(basis)
    lifted = flux2.lift(base, wide)
    assert type(lifted) is Flux2Transformer2DModel and lifted.config.guidance_embeds
    z = torch.randn(2, 12, 128, generator=g, dtype=torch.float64)
    tau, embeds = torch.tensor([0.3, 0.8]).double(), torch.randn(2, 8, 96, generator=g, dtype=torch.float64)
    outputs = []
    for guidance in (3.5, 1.0):
        cond = Cond(embeds, guidance)
        outputs.append(flux2.predict(base, z, tau, cond, (3, 4)))
        lifted_output = flux2.predict(lifted, z @ basis.mT, tau, cond, (3, 4)) @ basis
        torch.testing.assert_close(lifted_output, outputs[-1], rtol=0, atol=1e-12)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@torch.no_grad()
def test_lifted_dev_follows_the_stock_pipeline(parts, subspace):
    """Euler in pixels, at the levels that the stock scheduler's own levels belong to: the stock pipeline's latents."""
    lifted = flux2.lift(parts.transformer, subspace)
    embeds = parts.encode_prompt("red apple", max_sequence_length=LENGTH)[0]
    x = torch.randn(1, 16, 768, generator=torch.Generator().manual_seed(0))
    basis, scale = subspace.float32()
    z = parts(
        prompt_embeds=embeds, latents=(x @ basis).mT.unflatten(2, (4, 4)), height=64, width=64, guidance_scale=3.5,
        num_inference_steps=8, output_type="latent",
    ).images  # fmt: skip
    tau = parts.scheduler.sigmas
    sigma = scale * tau / (1 + (scale - 1) * tau)
    torch.testing.assert_close(asymflow.calibrate(sigma, scale).tau, tau)
    model, cond = PixelModel(lifted, subspace, flux2.predict), Cond(embeds, 3.5)
    for high, low in itertools.pairwise(sigma):
        x = x + (low - high) * model.velocity(x, high.reshape(1, 1, 1), cond, (4, 4))
    expected = asymflow.lift(z, basis, scale)
    assert expected.abs().max() > 1
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_trained_names_leave_the_guidance_embedder_alone(parts, subspace):
    lifted = flux2.lift(parts.transformer, subspace)
    trainable.attach_lora(lifted, flux2.lora_targets(lifted), flux2.TRAINED_ENDS, rank=2, dropout=0.0)
    embedder, double = "time_guidance_embed.timestep_embedder", "transformer_blocks.0"
    targets = [f"{embedder}.linear_1", f"{embedder}.linear_2"]
    targets += [f"{double}.{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")]
    targets += [f"single_transformer_blocks.{i}.attn.to_out" for i in (0, 1)]
    expected = {f"{target}.lora_{f}.default.weight" for target in targets for f in "AB"}
    expected |= {"x_embedder.weight", "proj_out.weight", "norm_out.linear.weight"}
    assert {trainable.diffusers_name(name) for name in trainable.trained_parameters(lifted)} == expected


def test_base_is_drawn_at_the_distilled_guidance(parts, guidance_seen):
    embeds = parts.encode_prompt(["red apple", "rocket"], max_sequence_length=LENGTH)[0].detach()
    noise = torch.randn(2, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    for guidance in (None, 4.0):
        drawn, _ = flux2.draw_base(parts, noise, embeds, embeds[0], (64, 64), 2, guidance)
    assert guidance_seen == [(3.5,)] * 4
    stock = parts(prompt_embeds=embeds, latents=noise, height=64, width=64, num_inference_steps=2, guidance_scale=3.5)
    assert [one.tobytes() for one in drawn] == [one.tobytes() for one in stock.images]


def test_pipeline_gives_its_distilled_guidance_to_the_network(parts, subspace, dev_base, tmp_path, guidance_seen):
    pipeline = pixel_pipeline(parts, subspace)
    first = draw(pipeline)
    assert first.shape == (1, 3, 64, 64) and guidance_seen == [(3.5,)] * 2  # and no unconditional passes
    guided = draw(pipeline, guidance_scale=3.0, negative_prompt="low quality")
    assert guidance_seen == [(3.5,)] * 6 and not torch.allclose(guided, first, atol=1e-3)

    pipeline.register_to_config(distilled_guidance=2.0)
    second = draw(pipeline)
    assert guidance_seen[6:] == [(2.0,)] * 2 and not torch.equal(second, first)
    export(as_converted(pipeline, dev_base), tmp_path / "once", "pipeline")
    once = load_pixel_pipeline(tmp_path / "once", torch.float32)
    assert type(once) is flux2.PixelFlux2Pipeline and once.distilled_guidance == 2.0
    torch.testing.assert_close(draw(once), second, rtol=0, atol=2e-4)
    # both from files: tensors placed otherwise in memory round otherwise
    export(as_converted(once, dev_base), tmp_path / "twice", "pipeline")
    twice = load_pixel_pipeline(tmp_path / "twice", torch.float32)
    assert torch.equal(draw(once), draw(twice))
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            one, other = component.state_dict(), getattr(twice, name).state_dict()
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.allclose(draw(once, "rocket"), second, atol=1e-2)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_align_finetune_sample(kind, dev_base, tiny_data, tmp_path, guidance_seen):
    """Every call of the network, in latents or pixels, in drawing, training or measuring, has the same guidance."""
    rows = [json.loads(line) for line in open(f"{tiny_data}/metadata.jsonl")][:16]
    (tmp_path / "data").mkdir()
    for row in rows:
        Image.open(f"{tiny_data}/{row['file_name']}").save(tmp_path / "data" / row["file_name"].split("/")[-1])
    lines = (json.dumps({**row, "file_name": row["file_name"].split("/")[-1]}) + "\n" for row in rows)
    (tmp_path / "data/metadata.jsonl").write_text("".join(lines))
    (tmp_path / "prompts.txt").write_text("red apple\nrocket\n")
    recipe = {
        "base": dev_base, "output_dir": str(tmp_path / "run"), "text": {"max_length": LENGTH},
        "data": {"source": str(tmp_path / "data"), "resolution": 64, "held_out": 1},
        "align": {"path": str(tmp_path / "subspace"), "num_images": 16},
        "lora": {"rank": 2} if kind == "lora" else None, "loss": {"perceptual": "none"},
        "train": {"steps": 2, "precision": "no", "optimizer": "adamw", "batch_size": 2, "lr": 0.01},
        "sample": {"prompts": str(tmp_path / "prompts.txt"), "steps": 2, "count": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["align", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    assert cli.main(["finetune", str(tmp_path / "recipe.yaml")]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["run"]["steps"] == 2
    assert metrics["held_out_error"]["step 0"] != metrics["held_out_error"]["finetuned"]
    pipeline = str(tmp_path / "run/pipeline")
    assert load_pixel_pipeline(pipeline, torch.float32).distilled_guidance == 3.5
    out = tmp_path / "out"
    arguments = ["sample", "--pipeline", pipeline, "--prompt", "rocket", "--steps", "2", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert Image.open(out / "00000.png").size == (64, 64)
    # latent base 2, step 0 and final 2 each, held-out error 6 twice, 2 training steps with reference, sample 2
    assert guidance_seen == [(3.5,)] * (2 + 2 + 2 + 6 + 6 + 4 + 2)
