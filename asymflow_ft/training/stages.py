"""What runs before the first step: look at the images, encode captions, encode images; each model freed after its use.

Everything is kept in the cache folder under content keys, so the next start finds it, and `asymflow-ft cache` can do
it beforehand.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.data.buckets import fit_image
from asymflow_ft.data.cache import TensorCache, pack, rounded
from asymflow_ft.data.decode import UnreadableImage, decode
from asymflow_ft.data.prepare import Encoded, Entry, PreparedData, make_entries
from asymflow_ft.data.scan import Picture, read_index, scan, stamp
from asymflow_ft.data.source import Images
from asymflow_ft.recipe import Recipe
from asymflow_ft.textfiles import read_prompts
from asymflow_ft.training.encode import Encoder, FromCache, Live
from asymflow_ft.training.run import on_main

TEXT_SHARD = 64  # captions; about 500 MB in bf16, where an embedding has 512 rows of 7,680
LATENT_SHARD = 256  # images; about 270 MB at 1024x1024


@dataclass(frozen=True)
class Prepared:
    """Training and held-out samples, the sampling prompts, and where all embeddings come from."""

    train: PreparedData
    held_out: PreparedData
    prompts: list[str]
    encoded: Encoded

    def describe(self) -> dict[str, int]:
        """Counts for the run's record."""
        return {
            "samples": len(self.train), "images": len({entry.digest for entry in self.train.entries}),
            "held_out_images": len({entry.digest for entry in self.held_out.entries}),
        }  # fmt: skip


def prepare(recipe: Recipe, family: ModuleType, images: Images, patch: int, accelerator: Accelerator) -> Prepared:
    """Look at all images, then encode what the cache lacks: captions first, then images. Processes share the work.

    Raises:
        ValueError: a resolution that the patch does not divide, too few usable images or too many unusable ones, a
            full disk, a damaged cache file.
    """
    folder, say = recipe.cache_folder, accelerator.print
    resolutions = recipe.data.resolutions()
    for side in resolutions:
        if side <= 0 or side % patch:
            raise ValueError(f"data.resolution {side} is not a multiple of the patch, {patch}")
    if recipe.data.condition_resolution is not None and recipe.data.condition_resolution % patch:
        raise ValueError(
            f"data.condition_resolution {recipe.data.condition_resolution} is not a multiple of the patch, {patch}"
        )
    pictures, conditions = _look(recipe, images, folder, accelerator)
    unreadable = [picture.error for picture in pictures if picture.error]
    train, held_out = make_entries(
        images, pictures, resolutions, patch, recipe.data.held_out, conditions, recipe.data.condition_resolution
    )
    prompts = read_prompts(recipe.sample.prompts)
    encoder = Encoder(recipe, family, accelerator.device)
    encoded: Encoded = Live(encoder)
    if recipe.cache.enabled:
        entries = [*train, *held_out]
        encoded = FromCache(encoder, *_fill(recipe, encoder, images, entries, prompts, accelerator))
        encoder.free()
    data = [
        PreparedData(images, train, encoded, recipe.seed, recipe.train.caption_dropout),
        PreparedData(images, held_out, encoded, recipe.seed),
    ]
    buckets = len({entry.bucket for entry in train})
    say(f"{len(train)} training samples of {len({e.digest for e in train})} images in {buckets} bucket(s), "
        f"{len(held_out)} held out, {len(unreadable)} left out")  # fmt: skip
    return Prepared(*data, prompts, encoded)


def _look(
    recipe: Recipe, images: Images, folder: Path, accelerator: Accelerator
) -> tuple[list[Picture], list[list[Picture]]]:
    """What every row holds, and what its condition images are. A row with an unusable condition image is unusable;
    such rows are listed in unreadable.txt."""
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    try:
        scan(images, own, folder, accelerator.process_index, accelerator.is_main_process)
    except OSError as error:
        raise ValueError(f"cannot write to the cache folder {folder}: {error}; choose another cache.folder") from error
    accelerator.wait_for_everyone()
    index = read_index(folder)
    pictures, conditions = [], []
    for row in range(len(images)):
        found = []
        for image in range(1 + images.conditions(row)):
            if (name := stamp(images, row, image)) not in index:
                raise ValueError(
                    f"{images.name(row, image)} changed while the run looked at it; start the command again"
                )
            found.append(index[name])
        pictures.append(next((picture for picture in found if picture.error), found[0]))
        conditions.append(found[1:])
    errors = [picture.error for picture in pictures if picture.error]
    listing = folder / "unreadable.txt"
    if accelerator.is_main_process:
        listing.unlink(missing_ok=True)
        if errors:
            listing.write_text("\n".join(errors) + "\n", encoding="utf-8")
    if len(errors) > recipe.data.max_unreadable * len(images):
        raise ValueError(
            f"{len(errors)} of {len(images)} images cannot be used, more than data.max_unreadable="
            f"{recipe.data.max_unreadable:g} allows; they are listed in {listing}, first: {errors[0]}"
        )
    if errors:
        accelerator.print(f"left out {len(errors)} unreadable images, listed in {listing}; first: {errors[0]}")
    return pictures, conditions


