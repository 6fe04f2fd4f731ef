"""Fit the subspace: orthogonal Procrustes from latent to pixel tokens, or PCA of pixel tokens.

Both need only sums over tokens, so images stream through in constant memory and sums of several processes add up.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

STRIP = 128  # columns of a strip of X^T X; narrower ones make slower matrix products, wider ones compute more twice


@dataclass
class Grams:
    """Sums over M tokens in float64, on one device: pixel (D, D) = X^T X, cross (R, D) = Z^T X, latent (R, R) = Z^T Z,
    tokens = M, and the plain sums pixel_sum (D,) and latent_sum (R,)."""

    pixel: Tensor
    cross: Tensor
    latent: Tensor
    pixel_sum: Tensor
    latent_sum: Tensor
    tokens: Tensor

    @staticmethod
    def zeros(pixel_dim: int, rank: int, device: torch.device | str = "cpu") -> "Grams":
        """Empty sums for D = pixel_dim and R = rank. `device`: one that knows float64; tokens are summed there.

        Raises:
            ValueError: fewer pixel values than latent values per token.
        """
        if pixel_dim < rank:
            raise ValueError(
                f"a pixel patch of {pixel_dim} values cannot hold latent tokens of rank {rank}; use a larger patch"
            )
        shapes = ((pixel_dim, pixel_dim), (rank, pixel_dim), (rank, rank), (pixel_dim,), (rank,), ())
        return Grams(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def update(self, z: Tensor, x: Tensor) -> None:
        """Add paired tokens z (..., N, R) and x (..., N, D); uncentred, as the method asks."""
        z, x = z.flatten(0, -2).to(self.pixel), x.flatten(0, -2).to(self.pixel)
        if z.shape != (len(x), self.latent.shape[0]) or x.shape[1] != self.pixel.shape[0]:
            raise ValueError(
                f"latent tokens {tuple(z.shape)} and pixel tokens {tuple(x.shape)} do not pair up with rank "
                f"{self.latent.shape[0]} and {self.pixel.shape[0]} pixel values"
            )
        for i in range(0, len(self.pixel), STRIP):  # each product of two columns once, half of all work
            end = i + STRIP
            self.pixel[i:end, i:].addmm_(x[:, i:end].mT, x[:, i:])
            self.pixel[end:, i:end] = self.pixel[i:end, end:].mT
        self.cross.addmm_(z.mT, x)
        self.latent.addmm_(z.mT, z)
        self.pixel_sum += x.sum(0)
        self.latent_sum += z.sum(0)
        self.tokens += len(x)

    def rescaled(self, mean: Tensor, std: float) -> "Grams":
        """The sums for pixel tokens (x - mean) / std, with mean (D,): another affine pixel map, without the images."""
        mean = mean.to(self.pixel)
        both = torch.outer(self.pixel_sum, mean)
        return Grams(
            pixel=(self.pixel - both - both.mT + self.tokens * torch.outer(mean, mean)) / std**2,
            cross=(self.cross - torch.outer(self.latent_sum, mean)) / std,
            latent=self.latent,
            pixel_sum=(self.pixel_sum - self.tokens * mean) / std,
            latent_sum=self.latent_sum,
            tokens=self.tokens,
        )

    def to(self, device: torch.device | str) -> "Grams":
        """The sums on another device."""
        return Grams(*(tensor.to(device) for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        """The sums, in field order; adding another process's list in place merges the two."""
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class Fit:
    """basis (D, R) and scale (), float64; singular_values (R,) of the cross Gram, descending."""

    basis: Tensor
    scale: Tensor
    singular_values: Tensor


def procrustes(grams: Grams) -> Fit:
    """argmin over A^T A = I of ||X - Z A^T||, and the scale s = ||X A|| / ||Z|| (paper Eqs. 9-10).

    With Z^T X = U S V^T, A = V U^T: a polar factor, so it has no free sign. s is a ratio of norms, not the
    least-squares scale.

    Raises:
        ValueError: no tokens, non-finite sums, or latents that do not determine all R directions.
    """
    if not all(torch.isfinite(t).all() for t in grams.tensors()):
        raise ValueError("the sums over the images contain NaN or infinity; check the VAE's precision and the images")
    left, singular, right = torch.linalg.svd(grams.cross, full_matrices=False)
    if not singular[-1] > singular[0] * 1e-10:
        raise ValueError(
            f"{int(grams.tokens)} tokens determine only {int((singular > singular[0] * 1e-10).sum())} of "
            f"{len(singular)} directions; align with more, or more varied, images"
        )
    basis = right.mT @ left.mT
    scale = ((basis.mT @ grams.pixel @ basis).trace() / grams.latent.trace()).sqrt()
    return Fit(basis=basis, scale=scale, singular_values=singular)


