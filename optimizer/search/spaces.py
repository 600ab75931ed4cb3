"""From a trial's parameters to a plan within the budget, and the parameters of the plans that a
study starts from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optuna

from optimizer.search import Problem, exact, starts
from optimizer.search.surrogate import Belief, Slope, cross_terms, scale_at

BANDS = 5  # depth bands of `multipliers`
FACTOR = 0.4  # of `multipliers`: a type's or a band's losses count e^-FACTOR to e^FACTOR times
LOW = (-0.5, 2.0)  # the same of the two lowest precisions
PULLS = (0.03, 30.0)  # weights of a third objective, see Problem.toll
DIRECTIONS = 4  # of `directions`
FOLLOWED = (-0.5, 2.0)  # of `directions`: how far one is followed
TRUST = (0.3, 1.0)  # of `moves`: weight of the slopes' cross terms
VERSION = 2  # raised when parameters mean something else

Space = Callable[[optuna.Trial], np.ndarray]


@dataclass(frozen=True)
class Start:
    """A plan that a study starts from: parameters of the space, and the plan itself where they don't
    decode to it."""

    params: dict[str, Any] = field(default_factory=dict)
    plan: np.ndarray | None = None

    @property
    def told(self) -> list[Any]:
        """As JSON holds it."""
        return [self.params, None if self.plan is None else self.plan.tolist()]


# ---------------------------------------------------------------- layers


def layers(problem: Problem, toll: np.ndarray | float = 0.0) -> Space:
    """One categorical choice a group; what is over the budget is stepped down where the table
    says that it costs least, what is left over is spent where it gains most. toll [G, P]: see
    `Problem.toll`."""
    priced = replace(problem, loss=problem.loss + toll)

    def suggest(trial: optuna.Trial) -> np.ndarray:
        order = problem.order
        names = [problem.columns[c] for c in order]
        picked = np.array(
            [
                names.index(trial.suggest_categorical(f"group {i}", names))
                for i in range(len(problem.groups))
            ]
        )
        return exact.repaired(priced, order[picked])

    return suggest


def layers_of(problem: Problem, plan: np.ndarray) -> dict[str, Any]:
    """The parameters of `layers` that decode to the plan, or to what is left of the budget spent on
    top of it."""
    return {f"group {i}": problem.columns[column] for i, column in enumerate(plan)}


# ---------------------------------------------------------------- multipliers


def multipliers(problem: Problem, roles: Sequence[str], toll: np.ndarray | float = 0.0) -> Space:
    """Factors e^u on the table's rows and columns, decoded at exactly the budget. roles [G]; toll
    [G, P]: see `Problem.toll`."""
    kinds = sorted(set(roles))
    depth = [-1 if b is None else b for b in problem.blocks]
    band = np.clip(np.array(depth) * BANDS // (max(depth) + 1), 0, BANDS - 1)

    def suggest(trial: optuna.Trial) -> np.ndarray:
        by_role = {kind: trial.suggest_float(f"type {kind}", -FACTOR, FACTOR) for kind in kinds}
        by_band = [trial.suggest_float(f"band {i}", -FACTOR, FACTOR) for i in range(BANDS)]
        rows = np.array([by_role[role] for role in roles]) + np.array(by_band)[band]
        loss = problem.loss * np.exp(rows)[:, None]
        for column in _lowest(problem):
            loss[:, column] *= np.exp(trial.suggest_float(_low(problem, column), *LOW))
        return exact.solve(replace(problem, loss=loss + toll))

    return suggest


def multipliers_of(problem: Problem, roles: Sequence[str], factor: float) -> dict[str, Any]:
    """The parameters of `multipliers` that leave the table as it is, its lowest column `factor` times
    as dear."""
    params = {f"type {kind}": 0.0 for kind in sorted(set(roles))}
    params |= {f"band {i}": 0.0 for i in range(BANDS)}
    first, *others = _lowest(problem)
    return (
        params
        | {_low(problem, first): float(np.log(factor))}
        | {_low(problem, column): 0.0 for column in others}
    )


def _lowest(problem: Problem) -> list[int]:
    return [int(c) for c in problem.order[:2]]


def _low(problem: Problem, column: int) -> str:
    return f"low {problem.columns[column]}"


# ---------------------------------------------------------------- directions


def directions(problem: Problem, slope: Slope) -> Space:
    """A table in few numbers, decoded at exactly the budget: how far to follow each of the leading
    directions of the slope's cross terms (1 = as measured, 0 = not at all), how much dearer the
    lowest bits are, and a line and a parabola in depth. All of it is fixed when a study begins, so
    that a sampler can learn its landscape."""
    terms, shapes = leading(problem, slope), _depths(problem)

    def suggest(trial: optuna.Trial) -> np.ndarray:
        loss = problem.loss.copy()
        for column in _lowest(problem):
            loss[:, column] *= np.exp(trial.suggest_float(_low(problem, column), *LOW))
        for i, shape in enumerate(shapes):
            loss *= np.exp(trial.suggest_float(f"depth {i}", -FACTOR, FACTOR) * shape)[:, None]
        for i, term in enumerate(terms):
            loss += trial.suggest_float(f"slope {i}", *FOLLOWED) * term
        return exact.solve(replace(problem, loss=loss))

    return suggest


def leading(problem: Problem, slope: Slope) -> list[np.ndarray]:
    """The first DIRECTIONS terms [G, P] of the singular value decomposition of the slope's cross terms
    e, each times s, the scale of a group and column (see `surrogate`)."""
    mean = cross_terms(problem, slope).mean(0)
    left, size, right = np.linalg.svd(mean, full_matrices=False)
    scale = scale_at(problem, slope.at)
    kept = range(min(DIRECTIONS, int((size > 1e-12 * max(size[0], 1e-30)).sum())))
    return [scale * size[i] * np.outer(left[:, i], right[i]) for i in kept]


def directions_of(
    problem: Problem, slope: Slope, factor: float, followed: float
) -> dict[str, Any]:
    """The parameters of `directions` for the table with its lowest column `factor` times as dear, and
    each direction followed as far."""
    first, *others = _lowest(problem)
    params = {_low(problem, first): float(np.log(factor))}
    params |= {_low(problem, column): 0.0 for column in others}
    params |= {f"depth {i}": 0.0 for i in range(len(_depths(problem)))}
    return params | {f"slope {i}": followed for i in range(len(leading(problem, slope)))}


def _depths(problem: Problem) -> list[np.ndarray]:
    """Legendre's polynomials of first and second degree over the blocks, 0 outside of them [G]."""
    depth = np.array([np.nan if b is None else b for b in problem.blocks], dtype=float)
    last = np.nanmax(depth) if np.isfinite(depth).any() else 0.0
    at = np.nan_to_num(2 * depth / max(last, 1.0) - 1, nan=0.0)
    inside = np.isfinite(depth)
    return [at * inside, (1.5 * at**2 - 0.5) * inside]


