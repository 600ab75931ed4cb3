"""What a study has found: rows for a file, a front, one number of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from optimizer.search import starts
from optimizer.search.pareto import hypervolume

if TYPE_CHECKING:
    from optimizer.search.study import Study, Tried

SHOWN = 16  # plans of a front that are measured beside the others


def volume(study: Study, trials: list[Tried]) -> float:
    """The hypervolume of these trials; sizes in units of the budget, losses in nats, a third objective
    in units of the first plan's, below the largest of the plans that the study began with."""
    problem = study.problem
    points = study.points(trials)
    first = study.points(study.started)
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


def history(
    study: Study, first: int = 0, every: Sequence[Tried] | None = None
) -> list[dict[str, float]]:
    """One row per trial from the trial `first` on. every: the study's trials, if they are known.
    tokens: evaluated until then, those of slopes included. size: in units of the budget. hypervolume:
    see `volume`; 0 until its first plans are measured."""
    rows, spent, best, finished = [], 0, np.inf, []
    for number, tried in enumerate(study.tried() if every is None else every):
        spent += tried.tokens + tried.before
        finished += [tried] if tried.complete else []
        if tried.complete and study.problem.fits(tried.assignment):
            best = min(best, tried.loss)
        if number < first:
            continue
        third = study.problem.third if study.search.front else None
        rows.append(
            {
                "tokens": spent,
                "loss": tried.loss,
                "windows": tried.windows,
                "best": best,
                "size": study.problem.sizes(tried.assignment),
                **({third.name: third.of(tried.assignment)} if third else {}),
                "hypervolume": volume(study, finished) if finished else 0.0,
            }
        )
    return rows
