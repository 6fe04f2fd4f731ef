"""FLUX.1-dev: one double and one single block, embedded guidance."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tests.tiny.parts import autoencoder, clip, clip_tokenizer, round_trip, strong, t5, t5_tokenizer

__all__ = ["build", "round_trip"]


def build(folder: Path, guidance_embeds: bool = True, **scheduler: bool | float) -> None:
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}),
        vae=autoencoder(0.3611, 0.1159), text_encoder=clip(CLIPTextModel, 16, seed=1), tokenizer=clip_tokenizer(),
        text_encoder_2=t5(32, seed=2), tokenizer_2=t5_tokenizer(), transformer=strong(transformer, seed=3),
    ).save_pretrained(folder)  # fmt: skip
