"""The exact optimum of the additive table, and the plans that it is compared with.

The problem is a multiple-choice knapsack: min sum_g loss[g, x_g] s.t. sum_g size[g, x_g] <= limit.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from optimizer.errors import BudgetError
from optimizer.search import Problem

GAP = 1e-6  # relative; far below the table's own standard error
SECONDS = 20.0
TOLERANCE = 1e-6  # HiGHS' own, of a row scaled to 1


def solve(problem: Problem) -> np.ndarray:
    """The assignment with the least loss that fits [G]. HiGHS' branch and bound, stopped
    after SECONDS with the best assignment found.

    The solver lets a plan be 1e-6 of the budget over. Where it does, the answer is the optimum
    for 2e-6 less, or what is better of the nearest plans that fit.
    """
    chosen = _best(problem, 1.0)
    if chosen is None:
        raise BudgetError("The solver found no plan that fits.")
    if problem.fits(chosen):
        return chosen
    uniforms = (problem.uniform(column) for column in range(len(problem.columns)))
    candidates = [_best(problem, 1 - 2 * TOLERANCE), _shrunk(problem, chosen), *uniforms]
    return min((c for c in candidates if c is not None and problem.fits(c)), key=problem.losses)


def _best(problem: Problem, share: float) -> np.ndarray | None:
    """The optimum for a share of the budget, up to the solver's tolerance; None if there is none."""
    groups, columns = problem.loss.shape
    scale = max(float(np.abs(problem.loss).max()), 1e-30)
    one_each = sparse.kron(sparse.eye(groups), np.ones((1, columns)))
    size = problem.size.ravel()[None] / max(problem.limit, 1e-30)
    result = _solved(
        problem.loss.ravel() / scale,
        integrality=np.ones(groups * columns),
        bounds=Bounds(0, problem.free.ravel().astype(float)),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, share)],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        return None
    return np.asarray(result.x.reshape(groups, columns).argmax(1), dtype=np.int64)


def _solved(loss: np.ndarray, **what: Any) -> OptimizeResult:
    with _silent():
        return milp(loss, **what)


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches the process's stdout. HiGHS 1.12 prints a line for its own developers from C
    (transformNewIntegerFeasibleSolution), whatever it is told, which would lie among a run's words."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        with suppress(OSError, AttributeError):  # what C still holds back must not come later
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _shrunk(problem: Problem, assignment: np.ndarray) -> np.ndarray:
    """Undo the solver's feasibility tolerance: step down where a byte costs least."""
    assignment = assignment.copy()
    rows = np.arange(len(assignment))
    while not problem.fits(assignment):
        saved = problem.size[rows, assignment][:, None] - problem.size
        cost = problem.loss - problem.loss[rows, assignment][:, None]
        rate = np.where((saved > 0) & problem.free, cost / np.where(saved > 0, saved, 1), np.inf)
        group, column = np.unravel_index(int(rate.argmin()), rate.shape)
        assignment[group] = column
    return assignment


