"""Fit the pixel subspace of a base from images, and report how well it carries them."""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import matplotlib
import torch
from accelerate.utils import gather_object, reduce
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from asymflow_ft.components.color import PixelCodec, rgb_tensor
from asymflow_ft.components.subspace import PixelSubspace, orthonormality_error
from asymflow_ft.data.ahead import THREADS, ahead
from asymflow_ft.data.buckets import bucket_size, fit_image
from asymflow_ft.data.decode import UnreadableImage
from asymflow_ft.data.source import Images
from asymflow_ft.method.align import (
    Fit,
    Grams,
    LinearShares,
    explained_energy,
    linear_shares,
    patch_dct,
    procrustes,
)
from asymflow_ft.method.asymflow import lift
from asymflow_ft.method.patches import to_image, to_tokens
from asymflow_ft.training.checkpoint import write_json
from asymflow_ft.training.run import process_state

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EXAMPLES = 6
# (latents from pixels, pixels from latents): what promises a conversion, and what speaks against it; docs/method.md
PROMISING, HOPELESS = (0.10, 0.50), (0.05, 0.25)
TOKENS_PER_VALUE = 4  # of a pixel patch; with fewer tokens the shares are mostly chance


@dataclass(frozen=True)
class Report:
    """What report.json holds. Explained shares are 1 - |x - s A z|^2 / |x|^2, about the codec's mean colour."""

    base: str
    pixels: dict[str, object]  # space, mean and std of the codec
    images: int
    unreadable: list[str]
    tokens: int
    patch: int
    rank: int
    scale: float
    orthonormality_error: float
    latent_shift: float
    pixel_shift: float
    own_mean: list[float]  # of these images in the codec's space, for the recipe key pixels.mean; own_std likewise
    own_std: float
    explained_with_own: float  # explained_total if the codec had them
    explained_total: float
    explained_by_channel: dict[str, float]
    explained_by_frequency: dict[str, float]
    energy_by_frequency: dict[str, float]
    linear_shares: dict[str, float] | None  # see LinearShares; None with too few tokens
    verdict: str  # whether a conversion is promising, and why
    singular_values: list[float]


@torch.no_grad()
def align(
    base: str,
    family: ModuleType,
    source: Images,
    codec: PixelCodec,
    out: Path,
    num_images: int = 1000,
    resolution: int = 1024,
    revision: str | None = None,
    seed: int = 0,
    sample: bool = False,
) -> Report:
    """Stream images through the base's VAE, fit basis and scale, and write `out`: the subspace, report.json and .png.

    Under `accelerate launch` each process takes its share of the images and the sums are added.

    Args:
        sample: fit to samples of the VAE's posterior, as the paper does, not to its mode (recipe key data.latents).

    Raises:
        ValueError: the base cannot be read, no image can, or the latents do not determine the basis.
    """
    state = process_state()
    with state.main_process_first():
        parts = family.load_parts(base, ("vae", "scheduler"), torch.float32, revision)
    vae = parts.vae.to(state.device)
    chosen = random.Random(seed).sample(range(len(source)), min(num_images, len(source)))
    own = chosen[state.process_index :: state.num_processes]
    progress = partial(tqdm, desc="align", total=len(own), disable=not state.is_main_process)
    grams, unreadable, examples = sum_tokens(
        family, vae, source, own, codec, resolution, seed if sample else None, progress=progress
    )
    if state.num_processes > 1:
        for tensor in grams.tensors():
            tensor.copy_(reduce(tensor.to(state.device), "sum"))
    grams = grams.to("cpu")
    unreadable = gather_object(unreadable)
    if not grams.tokens:
        raise ValueError(f"none of the {len(chosen)} images could be read, first: {unreadable[0]}")

    images, patch, shift = len(chosen) - len(unreadable), family.pixel_patch(vae), family.latent_shift(parts)
    subspace, report = make_report(base, grams, codec, patch, shift, images, unreadable)
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        subspace.save_pretrained(out)
        write_json(out / "report.json", asdict(report))
        draw(out / "report.png", report, strip(family, vae, codec, subspace, examples))
    state.wait_for_everyone()
    return report


Example = tuple[Tensor, Tensor]  # rgb (1, 3, H, W) and its latent tokens (1, N, R)


@torch.no_grad()
def sum_tokens(
    family: ModuleType, vae: torch.nn.Module, source: Images, rows: Sequence[int], codec: PixelCodec, resolution: int,
    seed: int | None = None, threads: int = THREADS, progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Grams, list[str], list[Example]]:  # fmt: skip
    """The sums over all tokens of the images `rows`, why some could not be read, and the first few as examples.

    Args:
        seed: sample the posterior of row n with seed + n; None takes its mode.
        threads: they decode and cut up images while the VAE works; the result is the same for any number.
        progress: shows how far the images are, such as tqdm.
    """
    patch, device = family.pixel_patch(vae), vae.device
    exact = "cpu" if device.type == "mps" else device  # which knows no float64
    grams, unreadable, examples = Grams.zeros(3 * patch**2, family.latent_dim(vae), exact), [], []

    def read(row: int) -> tuple[Tensor, Tensor] | str:
        try:
            image = source.image(row)
        except UnreadableImage as error:
            return str(error)
        rgb = rgb_tensor(fit_image(image, bucket_size(*image.size, resolution, patch)))[None].to(device)
        return rgb, to_tokens(codec.encode(rgb), patch)

    for row, found in zip(rows, progress(ahead(read, rows, threads)), strict=True):
        if isinstance(found, str):
            unreadable.append(found)
            continue
        rgb, x = found
        z = family.encode_latents(vae, rgb, None if seed is None else torch.Generator().manual_seed(seed + row))
        grams.update(z, x)
        if len(examples) < EXAMPLES:
            examples.append((rgb.cpu(), z.cpu()))
    return grams, unreadable, examples


