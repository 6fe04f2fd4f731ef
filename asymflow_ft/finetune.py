"""Finetune a latent base into a pixel model.

    accelerate launch asymflow_ft/finetune.py recipes/flux2_klein.yaml [key=value ...] [--dry-run]

Read downwards: prepare, draw the base and step 0, train, draw and measure, save. Everything goes to `output_dir`;
the same command run again continues from the newest checkpoint, and a finished run is left alone.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from asymflow_ft.align import align, describe
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import Cond, PixelModel, PixelSubspace, load_subspace
from asymflow_ft.data.prepare import Batch, BucketBatches, collate
from asymflow_ft.data.source import Source, open_source
from asymflow_ft.evaluation.retrieval import sharpness
from asymflow_ft.families import family_of
from asymflow_ft.method import asymflow
from asymflow_ft.method import loss as losses
from asymflow_ft.method.noise import logit_normal_sigmas
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.recipe import Recipe, load_recipe, plain
from asymflow_ft.training import trainable
from asymflow_ft.training.checkpoint import list_checkpoints, load_checkpoint, restore, save_checkpoint, write_json
from asymflow_ft.training.ema import PowerEma
from asymflow_ft.training.finish import pipeline_settings, save_pipeline
from asymflow_ft.training.optimizer import make_optimizer, set_rates
from asymflow_ft.training.perceptual import PerceptualMap, load_lpips
from asymflow_ft.training.run import StopSignal, claim, cut_log, finished_steps
from asymflow_ft.training.stages import free_memory, prepare
from asymflow_ft.training.validation import (
    Judge,
    draw_or_load,
    held_out_errors,
    peak_memory_gb,
    prompt_noise,
    save_grid,
    summary,
)

LOG_FILE = "logs/train.jsonl"
DRAW_BATCH = 4  # pictures drawn at a time; small, so that drawing needs no more memory than training


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file; docs/recipes.md lists its keys")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a recipe value, e.g. train.lr=5e-5"
    )
    parser.add_argument("--dry-run", action="store_true", help="validate everything that needs no weights, and stop")
    args = parser.parse_args(arguments)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.dry_run:
            dry_run(recipe)
        else:
            finetune(recipe)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def dry_run(recipe: Recipe) -> None:
    """Print what would run, after opening the base's index and the data."""
    family = family_of(recipe.base, recipe.revision)
    source = open_source(recipe.data.source, recipe.data.split, recipe.data.image_column, recipe.data.caption_column)
    transformer = family.transformer_on_meta(recipe.base, recipe.revision)
    total = sum(p.numel() for p in transformer.parameters())
    with torch.device("meta"):
        subspace = PixelSubspace(rank=transformer.config.in_channels)
    transformer = family.lift(transformer, subspace)
    kind = "all weights"
    if recipe.lora is not None:
        targets = family.lora_targets(transformer)
        trainable.attach_lora(transformer, targets, family.TRAINED_ENDS, recipe.lora.rank, recipe.lora.dropout)
        kind = f"LoRA r={recipe.lora.rank} on {len(targets)} layers, and the end layers whole"
    trained = sum(p.numel() for p in trainable.trained_parameters(transformer).values())
    train = recipe.train
    print(json.dumps(plain(recipe), indent=2))
    print(
        f"base {recipe.base}: {total:,} parameters; {trained:,} will be trained ({kind})\n"
        f"data {recipe.data.source}: {len(source)} images\n"
        f"{train.steps} steps of {train.batch_size} x {train.accumulation} images per process -> {recipe.output_dir}"
    )


