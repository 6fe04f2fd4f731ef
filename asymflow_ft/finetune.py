"""Finetune a latent base into a pixel model.

    accelerate launch asymflow_ft/finetune.py RECIPE.yaml [key=value ...] [--dry-run]

or, in one process, `asymflow-ft finetune` with the same arguments.

Read downwards: prepare, draw the base and step 0, train, draw and measure, save. Everything goes to `output_dir`;
the same command run again continues from the newest checkpoint, and a finished run is left alone.
"""

import argparse
import json
import math
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    set_seed,
)
from tqdm import tqdm

from asymflow_ft.align import align, check_aligned_for, describe
from asymflow_ft.components.attention import prepare_attention
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.memory import free_memory, memory_is_full
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import PixelModel, PixelSubspace, load_subspace
from asymflow_ft.data.cache import content_key
from asymflow_ft.data.source import Images, open_sources
from asymflow_ft.export import Result, keep_origin, pipeline_settings, result_folder, save_result, subspace_key
from asymflow_ft.families import family_of
from asymflow_ft.families.base import compile_blocks
from asymflow_ft.recipe import Recipe, load_recipe
from asymflow_ft.training import trainable
from asymflow_ft.training.checkpoint import load_checkpoint, newest_whole, restore, save_checkpoint, write_json
from asymflow_ft.training.distributed import gather, gather_optimizer, limit_norm, load_optimizer, whole
from asymflow_ft.training.ema import PowerEma
from asymflow_ft.training.feed import loader, micro_batches
from asymflow_ft.training.objective import pixel_noise, summarise, training_terms
from asymflow_ft.training.optimizer import make_optimizer, set_rates
from asymflow_ft.training.perceptual import load_perceptual
from asymflow_ft.training.plan import dry_run, out_of_memory
from asymflow_ft.training.recompute import checkpointed
from asymflow_ft.training.run import (
    PATIENCE,
    STOPPED,
    Log,
    Stopped,
    StopSignal,
    check_same,
    check_setup,
    claim,
    finished_steps,
    on_main,
    peak_memory_gb,
    process_state,
    start_trackers,
    write_status,
)
from asymflow_ft.training.stages import prepare
from asymflow_ft.training.student import build_student, load_transformer, on_device, open_start, start_key
from asymflow_ft.training.validation import Validation, summary


