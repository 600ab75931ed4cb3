"""What votes say, and how surely. Arrays in, arrays out.

Bradley-Terry with ties (Davidson 1970, eq. 2.4): with u = log(strength of one / of the other),
    P(one) = e^(u/2) / Z,   P(other) = e^(-u/2) / Z,   P(alike) = e^t / Z,   Z = the sum of the three
so log P is concave in u and t together, and linear u = x b gives one optimum.

Stopping: y = +1 / -1 for a vote for either, 0 for alike. If nobody is preferred, each decisive vote
is a fair coin whatever was seen before, and the gain of betting a share s of the capital on heads,
averaged over s drawn evenly from -1 to 1,
    E(w, l) = 2^(w+l) w! l! / (w + l + 1)!
is a test martingale: P(it ever reaches 1 / alpha) <= alpha (Ville). So one may look after each vote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from scipy.optimize import minimize
from scipy.special import gammaln

ALPHA = 0.05
RESAMPLES = 200
DIFFER = 2  # weights of a model that may differ from the default
MOST, MODELS = 0.9, 3  # how much of what is believed a bootstrap goes on with, in how many models
FLIPS = 99  # of the test against noise
WEAK = 1e-3  # on what has no default, so that it stays finite


# ---------------------------------------------------------------- stopping


def evidence(wins: int, losses: int) -> float:
    """Log of E(wins, losses), at most that of 20 with probability .95 if there is no preference."""
    n = wins + losses
    return float(n * np.log(2) + gammaln(wins + 1) + gammaln(losses + 1) - gammaln(n + 2))


def clear(wins: int, losses: int, alpha: float = ALPHA) -> bool:
    return evidence(wins, losses) >= -np.log(alpha)


def reachable(wins: int, losses: int, rest: int, alpha: float = ALPHA) -> bool:
    """Whether `rest` more votes could make a preference clear."""
    return any(
        clear(wins + n, losses, alpha) or clear(wins, losses + n, alpha) for n in range(rest + 1)
    )


# ---------------------------------------------------------------- Davidson's model


@dataclass(frozen=True)
class Prior:
    """Of b ~ N(s * towards, spread^2) for the columns `shrunk`, s a common scale >= 0 that the votes
    choose. low: lower bounds."""

    towards: np.ndarray
    spread: float
    low: np.ndarray


@dataclass(frozen=True)
class Fit:
    """weights [k] of the columns, scale: s, tie: t, loss: mean -log P of a vote, nats."""

    weights: np.ndarray
    scale: float
    tie: float
    loss: float


def log_p(u: np.ndarray, tie: float) -> np.ndarray:
    """[n, 3]: of the other, of alike, of the one."""
    raw = np.stack([-u / 2, np.full_like(u, tie), u / 2], axis=1)
    return np.asarray(raw - np.logaddexp.reduce(raw, axis=1, keepdims=True))


def fit(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, prior: Prior, near: Fit | None = None
) -> Fit:
    """x [n, k] the one's features minus the other's, y [n] in -1, 0, 1, weight [n] of the votes.
    near: a fit of similar votes, from which the way is shorter; the optimum is the same one."""
    k, rows = x.shape[1], np.arange(len(y))

    def loss(z: np.ndarray) -> tuple[float, np.ndarray]:
        b, s, t = z[:k], z[k], z[k + 1]
        log = log_p(x @ b, t)
        p = np.exp(log)
        slope = weight * ((p[:, 2] - p[:, 0]) / 2 - y / 2)
        away = (b - s * prior.towards) / prior.spread**2
        total = -(weight * log[rows, y + 1]).sum() + (b - s * prior.towards) @ away / 2
        total += WEAK * (s * s + t * t) / 2
        ties = (weight * (p[:, 1] - (y == 0))).sum() + WEAK * t
        gradient = [*(x.T @ slope + away), WEAK * s - away @ prior.towards, ties]
        return float(total), np.array(gradient)

    bounds = [(float(low), None) for low in prior.low] + [(0.0, None), (-8.0, 8.0)]
    begin = np.zeros(k + 2) if near is None else np.array([*near.weights, near.scale, near.tie])
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=bounds).x
    log = log_p(x @ found[:k], found[k + 1])
    mean = -float((weight * log[rows, y + 1]).sum() / max(weight.sum(), 1e-12))
    return Fit(found[:k], float(found[k]), float(found[k + 1]), mean)


def strengths(pairs: np.ndarray, y: np.ndarray, weight: np.ndarray, models: int) -> np.ndarray:
    """Log-strengths of models [m], mean 0. pairs [n, 2]: numbers of the one and the other. One vote's
    worth of prior keeps an unbeaten model finite."""
    x = np.zeros((len(y), models))
    rows = np.arange(len(y))
    x[rows, pairs[:, 0]] += 1
    x[rows, pairs[:, 1]] -= 1
    free = Prior(np.zeros(models), 2.0, np.full(models, -np.inf))
    found = fit(x, y, weight, free).weights
    return np.asarray(found - found.mean())


@dataclass(frozen=True)
class Belief:
    """About weights of which few differ from the default. weights [k], scale: posterior means; models:
    which columns differ in each, and its fit; probable [m]: how likely each is."""

    weights: np.ndarray
    scale: float
    models: tuple[tuple[tuple[int, ...], Fit], ...]
    probable: np.ndarray


def believed(
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    prior: Prior,
    near: Belief | None = None,
) -> Belief:
    """Bayesian model averaging (Hoeting et al. 1999): in each model a set of at most DIFFER columns
    has weights of its own ~ N(0, spread^2), all others are s times `towards`, s ~ N(0, spread^2).
    Each size of a set is as likely as another, each set as another of its size; evidence by Laplace's
    approximation. near: a belief from similar votes, whose likely models alone are averaged.
    """
    k = x.shape[1]
    every = [own for size in range(DIFFER + 1) for own in combinations(range(k), size)]
    begin = [(own, None) for own in every] if near is None else _likely(near)
    found, log, models = [], [], []
    for own, begun in begin:
        common = prior.towards.copy()
        common[list(own)] = 0
        columns = np.column_stack([x @ common, x[:, list(own)]])
        low = np.array([0.0, *prior.low[list(own)]])
        made = fit(columns, y, weight, Prior(np.zeros(len(own) + 1), prior.spread, low), begun)
        log.append(_evidence(columns, y, weight, made, prior.spread) - np.log(comb(k, len(own))))
        b = made.weights[0] * common
        b[list(own)] = made.weights[1:]
        found.append([*b, made.weights[0]])
        models.append((own, made))
    probable = np.exp(np.array(log) - np.logaddexp.reduce(log))
    mean = probable @ np.array(found)
    return Belief(mean[:k], float(mean[k]), tuple(models), probable)


def _likely(belief: Belief) -> list[tuple[tuple[int, ...], Fit | None]]:
    """The most likely models, whose probabilities make up MOST, at most MODELS of them."""
    order = np.argsort(-belief.probable)
    enough = int(np.searchsorted(np.cumsum(belief.probable[order]), MOST)) + 1
    return [belief.models[i] for i in order[: min(enough, MODELS)]]


def _evidence(x: np.ndarray, y: np.ndarray, weight: np.ndarray, at: Fit, spread: float) -> float:
    """Log of the votes' probability, weights b ~ N(0, spread^2) integrated out around `at`:
    log P(y | b) + log N(b) + k/2 log 2 pi - log det(H) / 2, H the curvature of -log P(y, b)."""
    b, log = at.weights, log_p(x @ at.weights, at.tie)
    p = np.exp(log)
    seen = float((weight * log[np.arange(len(y)), y + 1]).sum())
    each = (p[:, 2] + p[:, 0]) / 4 - ((p[:, 2] - p[:, 0]) / 2) ** 2
    curved = (x * (weight * each)[:, None]).T @ x + np.eye(len(b)) / spread**2
    return float(seen - b @ b / 2 / spread**2 - len(b) * np.log(spread)) - float(
        np.linalg.slogdet(curved)[1] / 2
    )


def resampled(
    prompts: np.ndarray, weight: np.ndarray, rng: np.random.Generator, samples: int = RESAMPLES
) -> np.ndarray:
    """Weights of the votes in bootstrap samples of whole prompts [samples, n]."""
    names, index = np.unique(prompts, return_inverse=True)
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    return np.asarray(weight * draws[:, index])


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def noise_p(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, prior: Prior, rng: np.random.Generator
) -> float:
    """p-value of "the features have nothing to do with the votes". Under it each decisive vote could
    as well have gone the other way; alike and decisive votes may be dealt to the pairs in any order.
    """
    own = fit(x, y, weight, prior).loss
    rank = 1 + sum(fit(x, _shuffled(y, rng), weight, prior).loss <= own for _ in range(FLIPS))
    return rank / (FLIPS + 1)


def _shuffled(y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.abs(y)) * rng.choice([-1, 1], size=len(y))


# ---------------------------------------------------------------- people


def agreement(answers: Sequence[Sequence[float]], level: str = "ordinal") -> float | None:
    """Krippendorff's alpha of people [who][question], NaN = not asked: 1 agreed, 0 as by chance. None
    if no question has two answers, or everybody always said the same."""
    import krippendorff

    data = np.array(answers, dtype=float)
    if len(data) < 2:
        return None
    shared = data[:, (~np.isnan(data)).sum(0) >= 2]
    values = shared[~np.isnan(shared)]
    if not len(values) or len(np.unique(values)) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=shared, level_of_measurement=level))


def bootstrap(
    measure: Callable[[np.ndarray], np.ndarray], weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of 95 % intervals [k] of a measure [k] over resampled weights [samples, n]."""
    found = np.array([measure(one) for one in weights])
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    return np.asarray(low), np.asarray(high)
