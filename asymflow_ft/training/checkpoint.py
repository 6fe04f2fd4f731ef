"""Checkpoints that are whole or absent: written beside, synced, renamed; a manifest tells damage that comes later.

`step-000123/` holds trained.safetensors, ema.safetensors, optimizer.pt, state.json, and manifest.json with their sizes
and sha256. What ends in `.part` is an unfinished write or removal and is never read. `step-000123.old` is a whole
checkpoint that was being replaced by another of the same step when the process was killed; it counts.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from asymflow_ft.training.distributed import shard_like

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d+)(\.old)?")
HASH_BLOCK = 2**22  # bytes


def save_checkpoint(
    folder: Path,
    step: int,
    trained: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: dict[str, Any],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write checkpoints/step-000123, in place of an earlier one of that step, and remove what is too old.

    A crash at any instant leaves the earlier checkpoints as they were.

    Args:
        keep: whole checkpoints that stay, 1 or more. keep_every: steps that are a multiple of it stay as well.
            Broken checkpoints, and those beyond `step` that the run has fallen back behind, neither count nor go.

    Raises:
        ValueError: the disk lacks the space, or writing failed; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:06d}"
    part, old = folder / f"{final.name}.part", folder / f"{final.name}.old"
    needed = _tensor_bytes([trained, ema, optimizer])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("step-*.part"):
            shutil.rmtree(stale)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"the checkpoint {final} needs {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB free; "
                "nothing was written and the earlier checkpoints are untouched. Free some space (delete the oldest "
                f"and lower train.keep_checkpoints, now {keep}: a save needs room for one more) and run the same "
                "command again"
            )
        part.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in trained.items()}, part / "trained.safetensors")
        save_file({name: t.cpu().contiguous() for name, t in ema.items()}, part / "ema.safetensors")
        torch.save(optimizer, part / "optimizer.pt")
        (part / "state.json").write_text(json.dumps({"step": step}) + "\n")
        (part / MANIFEST).write_bytes(_manifest(_describe(part)))
        for written in (*part.iterdir(), part):
            _sync(written)
        if final.exists() and verify_checkpoint(final) is None:
            _discard(old)
            final.rename(old)  # not removed yet: it may be the only whole one
        else:
            _discard(final)
        part.rename(final)
        for parent in (folder, folder.parent):
            _sync(parent)
        _discard(old)
        earlier = [path for path in list_checkpoints(folder) if _step(path) <= step]
        for path in [path for path in earlier if verify_checkpoint(path, contents=False) is None][:-keep]:
            if keep_every is None or _step(path) % keep_every:
                _discard(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(
            f"could not save the checkpoint {final}: {error}. Earlier checkpoints are untouched; "
            "if the disk is full, free some space, and run the same command to continue from the newest"
        ) from error
    return final


def write_json(file: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(file)


def write_whole(file: Path, content: bytes, writer: str = "") -> None:
    """Write a file whole or not at all. `writer`: keeps processes apart that may write the same file.

    Raises:
        ValueError: it cannot be written.
    """
    part = file.with_name(f"{file.name}{writer}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(file)
    except OSError as error:
        raise ValueError(
            f"could not write {file}: {error}. What is finished is whole; free some space and run the same command"
        ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have a manifest, oldest first. Cheap: `verify_checkpoint` looks inside."""
    return [path for path in _folders(folder) if (path / MANIFEST).is_file()]


def verify_checkpoint(path: Path, contents: bool = True) -> str | None:
    """None for a whole checkpoint, otherwise a sentence naming the broken file. `contents` False: sizes alone."""
    name = MANIFEST
    try:
        written = (path / MANIFEST).read_bytes()
        files = json.loads(written)["files"]
        if written != _manifest(files):
            return f"{path / name} is damaged"
        for name, entry in files.items():
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{path / name} has {size:,} bytes instead of {entry['size']:,}"
        if contents:
            for name, entry in files.items():
                if _sha256(path / name) != entry["sha256"]:
                    return f"{path / name} does not hold what was written (sha256 differs)"
    except FileNotFoundError:
        return f"{path / name} is missing"
    except OSError as error:
        return f"{path / name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{path / name} is damaged"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of which every byte is right, and a sentence about each newer one that is broken."""
    broken: list[str] = []
    for path in reversed(_folders(folder)):
        why = verify_checkpoint(path)
        if why is None:
            return path, broken
        broken.append(why)
    return None, broken


def load_checkpoint(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(step, trained tensors, EMA tensors, optimizer state) of a checkpoint folder."""
    step = json.loads((path / "state.json").read_text())["step"]
    optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    return step, load_file(path / "trained.safetensors"), load_file(path / "ema.safetensors"), optimizer


@torch.no_grad()
def restore(parameters: dict[str, Tensor], saved: dict[str, Tensor], what: str) -> None:
    """Copy saved tensors into parameters, which may be sharded; names and shapes must agree exactly.

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
        parameter.copy_(shard_like(saved[name], parameter))


def _folders(folder: Path) -> list[Path]:
    """Everything named as a checkpoint, oldest first; `step-N.old` comes before `step-N`."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.suffix != ".old"))


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def _describe(part: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 by file name."""
    return {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(part.iterdir())}


def _manifest(files: dict[str, dict[str, Any]]) -> bytes:
    """The one text of a manifest; its own hash tells a damaged manifest from a damaged file."""
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256": own}, indent=2) + "\n").encode()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    label = f"checking {file.parent.stem}/{file.name}"
    with open(file, "rb") as handle, tqdm(
        total=file.stat().st_size, desc=label, unit="B", unit_scale=True, delay=2, leave=False
    ) as bar:  # fmt: skip
        while block := handle.read(HASH_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    """Remove a folder, if there is one; its name goes first, so that a kill leaves no half of it under that name."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f"{path.name}.gone.part")))
