"""Qwen-Image (Qwen2.5-VL text encoder; not the Edit and Layered pipelines).

Latent tokens are 2x2 packed latents of a video VAE, one frame, channel first, normalised by the VAE's mean and std per
channel: rank 64, one token per 16x16 pixels. The transformer takes sigma in [0, 1] and predicts eps - x0. It rounds
sigma to the precision of its hidden states. Text has its true length, and a mask where lengths differ.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from asymflow_ft.components.pipelines import CFG_SCALE
from asymflow_ft.components.subspace import Cond, Grid, PixelSubspace
from asymflow_ft.families.base import (
    OneEncoderPipeline,
    autocast,
    build_lifted,
    exact_time,
    inner,
    refuse_references,
    run_stock,
    scheduler_shift,
    stock_parts,
)
from asymflow_ft.method.asymflow import lift_weights
from asymflow_ft.method.patches import to_image, to_tokens

PIPELINES = {"QwenImagePipeline": QwenImagePipeline}
CHECKPOINTS = (("Qwen/Qwen-Image", "apache-2.0"), ("Qwen/Qwen-Image-2512", "apache-2.0"))
GEOMETRY = (64, 16)  # of these: the rank, and the side of the pixel patch of a token
TRANSFORMER = QwenImageTransformer2DModel
TEXT_PARTS = ("text_encoder", "tokenizer")
EXTRA_TEXT_ROWS = 0
LATENT_PATCH = 2
OUTPUT_LAYER = "proj_out"
TRAINED_ENDS = ("img_in", OUTPUT_LAYER, "norm_out.linear")
ADAPTER_CLASS = "AsymQwenImageTransformer2DModel"
ADAPTER_CONFIG = (
    "num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope",
)  # fmt: skip


def load_parts(
    base: str, parts: tuple[str, ...], dtype: torch.dtype, revision: str | None = None
) -> DiffusionPipeline:
    """The stock pipeline of a base with only the named parts loaded ("vae", "text_encoder", "tokenizer",
    "transformer", "scheduler"); the others are None and are not downloaded.

    Raises:
        ValueError: not a Qwen-Image pipeline, or files that cannot be fetched or read.
    """
    return stock_parts(PIPELINES, base, parts, dtype, revision)


def shorten_text_encoder(pipeline: DiffusionPipeline) -> None:
    """Drop what prompts do not use: the vision tower and the vocabulary head, with its logits of every token. The
    embeddings stay the same bit for bit."""
    pipeline.text_encoder.model.visual = pipeline.text_encoder.lm_head = nn.Identity()


def embed(pipeline: DiffusionPipeline, prompts: list[str], max_length: int) -> Tensor:
    """Text embeddings (B, L, E), padded with rows of zeros."""
    return pipeline.encode_prompt(prompts, max_sequence_length=max_length)[0]


def latent_shift(pipeline: DiffusionPipeline) -> float:
    """The timestep shift that the base was made for, at 1024x1024."""
    return scheduler_shift(pipeline.scheduler)


def pixel_patch(vae: AutoencoderKLQwenImage) -> int:
    """Side in pixels of the image patch that one latent token stands for."""
    return 2 ** len(vae.config.temperal_downsample) * LATENT_PATCH


def latent_dim(vae: AutoencoderKLQwenImage) -> int:
    """Values of one latent token, the rank R of the subspace."""
    return vae.config.z_dim * LATENT_PATCH**2


def _normalisation(vae: AutoencoderKLQwenImage, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values).to(like) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean[:, None, None], std[:, None, None]


def encode_latents(vae: AutoencoderKLQwenImage, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """RGB in [-1, 1], (B, 3, H, W) -> normalised float32 latent tokens (B, N, 64): the posterior's mode, or with a
    generator a sample of it."""
    posterior = vae.encode(rgb.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist
    z = (posterior.mode() if generator is None else posterior.sample(generator)).squeeze(2).float()
    mean, std = _normalisation(vae, z)
    return to_tokens((z - mean) / std, LATENT_PATCH)


def decode_latents(vae: AutoencoderKLQwenImage, z: Tensor, grid: Grid) -> Tensor:
    """Latent tokens (B, N, 64) -> RGB in [-1, 1], float32; `grid` is (rows, columns) of tokens."""
    latents = to_image(z.to(vae.device), grid, LATENT_PATCH)
    mean, std = _normalisation(vae, latents)
    latents = (latents * std + mean).to(vae.dtype).unsqueeze(2)
    return vae.decode(latents).sample.squeeze(2).float().clamp(-1, 1)


def lift(transformer: QwenImageTransformer2DModel, subspace: PixelSubspace) -> QwenImageTransformer2DModel:
    """The base with its end layers folded into pixels; all other weights are shared with the base, not copied.

    Raises:
        ValueError: the basis has another rank than the base's latent tokens.
    """
    state = transformer.state_dict()
    ends = ("img_in.weight", "proj_out.weight", "proj_out.bias")
    state.update(zip(ends, lift_weights(*(state[name] for name in ends), subspace.float32()[0]), strict=True))
    size = subspace.config["pixel_dim"]
    return build_lifted(transformer, {"in_channels": size, "out_channels": size, "patch_size": 1}, state)


def text_dim(transformer: QwenImageTransformer2DModel) -> int:
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
        ValueError: references are given.
    """
    refuse_references(references)
    lengths = cond.lengths()
    embeds = cond.embeds[:, : max(lengths)]
    mask = None if min(lengths) == max(lengths) else embeds.any(dim=-1)  # None as in the stock pipeline
    network = inner(transformer, QwenImageTransformer2DModel)
    with autocast(tokens, cond), exact_time(network.time_text_embed, tau):
        out = transformer(
            hidden_states=tokens, timestep=tau, encoder_hidden_states=embeds, encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *grid)]] * len(tokens), return_dict=False,
        )[0]  # fmt: skip
    return out.to(tokens.dtype)


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
    unconditional = {}
    if scale > 1:  # the stock pipeline warns of what it would not use
        negative = empty.expand(len(embeds), -1, -1)
        unconditional = {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative.any(dim=-1)}
    return run_stock(
        parts, on_step, prompt_embeds=embeds, prompt_embeds_mask=embeds.any(dim=-1), latents=to_tokens(noise, 1),
        height=size[0], width=size[1], num_inference_steps=steps, true_cfg_scale=scale, output_type=output_type,
        max_sequence_length=embeds.shape[1], **unconditional,
    )  # fmt: skip


