"""Arm (a) of the study: the latent base finetuned in its own space, by plain flow matching on the same data.

    python recipes/study/latent_finetune.py RECIPE.yaml [key=value ...]

It takes a recipe of a conversion and the same images, noise numbers, optimizer and average, at the base's native
timestep shift, and writes a stock pipeline to output_dir/pipeline. Not resumable: it is minutes long.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline
from tqdm import tqdm

from asymflow_ft.data.source import open_sources
from asymflow_ft.families import family_of
from asymflow_ft.method.noise import logit_normal_sigmas
from asymflow_ft.recipe import load_recipe
from asymflow_ft.training.checkpoint import write_json
from asymflow_ft.training.ema import PowerEma
from asymflow_ft.training.feed import loader, micro_batches
from asymflow_ft.training.objective import condition_of, draw_noise
from asymflow_ft.training.optimizer import make_optimizer, set_rates
from asymflow_ft.training.stages import prepare
from asymflow_ft.training.student import on_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    out = Path(recipe.output_dir)
    if (out / "metrics.json").is_file():
        print(f"{out} holds a finished run; nothing to do")
        return
    started = time.time()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(recipe.seed)
    family = family_of(recipe.base, recipe.revision)
    parts = on_device(recipe, family, ("vae", "transformer", "scheduler"), accelerator.device)
    patch, shift = family.pixel_patch(parts.vae), family.latent_shift(parts)
    data = prepare(recipe, family, open_sources(recipe.data), patch, accelerator)
    network = copy.deepcopy(parts.transformer).float().requires_grad_(True).train()
    parameters = dict(network.named_parameters())
    # here the output projection is trained already, and needs no rate of its own
    optimizer = make_optimizer(recipe, parameters, (), "")
    ema = PowerEma(parameters.items(), recipe.train.ema_gamma, recipe.train.ema_start)
    batches = micro_batches(
        loader(recipe, data.train, 0, accelerator),
        lambda batch: draw_noise(batch.serials, *batch.z0.shape[1:], recipe.seed),
    )
    losses = []
    for step in tqdm(range(recipe.train.steps), desc="train", mininterval=2):
        set_rates(optimizer, step, recipe.train)
        batch, noise = next(batches)
        z0, cond = batch.z0.to(accelerator.device), condition_of(batch, None, None, accelerator.device)
        level, eps = (draw.to(z0) for draw in noise)
        sigma = logit_normal_sigmas(level, shift, recipe.noise.mean, recipe.noise.std)
        grid = (batch.rgb.shape[-2] // patch, batch.rgb.shape[-1] // patch)
        u = family.predict(network, torch.lerp(z0, eps, sigma), sigma.flatten(), cond, grid)
        weight = sigma / sigma.clamp(min=recipe.loss.sigma_floor)
        loss = recipe.loss.mse * (weight * (u - (eps - z0))).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            parameters.values(), recipe.train.clip_norm if step >= recipe.train.clip_after else math.inf
        )
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step + 1)
        losses.append(loss.item())
    save(recipe.base, recipe.revision, network, ema, out / "pipeline")
    run = {"steps": recipe.train.steps, "seconds": round(time.time() - started, 1)}
    write_json(out / "metrics.json", {"run": run, "loss_of_last_50_steps": sum(losses[-50:]) / len(losses[-50:])})


def save(base: str, revision: str | None, network: torch.nn.Module, ema: PowerEma, folder: Path) -> None:
    """The base's pipeline with the averaged weights."""
    stock = DiffusionPipeline.from_pretrained(base, revision=revision, torch_dtype=torch.bfloat16)
    with ema.applied():
        stock.transformer.load_state_dict(network.state_dict())
    stock.save_pretrained(folder)


if __name__ == "__main__":
    main()
