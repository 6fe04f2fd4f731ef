"""FLUX.2: klein base 4B and 9B (Qwen3 text encoder) and dev (Mistral, embedded guidance).

Latent tokens are 2x2 packed VAE latents, channel first, whitened by the VAE's batch-norm statistics: rank 128, one
token per 16x16 pixels. The transformer takes sigma in [0, 1] and predicts eps - x0.
"""

import re
from collections.abc import Callable

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_output import Flux2PipelineOutput
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import is_torchvision_available

from asymflow_ft.components.pipelines import CFG_SCALE
from asymflow_ft.components.subspace import Cond, Grid, PixelSubspace
from asymflow_ft.families.base import (
    OneEncoderPipeline,
    autocast,
    build_lifted,
    load_index,
    run_stock,
    stock_parts,
)
from asymflow_ft.families.vae import WHITENED_LATENTS
from asymflow_ft.method.asymflow import lift_weights

PIPELINES = {"Flux2KleinPipeline": Flux2KleinPipeline, "Flux2Pipeline": Flux2Pipeline}
CHECKPOINTS = (
    ("black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0"),
    ("black-forest-labs/FLUX.2-klein-base-9B", "flux-non-commercial-license"),
    ("black-forest-labs/FLUX.2-dev", "flux-non-commercial-license"),
)
GEOMETRY = (128, 16)  # of these: the rank, and the side of the pixel patch of a token
TRANSFORMER = Flux2Transformer2DModel
TEXT_PARTS = ("text_encoder", "tokenizer")
EXTRA_TEXT_ROWS = 0
LATENT_SHIFT = 7.0  # FLUX.2's native shift at 1024x1024 (paper, latent baseline); its scheduler computes one per size
DISTILLED_GUIDANCE = 3.5  # what diffusers' training script gives FLUX.2-dev
OUTPUT_LAYER = "proj_out"
TRAINED_ENDS = ("x_embedder", OUTPUT_LAYER, "norm_out.linear")
# The released adapter format's class name, and the part of its config.json that repeats the transformer's own.
ADAPTER_CLASS = "AsymFlux2Transformer2DModel"
ADAPTER_CONFIG = (
    "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
    "timestep_guidance_channels", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps", "guidance_embeds",
)  # fmt: skip