# ---------------------------------------------------------------- fronts


def sized(
    space: Callable[[Problem, np.ndarray], Space],
    problem: Problem,
    span: tuple[float, float],
) -> Space:
    """A space of any size within `span`: the trial also samples the size (on a log scale) and, with
    a third objective, how much that one weighs."""

    def suggest(trial: optuna.Trial) -> np.ndarray:
        limit = trial.suggest_float("size", *span, log=True)
        pull = trial.suggest_float("pull", *PULLS, log=True) if problem.third else 0.0
        return space(replace(problem, limit=limit), problem.toll(pull))(trial)

    return suggest


def sized_of(
    problem: Problem, span: tuple[float, float], params: dict[str, Any], size: float
) -> dict[str, Any]:
    pull = {"pull": PULLS[0]} if problem.third else {}
    return params | {"size": float(np.clip(size, *span))} | pull


# ---------------------------------------------------------------- moves


def moves(problem: Problem, best: np.ndarray, belief: Belief, seed: int) -> Space:
    """Exchanges around `best`: at most `groups` of them change, together exactly at the budget,
    optimal for one draw of `belief` (Thompson sampling). What a trial samples is how far to go and
    how much to believe."""

    def suggest(trial: optuna.Trial) -> np.ndarray:
        count, trust, spread = _steps(problem, trial)
        rng = np.random.default_rng([seed, 5])
        table = belief.draw(rng, spread, trust)
        return exact.solve_near(replace(problem, loss=table), best, count)

    return suggest


def given(problem: Problem, plan: np.ndarray) -> Space:
    """The parameters of `moves` for a plan that isn't made from them."""

    def suggest(trial: optuna.Trial) -> np.ndarray:
        _steps(problem, trial)
        return plan

    return suggest


def _steps(problem: Problem, trial: optuna.Trial) -> tuple[int, float, float]:
    count = trial.suggest_int("groups", 2, _farthest(problem), log=True)
    return count, trial.suggest_float("trust", *TRUST), trial.suggest_float("spread", 0.0, 1.0)


def _farthest(problem: Problem) -> int:
    return max(2, len(problem.groups) // 4)


def moves_of(problem: Problem, plan: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    """A plan as a move from the first one: how far it is, by the table alone, no draw in it."""
    far = int(np.clip((plan != first).sum(), 2, _farthest(problem)))
    return {"groups": far, "trust": TRUST[0], "spread": 0.0}


# ---------------------------------------------------------------- starts


def starts_of(
    space: str,
    problem: Problem,
    roles: Sequence[str],
    first: np.ndarray,
    front: bool,
    slope: Slope | None = None,
) -> list[Start]:
    """What a study of this space measures first: `first`, the table's optimum, and others that the
    space can say with its parameters. slope: at `first`, of `directions`."""
    if front:
        found = _starts_of_a_front(space, problem, roles, first)
    elif space == "multipliers":
        factors = (1.0, *starts.LOW_BIT_FACTORS)
        found = [Start(multipliers_of(problem, roles, factor)) for factor in factors]
    elif space == "directions":
        assert slope is not None
        points = [(factor, 0.0) for factor in (1.0, *starts.LOW_BIT_FACTORS)] + [(1.0, 1.0)]
        found = [Start(directions_of(problem, slope, *point)) for point in points]
    else:
        plans = starts.of_a_budget(problem, first)
        by_layers = space == "layers"
        found = [
            Start(layers_of(problem, plan))
            if by_layers
            else Start(moves_of(problem, plan, first), plan)
            for plan in plans
        ]
    return list({json.dumps(start.told): start for start in found}.values())


def _starts_of_a_front(
    space: str, problem: Problem, roles: Sequence[str], first: np.ndarray
) -> list[Start]:
    span = starts.span(problem)
    found = []
    for plan in starts.of_a_front(problem, first):
        size = problem.sizes(plan)
        own = multipliers_of(problem, roles, 1.0) if space == "multipliers" else None
        params = own or layers_of(problem, plan)
        found.append(Start(sized_of(problem, span, params, size), plan))
    return found
