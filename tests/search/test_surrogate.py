"""What slopes and measured plans teach, on losses whose cross terms are known."""

from __future__ import annotations

from dataclasses import replace

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


def test_a_plan_that_changes_nothing_teaches_nothing() -> None:
    """Two groups without any loss exchange their precisions: the same loss on every window, without
    any error."""
    posed = problem(0)
    loss = posed.loss.copy()
    loss[:2] = 0
    posed = replace(posed, loss=loss)
    best = np.zeros(len(loss), dtype=np.int64)
    other = best.copy()
    other[:2] = 1, 2
    halves = np.random.default_rng(1).normal(0, 0.01, (2, *loss.shape))
    halves[:, :2] = 0
    slope = Slope(best, halves)
    alone = believe(posed, best, [slope], [])
    found = believe(posed, best, [slope], [Seen(other, 0.0, 0.0)])
    assert np.allclose(found.cross, alone.cross) and np.allclose(found.root, alone.root)


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


# ---------------------------------------------------------------- against the formulas themselves


def test_cross_terms_and_scale_are_what_the_legend_says() -> None:
    """Two groups of two columns, worked out by hand: s = sqrt(B + B[b]), e = (slope's difference +
    2 B[b]) / s, and 0 at the plan itself."""
    posed = replace(problem(0, 2, 2), loss=np.array([[9.0, 1.0], [4.0, 0.0]]))
    at = np.array([1, 0])
    halves = np.array([[[5.0, 2.0], [1.0, 3.0]], [[7.0, 2.0], [1.0, 5.0]]])
    assert surrogate.scale_at(posed, at) == pytest.approx(
        np.sqrt([[10.0, 2.0], [8.0, 4.0]]), rel=1e-12
    )
    expected = [[[(5 - 2 + 2) / np.sqrt(10), 0], [0, (3 - 1 + 8) / 2]],
                [[(7 - 2 + 2) / np.sqrt(10), 0], [0, (5 - 1 + 8) / 2]]]  # fmt: skip
    assert cross_terms(posed, Slope(at, halves)) == pytest.approx(np.array(expected))


def test_signal_is_what_the_halves_share_and_noise_half_of_what_they_do_not() -> None:
    """e of the halves is x + y and x - y: their product is x^2 - y^2, their mean is off by y."""
    posed = replace(problem(0, 3, 2), loss=np.zeros((3, 2)) + 0.5)
    at = np.zeros(3, dtype=int)

    def of(x: float, y: float, allowed: np.ndarray | None = None) -> tuple[float, float]:
        halves = np.zeros((2, 3, 2))
        halves[0, :, 1], halves[1, :, 1] = x + y - 1, x - y - 1  # s is 1, 2 B[b] is 1
        halves[:, 2, 1] = 1000.0 if allowed is not None else halves[:, 0, 1]
        return signal_and_noise(replace(posed, allowed=allowed), Slope(at, halves))

    assert of(5, 3) == pytest.approx((4, 3))
    assert of(3, 5) == pytest.approx((0.2 * 5, 5))  # nothing in common: a fifth of the noise
    assert of(5, 0) == pytest.approx((5, surrogate.LEAST))
    only = np.array([[True, True], [True, True], [True, False]])
    assert of(5, 3, only) == pytest.approx((4, 3))  # what may not be chosen isn't counted


def conditioned(
    posed: Problem, best: np.ndarray, slopes: list[Slope], seen: list[Seen]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of s e, by conditioning a Gaussian on one observation after the other:
    another way than the surrogate's, from its module's text alone."""
    loss, rows = posed.loss, np.arange(len(best))
    columns = loss.shape[1]
    total = loss[rows, best].sum()
    scale = np.sqrt(loss + loss[rows, best][:, None])
    signal, noise = signal_and_noise(posed, slopes[-1])
    mean, cov = np.zeros(loss.size), np.eye(loss.size) * signal**2

    def observe(what: np.ndarray, value: float, variance: float) -> None:
        nonlocal mean, cov
        gain = cov @ what / (what @ cov @ what + variance)
        mean, cov = mean + gain * (value - what @ mean), cov - np.outer(gain, what @ cov)

    for slope in slopes:
        moved = slope.at != best
        drift = (loss[rows, slope.at] + loss[rows, best])[moved].sum() / total
        for i, e in enumerate(cross_terms(posed, slope).mean(0).ravel()):
            observe(np.eye(loss.size)[i], e, noise**2 + signal**2 * drift)
    told = scale.ravel() * mean
    for plan in seen:
        moved = np.flatnonzero(plan.assignment != best)
        at = moved * columns + plan.assignment[moved]
        what = np.zeros(loss.size)
        what[at] = scale.ravel()[at]
        pairs = [(i, j) for i in at for j in at if i != j]
        crowd = 0.3**2 * sum(scale.ravel()[i] ** 2 * scale.ravel()[j] ** 2 for i, j in pairs)
        shared = sum(told[i] * told[j] for i, j in pairs) / total
        alone = (loss[moved, plan.assignment[moved]] - loss[moved, best[moved]]).sum()
        observe(what, plan.difference - alone - shared, plan.error**2 + crowd)
    scale[rows, best] = 0
    return (scale.ravel() * mean).reshape(loss.shape), np.outer(scale, scale) * cov


@pytest.mark.parametrize("seed", range(4))
def test_the_belief_is_a_gaussian_conditioned_on_all_that_was_measured(seed: int) -> None:
    posed = problem(seed, 5, 3)
    rng = np.random.default_rng(seed)
    best = rng.integers(0, 3, 5)
    before = np.where(np.arange(5) < 2, (best + 1) % 3, best)
    slopes = [Slope(at, rng.normal(size=(2, 5, 3))) for at in (before, best)]
    seen = []
    for count in (1, 2, 4):
        plan = best.copy()
        plan[:count] = (plan[:count] + rng.integers(1, 3, count)) % 3
        seen.append(Seen(plan, float(rng.normal()), 0.1 + float(rng.random())))
    belief = believe(
        posed, best, slopes, [*seen, Seen(best, 5.0, 0.1)]
    )  # the best teaches nothing
    mean, cov = conditioned(posed, best, slopes, seen)
    assert belief.cross == pytest.approx(mean, rel=1e-8, abs=1e-10)
    assert belief.root @ belief.root.T == pytest.approx(cov, rel=1e-8, abs=1e-10)
    rows = np.arange(5)
    assert belief.prior == pytest.approx(posed.loss - posed.loss[rows, best][:, None])


def test_a_draw_is_the_prior_and_as_much_of_the_rest_as_is_asked() -> None:
    prior, cross = np.array([[1.0, 2.0]]), np.array([[10.0, 20.0]])
    belief = surrogate.Belief(prior, cross, np.diag([100.0, 200.0]))
    noise = np.random.default_rng(3).standard_normal(2) * [100, 200]
    drawn = belief.draw(np.random.default_rng(3), spread=0.5, trust=0.25)
    assert drawn == pytest.approx(prior + 0.25 * (cross + 0.5 * noise[None]))
    assert belief.draw(np.random.default_rng(3), spread=0) == pytest.approx(prior + cross)
