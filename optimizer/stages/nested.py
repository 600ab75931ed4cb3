"""Nested plans: a base within one budget, and planes that together with it stay within another.

The base's losses are the table's. A refined group's loss is foretold from it:
    loss[g, p, r] = loss[g, p] * |W - B' - R'|^2 / |W - B'|^2
with both rounded to nearest: within a layer the curvature hardly knows of the errors, and what
GPTQ gains over rounding to nearest depends on the layer's Hessian, not on the precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from optimizer import search
from optimizer.config import Optimize
from optimizer.errors import BudgetError
from optimizer.plan import (
    UNTOUCHED,
    Layer,
    Palette,
    Plan,
    Precision,
    Refinement,
    digest,
    parse_size,
    plane_bytes,
)
from optimizer.search import Problem, exact
from optimizer.search import nested as program
from optimizer.search.nested import Pairs
from optimizer.sensitivity import Table
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace

VERSION = 1  # raised when the ratios change
ROWS = 64  # of a layer, evenly spaced, from which its ratios are taken
SPREAD = (
    2.0  # GPTQ leaves its planes more than half a step: 2 times the loss with 1 bit, then 4 times
)


@dataclass(frozen=True)
class Nest:
    """What was chosen: base columns and planes of each group. ladder: the planes that there are,
    number 0 none. alone, separate: the best plans that have the first or the second budget for
    themselves, base columns of each group."""

    pairs: Pairs
    columns: np.ndarray
    planes: np.ndarray
    ladder: tuple[Precision, ...]
    alone: np.ndarray
    separate: np.ndarray
    table: Table


def choose(
    session: Session, config: Optimize, space: SearchSpace, problem: Problem, table: Table
) -> Nest | None:
    """Both precisions of every group; None if no second budget is given. problem: of the base alone.
    Raises BudgetError."""
    if config.nested.size is None:
        return None
    ladder = _ladder(config)
    layers = {x.name: x for x in _refinable(session) if x in space.scope}
    free = _free(space, problem, layers, len(ladder))
    apart = _apart(session, config, space, problem)
    separate = apart.largest if apart.fits(apart.largest) else exact.solve(apart)
    alone = problem.largest if problem.fits(problem.largest) else exact.solve(problem)
    units = (max(problem.losses(alone), 1e-12), max(apart.losses(separate), 1e-12))
    ratios = _ratios(session, config, space, ladder, free)
    widest = dict.fromkeys(layers, ladder[-1])
    header = plane_bytes(session.inventory, widest)["container"] + 4 * len(layers)
    pairs = Pairs(
        base=problem.loss,
        refined=problem.loss[:, :, None] * ratios,
        size=problem.size,
        extra=_extra(space, layers, ladder, free),
        free=free,
        first=problem.limit,
        both=apart.limit - header,
        units=units,
        weight=config.nested.weight,
    )
    columns, planes = program.solve(pairs)
    return Nest(pairs, columns, planes, ladder, alone, separate, table)


def _ladder(config: Optimize) -> tuple[Precision, ...]:
    own = Palette(bits=list(config.nested.bits), group_size=0, symmetric=True)
    return (UNTOUCHED, *own.precisions())


def _refinable(session: Session) -> list[Layer]:
    from optimizer.models.model import skeleton
    from optimizer.models.planes import refinable

    return refinable(skeleton(session.source.folder), session.inventory)


def _free(
    space: SearchSpace, problem: Problem, layers: Mapping[str, Layer], planes: int
) -> np.ndarray:
    """bool [G, P, R]: bases that are allowed; planes on bases that have group scales to go on from."""
    found = np.zeros((*problem.loss.shape, planes), dtype=bool)
    found[:, :, 0] = problem.free
    for g, group in enumerate(space.groups):
        if all(name in layers for name in group):
            kinds = [{space.fitted[name, c].kind for name in group} for c in space.columns]
            scaled = np.array([own <= {"int", "ternary"} for own in kinds])
            found[g, :, 1:] = (problem.free[g] & scaled)[:, None]
    return found


def _apart(session: Session, config: Optimize, space: SearchSpace, problem: Problem) -> Problem:
    """The problem of one plan that has the second budget for itself."""
    budget = replace(config.budget, size=config.nested.size)
    return search.pose(session.inventory, space, problem.loss, budget, space.overhead)


def _extra(
    space: SearchSpace,
    layers: Mapping[str, Layer],
    ladder: tuple[Precision, ...],
    free: np.ndarray,
) -> np.ndarray:
    """Bytes of planes [G, P, R]."""
    found = np.zeros(free.shape)
    for g, group in enumerate(space.groups):
        for r in np.flatnonzero(free[g, :, 1:].any(0)) + 1:
            own = (layers[name] for name in group)
            found[g, :, r] = sum(ladder[r].bytes(x.rows, x.cols) for x in own)
    return found


def _ratios(
    session: Session,
    config: Optimize,
    space: SearchSpace,
    ladder: tuple[Precision, ...],
    free: np.ndarray,
) -> np.ndarray:
    """What a plane leaves of its base's loss [G, P, R]; 1 without a plane."""
    columns = [[space.fitted[g[0], c].name for c in space.columns] for g in space.groups]
    planes = [plane.name for plane in ladder]
    key = digest(
        [
            "ratios",
            VERSION,
            session.source.fingerprint,
            space.groups,
            columns,
            planes,
            free.tolist(),
            config.quantizer.clip,
        ]
    )

    def make() -> dict[str, np.ndarray]:
        from optimizer.quantization.residual import NEAR
        from optimizer.quantization.residual import nearest as refine
        from optimizer.quantization.uniform import Nearest

        nearest = Nearest(clip=config.quantizer.clip)
        found = np.ones(free.shape)
        for g in session.view.track(range(len(space.groups)), "what planes leave"):
            group = space.groups[g]
            if not free[g, :, 1:].any():
                continue
            for p, column in enumerate(space.columns):
                planes = np.flatnonzero(free[g, p, 1:]) + 1
                left = np.zeros((1 + len(planes),))
                for name in group if len(planes) else ():
                    weight = _sample(session.model.weight(name))
                    base: Any = nearest.encode(weight, space.fitted[name, column])
                    rest = weight - base.decode()
                    codes = [refine(rest, base.scales, ladder[r], NEAR) for r in planes]
                    errors = [rest, *(rest - plane.decode(base.scales) for plane in codes)]
                    left += [float(e.square().sum()) for e in errors]
                found[g, p, planes] = left[1:] / max(left[0], 1e-30)
        return {"ratios": found}

    kept = session.store.arrays("tables", key, make)
    assert kept is not None
    ratios: np.ndarray = kept["ratios"]
    if config.quantizer.name == "gptq":
        bits = np.array([0 if p.kind == "none" else p.bits for p in ladder])
        ratios = ratios * np.where(bits > 0, SPREAD ** np.minimum(bits, 2), 1.0)
    return np.minimum(ratios, 1.0)


