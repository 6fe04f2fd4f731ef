"""Pictures and figures that say whether the model got better: fixed prompts, fixed noise, held-out images.

Everything is drawn by the network that is being trained, as many pictures at a time as it trains on, so validation
stays within the memory of training. Processes share the work and take part in the same number of network calls, which
sharded training needs.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.subspace import PixelModel, PixelSubspace
from asymflow_ft.data.prepare import PreparedData
from asymflow_ft.evaluation.metrics import METRICS, default_metrics, measure
from asymflow_ft.evaluation.pictures import sheet
from asymflow_ft.evaluation.suites import Prompt
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.recipe import Recipe
from asymflow_ft.textfiles import read_lines
from asymflow_ft.training.checkpoint import write_whole
from asymflow_ft.training.objective import condition_of
from asymflow_ft.training.stages import Prepared

HELD_OUT_SIGMAS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
# of `asymflow-ft evaluate`, those that take no network of their own and make sense of a few pictures
WATCHED = ("picture_error", "retrieval_at_5", "sharpness", "spectrum_error", "high_band")
Draw = Callable[[int, int], Sequence[Image.Image]]  # pictures of the prompts [start, stop)


def prompt_noise(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Pixel noise of `count` prompts, (count, 3, height, width); noise i depends on the seed and i alone."""
    generators = (torch.Generator().manual_seed(seed + i) for i in range(count))
    return torch.stack([torch.randn(3, *size, generator=generator) for generator in generators])


