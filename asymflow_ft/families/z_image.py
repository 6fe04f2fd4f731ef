"""Z-Image: base and Turbo (Qwen3 text encoder, FLUX.1's VAE).

Latent tokens are 2x2 packed VAE latents: rank 64, one token per 16x16 pixels. The transformer takes a list of images
and patchifies them itself, with the channel last inside a patch; it takes the time 1 - sigma and predicts x0 - eps. So
`lift` permutes the end weights, and `predict` hands over images and turns time and sign. Text has its true length.
"""

import re
import warnings
from collections.abc import Callable

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.z_image.pipeline_output import ZImagePipelineOutput
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
    inner,
    refuse_references,
    run_stock,
    scheduler_shift,
    stock_parts,
)
from asymflow_ft.families.vae import KL_LATENTS, KL_PACK
from asymflow_ft.method.asymflow import lift_weights
from asymflow_ft.method.patches import to_channel_first, to_channel_last, to_image, to_tokens

PIPELINES = {"ZImagePipeline": ZImagePipeline}
CHECKPOINTS = (("Tongyi-MAI/Z-Image", "apache-2.0"), ("Tongyi-MAI/Z-Image-Turbo", "apache-2.0"))
GEOMETRY = (64, 16)  # of these: the rank, and the side of the pixel patch of a token
TRANSFORMER = ZImageTransformer2DModel
TEXT_PARTS = ("text_encoder", "tokenizer")
EXTRA_TEXT_ROWS = 0
LATENT_PATCH = KL_PACK
TEXT_MULTIPLE = 32  # the network fills text up to a multiple of it
PIXEL_PATCH = 16  # the lifted end layers carry it in their names
OUTPUT_LAYER = f"all_final_layer.{PIXEL_PATCH}-1.linear"
TRAINED_ENDS = (
    f"all_x_embedder.{PIXEL_PATCH}-1", OUTPUT_LAYER, f"all_final_layer.{PIXEL_PATCH}-1.adaLN_modulation.1",
)  # fmt: skip
ADAPTER_CLASS = "AsymZImageTransformer2DModel"
ADAPTER_CONFIG = (
    "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps", "qk_norm", "cap_feat_dim",
    "rope_theta", "t_scale", "axes_dims", "axes_lens",
)  # fmt: skip


