"""Resamples of whole documents, bounds, quantiles, tails and signs, against definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from optimizer.metrics import bootstrap
from optimizer.metrics.bootstrap import bounds, resamples

DOCUMENTS = np.repeat(np.arange(20), 3)  # 20 documents of 3 windows


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_documents_are_drawn_whole() -> None:
    names = np.array([7, 7, 3, 9, 9, 9])
    counts = resamples(names, rng())
    assert counts.shape == (2000, 6)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 3] == counts[:, 4]).all() and (counts[:, 4] == counts[:, 5]).all()
    assert (counts[:, [0, 2, 3]].sum(1) == 3).all(), "as many documents as there are"
    assert np.abs(counts.mean(0) - 1).max() < 0.08


def test_bounds_are_wrong_about_as_often_as_they_say() -> None:
    """600 data sets of 24 documents with a long tail (lognormal, sigma 0.6), 5 % on either side.
    Percentiles would be too low at the upper end in about 13 %."""
    owners = np.arange(24)
    counts = resamples(owners, rng())
    truth = np.exp(0.18)
    below = above = percentile = 0
    for seed in range(600):
        values = np.random.default_rng([seed, 6]).lognormal(0, 0.6, 24)
        low, high = bounds(values, owners, counts, 0.05)
        assert low < values.mean() < high
        below += low > truth
        above += high < truth
        percentile += np.quantile(counts @ values / 24, 0.95) < truth
    assert 0.015 <= below / 600 <= 0.075
    assert 0.03 <= above / 600 <= 0.11 < percentile / 600 + 0.02


def test_bounds_weigh_documents_by_their_tokens_and_draw_them_whole() -> None:
    """A document cut into windows counts as the same document in one piece."""
    values = np.random.default_rng(4).exponential(1, (20, 3, 4))
    whole = bounds(values.reshape(20, 12), np.arange(20), resamples(np.arange(20), rng()), 0.05)
    windows = values.reshape(60, 4)
    assert bounds(windows, DOCUMENTS, resamples(DOCUMENTS, rng()), 0.05) == pytest.approx(whole)
    uneven = bounds(windows[:50], DOCUMENTS[:50], resamples(DOCUMENTS[:50], rng()), 0.05)
    assert uneven[0] < windows[:50].mean() < uneven[1]


def test_bounds_of_one_event_and_of_none() -> None:
    """One flip in 24 documents: most resamples have none, and the bound is finite all the same."""
    owners = np.arange(24)
    counts = resamples(owners, rng())
    one = np.zeros((24, 100))
    assert bounds(one, owners, counts, 0.05) == (0, 0)
    one[3, 7] = 1
    low, high = bounds(one, owners, counts, 0.05)
    assert low < one.mean() < high < 0.01


def test_the_sign_test_agrees_with_all_patterns() -> None:
    values = np.array([0.5, 1.2, -0.3, 0.9, 0.4, 0.1])
    own = values.sum()
    sums = [float(np.dot(signs, values)) for signs in itertools.product((-1, 1), repeat=6)]
    exact = np.mean([s >= own - 1e-9 for s in sums])
    rng = np.random.default_rng(0)
    found = bootstrap.sign_flips(values, np.arange(6), rng, two_sided=False)
    assert found == pytest.approx(exact, abs=0.01)
    both = bootstrap.sign_flips(values, np.arange(6), rng, two_sided=True)
    assert both == pytest.approx(np.mean([abs(s) >= own - 1e-9 for s in sums]), abs=0.015)


def test_cvar_is_the_mean_of_the_worst() -> None:
    values = np.random.default_rng(1).exponential(size=(10, 100)).astype(np.float32)
    counts = bootstrap.resamples(np.arange(10), np.random.default_rng(2))
    found = bootstrap.cvar(values, counts, 0.99)
    assert found.value == pytest.approx(np.sort(values.ravel())[-10:].mean(), rel=1e-5)
    assert found.low <= found.value <= found.high
    part = bootstrap.cvar(np.arange(1.0, 11.0), np.ones((3, 10)), 0.85)
    assert part.value == pytest.approx((10 + 0.5 * 9) / 1.5)  # the boundary cuts the second
    twice = bootstrap.cvar(np.array([1.0, 5.0]), np.array([[3, 1], [3, 1]]), 0.5)
    assert twice.high == pytest.approx(3.0)  # the worst half of 5, 1, 1, 1


def test_sums_and_sizes_of_documents() -> None:
    values = np.arange(12.0).reshape(4, 3)
    sums, sizes, first = bootstrap.per_document(values, np.array([5, 2, 5, 9]))
    assert sums.tolist() == [12, 3 + 21, 30] and sizes.tolist() == [3, 6, 3]
    assert first.tolist() == [1, 0, 3]
    sums, sizes, _ = bootstrap.per_document(np.array([1.0, 2.0, 4.0]), np.array([0, 0, 1]))
    assert sums.tolist() == [3, 4] and sizes.tolist() == [2, 1]


def test_the_standard_error_is_that_of_a_mean() -> None:
    """Documents of one size: the sample's standard deviation over the root of their number. And the
    bounds of a normal sample are about Student's, 2.07 standard errors to a side for 24."""
    values = np.random.default_rng(8).normal(5, 1, 24)
    mean, error = bootstrap._studentized(values, np.ones(24), np.ones((1, 24)))
    assert mean[0] == pytest.approx(values.mean())
    assert error[0] == pytest.approx(values.std(ddof=1) / np.sqrt(24))
    low, high = bounds(values, np.arange(24), resamples(np.arange(24), rng()), 0.025)
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(2.07 * error[0], rel=0.15)


