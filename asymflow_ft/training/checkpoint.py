"""Checkpoints that are whole or absent: written beside, then renamed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_checkpoint(
    folder: Path, step: int, trained: dict[str, Tensor], ema: dict[str, Tensor], optimizer: dict[str, Any], keep: int
) -> Path:
    """Write checkpoints/step-000123 and remove all but the newest `keep`.

    A crash or a full disk on the way leaves only a folder ending in .part, which nothing reads.

    Raises:
        ValueError: the disk is full; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:06d}"
    part = folder / f"{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in trained.items()}, part / "trained.safetensors")
        save_file({name: t.cpu().contiguous() for name, t in ema.items()}, part / "ema.safetensors")
        torch.save(optimizer, part / "optimizer.pt")
        (part / "state.json").write_text(json.dumps({"step": step}) + "\n")
        for file in part.iterdir():  # on disk before the rename makes them count
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    except (OSError, RuntimeError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(
            f"could not write the checkpoint {final}: {error}. Earlier checkpoints are whole; "
            "free some space and run the same command to continue from the newest"
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def write_json(file: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(file)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".part" and (path / "state.json").is_file())


def load_checkpoint(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(step, trained tensors, EMA tensors, optimizer state) of a checkpoint folder."""
    step = json.loads((path / "state.json").read_text())["step"]
    optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    return step, load_file(path / "trained.safetensors"), load_file(path / "ema.safetensors"), optimizer


@torch.no_grad()
def restore(parameters: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy saved tensors into parameters; names and shapes must agree exactly.

    Raises:
        ValueError: they do not; the message lists what differs.
    """
    wrong = sorted(parameters.keys() ^ saved.keys())
    wrong += [name for name in parameters.keys() & saved.keys() if parameters[name].shape != saved[name].shape]
    if wrong:
        raise ValueError(
            f"the {what} does not belong to this recipe: {len(wrong)} tensors differ, such as {wrong[0]}; "
            "use the recipe that made it, or another output_dir"
        )
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