def load_parts(
    base: str, parts: tuple[str, ...], dtype: torch.dtype, revision: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline of a base with only the named parts loaded ("vae", "text_encoder", "tokenizer",
    "transformer", "scheduler"); the others are None and are not downloaded. Warns of a Turbo checkpoint.

    Raises:
        ValueError: not a Z-Image pipeline, or files that cannot be fetched or read.
    """
    if re.search("z.image.turbo", str(base), re.IGNORECASE):
        warnings.warn(
            f"{base} is step-distilled: finetuning it with flow matching wears off its 8-step drawing, and its "
            "pictures take guidance 1 (sample.guidance=1). Tongyi-MAI/Z-Image is the undistilled base",
            stacklevel=1,  # one place, so that Python shows it once however many parts are loaded
        )
    return stock_parts(PIPELINES, base, parts, dtype, revision)


def shorten_text_encoder(pipeline: DiffusionPipeline) -> None:
    """Nothing to drop: prompts use all but the last layer, and the stock pipeline counts layers from the end."""


def embed(pipeline: DiffusionPipeline, prompts: list[str], max_length: int) -> Tensor:
    """Text embeddings (B, L, E), padded with rows of zeros."""
    prompts = list(prompts)  # a copy, because encode_prompt writes its chat template into the list
    embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=max_length)
    return pad_sequence(embeds, batch_first=True)


def latent_shift(pipeline: DiffusionPipeline) -> float:
    """The timestep shift that the base was made for."""
    return scheduler_shift(pipeline.scheduler)


pixel_patch, latent_dim, encode_latents, decode_latents = KL_LATENTS


def lift(transformer: ZImageTransformer2DModel, subspace: PixelSubspace) -> ZImageTransformer2DModel:
    """The base with its end layers folded into pixels; all other weights are shared with the base, not copied.

    Raises:
        ValueError: the basis has another rank than the base's latent tokens.
    """
    channels, latent, pixel = transformer.config.in_channels, f"{LATENT_PATCH}-1", f"{PIXEL_PATCH}-1"
    state = {name.replace(f".{latent}.", f".{pixel}."): tensor for name, tensor in transformer.state_dict().items()}
    into, out, bias = f"all_x_embedder.{pixel}.weight", f"{OUTPUT_LAYER}.weight", f"{OUTPUT_LAYER}.bias"
    weights = lift_weights(
        to_channel_first(state[into], channels), to_channel_first(state[out].mT, channels).mT,
        to_channel_first(state[bias], channels), subspace.float32()[0],
    )  # fmt: skip
    state[into], state[bias] = to_channel_last(weights[0]), to_channel_last(weights[2])
    state[out] = to_channel_last(weights[1].mT).mT.contiguous()
    return build_lifted(transformer, {"all_patch_size": (PIXEL_PATCH,), "in_channels": 3}, state)


def text_dim(transformer: ZImageTransformer2DModel) -> int:
    """Width E of the text embeddings that the transformer reads."""
    return transformer.config.cap_feat_dim


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
        ValueError: references are given, or more text or a larger grid than the base has positions for.
    """
    refuse_references(references)
    patch = PIXEL_PATCH if tokens.shape[-1] == 3 * PIXEL_PATCH**2 else LATENT_PATCH
    images = to_image(tokens, grid, patch).unsqueeze(2)  # one frame each
    texts = [embeds[:length] for embeds, length in zip(cond.embeds, cond.lengths(), strict=True)]
    frames, *sides = inner(transformer, ZImageTransformer2DModel).config.axes_lens  # of them text takes the first
    rows, limit = max(map(len, texts)), (frames - 2) // TEXT_MULTIPLE * TEXT_MULTIPLE  # the image is one behind it
    if rows > limit or any(n > most for n, most in zip(grid, sides, strict=True)):
        raise ValueError(
            f"{rows} rows of text and {grid[0]}x{grid[1]} patches, more than the base has positions for: {limit} and "
            f"{sides[0]}x{sides[1]} (axes_lens); use a smaller text.max_length or resolution"
        )
    with autocast(tokens, cond):
        out = transformer(list(images), 1 - tau, texts, patch_size=patch, return_dict=False)[0]
    return -to_tokens(torch.stack(out).squeeze(2), patch).to(tokens.dtype)


def draw_base(
    parts: DiffusionPipeline, noise: Tensor, embeds: Tensor, empty: Tensor, size: Grid, steps: int,
    guidance: float | None, output_type: str = "pil", on_step: Callable[[int], None] | None = None,
) -> tuple[list[Image.Image], Tensor]:  # fmt: skip
    """Pictures of the latent base by its own stock pipeline and scheduler, and their latent tokens (B, N, R).

    Args:
        noise: latent tokens as an image (B, R, rows, columns), N(0, 1). embeds: (B, L, E). empty: embedding of "",
            (L, E). size: (height, width) in pixels. guidance: scale, None for the pixel pipeline's default.
        output_type: "latent" decodes no pictures. on_step: called with the index of every step that is done.
    """
    scale = CFG_SCALE if guidance is None else guidance
    prompts = [rows[:length] for rows, length in zip(embeds, Cond(embeds).lengths(), strict=True)]
    images, latents = run_stock(
        parts, on_step, prompt_embeds=prompts, negative_prompt_embeds=[empty] * len(prompts),
        latents=F.pixel_shuffle(noise, LATENT_PATCH), height=size[0], width=size[1], num_inference_steps=steps,
        guidance_scale=scale - 1,  # the stock pipeline adds it to 1
        output_type=output_type,
    )  # fmt: skip
    return images, to_tokens(latents, LATENT_PATCH)


def lora_targets(transformer: ZImageTransformer2DModel) -> list[str]:
    """Exact module names: the counterparts of what the paper's recipe adapts in FLUX.2, feed-forwards, the time
    embedder and the single-stream blocks' outputs; no queries, keys or values."""
    count = transformer.config.n_refiner_layers
    blocks = [f"{refiner}.{i}" for refiner in ("noise_refiner", "context_refiner") for i in range(count)]
    blocks += [f"layers.{i}" for i in range(transformer.config.n_layers)]
    inside = ("attention.to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    return ["t_embedder.mlp.0", "t_embedder.mlp.2", *(f"{block}.{name}" for block in blocks for name in inside)]


class PixelZImagePipeline(OneEncoderPipeline, ZImagePipeline):
    """Z-Image in pixel space; prompts and LoRA files as in ZImagePipeline. `guidance_scale` 1 is no guidance here,
    where ZImagePipeline has 0."""

    output_class = ZImagePipelineOutput
    predict, embed = staticmethod(predict), embed
    zeros_are_padding = True


PIXEL_PIPELINES = (PixelZImagePipeline,)


def pixel_pipeline_class(base: DiffusionPipeline) -> type[PixelZImagePipeline]:
    """The pixel pipeline that belongs to a stock pipeline."""
    return PixelZImagePipeline
