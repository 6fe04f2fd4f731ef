"""asymflow-ft: align, finetune and sample from the command line. Parses, calls, prints."""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from asymflow_ft import finetune
from asymflow_ft.align import align, describe
from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import NEGATIVE_PROMPT
from asymflow_ft.data.source import open_source
from asymflow_ft.evaluation.pictures import contact_sheet
from asymflow_ft.families import family_of, load_pixel_pipeline
from asymflow_ft.recipe import load_recipe
from asymflow_ft.training.stages import read_prompts

EXAMPLES = """examples:
  asymflow-ft align --recipe recipes/flux2_klein.yaml
  asymflow-ft align --base black-forest-labs/FLUX.2-klein-base-4B --data my_images --out outputs/klein/subspace
  asymflow-ft finetune recipes/tiny/finetune.yaml train.steps=300
  asymflow-ft sample --pipeline outputs/tiny/pipeline --prompt "red apple" --prompt "rocket" --sheet
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 after a message about what the user can mend, 130 after Ctrl-C."""
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
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

    one = commands.add_parser(
        "align", help="fit the pixel subspace of a base from images",
        description="Fit basis and scale from images and their VAE latents (orthogonal Procrustes). Writes the "
        "subspace, report.json and report.png. Under `accelerate launch -m asymflow_ft.cli align ...` processes share "
        "the images.",
    )  # fmt: skip
    one.set_defaults(run=run_align)
    one.add_argument("--recipe", help="take base, data, out and pixel space from a recipe; other options override it")
    one.add_argument("--base", help="Hub id or folder of a diffusers pipeline")
    one.add_argument("--revision", help="revision of the base on the Hub")
    one.add_argument("--data", help="image folder or Hub dataset; captions are not needed")
    one.add_argument("--image-column", help="column of a dataset that holds the images (default: image)")
    one.add_argument("--out", type=Path, help="folder for the subspace and its report")
    one.add_argument("--num-images", type=int, help="images to use, drawn at random (default: 1000)")
    one.add_argument(
        "--resolution", type=int, help="images are resized to about this many pixels squared (default: 1024)"
    )
    one.add_argument("--seed", type=int, help="choice of images and posterior samples (default: 0)")

    two = commands.add_parser(
        "finetune", help="finetune a base into a pixel model",
        description="The same as `python asymflow_ft/finetune.py`: one process. For several GPUs use "
        "`accelerate launch asymflow_ft/finetune.py RECIPE`.",
    )  # fmt: skip
    two.set_defaults(run=run_finetune)
    two.add_argument("recipe", help="a YAML file; docs/recipes.md lists its keys")
    two.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a recipe value")
    two.add_argument("--dry-run", action="store_true", help="validate, print what would run, and stop")

    three = commands.add_parser("sample", help="draw pictures with a converted pipeline")
    three.set_defaults(run=run_sample)
    three.add_argument("--pipeline", required=True, help="pipeline folder or Hub id")
    three.add_argument("--prompt", action="append", default=[], help="may be given several times")
    three.add_argument("--prompts", help="text file with one prompt a line")
    three.add_argument(
        "--negative", default=NEGATIVE_PROMPT, help='negative prompt; "" for none (default: %(default)s)'
    )
    three.add_argument("--steps", type=int, default=38, help="solver steps (default: 38)")
    three.add_argument("--guidance", type=float, default=4.0, help="guidance scale; 1 turns it off (default: 4)")
    three.add_argument("--shift", type=float, help="timestep shift (default: the pipeline's own for the size)")
    three.add_argument("--height", type=int, help="pixels (default: the pipeline's own)")
    three.add_argument("--width", type=int, help="pixels (default: the pipeline's own)")
    three.add_argument("--seed", type=int, default=0, help="picture i of the run uses seed + i (default: 0)")
    three.add_argument("--per-prompt", type=int, default=1, help="pictures per prompt (default: 1)")
    three.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures (default: samples)")
    three.add_argument("--sheet", action="store_true", help="also write sheet.png with all pictures and prompts")
    three.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    return parser


def run_align(args: argparse.Namespace) -> None:
    recipe = load_recipe(args.recipe) if args.recipe else None
    chosen = {
        "base": args.base or (recipe and recipe.base),
        "data": args.data or (recipe and recipe.data.source),
        "out": args.out or (recipe and Path(recipe.align.path)),
    }
    missing = [f"--{name}" for name, value in chosen.items() if not value]
    if missing:
        raise ValueError(f"align needs {', '.join(missing)}, or --recipe")
    base, out = str(chosen["base"]), Path(chosen["out"])
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a subspace; remove it or choose another --out")
    resolution = args.resolution or (recipe.data.resolution if recipe else 1024)
    num_images = args.num_images or (recipe.align.num_images if recipe else 1000)
    if min(resolution, num_images) < 1:
        raise ValueError(f"--resolution {resolution} and --num-images {num_images} must be positive")
    revision = args.revision or (recipe.revision if recipe else None)
    column = args.image_column or (recipe.data.image_column if recipe else "image")
    source = open_source(str(chosen["data"]), recipe.data.split if recipe else "train", column, None)
    codec = PixelCodec(recipe.pixels.space, recipe.pixels.mean, recipe.pixels.std) if recipe else PixelCodec()
    seed = args.seed if args.seed is not None else (recipe.seed if recipe else 0)
    family = family_of(base, revision)
    report = align(base, family, source, codec, out, num_images, resolution, revision, seed)
    if PartialState().is_main_process:
        print(describe(report))
        print(f"subspace, report.json and report.png in {out}")


def run_finetune(args: argparse.Namespace) -> int:
    return finetune.main([args.recipe, *args.overrides, *(["--dry-run"] if args.dry_run else [])])


def run_sample(args: argparse.Namespace) -> None:
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise ValueError("nothing to draw: give --prompt or --prompts FILE")
    device = PartialState().device
    default = "float32" if device.type == "cpu" else "bfloat16"
    pipeline = load_pixel_pipeline(args.pipeline, getattr(torch, args.dtype or default)).to(device)
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


if __name__ == "__main__":
    sys.exit(main())
