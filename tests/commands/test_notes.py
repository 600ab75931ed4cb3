"""What an objective changed, told from the tables alone."""

from __future__ import annotations

import numpy as np

from optimizer.commands import notes
from optimizer.search import Problem


def problem(loss: np.ndarray, limit: float) -> Problem:
    groups, columns = loss.shape
    size = np.tile(np.arange(1.0, columns + 1), (groups, 1))
    return Problem(
        tuple((f"layer {i}",) for i in range(groups)), tuple(f"c{i}" for i in range(columns)), loss,
        size, limit, np.arange(columns), np.ones(groups), tuple(range(groups)),
    )  # fmt: skip


def test_what_was_kept_and_paid_is_told() -> None:
    plain = np.array([[4.0, 1.0], [3.0, 1.0]])
    russian = np.array([[1.0, 0.5], [9.0, 0.5]])
    posed = problem(plain + russian, 3.0)
    (told,) = notes.aim(posed, "KL + 1 domains", {"mean KL": plain, "KL in russian": russian})
    assert "2 of 2 groups have other bits (1 more of them" in told
    assert "Less lost: KL in russian 9.5 -> 1.5 (-84.2 %)" in told
    assert "More lost: mean KL 4 -> 5 (+25.0 %)" in told


def test_an_objective_that_changes_nothing_says_so() -> None:
    plain = np.array([[4.0, 1.0], [3.0, 1.0]])
    (told,) = notes.aim(problem(2 * plain, 3.0), "J", {"mean KL": plain, "other": plain})
    assert "the same plan as the mean KL alone" in told
    assert not notes.aim(problem(plain, 3.0), "KL", {"mean KL": plain})
    assert not notes.aim(problem(2 * plain, 99.0), "J", {"mean KL": plain, "other": plain})
