"""FID and KID against closed forms, direct sums, and torchmetrics where it can be trusted."""

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from asymflow_ft.evaluation.distribution import frechet_distance, kernel_distance, reference


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(prompts):
    return torch.full((1, prompts), 1 / prompts, dtype=torch.float64)


def with_moments(x, mean, covariance):
    """`x` (n, d) moved so that its sample mean and covariance are exactly these."""
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (len(x) - 1))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def closed_form(mean_a, a, mean_b, b):
    """With the symmetric form sqrt(sqrt(A) B sqrt(A)), which the code does not use."""
    root = square_root(a)
    return (mean_a - mean_b).square().sum() + (a + b - 2 * square_root(root @ b @ root)).trace()


class Identity(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.num_features = dim

    def forward(self, x):
        return x


@pytest.mark.parametrize(("n", "m"), [(40, 60), (40, 9), (9, 40)])
def test_frechet_distance_of_gaussians_with_known_moments(n, m):
    """Covariances that do not commute; n or m = 9 is as low as 8 features allow."""
    mixing = [normal(8, 8, seed=s) for s in (1, 2)]
    a, b = (w @ w.T + 0.1 * torch.eye(8, dtype=torch.float64) for w in mixing)
    mean_a, mean_b = normal(8, seed=3), normal(8, seed=4)
    x, y = with_moments(normal(n, 8, seed=5), mean_a, a), with_moments(normal(m, 8, seed=6), mean_b, b)
    found = frechet_distance(x[:, None], reference(y), equal(n))
    torch.testing.assert_close(found[0], closed_form(mean_a, a, mean_b, b), rtol=1e-9, atol=1e-9)


def test_frechet_distance_of_axes_is_the_one_dimensional_formula():
    x = with_moments(
        normal(50, 3, seed=1), torch.tensor([1.0, 2, 3]).double(), torch.diag(torch.tensor([4.0, 1, 9])).double()
    )
    y = with_moments(
        normal(50, 3, seed=2), torch.tensor([1.0, 0, 3]).double(), torch.diag(torch.tensor([1.0, 1, 4])).double()
    )
    found = frechet_distance(x[:, None], reference(y), equal(50)).item()
    assert found == pytest.approx(2**2 + (2 - 1) ** 2 + 0 + (3 - 2) ** 2)


def test_frechet_distance_of_fewer_pictures_than_features():
    """Rank deficient: against the closed form of the sample moments, and 0 for equal sets."""
    x, y = normal(12, 40, seed=1), normal(20, 40, seed=2) * 1.5
    found = frechet_distance(x[:, None], reference(y), equal(12))[0]
    expected = closed_form(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert abs(frechet_distance(x[:, None], reference(x), equal(12)).item()) < 1e-9


def test_frechet_distance_is_that_of_torchmetrics():
    x, y = normal(80, 6, seed=1) + 0.5, normal(90, 6, seed=2)
    theirs = FrechetInceptionDistance(Identity(6)).set_dtype(torch.float64)
    theirs.update(x, real=False)
    theirs.update(y, real=True)
    assert frechet_distance(x[:, None], reference(y), equal(80)).item() == pytest.approx(theirs.compute().item())
    assert abs(frechet_distance(y[:, None], reference(y), equal(90)).item()) < 1e-12


def test_weights_leave_prompts_out_and_repeat_them():
    x, real = normal(10, 2, 5, seed=1), reference(normal(30, 5, seed=2))
    kept = torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.float64)[None]
    for distance in (frechet_distance, kernel_distance):
        part = distance(x[kept[0] > 0], real, equal(8))
        torch.testing.assert_close(distance(x, real, kept / 8), part, rtol=1e-10, atol=1e-12)


def direct_mmd(x, y):
    """One pair at a time, as the definition has it; (n, d) and (m, d)."""
    kernel = lambda a, b: (float(a @ b) / len(a) + 1) ** 3  # noqa: E731
    within = lambda z: [kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]  # noqa: E731
    average = lambda values: sum(values) / len(values)  # noqa: E731
    return average(within(x)) + average(within(y)) - 2 * average([kernel(a, b) for a in x for b in y])


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kernel_distance_is_the_definitions_and_torchmetrics():
    x, y = normal(14, 5, seed=1) + 0.3, normal(14, 5, seed=2)
    found = kernel_distance(x[:, None], reference(y), equal(14)).item()
    assert found == pytest.approx(direct_mmd(x, y), rel=1e-10)
    assert kernel_distance(x[:, None], reference(y[:9]), equal(14)).item() == pytest.approx(direct_mmd(x, y[:9]))
    theirs = KernelInceptionDistance(Identity(5), subsets=1, subset_size=14)
    theirs.update(x, real=False)
    theirs.update(y, real=True)
    assert found == pytest.approx(theirs.compute()[0].item())


def test_kernel_distance_in_blocks_of_rows(monkeypatch):
    from asymflow_ft.evaluation import distribution

    x, y = normal(14, 2, 5, seed=1), normal(11, 5, seed=2)
    whole = kernel_distance(x, reference(y), equal(14))
    monkeypatch.setattr(distribution, "_ROWS", 4)
    torch.testing.assert_close(kernel_distance(x, reference(y), equal(14)), whole, rtol=1e-12, atol=0)


def expected_mmd(shift, dim):
    """Of N(shift, I) and N(0, I), from the first three moments of x.y; a is the squared length of the shift."""
    a = dim * shift**2
    third = a**3 + 6 * a**2 + (3 * dim + 6) * a
    shifted = 1 + 3 * a / dim + 3 * (dim + 2 * a + a**2) / dim**2 + third / dim**3
    return shifted + (1 + 3 / dim) - 2 * (1 + 3 * (dim + a) / dim**2)


@pytest.mark.parametrize("per_prompt", [1, 4])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_kernel_distance_has_no_bias(per_prompt, shift):
    """The mean over many small draws is the expectation, 0 for one distribution, although a prompt's pictures are
    alike; FID of the same draws is far above its own."""
    g = torch.Generator().manual_seed(0)
    kid, fid = [], []
    for _ in range(600):
        shared = torch.randn(12, 1, 4, generator=g, dtype=torch.float64)
        x = 0.8 * shared + 0.6 * torch.randn(12, per_prompt, 4, generator=g, dtype=torch.float64) + shift
        real = reference(torch.randn(12, 4, generator=g, dtype=torch.float64))
        kid.append(kernel_distance(x, real, equal(12)).item())
        fid.append(frechet_distance(x, real, equal(12)).item())
    kid = torch.tensor(kid)
    error = kid.std().item() / len(kid) ** 0.5
    assert abs(kid.mean().item() - expected_mmd(shift, 4)) < 3 * error < 0.4
    assert sum(fid) / len(fid) > 4 * shift**2 + 0.5


def test_two_real_pictures_are_the_least():
    with pytest.raises(ValueError, match="at least two real pictures, got 1"):
        reference(torch.zeros(1, 3))
