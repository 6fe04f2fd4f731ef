"""Tiny parts with random weights that several families share: CLIP, T5, the 16-channel KL autoencoder."""

import torch
from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_LENGTH = 77  # text tokens, as published; captions longer than that are cut


def strong(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """The module with new weights that keep activations at their size, so that every part of it matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            std = gain / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.1
            noise = torch.randn(weight.shape, generator=generator) * std
            weight.copy_(noise if weight.ndim > 1 else weight + noise)
    return module.eval()


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=CLIP_LENGTH)


def clip(kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection], width: int, seed: int) -> nn.Module:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return strong(kind(config), seed)


def t5_tokenizer() -> T5Tokenizer:
    words = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    return T5Tokenizer([(word, -float(i > 2)) for i, word in enumerate(words)], extra_ids=0, model_max_length=512)


def t5(width: int, seed: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return strong(T5EncoderModel(config), seed)


def autoencoder(scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=scaling_factor, shift_factor=shift_factor,
    )  # fmt: skip
    return strong(vae, seed=0, gain=0.5)


def round_trip(vae: AutoencoderKL, rgb: torch.Tensor) -> torch.Tensor:
    """What the VAE itself makes of images."""
    return vae.decode(vae.encode(rgb).latent_dist.mode()).sample
