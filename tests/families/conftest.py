"""A tiny base of every family: tests/tiny/NAME.py builds a stock pipeline with random weights."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.nn.utils.rnn import pad_sequence

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.components.pipelines import flow_solver
from asymflow_ft.components.subspace import PixelSubspace
from asymflow_ft.families import family_named
from asymflow_ft.training.encode import encode_texts

NAMES = ["flux2", "flux3", "flux1", "sd3", "qwen_image", "z_image", "ernie_image"]
PROMPTS = ["red apple", "a rocket over the sea"]
LENGTH = 16  # text tokens
SIDE = 64  # pixels


@dataclass(frozen=True)
class Tiny:
    """A family with a tiny base of its kind: the folder, the stock pipeline in float32, and a subspace that fits."""

    name: str
    family: ModuleType
    folder: str
    parts: DiffusionPipeline
    subspace: PixelSubspace

    @property
    def grid(self) -> tuple[int, int]:
        side = SIDE // self.subspace.config["patch"]
        return side, side

    def latents(self, count: int, seed: int) -> torch.Tensor:
        """Latent tokens (B, N, R), N(0, 1)."""
        shape = (count, self.grid[0] * self.grid[1], self.subspace.config["rank"])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def texts(self) -> torch.Tensor:
        """Embeddings of PROMPTS (B, L, E)."""
        return pad_sequence(list(encode_texts(self.family, self.parts, PROMPTS, LENGTH)), batch_first=True)

    def guidance(self) -> float | None:
        """What the network is told of guidance."""
        kind = self.family.pixel_pipeline_class(self.parts)
        return pixel_pipeline(self, kind).distilled_guidance


@pytest.fixture(scope="session", params=NAMES)
def tiny(request, tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    import_module(f"tests.tiny.{request.param}").build(folder)
    family = family_named(request.param)
    parts = family.load_parts(str(folder), (*family.TEXT_PARTS, "vae", "transformer", "scheduler"), torch.float32)
    parts.set_progress_bar_config(disable=True)
    patch, rank = family.pixel_patch(parts.vae), family.latent_dim(parts.vae)
    basis = torch.linalg.qr(torch.randn(3 * patch**2, rank, generator=torch.Generator().manual_seed(0))).Q
    return Tiny(request.param, family, str(folder), parts, PixelSubspace.from_fit(basis, torch.tensor(2.4)))


def pixel_pipeline(tiny: Tiny, kind=None, transformer=None):
    kind = kind or tiny.family.pixel_pipeline_class(tiny.parts)
    texts = {name: tiny.parts.components[name] for name in tiny.family.TEXT_PARTS}
    pipeline = kind(
        scheduler=flow_solver(), transformer=transformer or tiny.family.lift(tiny.parts.transformer, tiny.subspace),
        subspace=tiny.subspace, codec=PixelCodec(), **texts, shift=5.0, shift_mode="static", default_size=SIDE,
        max_sequence_length=LENGTH,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