def finetune(recipe: Recipe) -> None:
    """The whole run. Raises ValueError for anything that the user can mend."""
    started = time.time()
    train, out = recipe.train, Path(recipe.output_dir)
    accelerator = Accelerator(
        mixed_precision=train.precision,
        gradient_accumulation_steps=train.accumulation,
        log_with="tensorboard",
        project_dir=out,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    main_process, device = accelerator.is_main_process, accelerator.device
    say = accelerator.print
    set_seed(recipe.seed)

    # Prepare: everything that can be wrong is looked at before the first heavy step.
    family = family_of(recipe.base, recipe.revision)
    source = open_source(recipe.data.source, recipe.data.split, recipe.data.image_column, recipe.data.caption_column)
    claim(out, recipe, main_process)
    accelerator.wait_for_everyone()
    if (out / "pipeline" / "model_index.json").is_file() and finished_steps(out) >= train.steps:
        say(f"{out} holds a finished run of {finished_steps(out)} steps; nothing to do.\n"
            "Continue it with a larger train.steps, or start another with another output_dir.")  # fmt: skip
        return
    perceptual = load_lpips(device) if recipe.loss.perceptual == "lpips" else None
    codec = PixelCodec(recipe.pixels.space, recipe.pixels.mean, recipe.pixels.std)
    subspace = aligned(recipe, family, source, codec, say)
    patch = subspace.config["patch"]
    if recipe.data.resolution % patch:
        raise ValueError(f"data.resolution {recipe.data.resolution} is not a multiple of the patch, {patch}")
    data = prepare(recipe, family, source, patch, accelerator)
    if data.unreadable:
        say(f"left out {len(data.unreadable)} unreadable images, first: {data.unreadable[0]}")

    # Draw the base while its VAE is at hand.
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    parts = family.load_parts(recipe.base, ("vae", "transformer", "scheduler"), dtype, recipe.revision)
    parts.to(device)
    subspace.to(device)
    shift = recipe.noise.shift or family.latent_shift(parts) * subspace.scale.item()
    size = (recipe.data.resolution, recipe.data.resolution)
    drawn = max(recipe.sample.count, recipe.sample.judge)
    prompts = data.prompts[:drawn]
    noise = prompt_noise(len(prompts), size, recipe.seed)
    grid = (size[0] // patch, size[1] // patch)
    embeds, empty = torch.stack([data.embed(p) for p in prompts]).to(device), data.embed("").to(device)
    pictures: dict[str, list] = {}
    if main_process:
        parts.set_progress_bar_config(disable=True)

        def draw_base(start: int, stop: int) -> list:
            z = to_tokens(noise[start:stop], patch).to(device) @ subspace.basis
            steps, guidance = recipe.sample.steps, recipe.sample.guidance
            return family.draw_base(parts, to_image(z, grid, 1), embeds[start:stop], empty, size, steps, guidance)

        pictures["latent base"] = draw_or_load(
            out / "samples/base", len(prompts), draw_base, DRAW_BATCH, "base samples"
        )
    parts.vae = None
    free_memory()

    # What is trained, and the frozen reference beside it. Lifted on the device, where it shares the base's weights.
    lifted = family.lift(parts.transformer, subspace)
    if recipe.lora is None:
        network = trainable.copy_for_full_training(lifted)
        reference = trainable.frozen_reference(parts.transformer, subspace, family.predict)
    else:
        network = lifted
        targets = family.lora_targets(network)
        trainable.attach_lora(network, targets, family.TRAINED_ENDS, recipe.lora.rank, recipe.lora.dropout)
    network.train()
    if train.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    parameters = trainable.trained_parameters(network)
    ema = PowerEma(parameters.items(), train.ema_gamma, train.ema_start)
    optimizer = make_optimizer(recipe, parameters, family.OUTPUT_LAYER)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    if recipe.lora is not None:
        reference = trainable.lora_reference(prepared, network, subspace, family.predict)
    model = PixelModel(prepared, subspace, family.predict)
    say(f"{sum(p.numel() for p in parameters.values()):,} trained parameters, "
        f"timestep shift {shift:.2f}, {len(data.train)} training images, {len(data.held_out)} held out")  # fmt: skip

    pipeline = family.pixel_pipeline_class(parts)(
        scheduler=flow_solver(), text_encoder=None, tokenizer=None, transformer=network, subspace=subspace,
        codec=codec, **pipeline_settings(recipe, shift),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def draw_pixels(start: int, stop: int) -> list:
        network.eval()
        images = pipeline(
            prompt_embeds=embeds[start:stop], negative_prompt_embeds=empty.expand(stop - start, -1, -1),
            latents=noise[start:stop], height=size[0], width=size[1], num_inference_steps=recipe.sample.steps,
            guidance_scale=recipe.sample.guidance, orthogonal_guidance=recipe.sample.orthogonal,
            clamp=recipe.sample.clamp,
        ).images  # fmt: skip
        network.train()
        return images

    judge = Judge([data.train, data.held_out], prompts[: recipe.sample.judge]) if recipe.sample.judge else None
    metrics: dict[str, dict] = {"held_out_error": {}}

    def measure(name: str, images: list) -> None:
        metrics[name] = (
            {"sharpness": sharpness(images)} if judge is None else judge.measure(images[: len(judge.targets)])
        )

    if judge is not None:
        pictures = {"real": judge.real(), **pictures}
        metrics["real"] = {"sharpness": sharpness(pictures["real"])}
    if main_process:
        measure("latent base", pictures["latent base"])
        pictures["pixels, step 0"] = draw_or_load(
            out / "samples/step_0", len(prompts), draw_pixels, DRAW_BATCH, "step 0 samples"
        )
        measure("step 0", pictures["pixels, step 0"])
        save_grid(out, pictures, prompts, recipe.sample.count, 0)

    # Resume. At step 0 the held-out error of the lifted base is measured; later it is read from the earlier part.
    step, found = 0, list_checkpoints(out / "checkpoints")
    held_out_file = out / "logs/held_out_step_0.json"
    if main_process and not held_out_file.is_file():
        network.eval()
        write_json(held_out_file, held_out_errors(pipeline.pixel_model, codec, data.held_out, device, recipe.seed))
        network.train()
    if found:
        step, saved, averages, optimizer_state = load_checkpoint(found[-1])
        restore(parameters, saved, f"checkpoint {found[-1]}")
        restore(ema.average, averages, f"checkpoint {found[-1]}")
        optimizer.load_state_dict(optimizer_state)
        say(f"continuing from {found[-1].name}")
    if main_process:
        cut_log(out / LOG_FILE, step)
        accelerator.init_trackers("logs")
    batches = iter(
        DataLoader(
            data.train,
            batch_sampler=BucketBatches(
                [entry.size for entry in data.train.entries], train.batch_size, recipe.seed,
                start=step * train.accumulation, rank=accelerator.process_index, world=accelerator.num_processes,
            ),
            collate_fn=collate,
        )
    )  # fmt: skip

    # Train.
    stop = StopSignal()
    progress = tqdm(
        total=train.steps, initial=step, desc="train", disable=not main_process, dynamic_ncols=True, mininterval=2
    )
    while step < train.steps:
        set_rates(optimizer, step, train.warmup)
        shown: dict[str, float] = {}
        for micro in range(train.accumulation):
            batch = next(batches)
            with accelerator.accumulate(prepared):
                torch.manual_seed(hash((recipe.seed, step, micro, accelerator.process_index)) % 2**63)
                terms = training_loss(recipe, model, reference, codec, perceptual, batch, empty, shift, device)
                value = sum(terms.values())
                if not torch.isfinite(value):
                    raise ValueError(
                        f"the loss is {value.item()} at step {step + 1} (images {batch.indices}); "
                        "the newest checkpoint is sound. Lower train.lr or look at those images"
                    )
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    limit = train.clip_norm if step >= train.clip_after else math.inf
                    norm = float(accelerator.clip_grad_norm_(parameters.values(), limit))
                    if not math.isfinite(norm):
                        raise ValueError(f"the gradient is {norm} at step {step + 1}; lower train.lr")
                optimizer.step()
                optimizer.zero_grad()
            for name, term in {"loss": value, **terms}.items():
                shown[name] = shown.get(name, 0.0) + term.item() / train.accumulation
        step += 1
        ema.update(step)
        shown |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        if main_process:
            with open(out / LOG_FILE, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **shown}) + "\n")
        accelerator.log(shown, step=step)
        progress.set_postfix(loss=f"{shown['loss']:.3f}", mem=f"{peak_memory_gb(device):.1f}GB", refresh=False)
        progress.update()
        halted = stop.asked(accelerator)
        if main_process and (halted or step % train.checkpoint_every == 0 or step == train.steps):
            save_checkpoint(
                out / "checkpoints", step, parameters, ema.average, optimizer.state_dict(), train.keep_checkpoints
            )
        if halted:
            raise KeyboardInterrupt
        if main_process and recipe.sample.every and step % recipe.sample.every == 0 and step < train.steps:
            with ema.applied():
                count = recipe.sample.count
                now = draw_or_load(
                    out / f"samples/step_{step}", count, draw_pixels, DRAW_BATCH, f"step {step} samples"
                )
            save_grid(out, {**pictures, f"pixels, step {step}": now}, prompts, count, step)
    progress.close()

    # Draw, measure, save: all with the averaged weights.
    if main_process:
        with ema.applied():
            name = f"pixels, step {step}"
            pictures[name] = draw_or_load(
                out / f"samples/final_{step}", len(prompts), draw_pixels, DRAW_BATCH, "final samples"
            )
            network.eval()
            final = held_out_errors(pipeline.pixel_model, codec, data.held_out, device, recipe.seed)
            save_pipeline(
                recipe,
                family,
                pipeline,
                trainable.merge(network, family.lift(parts.transformer, subspace)),
                out / "pipeline",
            )
        measure("finetuned", pictures[name])
        save_grid(out, pictures, prompts, recipe.sample.count, step)
        metrics["held_out_error"] = {"step 0": json.loads(held_out_file.read_text()), "finetuned": final}
        run = {"steps": step, "seconds": round(time.time() - started, 1), "peak_memory_gb": peak_memory_gb(device)}
        write_json(out / "metrics.json", {**metrics, "run": run})
        say(summary(metrics, out))
    accelerator.end_training()


def training_loss(
    recipe: Recipe, model: PixelModel, reference: trainable.Reference, codec: PixelCodec,
    perceptual: PerceptualMap | None, batch: Batch, empty: Tensor, shift: float, device: torch.device,
) -> dict[str, Tensor]:  # fmt: skip
    """The weighted terms of the loss on one micro-batch; all randomness comes from the global generator."""
    patch = model.subspace.config["patch"]
    rgb, z0, embeds = batch.rgb.to(device), batch.z0.to(device), batch.embeds.to(device)
    count = len(rgb)
    grid = (rgb.shape[-2] // patch, rgb.shape[-1] // patch)
    x0 = to_tokens(codec.encode(rgb), patch)
    level = torch.randn(count, 1, 1).to(device)
    sigma = logit_normal_sigmas(level, shift, recipe.noise.mean, recipe.noise.std)
    eps = torch.randn(x0.shape).to(device)
    dropped = (torch.rand(count, 1, 1) < recipe.train.caption_dropout).to(device)
    cond = Cond(torch.where(dropped, empty, embeds))

    x_t = torch.lerp(x0, eps, sigma)
    x_low = asymflow.lift(z0, *model.subspace.float32())
    x_low_hat = reference(z0, eps, sigma, cond, grid)
    x0_hat = model.clean(x_t, sigma, cond, grid)
    target = losses.variance_reduced_target(x0, x0_hat, x_low, x_low_hat, sigma, recipe.loss.kappa)
    terms = {"mse": recipe.loss.mse * losses.velocity_mse(x0_hat, target.image, sigma, recipe.loss.sigma_floor)}
    if perceptual is not None:
        weight = losses.perceptual_weight(target, sigma, recipe.loss.sigma_floor)
        distance = perceptual(codec.decode(to_image(x0_hat, grid, patch)), rgb)
        per_pixel = to_image(weight.expand(-1, -1, patch**2), grid, patch)
        terms["perceptual"] = recipe.loss.perceptual_weight * (distance * per_pixel).mean()
    return terms


def aligned(recipe: Recipe, family: ModuleType, source: Source, codec: PixelCodec, say) -> PixelSubspace:
    """The recipe's subspace, made now when it is missing and the recipe says `align.mode: auto`."""
    if recipe.align.mode == "auto" and not Path(recipe.align.path).exists():
        report = align(
            recipe.base, family, source, codec, Path(recipe.align.path), recipe.align.num_images,
            recipe.data.resolution, recipe.revision, recipe.seed,
        )  # fmt: skip
        say(describe(report))
    return load_subspace(recipe.align.path)


if __name__ == "__main__":
    sys.exit(main())
