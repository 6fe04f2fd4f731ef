"""Stable Diffusion 3.5 medium: two blocks, the first with dual attention, more position embeddings than are used."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from tests.tiny.parts import autoencoder, clip, clip_tokenizer, round_trip, strong, t5, t5_tokenizer

__all__ = ["build", "round_trip"]


def build(folder: Path) -> None:
    transformer = SD3Transformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=40,
        caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=24, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    first, second = (clip(CLIPTextModelWithProjection, 16, seed) for seed in (1, 2))
    StableDiffusion3Pipeline(
        transformer=strong(transformer, seed=3), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, 0.0609), text_encoder=first, tokenizer=clip_tokenizer(), text_encoder_2=second,
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5(40, seed=4), tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip
