"""Train the tiny latent base: FLUX.2's exact geometry, small enough for a repository, drawn from tiny/data.

    python recipes/tiny/build_base.py --work build/tiny_base --out recipes/tiny/base

Four parts, each skipped when its result already lies in --work, each resumable: the VAE (AutoencoderKLFlux2, 32 latent
channels, /8, batch-norm whitening of the 2x2 packed channels), the text encoder (a thin Qwen3 with random weights:
what matters is that it tells captions apart) with its tokenizer, the transformer (Flux2Transformer2DModel, plain flow
matching with 10 % caption dropout), and the saved Flux2KleinPipeline. Some 15 + 60 minutes on two CPU cores.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from asymflow_ft.components.color import rgb_tensor

DATA = Path(__file__).parent / "data"
TEXT_LENGTH = 32
NATIVE_SHIFT = 3.0
EMA_DECAY = 0.998
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_data() -> tuple[torch.Tensor, list[str]]:
    """All pictures as (N, 3, 128, 128) in [-1, 1], and their captions."""
    rows = [json.loads(line) for line in open(DATA / "metadata.jsonl", encoding="utf-8")]
    return torch.stack([rgb_tensor(Image.open(DATA / row["file_name"])) for row in rows]), [
        row["text"] for row in rows
    ]


def train(
    name: str,
    work: Path,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    loss_at: Callable[[int], torch.Tensor],
) -> None:
    """Run `steps` optimizer steps with linear warm-up and cosine decay; continue from work/name.state.pt if present.

    `loss_at(step)` must draw all its randomness from the global generator, which is seeded by the step: a resumed run
    is the run that it continues. An exponential moving average of the weights replaces them at the end.
    """
    state_file = work / f"{name}.state.pt"
    peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        start, average = state["step"], state["average"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    recent, saved_at = 0.0, time.time()
    for step in progress:
        torch.manual_seed(step)
        factor = min((step + 1) / 100, 0.5 + 0.5 * torch.cos(torch.tensor(step / steps * torch.pi)).item())
        for optimizer, rates in zip(optimizers, peak, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for key, value in model.state_dict().items():
            if value.is_floating_point():  # BatchNorm counts its batches in int64
                average[key].lerp_(value, 1 - min(EMA_DECAY, (step + 1) / (step + 10)))
        recent = loss.item() if step == start else 0.98 * recent + 0.02 * loss.item()
        progress.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if time.time() - saved_at > 120 or step + 1 == steps:
            state = {"step": step + 1, "average": average, "model": model.state_dict()}
            torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, f"{state_file}.part")
            Path(f"{state_file}.part").replace(state_file)
            saved_at = time.time()
    model.load_state_dict(average)


def build_vae(images: torch.Tensor, work: Path) -> AutoencoderKLFlux2:
    """Crops of 64x64 first (the same convolutions at a quarter of the cost), whole pictures at the end."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=32, sample_size=128
    )
    # The running statistics are set from the finished encoder below; BatchNorm never runs as a layer.
    crop_steps, steps = 2400, 2600

    def loss_at(step: int) -> torch.Tensor:
        if step < crop_steps:
            corner = torch.randint(0, 65, (16, 2)).tolist()
            chosen = torch.randint(len(images), (16,)).tolist()
            x = torch.stack([images[i, :, t : t + 64, l : l + 64] for i, (t, l) in zip(chosen, corner, strict=True)])
        else:
            x = images[torch.randint(len(images), (8,))]
        x = x.flip(-1) if step % 2 else x
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return error.square().mean() + 0.1 * error.abs().mean() + 2e-5 * kl

    train("vae", work, vae, [torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0)], steps, loss_at)
    with torch.no_grad():
        packed = torch.cat([F.pixel_unshuffle(vae.encode(x).latent_dist.mean, 2) for x in images.split(16)])
        vae.bn.running_mean.copy_(packed.mean((0, 2, 3)))
        vae.bn.running_var.copy_(packed.var((0, 2, 3)))
        mse = torch.cat([(vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x).square().mean((1, 2, 3))
                         for x in images.split(16)])  # fmt: skip
        print(
            f"VAE reconstruction: {(10 * torch.log10(4 / mse)).mean():.2f} dB PSNR, mean over {len(images)} pictures"
        )
    return vae.eval()


def build_text(captions: list[str]) -> tuple[Qwen3ForCausalLM, Qwen2TokenizerFast]:
    """A byte-level BPE over the captions, and a random Qwen3 whose residual stream keeps each token's identity."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1536, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*captions, *(f"a {c}" for c in captions)] + ["user\n", "assistant\n\n"] * 50, trainer)
    core = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=core["vocab"], merges=[tuple(pair) for pair in core["merges"]],
        unk_token=None, bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHAT_TEMPLATE, model_max_length=512,
    )  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, initializer_range=0.05,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text_encoder = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(text_encoder.model.embed_tokens.weight)  # unit size: 27 random layers add about as much
    return text_encoder.eval(), tokenizer


def build_transformer(
    images: torch.Tensor, captions: list[str], parts: Flux2KleinPipeline, work: Path, steps: int
) -> None:
    """Flow matching on cached latents; trains `parts.transformer` in place."""
    vae, transformer = parts.vae, parts.transformer
    with torch.no_grad():
        posteriors = [vae.encode(x).latent_dist for x in images.split(16)]
        mean, std = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])
        embeds, text_ids = parts.encode_prompt([*captions, ""], max_sequence_length=TEXT_LENGTH)
    image_ids = parts._prepare_latent_ids(torch.zeros(1, 1, 8, 8))
    bn_mean = vae.bn.running_mean[:, None, None]
    bn_std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()[:, None, None]
    batch, unconditional = 64, len(captions)
    latents_of = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))

    def loss_at(step: int) -> torch.Tensor:
        rows = latents_of[torch.randint(len(captions), (batch,))]
        z = F.pixel_unshuffle(mean[rows] + std[rows] * torch.randn_like(mean[rows]), 2)
        z = ((z - bn_mean) / bn_std).flatten(2).transpose(1, 2)
        raw = torch.sigmoid(torch.randn(batch))
        sigma = 2 * raw / (1 + raw)
        noise = torch.randn_like(z)
        z_t = torch.lerp(z, noise, sigma[:, None, None])
        text = torch.where(torch.rand(batch) < 0.1, unconditional, rows)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = transformer(
                hidden_states=z_t, timestep=sigma, guidance=None, encoder_hidden_states=embeds[text],
                txt_ids=text_ids[:1], img_ids=image_ids, return_dict=False,
            )[0]  # fmt: skip
        return F.mse_loss(velocity.float(), noise - z)

    inner = [p for n, p in transformer.named_parameters() if p.ndim == 2 and "blocks" in n]
    outer = [p for n, p in transformer.named_parameters() if not (p.ndim == 2 and "blocks" in n)]
    optimizers = [
        torch.optim.Muon(inner, lr=1.5e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    train("transformer", work, transformer.train(), optimizers, steps, loss_at)
    transformer.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="states of the unfinished parts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline (half precision)")
    parser.add_argument("--steps", type=int, default=3100, help="transformer steps of 64 pictures")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    images, captions = load_data()
    vae = build_vae(images, args.work)
    text_encoder, tokenizer = build_text(captions)
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=2, num_single_layers=5, num_attention_heads=6, attention_head_dim=32,
        joint_attention_dim=3 * 64, axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=NATIVE_SHIFT)
    pipeline = Flux2KleinPipeline(scheduler, vae, text_encoder, tokenizer, transformer)
    build_transformer(images, captions, pipeline, args.work, args.steps)
    pipeline.to(torch.float16).save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
