"""Tensors computed once and kept on disk, by content key, in safetensors shards."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

Storage = Literal["float16", "bfloat16", "float32", "fp8"]
FP8_MAX = 448.0  # largest float8_e4m3fn
SCALE = ".scale"
STALE = 3600  # seconds


def content_key(*parts: object) -> str:
    """A hash of everything that a cached tensor depends on."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def pack(value: Tensor, storage: Storage) -> dict[str, Tensor]:
    """The tensor as it is stored: {"": value} cast, or for "fp8" {"": float8_e4m3fn, ".scale": ()}, value = q * scale.

    Raises:
        ValueError: the value is not finite in this storage.
    """
    value = value.detach().float().cpu()
    scale = value.abs().amax().clamp(min=1e-30) / FP8_MAX
    narrow = (value / scale).to(torch.float8_e4m3fn) if storage == "fp8" else value.to(getattr(torch, storage))
    if not torch.isfinite(narrow.float()).all():
        raise ValueError(
            f"a tensor to be cached as {storage} holds NaN or infinity; check the base and its precision, "
            "or store more exactly (recipe section cache)"
        )
    return {"": narrow.contiguous(), SCALE: scale} if storage == "fp8" else {"": narrow.contiguous()}


def unpack(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The inverse of `pack`: the stored precision, or float32 from fp8."""
    return stored if scale is None else stored.float() * scale


def rounded(value: Tensor, storage: Storage) -> Tensor:
    """The value as it would come back from the cache."""
    stored = pack(value, storage)
    return unpack(stored[""], stored.get(SCALE))


class TensorCache:
    """Tensors by content key.

    A shard holds up to `per_shard` tensors, bears the hash of its keys as its name, and is whole or absent. The keys
    that are missing are cut into shards in the order given, so a run that was killed and started again makes the same
    files as one that was not.
    """

    def __init__(self, folder: Path, storage: Storage, per_shard: int):
        self.folder, self.storage, self.per_shard = folder, storage, per_shard
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part*"):  # of a run that was killed; a younger one may still be written
            if time.time() - part.stat().st_mtime > STALE:
                part.unlink(missing_ok=True)
        self.where: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in shards that other processes wrote.

        Raises:
            ValueError: a shard cannot be read.
        """
        known = set(self.where.values())
        for file in sorted(self.folder.glob("*.safetensors")):
            if file not in known:
                self.where |= dict.fromkeys(self._reader(file).keys(), file)

    def _reader(self, file: Path) -> safe_open:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"the cache file {file} is damaged ({error}); delete it and run again") from error
        return self._open[file]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}  # open files do not travel to data workers

    def __getitem__(self, key: str) -> Tensor:
        file = self.where[key]
        reader = self._reader(file)
        scale = reader.get_tensor(key + SCALE) if key + SCALE in self.where else None
        return unpack(reader.get_tensor(key), scale)

    def missing_shards(self, keys: Sequence[str]) -> list[list[str]]:
        """Keys that are not there yet, without repetitions, cut into shards."""
        missing = [key for key in dict.fromkeys(keys) if key not in self.where]
        return [missing[i : i + self.per_shard] for i in range(0, len(missing), self.per_shard)]

    def write(self, keys: Sequence[str], values: Sequence[Tensor]) -> None:
        """Write one shard.

        Raises:
            ValueError: the disk is full or the folder cannot be written; what is there stays whole.
        """
        stored = {
            key + end: t for key, v in zip(keys, values, strict=True) for end, t in pack(v, self.storage).items()
        }
        file = self.folder / f"{content_key(*keys)}.safetensors"
        part = file.with_suffix(f".part{os.getpid()}")  # several runs may share the cache
        metadata = {"sha256": _digest(stored)}  # one entry: safetensors writes several in a random order
        try:
            save_file(stored, part, metadata=metadata)
            part.replace(file)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise ValueError(
                f"cannot write the cache file {file}: {error}. Free some space, or put the cache elsewhere with "
                "cache.folder=FOLDER; what is cached so far is kept"
            ) from error
        self.where |= dict.fromkeys(stored, file)

    def fill(
        self,
        shards: Sequence[Sequence[str]],
        values: Callable[[Sequence[str]], Sequence[Tensor]],
        desc: str,
        show: bool,
    ) -> None:
        """Compute and write `shards`; `values` gives the tensors of a shard's keys."""
        with tqdm(total=sum(map(len, shards)), desc=desc, disable=not show, mininterval=1) as progress:
            for keys in shards:
                self.write(keys, values(keys))
                progress.update(len(keys))

    def damaged(self) -> list[str]:
        """A line for each shard whose tensors are not those that were written."""
        lines = []
        for file in tqdm(sorted(set(self.where.values())), desc=f"verify {self.folder.name}", mininterval=1):
            try:
                reader = self._reader(file)
                written = (reader.metadata() or {}).get("sha256")
                if _digest({name: reader.get_tensor(name) for name in reader.keys()}) != written:
                    lines.append(f"{file}: the checksum differs")
            except (OSError, SafetensorError, ValueError) as error:
                lines.append(f"{file}: {error}")
        return lines


def _digest(tensors: dict[str, Tensor]) -> str:
    """Checksum over names and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
