"""Pictures and figures that say whether the model got better: fixed prompts, fixed noise, held-out images."""

import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import Cond, PixelModel
from asymflow_ft.data.prepare import PreparedData, collate, fit_image
from asymflow_ft.evaluation.pictures import sheet
from asymflow_ft.evaluation.retrieval import retrieval_rank, sharpness, thumbnails
from asymflow_ft.method.patches import to_tokens

HELD_OUT_SIGMAS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
RETRIEVAL_DEPTH = 5


def prompt_noise(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Pixel noise of `count` prompts, (count, 3, height, width); noise i depends on the seed and i alone."""
    generators = (torch.Generator().manual_seed(seed + i) for i in range(count))
    return torch.stack([torch.randn(3, *size, generator=generator) for generator in generators])


def draw_or_load(
    folder: Path, count: int, draw: Callable[[int, int], Sequence[Image.Image]], batch: int, desc: str
) -> list[Image.Image]:
    """`count` pictures from `folder`; those not there yet are drawn, `batch` at a time, and saved as 000.png ..."""
    files = [folder / f"{i:03d}.png" for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    starts = [i for i in range(0, count, batch) if not all(file.is_file() for file in files[i : i + batch])]
    for start in tqdm(starts, desc=desc, leave=False):
        for file, picture in zip(files[start:], draw(start, min(start + batch, count)), strict=False):
            picture.save(file.with_suffix(".part"), format="png")
            file.with_suffix(".part").replace(file)
    pictures = []
    for file in files:
        with Image.open(file) as stored:
            pictures.append(stored.convert("RGB"))
    return pictures


@torch.no_grad()
def held_out_errors(
    model: PixelModel, codec: PixelCodec, data: PreparedData, device: torch.device, seed: int
) -> dict[str, float]:
    """Mean squared error of the clean estimate in pixel space, per noise level, on held-out images; {} without any."""
    patch = model.subspace.config["patch"]
    errors = {}
    for sigma in HELD_OUT_SIGMAS if len(data) else ():
        total = 0.0
        for i in range(len(data)):
            batch = collate([data[i]])
            x0 = to_tokens(codec.encode(batch.rgb.to(device)), patch)
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + i)).to(x0)
            level = torch.full((1, 1, 1), sigma, device=device)
            grid = (batch.rgb.shape[-2] // patch, batch.rgb.shape[-1] // patch)
            x0_hat = model.clean(torch.lerp(x0, eps, level), level, Cond(batch.embeds.to(device)), grid)
            total += (x0_hat - x0).square().mean().item()
        errors[str(sigma)] = total / len(data)
    return errors


class Judge:
    """Retrieval of prompts among all pictures of the data set.

    Raises:
        ValueError: a prompt is not the caption of any picture.
    """

    def __init__(self, data: Sequence[PreparedData], prompts: Sequence[str]):
        self.gallery, captions = [], []
        for part in data:
            for entry in part.entries:
                self.gallery.append(fit_image(part.source.image(entry.row)[0], entry.size))
                captions.append(part.source.caption(entry.row))
        unknown = [prompt for prompt in prompts if prompt not in captions]
        if unknown:
            raise ValueError(
                f"sample.judge measures retrieval, but {len(unknown)} of {len(prompts)} prompts are no caption of the "
                f"data, such as {unknown[0]!r}; use captions as prompts, or set sample.judge=0"
            )
        self.targets = [captions.index(prompt) for prompt in prompts]
        self.thumbnails = thumbnails(self.gallery)

    def real(self) -> list[Image.Image]:
        """The picture that belongs to each prompt."""
        return [self.gallery[target] for target in self.targets]

    def measure(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Retrieval@5 and sharpness of one drawn picture per prompt."""
        ranks = retrieval_rank(pictures, self.thumbnails, self.targets)
        share = (ranks < RETRIEVAL_DEPTH).float().mean().item()
        return {f"retrieval_at_{RETRIEVAL_DEPTH}": share, "sharpness": sharpness(pictures)}


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held: on the GPU if it runs there, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save_grid(out: Path, pictures: dict[str, list], prompts: list[str], count: int, step: int) -> None:
    """samples/step-000123.png: a row per model, a column per prompt."""
    rows = {name: row[:count] for name, row in pictures.items()}
    sheet(rows, prompts[:count]).save(out / "samples" / f"step-{step:06d}.png")


def summary(metrics: dict[str, dict], out: Path) -> str:
    """metrics.json as a small table."""
    lines = [f"{'':14}{'retrieval@5':>12}{'sharpness':>12}"]
    for name in ("real", "latent base", "step 0", "finetuned"):
        if name in metrics:
            share = metrics[name].get("retrieval_at_5")
            lines.append(f"{name:14}{'' if share is None else f'{share:.0%}':>12}{metrics[name]['sharpness']:>12.2f}")
    held = metrics["held_out_error"]
    lines += [
        f"held-out error at sigma {s}: {held['step 0'][s]:.4f} -> {held['finetuned'][s]:.4f}" for s in held["step 0"]
    ]
    return "\n".join(
        [*lines, f"pictures in {out / 'samples'}, figures in {out / 'metrics.json'}, model in {out / 'pipeline'}"]
    )
