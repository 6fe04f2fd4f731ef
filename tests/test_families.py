"""What holds for every family: tests/tiny/NAME.py builds a stock pipeline with random weights, and here it is lifted,
coupled with its own sampler, trained, saved and loaded."""

import copy
import json
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from asymflow_ft import cli
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace
from asymflow_ft.export import load_pixel_pipeline
from asymflow_ft.families import family_named, family_of
from asymflow_ft.families.base import compile_blocks, scheduler_shift
from asymflow_ft.hub.bundle import bundle
from asymflow_ft.method.asymflow import calibrate
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.training import trainable
from asymflow_ft.training.encode import encode_texts, load_text_parts
from asymflow_ft.training.recompute import checkpointed

NAMES = ["flux2", "flux3", "flux1", "sd3", "qwen_image", "z_image", "ernie_image"]
PROMPTS = ["red apple", "a rocket over the sea"]
LENGTH = 16  # text tokens
SIDE = 64  # pixels


@dataclass(frozen=True)
class Tiny:
    """A family with a tiny base of its kind: the folder, the stock pipeline in float32, and a subspace that fits."""

    name: str
    family: ModuleType
    folder: str
    parts: DiffusionPipeline
    subspace: PixelSubspace

    @property
    def grid(self) -> tuple[int, int]:
        side = SIDE // self.subspace.config["patch"]
        return side, side

    def latents(self, count: int, seed: int) -> torch.Tensor:
        """Latent tokens (B, N, R), N(0, 1)."""
        shape = (count, self.grid[0] * self.grid[1], self.subspace.config["rank"])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def texts(self) -> torch.Tensor:
        """Embeddings of PROMPTS (B, L, E)."""
        return pad_sequence(list(encode_texts(self.family, self.parts, PROMPTS, LENGTH)), batch_first=True)

    def guidance(self) -> float | None:
        """What the network is told of guidance."""
        kind = self.family.pixel_pipeline_class(self.parts)
        return pixel_pipeline(self, kind).distilled_guidance


@pytest.fixture(scope="module", params=NAMES)
def tiny(request, tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    import_module(f"tests.tiny.{request.param}").build(folder)
    family = family_named(request.param)
    parts = family.load_parts(str(folder), (*family.TEXT_PARTS, "vae", "transformer", "scheduler"), torch.float32)
    parts.set_progress_bar_config(disable=True)
    patch, rank = family.pixel_patch(parts.vae), family.latent_dim(parts.vae)
    basis = torch.linalg.qr(torch.randn(3 * patch**2, rank, generator=torch.Generator().manual_seed(0))).Q
    return Tiny(request.param, family, str(folder), parts, PixelSubspace.from_fit(basis, torch.tensor(2.4)))


def pixel_pipeline(tiny: Tiny, kind=None, transformer=None):
    kind = kind or tiny.family.pixel_pipeline_class(tiny.parts)
    texts = {name: tiny.parts.components[name] for name in tiny.family.TEXT_PARTS}
    pipeline = kind(
        scheduler=flow_solver(), transformer=transformer or tiny.family.lift(tiny.parts.transformer, tiny.subspace),
        subspace=tiny.subspace, codec=PixelCodec(), **texts, shift=5.0, shift_mode="static", default_size=SIDE,
        max_sequence_length=LENGTH,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