def make_report(
    base: str, grams: Grams, codec: PixelCodec, patch: int, shift: float, images: int, unreadable: list[str]
) -> tuple[PixelSubspace, Report]:
    """The fit to sums, and what they say about it.

    Args:
        shift: the base's native timestep shift. images: how many the sums are of.

    Raises:
        ValueError: the latents do not determine the basis.
    """
    fit = procrustes(grams)
    shares = linear_shares(grams) if grams.tokens >= TOKENS_PER_VALUE * len(grams.pixel) else None
    subspace = PixelSubspace.from_fit(fit.basis, fit.scale)
    report = Report(
        base=base, pixels=pixels_of(codec), images=images, unreadable=unreadable,
        tokens=int(grams.tokens), patch=patch, rank=len(grams.latent), scale=fit.scale.item(),
        orthonormality_error=orthonormality_error(subspace.basis), latent_shift=shift,
        pixel_shift=shift * fit.scale.item(), linear_shares=asdict(shares) if shares else None,
        verdict=judge(shares), singular_values=fit.singular_values.tolist(),
        **_own_map(grams, codec), **_energy(grams, fit, patch, codec),
    )  # fmt: skip
    return subspace, report


def pixels_of(codec: PixelCodec) -> dict[str, object]:
    return {"space": codec.space, "mean": list(codec.mean), "std": codec.std}


def check_aligned_for(folder: str | Path, codec: PixelCodec) -> None:
    """Compare a recipe's pixel space with the one that a subspace was fitted in, where a report.json beside it tells.

    Raises:
        ValueError: they differ.
    """
    file = Path(folder) / "report.json"
    fitted = json.loads(file.read_text()).get("pixels") if file.is_file() else None
    if fitted not in (None, pixels_of(codec)):
        raise ValueError(
            f"the subspace {folder} was aligned with pixels {fitted}, and the recipe has {pixels_of(codec)}; "
            "align again into another align.path, or use the recipe keys that it was aligned with"
        )


def judge(shares: LinearShares | None) -> str:
    """Whether latents are close enough to pixels for a conversion, in one sentence."""
    if shares is None:
        return "unknown: too few images to tell how close the latents are to pixels"
    found = (shares.latents_from_pixels, shares.pixels_from_latents)
    if all(share >= enough for share, enough in zip(found, PROMISING, strict=True)):
        return "promising: the latents are close to pixels, so training starts from pictures like the base's"
    if any(share < least for share, least in zip(found, HOPELESS, strict=True)):
        return "not promising: the latents are far from pixels, so training would start from nearly nothing"
    return "uncertain: neither near nor far; look at the row 'rank-R lift' of report.png and try a short run"


