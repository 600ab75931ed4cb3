"""What slopes and measured plans teach, on losses whose cross terms are known."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.search import Problem, exact, surrogate
from optimizer.search.surrogate import Seen, Slope, believe, cross_terms, signal_and_noise
from tests.search.test_contract import problem


class World:
    """loss(x) = sum_g B[g, x_g] + sum_{g < h} s_g s_h J_gh with s = sqrt(B): a quadratic form whose
    slope, and whose every difference, is known in closed form."""

    def __init__(self, posed: Problem, strength: float, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        groups, columns = posed.loss.shape
        self.posed, self.root = posed, np.sqrt(posed.loss)
        sign = rng.choice([-1.0, 1.0], (groups, columns))
        pairs = rng.normal(0, strength, (groups, groups))
        self.error = self.root * sign
        self.pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T

    def loss(self, x: np.ndarray) -> float:
        e = self.error[np.arange(len(x)), x]
        return float((e**2).sum() + e @ self.pairs @ e / 2)

    def slope(self, at: np.ndarray, rng: np.random.Generator, noise: float) -> Slope:
        """<gradient, rounded weights>, up to a constant in each row, as two noisy halves."""
        rows = np.arange(len(at))
        e = self.error[rows, at]
        own = self.posed.loss[rows, at]
        first = self.error * (self.pairs @ e)[:, None] - 2 * own[:, None]
        first[rows, at] = e * (self.pairs @ e)
        scale = np.sqrt(self.posed.loss + own[:, None])
        halves = [first + noise * scale * rng.normal(size=first.shape) for _ in range(2)]
        for half in halves:
            half[rows, at] = first[rows, at]
        return Slope(at, np.stack(halves))

    def truth(self, at: np.ndarray) -> np.ndarray:
        found = np.zeros(self.posed.loss.shape)
        for g, c in np.ndindex(*found.shape):
            x = at.copy()
            x[g] = c
            found[g, c] = self.loss(x) - self.loss(at)
        return found


def world(strength: float = 0.3) -> tuple[World, np.ndarray]:
    posed = problem(2, 30, 5, tightness=0.4)
    made = World(posed, strength)
    return made, exact.solve(posed)


def test_a_clean_slope_tells_every_single_change() -> None:
    made, at = world()
    slope = made.slope(at, np.random.default_rng(1), 1e-6)
    belief = believe(made.posed, at, [slope], [])
    assert belief.prior + belief.cross == pytest.approx(made.truth(at), rel=0.02, abs=0.02)


def test_signal_and_noise_are_told_apart() -> None:
    made, at = world()
    slopes = [made.slope(at, np.random.default_rng(i), 0.8) for i in range(40)]
    found = np.array([signal_and_noise(made.posed, slope) for slope in slopes])
    clean = cross_terms(made.posed, made.slope(at, np.random.default_rng(0), 0))[0]
    counted = np.ones(clean.shape, dtype=bool)
    counted[np.arange(len(at)), at] = False
    assert np.sqrt((found[:, 0] ** 2).mean()) == pytest.approx(
        np.sqrt((clean[counted] ** 2).mean()), rel=0.15
    )
    assert found[:, 1].mean() == pytest.approx(0.8 / np.sqrt(2), rel=0.1)


def test_a_noisy_slope_is_believed_less_and_the_truth_lies_in_the_spread() -> None:
    made, at = world()
    inside = []
    for seed in range(20):
        belief = believe(made.posed, at, [made.slope(at, np.random.default_rng(seed), 0.8)], [])
        sd = np.sqrt((belief.root**2).sum(1)).reshape(belief.prior.shape)
        off = made.truth(at) - belief.prior - belief.cross
        use = sd > 0
        inside.append(np.mean(np.abs(off[use]) < 2 * sd[use]))
    assert 0.85 < np.mean(inside) < 1


def test_measured_plans_teach_what_the_slope_did_not() -> None:
    """Single changes, measured exactly, replace what a useless slope said about them."""
    made, at = world()
    slope = made.slope(at, np.random.default_rng(0), 5.0)
    truth = made.truth(at)
    seen = []
    for g in range(0, 30, 3):
        x = at.copy()
        x[g] = (x[g] + 1) % 5
        seen.append((g, x[g], Seen(x, float(truth[g, x[g]]), 1e-6)))
    before = believe(made.posed, at, [slope], [])
    after = believe(made.posed, at, [slope], [s for _, _, s in seen])
    index = tuple(np.array([[g, c] for g, c, _ in seen]).T)
    gaps = [np.abs((b.prior + b.cross - truth)[index]).mean() for b in (before, after)]
    assert gaps[1] < 0.7 * gaps[0]


def test_a_slope_fades_with_what_moved_since() -> None:
    """The same numbers, taken at plans farther and farther away, are believed less and less."""
    made, best = world()
    slope = made.slope(best, np.random.default_rng(1), 0.5)
    strength = []
    for moved in (0, 3, 30):
        away = best.copy()
        away[:moved] = (away[:moved] + 1) % 5
        halves = made.slope(away, np.random.default_rng(2), 0.5).halves
        belief = believe(made.posed, best, [Slope(away, halves), slope], [])
        precision = 1 / np.maximum((belief.root**2).sum(1), 1e-30)
        strength.append(np.median(precision))
    assert strength[0] > 1.05 * strength[1] > 1.05**2 * strength[2]


def test_an_overshoot_that_is_expected_teaches_nothing() -> None:
    """Groups that share a slope's direction: a plan that fell short by just what that costs leaves
    the cross terms as the slope told them; one that did so for no reason does not."""
    made, best = world()
    slope = made.slope(best, np.random.default_rng(1), 0.1)
    alone = believe(made.posed, best, [slope], [])
    plan = best.copy()
    plan[:12] = (plan[:12] + 1) % 5
    rows = np.arange(12)
    told, prior = alone.cross[rows, plan[:12]], alone.prior[rows, plan[:12]]
    short = surrogate.COHERENT * (told.sum() ** 2 - told @ told) / made.posed.losses(best)
    assert abs(short) > 1e-3
    seen = Seen(plan, float(prior.sum() + told.sum() + short), 1e-9)
    expected = believe(made.posed, best, [slope], [seen])
    assert expected.cross == pytest.approx(alone.cross, abs=1e-6)
    seen = Seen(plan, float(prior.sum() + told.sum()), 1e-9)
    surprised = believe(made.posed, best, [slope], [seen])
    assert np.abs(surprised.cross - alone.cross).max() > 1e-4


def test_draws_follow_the_belief() -> None:
    made, at = world()
    belief = believe(made.posed, at, [made.slope(at, np.random.default_rng(0), 0.8)], [])
    rng = np.random.default_rng(0)
    draws = np.array([belief.draw(rng, 1.0) for _ in range(400)])
    sd = np.sqrt((belief.root**2).sum(1)).reshape(belief.prior.shape)
    assert draws.mean(0) == pytest.approx(belief.prior + belief.cross, abs=0.3 * sd.max())
    assert draws.std(0) == pytest.approx(sd, rel=0.25)
    rows = np.arange(len(at))
    assert np.abs(draws[:, rows, at]).max() == 0
    assert np.array_equal(belief.draw(rng, 0.0), belief.prior + belief.cross)
    assert np.array_equal(belief.draw(rng, 0.5, trust=0), belief.prior)
