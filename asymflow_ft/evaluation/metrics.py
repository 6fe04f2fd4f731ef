"""Metrics of drawn pictures, with intervals and verdicts. (Signatures; the content follows.)"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from asymflow_ft.evaluation.features import Features
from asymflow_ft.evaluation.results import Difference, Metric, Value

if TYPE_CHECKING:
    from asymflow_ft.evaluation.suites import Prompt

METRICS: dict[str, Metric] = {}
DEFAULT_CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Measured:
    """What results.json holds of the metrics. spectra: {"frequency": .., model: .., "real": ..}; {} if not asked for."""

    metrics: list[Metric]
    values: list[Value]
    differences: list[Difference]
    spectra: dict[str, list[float]]
    warnings: list[str]


def default_metrics(has_real: bool, has_references: bool, features: str | None) -> list[str]:
    """Keys of the metrics that can run with what is at hand."""
    raise NotImplementedError


def measure(
    pictures: dict[str, list[list[Path]]], prompts: "Sequence[Prompt]", real: Sequence[Path | Image.Image] | None,
    references: Sequence[Image.Image | None], names: Sequence[str], features: Features | None, at: tuple[int, int],
    seed: int, device: str = "cpu", clip: str = DEFAULT_CLIP,
) -> Measured:  # fmt: skip
    raise NotImplementedError
