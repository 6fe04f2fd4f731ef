"""Images at bucket sizes, their latents and their captions' embeddings: computed once, cached on disk."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from asymflow_ft.data.source import Source, UnreadableImage


def bucket_size(width: int, height: int, resolution: int, patch: int) -> tuple[int, int]:
    """(width, height) in multiples of the patch, near resolution**2 pixels, near the image's aspect ratio."""
    ratio = math.sqrt(width / height)
    return tuple(max(round(resolution * side / patch), 1) * patch for side in (ratio, 1 / ratio))  # type: ignore[return-value]


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize (Lanczos) to cover `size` = (width, height) and crop the centre; the aspect ratio is kept."""
    factor = max(size[0] / image.width, size[1] / image.height)
    scaled = (max(round(image.width * factor), size[0]), max(round(image.height * factor), size[1]))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def content_key(*parts: object) -> str:
    """A short hash of everything that a cached tensor depends on."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


class TensorCache:
    """One safetensors file per tensor; a file is complete or absent."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return (self.folder / f"{key}.safetensors").is_file()

    def __getitem__(self, key: str) -> Tensor:
        return load_file(self.folder / f"{key}.safetensors")["value"]

    def __setitem__(self, key: str, value: Tensor) -> None:
        part = self.folder / f"{key}.part"
        save_file({"value": value.detach().cpu().contiguous()}, part)
        part.replace(self.folder / f"{key}.safetensors")


@dataclass(frozen=True)
class Entry:
    """One usable image: its row in the source, its bucket (width, height), and its cache keys."""

    row: int
    size: tuple[int, int]
    latents: str
    text: str


@dataclass(frozen=True)
class Batch:
    """rgb (B, 3, H, W) in [-1, 1]; z0 latent tokens (B, N, R); embeds (B, L, E); indices into the data set."""

    rgb: Tensor
    z0: Tensor
    embeds: Tensor
    indices: list[int]


class PreparedData(Dataset):
    """Entries with what training reads of them. Indexing gives (rgb, z0, embeds) of one image."""

    def __init__(self, source: Source, entries: Sequence[Entry], latents: TensorCache, text: TensorCache):
        self.source, self.entries, self.latents, self.text = source, list(entries), latents, text

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        entry = self.entries[index]
        image, _ = self.source.image(entry.row)
        return (
            to_tensor(fit_image(image, entry.size)),
            self.latents[entry.latents].float(),
            self.text[entry.text],
            index,
        )


def collate(items: list[tuple[Tensor, Tensor, Tensor, int]]) -> Batch:
    rgb, z0, embeds, indices = zip(*items, strict=True)
    return Batch(torch.stack(rgb), torch.stack(z0), torch.stack(embeds), list(indices))


def prepare_images(
    source: Source,
    resolution: int,
    patch: int,
    fingerprint: str,
    cache: TensorCache,
    text_key: Callable[[str], str],
    encode: Callable[[Tensor], Tensor],
    show: bool = True,
) -> tuple[list[Entry], list[str]]:
    """Find every image's bucket and cache its latents.

    Args:
        fingerprint: names the VAE; part of the cache key. encode: RGB (1, 3, H, W) in [-1, 1] -> tokens (1, N, R).

    Returns:
        Entries in source order, and a line for each image that could not be read.

    Raises:
        ValueError: no image could be read.
    """
    entries, unreadable = [], []
    captions = source.captions()
    for row in tqdm(range(len(source)), desc="latents", disable=not show, mininterval=1):
        try:
            image, digest = source.image(row)
        except UnreadableImage as error:
            unreadable.append(str(error))
            continue
        size = bucket_size(*image.size, resolution, patch)
        key = content_key(fingerprint, digest, size)
        if key not in cache:
            # seeded by content: the posterior sample does not depend on order or on an interruption
            torch.manual_seed(int(key[:15], 16))
            cache[key] = encode(to_tensor(fit_image(image, size))[None])[0].half()
        entries.append(Entry(row, size, key, text_key(captions[row])))
    if not entries:
        raise ValueError(f"none of the {len(source)} images could be read, first: {unreadable[0]}")
    return entries, unreadable


class BucketBatches(Sampler[list[int]]):
    """Endless batches of equal image size; batch n is a function of the seed and n alone, so any run can resume.

    Every epoch shuffles anew; a bucket's last batch is filled up from its own start.

    Args:
        sizes: bucket of each entry. start: index of the first batch of this process. rank, world: this process takes
            every world-th batch.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.batch_size, self.seed, self.start, self.rank, self.world = batch_size, seed, start, rank, world
        self.buckets: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            self.buckets.setdefault(size, []).append(index)
        self.per_epoch = sum(-(-len(items) // batch_size) for items in self.buckets.values())

    def epoch(self, number: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, number))
        batches = []
        for items in self.buckets.values():
            order = [items[i] for i in rng.permutation(len(items))]
            padded = order + [order[i % len(order)] for i in range(-len(order) % self.batch_size)]
            batches += [padded[i : i + self.batch_size] for i in range(0, len(padded), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __iter__(self) -> Iterator[list[int]]:
        n = self.start * self.world + self.rank
        current, batches = -1, []
        while True:
            if n // self.per_epoch != current:
                current = n // self.per_epoch
                batches = self.epoch(current)
            yield batches[n % self.per_epoch]
            n += self.world
