"""Distances between sets of pictures, from their features: FID and KID, under weights on the prompts.

Own code where torchmetrics has both, for three reasons. Its FID takes eigenvalues of a product of two covariances,
which are wrong where pictures are fewer than features (-0.0003 for equal sets) and too slow to repeat 40 times. Its
KID draws random subsets; the sum over all pairs has the same mean and less noise. And neither knows of prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

_ROWS = 1024


@dataclass(frozen=True)
class Reference:
    """Real features (m, d), and their Gaussian: mean (d,) and `factor` (min(m, d), d), factor' factor = covariance."""

    features: Tensor
    mean: Tensor
    factor: Tensor

    @cached_property
    def within(self) -> float:
        """Mean kernel value over pairs of different pictures."""
        blocks = (kernel.sum() - kernel.diagonal(start).sum() for start, kernel in _kernel_rows(*[self.features] * 2))
        return float(sum(blocks)) / (len(self.features) * (len(self.features) - 1))


def reference(features: Tensor) -> Reference:
    """
    Raises:
        ValueError: fewer than two pictures.
    """
    x = features.double()
    if len(x) < 2:
        raise ValueError(f"FID and KID need at least two real pictures, got {len(x)}; give more with --real")
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    factor = torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred
    return Reference(x, x.mean(0), factor)


def frechet_distance(features: Tensor, real: Reference, weights: Tensor, title: str = "FID") -> Tensor:
    """Squared Fréchet distance of the Gaussians of features and of the real ones.

    The trace of sqrt(S1 S2) is the sum of singular values of A B' where S1 = A'A and S2 = B'B: exact for any rank,
    and as large as the number of pictures, not of features.

    Args:
        features: (P, K, d), K pictures of each prompt. weights: (R, P), rows sum to one.

    Returns:
        (R,) float64.
    """
    per_prompt, x = features.shape[1], features.double().flatten(0, 1)
    projected = x @ real.factor.T
    values = torch.empty(len(weights), dtype=torch.float64)
    for i, row in enumerate(tqdm(weights, desc=title, leave=False, mininterval=1)):
        w = (row / per_prompt).repeat_interleave(per_prompt)
        kept = w > 0
        w, seen = w[kept], x[kept]
        unbiased = 1 / (1 - w.square().sum())
        mean = w @ seen
        root = w.sqrt()[:, None]
        cross = root * (projected[kept] - w @ projected[kept])
        trace = (root * (seen - mean)).square().sum() * unbiased + real.factor.square().sum()
        overlap = torch.linalg.svdvals(cross).sum() * unbiased.sqrt()
        values[i] = (mean - real.mean).square().sum() + trace - 2 * overlap
    return values


def kernel_distance(features: Tensor, real: Reference, weights: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3.

    Pairs of pictures of one prompt are left out: they are more alike than two pictures of the model, and would raise
    the value. With one picture a prompt this is the usual KID.

    Args:
        features: (P, K, d). weights: (R, P), rows sum to one.

    Returns:
        (R,) float64.
    """
    per_prompt, x = features.shape[1], features.double().flatten(0, 1)
    w = (weights / per_prompt).repeat_interleave(per_prompt, 1)
    within, across = torch.zeros(len(w), dtype=torch.float64), torch.zeros(len(w), dtype=torch.float64)
    prompt = torch.arange(len(features)).repeat_interleave(per_prompt)
    for start, kernel in _kernel_rows(x, x):
        rows = slice(start, start + len(kernel))
        kernel[prompt[rows, None] == prompt] = 0
        within += ((w[:, rows] @ kernel) * w).sum(1)
    for start, kernel in _kernel_rows(x, real.features):
        across += w[:, start : start + len(kernel)] @ kernel.mean(1)
    return within / (1 - weights.square().sum(1)) + real.within - 2 * across


def _kernel_rows(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The kernel matrix of two sets in blocks of rows, each with the number of its first row."""
    for start in range(0, len(a), _ROWS):
        yield start, (a[start : start + _ROWS] @ b.T / a.shape[1] + 1) ** 3
