"""What each command of asymflow-ft does: calls, prints."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from asymflow_ft import demo, finetune
from asymflow_ft.align import align, describe
from asymflow_ft.bench import charts, report
from asymflow_ft.bench.align import bench_align
from asymflow_ft.bench.architectures import find_architecture
from asymflow_ft.bench.cache import bench_cache
from asymflow_ft.bench.limits import Bench
from asymflow_ft.bench.memory import bench_memory
from asymflow_ft.bench.sample import bench_sample
from asymflow_ft.bench.scratch import ended_by_signals
from asymflow_ft.bench.step import bench_step
from asymflow_ft.bench.sweep import bench_sweep, parse_sweep
from asymflow_ft.bench.targets import bench_targets
from asymflow_ft.bench.workload import Options
from asymflow_ft.components.attention import prepare_attention
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.memory import memory_is_full
from asymflow_ft.components.pipelines import NEGATIVE_PROMPT
from asymflow_ft.data.decode import decode
from asymflow_ft.data.source import open_sources
from asymflow_ft.drawing import Drawing
from asymflow_ft.evaluate import Scoring, evaluate
from asymflow_ft.evaluation.compare import compare_runs
from asymflow_ft.evaluation.pictures import contact_sheet
from asymflow_ft.evaluation.suites import load_suite
from asymflow_ft.evaluation.summary import describe as describe_results
from asymflow_ft.export import export_any, load_pixel_pipeline
from asymflow_ft.families import describe_families, family_of
from asymflow_ft.families.base import compile_blocks
from asymflow_ft.hub.forms import add_loras
from asymflow_ft.hub.push import describe_plan, plan_push, push, refusal
from asymflow_ft.recipe import Data, load_recipe
from asymflow_ft.recipe_keys import Checkpointing
from asymflow_ft.synthesize import Sampling, synthesize
from asymflow_ft.textfiles import read_prompts
from asymflow_ft.training.encode import Encoder
from asymflow_ft.training.run import process_state
from asymflow_ft.training.stages import prepare, verify


def run(args: argparse.Namespace) -> int:
    """Run the parsed command `args.command`; 0 on success, 1 after a message about what the user can mend, 130 after
    Ctrl-C."""
    try:
        if args.command in RUN_A_NETWORK:
            prepare_attention()
        return COMMANDS[args.command](args) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        said = str(error) or "out of memory"
        print(f"error: {said} (smaller pictures, batches or --dtype bfloat16 need less)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_families(args: argparse.Namespace) -> None:
    if args.base is None:
        print(describe_families())
        return
    family = family_of(args.base, args.revision)
    family.load_parts(args.base, (), torch.float32, args.revision)  # raises for a distilled one
    print(f"{args.base} can be converted\n\n{describe_families((family,))}")


def run_align(args: argparse.Namespace) -> None:
    recipe = load_recipe(args.recipe) if args.recipe else None
    chosen = {
        "base": args.base or (recipe and recipe.base),
        "data": args.data or recipe,
        "out": args.out or (recipe and Path(recipe.align.path)),
    }
    missing = [f"--{name}" for name, value in chosen.items() if not value]
    if missing:
        raise ValueError(f"align needs {', '.join(missing)}, or --recipe")
    base, out = str(chosen["base"]), Path(chosen["out"])
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a subspace; remove it or choose another --out")
    resolution, num_images = args.resolution, args.num_images
    if resolution is None:
        resolution = recipe.data.resolution if recipe else 1024
    if num_images is None:
        num_images = recipe.align.num_images if recipe else 1000
    if min(resolution, num_images) < 1:
        raise ValueError(f"--resolution {resolution} and --num-images {num_images} must be positive")
    revision = args.revision or (recipe.revision if recipe else None)
    data = recipe.data if recipe else Data()
    if args.data:
        data = replace(data, source=args.data, mix=())
    if args.image_column:
        data = replace(data, image_column=args.image_column)
    with process_state().main_process_first():
        source = open_sources(data, captions=False, stream_folder=recipe.stream_folder if recipe else None)
    codec = PixelCodec(recipe.pixels.space, recipe.pixels.mean, recipe.pixels.std) if recipe else PixelCodec()
    seed = args.seed if args.seed is not None else (recipe.seed if recipe else 0)
    family = family_of(base, revision)
    report = align(base, family, source, codec, out, num_images, resolution, revision, seed, data.latents == "sample")
    if process_state().is_main_process:
        print(describe(report))
        print(f"subspace, report.json and report.png in {out}")


def run_finetune(args: argparse.Namespace) -> int:
    options = ["--dry-run"] if args.dry_run else []
    options += [] if args.card is None else [f"--card={args.card}"]
    options += [] if args.tflops is None else [f"--tflops={args.tflops}"]
    return finetune.main([args.recipe, *args.overrides, *options])


def run_cache(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe, args.overrides)
    if not recipe.cache.enabled:
        raise ValueError("cache.enabled is false in this recipe; there is nothing to cache")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    family = family_of(recipe.base, recipe.revision)
    with accelerator.main_process_first():
        images = open_sources(recipe.data, stream_folder=recipe.stream_folder)
    encoder = Encoder(recipe, family, accelerator.device)
    prepared = prepare(recipe, family, images, encoder.patch, accelerator)
    faults = verify(prepared, encoder) if args.verify and accelerator.is_main_process else []
    accelerator.wait_for_everyone()
    for fault in faults:
        print(fault, file=sys.stderr)
    if args.verify:
        accelerator.print(f"{len(faults)} faults found" if faults else "verified: no fault found")
    accelerator.print(f"the cache is in {recipe.cache_folder}")
    return 1 if faults else 0


def run_sample(args: argparse.Namespace) -> None:
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts or args.per_prompt < 1:
        raise ValueError("nothing to draw: give --prompt or --prompts FILE, and --per-prompt of 1 or more")
    conditions = [decode(file.read_bytes(), str(file)) for file in args.image]
    device = process_state().device
    dtype = getattr(torch, args.dtype or default_dtype())
    pipeline = load_pixel_pipeline(args.pipeline, dtype, args.base).to(device)
    add_loras(pipeline, args.lora)
    if args.compile:
        compile_blocks(pipeline.transformer)
        print("compiling: the first step takes longer, later once more where a prompt has another length")
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    pictures = []
    negative = NEGATIVE_PROMPT if args.negative is None else args.negative
    for i, prompt in enumerate(jobs):
        file = args.out / f"{args.seed + i:05d}.png"
        if file.exists():
            raise ValueError(f"{file} exists; choose another --out or --seed")
        print(f"[{i + 1}/{len(jobs)}] {prompt}")
        picture = pipeline(
            prompt, negative_prompt=negative, height=args.height, width=args.width,
            num_inference_steps=args.steps, guidance_scale=args.guidance, shift=args.shift, image=conditions or None,
            generator=torch.Generator().manual_seed(args.seed + i), batch_guidance=args.batch_guidance,
        ).images[0]  # fmt: skip
        picture.save(file)
        pictures.append(picture)
    if args.sheet:
        contact_sheet(pictures, jobs).save(args.out / "sheet.png")
    print(f"{len(pictures)} pictures in {args.out}")


def run_export(args: argparse.Namespace) -> None:
    dtype = args.dtype and getattr(torch, args.dtype)
    export_any(args.source, args.out, args.form, args.ema, dtype, args.base, args.revision, args.shard_size)
    print(f"{args.form} in {args.out}")


def run_synthesize(args: argparse.Namespace) -> None:
    sampling = Sampling(
        size=args.size, aspects=tuple(args.aspect or ("1:1",)), steps=args.steps, guidance=args.guidance,
        seed=args.seed, max_length=args.max_length, dtype=args.dtype or default_dtype(),
    )  # fmt: skip
    complete = synthesize(
        args.base, family_of(args.base, args.revision), read_prompts(args.prompts), args.out, args.num, sampling,
        args.batch_size, args.revision, say=print,
    )  # fmt: skip
    if complete:
        print(f"{args.num} pictures in {args.out}; README.md there says what they are and may be used for")


def run_evaluate(args: argparse.Namespace) -> int | None:
    how = Drawing(args.steps, args.guidance, args.negative, args.shift, args.seed, args.dtype or default_dtype())
    metrics = args.metrics and tuple(name.strip() for name in args.metrics.split(","))
    scoring = Scoring(args.real, metrics, args.features)
    try:
        results = evaluate(
            args.pipeline, args.against, load_suite(args.prompts), args.out, how, scoring, args.num, args.per_prompt,
            args.size, args.batch_size, say=print,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    if results is not None:
        print(describe_results(results, args.out / "report.html"))
    return None


def run_push(args: argparse.Namespace) -> int:
    plan = plan_push(args.folder, args.repo, args.private)
    if args.dry_run:
        print(describe_plan(plan))
        if reason := refusal(plan):
            print(f"{'warning' if plan.private else 'error'}: {reason}", file=sys.stderr)
        return 1 if plan.problems and not plan.private else 0
    print(f"pushed: {push(plan, say=print)}")
    return 0


def run_demo(args: argparse.Namespace) -> None:
    if args.export_space is None:
        demo.serve(args.model, args.base, args.dtype, args.host, args.port, args.share)
        return
    demo.export_space(args.model, args.export_space, args.base, args.dtype)
    print(f"{args.export_space} is a Space; `hf upload USER/SPACE {args.export_space} --repo-type space` uploads it")


def run_compare_runs(args: argparse.Namespace) -> None:
    print(compare_runs(args.runs, args.out))
    print(f"\ncurves in {args.out}")


def run_bench(args: argparse.Namespace) -> None:
    if args.out is not None and (args.out.is_file() or (args.out / charts.FIGURES).exists()):
        raise ValueError(f"{args.out} is a file, or holds an earlier benchmark; name another folder, or remove it")
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {args.out} cannot be made: {error}; name another folder") from error
    device = process_state().device
    given = {name: value for name, value in vars(args).items() if name in TRAINING | DRAWING | ALIGNING}
    used = BENCH_OPTIONS[args.what]
    if unused := given.keys() - used:
        without, taken = (
            ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names)) for names in (unused, used)
        )
        raise ValueError(f"bench {args.what} has no use for {without}; it takes {taken}")
    key, values = ("", []) if args.sweep is None else parse_sweep(args.sweep)
    if key and args.what not in SWEPT:
        raise ValueError(f"--sweep is of training steps (bench step, bench memory); bench {args.what} cannot take it")
    if key in given:
        raise ValueError(f"--sweep {args.sweep} sets {key}, and another option does so too; leave that out")
    if "checkpointing" in given:
        given["checkpointing"] = CHECKPOINTING[given["checkpointing"]]
    if args.what == "targets" and device.type == "cpu":  # whose VGG would hide all else; docs' figures are without it
        given["perceptual"] = "none"
    if not given.get("reference", True):
        given.setdefault("perceptual", "none")
    options = Options(**{"precision": "no" if device.type == "cpu" else "bf16"} | given)
    on = report.machine(device)
    try:
        architecture = find_architecture(args.arch)
        with ended_by_signals():
            if key:
                result = bench_sweep(BENCHES[args.what], architecture, options, device, key, values)
            else:
                result = BENCHES[args.what](architecture, options, device)
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        raise ValueError(
            f"too little memory: {error}\nA smaller --arch needs less, and so do, where the benchmark takes them, a "
            "smaller --resolution, --batch or --rank, --quant nf4, --optimizer adamw8bit and --perceptual none"
        ) from error
    print(report.TABLES[result["what"]](result))
    if args.out:
        charts.save(args.out, result, on)
        print(f"\nbench.json and chart.png in {args.out}")


def default_dtype() -> str:
    return "float32" if process_state().device.type == "cpu" else "bfloat16"


CHECKPOINTING: dict[str, Checkpointing] = {"all": True, "selective": "selective", "none": False}
ALIGNING = {"resolution", "images", "repeats"}
DRAWING = {"resolution", "batch", "precision", "quant", "compile", "batch_guidance", "repeats"}
TRAINING = {
    "resolution", "batch", "precision", "quant", "compile", "rank", "checkpointing", "reference", "perceptual",
    "optimizer", "repeats", "warmup",
}  # fmt: skip
TARGETS = {"compile", "images", "repeats", "warmup"}  # all else is as the targets say
BENCH_OPTIONS = {
    "step": TRAINING, "memory": TRAINING - {"repeats", "warmup"}, "align": ALIGNING, "cache": TRAINING | {"images"},
    "sample": DRAWING, "targets": TARGETS,
}  # fmt: skip
SWEPT = ("step", "memory")
BENCHES: dict[str, Bench] = {
    "step": bench_step, "memory": bench_memory, "align": bench_align, "cache": bench_cache, "sample": bench_sample,
    "targets": bench_targets,
}  # fmt: skip
RUN_A_NETWORK = {"sample", "synthesize", "evaluate", "demo", "bench"}  # and finetune, which looks itself
COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "families": run_families,
    "align": run_align,
    "finetune": run_finetune,
    "cache": run_cache,
    "sample": run_sample,
    "export": run_export,
    "synthesize": run_synthesize,
    "evaluate": run_evaluate,
    "push": run_push,
    "compare-runs": run_compare_runs,
    "demo": run_demo,
    "bench": run_bench,
}
