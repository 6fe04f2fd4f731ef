"""Stable Diffusion 3 and 3.5, medium and large (two CLIPs and T5).

The transformer takes and gives images, cuts them into patches itself (a convolution in, order (row, column, channel)
out), takes 1000 sigma and predicts eps - x0. Here latent tokens are 2x2 VAE latents, channel first as everywhere: rank
64, one token per 16x16 pixels.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.schedulers import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor, nn

from asymflow_ft.components.pipelines import CFG_SCALE, PixelPipelineMixin
from asymflow_ft.components.subspace import Cond, Grid, PixelSubspace
from asymflow_ft.families.base import (
    autocast,
    build_lifted,
    inner,
    join_pooled,
    load_index,
    refuse_references,
    run_stock,
    split_pooled,
    stock_parts,
)
from asymflow_ft.families.vae import KL_LATENTS, KL_PACK
from asymflow_ft.method.asymflow import lift_weights
from asymflow_ft.method.patches import to_channel_first, to_channel_last, to_image, to_tokens

PIPELINES = {"StableDiffusion3Pipeline": StableDiffusion3Pipeline}
CHECKPOINTS = (
    ("stabilityai/stable-diffusion-3.5-medium", "Stability AI Community"),
    ("stabilityai/stable-diffusion-3.5-large", "Stability AI Community"),
    ("stabilityai/stable-diffusion-3-medium-diffusers", "Stability AI Community"),
)
GEOMETRY = (64, 16)  # of these: the rank, and the side of the pixel patch of a token
TRANSFORMER = SD3Transformer2DModel
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
EXTRA_TEXT_ROWS = 1 + 77  # the pooled embedding and the CLIPs' rows, which the published tokenizers pad to 77
OUTPUT_LAYER = "proj_out"
TRAINED_ENDS = ("pos_embed.proj", OUTPUT_LAYER, "norm_out.linear")
ADAPTER_CLASS = "AsymSD3Transformer2DModel"
ADAPTER_CONFIG = (
    "num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "caption_projection_dim",
    "pooled_projection_dim", "pos_embed_max_size", "dual_attention_layers", "qk_norm",
)  # fmt: skip

pixel_patch, latent_dim, encode_latents, decode_latents = KL_LATENTS


def load_parts(
    base: str, parts: tuple[str, ...], dtype: torch.dtype, revision: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline of a base with its scheduler and only the named parts; the others are None and are not
    downloaded.

    Raises:
        ValueError: not a Stable Diffusion 3 pipeline, a turbo, one without T5, or files that cannot be fetched or
            read.
    """
    if match := re.search(r"stable-diffusion-3\.5-(medium|large)-turbo", str(base), re.IGNORECASE):
        raise ValueError(
            f"{base} is step-distilled: it draws in 4 steps and cannot be finetuned with flow matching; "
            f"use stabilityai/stable-diffusion-3.5-{match[1].lower()}"
        )
    if "text_encoder_3" in parts and load_index(base, revision).get("text_encoder_3", [None])[0] is None:
        raise ValueError(
            f"{base} has no text_encoder_3 (T5), and its network would read rows of zeros in its place; use a base "
            "that was saved with it, such as stabilityai/stable-diffusion-3.5-medium"
        )
    return stock_parts(PIPELINES, base, parts, dtype, revision)


def shorten_text_encoder(pipeline: DiffusionPipeline) -> None:
    """Nothing: the pooled embeddings come from the last layers."""


def embed(pipeline: DiffusionPipeline, prompts: list[str], max_length: int) -> Tensor:
    """Text embeddings (B, 1 + 77 + max_length, E): the pooled one of both CLIPs, their rows, then T5's; Stable
    Diffusion 3 attends to all padding."""
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=max_length
    )
    return join_pooled(pooled, text)


def latent_shift(pipeline: DiffusionPipeline) -> float:
    """The timestep shift that the base was made for."""
    return float(pipeline.scheduler.config.shift)


def lift(transformer: SD3Transformer2DModel, subspace: PixelSubspace) -> SD3Transformer2DModel:
    """The base with its end layers folded into pixels; all other weights are shared with the base, not copied.

    Raises:
        ValueError: the basis has another rank than the base's latent tokens.
    """
    config, patch, state = transformer.config, subspace.config["patch"], transformer.state_dict()
    weight_in, weight_out, bias_out = lift_weights(
        state["pos_embed.proj.weight"].flatten(1),
        to_channel_first(state["proj_out.weight"].mT, config.out_channels).mT,
        to_channel_first(state["proj_out.bias"], config.out_channels),
        subspace.float32()[0],
    )
    assert bias_out is not None
    state["pos_embed.proj.weight"] = weight_in.unflatten(1, (3, patch, patch))
    state["proj_out.weight"] = to_channel_last(weight_out.mT).mT.contiguous()
    state["proj_out.bias"] = to_channel_last(bias_out)
    size = config.sample_size // config.patch_size * patch  # the same tokens, and so the same position embeddings
    changes = {"patch_size": patch, "in_channels": 3, "out_channels": 3, "sample_size": size}
    return build_lifted(transformer, changes, state)


