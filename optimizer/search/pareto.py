"""The front of two objectives, both minimized: which points are on it, and how much it covers."""

from __future__ import annotations

import numpy as np


def nondominated(points: np.ndarray) -> np.ndarray:
    """points [N, 2] -> bool [N]: no other point is at least as good in both and better in one. Of
    equal points the first stays; a point with NaN is never on the front."""
    kept = np.zeros(len(points), dtype=bool)
    lowest = np.inf
    for i in np.lexsort((np.arange(len(points)), points[:, 1], points[:, 0])):
        if points[i, 1] < lowest and np.isfinite(points[i, 0]):
            kept[i], lowest = True, points[i, 1]
    return kept


def hypervolume(points: np.ndarray, reference: tuple[float, float]) -> float:
    """The area that points [N, 2] dominate below and left of `reference` (Zitzler and Thiele
    1999). Higher is better; 0 for none."""
    inside = points[(points < np.array(reference)).all(1)]
    front = inside[nondominated(inside)] if len(inside) else inside
    front = front[np.argsort(front[:, 0])]
    rights = np.append(front[1:, 0], reference[0])
    return float(((rights - front[:, 0]) * (reference[1] - front[:, 1])).sum())
