"""For docs/performance_tried.py: two ways to one result, compared and timed; and arithmetic as it was before."""

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymflow_ft.bench.clock import interleaved, now
from asymflow_ft.bench.report import digits, seconds
from asymflow_ft.method.align import STRIP, Grams
from asymflow_ft.method.asymflow import calibrate, project
from asymflow_ft.method.loss import MIN_POWER, Target, fade
from asymflow_ft.training.rehearsal import Meter

SECONDS = 15  # about what timing a pair takes


@dataclass(frozen=True)
class Pair:
    """Two ways to one result, a tensor or several; they may differ by `tolerance`. memory: count it too. alone: time
    what the main thread does, not what others do beside it."""

    what: str
    before: Callable[[], Any]
    after: Callable[[], Any]
    tolerance: float = 1e-5
    memory: bool = False
    alone: bool = False


def difference(one: Any, other: Any) -> float:
    """max |one - other| / max |one| of the tensor in which it is largest."""
    ones, others = ([given] if isinstance(given, Tensor) else list(given) for given in (one, other))
    assert ones and [a.shape for a in ones] == [b.shape for b in others], "results of different shapes"
    pairs = zip(ones, others, strict=True)
    # torch's maximum, because that of Python may pass NaN by
    return (
        torch.stack([((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).double() for a, b in pairs]).max().item()
    )


def main_thread_now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def peak_megabytes(work: Callable[[], Any]) -> float:
    with Meter([found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]) as meter:
        work()
    return meter.peak / 1e6


def measure(name: str, pair: Pair, small: bool) -> str:
    """The pair's row.

    Raises:
        SystemExit: the two results differ by more than they may.
    """
    differ = difference(pair.before(), pair.after())
    if not differ <= pair.tolerance:  # nor may it be NaN
        raise SystemExit(f"{name}: {pair.what}: results differ by {differ:.1e}, more than {pair.tolerance:.0e}")
    works, repeats = {"before": pair.before, "after": pair.after}, 1
    if not small:
        begun = now()[0]
        pair.before(), pair.after()
        repeats = min(max(round(SECONDS / (now()[0] - begun)), 5), 25)
    clocks = {"bench.clock.now": main_thread_now if pair.alone else now}
    timings = patched(lambda: interleaved(works, repeats, 0, torch.device("cpu")), clocks)()
    taken = [timing.processor for timing in timings.values()]
    shown = [seconds(t) for t in taken]
    if pair.memory:
        shown = [f"{t}; {digits(peak_megabytes(work))} MB" for t, work in zip(shown, works.values(), strict=True)]
    return f"| `{name}`: {pair.what} | {shown[0]} | {shown[1]} | {taken[1] / taken[0]:.2f} | {differ:.0e} |"


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Callable[[], list[Tensor]]:
    """Forward and backward: the output, and the gradient of its product with `direction`."""
    leaf = x.clone().requires_grad_()

    def work() -> list[Tensor]:
        out = function(leaf)
        return [out.detach(), *torch.autograd.grad(out, leaf, direction)]

    return work


def patched(work: Callable[[], Any], replaced: dict[str, Any]) -> Callable[[], Any]:
    """`work` with functions of this package replaced, each by its full name."""

    def patched_work() -> Any:
        with ExitStack() as stack:
            for name, function in replaced.items():
                stack.enter_context(patch(f"asymflow_ft.{name}", function))
            return work()

    return patched_work


# How it was before, from the same equations.


def two_projections(u, x_t, sigma, basis, scale, sigma_min=1e-4):
    gain, floor = calibrate(sigma, scale).gain, sigma.clamp(min=sigma_min)
    inside, outside = scale * gain * u + gain * (1 - scale) * (sigma / floor) * x_t, x_t + scale * u
    return project(inside, basis) + (outside - project(outside, basis)) / floor


def clean_by_sums(u, x_t, sigma, basis, scale):
    return scale * (project(calibrate(sigma, scale).gain * (x_t - sigma * u) + u, basis) - u)


def clamp_through_srgb(codec, pixels):
    return codec.encode(codec.decode(pixels))


def masked_cube_root(lms):
    return torch.where(lms > 0, lms.clamp(min=1e-30) ** (1 / 3), torch.zeros_like(lms))


def mean_product(a, b):
    return (a * b).mean(-1)


def mean_square(a):
    return a.square().mean(-1)


def subtracted(x0, factor, reference):
    return x0 - factor[..., None] * reference


def added_in_one(x0, factor, reference):
    return torch.addcmul(x0, -factor[..., None], reference)


def spelled_target(x0, x0_hat, x_low, x_low_hat, sigma, kappa=0.3, product=mean_product, power=mean_square,
                   less=subtracted):  # fmt: skip
    """`variance_reduced_target` with three of its pieces to choose."""
    x0, x0_hat, x_low, x_low_hat = (x.detach().unflatten(-1, (3, -1)) for x in (x0, x0_hat, x_low, x_low_hat))
    residual, reference, trust = x0 - x0_hat, x_low - x_low_hat, fade(sigma, kappa)
    share = (product(residual, reference) / power(reference).clamp(min=MIN_POWER)).clamp(0, 1)
    image = less(x0, (1 - trust) * share, reference)
    return Target(image.flatten(-2), share, share.square().mean(-1, keepdim=True).sqrt(), trust)


def error_of_velocities(x0_hat, target, sigma, sigma_floor=0.05):
    return ((x0_hat - target) / sigma.clamp(min=sigma_floor)).square().mean((1, 2))


def mse_of_library(x0_hat, target, sigma, sigma_floor=0.05):
    error = F.mse_loss(x0_hat, target, reduction="none").mean((1, 2))
    return error / sigma.flatten().clamp(min=sigma_floor).square()


def tokens_as_view(image, patch):
    return F.pixel_unshuffle(image, patch).flatten(2).transpose(1, 2)


def image_of_view(tokens, grid, patch):
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), patch)


