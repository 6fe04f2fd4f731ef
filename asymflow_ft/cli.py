"""asymflow-ft: align, cache, synthesize, finetune, sample and demo from the command line. Parses, calls, prints."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from asymflow_ft import demo, finetune
from asymflow_ft.align import align, describe
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import NEGATIVE_PROMPT
from asymflow_ft.data.source import open_sources
from asymflow_ft.evaluation.pictures import contact_sheet
from asymflow_ft.families import family_of, load_pixel_pipeline
from asymflow_ft.recipe import Data, load_recipe
from asymflow_ft.synthesize import Sampling, synthesize
from asymflow_ft.training.encode import Encoder
from asymflow_ft.training.run import process_state
from asymflow_ft.training.stages import prepare, read_prompts, verify

EXAMPLES = """examples:
  asymflow-ft align --recipe recipes/flux2_klein.yaml
  asymflow-ft align --base black-forest-labs/FLUX.2-klein-base-4B --data my_images --out outputs/klein/subspace
  asymflow-ft cache --recipe recipes/tiny/finetune.yaml --verify
  asymflow-ft finetune recipes/flux2_klein.yaml data.source=my_images --dry-run --card 24
  asymflow-ft finetune recipes/tiny/finetune.yaml train.steps=300
  asymflow-ft synthesize --base recipes/tiny/base --prompts recipes/tiny/data/prompts.txt --num 16 --out outputs/drawn
  asymflow-ft sample --pipeline outputs/tiny/pipeline --prompt "red apple" --prompt "rocket" --sheet
  asymflow-ft demo outputs/tiny/pipeline --base recipes/tiny/base
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 after a message about what the user can mend, 130 after Ctrl-C."""
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: {error} (smaller pictures, batches or --dtype bfloat16 need less)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asymflow-ft", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES,
        description="Turn a pretrained latent flow transformer into a pixel-space AsymFlow text-to-image model.",
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "align", help="fit the pixel subspace of a base from images",
        description="Fit basis and scale from images and their VAE latents (orthogonal Procrustes). Writes the "
        "subspace, report.json and report.png. Under `accelerate launch -m asymflow_ft.cli align ...` processes share "
        "the images.",
    )  # fmt: skip
    command.set_defaults(run=run_align)
    command.add_argument(
        "--recipe", help="take base, data, out and pixel space from a recipe; other options override it"
    )
    command.add_argument("--base", help="Hub id or folder of a diffusers pipeline")
    command.add_argument("--revision", help="revision of the base on the Hub")
    command.add_argument(
        "--data", help="a source as in docs/data.md, such as an image folder; captions are not needed"
    )
    command.add_argument("--image-column", help="column of a dataset that holds the images (default: image)")
    command.add_argument("--out", type=Path, help="folder for the subspace and its report")
    command.add_argument("--num-images", type=int, help="images to use, drawn at random (default: 1000)")
    command.add_argument(
        "--resolution", type=int, help="images are resized to about this many pixels squared (default: 1024)"
    )
    command.add_argument(
        "--seed", type=int, help="choice of the images, and of posterior samples (data.latents: sample) (default: 0)"
    )

    command = commands.add_parser(
        "finetune", help="finetune a base into a pixel model",
        description="Finetune in one process, on a GPU or a CPU; for several GPUs use `accelerate launch "
        "asymflow_ft/finetune.py RECIPE` (docs/training.md). The same command continues an interrupted run. Ctrl-C "
        "and SIGTERM save a checkpoint and exit with 75.",
    )  # fmt: skip
    command.set_defaults(run=run_finetune)
    command.add_argument("recipe", help="a YAML file; docs/recipes.md lists its keys")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a recipe value")
    command.add_argument(
        "--dry-run", action="store_true", help="validate, print memory, disk, time, download, and stop"
    )
    command.add_argument("--card", type=float, metavar="GB", help="memory to fit, for --dry-run (default: this GPU's)")
    command.add_argument(
        "--tflops", type=float, help="sustained TFLOP/s per GPU, for --dry-run (default: two examples)"
    )

    command = commands.add_parser(
        "cache", help="encode a recipe's images and captions before training",
        description="Look at every image, then compute latents and text embeddings into the recipe's cache folder. "
        "Finetuning does the same at its start; run it beforehand to see what it costs, on another machine, or under "
        "`accelerate launch -m asymflow_ft.cli cache ...` on several GPUs. Killed, it goes on where it stopped.",
    )  # fmt: skip
    command.set_defaults(run=run_cache)
    command.add_argument("--recipe", required=True, help="the recipe that will be trained")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a recipe value; give the same to finetune"
    )
    command.add_argument(
        "--verify", action="store_true", help="also check every shard and image, and encode a sample of them anew"
    )

    command = commands.add_parser(
        "sample", help="draw pictures with a converted pipeline",
        description="Draw a picture per prompt, OUT/00000.png and so on after the seed; files are never overwritten.",
    )  # fmt: skip
    command.set_defaults(run=run_sample)
    command.add_argument("--pipeline", required=True, help="pipeline folder or Hub id")
    command.add_argument("--prompt", action="append", default=[], help="may be given several times")
    command.add_argument("--prompts", help="text file with one prompt a line")
    command.add_argument(
        "--negative", default=NEGATIVE_PROMPT, help='negative prompt; "" for none (default: %(default)s)'
    )
    command.add_argument("--steps", type=int, default=38, help="solver steps (default: 38)")
    command.add_argument(
        "--guidance", type=float, help="guidance scale; 1 turns it off (default: 4, or 1 if the base is distilled)"
    )
    command.add_argument("--shift", type=float, help="timestep shift (default: the pipeline's own for the size)")
    command.add_argument("--height", type=int, help="pixels (default: the pipeline's own)")
    command.add_argument("--width", type=int, help="pixels (default: the pipeline's own)")
    command.add_argument("--seed", type=int, default=0, help="picture i of the run uses seed + i (default: 0)")
    command.add_argument("--per-prompt", type=int, default=1, help="pictures per prompt (default: 1)")
    command.add_argument(
        "--out", type=Path, default=Path("samples"), help="folder for the pictures (default: samples)"
    )
    command.add_argument("--sheet", action="store_true", help="also write sheet.png with all pictures and prompts")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )

    command = commands.add_parser(
        "synthesize", help="draw a training set with the latent base itself",
        description="Draw pictures of a base with their exact latents and captions. The same command continues after "
        "an interruption, a larger --num adds pictures. Under `accelerate launch -m asymflow_ft.cli synthesize ...` "
        "processes share the work.",
    )  # fmt: skip
    command.set_defaults(run=run_synthesize)
    command.add_argument("--base", required=True, help="Hub id or folder of a diffusers pipeline")
    command.add_argument("--revision", help="revision of the base on the Hub")
    command.add_argument("--prompts", required=True, help="text file with one prompt a line; taken in turn")
    command.add_argument("--num", type=int, required=True, help="pictures in all, those already there included")
    command.add_argument("--out", type=Path, required=True, help="folder for the set")
    command.add_argument("--size", type=int, default=1024, help="about this many pixels squared (default: 1024)")
    command.add_argument(
        "--aspect", action="append", help="width:height, given several times for several (default: 1:1)"
    )
    command.add_argument("--steps", type=int, default=50, help="solver steps (default: 50)")
    command.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: 4)")
    command.add_argument("--seed", type=int, default=0, help="picture i uses seed + i (default: 0)")
    command.add_argument("--max-length", type=int, default=512, help="text tokens, as text.max_length (default: 512)")
    command.add_argument("--batch-size", type=int, default=4, help="pictures drawn together (default: 4)")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )

    command = commands.add_parser(
        "demo", help="draw with a converted model in the browser",
        description="Serve a page that draws with a converted model and shows every step, beside its latent base if "
        "given. Needs `pip install 'asymflow-ft[demo]'`.",
    )  # fmt: skip
    command.set_defaults(run=run_demo)
    command.add_argument("model", metavar="DIR", help="pipeline folder or Hub id")
    command.add_argument("--base", help="latent base to draw beside it from the same noise, a folder or Hub id")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    command.add_argument("--host", help="address to serve on; 0.0.0.0 lets other machines in (default: 127.0.0.1)")
    command.add_argument("--port", type=int, help="default: the first free one from 7860")
    command.add_argument("--share", action="store_true", help="also a public address, through Gradio's servers")
    command.add_argument(
        "--export-space", type=Path, metavar="FOLDER", help="serve nothing; write a Hugging Face Space with this page"
    )
    return parser


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
    if not prompts:
        raise ValueError("nothing to draw: give --prompt or --prompts FILE")
    device = process_state().device
    pipeline = load_pixel_pipeline(args.pipeline, getattr(torch, args.dtype or default_dtype())).to(device)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [prompt for prompt in prompts for _ in range(args.per_prompt)]
    pictures = []
    for i, prompt in enumerate(jobs):
        file = args.out / f"{args.seed + i:05d}.png"
        if file.exists():
            raise ValueError(f"{file} exists; choose another --out or --seed")
        print(f"[{i + 1}/{len(jobs)}] {prompt}")
        picture = pipeline(
            prompt, negative_prompt=args.negative, height=args.height, width=args.width,
            num_inference_steps=args.steps, guidance_scale=args.guidance, shift=args.shift,
            generator=torch.Generator().manual_seed(args.seed + i),
        ).images[0]  # fmt: skip
        picture.save(file)
        pictures.append(picture)
    if args.sheet:
        contact_sheet(pictures, jobs).save(args.out / "sheet.png")
    print(f"{len(pictures)} pictures in {args.out}")


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


def run_demo(args: argparse.Namespace) -> None:
    if args.export_space is None:
        demo.serve(args.model, args.base, args.dtype, args.host, args.port, args.share)
        return
    demo.export_space(args.model, args.export_space, args.base, args.dtype)
    print(f"{args.export_space} is a Space; `hf upload USER/SPACE {args.export_space} --repo-type space` uploads it")


def default_dtype() -> str:
    return "float32" if process_state().device.type == "cpu" else "bfloat16"


if __name__ == "__main__":
    sys.exit(main())
