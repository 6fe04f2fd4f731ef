"""FLUX.1: dev and models of its kind (CLIP's pooled embedding and T5, embedded guidance).

Latent tokens are 2x2 packed VAE latents, channel first: rank 64, one token per 16x16 pixels. The transformer takes
sigma in [0, 1] and predicts eps - x0. Run in bf16, the network rounds sigma to bf16 (steps of 0.004
near 1) itself, in its stock pipeline too.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, ModelMixin
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor, nn

from asymflow_ft.components.pipelines import CFG_SCALE, PixelPipelineMixin
from asymflow_ft.components.subspace import Cond, Grid, PixelSubspace
from asymflow_ft.families.base import (
    autocast,
    build_lifted,
    exact_time,
    inner,
    join_pooled,
    load_json,
    refuse_references,
    run_stock,
    split_pooled,
    stock_parts,
)
from asymflow_ft.families.vae import KL_LATENTS
from asymflow_ft.method.asymflow import lift_weights
from asymflow_ft.method.patches import to_tokens

PIPELINES = {"FluxPipeline": FluxPipeline}
CHECKPOINTS = (
    ("black-forest-labs/FLUX.1-dev", "FLUX.1 dev non-commercial"),
    ("black-forest-labs/FLUX.1-Krea-dev", "FLUX.1 dev non-commercial"),
)
GEOMETRY = (64, 16)  # of these: the rank, and the side of the pixel patch of a token
TRANSFORMER = FluxTransformer2DModel
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
EXTRA_TEXT_ROWS = 1  # CLIP's pooled embedding
DISTILLED_GUIDANCE = 3.5  # the stock pipeline's default
OUTPUT_LAYER = "proj_out"
TRAINED_ENDS = ("x_embedder", OUTPUT_LAYER, "norm_out.linear")
ADAPTER_CLASS = "AsymFluxTransformer2DModel"
ADAPTER_CONFIG = (
    "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "pooled_projection_dim", "guidance_embeds", "axes_dims_rope",
)  # fmt: skip

pixel_patch, latent_dim, encode_latents, decode_latents = KL_LATENTS


def load_parts(
    base: str, parts: tuple[str, ...], dtype: torch.dtype, revision: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline of a base with its scheduler and only the named parts; the others are None and are not
    downloaded.

    Raises:
        ValueError: not a FLUX.1 pipeline, schnell, or files that cannot be fetched or read.
    """
    named = "flux.1-schnell" in str(base).lower()
    if not named:
        network = load_json(base, "transformer/config.json", revision)
        scheduler = load_json(base, "scheduler/scheduler_config.json", revision)
    if named or not (network.get("guidance_embeds") or scheduler.get("use_dynamic_shifting")):
        raise ValueError(
            f"{base} is {'' if named else 'configured as '}FLUX.1-schnell, which is timestep-distilled: it draws in 4 "
            "steps and cannot be finetuned with flow matching; use black-forest-labs/FLUX.1-dev"
            + ("" if named else ". Of an undistilled model, set use_dynamic_shifting in scheduler_config.json")
        )
    return stock_parts(PIPELINES, base, parts, dtype, revision)


def shorten_text_encoder(pipeline: DiffusionPipeline) -> None:
    """Nothing: prompts use both text encoders whole."""


def embed(pipeline: DiffusionPipeline, prompts: list[str], max_length: int) -> Tensor:
    """Text embeddings (B, 1 + max_length, E): CLIP's pooled one, then T5's; FLUX.1 attends to T5's padding."""
    text, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=max_length)
    return join_pooled(pooled, text)


def latent_shift(pipeline: DiffusionPipeline) -> float:
    """The timestep shift of the base at 1024x1024, where its scheduler's dynamic shift ends."""
    config = pipeline.scheduler.config
    return math.exp(config.max_shift) if config.use_dynamic_shifting else float(config.shift)


def lift(transformer: FluxTransformer2DModel, subspace: PixelSubspace) -> FluxTransformer2DModel:
    """The base with its end layers folded into pixels; all other weights are shared with the base, not copied.

    Raises:
        ValueError: the basis has another rank than the base's latent tokens.
    """
    state = transformer.state_dict()
    state["x_embedder.weight"], state["proj_out.weight"], state["proj_out.bias"] = lift_weights(
        state["x_embedder.weight"], state["proj_out.weight"], state["proj_out.bias"], subspace.float32()[0]
    )
    return build_lifted(transformer, {"in_channels": subspace.config["pixel_dim"], "out_channels": None}, state)


