"""The study of docs/results.md, in three commands that each continue what is there:

    python recipes/study/study.py train       # every arm with every seed, one after another
    python recipes/study/study.py evaluate    # draws the held-out prompts with each, and measures
    python recipes/study/study.py report      # tables and pictures for docs/results.md

It needs `pip install -c constraints.txt -e '.[study]'`. `--smoke`: three arms for two steps, to see that it works; in
a folder of its own, with a copy of the page.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import starts
from arms import ARMS, OUT, Arm
from report import PAGE, report

from asymflow_ft.evaluation.results import load_results

RECIPE = Path(__file__).parent / "conversion.yaml"
NETWORKS = Path(__file__).parent / "networks.py"
BASE = "recipes/tiny/base"
FIRST = "e_perceptual"  # what all others are held against
SHIFTS = (0.25, 0.5, 0.75, 1.5, 2.0, 4.0)  # of sampling, as multiples of the rule
METRICS = "kid,fid,feature_distance,picture_error,retrieval_at_5,sharpness,spectrum_error,high_band"
SMOKE_ARMS = ("a_latent", "b_scratch", FIRST)
SMOKE_TRAINING = ("train.steps=2", "train.warmup=0", "sample.steps=2", "data.limit=24", "train.batch_size=2")


def run(*words: object) -> None:
    command = [sys.executable, *(str(word) for word in words)]
    print("+ python", *command[1:], flush=True)
    subprocess.run(command, check=True)


def prepare(out: Path) -> None:
    """Data, subspaces, the untrained network, and pictures that the base draws itself."""
    data = out / "data"
    if not (data / "train_captions.txt").is_file():
        starts.split_data(data)
    if not (out / "subspaces/rgb").is_dir():
        starts.make_subspaces(data / "train", BASE, out / "subspaces")
    if not (out / "scratch").is_dir():
        starts.make_scratch(BASE, str(out / "subspaces/procrustes"), out / "scratch")


def draw_training_set(data: Path) -> None:
    captions = data / "train_captions.txt"
    number = len(captions.read_text(encoding="utf-8").splitlines())
    run("-m", "asymflow_ft.cli", "synthesize", "--base", BASE, "--prompts", captions, "--num", number, "--out",
        data / "drawn", "--size", 128, "--steps", 20, "--max-length", 32, "--batch-size", 8,
        "--dtype", "bfloat16")  # fmt: skip


def chosen(args: argparse.Namespace) -> list[tuple[int, Arm]]:
    """Seed by seed, the ladder first: whenever it is stopped, what is there can be compared."""
    arms = [arm for arm in ARMS if arm.name in SMOKE_ARMS] if args.smoke else ARMS
    return [
        (seed, arm) for seed in range(1 if args.smoke else args.seeds) for arm in arms
        if seed < arm.seeds and args.only in (None, arm.name)
    ]  # fmt: skip


def folder_of(out: Path, arm: Arm, seed: int) -> Path:
    return out / "runs" / f"{arm.name}_{seed}"


def train(args: argparse.Namespace) -> None:
    prepare(args.out)
    for seed, arm in chosen(args):
        folder = folder_of(args.out, arm, seed)
        if (folder / "metrics.json").is_file():
            continue
        if arm.name == "synthetic":
            draw_training_set(args.out / "data")
        overrides = [one.replace(OUT, str(args.out)) for one in (*starts_of(OUT), *arm.overrides)]
        overrides += [*(SMOKE_TRAINING if args.smoke else ()), f"seed={seed}", f"output_dir={folder}"]
        program = [RECIPE.with_name("latent_finetune.py")] if arm.latent else ["-m", "asymflow_ft.cli", "finetune"]
        run(*program, RECIPE, *overrides)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 100 MB each


def starts_of(out: str) -> tuple[str, ...]:
    return (
        f"data.source={out}/data/train", f"cache.folder={out}/cache", f"sample.prompts={out}/data/prompts.txt",
        f"align.path={out}/subspaces/procrustes",
    )  # fmt: skip


def evaluate(args: argparse.Namespace) -> None:
    drawing = ["--steps", 2, "--num", 4, "--batch-size", 4] if args.smoke else ["--steps", 20, "--batch-size", 10]
    shared = [
        "--prompts", args.out / "data/prompts.txt", "--real", args.out / "data/test", "--guidance", 4, "--negative",
        "", "--dtype", "bfloat16", "--metrics", METRICS, "--features", f"{NETWORKS}:features_lite2", *drawing,
    ]  # fmt: skip
    for seed in range(1 if args.smoke else args.seeds):
        trained = [arm for s, arm in chosen(args) if s == seed and (folder_of(args.out, arm, s) / "pipeline").is_dir()]
        models = {arm.name: f"{arm.name}={folder_of(args.out, arm, seed)}/pipeline" for arm in trained}
        if FIRST not in models:
            continue
        first = models.pop(FIRST)
        others = [word for one in (f"base={BASE}", *models.values()) for word in ("--against", one)]
        out = args.out / f"evaluation_{seed}"
        if not has_models(out, {FIRST, "base", *models}):
            run("-m", "asymflow_ft.cli", "evaluate", "--pipeline", first, *others, *shared, "--out", out)
        for factor in () if args.smoke or seed > 1 else SHIFTS:
            shift = factor * starts.rule_shift(BASE, str(args.out / "subspaces/procrustes"))
            out = args.out / f"shift_{factor:g}_{seed}"
            if not has_models(out, {FIRST}):
                run("-m", "asymflow_ft.cli", "evaluate", "--pipeline", first, *shared, "--shift", f"{shift:.4f}",
                    "--out", out)  # fmt: skip


def has_models(evaluation: Path, names: set[str]) -> bool:
    """Whether an evaluation is finished with all of these, so that scoring it again would give the same."""
    file = evaluation / "results.json"
    return file.is_file() and {model.name for model in load_results(file).models} >= names


def write_page(args: argparse.Namespace) -> None:
    page = PAGE
    if args.smoke:
        page = args.out / PAGE.name
        shutil.copy(PAGE, page)
    report(args.out, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "evaluate", "report", "all"))
    parser.add_argument("--out", type=Path, help=f"default: {OUT}, with --smoke {OUT}_smoke")
    parser.add_argument("--seeds", type=int, default=3, help="at most this many of each arm")
    parser.add_argument("--only", help="one arm, by name")
    parser.add_argument("--smoke", action="store_true", help="three arms, two steps, four prompts")
    args = parser.parse_args()
    args.out = args.out or Path(f"{OUT}_smoke" if args.smoke else OUT)
    steps = {"train": train, "evaluate": evaluate, "report": write_page}
    for name, work in steps.items():
        if args.command in (name, "all"):
            work(args)


if __name__ == "__main__":
    main()