class WholeGrams(Grams):
    """All products of pixels, though half of them are the other half."""

    def update(self, z, x):
        z, x = z.double(), x.double()
        self.add(x.mT @ x, z.mT @ x, z.mT @ z)

    def add(self, pixel, cross, latent):
        for own, product in ((self.pixel, pixel), (self.cross, cross), (self.latent, latent)):
            own += product


class Float32Grams(WholeGrams):
    def update(self, z, x):
        for z_part, x_part in zip(z.split(256), x.split(256), strict=True):
            self.add(x_part.mT @ x_part, z_part.mT @ x_part, z_part.mT @ z_part)


class JointGrams(WholeGrams):
    def update(self, z, x):
        both, rank = torch.cat([z, x], 1).double(), z.shape[1]
        sums = both.new_empty(both.shape[1], both.shape[1])
        for i in range(0, len(sums), STRIP):
            sums[i : i + STRIP, i:] = both[:, i : i + STRIP].mT @ both[:, i:]
            sums[i:, i : i + STRIP] = sums[i : i + STRIP, i:].mT
        self.add(sums[rank:, rank:], sums[:rank, rank:], sums[:rank, :rank])


VIEWS = {  # patches: tokens as a view of the image, and back
    "training.objective.to_tokens": tokens_as_view, "training.objective.to_image": image_of_view,
    "components.pipelines.to_tokens": tokens_as_view, "components.pipelines.to_image": image_of_view,
}  # fmt: skip
OLD = VIEWS | {
    "components.subspace.recover_velocity": two_projections, "components.subspace.recover_clean": clean_by_sums,
    "components.color.PixelCodec.clamp": clamp_through_srgb, "components.color._cube_root": masked_cube_root,
    "method.loss.variance_reduced_target": spelled_target, "method.loss.velocity_mse": error_of_velocities,
}  # fmt: skip
