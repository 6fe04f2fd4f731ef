"""FLUX.3 klein with random weights, saved by its modular pipeline."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux3AutoBlocks,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
)
from transformers import (
    AutoTokenizer,
    Qwen2AudioProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    WhisperFeatureExtractor,
)

from tests.conftest import REPOSITORY


@torch.no_grad()
def build(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / "recipes/tiny/base/tokenizer")
    # stands for Qwen3VLProcessor, whose import needs torchvision; prompts go through its tokenizer and template alone
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(), tokenizer, chat_template=tokenizer.chat_template)
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux3Transformer2DModel(
        num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8 * 32,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    for parameter in transformer.parameters():
        parameter.mul_(2)  # else prompts would hardly matter
    blocks = Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = Flux3ModularPipeline(blocks=blocks)
    pipeline.update_components(
        text_encoder=text_encoder(len(tokenizer)), tokenizer=processor, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.93),
    )  # fmt: skip
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)


def text_encoder(words: int) -> Qwen3VLForConditionalGeneration:
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": words, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 34,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config)


def round_trip(vae, rgb):
    """What the VAE itself makes of images."""
    return vae.decode(vae.encode(rgb).latent_dist.mode()).sample
