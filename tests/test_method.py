"""Laws of the method, in float64."""

import math

import pytest
import torch

from asymflow_ft.components.color import PixelCodec
from asymflow_ft.method import align, asymflow, guidance, loss, noise
from asymflow_ft.method.patches import to_image, to_tokens


@pytest.fixture
def case():
    """Random tokens (B, N, D) with a basis (D, R), a scale and levels (B, 1, 1)."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    basis = torch.linalg.qr(rand(48, 8)).Q
    sigma = torch.tensor([0.02, 0.3, 0.7, 1.0], dtype=torch.float64)[:, None, None]
    return rand(4, 5, 48), rand(4, 5, 48), rand(4, 5, 8), basis, torch.tensor(1.7, dtype=torch.float64), sigma


def test_perfect_prediction_recovers_velocity_and_image(case):
    x0, eps, _, basis, scale, sigma = case
    x_t = torch.lerp(x0, eps, sigma)
    u = asymflow.network_target(x0, eps, basis, scale)
    torch.testing.assert_close(asymflow.recover_velocity(u, x_t, sigma, basis, scale), eps - x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(asymflow.recover_clean(u, x_t, sigma, basis, scale), x0, rtol=0, atol=1e-12)


def test_clean_estimate_is_the_velocitys_for_any_output(case):
    u, x_t, _, basis, scale, sigma = case
    v = asymflow.recover_velocity(u, x_t, sigma, basis, scale)
    clean = asymflow.recover_clean(u, x_t, sigma, basis, scale)
    torch.testing.assert_close(asymflow.velocity_to_clean(v, x_t, sigma), clean, rtol=0, atol=1e-12)
    torch.testing.assert_close(asymflow.clean_to_velocity(clean, x_t, sigma), v, rtol=0, atol=1e-11)


def test_lifted_state_projects_to_the_latent_state(case):
    _, eps, z, basis, scale, sigma = case
    x_t = torch.lerp(asymflow.lift(z, basis, scale), eps, sigma)
    z_tau, tau = asymflow.latent_state(z, eps, sigma, basis, scale)
    seen = asymflow.calibrate(sigma, scale)
    torch.testing.assert_close(seen.gain * x_t @ basis, z_tau, rtol=0, atol=1e-13)
    torch.testing.assert_close(seen.tau, tau)


def test_extreme_ranks_are_the_known_parameterisations(case):
    u, x_t, _, _, _, sigma = case
    one = torch.ones((), dtype=torch.float64)
    whole, none = torch.eye(48, dtype=torch.float64), torch.zeros(48, 1, dtype=torch.float64)
    torch.testing.assert_close(asymflow.recover_velocity(u, x_t, sigma, whole, one), u)  # velocity prediction
    torch.testing.assert_close(asymflow.recover_clean(u, x_t, sigma, none, one), -u)  # clean-image prediction


def test_reference_that_errs_like_the_model_leaves_no_loss(case):
    x0, error, *_, sigma = case
    target = loss.variance_reduced_target(x0, x0 - error, x0, x0 - error, sigma, kappa=None)
    assert torch.equal(target.coefficient, torch.ones_like(target.coefficient))
    assert loss.velocity_mse(x0 - error, target.image, sigma).max() < 1e-24


def test_reference_without_error_leaves_plain_velocity_matching(case):
    x0, eps, _, _, _, sigma = case
    v = eps - x0 + 0.1
    x0_hat = torch.lerp(x0, eps, sigma) - sigma * v
    target = loss.variance_reduced_target(x0, x0_hat, x0, x0, sigma)
    floor = sigma.clamp(min=0.05)
    expected = ((sigma / floor) * (v - (eps - x0))).square().mean()
    torch.testing.assert_close(loss.velocity_mse(x0_hat, target.image, sigma).mean(), expected)


def test_fade_ends(case):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert loss.fade(ends, 0.3).tolist() == [1.0, 0.0]
    assert loss.fade(ends, None).tolist() == [0.0, 0.0]


def test_procrustes_finds_a_planted_subspace_from_split_sums(case):
    _, _, z, basis, scale, _ = case
    whole, first, second = (align.Grams.zeros(48, 8) for _ in range(3))
    x = asymflow.lift(z, basis, scale)
    whole.update(z, x)
    first.update(z[:1], x[:1])
    second.update(z[1:], x[1:])
    for mine, other in zip(first.tensors(), second.tensors(), strict=True):
        mine += other
    for grams in (whole, first):
        fit = align.procrustes(grams)
        torch.testing.assert_close(fit.basis, basis, rtol=0, atol=1e-10)
        torch.testing.assert_close(fit.scale, scale)
    total, left = align.explained_energy(whole, fit, torch.block_diag(*[align.patch_dct(4)] * 3))
    torch.testing.assert_close(total.sum(), x.square().sum() / len(x.flatten(0, 1)))
    assert left.abs().max() < 1e-12


@pytest.fixture
def pixels():
    """20,000 correlated pixel tokens of 48 values about a mean that is not 0."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(48, 48, generator=g, dtype=torch.float64)
    return torch.randn(20_000, 48, generator=g, dtype=torch.float64) @ mix + torch.arange(48.0)