def lora_targets(transformer: QwenImageTransformer2DModel) -> list[str]:
    """Exact module names: the counterparts of what the paper's recipe adapts in FLUX.2, feed-forwards and the time
    embedder; no queries, keys or values. Nothing reads the last block's text, so its feed-forward would not learn."""
    names = [f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)]
    last = transformer.config.num_layers - 1
    for i in range(last + 1):
        streams = ("img_mlp",) if i == last else ("img_mlp", "txt_mlp")
        names += [f"transformer_blocks.{i}.{stream}.net.{end}" for stream in streams for end in ("0.proj", "2")]
    return names


class PixelQwenImagePipeline(OneEncoderPipeline, QwenImagePipeline):
    """Qwen-Image in pixel space; prompts and LoRA files as in QwenImagePipeline, whose `true_cfg_scale` is
    `guidance_scale` here."""

    output_class = QwenImagePipelineOutput
    predict, embed = staticmethod(predict), embed
    zeros_are_padding = True

    def set_up(self, modules: dict[str, Any], **settings: Any) -> None:
        super().set_up(modules, **settings)
        stock = QwenImagePipeline(None, None, None, None, None)  # for its prompt template, which encode_prompt reads
        self.tokenizer_max_length = stock.tokenizer_max_length
        self.prompt_template_encode = stock.prompt_template_encode
        self.prompt_template_encode_start_idx = stock.prompt_template_encode_start_idx


PIXEL_PIPELINES = (PixelQwenImagePipeline,)


def pixel_pipeline_class(base: DiffusionPipeline) -> type[PixelQwenImagePipeline]:
    """The pixel pipeline that belongs to a stock pipeline."""
    return PixelQwenImagePipeline
