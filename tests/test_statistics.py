"""Intervals: do they hold the truth as often as they say, and do they know of prompts and pairs?"""

import math

import pytest
import torch

from asymflow_ft.evaluation import statistics


def average(rows):
    """Of each prompt's value, (P,)."""
    return lambda weights: weights @ rows


def bootstrap(rows, seed=0, resamples=400):
    found = statistics.estimate(average(rows), statistics.bootstrap_weights(len(rows), seed, resamples))
    return found, statistics.bootstrap_interval(found, len(rows))


def jackknife(rows, seed=0):
    found = statistics.estimate(average(rows), statistics.jackknife_weights(len(rows), seed))
    return found, statistics.jackknife_interval(found)


@pytest.mark.parametrize("prompts", [6, 12, 40])
@pytest.mark.parametrize("interval", [bootstrap, jackknife])
def test_95_of_100_intervals_hold_the_truth(prompts, interval):
    trials = 600
    rows = torch.randn(trials, prompts, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 2
    held = sum(low <= 2 <= high for low, high in (interval(row, i)[1] for i, row in enumerate(rows)))
    # the standard error of the share is 0.9 %; plain percentiles hold the truth in 86 % with 6 prompts
    assert 0.91 < held / trials < 0.975


def test_pictures_of_a_prompt_move_together():
    g = torch.Generator().manual_seed(2)
    prompt = torch.randn(300, 25, 1, generator=g, dtype=torch.float64)
    pictures = prompt + 0.3 * torch.randn(300, 25, 4, generator=g, dtype=torch.float64)
    by_prompt = [bootstrap(rows.mean(1), i)[1] for i, rows in enumerate(pictures)]
    by_picture = [bootstrap(rows.flatten(), i)[1] for i, rows in enumerate(pictures)]
    held, held_wrongly = (sum(low <= 0 <= high for low, high in found) / 300 for found in (by_prompt, by_picture))
    assert held > 0.91 and held_wrongly < 0.8


def test_paired_difference_is_narrower_than_the_models_own_intervals():
    g = torch.Generator().manual_seed(3)
    hard = torch.randn(30, generator=g, dtype=torch.float64)
    a, b = (hard + 0.1 * torch.randn(30, generator=g, dtype=torch.float64) + shift for shift in (0.2, 0.0))
    (first, (low_a, high_a)), (other, (low_b, high_b)) = bootstrap(a), bootstrap(b)
    low, high = statistics.bootstrap_interval(first.minus(other), 30)
    assert low_a < high_b and low_b < high_a  # alone, the models overlap
    assert high - low < 0.3 * (high_a - low_a)
    assert statistics.verdict((low, high), "higher") == "better"


def test_jackknife_of_an_average_is_students_interval():
    rows = torch.randn(20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found, (low, high) = jackknife(rows)
    half = 2.0930 * rows.std().item() / 20**0.5  # t(0.975, 19) from a table
    torch.testing.assert_close(
        torch.tensor([low, high]), torch.tensor([rows.mean() - half, rows.mean() + half]).float()
    )
    assert statistics.jackknife_bias(found) == pytest.approx(0, abs=1e-12)


def test_jackknife_bias_is_the_variances():
    """The mean square about the own mean is too low by variance / n, and the jackknife's estimate of that is exact."""
    rows = torch.randn(15, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = statistics.estimate(lambda w: w @ rows.square() - (w @ rows).square(), statistics.jackknife_weights(15, 0))
    assert statistics.jackknife_bias(found) == pytest.approx(-rows.var().item() / 15)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (39, 2.023)])
def test_student_quantiles_are_those_of_a_table(freedom, quantile):
    assert statistics.student_quantile(freedom) == pytest.approx(quantile, rel=0.01)


def test_weights_are_shares_of_the_prompts_and_depend_on_the_seed():
    for make in (statistics.bootstrap_weights, statistics.jackknife_weights):
        weights = make(50, 7)
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights), dtype=torch.float64))
        assert weights.min() >= 0 and torch.equal(weights, make(50, 7)) and not torch.equal(weights, make(50, 8))
    left_out = (statistics.jackknife_weights(50, 7) == 0).sum(0)
    assert left_out.tolist() == [1] * 50


def test_means_of_resamples_in_blocks(monkeypatch):
    rows = torch.randn(30, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    whole = statistics.bootstrap_means(rows, 7, 1000)
    torch.testing.assert_close(whole, statistics.bootstrap_weights(30, 7, 1000) @ rows)
    monkeypatch.setattr(statistics, "_WEIGHTS", 30 * 300)
    parts = statistics.bootstrap_means(rows, 7, 1000)
    assert parts.shape == (1000, 2) and len(parts.unique(dim=0)) > 990  # no block repeats another
    torch.testing.assert_close(parts.std(0), rows.std(0, correction=0) / 30**0.5, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("interval", "better", "word"),
    [((0.1, 0.3), "higher", "better"), ((0.1, 0.3), "lower", "worse"), ((-0.3, -0.1), "higher", "worse"),
     ((-0.3, -0.1), "lower", "better"), ((-0.1, 0.3), "lower", "no difference seen"),
     ((0.0, 0.0), "higher", "no difference seen"), ((math.nan, math.nan), "lower", "no difference seen"),
     ((math.nan, math.nan), "higher", "no difference seen")],
)  # fmt: skip
def test_verdict(interval, better, word):
    assert statistics.verdict(interval, better) == word


def test_distance_to_a_target_is_taken_in_every_resample():
    found = statistics.Estimate(2.0, torch.tensor([1.0, 3.0, 6.0])).distance(4.0)
    assert found.value == 2.0 and found.replicates.tolist() == [3.0, 1.0, 2.0]


def test_one_prompt_has_no_interval():
    found, interval = bootstrap(torch.tensor([3.0], dtype=torch.float64))
    assert interval == (found.value, found.value) == (3.0, 3.0)