def _sample(weight: Any) -> Any:
    return weight[:: max(1, len(weight) // ROWS)].float()


# ---------------------------------------------------------------- the plan


def refined(
    session: Session, config: Optimize, space: SearchSpace, nest: Nest, plan: Plan
) -> Plan:
    """The plan with the planes for its own layers, not yet measured."""
    columns, planes = nest.columns, nest.planes
    own = np.array([_column(space, group, plan) for group in space.groups])
    if not np.array_equal(own, columns):  # the certificate preferred another base
        columns, planes = program.solve(nest.pairs.fixed(own))
    layers = {
        name: nest.ladder[plane]
        for group, plane in zip(space.groups, planes, strict=True)
        for name in group
        if plane
    }
    if not layers:
        raise BudgetError(
            f"A refinement needs room for at least one plane: nested.size={config.nested.size} leaves "
            f"none beside a base of {plan.bytes['total']} bytes. Raise nested.size, or lower "
            "budget.size."
        )
    rows = np.arange(len(columns))
    loss = nest.pairs.refined[rows, columns, planes]
    share = loss / np.maximum(nest.pairs.base[rows, columns], 1e-30)
    chunks = (nest.table.samples[:, rows, columns] * share).sum(1)
    stderr = float(chunks.std(ddof=1) / np.sqrt(len(chunks)))
    section = Refinement(
        palette={p.name: p for p in sorted(set(layers.values()), key=lambda p: p.bits)},
        layers={name: p.name for name, p in layers.items()},
        bytes=plane_bytes(session.inventory, layers),
        size=parse_size(str(config.nested.size)),
        predicted={"kl": float(loss.sum()), "stderr": stderr},
    )
    return replace(plan, refinement=section)


def _column(space: SearchSpace, group: tuple[str, ...], plan: Plan) -> int:
    """Which column gives the group what the plan says."""
    wanted = [plan.choice[name] for name in group]
    for i, column in enumerate(space.columns):
        if [space.fitted[name, column] for name in group] == wanted:
            return i
    raise AssertionError(f"{group[0]} has a precision of no column")
