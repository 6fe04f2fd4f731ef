"""Measure the tiny base with the stock diffusers pipeline: reconstruction, retrieval, and a grid to look at.

python recipes/tiny/judge_base.py --base recipes/tiny/base --out outputs/tiny_base
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from tqdm import tqdm

from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.evaluation.pictures import sheet
from asymflow_ft.evaluation.retrieval import retrieval_rank, sharpness, thumbnails

DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(Path(__file__).parent / "base"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()

    pipeline = Flux2KleinPipeline.from_pretrained(args.base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rows = [json.loads(line) for line in open(DATA / "metadata.jsonl", encoding="utf-8")]
    gallery = [Image.open(DATA / row["file_name"]).convert("RGB") for row in rows]
    captions = [row["text"] for row in rows]
    prompts = (DATA / "prompts.txt").read_text(encoding="utf-8").split("\n")[:-1]

    vae, errors = pipeline.vae, []
    with torch.no_grad():
        for start in range(0, len(gallery), 16):
            x = torch.stack([rgb_tensor(image) for image in gallery[start : start + 16]])
            decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
            errors.append((decoded - x).square().mean((1, 2, 3)))
    psnr = (10 * torch.log10(4 / torch.cat(errors))).mean().item()

    samples = []
    for start in tqdm(range(0, len(prompts), 4), desc="samples"):
        samples += pipeline(
            prompt=prompts[start : start + 4], height=128, width=128, num_inference_steps=args.steps,
            guidance_scale=args.guidance, max_sequence_length=32, generator=torch.Generator().manual_seed(start),
        ).images  # fmt: skip
    targets = [captions.index(prompt) for prompt in prompts]
    ranks = retrieval_rank(samples, thumbnails(gallery), targets)
    figures = {
        "pictures": len(gallery), "vae_psnr_db": psnr, "steps": args.steps, "guidance": args.guidance,
        "retrieval_at_1": (ranks < 1).float().mean().item(), "retrieval_at_5": (ranks < 5).float().mean().item(),
        "sharpness_sampled": sharpness(samples), "sharpness_real": sharpness([gallery[i] for i in targets]),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    real = [gallery[i] for i in targets]
    pages = {}
    for i in range(0, 24, 6):
        pages |= {f"real {i // 6 + 1}": real[i : i + 6], f"sampled {i // 6 + 1}": samples[i : i + 6]}
    sheet(pages).save(args.out / "grid.png")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
