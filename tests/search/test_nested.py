"""Base and planes under two budgets, against trying all pairs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from optimizer.errors import BudgetError
from optimizer.search.nested import Pairs, solve


def posed(seed: int, first: float, both: float) -> Pairs:
    rng = np.random.default_rng(seed)
    groups, columns, planes = 3, 3, 3
    size = np.cumsum(rng.integers(1, 9, (groups, columns)), 1).astype(float)
    base = np.sort(rng.random((groups, columns)), 1)[:, ::-1]
    left = np.concatenate([np.ones((groups, columns, 1)), rng.random((groups, columns, 2))], 2)
    extra = np.concatenate(
        [np.zeros((groups, columns, 1)), rng.integers(1, 9, (groups, columns, 2))], 2
    )
    free = rng.random((groups, columns, planes)) < 0.9
    free[:, 0, 0] = True
    return Pairs(
        base, base[:, :, None] * left, size, extra, free, first, both, (0.7, 0.2), weight=0.5
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_trying_everything_finds(seed: int) -> None:
    pairs = posed(seed, first=24, both=34)

    def loss(columns: np.ndarray, planes: np.ndarray) -> float:
        rows = np.arange(3)
        base, refined = pairs.base[rows, columns], pairs.refined[rows, columns, planes]
        return float(base.sum() / 0.7 + 0.5 * refined.sum() / 0.2)

    every = [(np.array(c), np.array(r)) for c in product(range(3), repeat=3)
             for r in product(range(3), repeat=3)]  # fmt: skip
    rows = np.arange(3)
    fitting = [x for x in every if pairs.fits(*x) and pairs.free[rows, x[0], x[1]].all()]
    found = solve(pairs)
    assert pairs.fits(*found) and pairs.free[rows, found[0], found[1]].all()
    assert loss(*found) <= min(loss(*x) for x in fitting) * (1 + 2e-4)


def test_bases_that_are_given_stay() -> None:
    pairs = posed(3, first=30, both=40)
    given = np.zeros(3, np.int64)
    columns, planes = solve(pairs.fixed(given))
    assert np.array_equal(columns, given) and pairs.fits(columns, planes)


def test_nothing_that_fits_is_said() -> None:
    with pytest.raises(BudgetError, match=r"budget\.size and nested\.size"):
        solve(posed(1, first=1, both=2))
