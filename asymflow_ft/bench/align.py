"""Aligning against decoding and encoding the same pictures, which it cannot do without."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from asymflow_ft.align import draw, make_report, strip, sum_tokens
from asymflow_ft.bench.architectures import Architecture, random_vae, vae_on_meta
from asymflow_ft.bench.clock import Stopwatch, Timing, interleaved, measure, own_seconds, peak_memory, summary
from asymflow_ft.bench.growth import fit_growth, sizes_up_to
from asymflow_ft.bench.limits import check_memory
from asymflow_ft.bench.scratch import scratch_folder
from asymflow_ft.bench.workload import Options, make_recipe, picture, resolution_of
from asymflow_ft.components.color import PixelCodec, rgb_tensor
from asymflow_ft.data.ahead import THREADS
from asymflow_ft.data.buckets import bucket_size, fit_image
from asymflow_ft.data.source import Images, open_source
from asymflow_ft.method.align import Grams
from asymflow_ft.method.patches import to_tokens
from asymflow_ft.training.rehearsal import rehearse_vae

WARMUP = 1
IMAGES = 16
CPU = torch.device("cpu")
STAGES = ("decode", "resize", "VAE", "colour + patches", "Gram")


@contextmanager
def picture_folder(count: int, side: int) -> Iterator[Images]:
    """`count` different JPEG files as a source, which are gone afterwards."""
    with scratch_folder() as folder:
        for number in range(count):
            (folder / f"{number:06d}.jpg").write_bytes(picture(side, number))
        yield open_source(str(folder), caption_column=None)


def decode_and_encode(
    family: ModuleType, vae: ModelMixin, images: Images, side: int, watch: Stopwatch | None = None
) -> None:
    """The floor of `align`: every picture one after the other to its latents, and nothing else. `watch` also sees what
    align does with them, one stage after the other."""
    patch, codec = family.pixel_patch(vae), PixelCodec()
    grams = Grams.zeros(3 * patch**2, family.latent_dim(vae), vae.device)
    mark = watch.switch if watch is not None else lambda stage: None
    for row in range(len(images)):
        mark("decode")
        image = images.image(row)
        mark("resize")
        rgb = rgb_tensor(fit_image(image, bucket_size(*image.size, side, patch)))[None].to(vae.device)
        mark("VAE")
        z: Tensor = family.encode_latents(vae, rgb)
        if watch is not None:
            mark("colour + patches")
            x = to_tokens(codec.encode(rgb), patch)
            mark("Gram")
            grams.update(z, x)


def stages(
    family: ModuleType, vae: ModelMixin, images: Images, side: int, repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Seconds per picture of each stage of align, one after the other."""
    watch, taken = Stopwatch(device), []
    for _ in range(repeats):
        watch.start("decode")
        decode_and_encode(family, vae, images, side, watch)
        taken.append(watch.stop())
    return {stage: summary([seconds[stage] / len(images) for seconds in taken]) for stage in STAGES}


@torch.no_grad()
def bench_align(architecture: Architecture, options: Options, device: torch.device) -> dict[str, Any]:
    """All figures of aligning, for bench.json.

    Raises:
        ValueError: options that cannot work; `NotEnoughMemory` for more memory than there is.
    """
    family, side, repeats = architecture.family, resolution_of(architecture, options), options.repeats
    count = IMAGES if options.images is None else options.images
    sizes = sizes_up_to(count, (8, 4, 2, 1))
    recipe = make_recipe(architecture, options, Path(), device)
    check_memory(max(rehearse_vae(recipe, family, vae_on_meta(architecture), 1)), device, "the VAE with one picture")
    vae, codec = random_vae(architecture, torch.float32, device), PixelCodec()

    with picture_folder(count, side) as images:

        def aligned(rows: int, threads: int = THREADS) -> tuple[Grams, list[str], list[tuple[Tensor, Tensor]]]:
            return sum_tokens(family, vae, images, range(rows), codec, side, threads=threads)

        passes = {"decode + encode": lambda: decode_and_encode(family, vae, images, side),
                  "align without threads": lambda: aligned(count, threads=0)}  # fmt: skip
        passes |= {f"align {size}": lambda size=size: aligned(size) for size in sizes}  # type: ignore[misc]
        taken = interleaved(passes, repeats, WARMUP, device)
        one_by_one = stages(family, vae, images, side, repeats, device)
        grams, unreadable, examples = aligned(count)
        # so few pictures need not determine the basis; what solving takes does not depend on them
        noise = torch.randn(4 * len(grams.pixel), len(grams.pixel), generator=torch.Generator().manual_seed(0))
        grams.update(noise[:, : len(grams.latent)].to(device), noise.to(device))
        grams = grams.to("cpu")

        def solve() -> Any:
            return make_report("bench", grams, codec, family.pixel_patch(vae), 3.0, count, unreadable)

        subspace, report = solve()
        weights = [*vae.parameters(), *vae.buffers()]
        sums = sum(tensor.nbytes for tensor in grams.tensors())
        threads = THREADS if device.type == "cuda" else 0  # what other threads make is seen on a GPU alone
        memory = {
            "VAE weights": sum(tensor.nbytes for tensor in weights), "Gram sums": sums,
            "pictures": peak_memory(lambda: aligned(count, threads), weights, device) - sums,
            "solve": peak_memory(solve, grams.tensors(), CPU),
            "report.png": peak_memory(lambda: strip(family, vae, codec, subspace, examples[:1]),
                                      [*weights, *subspace.buffers(), *examples[0]], device),
        }  # fmt: skip
        with scratch_folder() as folder:
            file = folder / "report.png"
            ends = {"solve": measure(solve, repeats, WARMUP, CPU),
                    "report.png": measure(lambda: draw(file, report, strip(family, vae, codec, subspace, examples)),
                                          1, 0, device)}  # fmt: skip
    floor, whole = taken["decode + encode"].median, taken[f"align {count}"].median
    fixed = sum(timing.median for timing in ends.values())
    return {
        "what": "align", "architecture": architecture.name, "options": asdict(options), "resolution": side,
        "images": count, "tokens": count * len(examples[0][1][0]), "threads": THREADS,
        "passes": {name: asdict(timing) for name, timing in taken.items()},
        "align_over_decode_encode": whole / floor,
        "without_threads": taken["align without threads"].median / floor,
        "stages": {name: asdict(timing) for name, timing in one_by_one.items()},
        "ends": {name: asdict(timing) for name, timing in ends.items()},
        "memory": memory,
        # what `asymflow-ft align` with its default of 1,000 pictures comes to, by these figures
        "thousand_images": (1000 * whole / count + fixed) / (1000 * floor / count),
        "growth": asdict(fit_growth({size: own_seconds(taken[f"align {size}"], device) for size in sizes})),
    }  # fmt: skip