def pca(pixel_gram: Tensor, rank: int) -> Tensor:
    """(D, rank) eigenvectors of the largest eigenvalues of X^T X (D, D), ascending; for training from scratch.

    Raises:
        ValueError: rank not in 1..D.
    """
    if not 1 <= rank <= len(pixel_gram):
        raise ValueError(f"rank {rank} is not between 1 and the {len(pixel_gram)} values of a pixel patch")
    return torch.linalg.eigh(pixel_gram).eigenvectors[:, -rank:]


def bottleneck_weight(weight: Tensor, basis: Tensor) -> Tensor:
    """JiT patch embedding (b, 3, p, p) whose first R filters are the PCA basis (D, R), channel-last features.

    The gain sqrt(2 D / (D + b)) gives them the size of the Xavier initialisation that they replace.
    """
    filters, channels, patch, _ = weight.shape
    dim, rank = basis.shape
    gain = (2 * dim / (dim + filters)) ** 0.5
    lifted = basis.mT.reshape(rank, patch, patch, channels).permute(0, 3, 1, 2) * gain
    return torch.cat([lifted.to(weight), weight[rank:]])


def explained_energy(grams: Grams, fit: Fit, rotation: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Energy of every pixel feature, and of what the lift s A z leaves of it: two (D,) vectors, mean per token.

    Args:
        rotation: (D, D) orthonormal rows; measures in another basis of the patch, such as its cosine transform.
    """
    turn = torch.eye(len(grams.pixel), dtype=torch.float64) if rotation is None else rotation.double()
    basis, cross = turn @ fit.basis * fit.scale, grams.cross @ turn.mT
    total = ((turn @ grams.pixel) * turn).sum(1)
    left = total - 2 * (cross.mT * basis).sum(1) + ((basis @ grams.latent) * basis).sum(1)
    return total / grams.tokens, left / grams.tokens


@dataclass(frozen=True)
class LinearShares:
    """Shares of variance that best affine maps explain, token by token: of the latents from pixels, of the pixels from
    latents, and of the pixels from the R best numbers of a patch (its principal components). 1 is all; tokens that
    have nothing to do with each other give 0 in the mean, a little more or less in a sample."""

    latents_from_pixels: float
    pixels_from_latents: float
    pixels_from_best: float


def linear_shares(grams: Grams) -> LinearShares:
    """How close latents are to pixels: a linear map of the own patch, and back. Rotating or scaling the latents
    changes none of it.

    Raises:
        ValueError: no more tokens than pixel values, which any map fits.
    """
    if grams.tokens <= len(grams.pixel) + 1:
        raise ValueError(f"{int(grams.tokens)} tokens are too few for maps of {len(grams.pixel)} values")
    x, z = grams.pixel_sum / grams.tokens, grams.latent_sum / grams.tokens
    pixel = grams.pixel / grams.tokens - torch.outer(x, x)
    latent = grams.latent / grams.tokens - torch.outer(z, z)
    cross = grams.cross / grams.tokens - torch.outer(z, x)
    spectrum = torch.linalg.eigvalsh(pixel)
    return LinearShares(
        latents_from_pixels=_explained(pixel, cross.mT, latent.trace(), grams.tokens),
        pixels_from_latents=_explained(latent, cross, pixel.trace(), grams.tokens),
        pixels_from_best=(spectrum[-len(z) :].sum() / spectrum.sum()).item(),
    )


def _explained(covariance: Tensor, cross: Tensor, total: Tensor, tokens: Tensor) -> float:
    """R squared of least squares, from the covariance (n, n) of what it maps, the cross covariance (n, m) and the
    variance () of what it explains; adjusted for what n numbers fit of anything by chance."""
    values, directions = torch.linalg.eigh(covariance)
    used = values > values[-1] * 1e-10  # flat patches and unused channels leave directions without variance
    explained = ((directions.mT @ cross)[used].square().sum(1) / values[used]).sum() / total
    return (1 - (1 - explained) * (tokens - 1) / (tokens - 1 - used.sum())).item()


def patch_dct(patch: int) -> Tensor:
    """(p**2, p**2) orthonormal cosine transform of a p x p patch; row u * p + v is frequency (u, v)."""
    k = torch.arange(patch, dtype=torch.float64)
    one = torch.cos(torch.pi * (k + 0.5) * k[:, None] / patch) * (2 / patch) ** 0.5
    one[0] /= 2**0.5
    return torch.kron(one, one)
