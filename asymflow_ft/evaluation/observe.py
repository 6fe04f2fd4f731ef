"""What metrics need of each picture, in one pass over the files."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from asymflow_ft.components.color import rgb_tensor
from asymflow_ft.evaluation.features import Features
from asymflow_ft.evaluation.retrieval import picture_error, retrieval_rank, sharpness, thumbnails
from asymflow_ft.evaluation.scorers import Picture, open_lpips, open_picture
from asymflow_ft.evaluation.spectrum import BANDS, power_spectra

RETRIEVAL_DEPTH = 5
PSNR_LIMIT = 100.0  # of equal pictures it would be infinite
_BATCH = 8
_INCEPTION_SIDE = 299  # a patch that Inception does not resize


@dataclass(frozen=True)
class References:
    """Pictures that prompts are captions of: themselves, their thumbnails (M, 3, S, S) and features (M, 1, d)."""

    pictures: Sequence[Picture]
    gallery: Tensor
    features: Tensor | None


@dataclass(frozen=True)
class Observed:
    """Of N pictures: "features" (N, 1, d), "patches" (N, patches, d), "spectrum" (N, rings), "thumbnail" (N, 3, S, S),
    and (N, 1) under the keys of metrics, NaN where a picture has no reference. `enlarged`: how many were smaller than
    what they are seen at."""

    parts: dict[str, Tensor]
    enlarged: int


def fit(image: Image.Image, at: tuple[int, int]) -> Image.Image:
    """Cropped in the middle to the shape of `at` (width, height) and resized to it."""
    return ImageOps.fit(image, at, Image.Resampling.LANCZOS)


def patches(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, P, 3, S, S): the middles of the four quarters, S = 299 pixels or half the picture."""
    height, width = rgb.shape[-2:]
    side = min(_INCEPTION_SIDE, height // 2, width // 2)
    cuts = [(h * height // 4 - side // 2, w * width // 4 - side // 2) for h in (1, 3) for w in (1, 3)]
    return torch.stack([rgb[..., top : top + side, left : left + side] for top, left in cuts], 1)


@torch.no_grad()
def observe(
    title: str, pictures: Sequence[Picture], targets: Sequence[int | None], references: References | None,
    names: Sequence[str], features: Features | None, at: tuple[int, int], device: torch.device | str,
) -> Observed:  # fmt: skip
    """
    Args:
        targets: of each picture, which reference is its own. names: keys of the metrics that are asked for, and
            "thumbnail" for those of `References`.
        at: (width, height) that pictures are seen at.
    """
    distance = open_lpips(device) if "lpips" in names else None
    found: dict[str, list[Tensor]] = {}
    enlarged = 0
    for start in tqdm(range(0, len(pictures), _BATCH), desc=title, leave=False, mininterval=1):
        opened = [open_picture(picture) for picture in pictures[start : start + _BATCH]]
        enlarged += sum(image.width < at[0] or image.height < at[1] for image in opened)
        images = [fit(image, at) for image in opened]
        rgb = torch.stack([rgb_tensor(image) for image in images])
        parts: dict[str, Tensor] = {}
        if features is not None and {"fid", "kid", "feature_distance"} & set(names):
            parts["features"] = features(rgb)[:, None]
        if features is not None and "pfid" in names:
            cut = patches(rgb)
            parts["patches"] = features(cut.flatten(0, 1)).reshape(*cut.shape[:2], features.dim)
        if {"spectrum_error", *BANDS} & set(names):
            parts["spectrum"] = power_spectra(rgb)
        if "thumbnail" in names:
            parts["thumbnail"] = thumbnails(images)
        if "sharpness" in names:
            parts["sharpness"] = torch.tensor([[sharpness([image])] for image in images])
        own = [(i, t) for i, t in enumerate(targets[start : start + _BATCH]) if t is not None]
        if references is not None:
            index, right = [i for i, _ in own], [t for _, t in own]
            seen = [images[i] for i in index]
            beside: dict[str, Tensor] = {}
            if own and {"psnr", "ssim", "lpips"} & set(names):
                other = torch.stack([rgb_tensor(fit(open_picture(references.pictures[t]), at)) for t in right])
                beside |= _fidelity(rgb[index].to(device), other.to(device), names)
                if distance is not None:
                    beside["lpips"] = distance(rgb[index], other)
            if own and "feature_distance" in names and references.features is not None:
                alike = torch.cosine_similarity(parts["features"][index, 0], references.features[right, 0])
                beside["feature_distance"] = 1 - alike
            if own and "picture_error" in names:
                errors = [
                    picture_error([image], references.gallery, [t]) for image, t in zip(seen, right, strict=True)
                ]
                beside["picture_error"] = torch.tensor(errors)
            if own and "retrieval_at_5" in names:
                beside["retrieval_at_5"] = retrieval_rank(seen, references.gallery, right) < RETRIEVAL_DEPTH
            for key in {"psnr", "ssim", "lpips", "feature_distance", "picture_error", "retrieval_at_5"} & set(names):
                parts[key] = torch.full((len(images), 1), torch.nan)
                if own:
                    parts[key][index, 0] = beside[key].float().cpu()
        for key, part in parts.items():
            found.setdefault(key, []).append(part)
    return Observed({key: torch.cat(part) for key, part in found.items()}, enlarged)


def _fidelity(rgb: Tensor, other: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """PSNR and SSIM, (B,)."""
    # a second's import, which the other commands need not wait for
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = rgb / 2 + 0.5, other / 2 + 0.5  # SSIM depends on where zero is
    found = {}
    if "psnr" in names:
        psnr = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
        found["psnr"] = psnr.clamp(max=PSNR_LIMIT)
    if "ssim" in names:
        found["ssim"] = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none").reshape(-1)
    return found