def test_a_small_resample_counts_a_third_of_the_samples_error() -> None:
    """One flip in 24 documents: t is (0 - 1/24) over a third of the error wherever it isn't drawn."""
    owners, one = np.arange(24), np.zeros((24, 100))
    one[3, 7] = 1
    low, high = bounds(one, owners, resamples(owners, rng()), 0.05)
    mean = one.mean()
    assert high == pytest.approx(mean + 3 * mean)  # error of the mean = mean, for one event
    assert low == pytest.approx(mean - 1.4 * mean, abs=0.3 * mean)


def test_signs_one_sided_two_sided_and_without_a_difference() -> None:
    five = np.ones(5)
    assert bootstrap.sign_flips(five, np.arange(5), rng(), False) == pytest.approx(
        1 / 32, abs=0.005
    )
    assert bootstrap.sign_flips(five, np.arange(5), rng(), True) == pytest.approx(
        2 / 32, abs=0.007
    )
    assert bootstrap.sign_flips(-five, np.arange(5), rng(), False) == 1
    assert bootstrap.sign_flips(-five, np.arange(5), rng(), True) == pytest.approx(
        2 / 32, abs=0.007
    )
    assert bootstrap.sign_flips(0 * five, np.arange(5), rng(), True) == 1
    forty = bootstrap.sign_flips(np.ones(40), np.arange(40), rng(), False)
    assert forty == 1 / 10_000  # the least there is
    couples = bootstrap.sign_flips(np.ones(40), np.repeat([0, 1], 20), rng(), False)
    assert couples == pytest.approx(1 / 4, abs=0.02)


def test_means_and_intervals() -> None:
    values = np.array([[1.0, 3.0], [5.0, 7.0]])
    counts = np.array([[2, 0], [1, 1], [0, 3]])
    assert bootstrap.means(values, counts).tolist() == [2, 4, 6]
    found = bootstrap.mean(np.array([1.0, 2.0]), np.array([[2, 0]] * 50 + [[0, 2]] * 50))
    assert (found.value, found.low, found.high) == (1.5, 1, 2)
    found = bootstrap.interval(7.0, np.arange(1001.0))
    assert (found.value, found.low, found.high) == pytest.approx((7, 25, 975))


def test_quantiles_count_a_window_as_often_as_it_is_drawn() -> None:
    values = np.array([[1.0, 2.0], [10.0, 20.0]])
    found = bootstrap.quantiles(values, np.array([[1, 1], [4, 1], [1, 9]]), 0.5)
    assert found.tolist() == [2, 2, 10]
    assert bootstrap.quantiles(values, np.array([[1, 1]]), 0.75).tolist() == [10]
    hundred = np.arange(1, 101.0).reshape(10, 10)
    assert bootstrap.quantiles(hundred, np.ones((1, 10), dtype=int)).tolist() == [99]


def test_tails_of_windows_without_tokens() -> None:
    """Of values [windows], and in each of the first 500 resamples."""
    counts = np.array([[1, 1, 1, 1]] * 500 + [[0, 0, 0, 4]] * 500)
    found = bootstrap.cvar(np.array([1.0, 2.0, 3.0, 9.0]), counts, 0.5)
    assert (found.value, found.low, found.high) == (6, 6, 6)
