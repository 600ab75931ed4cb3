"""Fronts against their definition, areas against counting and against optuna's own."""

from __future__ import annotations

import numpy as np
import pytest
from optuna._hypervolume import compute_hypervolume

from optimizer.search.pareto import hypervolume, nondominated


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_dominates(seed: int, objectives: int) -> None:
    points = np.random.default_rng(seed).integers(0, 6, (12, objectives)).astype(float)
    kept = nondominated(points)
    for i, p in enumerate(points):
        beaten = any((q <= p).all() and (q < p).any() for q in points)
        twin = any((q == p).all() for q in points[:i])
        assert kept[i] == (not beaten and not twin)


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_volume_is_optunas(seed: int, objectives: int) -> None:
    points = np.random.default_rng(seed).random((10, objectives)).round(1)  # with ties
    reference = np.array([0.8, 0.7, 0.9])[:objectives]
    inside = points[(points < reference).all(1)]
    expected = compute_hypervolume(inside, reference) if len(inside) else 0.0
    assert hypervolume(points, tuple(reference)) == pytest.approx(expected)


def test_nothing_covers_nothing_and_nan_is_not_on_a_front() -> None:
    assert hypervolume(np.zeros((0, 2)), (1, 1)) == 0
    assert hypervolume(np.array([[2.0, 0.5]]), (1, 1)) == 0
    assert not nondominated(np.array([[np.nan, 0.0], [1.0, np.nan]])).any()