def main(arguments: list[str] | None = None) -> int:
    """0 when the run is finished, 1 after a message about what the user can mend, 75 when it was asked to stop and
    saved a checkpoint (the same command continues), 130 after a second Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML file; docs/recipes.md lists its keys")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a recipe value, e.g. train.lr=5e-5"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="validate, print memory, disk, time, download, and stop"
    )
    parser.add_argument("--card", type=float, metavar="GB", help="memory to fit, for --dry-run (default: this GPU's)")
    parser.add_argument("--tflops", type=float, help="sustained TFLOP/s per GPU, for --dry-run")
    args = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        prepare_attention()
        if args.dry_run:
            print(dry_run(recipe, args.tflops, args.card))
        else:
            finetune(recipe)
    except (ValueError, OSError) as error:
        if process_state().is_main_process:
            tqdm.write(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        tqdm.write(f"error: {out_of_memory(recipe, error)}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if process_state().is_main_process:
            tqdm.write(f"stopped: {stopped}; the same command continues", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        then = "" if args.dry_run else "; the same command continues from the newest checkpoint"
        tqdm.write(f"interrupted{then}", file=sys.stderr)
        return 130
    return 0


def finetune(recipe: Recipe) -> None:
    """The whole run.

    Raises:
        ValueError: anything that the user can mend. Stopped: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    started = time.time()
    train, out = recipe.train, Path(recipe.output_dir)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else every process on a CPU believes that it is alone
        mixed_precision="no",  # the family's network call has an autocast of its own
        # a plugin, because the plain argument gives way to what `accelerate launch` put into the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=train.accumulation),
        log_with=list(train.trackers) or None,
        project_dir=out / "logs",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    main_process, device = accelerator.is_main_process, accelerator.device
    say = accelerator.print
    per_step = train.batch_size * train.accumulation * accelerator.num_processes
    set_seed(recipe.seed)
    check_setup(recipe, accelerator)

    # Prepare: everything that can be wrong is looked at before the first heavy step.
    family = family_of(recipe.base, recipe.revision)
    with accelerator.main_process_first():
        images = open_sources(recipe.data, stream_folder=recipe.stream_folder)
    on_main(accelerator, lambda: claim(out, recipe, per_step))
    if result_folder(recipe).is_dir() and finished_steps(out) >= train.steps:
        if main_process:
            write_status(out, "finished", finished_steps(out), per_step)
        say(f"{out} holds a finished run of {finished_steps(out)} steps; nothing to do.\n"
            "Continue it with a larger train.steps, or start another with another output_dir.")  # fmt: skip
        return
    checkpoint = on_main(accelerator, lambda: newest_checkpoint(out))
    perceptual = load_perceptual(recipe.loss.perceptual, device)
    codec = PixelCodec(recipe.pixels.space, recipe.pixels.mean, recipe.pixels.std)
    with accelerator.main_process_first():
        start = open_start(recipe)
    recipe = replace(recipe, revision=on_main(accelerator, partial(keep_origin, recipe, start)))
    subspace = aligned(recipe, family, images, codec, say) if start is None else start.subspace
    patch = subspace.config["patch"]
    data = prepare(recipe, family, images, patch, accelerator)
    material = {
        "images to train on": content_key(*data.train.material()),
        "held-out images": content_key(*data.held_out.material()),
        "prompts": content_key(*data.prompts), "subspace": subspace_key(subspace),
    }  # fmt: skip
    if start is not None:
        material["init_from"] = start_key(start)
    on_main(accelerator, lambda: check_same(out, material))
    if main_process:
        sources = [part.source for part in recipe.data.parts()]
        write_json(out / "logs/data.json", {**data.describe(), "sources": sources})

    # Draw the base while its VAE is at hand. A style LoRA has nothing to do with it.
    names = ("scheduler",) if recipe.is_style else ("vae", "transformer", "scheduler")
    parts = on_device(recipe, family, names, device)
    subspace.to(device)
    native = family.latent_shift(parts) * subspace.scale.item()
    shift = native if recipe.noise.shift is None else recipe.noise.shift
    validation = Validation(recipe, data, subspace, codec, accelerator)
    if not recipe.is_style:
        base_pictures = validation.draw("base samples", "base", validation.base_drawer(family, parts))
        validation.keep("latent base", "latent base", base_pictures)
        parts.vae = None

    # What is trained, and the frozen reference beside it.
    if train.base_weights != "full":
        parts.transformer = None
        free_memory()
    network = build_student(
        recipe, family, subspace, start, lambda: parts.transformer or load_transformer(recipe, family), device
    )
    reference = None
    if recipe.lora is None and recipe.loss.variance_reduction:
        reference = trainable.frozen_reference(parts.transformer, subspace, family.predict)
    else:
        parts.transformer = None  # else the full weights that it shares would outlive sharding
    network.train()
    if train.gradient_checkpointing:
        network.enable_gradient_checkpointing(checkpointed(train.gradient_checkpointing))
    if train.compile:
        compile_blocks(network)
    optimizer = make_optimizer(recipe, trainable.trained_parameters(network), family.TRAINED_ENDS, family.OUTPUT_LAYER)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    if recipe.lora is not None and recipe.loss.variance_reduction:
        reference = trainable.lora_reference(prepared, network, subspace, family.predict)
    parameters = trainable.trained_parameters(network)  # sharded by now, if the run is
    ema = PowerEma(
        parameters.items(), train.ema_gamma, train.ema_start, None if train.ema_device == "same" else train.ema_device
    )
    pipeline = family.pixel_pipeline_class(parts)(
        scheduler=flow_solver(), transformer=network, subspace=subspace, codec=codec,
        **dict.fromkeys(family.TEXT_PARTS), **pipeline_settings(recipe, shift),
    )  # fmt: skip
    model = PixelModel(prepared, subspace, family.predict, pipeline.distilled_guidance)
    say(f"{sum(p.numel() for p in parameters.values()):,} trained parameters, timestep shift {shift:.2f}")

    # Step 0: the lifted base, before any training.
    start_trackers(accelerator, recipe)
    draw_pixels = validation.pixel_drawer(pipeline, network)
    step_0 = validation.draw("step 0 samples", "step_0", draw_pixels)
    validation.keep("step 0", "pixels, step 0", step_0, 0)
    held_out_file = out / "logs/held_out_step_0.json"
    if not held_out_file.is_file():
        network.eval()
        errors = validation.held_out_errors(model)
        network.train()
        if main_process:
            write_json(held_out_file, errors)
    validation.save_grid(0)

    # Resume.
    step = 0
    if checkpoint:
        step, saved, averages, optimizer_state = load_checkpoint(checkpoint)
        restore(parameters, saved, f"checkpoint {checkpoint}")
        restore(ema.average, averages, f"checkpoint {checkpoint}")
        load_optimizer(optimizer, optimizer_state)
        del saved, averages, optimizer_state  # another copy of all that is trained, in every process
        say(f"continuing from {checkpoint.name}")
    log = Log(out, step, accelerator)
    draw_noise = partial(pixel_noise, patch=patch, seed=recipe.seed)
    batches = micro_batches(loader(recipe, data.train, step, accelerator), draw_noise)

    # Train.
    progress = tqdm(
        total=train.steps, initial=step, desc="train", disable=not main_process, dynamic_ncols=True, mininterval=2
    )
    with closing(batches), progress, StopSignal() as stop:
        while step < train.steps:
            set_rates(optimizer, step, train)
            limit = train.clip_norm if step >= train.clip_after else math.inf
            limit_norm(optimizer, limit)
            rows, names = [], []
            for micro in range(train.accumulation):
                batch, noise = next(batches)
                with accelerator.accumulate(prepared):
                    # LoRA dropout; all else is drawn from the samples' serial numbers
                    torch.manual_seed(hash((recipe.seed, step, micro, accelerator.process_index)) % 2**63)
                    terms = training_terms(recipe, model, reference, codec, perceptual, batch, noise, shift, device)
                    accelerator.backward(terms.loss())
                rows.append(terms.rows())
                names += batch.names
            norm = float(whole(accelerator.clip_grad_norm_(parameters.values(), limit)))
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()
            step += 1
            if math.isfinite(norm):
                ema.update(step)
            log.step(step, summarise(accelerator.gather(torch.cat(rows))), norm, optimizer, names, train.max_bad_steps)
            progress.set_postfix(log.postfix(), refresh=False)
            progress.update()

            halted = stop.asked(accelerator)
            if halted or step % train.checkpoint_every == 0 or step == train.steps:
                state = [gather(parameters, main_process), gather(ema.average, main_process)]
                state.append(gather_optimizer(optimizer, main_process))
                if main_process:
                    save_checkpoint(out / "checkpoints", step, *state, train.keep_checkpoints, train.keep_every)
                    write_status(out, "stopped" if halted else "running", step, per_step)
                del state
                accelerator.wait_for_everyone()
            if halted and step < train.steps:
                raise Stopped(f"checkpoint of step {step} of {train.steps} saved")
            if recipe.sample.every and step % recipe.sample.every == 0 and step < train.steps:
                with ema.applied():
                    now = validation.draw(f"step {step} samples", f"step_{step}", draw_pixels, recipe.sample.count)
                validation.save_grid(step, {f"pixels, step {step}": now})
                if main_process:
                    validation.log(step, now)

    # Draw, measure, save: all with the averaged weights.
    with ema.applied():
        finetuned = validation.draw("final samples", f"final_{step}", draw_pixels)
        network.eval()
        errors = validation.held_out_errors(model)
    validation.keep("finetuned", f"pixels, step {step}", finetuned, step)
    validation.save_grid(step)
    averages = gather(ema.average, main_process)
    if main_process:
        held_out = {"step 0": json.loads(held_out_file.read_text()), "finetuned": errors}
        run = {"steps": step, "seconds": round(time.time() - started, 1), "peak_memory_gb": peak_memory_gb(device),
               "skipped_steps": log.skipped}  # fmt: skip
        metrics = {"held_out_error": held_out, **validation.metrics, "run": run}
        settings = {name: pipeline.config[name] for name in pipeline_settings(recipe, shift)}
        result = Result(recipe, step, averages, "ema", subspace.to("cpu"), type(pipeline).__name__, settings)
        save_result(result, family, metrics)
        write_json(out / "metrics.json", metrics)  # now the run counts as finished
        write_status(out, "finished", step, per_step)
        say(summary(metrics, out, result_folder(recipe)))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of which every byte is right.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    found, broken = newest_whole(out / "checkpoints")
    for why in broken:
        print(f"passed over a broken checkpoint: {why}")
    if broken and found is None:
        raise ValueError(f"no checkpoint is whole ({broken[0]}); move {out / 'checkpoints'} away to start at step 0")
    return found


def aligned(recipe: Recipe, family: ModuleType, images: Images, codec: PixelCodec, say) -> PixelSubspace:
    """The recipe's subspace, made now when it is missing and the recipe says `align.mode: auto`."""
    if recipe.align.mode == "auto" and not Path(recipe.align.path).exists():
        report = align(
            recipe.base, family, images, codec, Path(recipe.align.path), recipe.align.num_images,
            recipe.data.resolution, recipe.revision, recipe.seed, recipe.data.latents == "sample",
        )  # fmt: skip
        say(describe(report))
    check_aligned_for(recipe.align.path, codec)
    return load_subspace(recipe.align.path)


if __name__ == "__main__":
    sys.exit(main())
