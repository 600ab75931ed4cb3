"""The plans that a study measures first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from optimizer.search import Problem, exact

LOW_BIT_FACTORS = (1.5, 2.0, 3.0, 5.0)
SIZES = 8  # of a front: table's optima
SPAN = 4 / 3  # of a front: sizes from budget / SPAN to budget * SPAN
PULLS = (0.3, 3.0)  # of a third objective, see Problem.toll


def of_a_budget(problem: Problem, start: np.ndarray) -> list[np.ndarray]:
    """The table's optimum `start`, the same with the lowest bits made dearer (where the second order
    ends, the table is too kind to them), and the largest uniform plan that fits."""
    found = [start]
    lowest = int(problem.order[0])
    for factor in LOW_BIT_FACTORS:
        loss = problem.loss.copy()
        loss[:, lowest] *= factor
        found.append(exact.solve(replace(problem, loss=loss)))
    uniform = [problem.uniform(c) for c in range(len(problem.columns))]
    fitting = [u for u in uniform if problem.fits(u) and problem.allows(u)]
    return found + ([max(fitting, key=problem.sizes)] if fitting else [])


def of_a_front(problem: Problem, start: np.ndarray) -> list[np.ndarray]:
    """The table's optima at sizes around the budget, those that a third objective pulls at, and the
    uniform plans there."""
    low, high = span(problem)
    optima = [
        exact.solve(replace(problem, limit=float(limit)))
        for limit in np.geomspace(low, high, SIZES)
    ]
    if problem.third is not None:
        priced = [problem.loss + problem.toll(pull) for pull in PULLS]
        optima += [
            exact.solve(replace(problem, limit=float(limit), loss=loss))
            for limit in (problem.limit, high)
            for loss in priced
        ]
    uniform = [problem.uniform(c) for c in range(len(problem.columns))]
    inside = [u for u in uniform if low <= problem.sizes(u) <= high]
    return [start, *optima, *(u for u in inside if problem.allows(u))]


def span(problem: Problem) -> tuple[float, float]:
    """Sizes that a front covers, in the problem's unit."""
    free = np.where(problem.free, problem.size, np.inf)
    low, high = float(free.min(1).sum()), problem.sizes(problem.largest)
    return max(low, problem.limit / SPAN), min(high, problem.limit * SPAN)