def load_parts(
    base: str, parts: tuple[str, ...], dtype: torch.dtype, revision: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline of a base with only the named parts loaded ("vae", "text_encoder", "tokenizer",
    "transformer", "scheduler"); the others are None and are not downloaded.

    Raises:
        ValueError: not a FLUX.2 pipeline, a step-distilled one, files that cannot be fetched or read, or dev's
            tokenizer without torchvision.
    """
    if match := re.search(r"FLUX\.2-klein-(4B|9B)(?!.*base)", str(base)):
        raise ValueError(
            f"{base} is step-distilled: it draws in 4 steps and cannot be finetuned with flow matching; "
            f"use black-forest-labs/FLUX.2-klein-base-{match[1]}"
        )
    index = load_index(base, revision)
    if index.get("is_distilled"):
        raise ValueError(
            f"{base} is step-distilled (is_distilled is true in its model_index.json) and cannot be finetuned with "
            "flow matching; use the undistilled base, such as black-forest-labs/FLUX.2-klein-base-4B"
        )
    if "tokenizer" in parts and index["tokenizer"][1] == "PixtralProcessor" and not is_torchvision_available():
        raise ValueError(
            f"the tokenizer of {base} is a PixtralProcessor, which needs torchvision; "
            "`pip install torchvision`, in the version that fits your torch"
        )
    return stock_parts(PIPELINES, base, parts, dtype, revision)


def shorten_text_encoder(pipeline: DiffusionPipeline) -> None:
    """Drop what prompts do not use: layers behind the last hidden state that is read, final norm and vocabulary head.
    The embeddings stay the same bit for bit."""
    encoder = pipeline.text_encoder
    klein = isinstance(pipeline, Flux2KleinPipeline)
    decoder, depth = (encoder.model, 27) if klein else (encoder.model.language_model, 30)
    decoder.layers = decoder.layers[:depth]
    decoder.norm = encoder.lm_head = nn.Identity()  # the norm would act on the last hidden state, now one that is read


def embed(pipeline: DiffusionPipeline, prompts: list[str], max_length: int) -> Tensor:
    """Text embeddings (B, L, E); FLUX.2 attends to the padding of a prompt, so all are `max_length` rows long."""
    return pipeline.encode_prompt(prompts, max_sequence_length=max_length)[0]


def latent_shift(pipeline: DiffusionPipeline) -> float:
    """The timestep shift that the base was made for."""
    config = pipeline.scheduler.config
    return LATENT_SHIFT if config.use_dynamic_shifting else float(config.shift)


pixel_patch, latent_dim, encode_latents, decode_latents = WHITENED_LATENTS


def lift(transformer: Flux2Transformer2DModel, subspace: PixelSubspace) -> Flux2Transformer2DModel:
    """The base with its end layers folded into pixels; all other weights are shared with the base, not copied.

    Raises:
        ValueError: the basis has another rank than the base's latent tokens.
    """
    state = transformer.state_dict()
    state["x_embedder.weight"], state["proj_out.weight"], _ = lift_weights(
        state["x_embedder.weight"], state["proj_out.weight"], None, subspace.float32()[0]
    )
    return build_lifted(transformer, {"in_channels": subspace.config["pixel_dim"], "out_channels": None}, state)


def text_dim(transformer: Flux2Transformer2DModel) -> int:
    """Width E of the text embeddings that the transformer reads."""
    return transformer.config.joint_attention_dim


def _ids(grid: Grid, time: int, device: torch.device) -> Tensor:
    """Position ids (time, row, column, 0) of a token grid, (h * w, 4). Made where they are used: a GPU would wait for
    the copy, in every call."""
    axes = ((time, time + 1), (0, grid[0]), (0, grid[1]), (0, 1))
    return torch.cartesian_prod(*(torch.arange(*ends, device=device) for ends in axes))


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
        references: condition tokens (B, M, D) with their grids; they take the time positions 10, 20, ...

    Returns:
        (B, N, D or R), eps minus data, in the precision of `tokens`.
    """
    device = tokens.device
    image_ids = [_ids(grid, 0, device)]
    image_ids += [_ids(shape, 10 + 10 * m, device) for m, (_, shape) in enumerate(references)]
    text = cond.embeds.shape[1]
    text_ids = F.pad(torch.arange(text, device=device)[:, None], (3, 0))
    guidance = None if cond.guidance is None else tau.new_full(tau.shape, cond.guidance)
    with autocast(tokens, cond):
        out = transformer(
            hidden_states=torch.cat([tokens, *(reference for reference, _ in references)], dim=1),
            encoder_hidden_states=cond.embeds, timestep=tau, guidance=guidance,
            img_ids=torch.cat(image_ids), txt_ids=text_ids, return_dict=False,
        )[0]  # fmt: skip
    return out[:, : tokens.shape[1]].to(tokens.dtype)


def draw_base(
    parts: DiffusionPipeline, noise: Tensor, embeds: Tensor, empty: Tensor, size: Grid, steps: int,
    guidance: float | None, output_type: str = "pil", on_step: Callable[[int], None] | None = None,
) -> tuple[list[Image.Image], Tensor]:  # fmt: skip
    """Pictures of the latent base by its own stock pipeline and scheduler, and their latent tokens (B, N, R).

    Args:
        noise: latent tokens as an image (B, R, rows, columns), N(0, 1). embeds: (B, L, E). empty: embedding of "",
            (L, E). size: (height, width) in pixels. guidance: classifier-free guidance scale, None for the pixel
            pipeline's default; dev's stock pipeline has none, and its guidance_scale is the embedded value.
        output_type: "latent" decodes no pictures. on_step: called with the index of every step that is done.
    """
    if isinstance(parts, Flux2KleinPipeline):
        scale = CFG_SCALE if guidance is None else guidance
        unconditional = {"negative_prompt_embeds": empty.expand(len(embeds), -1, -1)}
    else:
        scale, unconditional = DISTILLED_GUIDANCE, {}
    return run_stock(
        parts, on_step, prompt_embeds=embeds, latents=noise, height=size[0], width=size[1], num_inference_steps=steps,
        guidance_scale=scale, output_type=output_type, **unconditional,
    )  # fmt: skip


def lora_targets(transformer: Flux2Transformer2DModel) -> list[str]:
    """Exact module names that the paper's recipe adapts: feed-forwards, the time embedder and the single blocks'
    output; no queries, keys or values."""
    names = ["time_guidance_embed.timestep_embedder.linear_1", "time_guidance_embed.timestep_embedder.linear_2"]
    for i in range(transformer.config.num_layers):
        names += [f"transformer_blocks.{i}.{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")]
    return names + [f"single_transformer_blocks.{i}.attn.to_out" for i in range(transformer.config.num_single_layers)]


class _PixelFlux2(OneEncoderPipeline):
    output_class = Flux2PipelineOutput
    default_guidance = DISTILLED_GUIDANCE
    predict, embed = staticmethod(predict), embed


class PixelFlux2KleinPipeline(_PixelFlux2, Flux2KleinPipeline):
    """FLUX.2 klein in pixel space; prompts and LoRA files as in Flux2KleinPipeline."""


class PixelFlux2Pipeline(_PixelFlux2, Flux2Pipeline):
    """FLUX.2-dev in pixel space; prompts and LoRA files as in Flux2Pipeline.

    The network always sees the guidance value `distilled_guidance` that it was trained with; `guidance_scale` above 1
    adds classifier-free guidance.
    """

    system_message = SYSTEM_MESSAGE  # set in the stock __init__, which makes a VAE's image processor and is not run


PIXEL_PIPELINES = (PixelFlux2KleinPipeline, PixelFlux2Pipeline)


def pixel_pipeline_class(base: DiffusionPipeline) -> type[_PixelFlux2]:
    """The pixel pipeline that belongs to a stock pipeline."""
    return PixelFlux2KleinPipeline if isinstance(base, Flux2KleinPipeline) else PixelFlux2Pipeline
