"""The low-rank pixel subspace as a saved pipeline component, and the network read through it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from asymflow_ft.method.asymflow import calibrate, recover_clean, recover_velocity
from asymflow_ft.method.patches import to_tokens

ORTHONORMAL_TOLERANCE = 5e-3  # the official release rounds the basis to bf16, which leaves up to 3e-3


class PixelSubspace(ModelMixin, ConfigMixin):
    """Basis A (pixel_dim, rank) with orthonormal columns and scale s (), float32 buffers.

    Args:
        pixel_dim: values of a pixel patch, 3 * patch**2. rank: values of a latent token. patch: side of a patch.
    """

    @register_to_config
    def __init__(self, pixel_dim: int = 768, rank: int = 128, patch: int = 16):
        super().__init__()
        self.register_buffer("basis", torch.eye(pixel_dim, rank))
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "PixelSubspace":
        """As in diffusers, but always in float32: a bf16 basis is orthonormal only to 3e-3."""
        # diffusers' own way, `_keep_in_fp32_modules`, cannot load without accelerate
        options = {name: value for name, value in options.items() if name not in ("dtype", "torch_dtype")}
        return super().from_pretrained(folder, **options, torch_dtype=torch.float32)

    @staticmethod
    def from_fit(basis: Tensor, scale: Tensor) -> "PixelSubspace":
        """Wrap a fitted basis (D, R) and scale ().

        Raises:
            ValueError: D is not 3 * patch**2, columns are not orthonormal, or the scale is not positive.
        """
        pixel_dim, rank = basis.shape
        patch = round((pixel_dim / 3) ** 0.5)
        if 3 * patch**2 != pixel_dim:
            raise ValueError(f"a basis of {pixel_dim} rows does not fit square RGB patches (3 * patch**2 rows)")
        error = orthonormality_error(basis)
        if not error < ORTHONORMAL_TOLERANCE or not scale > 0:
            raise ValueError(
                f"this is not a usable subspace: A^T A differs from the identity by {error:.2g} (at most "
                f"{ORTHONORMAL_TOLERANCE:g}), the scale is {float(scale):.4g} (must be positive); align again"
            )
        subspace = PixelSubspace(pixel_dim=pixel_dim, rank=rank, patch=patch)
        subspace.basis.copy_(basis)
        subspace.scale.copy_(scale)
        return subspace

    @staticmethod
    def from_official(file: str | Path) -> "PixelSubspace":
        """Read the reference tool's pair `proj_mat_p16` (768, 128) and `scale_p16` from a .pth or .safetensors file.

        Raises:
            ValueError: the file does not hold such a pair.
        """
        path = Path(file)
        try:
            official = path.suffix == ".safetensors"
            tensors = load_file(path) if official else torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # a file of another kind makes torch raise anything
            raise ValueError(f"{path} cannot be read as a subspace: {error}") from error
        keys = [match for key in tensors if (match := re.fullmatch(r"proj_mat_p(\d+)", key))]
        if len(keys) != 1 or f"scale_p{keys[0][1]}" not in tensors:
            raise ValueError(f"{path} holds {sorted(tensors)}, not one pair proj_mat_p<patch> and scale_p<patch>")
        return PixelSubspace.from_fit(
            tensors[keys[0][0]].float(), torch.as_tensor(tensors[f"scale_p{keys[0][1]}"]).float()
        )

    def float32(self) -> tuple[Tensor, Tensor]:
        """Basis and scale in at least float32, also after `.to(torch.bfloat16)` on the pipeline."""
        wide = torch.promote_types(self.basis.dtype, torch.float32)
        return self.basis.to(wide), self.scale.to(wide)


def orthonormality_error(basis: Tensor) -> float:
    """max |A^T A - I| of a basis (D, R), in float64."""
    wide = basis.double()
    return (wide.mT @ wide - torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)).abs().max().item()


def load_subspace(path: str | Path) -> PixelSubspace:
    """A subspace folder written by `asymflow-ft align`, or the official .pth / .safetensors pair.

    Raises:
        ValueError: nothing usable at `path`; the message names the command that makes one.
    """
    path = Path(path)
    if path.is_file():
        return PixelSubspace.from_official(path)
    for folder in (path, path / "subspace"):
        if (folder / "config.json").is_file():
            try:
                return PixelSubspace.from_pretrained(folder)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"the subspace in {folder} cannot be read ({error}); align again") from error
    raise ValueError(
        f"no aligned subspace at {path}; make one with `asymflow-ft align --base BASE --data IMAGES --out {path}`"
    )


@dataclass(frozen=True)
class Cond:
    """What a prediction is conditioned on. The network runs in the precision of `embeds` (autocast for 16 bits).

    embeds: text embeddings (B, L, E). guidance: distilled guidance value of bases that embed one, else None.
    references: condition images in pixel space, (B, 3, H, W) each, of any size; the model sees them clean.
    z_references: their latent tokens, (B, M, R) each, for the frozen latent reference in training; () elsewhere.
    """

    embeds: Tensor
    guidance: float | None = None
    references: tuple[Tensor, ...] = ()
    z_references: tuple[Tensor, ...] = ()

    def lengths(self) -> list[int]:
        """Rows of each prompt before the zeros that pad it; reads values, so a GPU has to be waited for."""
        rows = torch.arange(1, self.embeds.shape[1] + 1, device=self.embeds.device)
        return (self.embeds.any(dim=-1) * rows).amax(dim=1).tolist()

    def reference_grids(self, patch: int) -> list[tuple[int, int]]:
        """(rows, columns) of tokens of each condition image."""
        return [(image.shape[-2] // patch, image.shape[-1] // patch) for image in self.references]


Grid = tuple[int, int]
# (transformer, tokens (B, N, D), tau (B,), cond, grid, reference tokens with grids) -> network output (B, N, D)
Predict = Callable[..., Tensor]


@dataclass(frozen=True)
class PixelModel:
    """A lifted network together with its subspace: noisy pixel tokens in, velocity or clean image out.

    transformer: the (possibly prepared) diffusers model. predict: the family's call of it. guidance: for `Cond`, the
    distilled value that this network is given in training and sampling, or None.
    """

    transformer: nn.Module
    subspace: PixelSubspace
    predict: Predict
    guidance: float | None = None

    def network(self, x_t: Tensor, sigma: Tensor, cond: Cond, grid: Grid) -> Tensor:
        """Raw network output u (B, N, D) for x_t (B, N, D) at sigma (B, 1, 1); grid is (rows, columns) of tokens."""
        basis, scale = self.subspace.float32()
        seen = calibrate(sigma.to(basis), scale)
        patch = self.subspace.config["patch"]
        # clean condition images are at noise level 0, where the gain is 1 / s
        clean = [to_tokens(image.to(basis), patch) / scale for image in cond.references]
        references = list(zip(clean, cond.reference_grids(patch), strict=True))
        return self.predict(self.transformer, seen.gain * x_t.to(basis), seen.tau.flatten(), cond, grid, references)

    def velocity(self, x_t: Tensor, sigma: Tensor, cond: Cond, grid: Grid, sigma_min: float = 1e-4) -> Tensor:
        """Full pixel velocity (B, N, D), at least float32. See `recover_velocity`."""
        return recover_velocity(
            self.network(x_t, sigma, cond, grid), x_t, sigma, *self.subspace.float32(), sigma_min=sigma_min
        )

    def clean(self, x_t: Tensor, sigma: Tensor, cond: Cond, grid: Grid) -> Tensor:
        """Estimate of the clean pixel tokens (B, N, D), at least float32. See `recover_clean`."""
        return recover_clean(self.network(x_t, sigma, cond, grid), x_t, sigma, *self.subspace.float32())