def shares(z, x):
    grams = align.Grams.zeros(x.shape[1], z.shape[1])
    grams.update(z, x)
    return align.linear_shares(grams)


def test_turned_pixels_are_as_close_to_pixels_as_latents_can_be(pixels):
    turn = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    whole = shares(pixels @ turn, pixels)
    assert whole.latents_from_pixels == pytest.approx(1, abs=1e-10)
    assert whole.pixels_from_latents == pytest.approx(1, abs=1e-10) and whole.pixels_from_best == pytest.approx(1)
    part = shares(pixels @ turn[:, :8], pixels)
    assert part.latents_from_pixels == pytest.approx(1, abs=1e-10)
    assert part.pixels_from_latents < part.pixels_from_best < 1
    best = shares(pixels @ torch.linalg.eigh(torch.cov(pixels.mT)).eigenvectors[:, -8:], pixels)
    assert best.pixels_from_latents == pytest.approx(best.pixels_from_best, abs=1e-3)  # less what is chance


def test_latents_that_know_nothing_of_pixels_explain_nothing(pixels):
    noise = torch.randn(20_000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = shares(noise, pixels)
    assert abs(found.latents_from_pixels) < 1e-3 and abs(found.pixels_from_latents) < 1e-3
    half = shares(pixels[:, :8] / pixels[:, :8].std(0) + noise, pixels)
    assert half.latents_from_pixels == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="too few"):
        shares(noise[:49], pixels[:49])


def test_closeness_to_pixels_does_not_depend_on_how_latents_are_written(pixels):
    g = torch.Generator().manual_seed(4)
    z = torch.tanh(pixels[:, :8] / 5) + torch.randn(20_000, 8, dtype=torch.float64, generator=g)
    turned = z @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=g)).Q * 3 - 7
    one, other = shares(z, pixels), shares(turned, pixels / 0.16 + 2)
    assert 0.1 < one.latents_from_pixels < 0.9 and 0.01 < one.pixels_from_latents < 0.9
    assert vars(other) == pytest.approx(vars(one), abs=1e-9)


def test_sums_rescale_to_another_pixel_map(case):
    x0, _, z, *_ = case
    mean, std = torch.linspace(-1, 1, 48, dtype=x0.dtype), 0.3
    raw, mapped = (align.Grams.zeros(48, 8) for _ in range(2))
    raw.update(z, x0)
    mapped.update(z, (x0 - mean) / std)
    for got, expected in zip(raw.rescaled(mean, std).tensors(), mapped.tensors(), strict=True):
        torch.testing.assert_close(got, expected)


