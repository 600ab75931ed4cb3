"""Davidson's model against brute force and known truths; the stopping rule against its promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import approx_fprime

from optimizer.person import statistics as st


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (3, 0), (5, 9), (31, 9)])
def test_evidence_is_the_bet_averaged_over_shares(wins: int, losses: int) -> None:
    bet = quad(lambda s: (1 + s) ** wins * (1 - s) ** losses / 2, -1, 1)[0]
    assert st.evidence(wins, losses) == pytest.approx(np.log(bet))


def test_one_may_look_after_every_vote() -> None:
    """Fair coins, looked at after each of 200 votes: rarely called a preference."""
    rng = np.random.default_rng(1)
    wins = np.cumsum(rng.integers(0, 2, (2000, 200)), axis=1)
    n = np.arange(1, 201)
    bar = [
        min((w for w in range(k + 1) if st.clear(w, k - w) and 2 * w > k), default=k + 1)
        for k in n
    ]
    either = np.maximum(wins, n - wins) >= np.array(bar)
    assert either.any(1).mean() < st.ALPHA
    # a test of fixed size, looked at as often
    assert (np.abs(2 * wins - n) > 1.96 * np.sqrt(n)).any(1).mean() > 0.2


def test_a_strong_preference_becomes_clear_in_forty_votes() -> None:
    rng = np.random.default_rng(2)
    wins = (rng.random((60, 40)) < 0.85).cumsum(1)
    assert np.mean([any(st.clear(w, k - w) for k, w in enumerate(row, 1)) for row in wins]) > 0.9


def test_reachable_is_what_unanimous_votes_could_do() -> None:
    assert not st.clear(7, 0)
    assert st.clear(8, 0)
    assert st.reachable(0, 0, 8)
    assert not st.reachable(0, 0, 7)
    assert st.reachable(20, 0, 0)
    assert not st.reachable(10, 10, 5)


def simulated(
    weights: list[float], n: int, rng: np.random.Generator, tie: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(size=(n, len(weights)))
    p = np.exp(st.log_p(x @ np.array(weights), tie))
    return x, np.array([rng.choice([-1, 0, 1], p=row) for row in p])


def free(k: int, spread: float = 100.0) -> st.Prior:
    return st.Prior(np.zeros(k), spread, np.full(k, -np.inf))


def test_probabilities_are_davidsons() -> None:
    u, tie = np.array([-1.0, 0.0, 2.0]), 0.4
    one, other, nu = np.exp(u), 1.0, np.exp(tie)
    total = one + other + nu * np.sqrt(one * other)
    wanted = np.stack([other / total, nu * np.sqrt(one * other) / total, one / total], 1)
    assert np.exp(st.log_p(u, tie)) == pytest.approx(wanted)


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_evidence_is_the_likelihood_averaged_over_the_prior(spread: float) -> None:
    """Laplace's approximation beside the integral that it stands for, in one dimension."""
    x, y = simulated([1.5], 80, np.random.default_rng(11), tie=0.3)
    at = st.fit(x, y, np.ones(80), free(1, spread))

    def joint(b: float) -> float:
        log = st.log_p(x[:, 0] * b, at.tie)[np.arange(80), y + 1].sum()
        return float(log - b * b / 2 / spread**2 - np.log(spread * np.sqrt(2 * np.pi)))

    best = float(at.weights[0])
    over = quad(lambda b: np.exp(joint(b) - joint(best)), best - 2, best + 2)[0]
    found = st._evidence(x, y, np.ones(80), at, spread)
    assert found == pytest.approx(joint(best) + np.log(over), abs=0.05)


def test_a_belief_finds_the_one_weight_that_differs() -> None:
    """Of ten, where all the others are the default's common one; and which, by its probability."""
    true = np.full(10, 0.7)
    true[4] = 7.0
    x, y = simulated(list(true), 150, np.random.default_rng(12))
    towards = np.ones(10)
    prior = st.Prior(towards, 6.0, np.zeros(10))
    found = st.believed(x, y, np.ones(150), prior)
    assert found.probable.sum() == pytest.approx(1)
    with_it = sum(p for (own, _), p in zip(found.models, found.probable, strict=True) if 4 in own)
    assert with_it > 0.99
    cosine = found.weights @ true / np.linalg.norm(found.weights) / np.linalg.norm(true)
    assert cosine > 0.98
    plain = st.fit(x, y, np.ones(150), prior).weights
    assert np.abs(found.weights - true).max() < np.abs(plain - true).max()
    assert found.weights[0] == pytest.approx(found.scale, rel=0.3)
    again = st.believed(x, y, np.ones(150), prior, found)  # of the likely models alone
    assert len(again.models) <= st.MODELS
    assert again.weights == pytest.approx(found.weights, abs=0.3)