def base_noise(noise: Tensor, subspace: PixelSubspace) -> Tensor:
    """Latent noise (B, R, H / patch, W / patch): the projection of pixel noise (B, 3, H, W)."""
    patch = subspace.config["patch"]
    grid = (noise.shape[-2] // patch, noise.shape[-1] // patch)
    basis = subspace.float32()[0]
    return to_image(to_tokens(noise.to(basis), patch) @ basis, grid, 1)


def share(items: Sequence[int], accelerator: Accelerator) -> list[int]:
    """This process's part of `items`; the same number for every process, so the last item may come twice."""
    padded = [*items, *[items[-1]] * (-len(items) % accelerator.num_processes)] if items else []
    return padded[accelerator.process_index :: accelerator.num_processes]


class Validation:
    """A run's fixed prompts with their noise, and what was drawn and measured so far.

    Raises:
        ValueError: sample.judge asks for retrieval, and a prompt is not the caption of any image.
    """

    def __init__(
        self, recipe: Recipe, data: Prepared, subspace: PixelSubspace, codec: PixelCodec, accelerator: Accelerator
    ):
        self.recipe, self.data, self.subspace, self.codec = recipe, data, subspace, codec
        self.accelerator, self.out = accelerator, Path(recipe.output_dir)
        self.prompts = data.prompts[: max(recipe.sample.count, recipe.sample.judge)]
        self.size = (recipe.data.resolution, recipe.data.resolution)
        self.noise = prompt_noise(len(self.prompts), self.size, recipe.seed)
        embeds = [data.encoded.embeds(prompt) for prompt in self.prompts]
        self.embeds = pad_sequence(embeds, batch_first=True).to(accelerator.device)
        self.empty = data.encoded.embeds("").to(accelerator.device)
        self.rows: dict[str, Sequence[Image.Image | None]] = {}
        self.metrics: dict[str, dict] = {}
        self.real = [partial(data.held_out.picture, i) for i in range(len(data.held_out))]  # may be too many to hold
        judged = self.prompts[: recipe.sample.judge]
        self.references: list[Image.Image | None] = [*_pictures_of(judged, [data.train, data.held_out])]
        self.references += [None] * (len(self.prompts) - len(judged))
        if judged:
            self.rows["real"] = self.references

    def base_drawer(self, family: ModuleType, parts: DiffusionPipeline) -> Draw:
        """The latent base by its own pipeline, from the projection of the same noise."""
        sample = self.recipe.sample
        parts.set_progress_bar_config(disable=True)

        def draw(start: int, stop: int) -> Sequence[Image.Image]:
            noise = base_noise(self.noise[start:stop], self.subspace)
            embeds = self.embeds[start:stop]
            return family.draw_base(parts, noise, embeds, self.empty, self.size, sample.steps, sample.guidance)[0]

        return draw

    def pixel_drawer(self, pipeline: DiffusionPipeline, network: nn.Module) -> Draw:
        """The pixel model as it stands."""
        sample = self.recipe.sample
        pipeline.set_progress_bar_config(disable=True)

        def draw(start: int, stop: int) -> Sequence[Image.Image]:
            network.eval()
            images = pipeline(
                prompt_embeds=self.embeds[start:stop], negative_prompt_embeds=self.empty.expand(stop - start, -1, -1),
                latents=self.noise[start:stop], height=self.size[0], width=self.size[1],
                num_inference_steps=sample.steps, guidance_scale=sample.guidance, clamp=sample.clamp,
                orthogonal_guidance=sample.orthogonal,
            ).images  # fmt: skip
            network.train()
            return images

        return draw

    def draw(self, what: str, folder: str, draw: Draw, count: int | None = None) -> list[Image.Image]:
        """The pictures of all prompts, or of the first `count`, in samples/`folder`; those not there yet are drawn."""
        where = self.out / "samples" / folder
        total = len(self.prompts) if count is None else min(count, len(self.prompts))
        files = [where / f"{i:03d}.png" for i in range(total)]
        where.mkdir(parents=True, exist_ok=True)
        batch = self.recipe.train.batch_size
        missing = [i for i in range(0, total, batch) if not all(f.is_file() for f in files[i : i + batch])]
        self.accelerator.wait_for_everyone()  # all have seen the same files before the first is written
        hidden = not self.accelerator.is_main_process
        for start in tqdm(share(missing, self.accelerator), desc=what, leave=False, disable=hidden, mininterval=1):
            stop = min(start + batch, total)
            for file, picture in zip(files[start:stop], draw(start, stop), strict=True):
                part = file.with_suffix(f".part{self.accelerator.process_index}")
                picture.save(part, format="png")
                part.replace(file)
        self.accelerator.wait_for_everyone()
        pictures = []
        for file in files:
            with Image.open(file) as stored:
                pictures.append(stored.convert("RGB"))
        return pictures

    def keep(self, name: str, label: str, pictures: list[Image.Image], step: int | None = None) -> None:
        """Measure them under `name`, and make them the row `label` of the grids to come.

        Args:
            step: optimizer step of the model in training, None for another.
        """
        self.rows[label] = pictures
        if self.accelerator.is_main_process:
            self.metrics["real"], self.metrics[name] = self.measure(pictures)
            if step is not None:
                self.log(step, pictures)

    def measure(self, pictures: Sequence[Image.Image]) -> tuple[dict[str, float], dict[str, float]]:
        """WATCHED, of real pictures and of those of the first prompts, one each, as far as there is something to
        compare with: real pictures are the held-out ones, or without any the prompts' own."""
        prompts = [Prompt(text, str(i)) for i, text in enumerate(self.prompts[: len(pictures)])]
        references = self.references[: len(pictures)]
        can = default_metrics(bool(self.real), any(references), None)
        found = measure(
            {"drawn": [[picture] for picture in pictures]}, prompts, self.real, references,
            [key for key in WATCHED if key in can], None, self.size, self.recipe.seed,
        ).values  # fmt: skip
        real, drawn = ({one.metric: one.value for one in found if one.model == name} for name in ("real", "drawn"))
        return real, drawn

    def log(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """A line in logs/metrics.jsonl, in the place of that of an interrupted run, and the trackers: of the first
        sample.count prompts, which alone are drawn at every step."""
        figures = self.measure(pictures[: self.recipe.sample.count])[1]
        file = self.out / "logs/metrics.jsonl"
        lines = {line["step"]: line for line in read_lines(file)} | {step: {"step": step, **figures}}
        write_whole(file, "".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)).encode())
        self.accelerator.log({f"metrics/{name}": value for name, value in figures.items()}, step=step)

    def save_grid(self, step: int, more: dict[str, list[Image.Image]] = {}) -> None:  # noqa: B006 never changed
        """samples/step-000123.png: a row per model (those kept, then `more`), a column per prompt."""
        if not self.accelerator.is_main_process:
            return
        count = self.recipe.sample.count
        rows = {name: row[:count] for name, row in {**self.rows, **more}.items()}
        page = sheet(rows, self.prompts[:count])
        page.save(self.out / "samples" / f"step-{step:06d}.png")
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(page)[None]}, step=step, **layout)

    @torch.no_grad()
    def held_out_errors(self, model: PixelModel) -> dict[str, float]:
        """Mean squared error of the clean estimate in pixel space, per noise level, on held-out images; {} without
        any."""
        data, device = self.data.held_out, self.accelerator.device
        if not len(data):
            return {}
        patch = self.subspace.config["patch"]
        own = share(range(len(data)), self.accelerator)
        sums = torch.zeros(len(HELD_OUT_SIGMAS) + 1, dtype=torch.float64)
        hidden = not self.accelerator.is_main_process
        for turn, i in enumerate(tqdm(own, desc="held-out error", leave=False, disable=hidden, mininterval=1)):
            batch = data.first(i)
            x0 = to_tokens(self.codec.encode(batch.rgb.to(device)), patch)
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.recipe.seed + i)).to(x0)
            grid = (batch.rgb.shape[-2] // patch, batch.rgb.shape[-1] // patch)
            cond = condition_of(batch, self.codec, model.guidance, device)
            counts = turn * self.accelerator.num_processes + self.accelerator.process_index < len(data)
            for j, sigma in enumerate(HELD_OUT_SIGMAS):
                level = torch.full((1, 1, 1), sigma, device=device)
                x0_hat = model.clean(torch.lerp(x0, eps, level), level, cond, grid)
                sums[j] += counts * (x0_hat - x0).square().mean().item()
            sums[-1] += counts
        if self.accelerator.num_processes > 1:  # not every device knows float64
            sums = self.accelerator.reduce(sums.to(device)).cpu()
        return {str(sigma): (sums[j] / sums[-1]).item() for j, sigma in enumerate(HELD_OUT_SIGMAS)}


def _pictures_of(prompts: Sequence[str], data: Sequence[PreparedData]) -> list[Image.Image]:
    """The picture that each prompt is the caption of.

    Raises:
        ValueError: a prompt is not the caption of any picture.
    """
    places: dict[str, tuple[PreparedData, int]] = {}
    for part in data if prompts else ():
        for i, entry in enumerate(part.entries):
            places.setdefault(part.images.captions(entry.row)[0], (part, i))
    unknown = [prompt for prompt in prompts if prompt not in places]
    if unknown:
        raise ValueError(
            f"sample.judge compares with prompts' own pictures, but {len(unknown)} of {len(prompts)} prompts are no "
            f"caption of the data, such as {unknown[0]!r}; use captions as prompts, or set sample.judge=0"
        )
    return [part.picture(i) for part, i in map(places.__getitem__, prompts)]


def summary(metrics: dict[str, dict], out: Path, model: Path) -> str:
    """metrics.json as a small table.

    Args:
        model: the folder of the result.
    """
    columns = {key: METRICS[key].title for key in WATCHED if key in metrics["step 0"]}
    lines = [f"{'':14}" + "".join(f"{title:>15}" for title in columns.values())]
    for name in ("real", "latent base", "step 0", "finetuned"):
        values = [metrics.get(name, {}).get(key) for key in columns]
        if any(value is not None for value in values):
            lines.append(f"{name:14}" + "".join(f"{'' if v is None else format(v, '.2f'):>15}" for v in values))
    held = metrics["held_out_error"]
    lines += [
        f"held-out error at sigma {s}: {held['step 0'][s]:.4f} -> {held['finetuned'][s]:.4f}" for s in held["step 0"]
    ]
    return "\n".join([*lines, f"pictures in {out / 'samples'}, figures in {out / 'metrics.json'}, model in {model}"])