def test_sums_of_a_million_tokens_are_those_of_plain_float64():
    dim, rank, tokens = align.STRIP + 22, 8, 2**12  # a strip and a part of one
    g = torch.Generator().manual_seed(5)
    mix = torch.randn(dim, dim, generator=g) / dim**0.5
    x0 = torch.randn(tokens, dim, generator=g) @ mix * torch.logspace(0, -3, dim) + 0.3
    grams, plain = (align.Grams.zeros(dim, rank) for _ in range(2))
    for i in range(1_000_000 // tokens + 1):
        x = x0.roll(i, 1) * (1 + i % 7) if i % 3 else x0 + i / 100
        z = x[:, :rank].tanh()
        grams.update(z, x)
        x, z = x.double(), z.double()
        plain.pixel += x.mT @ x
        plain.cross += z.mT @ x
        plain.latent += z.mT @ z
        plain.tokens += len(x)
        plain.pixel_sum += x.sum(0)
        plain.latent_sum += z.sum(0)
    assert grams.tokens >= 1_000_000 and torch.equal(grams.pixel, grams.pixel.mT)
    for got, expected in zip(grams.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15 * expected.abs().max().item())
    fit, exact = align.procrustes(grams), align.procrustes(plain)
    torch.testing.assert_close(fit.basis, exact.basis, rtol=0, atol=1e-11)
    torch.testing.assert_close(fit.scale, exact.scale, rtol=1e-12, atol=0)


def test_too_few_images_are_refused():
    grams = align.Grams.zeros(48, 8)
    grams.update(torch.randn(3, 8), torch.randn(3, 48))
    with pytest.raises(ValueError, match="3 tokens determine only"):
        align.procrustes(grams)
    with pytest.raises(ValueError, match="larger patch"):
        align.Grams.zeros(12, 16)


def test_guidance_laws(case):
    cond, uncond, _, _, _, _ = case
    torch.testing.assert_close(guidance.guide(cond, uncond, 1.0, cond), cond)
    direction = cond + uncond
    bias = guidance.guide(cond, uncond, 4.0, direction) - cond
    assert (bias * direction).flatten(1).sum(1).abs().max() < 1e-10
    plain = guidance.guide(cond, uncond, 4.0, direction, orthogonal=0.0)
    torch.testing.assert_close(plain, uncond + 4 * (cond - uncond))


def test_noise_levels():
    assert noise.inference_sigmas(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert noise.dynamic_shift(1024**2) == pytest.approx(17) and noise.dynamic_shift(2048**2) == pytest.approx(34)
    assert noise.dynamic_shift(1024**2, "exp") == pytest.approx(17)
    assert noise.dynamic_shift(1024 * 2048, "exp") == pytest.approx(17 * math.exp(math.log(2) / 3))
    with pytest.raises(ValueError, match="'sqrt' or 'exp'"):
        noise.dynamic_shift(1, "linear")


def test_patches_round_trip_and_refuse_odd_sizes():
    image = torch.randn(2, 3, 32, 48)
    tokens = to_tokens(image, 16)
    assert tokens[1, 5, (2 * 16 + 3) * 16 + 4] == image[1, 2, 16 + 3, 2 * 16 + 4]  # channel 2, row 3, column 4 inside
    assert torch.equal(to_image(tokens, (2, 3), 16), image)
    assert tokens.is_contiguous() and to_image(tokens, (2, 3), 16).is_contiguous()  # else arithmetic is twice as slow
    with pytest.raises(ValueError, match="40x32"):
        to_tokens(torch.zeros(1, 3, 32, 40), 16)


def test_black_is_black_and_has_a_finite_slope():
    black = torch.full((1, 3, 1, 1), -1.0, requires_grad=True)
    pixels = PixelCodec(mean=(0.0, 0.0, 0.0), std=1.0).encode(black)
    pixels.sum().backward()
    assert pixels.abs().max() < 1e-9 and black.grad.isfinite().all()
