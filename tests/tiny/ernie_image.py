"""ERNIE-Image with random weights; its VAE and tokenizer are the shipped tiny base's."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import AutoTokenizer, Mistral3Config, Mistral3Model

from tests.conftest import REPOSITORY

SHIPPED = REPOSITORY / "recipes/tiny/base"


def build(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "tokenizer")
    text = {
        "model_type": "ministral3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "initializer_range": 0.3,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 32, "patch_size": 16, "head_dim": 16,
    }  # fmt: skip
    text_encoder = Mistral3Model(Mistral3Config(text_config=text, vision_config=vision))
    transformer = ErnieImageTransformer2DModel(
        hidden_size=64, num_attention_heads=2, num_layers=2, ffn_hidden_size=128, text_in_dim=32,
        rope_axes_dim=(8, 12, 12),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (transformer.final_linear, transformer.adaLN_modulation[-1]):  # zeros, which would hide mistakes
            layer.weight.normal_(std=0.1)
            layer.bias.normal_(std=0.1)
    ErnieImagePipeline(
        transformer, AutoencoderKLFlux2.from_pretrained(SHIPPED / "vae"), text_encoder, tokenizer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)  # fmt: skip


def round_trip(vae, rgb):
    """What the VAE itself makes of images."""
    return vae.decode(vae.encode(rgb).latent_dist.mode()).sample
