"""What a study has found: rows for a file, a front, one number of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimizer.search import starts
from optimizer.search.pareto import hypervolume

if TYPE_CHECKING:
    from optimizer.search.study import Study, Tried

SHOWN = 16  # plans of a front that are measured beside the others


def volume(study: Study, trials: list[Tried]) -> float:
    """The hypervolume of these trials; sizes in units of the budget, losses in nats, a third objective
    in units of the first plan's, below the largest of the plans that the study started from."""
    problem = study.problem
    points = study.points(trials)
    first = study.points(study.finished[: starts.SIZES + 1])
    unit = np.array([problem.limit, 1.0, *first[0, 2:]])
    top = np.array([starts.span(problem)[1], *first[:, 1:].max(0)])
    return hypervolume(points / unit, [float(x) for x in top / unit])


def shown(study: Study) -> tuple[np.ndarray, ...]:
    """Plans of a searched front [G], SHOWN at most, from the smallest up."""
    if not study.search.front:
        return ()
    found = [t.assignment for t in study.front(study.finished)]
    kept = np.unique(np.linspace(0, len(found) - 1, min(len(found), SHOWN)).round())
    return tuple(found[int(i)] for i in kept)


def history(study: Study) -> list[dict[str, float]]:
    """One row per trial. tokens: evaluated until then, those of slopes included."""
    rows, spent, best, finished = [], 0, np.inf, []
    for tried in study.tried():
        spent += tried.tokens + tried.before
        finished += [tried] if tried.complete else []
        if tried.complete and study.problem.fits(tried.assignment):
            best = min(best, tried.loss)
        row = {"tokens": spent, "loss": tried.loss, "windows": tried.windows, "best": best}
        if study.search.front:
            third = study.problem.third
            row |= {
                "size": study.problem.sizes(tried.assignment),
                **({third.name: third.of(tried.assignment)} if third else {}),
                "hypervolume": volume(study, finished),
            }
        rows.append(row)
    return rows
