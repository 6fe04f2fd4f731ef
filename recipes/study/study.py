"""The study of docs/results.md, in three commands that each continue what is there:

    python recipes/study/study.py train       # every arm with every seed, one after another
    python recipes/study/study.py evaluate    # draws the held-out prompts with each, and measures
    python recipes/study/study.py report      # docs/results.md

`--smoke` does all three with a few steps and prompts, in outputs/study_smoke.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import starts
from arms import ARMS, OUT, Arm

RECIPE = Path(__file__).parent / "conversion.yaml"
BASE = "recipes/tiny/base"


def run(*command: object) -> None:
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True, env=os.environ | {"TQDM_MININTERVAL": "10"})


def prepare(out: Path) -> None:
    """Data, subspaces, the untrained network and the base's own pictures."""
    data = out / "data"
    if not (data / "train_captions.txt").is_file():
        starts.split_data(data)
    if not (out / "subspaces/rgb").is_dir():
        starts.make_subspaces(data / "train", BASE, out / "subspaces")
    if not (out / "scratch").is_dir():
        starts.make_scratch(BASE, str(out / "subspaces/procrustes"), out / "scratch")
    captions = data / "train_captions.txt"
    run("asymflow_ft.cli", "synthesize", "--base", BASE, "--prompts", captions,
        "--num", len(captions.read_text(encoding="utf-8").splitlines()), "--out", data / "drawn", "--size", 128,
        "--steps", 20, "--max-length", 32, "--batch-size", 8, "--dtype", "bfloat16")  # fmt: skip


def jobs(seeds: int) -> list[tuple[int, Arm]]:
    """Seed by seed, the ladder first: whenever it is stopped, what is there can be compared."""
    return [(seed, arm) for seed in range(seeds) for arm in ARMS if seed < arm.seeds]


def folder_of(out: Path, arm: Arm, seed: int) -> Path:
    return out / "runs" / f"{arm.name}_{seed}"


def train(out: Path, seeds: int, only: str | None) -> None:
    prepare(out)
    for seed, arm in jobs(seeds):
        folder = folder_of(out, arm, seed)
        if (only and only != arm.name) or (folder / "metrics.json").is_file():
            continue
        overrides = [*arm.overrides, f"seed={seed}", f"output_dir={folder}"]
        if arm.latent:
            subprocess.run([sys.executable, RECIPE.with_name("latent_finetune.py"), RECIPE, *overrides], check=True)
        else:
            run("asymflow_ft.cli", "finetune", RECIPE, *overrides)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 100 MB each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "evaluate", "report"))
    parser.add_argument("--out", type=Path, default=Path(OUT))
    parser.add_argument("--seeds", type=int, default=3, help="at most this many of each arm")
    parser.add_argument("--only", help="one arm, by name")
    args = parser.parse_args()
    if args.command == "train":
        train(args.out, args.seeds, args.only)


if __name__ == "__main__":
    main()
