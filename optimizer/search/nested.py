"""Two budgets at once: for every group a base and what refines it, in one exact program.

Notation: G groups, P base columns, R planes, of which the first is none; base [G, P] and refined
[G, P, R] are losses, size [G, P] and extra [G, P, R] bytes:

    min  sum_g base[g, p] / b  +  weight * sum_g refined[g, p, r] / c
    s.t. sum_g size[g, p] <= first,    sum_g size[g, p] + extra[g, p, r] <= both

with one pair (p, r) for each group. b and c are what the best separate plans of the two budgets
lose, so that a hundredth of the one weighs as much as a hundredth of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint

from optimizer.errors import BudgetError
from optimizer.search.exact import _solved

GAP, SECONDS = 1e-4, 20.0
SLACK = 2e-6  # of a budget: the solver's tolerance, twice


@dataclass(frozen=True)
class Pairs:
    """free: bool [G, P, R]. units: b and c."""

    base: np.ndarray
    refined: np.ndarray
    size: np.ndarray
    extra: np.ndarray
    free: np.ndarray
    first: float
    both: float
    units: tuple[float, float]
    weight: float = 1.0

    def sizes(self, columns: np.ndarray, planes: np.ndarray) -> tuple[float, float]:
        """Bytes of the base, and of both."""
        rows = np.arange(len(columns))
        first = float(self.size[rows, columns].sum())
        return first, first + float(self.extra[rows, columns, planes].sum())

    def fits(self, columns: np.ndarray, planes: np.ndarray) -> bool:
        first, both = self.sizes(columns, planes)
        return first <= self.first and both <= self.both

    def fixed(self, columns: np.ndarray) -> Pairs:
        """The same with these bases: only planes are left to choose."""
        free = np.zeros_like(self.free)
        rows = np.arange(len(columns))
        free[rows, columns] = self.free[rows, columns]
        return Pairs(**{**vars(self), "free": free})


def solve(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Base column and plane of each group, int64 [G] twice. Raises BudgetError if nothing fits."""
    for share in (1.0, 1 - SLACK, 1 - 50 * SLACK):
        found = _best(pairs, share)
        if found is not None and pairs.fits(*found):
            return found
    raise BudgetError(
        "No base and refinement fit both budgets. Raise budget.size and nested.size, or add lower "
        "precisions to palette.bits."
    )


def _best(pairs: Pairs, share: float) -> tuple[np.ndarray, np.ndarray] | None:
    groups, columns, planes = pairs.refined.shape
    loss = pairs.base[:, :, None] / pairs.units[0] + pairs.weight * pairs.refined / pairs.units[1]
    loss = np.where(pairs.free, loss, 0.0).reshape(groups, -1)
    size = np.broadcast_to(pairs.size[:, :, None], pairs.refined.shape)
    one_each = sparse.kron(sparse.eye(groups), np.ones((1, columns * planes)))
    limits = [
        LinearConstraint(used.reshape(1, -1) / max(limit, 1.0), -np.inf, share)
        for used, limit in ((size, pairs.first), (size + pairs.extra, pairs.both))
    ]
    result = _solved(
        loss.ravel() / max(float(np.abs(loss).max()), 1e-30),
        integrality=np.ones(loss.size),
        bounds=Bounds(0, pairs.free.ravel().astype(float)),
        constraints=[LinearConstraint(one_each, 1, 1), *limits],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        return None
    chosen = np.asarray(result.x.reshape(groups, -1).argmax(1), dtype=np.int64)
    return chosen // planes, chosen % planes