def _own_map(grams: Grams, codec: PixelCodec) -> dict[str, object]:
    """The affine pixel map that these images themselves suggest, and what the lift explains with it."""
    mean = (grams.pixel_sum / grams.tokens).unflatten(0, (3, -1)).mean(1)
    centred = grams.rescaled(mean.repeat_interleave(len(grams.pixel) // 3), 1.0)
    std = (centred.pixel.trace() / len(grams.pixel) / grams.tokens).sqrt().item()
    own = centred.rescaled(torch.zeros(len(grams.pixel)), std)
    total, left = explained_energy(own, procrustes(own))
    return {
        "own_mean": [round(m * codec.std + c, 4) for m, c in zip(mean.tolist(), codec.mean, strict=True)],
        "own_std": round(std * codec.std, 4),
        "explained_with_own": 1 - (left.sum() / total.sum()).item(),
    }


def _energy(grams: Grams, fit: Fit, patch: int, codec: PixelCodec) -> dict[str, object]:
    """Explained shares per channel and per spatial frequency of the patch (cosine transform, octaves)."""
    per_channel = patch_dct(patch)
    total, left = (
        part.unflatten(0, (3, patch, patch))
        for part in explained_energy(grams, fit, torch.block_diag(per_channel, per_channel, per_channel))
    )
    frequency = torch.maximum(torch.arange(patch)[:, None], torch.arange(patch)[None])
    edges = [0, 1, *(2**i for i in range(1, patch.bit_length()))]
    bands = {}
    for low, high in itertools.pairwise(edges):
        name = "mean" if high == 1 else f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        bands[name] = (frequency >= low) & (frequency < high)
    names = ("L", "a", "b") if codec.space == "oklab" else ("R", "G", "B")
    return {
        "explained_total": 1 - (left.sum() / total.sum()).item(),
        "explained_by_channel": {n: 1 - (left[i].sum() / total[i].sum()).item() for i, n in enumerate(names)},
        "explained_by_frequency": {n: 1 - (left[:, m].sum() / total[:, m].sum()).item() for n, m in bands.items()},
        "energy_by_frequency": {n: (total[:, m].sum() / total.sum()).item() for n, m in bands.items()},
    }


def strip(
    family: ModuleType, vae: torch.nn.Module, codec: PixelCodec, subspace: PixelSubspace, examples: list[Example]
) -> dict[str, list[Image.Image]]:
    """Example pictures by row: original, VAE decode, lift, residual (original - lift, about grey)."""
    rows: dict[str, list[Image.Image]] = {"original": [], "VAE decode": [], "rank-R lift": [], "residual": []}
    patch = subspace.config["patch"]
    for rgb, z in examples:
        grid = (rgb.shape[-2] // patch, rgb.shape[-1] // patch)
        lifted = codec.decode(to_image(lift(z, *subspace.float32()), grid, patch))
        pictures = (rgb, family.decode_latents(vae, z, grid).cpu(), lifted, (rgb - lifted) / 2)
        for row, picture in zip(rows.values(), pictures, strict=True):
            row.append(to_picture(picture[0]))
    return rows


def to_picture(rgb: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB picture."""
    return Image.fromarray(((rgb.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def draw(file: Path, report: Report, rows: dict[str, list[Image.Image]]) -> None:
    """report.png: figures above, the rows of `strip` below."""
    figure = plt.figure(figsize=(12, 12), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.4))
    spectrum, energy, channels = top.subplots(1, 3)
    spectrum.semilogy(report.singular_values)
    spectrum.set(title="Singular values of the cross Gram", xlabel="direction", ylabel="value")
    places = range(len(report.energy_by_frequency))
    energy.bar([x - 0.2 for x in places], report.energy_by_frequency.values(), 0.4, label="share of pixel energy")
    energy.bar([x + 0.2 for x in places], report.explained_by_frequency.values(), 0.4, label="explained by s A z")
    energy.set_xticks(list(places), list(report.energy_by_frequency))
    energy.set(title="By spatial frequency inside a patch", xlabel="cosine index", ylim=(-0.25, 1.05))
    energy.legend()
    channels.bar(
        ["total", *report.explained_by_channel], [report.explained_total, *report.explained_by_channel.values()]
    )
    channels.set(title="Explained by s A z, by channel", ylim=(-0.25, 1.05))
    for axes in (energy, channels):
        axes.axhline(0, color="black", linewidth=0.5)
    columns = max(len(pictures) for pictures in rows.values())
    grid = bottom.subplots(len(rows), columns, squeeze=False)
    for axes_row, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes in axes_row:
            axes.axis("off")
        for axes, picture in zip(axes_row, pictures, strict=False):
            axes.imshow(picture)
        axes_row[0].set_title(name, loc="left")
    figure.suptitle(
        f"{report.base}: s = {report.scale:.4f}, s A z explains {report.explained_total:.1%} of the energy of "
        f"{report.images} images; pixel shift {report.pixel_shift:.2f} = s x {report.latent_shift:g}\n"
        + _closeness(report)
    )
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _closeness(report: Report) -> str:
    if report.linear_shares is None:
        return report.verdict
    shares = LinearShares(**report.linear_shares)
    return (
        f"linear maps explain {max(shares.latents_from_pixels, 0):.0%} of the latents by pixels and "
        f"{max(shares.pixels_from_latents, 0):.0%} of the pixels by latents (any {report.rank} values: at most "
        f"{shares.pixels_from_best:.0%})\n{report.verdict}"
    )


def describe(report: Report) -> str:
    """The report in a few lines for a terminal."""
    bands = ", ".join(f"{name} {share:.0%}" for name, share in report.explained_by_frequency.items())
    advice = ""
    if report.explained_with_own > report.explained_total + 0.05:
        advice = (
            f"\nthese images lie far from the assumed mean colour: with pixels.mean={report.own_mean} and pixels.std="
            f"{report.own_std} in the recipe, s A z would explain {report.explained_with_own:.1%}"
        )
    lost = f"; {len(report.unreadable)} unreadable, first: {report.unreadable[0]}" if report.unreadable else ""
    return (
        f"{report.images} images, {report.tokens} tokens: "
        f"{3 * report.patch**2} pixel values -> rank {report.rank}{lost}\n"
        f"scale s = {report.scale:.4f}, orthonormality error {report.orthonormality_error:.1e}\n"
        f"s A z explains {report.explained_total:.1%} of the pixel energy (by frequency in the patch: {bands})\n"
        f"recommended pixel shift {report.pixel_shift:.2f} = s x the base's latent shift {report.latent_shift:g}\n"
        f"{_closeness(report)}{advice}"
    )
