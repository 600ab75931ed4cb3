"""What everything measured so far says about single changes of the best plan: a Bayesian linear
model, which the space `moves` draws its proposals from.

Around the best plan b, with losses B[g, c] of the table [G, P], let d[g, c] be the change of the
true loss when group g goes from b[g] to c. The table foretells B[g, c] - B[g, b]; what it can't
know are the cross terms with the errors of all other groups, products of two errors, so
    d[g, c] = B[g, c] - B[g, b] + s[g, c] e[g, c],   s = sqrt(B[g, c] + B[g, b]),  e ~ N(0, k^2).
Observed are
    slopes  (one backward pass at a plan): e itself with noise v. A slope at an earlier plan knows it
            less well: where groups M differ now, the errors of M in its cross terms are others,
            which adds k^2 (losses of M there and here) / (loss of b) to v^2
    plans   (measured trials): the sum of d over the changed groups, plus what these do to each other.
            Groups that move down the same slope share its direction, so with X their summed cross
            terms, as the slopes tell them, that is about COHERENT X^2 / (loss of b), and
            its variance is CROWD^2 sum_{i != j} s_i^2 s_j^2; and the noise of the windows
k and v come from two halves of each slope: their covariance is the signal. Thompson sampling
(a plan that is optimal for one draw of d) decides between using and exploring, because a plan
that is optimal for the mean of d would pick whatever noise made look good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from optimizer.search import Problem

CROWD = 0.3  # interaction of groups that change together, in units of their own losses
COHERENT = (
    1.0  # measured on SmolLM2: .9 at 4 bits, 1.4 to 2.2 at 5; see experiments/11-cross-terms
)
LEAST = 1e-3  # of v: nothing is believed entirely
SURE = 1e-6  # least standard error of a measured difference, in units of the best plan's loss
WEAKEST = 0.2  # of k, in units of v: a signal that two halves of a slope can't show may be there


@dataclass(frozen=True)
class Slope:
    """Two independent estimates of <gradient, rounded weights> [2, G, P] at the plan `at` [G],
    nats; see `sensitivity.slope`."""

    at: np.ndarray
    halves: np.ndarray


@dataclass(frozen=True)
class Seen:
    """A measured plan against the best one on the same windows: mean difference of the loss
    (nats, negative = better) and its standard error."""

    assignment: np.ndarray
    difference: float
    error: float


@dataclass(frozen=True)
class Belief:
    """d as a Gaussian. prior: what the table foretells; cross: the mean of s e [G, P]; root: a
    square root of the covariance of s e [G * P, G * P]."""

    prior: np.ndarray
    cross: np.ndarray
    root: np.ndarray

    def draw(self, rng: np.random.Generator, spread: float, trust: float = 1) -> np.ndarray:
        """One draw [G, P]; spread 0 = the mean, 1 = the full uncertainty. trust: weight of the
        cross terms; groups that move together down the same slope overshoot, so less is more."""
        noise = self.root @ rng.standard_normal(len(self.root))
        return np.asarray(
            self.prior + trust * (self.cross + spread * noise.reshape(-1, self.cross.shape[1]))
        )


def cross_terms(problem: Problem, slope: Slope) -> np.ndarray:
    """e as each half of a slope shows it [2, G, P]; 0 at the plan itself.

    Rounding errors of different precisions are nearly independent, so a group's own share of its
    slope difference is -2 B[g, b].
    """
    rows = np.arange(len(slope.at))
    own = problem.loss[rows, slope.at][:, None]
    first = slope.halves - slope.halves[:, rows, slope.at][:, :, None]
    found = (first + 2 * own) / scale_at(problem, slope.at)
    found[:, rows, slope.at] = 0
    return np.asarray(found)


def signal_and_noise(problem: Problem, slope: Slope) -> tuple[float, float]:
    """k and v of one slope: standard deviations of e and of the error of its mean."""
    one, two = cross_terms(problem, slope)
    counted = problem.free.copy()
    counted[np.arange(len(slope.at)), slope.at] = False
    a, b = one[counted], two[counted]
    noise = max(float(np.sqrt(np.mean((a - b) ** 2)) / 2), LEAST)
    return max(float(np.sqrt(max(np.mean(a * b), 0))), WEAKEST * noise), noise


def believe(
    problem: Problem, best: np.ndarray, slopes: Sequence[Slope], seen: Sequence[Seen]
) -> Belief:
    """The posterior of d around `best`. slopes: at least one; the last tells k and v. Cost: one
    inverse of a [G * P] square matrix."""
    groups, columns = problem.loss.shape
    rows = np.arange(groups)
    scale = scale_at(problem, best)
    signal, noise = signal_and_noise(problem, slopes[-1])
    weight, pull = np.full((groups, columns), signal**-2), np.zeros((groups, columns))
    loss = np.maximum(problem.loss, 0)
    total = max(float(loss[rows, best].sum()), 1e-30)
    for slope in slopes:
        away = slope.at != best
        drift = float((loss[rows, slope.at] + loss[rows, best])[away].sum()) / total
        share = 1 / (noise**2 + signal**2 * drift)
        weight += share
        pull += share * cross_terms(problem, slope).mean(0)
    matrix, flat = np.diag(weight.ravel()), pull.ravel()
    told = scale * pull / weight
    prior = problem.loss - problem.loss[rows, best][:, None]
    for plan in seen:
        moved = np.flatnonzero(plan.assignment != best)
        if not len(moved):
            continue
        at = moved * columns + plan.assignment[moved]
        size = scale[moved, plan.assignment[moved]]
        alone = size**2
        error = max(plan.error, SURE * total)  # 0 where it changed nothing that is ever read
        variance = error**2 + CROWD**2 * float(alone.sum() ** 2 - alone @ alone)
        own = told[moved, plan.assignment[moved]]
        together = COHERENT * float(own.sum() ** 2 - own @ own) / total
        rest = plan.difference - float(prior[moved, plan.assignment[moved]].sum()) - together
        matrix[np.ix_(at, at)] += np.outer(size, size) / variance
        flat[at] += size * rest / variance
    lower = linalg.cholesky(matrix, lower=True)
    scale[rows, best] = 0
    cross = scale * linalg.cho_solve((lower, True), flat).reshape(groups, columns)
    root = linalg.solve_triangular(lower, np.eye(len(lower)), lower=True).T
    return Belief(prior, cross, scale.reshape(-1, 1) * root)


def scale_at(problem: Problem, at: np.ndarray) -> np.ndarray:
    """s [G, P]."""
    loss = np.maximum(problem.loss, 0)
    return np.asarray(np.sqrt(loss + loss[np.arange(len(at)), at][:, None] + 1e-30))
