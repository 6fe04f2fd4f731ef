"""asymflow-ft: the commands and their arguments."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  asymflow-ft families
  asymflow-ft align --recipe recipes/tiny/finetune.yaml
  asymflow-ft align --base recipes/tiny/base --data my_images --resolution 128 --out outputs/subspace
  asymflow-ft cache --recipe recipes/tiny/finetune.yaml --verify
  asymflow-ft finetune recipes/tiny/finetune.yaml data.source=my_images --dry-run --card 24
  asymflow-ft finetune recipes/tiny/finetune.yaml train.steps=300
  asymflow-ft synthesize --base recipes/tiny/base --prompts recipes/tiny/data/prompts.txt --num 16 --out outputs/drawn
  asymflow-ft export outputs/tiny --form adapter --out outputs/tiny_adapter
  asymflow-ft sample --pipeline outputs/tiny/pipeline --prompt "red apple" --prompt "rocket" --sheet
  asymflow-ft evaluate --pipeline outputs/tiny --against recipes/tiny/base --prompts recipes/tiny/data/prompts.txt \\
      --real recipes/tiny/data --out outputs/evaluated
  asymflow-ft push outputs/exported --repo user/name --dry-run
  asymflow-ft demo outputs/tiny/pipeline --base recipes/tiny/base
  asymflow-ft compare-runs outputs/tiny outputs/other --out outputs/runs.png
  asymflow-ft bench step --arch tiny --out outputs/bench
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 after a message about what the user can mend, 130 after Ctrl-C."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if args.command in ("finetune", "cache"):  # argparse ends the list of overrides at the first option after it
        args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        from asymflow_ft.commands import run  # seconds of imports, which --help and a typing error need not wait for
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return run(args)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asymflow-ft", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES,
        description="Turn a pretrained latent flow transformer into a pixel-space AsymFlow text-to-image model.",
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "families", help="list the bases that can be converted, or say whether one can",
        description="List the families of bases with their latents, known bases and licences, and what is tested.",
    )  # fmt: skip
    command.add_argument("base", nargs="?", help="Hub id or folder to look at: its family, or why it has none")
    command.add_argument("--revision", help="revision of the base on the Hub")

    command = commands.add_parser(
        "align", help="fit the pixel subspace of a base from images",
        description="Fit basis and scale from images and their VAE latents (orthogonal Procrustes). Writes the "
        "subspace, report.json and report.png. Under `accelerate launch -m asymflow_ft.cli align ...` processes share "
        "the images.",
    )  # fmt: skip
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
    command.add_argument("--recipe", required=True, help="the recipe that will be trained")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a recipe value; give the same to finetune"
    )
    command.add_argument(
        "--verify", action="store_true", help="also check every shard and image, and encode a sample of them anew"
    )

    command = commands.add_parser(
        "sample", help="draw pictures with a converted model",
        description="Draw a picture per prompt, OUT/00000.png and so on after the seed; files are never overwritten.",
    )  # fmt: skip
    command.add_argument(
        "--pipeline", required=True, help="converted model of any form (folder or Hub id), released adapter, or run"
    )
    command.add_argument("--base", help="latent base of an adapter or merged model (default: the one it names)")
    command.add_argument(
        "--lora", action="append", default=[], metavar="PATH[=WEIGHT]",
        help="style LoRA (folder, file or Hub id) with its weight (default: 1); may be given several times",
    )  # fmt: skip
    command.add_argument("--prompt", action="append", default=[], help="may be given several times")
    command.add_argument("--prompts", help="text file with one prompt a line")
    command.add_argument(
        "--negative", help='negative prompt; "" for none (default: "Low quality, worst quality, ...")'
    )
    command.add_argument("--steps", type=int, default=38, help="solver steps (default: 38)")
    command.add_argument(
        "--guidance", type=float, help="guidance scale; 1 turns it off (default: 4, or 1 if the base is distilled)"
    )
    command.add_argument(
        "--batch-guidance", action="store_true",
        help="with and without the prompt in one call of the network where memory allows; small pictures are faster",
    )  # fmt: skip
    command.add_argument(
        "--compile", action="store_true",
        help="torch.compile the network's repeated blocks: a far longer first step, then faster ones",
    )  # fmt: skip
    command.add_argument("--shift", type=float, help="timestep shift (default: the pipeline's own for the size)")
    command.add_argument(
        "--image", action="append", default=[], type=Path, metavar="FILE",
        help="condition image for every prompt, for models trained with them; may be given several times",
    )  # fmt: skip
    command.add_argument("--height", type=int, help="pixels (default: of the first --image, or the pipeline's own)")
    command.add_argument("--width", type=int, help="pixels (default: of the first --image, or the pipeline's own)")
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
        "export", help="write a converted model in a form that others can load",
        description="Write a run, one of its checkpoints, or a converted model of any form as a folder of another "
        "form; docs/formats.md says what each holds.",
    )  # fmt: skip
    command.add_argument(
        "source", help="run, checkpoint, exported folder, adapter (folder or .safetensors file), or Hub id"
    )
    command.add_argument("--out", type=Path, required=True, help="new folder")
    command.add_argument(
        "--form", required=True, choices=("pipeline", "adapter", "merged", "lora"), help="pipeline: loads in stock "
        "diffusers with trust_remote_code. adapter: the released format, also ComfyUI's. merged: plain transformer "
        "and subspace. lora: of a run that trains a style LoRA",
    )  # fmt: skip
    command.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=None,
        help="averaged weights of a run, or those of its last step (default: averaged)",
    )  # fmt: skip
    command.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the transformer (default: as trained or "
        "stored). The adapter beside it is float16, as released, or float32",
    )  # fmt: skip
    command.add_argument("--base", help="latent base of an adapter or merged model (default: the one it names)")
    command.add_argument("--revision", help="revision of that base")
    command.add_argument("--shard-size", default="5GB", help="most that one file holds (default: %(default)s)")

    command = commands.add_parser(
        "synthesize", help="draw a training set with the latent base itself",
        description="Draw pictures of a base with their exact latents and captions. The same command continues after "
        "an interruption, a larger --num adds pictures. Under `accelerate launch -m asymflow_ft.cli synthesize ...` "
        "processes share the work.",
    )  # fmt: skip
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
        "evaluate", help="say whether a converted model is better than its base, and at what cost",
        description="Draw the same prompts from the same noise with several models, measure, and write "
        "OUT/report.html (docs/evaluation.md). The same command continues after an interruption; more prompts and "
        "more --against draw only what is missing. Under `accelerate launch -m asymflow_ft.cli evaluate ...` "
        "processes share the work.",
    )  # fmt: skip
    command.add_argument(
        "--pipeline", required=True, metavar="[NAME=]MODEL",
        help="the model in question: converted, of any form that `sample` takes, or a latent pipeline",
    )  # fmt: skip
    command.add_argument(
        "--against", action="append", default=[], metavar="[NAME=]MODEL",
        help="what to hold it against, such as its latent base; may be given several times",
    )  # fmt: skip
    command.add_argument(
        "--prompts", required=True, metavar="SPEC", help="text file with one prompt a line, .jsonl file, "
        "geneval:FILE, dpg:FOLDER or hpsv3:FILE",
    )  # fmt: skip
    command.add_argument("--out", type=Path, required=True, help="folder for pictures, results and report")
    command.add_argument(
        "--real", metavar="SOURCE", help="real images, a source as in docs/data.md or a recipe with one; those whose "
        "caption is a prompt are compared with its pictures",
    )  # fmt: skip
    command.add_argument("--num", type=int, help="so many of the prompts, of all categories alike (default: all)")
    command.add_argument("--per-prompt", type=int, help="pictures per prompt (default: 1, 4 where a suite wants them)")
    command.add_argument("--size", type=int, help="side of all pictures in pixels (default: each model's own)")
    command.add_argument("--steps", type=int, default=38, help="solver steps (default: 38)")
    command.add_argument(
        "--guidance", type=float, help="guidance scale; 1 turns it off (default: 4, or 1 if the base is distilled)"
    )
    command.add_argument("--negative", default="", help="negative prompt (default: none)")
    command.add_argument("--shift", type=float, help="timestep shift of pixel models (default: each one's own)")
    command.add_argument("--seed", type=int, default=0, help="a picture's noise depends on it (default: 0)")
    command.add_argument("--batch-size", type=int, default=4, help="pictures drawn together (default: 4)")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    command.add_argument("--metrics", help="names with commas between (default: all that can be measured)")
    command.add_argument(
        "--features", help="what FID and KID see: pixels, inception, clip:ID, dinov2:ID, vision:ID or file.py:function"
    )

    command = commands.add_parser(
        "push", help="publish an exported model on the Hugging Face Hub",
        description="Send an exported folder to the Hub, with a model card and what the base's licence asks for "
        "(docs/hub.md). The same command continues after an interruption. The token comes from `hf auth login`.",
    )  # fmt: skip
    command.add_argument("folder", help="what `asymflow-ft export` wrote")
    command.add_argument("--repo", required=True, help="user/name or organisation/name; created if missing")
    command.add_argument("--private", action="store_true", help="create the repository as a private one")
    command.add_argument(
        "--dry-run", action="store_true", help="list the files, print the card, send and write nothing"
    )

    command = commands.add_parser(
        "demo", help="draw with a converted model in the browser",
        description="Serve a page that draws with a converted model and shows every step, beside its latent base if "
        "given. Needs `pip install 'asymflow-ft[demo]'`.",
    )  # fmt: skip
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

    command = commands.add_parser(
        "compare-runs", help="draw the curves of several training runs into one picture",
        description="Draw loss, held-out errors and metrics of training runs, finished or not, and print their final "
        "figures and the recipe keys in which they differ.",
    )  # fmt: skip
    command.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="output_dir of a finetune")
    command.add_argument(
        "--out", type=Path, required=True, metavar="PICTURE.png",
        help="replaced if it is there and of this command; another picture is not",
    )  # fmt: skip

    command = commands.add_parser(
        "bench", help="measure speed and memory",
        description="Measure with random weights, without a download: a training step, its memory alone, aligning, "
        "the cache, drawing in pixels against drawing in latents, or what these reach of the toolkit's own targets. "
        "Prints a table; --out gets bench.json and chart.png. docs/performance.md says what the rows mean.",
        argument_default=argparse.SUPPRESS,  # so that an option is seen to be given
    )  # fmt: skip
    command.add_argument("what", choices=("step", "memory", "align", "cache", "sample", "targets"))
    command.add_argument(
        "--arch", default="tiny", help="tiny, 100m, klein-4b, klein-9b, or a transformer's config.json (default: tiny)"
    )
    command.add_argument("--resolution", type=int, help="pixels (default: tiny 128, 100m 256, else 1024)")
    command.add_argument("--batch", type=int, help="pictures at a time (default: 1)")
    command.add_argument("--precision", choices=("bf16", "no"), help="default: bf16 on a GPU, no on a CPU")
    command.add_argument("--quant", choices=("full", "int8", "nf4"), help="base weights (default: full)")
    command.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks")
    command.add_argument("--batch-guidance", action="store_true", help="of `sample`: as its option of this name")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--rank", type=int, help="of the LoRA (default: 256)")
    group.add_argument("--full", action="store_const", const=None, dest="rank", help="train all weights")
    command.add_argument(
        "--checkpointing", choices=("all", "selective", "none"),
        help="what the backward pass computes again (default: all)",
    )  # fmt: skip
    command.add_argument(
        "--no-reference", action="store_false", dest="reference", help="plain flow matching, without the frozen base"
    )
    command.add_argument("--perceptual", choices=("vgg", "none"), help="default: vgg")
    command.add_argument(
        "--optimizer", choices=("adamw8bit", "adamw"), help="default: adamw8bit on a GPU, adamw on a CPU"
    )
    command.add_argument(
        "--images", type=int, help="pictures to align (default: 16), or entries of the largest cache (default: 10000)"
    )
    command.add_argument(
        "--sweep", metavar="OPTION=A,B,C", default=None,
        help="of `step` and `memory`: at several values of resolution, batch or rank, and how the cost grows with it",
    )  # fmt: skip
    command.add_argument("--repeats", type=int, help="measured repetitions (default: 10)")
    command.add_argument("--warmup", type=int, help="training steps before those (default: 3)")
    command.add_argument("--out", type=Path, default=None, help="folder for bench.json and chart.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
