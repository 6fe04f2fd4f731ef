"""ERNIE-Image (Ministral 3 text encoder, FLUX.2's VAE).

Latent tokens are 2x2 packed VAE latents, channel first, whitened by the VAE's batch-norm statistics: rank 128, one
token per 16x16 pixels. The transformer takes images of packed latents through a 1x1 convolution, a time of 1000 sigma,
text of its true length, and predicts eps - x0. The prompt enhancer of the stock pipeline is left out.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLFlux2, ErnieImagePipeline, ErnieImageTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from asymflow_ft.components.pipelines import CFG_SCALE
from asymflow_ft.components.subspace import Cond, Grid, PixelSubspace
from asymflow_ft.families.base import (
    OneEncoderPipeline,
    autocast,
    build_lifted,
    refuse_references,
    run_stock,
    scheduler_shift,
    stock_parts,
)
from asymflow_ft.families.vae import decode_whitened, encode_whitened, whitened_dim, whitened_patch
from asymflow_ft.method.asymflow import lift_weights
from asymflow_ft.method.patches import to_image, to_tokens

PIPELINES = {"ErnieImagePipeline": ErnieImagePipeline}
CHECKPOINTS = (("baidu/ERNIE-Image", "see its card"),)
GEOMETRY = (128, 16)  # of these: the rank, and the side of the pixel patch of a token
TRANSFORMER = ErnieImageTransformer2DModel
TEXT_PARTS = ("text_encoder", "tokenizer")
EXTRA_TEXT_ROWS = 0
WHITENING_EPS = 1e-5  # the stock pipeline's own, not the VAE config's
OUTPUT_LAYER = "final_linear"
TRAINED_ENDS = ("x_embedder.proj", OUTPUT_LAYER, "final_norm.linear")
ADAPTER_CLASS = "AsymErnieImageTransformer2DModel"
ADAPTER_CONFIG = (
    "hidden_size", "num_attention_heads", "num_layers", "ffn_hidden_size", "text_in_dim", "rope_theta",
    "rope_axes_dim", "eps", "qk_layernorm",
)  # fmt: skip


def load_parts(
    base: str, parts: tuple[str, ...], dtype: torch.dtype, revision: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline of a base with only the named parts loaded ("vae", "text_encoder", "tokenizer",
    "transformer", "scheduler"); the others are None and are not downloaded.

    Raises:
        ValueError: not an ERNIE-Image pipeline, a step-distilled one, or files that cannot be fetched or read.
    """
    if "turbo" in str(base).lower():
        raise ValueError(
            f"{base} is step-distilled and cannot be finetuned with flow matching; use {CHECKPOINTS[0][0]}"
        )
    return stock_parts(PIPELINES, base, parts, dtype, revision)


def shorten_text_encoder(pipeline: DiffusionPipeline) -> None:
    """Nothing to drop: prompts use all but the last layer, and the stock pipeline counts layers from the end."""


def embed(pipeline: DiffusionPipeline, prompts: list[str], max_length: int) -> Tensor:
    """Text embeddings (B, L, E), padded with rows of zeros."""
    device = pipeline._execution_device
    # cut afterwards: the encoder is causal, so a token's state does not depend on those behind it
    embeds = [rows[:max_length] for rows in pipeline.encode_prompt(prompts, device)]
    return pad_sequence(embeds, batch_first=True)


def latent_shift(pipeline: DiffusionPipeline) -> float:
    """The timestep shift that the base was made for."""
    return scheduler_shift(pipeline.scheduler)


pixel_patch, latent_dim = whitened_patch, whitened_dim


