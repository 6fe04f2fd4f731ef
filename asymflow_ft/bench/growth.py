"""How a cost grows: the exponent of a power, and a fixed part with one for each piece."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Growth:
    """Costs, in seconds, bytes or operations, of sizes n. exponent: slope of log cost over log n; 1 is proportional,
    more is a warning, less has a fixed part. fixed, each: the nearest `fixed + each * n` (relative errors count alike,
    neither is negative). fitted: that line at the sizes, or the power of n where no part is fixed."""

    sizes: list[int]
    costs: list[float]
    exponent: float
    fixed: float
    each: float
    fitted: list[float]


def sizes_up_to(most: int, parts: Sequence[int]) -> list[int]:
    """`most` over each of `parts`, ascending.

    Raises:
        ValueError: no two sizes, which growth is seen by.
    """
    if most < 2:
        raise ValueError(f"--images is {most}; growth is measured from one size to another, so it must be 2 or more")
    return sorted({max(most // part, 1) for part in parts})


def fit_growth(costs: Mapping[int, float]) -> Growth:
    """Growth of costs by size, of two sizes or more."""
    n, t = np.array(list(costs), dtype=float), np.array(list(costs.values()), dtype=float)
    power = np.polyfit(np.log(n), np.log(t), 1)
    # a line whose best fixed part or slope is negative is best without that part
    candidates = []
    for columns in ((np.ones_like(n), n), (np.zeros_like(n), n), (np.ones_like(n), np.zeros_like(n))):
        system = np.stack(columns, axis=1) / t[:, None]
        found = np.linalg.lstsq(system, np.ones_like(n), rcond=None)[0]
        candidates.append((not (found >= 0).all(), float(((system @ found - 1) ** 2).sum()), found))
    fixed, each = min(candidates, key=lambda candidate: candidate[:2])[2]
    fitted = fixed + each * n if fixed > 0 else np.exp(np.polyval(power, np.log(n)))
    return Growth(list(costs), t.tolist(), float(power[0]), float(fixed), float(each), fitted.tolist())
