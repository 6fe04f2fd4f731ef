"""The run folder: who may write there, what was logged, and how a run stops."""

import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from asymflow_ft.recipe import Recipe, load_recipe, plain, save_recipe

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "asymflow-ft")
# A run that continues may change these; anything else would make it another run.
MAY_CHANGE = ("train.steps", "train.checkpoint_every", "train.keep_checkpoints", "sample.every", "output_dir")


def claim(out: Path, recipe: Recipe, main_process: bool) -> None:
    """Make the run folder, or check that the run in it is this one; nothing there is overwritten.

    Raises:
        ValueError: the folder holds a run of another recipe, or cannot be written.
    """
    file = out / "recipe.yaml"
    if file.is_file():
        before, now = _flat(plain(load_recipe(file))), _flat(plain(recipe))
        changed = [key for key in now if now[key] != before.get(key) and key not in MAY_CHANGE]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{out} holds a run with {key}={before.get(key)!r}, and the recipe now says {now[key]!r}"
                f"{f' (and {len(changed) - 1} more differ)' if len(changed) > 1 else ''}; choose another output_dir"
            )
    elif out.is_dir() and any(path.name not in ("subspace", "cache") for path in out.iterdir()):
        raise ValueError(f"{out} holds other files and no recipe.yaml; choose another output_dir")
    if main_process:
        try:
            (out / "logs").mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, file, "resolved recipe; made with " + ", ".join(f"{p} {version(p)}" for p in PACKAGES))
        except OSError as error:
            raise ValueError(f"cannot write to output_dir {out}: {error}") from error


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def finished_steps(out: Path) -> int:
    file = out / "metrics.json"
    return json.loads(file.read_text())["run"]["steps"] if file.is_file() else 0


class StopSignal:
    """Ctrl-C and SIGTERM end the step in hand, so that the checkpoint is of a whole step; a second Ctrl-C ends now."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        tqdm.write("stopping after this step; once more to stop at once", file=sys.stderr)

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop."""
        if accelerator.num_processes == 1:
            return self.seen
        return bool(accelerator.reduce(torch.tensor(float(self.seen), device=accelerator.device)).item())


def cut_log(file: Path, step: int) -> None:
    """Drop the lines of steps that an interrupted run made after its last checkpoint."""
    if file.is_file():
        lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
        file.write_text("".join(line + "\n" for line in lines))