def text_dim(transformer: FluxTransformer2DModel) -> int:
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
        tokens: (B, N, D or R) float32. tau: (B,) noise level the network sees, in [0, 1]. cond: a network with
            embedded guidance that is given none sees DISTILLED_GUIDANCE. grid: (rows, columns).

    Returns:
        (B, N, D or R), eps minus data, in the precision of `tokens`.

    Raises:
        ValueError: there are condition images.
    """
    refuse_references(references)
    network = inner(transformer, FluxTransformer2DModel)
    config = network.config
    pooled, text = split_pooled(cond.embeds, config.pooled_projection_dim)
    value = DISTILLED_GUIDANCE if cond.guidance is None else cond.guidance
    # made where they are used: a GPU would wait for the copy, in every call
    positions = torch.cartesian_prod(*(torch.arange(end, device=tokens.device) for end in (1, *grid)))
    with autocast(tokens, cond), exact_time(network.time_text_embed, 1000 * tau):
        out = transformer(
            hidden_states=tokens, encoder_hidden_states=text, pooled_projections=pooled, timestep=tau,
            guidance=tau.new_full(tau.shape, value) if config.guidance_embeds else None,
            img_ids=positions, txt_ids=tokens.new_zeros(text.shape[1], 3), return_dict=False,
        )[0]  # fmt: skip
    return out.to(tokens.dtype)


def draw_base(
    parts: DiffusionPipeline, noise: Tensor, embeds: Tensor, empty: Tensor, size: Grid, steps: int,
    guidance: float | None, output_type: str = "pil", on_step: Callable[[int], None] | None = None,
) -> tuple[list[Image.Image], Tensor]:  # fmt: skip
    """Pictures of the latent base by its own stock pipeline and scheduler, and their latent tokens (B, N, R).

    Args:
        noise: latent tokens as an image (B, R, rows, columns), N(0, 1). embeds: (B, L, E). empty: embedding of "",
            (L, E). size: (height, width) in pixels. guidance: classifier-free guidance scale beside the embedded
            value, which is always DISTILLED_GUIDANCE; None for the pixel pipeline's default.
        output_type: "latent" decodes no pictures. on_step: called with the index of every step that is done.
    """
    config = parts.transformer.config
    if guidance is None:
        guidance = 1.0 if config.guidance_embeds else CFG_SCALE
    pooled, text = split_pooled(embeds, config.pooled_projection_dim)
    empty_pooled, empty_text = split_pooled(empty.expand(len(embeds), -1, -1), config.pooled_projection_dim)
    return run_stock(
        parts, on_step, prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty_text,
        negative_pooled_prompt_embeds=empty_pooled, true_cfg_scale=guidance, guidance_scale=DISTILLED_GUIDANCE,
        latents=to_tokens(noise, 1), height=size[0], width=size[1], num_inference_steps=steps, output_type=output_type,
    )  # fmt: skip


def lora_targets(transformer: FluxTransformer2DModel) -> list[str]:
    """Exact module names, after the paper's recipe for FLUX.2: feed-forwards, the time embedder and the single blocks'
    output; no queries, keys or values."""
    names = ["time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"]
    for i in range(transformer.config.num_layers):
        names += [f"transformer_blocks.{i}.{ff}.net.{end}" for ff in ("ff", "ff_context") for end in ("0.proj", "2")]
    singles = range(transformer.config.num_single_layers)
    return names + [f"single_transformer_blocks.{i}.{end}" for i in singles for end in ("proj_mlp", "proj_out")]


class PixelFluxPipeline(PixelPipelineMixin, FluxPipeline):
    """FLUX.1 in pixel space; prompts and LoRA files as in FluxPipeline.

    A network with embedded guidance always sees the value `distilled_guidance` that it was trained with;
    `guidance_scale` above 1 adds classifier-free guidance.
    """

    output_class = FluxPipelineOutput
    predict, embed = staticmethod(predict), embed
    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer"
    _optional_components: list[str] = []

    def __init__(
        self, scheduler: UniPCMultistepScheduler, text_encoder: Any, tokenizer: Any, text_encoder_2: Any,
        tokenizer_2: Any, transformer: FluxTransformer2DModel, subspace: ModelMixin, codec: ModelMixin,
        shift: float = 7.6, shift_mode: str = "sqrt", base_pixels: int = 1024**2, max_pixels: int = 2048**2,
        max_shift: float = 15.2, default_size: int = 1024, max_sequence_length: int = 512,
        distilled_guidance: float | None = None,
    ):  # fmt: skip
        guided = transformer is not None and transformer.config.guidance_embeds
        self.set_up(
            {"scheduler": scheduler, "text_encoder": text_encoder, "tokenizer": tokenizer,
             "text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2, "transformer": transformer,
             "subspace": subspace, "codec": codec},
            shift=shift, shift_mode=shift_mode, base_pixels=base_pixels, max_pixels=max_pixels, max_shift=max_shift,
            default_size=default_size, max_sequence_length=max_sequence_length,
            distilled_guidance=DISTILLED_GUIDANCE if distilled_guidance is None and guided else distilled_guidance,
        )  # fmt: skip
        # of CLIP; the stock __init__, which makes a VAE's image processor, is not run
        self.tokenizer_max_length = 77 if tokenizer is None else tokenizer.model_max_length


PIXEL_PIPELINES = (PixelFluxPipeline,)


def pixel_pipeline_class(base: DiffusionPipeline) -> type[PixelFluxPipeline]:
    """The pixel pipeline that belongs to a stock pipeline."""
    return PixelFluxPipeline