def test_many_votes_find_the_weights() -> None:
    x, y = simulated([2.0, -1.0, 0.0], 4000, np.random.default_rng(3), tie=0.5)
    found = st.fit(x, y, np.ones(len(y)), free(3))
    assert found.weights == pytest.approx([2, -1, 0], abs=0.15)
    assert found.tie == pytest.approx(0.5, abs=0.1)


def test_the_optimum_is_one() -> None:
    """No step in any direction does better, with the prior counted."""
    x, y = simulated([1.0, 0.5], 50, np.random.default_rng(4))
    prior = st.Prior(np.array([1.0, 0.0]), 0.5, np.array([-np.inf, -np.inf]))
    found = st.fit(x, y, np.ones(50), prior)

    def loss(z: np.ndarray) -> float:
        log = st.log_p(x @ z[:2], z[3])[np.arange(50), y + 1].sum()
        away = (z[:2] - z[2] * prior.towards) / prior.spread
        return float(-log + away @ away / 2 + st.WEAK * (z[2] ** 2 + z[3] ** 2) / 2)

    at = np.array([*found.weights, found.scale, found.tie])
    assert np.abs(approx_fprime(at, loss)).max() < 1e-2


def test_no_votes_leave_the_default() -> None:
    """A column that no vote speaks about gets the default's weight, at the votes' own scale."""
    x, y = simulated([1.5, 0.0], 200, np.random.default_rng(5))
    x[:, 1] = 0
    towards = np.ones(2)
    found = st.fit(x, y, np.ones(200), st.Prior(towards, 0.5, np.zeros(2)))
    assert found.weights[1] == pytest.approx(found.scale, rel=1e-3)
    assert found.scale > 0.5


def test_strengths_order_models_as_the_votes_do() -> None:
    pairs = np.array([[0, 1]] * 10 + [[1, 2]] * 10 + [[0, 2]] * 10)
    y = np.array([1] * 8 + [0] * 2 + [1] * 6 + [-1] * 4 + [1] * 9 + [0])
    found = st.strengths(pairs, y, np.ones(30), 3)
    assert found[0] > found[1] > found[2]
    assert found.sum() == pytest.approx(0)
    assert found == pytest.approx(-st.strengths(pairs, -y, np.ones(30), 3), abs=1e-3)


def test_noise_is_told_from_votes_that_follow_the_features() -> None:
    rng = np.random.default_rng(6)
    x, y = simulated([2.0, 0.0], 60, rng)
    prior = st.Prior(np.zeros(2), 1.0, np.zeros(2))
    assert st.noise_p(x, y, np.ones(60), prior, rng) < 0.05
    found = [
        st.noise_p(x, rng.integers(-1, 2, 60), np.ones(60), prior, rng) <= 0.05 for _ in range(20)
    ]
    assert sum(found) <= 4


def test_a_bootstrap_draws_whole_prompts() -> None:
    prompts = np.array(["a", "a", "b", "c"])
    drawn = st.resampled(prompts, np.array([1.0, 2.0, 1.0, 1.0]), np.random.default_rng(0), 500)
    assert (drawn[:, 1] == 2 * drawn[:, 0]).all()
    assert drawn.mean(0) == pytest.approx([1, 2, 1, 1], rel=0.15)


def test_agreement_is_krippendorffs() -> None:
    nan = float("nan")
    same = [[1, 0, -1, 1, nan], [1, 0, -1, 1, 0]]
    assert st.agreement(same) == pytest.approx(1)
    assert st.agreement([[1, -1, 1, -1], [-1, 1, -1, 1]]) < 0  # type: ignore[operator]
    assert st.agreement([[1, 0, 1]]) is None
    assert st.agreement([[1, nan], [nan, 1]]) is None
