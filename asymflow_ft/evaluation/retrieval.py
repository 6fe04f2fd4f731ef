"""Does a sample show what its prompt says? Retrieval among the pictures of a data set, and sharpness."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn import functional as F

from asymflow_ft.components.color import PixelCodec, rgb_tensor

_OKLAB = PixelCodec(space="oklab", mean=(0.0, 0.0, 0.0), std=1.0)


def thumbnails(images: Sequence[Image.Image], size: int = 32) -> torch.Tensor:
    """Oklab, area-averaged to (N, 3, size, size): what a person sees at a glance."""
    return torch.stack([F.adaptive_avg_pool2d(_OKLAB.encode(rgb_tensor(image)[None])[0], size) for image in images])


def retrieval_rank(samples: Sequence[Image.Image], gallery: torch.Tensor, targets: Sequence[int]) -> torch.Tensor:
    """How many gallery pictures are nearer to each sample than the right one is; 0 is a direct hit.

    Args:
        samples: N generated pictures. gallery: (M, 3, S, S) thumbnails. targets: N indices into the gallery.

    Returns:
        (N,) int64. Retrieval@5 is the share of ranks below 5.
    """
    distance = torch.cdist(thumbnails(samples, gallery.shape[-1]).flatten(1), gallery.flatten(1))
    right = distance.gather(1, torch.as_tensor(targets)[:, None])
    return (distance < right).sum(1)


def picture_error(samples: Sequence[Image.Image], gallery: torch.Tensor, targets: Sequence[int]) -> float:
    """Root mean square Oklab difference, times 100, between samples and the right pictures' thumbnails: colour and
    layout. Arguments as in `retrieval_rank`."""
    difference = thumbnails(samples, gallery.shape[-1]) - gallery[list(targets)]
    return 100 * difference.square().mean().sqrt().item()


def sharpness(images: Sequence[Image.Image]) -> float:
    """Mean squared difference between neighbouring pixels' lightness (Oklab L, 0 to 1), times 1000.

    Squared, because blurring an edge spreads the same total difference over more pixels.
    """
    total = 0.0
    for image in images:
        light = _OKLAB.encode(rgb_tensor(image)[None])[0, 0]
        total += (light.diff(dim=0).square().mean() + light.diff(dim=1).square().mean()).item() / 2
    return 1000 * total / len(images)
