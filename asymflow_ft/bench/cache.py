"""The cache: filling it, reading training samples from it, waiting for them, and starting with it full."""

import hashlib
import io
import json
import math
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from asymflow_ft.bench.align import picture_folder
from asymflow_ft.bench.architectures import Architecture, random_vae, vae_on_meta
from asymflow_ft.bench.clock import Stopwatch, Timing, interleaved, measure, own_seconds, peak_memory, summary
from asymflow_ft.bench.growth import fit_growth, sizes_up_to
from asymflow_ft.bench.limits import check_memory
from asymflow_ft.bench.run import accelerator_on, build_run, planned
from asymflow_ft.bench.scratch import scratch_folder
from asymflow_ft.bench.step import time_steps
from asymflow_ft.bench.workload import Options, make_data, make_recipe
from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.data.buckets import fit_image
from asymflow_ft.data.cache import TensorCache, content_key
from asymflow_ft.data.decode import decode
from asymflow_ft.data.prepare import Entry, PreparedData
from asymflow_ft.data.source import open_sources
from asymflow_ft.recipe import Recipe
from asymflow_ft.recipe_keys import Data
from asymflow_ft.training.encode import Encoder
from asymflow_ft.training.rehearsal import rehearse_vae
from asymflow_ft.training.stages import LATENT_SHARD, TEXT_SHARD, prepare

WARMUP = 1
FILLED = 16  # pictures that are encoded into a cache
ENTRIES = 10_000
CPU = torch.device("cpu")


def filling(
    architecture: Architecture, recipe: Recipe, options: Options, device: torch.device
) -> tuple[dict[str, Timing], int, dict[str, int]]:
    """Seconds per picture of encoding into a cache of latents, and of the writing in it; bytes per picture; and bytes
    of memory by item."""
    family, side = architecture.family, recipe.data.resolution
    vae, size = random_vae(architecture, torch.float32, device), (side, side)
    with picture_folder(FILLED, side) as images, scratch_folder() as folder:
        rows = {content_key(row): row for row in range(FILLED)}

        def encode(key: str) -> torch.Tensor:
            rgb = rgb_tensor(fit_image(images.image(rows[key]), size))
            return family.encode_latents(vae, rgb[None])[0]

        store = TensorCache(folder, recipe.cache.latents, LATENT_SHARD)
        values = [encode(key) for key in rows]
        works = {
            "fill": lambda: store.fill([list(rows)], lambda keys: [encode(key) for key in keys], "fill", show=False),
            "write": lambda: store.write(list(rows), values),
        }
        taken = interleaved(works, options.repeats, WARMUP, device)
        written = sum(file.stat().st_size for file in folder.iterdir())
        weights = [*vae.parameters(), *vae.buffers()]
        memory = {
            "VAE weights": sum(tensor.nbytes for tensor in weights),
            "encode": peak_memory(lambda: encode(next(iter(rows))), weights, device),
            "latents of a shard": LATENT_SHARD * values[0].nbytes,  # which wait on the device until it is written
        }
    return {name: _per(timing, FILLED) for name, timing in taken.items()}, written // FILLED, memory


def _per(timing: Timing, count: int) -> Timing:
    return replace(timing, median=timing.median / count, low=timing.low / count, high=timing.high / count)


def reading(data: PreparedData, repeats: int) -> dict[str, Timing]:
    """Seconds of a training sample from a full cache, whole and by stages; its files are in the system's memory."""
    images, watch, taken = data.images, Stopwatch(CPU), []
    whole = measure(lambda: [data[serial, serial] for serial in range(len(data))], repeats, WARMUP, CPU)
    for _ in range(repeats):
        watch.start("read + hash")
        for entry in data.entries:
            watch.switch("read + hash")
            content = images.content(entry.row)
            hashlib.sha256(content).hexdigest()
            watch.switch("decode")
            picture = decode(content, "")
            watch.switch("resize")
            rgb = rgb_tensor(fit_image(picture, entry.size))
            watch.switch("latents")
            data.encoded.latents(entry, rgb).float()
            watch.switch("text")
            data.encoded.embeds(images.captions(entry.row)[0])
        taken.append(watch.stop())
    parts = {part: summary([seconds[part] / len(data) for seconds in taken]) for part in taken[0]}
    return {"whole": _per(whole, len(data)), **parts}


def waiting(architecture: Architecture, recipe: Recipe, options: Options, device: torch.device) -> dict[str, Any]:
    """Share of training steps that waits for data."""
    accelerator = accelerator_on(device)  # its own, since it keeps the network
    planned(architecture, recipe, accelerator)
    run = build_run(architecture, recipe, accelerator, Stopwatch(device))
    step, parts = time_steps(run, options.repeats, options.warmup)
    return {"step": asdict(step), "wait": asdict(parts["data wait"]),
            "share": parts["data wait"].median / step.median}  # fmt: skip