def _fill(
    recipe: Recipe, encoder: Encoder, images: Images, entries: Sequence[Entry], prompts: Sequence[str],
    accelerator: Accelerator,
) -> tuple[TensorCache, TensorCache]:  # fmt: skip
    """Both caches with all that the run needs."""
    folder = recipe.cache_folder
    text = TensorCache(folder / "text", encoder.text_storage, TEXT_SHARD)
    latents = TensorCache(folder / "latents", recipe.cache.latents, LATENT_SHARD)
    captions = {encoder.keys.of_caption(c): c for c in ("", *prompts)}
    captions |= {encoder.keys.of_caption(c): c for entry in entries for c in images.captions(entry.row)}
    shown = [*entries, *(one for entry in entries for one in entry.conditions)]
    by_key = {encoder.keys.of_image(entry): entry for entry in shown if recipe.loss.variance_reduction}

    def encode_captions(keys: Sequence[str]) -> list[Tensor]:
        return encoder.encode_captions([captions[key] for key in keys])

    def encode_images(keys: Sequence[str]) -> list[Tensor]:
        return [encoder.encode_image(by_key[key], _pixels(images, by_key[key])) for key in keys]

    def values(key: str) -> int:  # in proportion: all embeddings are of one size
        return 1 if key in captions else math.prod(by_key[key].size)

    missing, need = {}, 0.0
    # the text encoder, which takes longer to load, last: it goes on to fill its cache
    for store, keys, encode in ((latents, by_key, encode_images), (text, captions, encode_captions)):
        missing[store] = on_main(accelerator, lambda: store.missing_shards(list(keys)))  # noqa: B023 called at once
        if missing[store]:
            encoder.free()
            wanted = [key for shard in missing[store] for key in shard]
            share = sum(map(values, wanted)) / values(wanted[0])
            need += _estimate(store, len(wanted), share, encode(wanted[:1])[0], accelerator)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(
            f"{folder} has {free / 1e9:.2f} GB free and the cache needs about {need / 1e9:.2f} GB more; "
            "put it elsewhere (cache.folder), halve it (cache.text=fp8), or train without it (cache.enabled=false)"
        )
    accelerator.wait_for_everyone()  # all have seen the same missing keys before any of them is written
    for store, encode in ((text, encode_captions), (latents, encode_images)):
        if missing[store]:
            own = missing[store][accelerator.process_index :: accelerator.num_processes]
            store.fill(own, encode, store.folder.name, accelerator.is_main_process)
            encoder.free()
        accelerator.wait_for_everyone()
        store.refresh()
    return text, latents


def _estimate(cache: TensorCache, count: int, share: float, example: Tensor, accelerator: Accelerator) -> float:
    """Say what a cache will take, and in fp8 what it costs in precision.

    Args:
        count: tensors to write. share: their size as a multiple of the example's.

    Returns:
        Bytes.
    """
    need = share * sum(t.nbytes for t in pack(example, cache.storage).values())
    loss = ""
    if cache.storage == "fp8":
        wide = example.float().cpu()
        loss = f", rounded by {(rounded(wide, 'fp8') - wide).norm() / wide.norm():.1%} (root mean square)"
    accelerator.print(f"caching {count} {cache.folder.name}: {need / 1e9:.2f} GB in {cache.folder}{loss}")
    return need


def _pixels(images: Images, entry: Entry) -> Tensor:
    name, content = images.name(entry.row, entry.image), images.content(entry.row, entry.image)
    if hashlib.sha256(content).hexdigest() != entry.digest:
        raise ValueError(f"{name} changed while the run looked at it; start the command again")
    return rgb_tensor(fit_image(decode(content, name), entry.size))


def verify(prepared: Prepared, encoder: Encoder, samples: int = 16) -> list[str]:
    """What is wrong with a filled cache: damaged shards, images that changed, and stored values that the models do not
    give again (of `samples` entries and captions, spread over the data). Empty if nothing is."""
    stored = prepared.encoded
    if not isinstance(stored, FromCache):
        raise ValueError("cache.enabled is false, so there is no cache to verify")
    faults = stored.text.damaged() + stored.images.damaged()
    images = prepared.train.images
    sound = []
    for entry in tqdm(
        [*prepared.train.material(), *prepared.held_out.material()], desc="verify images", mininterval=1
    ):
        name = images.name(entry.row, entry.image)
        try:
            changed = hashlib.sha256(images.content(entry.row, entry.image)).hexdigest() != entry.digest
        except UnreadableImage as error:
            faults.append(str(error))
            continue
        if changed:
            faults.append(f"{name}: the image changed since it was cached")
        else:
            sound.append(entry)
    chosen = sound[:: max(len(sound) // samples, 1)]
    pairs = [
        (f"latents of {images.name(entry.row, entry.image)}", stored.latents(entry, torch.empty(0)),
         rounded(encoder.encode_image(entry, _pixels(images, entry)), stored.images.storage))
        for entry in (chosen if encoder.recipe.loss.variance_reduction else ())
    ]  # fmt: skip
    captions = dict.fromkeys(["", *prepared.prompts[:samples], *(images.captions(entry.row)[0] for entry in chosen)])
    pairs += [
        (f"embedding of {caption!r}", stored.embeds(caption),
         rounded(encoder.encode_captions([caption])[0], encoder.text_storage)) for caption in captions
    ]  # fmt: skip
    for what, kept, new in pairs:
        if kept.shape != new.shape:
            faults.append(f"{what}: has the shape {tuple(kept.shape)}, not {tuple(new.shape)}")
            continue
        error = (kept.float().cpu() - new.float()).norm() / new.float().norm().clamp(min=1e-12)
        if not error < 0.05:  # another batch size rounds bf16 otherwise; another model is off by far more
            faults.append(f"{what}: differs from what the models give now by {error:.1%}")
    return faults
