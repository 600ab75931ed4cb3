"""The front of several objectives, all minimized: which points are on it, and how much it covers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def nondominated(points: np.ndarray) -> np.ndarray:
    """points [N, D] -> bool [N]: no other point is at least as good in all and better in one. Of
    equal points the first stays; a point with NaN is never on the front. Memory: N^2 D."""
    below = (points[None] <= points[:, None]).all(2)  # [i, j]: j is at least as good as i in all
    twins = below & below.T
    first = ~np.any(np.tril(twins, -1), axis=1)
    finite = np.isfinite(points).all(1)
    beaten = np.any(below & ~twins, axis=1)
    return np.asarray(~beaten & first & finite)


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """The volume that points [N, D] dominate below `reference` [D] (Zitzler and Thiele 1999). Higher
    is better; 0 for none. More than two objectives are sliced along the last one."""
    front = points[(points < np.array(reference)).all(1)]
    front = front[nondominated(front)]
    if len(reference) == 2:
        front = front[np.argsort(front[:, 0])]
        rights = np.append(front[1:, 0], reference[0])
        return float(((rights - front[:, 0]) * (reference[1] - front[:, 1])).sum())
    front = front[np.argsort(front[:, -1])]
    heights = np.diff(np.append(front[:, -1], reference[-1]))
    slices = (hypervolume(front[: i + 1, :-1], reference[:-1]) for i in range(len(front)))
    return float(sum(h * v for h, v in zip(heights, slices, strict=True)))
