"""95 % intervals and verdicts. What varies is the prompts, each with all of its pictures; real pictures are fixed.

A metric is a function of weights on the prompts, (R, P) with rows that sum to one, to (R,) values. Averages over
pictures are resampled by the bootstrap; its percentiles are moved outwards for few prompts (Hesterberg 2015, the
"expanded percentile"). Distances between sets (FID, KID) leave out a group of prompts at a time, the jackknife: a
bootstrap sample repeats pictures, which raises FID by as much again as its bias.

Measured in simulations with a known truth, the share of intervals that hold it: for averages of normal values 93 %
with 5 prompts and 94 to 95 % from 12 on; of strongly skewed (log-normal) ones 85 % with 12 and 91 % with 50; for FID
and KID 93 to 100 %, where the plain bootstrap of FID reached 0 %. The truth of an FID is its mean at this number of
pictures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

Verdict = Literal["better", "worse", "no difference seen"]
Interval = tuple[float, float]
RESAMPLES, GROUPS = 2000, 40
_WEIGHTS = 2**24  # at once, 128 MB: real pictures may be many
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A metric over all prompts, and over each resample, (R,). Resamples of two estimates are of the same prompts."""

    value: float
    replicates: Tensor

    def minus(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.replicates - other.replicates)

    def distance(self, target: float) -> "Estimate":
        return Estimate(abs(self.value - target), (self.replicates - target).abs())


def estimate(metric: Callable[[Tensor], Tensor], weights: Tensor) -> Estimate:
    """`metric` with equal weights on all prompts and with each row of `weights` (R, P)."""
    equal = torch.full_like(weights[:1], 1 / weights.shape[1])
    values = metric(torch.cat([equal, weights]))
    return Estimate(values[0].item(), values[1:])


def bootstrap_weights(prompts: int, seed: int, resamples: int = RESAMPLES) -> Tensor:
    """(resamples, prompts): how often each prompt is drawn, as a share."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator)
    counts = torch.zeros(resamples, prompts, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)) / prompts


def bootstrap_means(rows: Tensor, seed: int, resamples: int = RESAMPLES) -> Tensor:
    """Means of rows (P, c) over each resample of the prompts, (resamples, c); the same resamples for the same P."""
    block = max(_WEIGHTS // len(rows), 1)
    starts = range(0, resamples, block)
    return torch.cat([bootstrap_weights(len(rows), seed + i, min(block, resamples - i)) @ rows for i in starts])


def bootstrap_interval(found: Estimate, prompts: int) -> Interval:
    """The percentiles of the resamples; (value, value) where one prompt tells nothing of the spread."""
    if prompts < 2:
        return found.value, found.value
    tail = NormalDist().cdf(-math.sqrt(prompts / (prompts - 1)) * student_quantile(prompts - 1))
    low, high = found.replicates.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def jackknife_weights(prompts: int, seed: int, groups: int = GROUPS) -> Tensor:
    """(min(groups, prompts), prompts): each row is without one group of prompts."""
    groups = min(groups, prompts)
    group = torch.randperm(prompts, generator=torch.Generator().manual_seed(seed)) % groups
    kept = (group != torch.arange(groups)[:, None]).double()
    return kept / kept.sum(1, keepdim=True)


def jackknife_interval(found: Estimate) -> Interval:
    groups = len(found.replicates)
    spread = math.sqrt((groups - 1) * found.replicates.var(correction=0).item())
    half = student_quantile(groups - 1) * spread
    return found.value - half, found.value + half


def jackknife_bias(found: Estimate) -> float:
    """By how much the metric is too high for the number of pictures; to first order in one over that number."""
    return (len(found.replicates) - 1) * (found.replicates.mean().item() - found.value)


def verdict(interval: Interval, better: Literal["higher", "lower"]) -> Verdict:
    """Of the first model, from the interval of (first - other). One that is not a number shows nothing."""
    low, high = interval
    if low > 0 or high < 0:
        return "better" if (low > 0) == (better == "higher") else "worse"
    return "no difference seen"


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its series in 1 / freedom (exact for 1 and 2)."""
    if freedom < 3:
        return {1: 12.706204736, 2: 4.302652730}[freedom]
    z, v = _Z, freedom
    return (
        z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )  # fmt: skip