def encode_latents(vae: AutoencoderKLFlux2, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """See encode_whitened."""
    return encode_whitened(vae, rgb, generator, WHITENING_EPS)


def decode_latents(vae: AutoencoderKLFlux2, z: Tensor, grid: Grid) -> Tensor:
    """See decode_whitened."""
    return decode_whitened(vae, z, grid, WHITENING_EPS)


def lift(transformer: ErnieImageTransformer2DModel, subspace: PixelSubspace) -> ErnieImageTransformer2DModel:
    """The base with its end layers folded into pixels; all other weights are shared with the base, not copied.

    Raises:
        ValueError: the basis has another rank than the base's latent tokens.
    """
    state, width = transformer.state_dict(), subspace.config["pixel_dim"]
    into, out, bias = lift_weights(
        state["x_embedder.proj.weight"].flatten(1), state["final_linear.weight"], state["final_linear.bias"],
        subspace.float32()[0],
    )  # fmt: skip
    state |= {"x_embedder.proj.weight": into[..., None, None], "final_linear.weight": out, "final_linear.bias": bias}
    return build_lifted(transformer, {"in_channels": width, "out_channels": width}, state)


def text_dim(transformer: ErnieImageTransformer2DModel) -> int:
    """Width E of the text embeddings that the transformer reads."""
    return transformer.config.text_in_dim


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
        ValueError: references are given.
    """
    refuse_references(references)
    lengths = torch.tensor(cond.lengths(), device=tokens.device)
    with autocast(tokens, cond):
        out = transformer(
            to_image(tokens, grid, 1), 1000 * tau, text_bth=cond.embeds, text_lens=lengths, return_dict=False
        )[0]
    return to_tokens(out, 1).to(tokens.dtype)


def draw_base(
    parts: DiffusionPipeline, noise: Tensor, embeds: Tensor, empty: Tensor, size: Grid, steps: int,
    guidance: float | None, output_type: str = "pil", on_step: Callable[[int], None] | None = None,
) -> tuple[list[Image.Image], Tensor]:  # fmt: skip
    """Pictures of the latent base by its own stock pipeline and scheduler, and their latent tokens (B, N, R).

    Args:
        noise: latent tokens as an image (B, R, rows, columns), N(0, 1). embeds: (B, L, E). empty: embedding of "",
            (L, E). size: (height, width) in pixels. guidance: classifier-free guidance scale, None for the pixel
            pipeline's default. output_type: "latent" decodes no pictures. on_step: called with the index of every
            step that is done.
    """
    prompts = [rows[:length] for rows, length in zip(embeds, Cond(embeds).lengths(), strict=True)]
    images, latents = run_stock(
        parts, on_step, prompt_embeds=prompts, negative_prompt_embeds=[empty] * len(prompts), latents=noise,
        height=size[0], width=size[1], num_inference_steps=steps,
        guidance_scale=CFG_SCALE if guidance is None else guidance, output_type=output_type,
    )  # fmt: skip
    return images, to_tokens(latents, 1)


def lora_targets(transformer: ErnieImageTransformer2DModel) -> list[str]:
    """Exact module names: the counterparts of what the paper's recipe adapts in FLUX.2, feed-forwards, the time
    embedder and the single-stream blocks' outputs; no queries, keys or values."""
    inside = ("self_attention.to_out.0", "mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2")
    blocks = [f"layers.{i}.{name}" for i in range(transformer.config.num_layers) for name in inside]
    return ["time_embedding.linear_1", "time_embedding.linear_2", *blocks]


class PixelErnieImagePipeline(OneEncoderPipeline, ErnieImagePipeline):
    """ERNIE-Image in pixel space; prompts and LoRA files as in ErnieImagePipeline, without its prompt enhancer."""

    output_class = ImagePipelineOutput  # the stock one asks for enhanced prompts
    predict, embed = staticmethod(predict), embed
    zeros_are_padding = True


PIXEL_PIPELINES = (PixelErnieImagePipeline,)


def pixel_pipeline_class(base: DiffusionPipeline) -> type[PixelErnieImagePipeline]:
    """The pixel pipeline that belongs to a stock pipeline."""
    return PixelErnieImagePipeline
