"""Qwen-Image with random weights, and a tokenizer for which its prompt template has 34 tokens as for Qwen's own."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig


def build(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    vision_config = Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32
    )
    config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config)
    text_encoder = Qwen2_5_VLForConditionalGeneration(config)
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    QwenImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer).save_pretrained(folder)


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE of whole words and punctuation marks of the stock pipeline's template."""
    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    text = template.replace("<|im_start|>", "").replace("<|im_end|>", "")
    bpe.train_from_iterator([text] * 8, trainer)
    core = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=core["vocab"], merges=[tuple(pair) for pair in core["merges"]], unk_token=None, bos_token=None,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def round_trip(vae, rgb):
    """What the VAE itself makes of images."""
    return vae.decode(vae.encode(rgb[:, :, None]).latent_dist.mode()).sample[:, :, 0]