def front(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every budget at once: sizes [N], losses [N] and assignments [N, G], from the smallest plan
    to the largest.

    These are all supported optima: each is the exact optimum for its own size, found by walking
    the groups' lower convex hulls in the order of loss saved per byte (the dual of the knapsack).
    Between two neighbours an optimum can lie above the hull by at most one group's step.
    """
    steps: list[tuple[float, int, int]] = []
    start = np.zeros(len(problem.groups), dtype=np.int64)
    for group, (size, loss) in enumerate(zip(problem.size, problem.loss, strict=True)):
        hull = _hull(size, loss, np.flatnonzero(problem.free[group]))
        start[group] = hull[0]
        for a, b in pairwise(hull):
            steps.append((-(loss[a] - loss[b]) / (size[b] - size[a]), group, b))
    steps.sort(key=lambda step: step[0])
    assignments = np.tile(start, (len(steps) + 1, 1))
    for i, (_, group, column) in enumerate(steps, 1):
        assignments[i:, group] = column
    rows = np.arange(len(problem.groups))
    sizes = problem.size[rows, assignments].sum(1)
    return sizes, problem.loss[rows, assignments].sum(1), assignments


def _hull(size: np.ndarray, loss: np.ndarray, columns: np.ndarray) -> list[int]:
    """Those of `columns` on the lower convex hull of (size, loss): sizes rise, losses fall."""
    hull: list[int] = []
    for column in columns[np.lexsort((loss[columns], size[columns]))]:
        if hull and loss[column] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            left = (loss[b] - loss[a]) * (size[column] - size[a])
            if left < (loss[column] - loss[a]) * (size[b] - size[a]):
                break
            hull.pop()
        hull.append(int(column))
    return hull


def first_last_high(problem: Problem) -> np.ndarray | None:
    """The folklore: first and last block at the highest quantized precision, the rest at the
    largest uniform one that still fits; None if not even the smallest does."""
    order = [c for c in problem.order if problem.columns[c] != "none"]
    inner = [b for b in problem.blocks if b is not None]
    ends = {min(inner), max(inner)} if inner else set()
    high = np.array([b in ends for b in problem.blocks])
    for column in reversed(order):
        assignment = np.where(high, order[-1], column)
        if problem.fits(assignment):
            return assignment
    return None


def random_plan(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """A random assignment that uses its budget: allowed columns drawn at random, then single
    groups stepped down or up at random until nothing more fits."""
    order, counts = problem.order, problem.free.sum(1)
    # [G, P]: a group's allowed columns from the smallest to the largest, then the others
    order = order[np.argsort(~problem.free[:, order], axis=1, kind="stable")]
    rank = rng.integers(order.shape[1], size=len(problem.groups)) % counts
    rows = np.arange(len(rank))
    sizes = np.take_along_axis(problem.size, order, 1)
    total = sizes[rows, rank].sum()
    while total > problem.limit:
        group = rng.choice(np.flatnonzero(rank > 0))
        total += sizes[group, rank[group] - 1] - sizes[group, rank[group]]
        rank[group] -= 1
    for group in rng.permutation(len(rank)):
        while rank[group] + 1 < counts[group]:
            step = sizes[group, rank[group] + 1] - sizes[group, rank[group]]
            if total + step > problem.limit:
                break
            total, rank[group] = total + step, rank[group] + 1
    return np.asarray(order[rows, rank])


def solve_near(problem: Problem, start: np.ndarray, most: int) -> np.ndarray:
    """As `solve`, changing at most `most` groups of `start`."""
    groups, columns = problem.loss.shape
    rows = np.arange(groups)
    moved = np.ones((groups, columns))
    moved[rows, start] = 0
    upper = problem.free.astype(float)
    upper[rows, start] = 1
    one_each = sparse.kron(sparse.eye(groups), np.ones((1, columns)))
    size = problem.size.ravel()[None] / max(problem.limit, 1e-30)
    result = _solved(
        problem.loss.ravel() / max(float(np.abs(problem.loss).max()), 1e-30),
        integrality=np.ones(groups * columns),
        bounds=Bounds(0, upper.ravel()),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size, -np.inf, 1.0),
            LinearConstraint(moved.ravel()[None], 0, most),
        ],
        options={"mip_rel_gap": 1e-4, "time_limit": SECONDS},
    )
    if result.x is None:
        return start.copy()
    chosen = np.asarray(result.x.reshape(groups, columns).argmax(1), dtype=np.int64)
    return chosen if problem.fits(chosen) else _shrunk(problem, chosen)


def repaired(problem: Problem, assignment: np.ndarray) -> np.ndarray:
    """Any assignment -> one that fits and uses its budget: steps down where the table loses least
    per byte, then up where it gains most, while something fits."""
    rows = np.arange(len(assignment))
    banned = ~problem.free[rows, assignment]
    smallest = np.where(problem.free, problem.size, np.inf).argmin(1)
    assignment = _shrunk(problem, np.where(banned, smallest, assignment))
    room = problem.limit - problem.sizes(assignment)
    while True:
        extra = problem.size - problem.size[rows, assignment][:, None]
        gain = problem.loss[rows, assignment][:, None] - problem.loss
        usable = (extra > 0) & (extra <= room) & (gain > 0) & problem.free
        rate = np.where(usable, gain / np.maximum(extra, 1), 0)
        group, column = np.unravel_index(int(rate.argmax()), rate.shape)
        if rate[group, column] <= 0:
            return assignment
        room -= extra[group, column]
        assignment[group] = column
