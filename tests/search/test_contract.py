"""What every search must keep to. A new search is one line in SEARCHES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from optimizer.search import Problem
from optimizer.search.exact import solve

Search = Callable[[Problem], np.ndarray]
SEARCHES: dict[str, Search] = {"exact": solve}


def problem(
    seed: int,
    groups: int = 6,
    columns: int = 4,
    tightness: float | None = None,
    scale: int = 40,
    shape: str = "falling",
) -> Problem:
    """A random table. shape: losses `falling` with size as real ones do, `any`, with `ties`, or
    partly `negative` as measured rows can be."""
    rng = np.random.default_rng([seed, groups, columns])
    size = np.sort(rng.integers(1, scale, (groups, columns)), 1).astype(float)
    size += np.arange(columns)
    loss = rng.exponential(size=(groups, columns)) * rng.exponential(size=(groups, 1))
    if shape == "falling":
        loss = -np.sort(-loss, 1)
    if shape == "ties":
        loss = rng.integers(0, 3, (groups, columns)).astype(float)
    if shape == "negative":
        loss -= 0.5
    share = rng.random() if tightness is None else tightness
    low, high = size.min(1).sum(), size.max(1).sum()
    return Problem(
        tuple((f"layer{i}",) for i in range(groups)),
        tuple(f"int{i + 2}" for i in range(columns)),
        loss,
        size,
        float(low + share * (high - low)),
        np.arange(2.0, 2 + columns),
        rng.integers(1, 100, groups),
        tuple(range(groups)),
    )


def brute(posed: Problem) -> tuple[float, np.ndarray]:
    """The best of all assignments that fit."""
    groups, columns = posed.loss.shape
    every = np.array(list(product(range(columns), repeat=groups)))
    rows = np.arange(groups)
    losses = posed.loss[rows, every].sum(1)
    sizes = posed.size[rows, every].sum(1)
    losses[sizes > posed.limit] = np.inf
    return float(losses.min()), every[losses.argmin()]


SHAPES = ("falling", "any", "ties", "negative")
CASES = [(seed, shape) for seed in range(10) for shape in SHAPES]


@pytest.fixture(params=SEARCHES)
def search(request: pytest.FixtureRequest) -> Search:
    return SEARCHES[request.param]


@pytest.mark.parametrize(("seed", "shape"), CASES)
def test_never_over_budget_and_well_formed(search: Search, seed: int, shape: str) -> None:
    posed = problem(seed, 20, 6, shape=shape)
    found = search(posed)
    assert found.shape == (20,) and found.dtype == np.int64
    assert found.min() >= 0 and found.max() < 6
    assert posed.size[np.arange(20), found].sum() <= posed.limit
    assert posed.fits(found)


@pytest.mark.parametrize(("seed", "shape"), CASES)
def test_never_worse_than_the_best_uniform_that_fits(
    search: Search, seed: int, shape: str
) -> None:
    posed = problem(seed, 20, 6, shape=shape)
    fitting = [posed.uniform(c) for c in range(6) if posed.fits(posed.uniform(c))]
    best = min((posed.losses(u) for u in fitting), default=np.inf)
    assert posed.losses(search(posed)) <= best + 1e-6 * abs(best)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("column", range(5))
def test_a_budget_of_exactly_a_uniforms_size_is_never_worse_than_it(
    search: Search, seed: int, column: int
) -> None:
    """Real sizes: where a solver's tolerance is larger than a byte."""
    posed = problem(seed, 60, 5, scale=3_000_000)
    posed = replace(posed, limit=posed.sizes(posed.uniform(column)))
    found = search(posed)
    assert posed.size[np.arange(60), found].sum() <= posed.limit
    uniform = posed.losses(posed.uniform(column))
    assert posed.losses(found) <= uniform * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_same_problem_same_answer_and_the_problem_is_untouched(search: Search, seed: int) -> None:
    posed, copy = problem(seed, 20, 6), problem(seed, 20, 6)
    first, second = search(posed), search(copy)
    assert np.array_equal(first, second)
    for name in ("loss", "size", "code_bits", "weights"):
        assert np.array_equal(getattr(posed, name), getattr(problem(seed, 20, 6), name)), name


@pytest.mark.parametrize("seed", range(5))
def test_the_tightest_budget_gives_the_smallest_plan(search: Search, seed: int) -> None:
    posed = problem(seed, tightness=0.0)
    assert posed.sizes(search(posed)) == posed.size.min(1).sum()


@pytest.mark.parametrize("seed", range(5))
def test_a_loose_budget_gives_every_group_its_best(search: Search, seed: int) -> None:
    posed = problem(seed, shape="any", tightness=1.0)
    assert posed.losses(search(posed)) == pytest.approx(posed.loss.min(1).sum())