def text_dim(transformer: SD3Transformer2DModel) -> int:
    """Width E of the text embeddings that the transformer reads."""
    return transformer.config.joint_attention_dim


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

    Returns:
        (B, N, D or R), eps minus data, in the precision of `tokens`.

    Raises:
        ValueError: there are condition images, or more rows or columns than the base has position embeddings for.
    """
    refuse_references(references)
    config = inner(transformer, SD3Transformer2DModel).config
    pooled, text = split_pooled(cond.embeds, config.pooled_projection_dim)
    with autocast(tokens, cond):
        out = transformer(
            hidden_states=to_image(tokens, grid, config.patch_size), encoder_hidden_states=text,
            pooled_projections=pooled, timestep=1000 * tau, return_dict=False,
        )[0]  # fmt: skip
    return to_tokens(out, config.patch_size).to(tokens.dtype)


def draw_base(
    parts: DiffusionPipeline, noise: Tensor, embeds: Tensor, empty: Tensor, size: Grid, steps: int,
    guidance: float | None, output_type: str = "pil", on_step: Callable[[int], None] | None = None,
) -> tuple[list[Image.Image], Tensor]:  # fmt: skip
    """Pictures of the latent base by its own stock pipeline and scheduler, and their latent tokens (B, N, R).

    Args:
        noise: latent tokens as an image (B, R, rows, columns), N(0, 1). embeds: (B, L, E). empty: embedding of "",
            (L, E). size: (height, width) in pixels. guidance: classifier-free guidance scale, None for the pixel
            pipeline's default.
        output_type: "latent" decodes no pictures. on_step: called with the index of every step that is done.
    """
    width = parts.transformer.config.pooled_projection_dim
    pooled, text = split_pooled(embeds, width)
    empty_pooled, empty_text = split_pooled(empty.expand(len(embeds), -1, -1), width)
    images, latents = run_stock(
        parts, on_step, prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty_text,
        negative_pooled_prompt_embeds=empty_pooled, guidance_scale=CFG_SCALE if guidance is None else guidance,
        latents=nn.functional.pixel_shuffle(noise, KL_PACK), height=size[0], width=size[1], num_inference_steps=steps,
        output_type=output_type,
    )  # fmt: skip
    return images, to_tokens(latents, KL_PACK)


def lora_targets(transformer: SD3Transformer2DModel) -> list[str]:
    """Exact module names, after the paper's recipe for FLUX.2: feed-forwards and the time embedder; no queries, keys
    or values. The last block has no feed-forward for the text."""
    names = ["time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"]
    last = transformer.config.num_layers - 1
    for i in range(last + 1):
        for ff in ("ff",) if i == last else ("ff", "ff_context"):
            names += [f"transformer_blocks.{i}.{ff}.net.0.proj", f"transformer_blocks.{i}.{ff}.net.2"]
    return names


class PixelStableDiffusion3Pipeline(PixelPipelineMixin, StableDiffusion3Pipeline):
    """Stable Diffusion 3 and 3.5 in pixel space; prompts and LoRA files as in StableDiffusion3Pipeline."""

    output_class = StableDiffusion3PipelineOutput
    predict, embed = staticmethod(predict), embed
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer"
    _optional_components: list[str] = []

    def __init__(
        self, scheduler: UniPCMultistepScheduler, text_encoder: Any, tokenizer: Any, text_encoder_2: Any,
        tokenizer_2: Any, text_encoder_3: Any, tokenizer_3: Any, transformer: SD3Transformer2DModel,
        subspace: ModelMixin, codec: ModelMixin, shift: float = 7.2, shift_mode: str = "sqrt",
        base_pixels: int = 1024**2, max_pixels: int = 2048**2, max_shift: float = 14.4, default_size: int = 1024,
        max_sequence_length: int = 256, distilled_guidance: float | None = None,
    ):  # fmt: skip
        self.set_up(
            {"scheduler": scheduler, "text_encoder": text_encoder, "tokenizer": tokenizer,
             "text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2, "text_encoder_3": text_encoder_3,
             "tokenizer_3": tokenizer_3, "transformer": transformer, "subspace": subspace, "codec": codec},
            shift=shift, shift_mode=shift_mode, base_pixels=base_pixels, max_pixels=max_pixels, max_shift=max_shift,
            default_size=default_size, max_sequence_length=max_sequence_length, distilled_guidance=distilled_guidance,
        )  # fmt: skip
        # of the CLIPs; the stock __init__, which makes a VAE's image processor, is not run
        self.tokenizer_max_length = 77 if tokenizer is None else tokenizer.model_max_length


PIXEL_PIPELINES = (PixelStableDiffusion3Pipeline,)


def pixel_pipeline_class(base: DiffusionPipeline) -> type[PixelStableDiffusion3Pipeline]:
    """The pixel pipeline that belongs to a stock pipeline."""
    return PixelStableDiffusion3Pipeline
