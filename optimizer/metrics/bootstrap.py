"""Intervals: percentile bootstraps over *documents*, 95 %, since tokens of one document are not
independent; one-sided bounds; a test of random signs."""

from __future__ import annotations

import numpy as np

from optimizer.plan.certificate import Interval

RESAMPLES = 2000
LEVEL = 0.95


def resamples(documents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each window counts in each bootstrap sample, [RESAMPLES, windows]."""
    names, index = np.unique(documents, return_inverse=True)
    draws = rng.integers(len(names), size=(RESAMPLES, len(names)))
    flat = draws + len(names) * np.arange(RESAMPLES)[:, None]  # one call of bincount, not 2000
    counts = np.bincount(flat.ravel(), minlength=draws.size).reshape(draws.shape)
    return counts[:, index]


def bounds(
    values: np.ndarray, documents: np.ndarray, counts: np.ndarray, error: float
) -> tuple[float, float]:
    """One-sided bounds for the mean of values [windows, n] or [windows]: a lower and an upper one,
    each wrong with probability `error`.

    Bootstrap-t over documents (Efron and Tibshirani 1993, chapter 12), because a document's loss
    has a long right tail. Simulated, 24 documents of lognormal loss (sigma 1), error 5 %: an upper
    bound of percentiles was too low in 13.6 % of 250 data sets, BCa's in 11.2 %, this one in
    10.0 %; the lower bounds were too high in 1.2, 7.6 and 4.8 %. The standard error of a resample
    counts as a third of the sample's at least: where one document of many has a flip, most
    resamples have none, and t would be infinite.
    """
    sums, sizes, first = per_document(values, documents)
    mean, error_of_mean = _studentized(sums, sizes, np.ones((1, len(sums))))
    drawn, errors = _studentized(sums, sizes, counts[:, first])
    if error_of_mean[0] == 0:
        return float(mean[0]), float(mean[0])
    t = (drawn - mean) / np.maximum(errors, error_of_mean / 3)
    high, low = np.quantile(t, [error, 1 - error])
    return float(mean[0] - low * error_of_mean[0]), float(mean[0] - high * error_of_mean[0])


def per_document(
    values: np.ndarray, documents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum and number of the values of each document, and the index of its first window."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    _, first, index = np.unique(documents, return_index=True, return_inverse=True)
    sizes = np.bincount(index, minlength=len(first)) * flat.shape[1]
    return np.bincount(index, weights=flat.sum(1)), sizes.astype(np.float64), first


def _studentized(
    sums: np.ndarray, sizes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of all values in each resample, and its standard error: that of a ratio of two sums
    over documents, linearised. counts [resamples, documents]."""
    total = counts @ sizes
    mean = counts @ sums / total
    squares = (
        counts @ sums**2 - 2 * mean * (counts @ (sums * sizes)) + mean**2 * (counts @ sizes**2)
    )
    documents = max(len(sums), 2)
    return mean, np.sqrt(np.maximum(squares, 0) * documents / (documents - 1)) / total


SIGNS = 9999  # random sign patterns per test, so the smallest p-value is 0.0001


def sign_flips(
    values: np.ndarray, couples: np.ndarray, rng: np.random.Generator, two_sided: bool
) -> float:
    """p-value of "the values are symmetric about zero", from SIGNS random signs of the couples.

    One-sided: against a positive mean. At least 1 / (SIGNS + 1).
    """
    sums = np.bincount(couples, weights=values)
    signs = rng.integers(0, 2, (SIGNS, len(sums))) * 2 - 1
    drawn, own = signs @ sums, sums.sum()
    if two_sided:
        drawn, own = np.abs(drawn), abs(own)
    return float((1 + (drawn >= own - 1e-12 * abs(own)).sum()) / (SIGNS + 1))


def means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    per_window = values.mean(1, dtype=np.float64)
    return np.asarray(counts @ per_window / counts.sum(1))


def quantiles(values: np.ndarray, counts: np.ndarray, q: float = 0.99) -> np.ndarray:
    """The q-quantile in each resample, from one sort of all tokens."""
    windows = np.repeat(np.arange(len(values)), values.shape[1])
    order = np.argsort(values, axis=None)
    sorted_values, sorted_windows = values.ravel()[order], windows[order]
    found = []
    for count in counts[:500]:
        mass = np.cumsum(count[sorted_windows])
        found.append(sorted_values[np.searchsorted(mass, q * mass[-1])])
    return np.array(found)


def cvar(values: np.ndarray, counts: np.ndarray, level: float) -> Interval:
    """Conditional value at risk: the mean of the worst (largest) 1 - level of the values.

    values [windows, n] or [windows]; counts [resamples, windows]. A value that the boundary cuts
    counts in part (Rockafellar and Uryasev 2002), so the tail's mass is exact. 500 resamples.
    """
    flat = values.reshape(len(values), -1)
    order = np.argsort(-flat, axis=None)
    worst = flat.ravel()[order].astype(np.float64)
    windows = np.repeat(np.arange(len(flat)), flat.shape[1])[order]

    def tail(count: np.ndarray) -> float:
        weight = count[windows].astype(np.float64)
        before = np.cumsum(weight) - weight
        mass = (1 - level) * weight.sum()
        return float(np.clip(mass - before, 0, weight) @ worst / mass)

    own = tail(np.ones(len(flat)))
    return interval(own, np.array([tail(count) for count in counts[:500]]))


def mean(values: np.ndarray, counts: np.ndarray) -> Interval:
    """Mean of values [windows] or [windows, n] with its interval."""
    flat = values.reshape(len(values), -1)
    return interval(float(flat.mean(dtype=np.float64)), means(flat, counts))


def interval(value: float, samples: np.ndarray) -> Interval:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
