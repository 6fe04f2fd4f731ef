"""What training reads: entries (an image at one size), and batches of pixels, latents and text embeddings."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.data.buckets import Size, bucket_size, fit_image
from asymflow_ft.data.decode import decode
from asymflow_ft.data.scan import Picture
from asymflow_ft.data.source import Images


@dataclass(frozen=True)
class Entry:
    """One usable image at one size: its row in the source, size (width, height), content hash, visits per epoch.

    conditions: the condition images of the row, at sizes of their own. image: 0, or m for the m-th of those. (Neither
    is part of the text form, by which runs from before there were any know their entries.)
    """

    row: int
    size: Size
    digest: str
    weight: float
    image: int = field(default=0, repr=False)
    conditions: tuple["Entry", ...] = field(default=(), repr=False)

    @property
    def bucket(self) -> tuple[Size, ...]:
        """The sizes of all tensors; what is equal in a batch."""
        return (self.size, *(one.size for one in self.conditions))


@dataclass(frozen=True)
class Batch:
    """rgb (B, 3, H, W) in [-1, 1]; z0 latent tokens (B, N, R); embeds (B, L, E), padded with zeros; serial
    numbers of the samples, from which all their randomness follows; what to call the images in a message; and
    condition images with their latent tokens, each like rgb and z0."""

    rgb: Tensor
    z0: Tensor
    embeds: Tensor
    serials: list[int]
    names: list[str]
    references: tuple[Tensor, ...] = ()
    z_references: tuple[Tensor, ...] = ()


class Encoded(Protocol):
    """Where latents and embeddings come from: the cache, or the models themselves."""

    def latents(self, entry: Entry, rgb: Tensor) -> Tensor:
        """Latent tokens (N, R) of an entry with pixels `rgb` (3, H, W); (0, 0) where training needs none."""
        ...

    def embeds(self, caption: str) -> Tensor:
        """Text embedding (L, E)."""
        ...


def make_entries(
    images: Images, pictures: Sequence[Picture], resolutions: Sequence[int], patch: int, held_out: int,
    conditions: Sequence[Sequence[Picture]] = (), condition_resolution: int | None = None,
) -> tuple[list[Entry], list[Entry]]:  # fmt: skip
    """Usable images at each resolution that they fill without being enlarged (or at the smallest).

    Args:
        pictures: what `scan` found, one per row.
        conditions: the same of each row's condition images, all usable where the row is; () if no row has any.
        condition_resolution: theirs; None is that of the entry, so that a picture and its edited copy have one size.

    Returns:
        Training entries, and those of `held_out` images: the ones with the smallest hashes, so neither sorting nor a
        copy under another name moves one into training.

    Raises:
        ValueError: no image is left to train on.
    """
    digests = sorted({picture.digest for picture in pictures if not picture.error})
    kept_back = set(digests[:held_out])
    if not digests[held_out:]:
        raise ValueError(
            f"{len(digests)} different usable images leave none to train on after data.held_out={held_out}; "
            "use more images or hold out fewer"
        )
    train: list[Entry] = []
    test: list[Entry] = []
    for row, picture in enumerate(pictures):
        if picture.error:
            continue
        area = picture.width * picture.height
        filled = [r for r in resolutions if r * r <= area] or [min(resolutions)]
        if picture.digest in kept_back:
            filled = filled[:1]
        for size, resolution in {bucket_size(picture.width, picture.height, r, patch): r for r in filled}.items():
            beside = tuple(
                Entry(row, bucket_size(one.width, one.height, condition_resolution or resolution, patch), one.digest,
                      images.weight(row), number)
                for number, one in enumerate(conditions[row] if conditions else (), 1)
            )  # fmt: skip
            entry = Entry(row, size, picture.digest, images.weight(row), conditions=beside)
            (test if picture.digest in kept_back else train).append(entry)
    return train, test


class PreparedData(Dataset):
    """Entries as training samples. An index is (serial number of the sample, index of the entry).

    Which of several captions a sample gets, and whether it is dropped for the empty one, follow from (seed, serial).
    An image that changed since it was scanned is an error, which `collate` hands on.
    """

    def __init__(
        self, images: Images, entries: Sequence[Entry], encoded: Encoded, seed: int, caption_dropout: float = 0.0
    ):
        self.images, self.entries, self.encoded = images, list(entries), encoded
        self.seed, self.caption_dropout = seed, caption_dropout

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: tuple[int, int]) -> Batch | ValueError:
        serial, entry = index[0], self.entries[index[1]]
        rng = np.random.default_rng((self.seed, serial))
        try:
            captions = self.images.captions(entry.row)
            caption = captions[rng.integers(len(captions))]
            return self._batch(entry, "" if rng.random() < self.caption_dropout else caption, serial)
        except ValueError as error:  # an unreadable image among them
            return ValueError(str(error))

    def first(self, index: int) -> Batch:
        """One entry with its first caption: for measuring."""
        entry = self.entries[index]
        return self._batch(entry, self.images.captions(entry.row)[0], index)

    def _batch(self, entry: Entry, caption: str, serial: int) -> Batch:
        (rgb, z0), *beside = map(self._image, (entry, *entry.conditions))
        return Batch(
            rgb, z0, self.encoded.embeds(caption)[None], [serial], [self.images.name(entry.row)],
            tuple(rgb for rgb, _ in beside), tuple(z for _, z in beside),
        )  # fmt: skip

    def _image(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Pixels (1, 3, H, W) and latent tokens (1, N, R)."""
        name, content = self.images.name(entry.row, entry.image), self.images.content(entry.row, entry.image)
        if hashlib.sha256(content).hexdigest() != entry.digest:
            raise ValueError(f"{name} changed since the run looked at it; start the command again to take it in anew")
        rgb = rgb_tensor(fit_image(decode(content, name), entry.size))
        return rgb[None], self.encoded.latents(entry, rgb)[None].float()

    def material(self) -> list[Entry]:
        """All that training reads: the entries, then their condition images."""
        return [*self.entries, *(one for entry in self.entries for one in entry.conditions)]

    def picture(self, index: int) -> Image.Image:
        """An entry's image at its size."""
        entry = self.entries[index]
        return fit_image(decode(self.images.content(entry.row), self.images.name(entry.row)), entry.size)


def collate(items: Sequence[Batch | ValueError]) -> Batch | ValueError:
    """One batch of single samples, or the first error among them (a data worker cannot raise it readably)."""
    batches: list[Batch] = []
    for item in items:
        if isinstance(item, ValueError):
            return item
        batches.append(item)
    return Batch(
        rgb=torch.cat([batch.rgb for batch in batches]),
        z0=torch.cat([batch.z0 for batch in batches]),
        embeds=pad_sequence([batch.embeds[0] for batch in batches], batch_first=True),
        serials=[batch.serials[0] for batch in batches],
        names=[batch.names[0] for batch in batches],
        references=_stack([batch.references for batch in batches]),
        z_references=_stack([batch.z_references for batch in batches]),
    )


def _stack(samples: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The m-th condition images of all samples as one tensor, for each m."""
    return tuple(torch.cat(column) for column in zip(*samples, strict=True))