def make_entries_on_disk(recipe: Recipe, architecture: Architecture, count: int, accelerator: Accelerator) -> None:
    """A data set of `count` pictures of one patch, its caches full of tensors of one row."""
    base, folder, patch = Path(recipe.base), Path(recipe.data.source or "").parent, architecture.family.GEOMETRY[1]
    for path in (*(base / part for part in (*architecture.family.TEXT_PARTS, "vae")), folder):
        path.mkdir(parents=True)
    encoder = Encoder(recipe, architecture.family, accelerator.device)
    digests, records = [], []
    for number in range(count):
        file = folder / f"{number:07d}.bmp"
        picture = Image.new("RGB", (patch, patch), tuple(number.to_bytes(3, "big")))
        picture.save(file)
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        records.append(json.dumps({"file_name": file.name, "text": f"caption {number}"}))
    Path(recipe.data.source or "").write_text("\n".join(records))
    Path(recipe.sample.prompts).write_text("caption 0")
    text = TensorCache(recipe.cache_folder / "text", encoder.text_storage, TEXT_SHARD)
    latents = TensorCache(recipe.cache_folder / "latents", recipe.cache.latents, LATENT_SHARD)
    captions = [encoder.keys.of_caption(c) for c in ("", *(f"caption {number}" for number in range(count)))]
    images = [encoder.keys.of_image(Entry(0, (patch, patch), digest, 1.0)) for digest in digests]
    for store, keys in ((text, captions), (latents, images)):
        store.fill(store.missing_shards(keys), lambda shard: [torch.zeros(1, 1) for _ in shard], "", show=False)


def starting(
    architecture: Architecture, recipe: Recipe, count: int, accelerator: Accelerator, repeats: int
) -> dict[str, Timing]:
    """What comes before the models of a run: the first look at `count` new pictures, and a start with all known."""
    with scratch_folder() as folder:
        patch = architecture.family.GEOMETRY[1]
        recipe = replace(
            recipe, base=str(folder / "base"), output_dir=str(folder / "run"),
            data=Data(source=str(folder / "images/metadata.jsonl"), resolution=patch, held_out=0),
            sample=replace(recipe.sample, prompts=str(folder / "prompts.txt")),
        )  # fmt: skip
        make_entries_on_disk(recipe, architecture, count, accelerator)

        def start() -> None:
            with redirect_stdout(io.StringIO()):  # it counts the data of every start
                prepare(recipe, architecture.family, open_sources(recipe.data), patch, accelerator)

        return {"first look": measure(start, 1, 0, CPU), "start": measure(start, repeats, 0, CPU)}


def bench_cache(architecture: Architecture, options: Options, device: torch.device) -> dict[str, Any]:
    """All figures of the cache, for bench.json.

    Raises:
        ValueError: options that cannot work; `NotEnoughMemory` for more memory than there is.
    """
    accelerator = accelerator_on(device)
    sizes = sizes_up_to(ENTRIES if options.images is None else options.images, (100, 10, 1))
    recipe = make_recipe(architecture, options, Path(), device)
    encoding, _ = rehearse_vae(recipe, architecture.family, vae_on_meta(architecture), 1)
    check_memory(encoding, device, "encoding a picture")
    waits, starts = {}, {}
    for name, workers in (("no workers", 0), ("as the recipe's default", None)):
        with scratch_folder() as folder:
            recipe = make_recipe(architecture, options, folder, device)
            recipe = replace(recipe, data=replace(recipe.data, workers=workers))
            waits[name] = waiting(architecture, recipe, options, device)
    with scratch_folder() as folder, torch.no_grad():
        recipe = make_recipe(architecture, options, folder, device)
        filled, stored, memory = filling(architecture, recipe, options, device)
        data = make_data(recipe, architecture, accelerator)
        read = reading(data, options.repeats)
        memory["sample"] = peak_memory(lambda: data[0, 0], [], CPU)
        for size in sizes:
            starts[size] = starting(architecture, recipe, size, accelerator, min(options.repeats, 3))
    latents = math.prod((recipe.data.resolution // architecture.family.GEOMETRY[1],) * 2)
    return {
        "what": "cache", "architecture": architecture.name, "options": asdict(options),
        "resolution": recipe.data.resolution, "tokens": latents, "bytes_per_picture": stored,
        "fill": {name: asdict(timing) for name, timing in filled.items()},
        "pictures_per_second": 1 / filled["fill"].median, "bytes_per_second": stored / filled["write"].median,
        "read": {name: asdict(timing) for name, timing in read.items()},
        "samples_per_second": 1 / read["whole"].median,
        "wait": waits, "memory": memory,
        "starts": {size: {name: asdict(timing) for name, timing in both.items()} for size, both in starts.items()},
        "growth": {name: asdict(fit_growth({size: own_seconds(both[name], device) for size, both in starts.items()}))
                   for name in ("first look", "start")},
    }  # fmt: skip
