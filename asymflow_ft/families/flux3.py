"""FLUX.3 klein base (Qwen3-VL text encoder), for which diffusers has modular blocks and no classic pipeline.

Latent tokens are those of FLUX.2, whose VAE it is reported to share. The transformer takes sigma in [0, 1] and
predicts eps - x0. It takes no mask and attends to a prompt's padding up to the next multiple of 80 tokens, so prompts
of different windows cannot share a call: `predict` makes one for each.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ClassifierFreeGuidance,
    DiffusionPipeline,
    Flux3AutoBlocks,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
    ImagePipelineOutput,
    ModularPipelineBlocks,
)
from diffusers.loaders import Flux3LoraLoaderMixin
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from asymflow_ft.components.pipelines import CFG_SCALE
from asymflow_ft.components.subspace import Cond, Grid, PixelSubspace
from asymflow_ft.families.base import (
    OneEncoderPipeline,
    autocast,
    build_lifted,
    load_index,
    load_json,
    modular_parts,
    scheduler_shift,
)
from asymflow_ft.families.vae import WHITENED_LATENTS
from asymflow_ft.method.asymflow import lift_weights
from asymflow_ft.method.patches import to_tokens

PIPELINES = {"Flux3ModularPipeline": Flux3ModularPipeline}
CHECKPOINTS = (("black-forest-labs/flux-3-image-klein-base", "flux-kommunity-license, as reported"),)
GEOMETRY = (128, 16)  # of these: the rank, and the side of the pixel patch of a token
TRANSFORMER = Flux3Transformer2DModel
TEXT_PARTS = ("text_encoder", "tokenizer")
EXTRA_TEXT_ROWS = 0
TEXT_LAYERS = 32  # the last hidden state that is read
ROPE_SCALE = 0.5  # of the rows and columns of images
OUTPUT_LAYER = "proj_out"
TRAINED_ENDS = ("x_embedders.image", OUTPUT_LAYER, "norm_out.linear")
ADAPTER_CLASS = "AsymFlux3Transformer2DModel"
ADAPTER_CONFIG = (
    "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "timestep_channels", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps",
)  # fmt: skip


def load_parts(
    base: str, parts: tuple[str, ...], dtype: torch.dtype, revision: str | None = None
) -> Flux3ModularPipeline:
    """The modular pipeline of a base with its scheduler and only the named parts loaded ("vae", "text_encoder",
    "tokenizer", "transformer", "scheduler"); the others are None and are not downloaded. It has no prompt upsampler.

    Raises:
        ValueError: not a FLUX.3 pipeline, a step-distilled one, or files that cannot be fetched or read.
    """
    name = load_index(base, revision)["_class_name"]
    if name not in PIPELINES:
        raise ValueError(f"{base} is a {name}; this family converts {', '.join(PIPELINES)}")
    if load_json(base, "transformer/config.json", revision).get("flow_map"):
        raise ValueError(
            f"{base} is step-distilled (flow_map is true in its transformer's config.json) and cannot be finetuned "
            f"with flow matching; use the undistilled base, such as {CHECKPOINTS[0][0]}"
        )
    blocks = Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    return modular_parts(Flux3ModularPipeline, blocks, base, parts, dtype, revision)


def shorten_text_encoder(pipeline: Flux3ModularPipeline) -> None:
    """Drop what prompts do not use: layers behind the last hidden state that is read, final norm, vocabulary head and
    vision. The embeddings stay the same bit for bit."""
    encoder = pipeline.text_encoder
    decoder = encoder.model.language_model
    decoder.layers = decoder.layers[:TEXT_LAYERS]
    # the norm would act on the last hidden state, now one that is read
    decoder.norm = encoder.lm_head = encoder.model.visual = nn.Identity()


def embed(pipeline: Any, prompts: list[str], max_length: int) -> Tensor:
    """Text embeddings (B, L, E), each as long as its window of a multiple of 80 tokens, padded with rows of zeros."""
    rows = [
        Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
            pipeline.text_encoder, pipeline.tokenizer, prompt, pipeline._execution_device, max_length
        )[0]
        for prompt in prompts
    ]
    return pad_sequence(rows, batch_first=True)


def latent_shift(pipeline: Flux3ModularPipeline) -> float:
    """The timestep shift that the base was made for."""
    return scheduler_shift(pipeline.scheduler)


pixel_patch, latent_dim, encode_latents, decode_latents = WHITENED_LATENTS


def lift(transformer: Flux3Transformer2DModel, subspace: PixelSubspace) -> Flux3Transformer2DModel:
    """The base with its end layers folded into pixels, that of condition images too; all other weights are shared with
    the base, not copied.

    Raises:
        ValueError: the basis has another rank than the base's latent tokens.
    """
    state, basis = transformer.state_dict(), subspace.float32()[0]
    for name in ("x_embedders.image.weight", "x_embedders.image_cond.weight"):
        state[name], output, _ = lift_weights(state[name], transformer.proj_out.weight, None, basis)
    state["proj_out.weight"] = output
    size = subspace.config["pixel_dim"]
    return build_lifted(transformer, {"in_channels": size, "cond_in_channels": size}, state)


def text_dim(transformer: Flux3Transformer2DModel) -> int:
    """Width E of the text embeddings that the transformer reads."""
    return transformer.config.joint_attention_dim


def _ids(grid: Grid, place: int, device: torch.device) -> Tensor:
    """Position ids (0, row, column, place) of a token grid, (h * w, 4)."""
    axes = torch.zeros(1), torch.arange(grid[0]) * ROPE_SCALE, torch.arange(grid[1]) * ROPE_SCALE
    return torch.cartesian_prod(*axes, torch.tensor([float(place)])).to(device)


def predict(
    transformer: nn.Module,
    tokens: Tensor,
    tau: Tensor,
    cond: Cond,
    grid: Grid,
    references: list[tuple[Tensor, Grid]] = [],  # noqa: B006 never changed
) -> Tensor:
    """One forward pass of a latent or lifted transformer.

    Args:
        tokens: (B, N, D or R) float32. tau: (B,) noise level the network sees, in [0, 1]. grid: (rows, columns).
        references: condition tokens (B, M, D) with their grids, told apart by the places -1, -2, ...

    Returns:
        (B, N, D or R), eps minus data, in the precision of `tokens`.
    """
    device, outputs = tokens.device, []
    reference_ids = [_ids(shape, -1 - m, device) for m, (_, shape) in enumerate(references)]
    # always B calls: were it one per window, processes that share weights would wait for each other for ever
    for i, length in enumerate(cond.lengths()):
        text_ids = F.pad(torch.arange(length, device=device)[:, None], (3, 0))
        clean = {} if not references else {
            "image_cond_hidden_states": torch.cat([reference[i : i + 1] for reference, _ in references], dim=1),
            "image_cond_ids": torch.cat(reference_ids),
        }  # fmt: skip
        with autocast(tokens, cond):
            outputs += transformer(
                hidden_states=tokens[i : i + 1], encoder_hidden_states=cond.embeds[i : i + 1, :length],
                timestep=tau[i : i + 1], img_ids=_ids(grid, 0, device), txt_ids=text_ids, return_dict=False, **clean,
            )  # fmt: skip
    return torch.cat(outputs).to(tokens.dtype)


class _Report(ModularPipelineBlocks):
    """The last block of a step: tells that it is done."""

    def __init__(self, on_step: Callable[[int], None]):
        super().__init__()
        self.on_step = on_step

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        self.on_step(i)
        return components, block_state


def draw_base(
    parts: Flux3ModularPipeline, noise: Tensor, embeds: Tensor, empty: Tensor, size: Grid, steps: int,
    guidance: float | None, output_type: str = "pil", on_step: Callable[[int], None] | None = None,
) -> tuple[list[Image.Image], Tensor]:  # fmt: skip
    """Pictures of the latent base by its own modular blocks and scheduler, one by one, and their latent tokens
    (B, N, R). Arguments as in the other families (docs/adding_a_family.md)."""
    blocks = parts.blocks
    for unused in ("text_encoder", "vae_encoder", *(["decode"] if output_type == "latent" else [])):
        blocks.sub_blocks.pop(unused)
    loop = blocks.sub_blocks["denoise"].sub_blocks["text2image"].sub_blocks["denoise"]
    loop.set_progress_bar_config(disable=True)
    if on_step is not None:
        loop.sub_blocks["report"] = _Report(on_step)
    drawing = Flux3ModularPipeline(blocks=blocks)
    last = {} if output_type == "latent" else {"output_type": output_type}
    drawing.update_components(
        transformer=parts.transformer, scheduler=parts.scheduler,
        guider=ClassifierFreeGuidance(CFG_SCALE if guidance is None else guidance),
        **({} if output_type == "latent" else {"vae": parts.vae}),
    )  # fmt: skip
    pictures, latents = [], []
    for one, text, length in zip(noise, embeds, Cond(embeds).lengths(), strict=True):
        result = drawing(
            prompt_embeds=text[None, :length], negative_prompt_embeds=empty[None], latents=one[None], height=size[0],
            width=size[1], num_inference_steps=steps, **last,
        )  # fmt: skip
        pictures += result.get("images") or []
        latents.append(to_tokens(result.get("latents").float(), 1))
    return pictures, torch.cat(latents)


def lora_targets(transformer: Flux3Transformer2DModel) -> list[str]:
    """Exact module names that the paper's recipe adapts in FLUX.2, as they are called here: feed-forwards, the time
    embedder, and what the single blocks write; no queries, keys or values, and nothing of condition images."""
    names = ["timestep_embedder.linear_1", "timestep_embedder.linear_2"]
    for i in range(transformer.config.num_layers):
        blocks = f"mode_blocks.image.{i}", f"txt_mode_blocks.{i}"
        names += [f"{block}.ff.linear_{end}" for block in blocks for end in ("in", "out")]
    for i in range(transformer.config.num_single_layers):
        names += [f"single_transformer_blocks.{i}.{last}" for last in ("attn.to_out.0", "ff.linear_out")]
    return names


class PixelFlux3Pipeline(OneEncoderPipeline, Flux3LoraLoaderMixin, DiffusionPipeline):
    """FLUX.3 klein in pixel space; prompts as in Flux3ModularPipeline without its upsampler, LoRA files as there."""

    output_class = ImagePipelineOutput
    predict, embed = staticmethod(predict), embed
    zeros_are_padding = True


PIXEL_PIPELINES = (PixelFlux3Pipeline,)


def pixel_pipeline_class(base: Flux3ModularPipeline) -> type[PixelFlux3Pipeline]:
    """The pixel pipeline that belongs to a stock pipeline."""
    return PixelFlux3Pipeline
