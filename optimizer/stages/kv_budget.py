"""What a machine leaves for weights, and which cache goes with them.

A cache of fewer bits leaves more bytes to the weights. With budget.kv=auto, or a list, every cache
precision that fits gets the best plan for what it leaves, and weights and cache are measured
together on the search documents; the lowest loss wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optimizer.config import Optimize
from optimizer.errors import BudgetError
from optimizer.hardware import memory
from optimizer.hardware.geometry import geometry
from optimizer.hardware.throughput import Traffic, active_share
from optimizer.plan import Budget, stored_bytes
from optimizer.plan.cache import CacheKind
from optimizer.quantization.methods import bind
from optimizer.search import Problem
from optimizer.stages.session import Kept, Session
from optimizer.stages.space import SearchSpace


@dataclass(frozen=True)
class Room:
    """kind: of the cache. budget: of the weights alone. text: how that came about."""

    kind: CacheKind
    budget: Budget
    text: str = ""


@dataclass(frozen=True)
class Settled:
    """The session with the chosen room's cache, its problem and the assignment to go on from."""

    session: Session
    problem: Problem
    assignment: np.ndarray


def told(tried: Sequence[Mapping[str, Any]], kv: int, keep: str | None) -> str:
    """Why this cache, in a sentence. tried: {kv, keep, bytes, bits, kl} each."""

    def cache(one: Mapping[str, Any]) -> str:
        kept = one.get("keep")
        return f"{one['kv']}" if kept is None else f"{one['kv']} (but {kept} tokens at 16)"

    own = next(t for t in tried if (t["kv"], t.get("keep")) == (kv, keep))
    others = ", ".join(
        f"{t['kl']:.3g} with weights at {t['bits']:.2f} and cache at {cache(t)}"
        for t in tried
        if t is not own
    )
    return (
        f"Weights at {own['bits']:.2f} bits, cache at {cache(own)}: measured together on search "
        f"text, KL was {own['kl']:.3g}, before the search; it was {others}."
    )


def rooms(config: Optimize, session: Session, space: SearchSpace) -> list[Room]:
    """One per cache precision that leaves enough for the smallest plan, widest cache first.
    Raises BudgetError if none does, with what the smallest cache would need."""
    budget, runtime = config.budget, config.runtime.name
    if budget.keeps != [None]:
        _check_keep(session)
    if budget.memory is None:
        return [Room(memory.kind(runtime, budget.caches[0], budget.keeps[0]), budget)]
    shape = geometry(session.config)
    least, unpacked = _smallest(session, space), _unpacked(space, config.budget.machine)
    found: list[Room] = []
    refusal: BudgetError | None = None
    bits = budget.caches or memory.caches(runtime)
    for kv, keep in ((b, k) for b in bits for k in (budget.keeps if b < 16 else [None])):
        try:
            left, text = memory.resolve(
                budget.with_cache(kv, keep), shape, runtime, least, unpacked
            )
            found.append(Room(memory.kind(runtime, kv, keep), left, text))
        except BudgetError as error:
            refusal = error
    if refusal is not None and not found:
        raise refusal
    return found


def _check_keep(session: Session) -> None:
    """Raises ConfigError for a model whose class says that it can't, before anything is measured."""
    from optimizer.models.inventory import architecture
    from optimizer.models.kv_cache import check_sees_all

    _, found = architecture(session.source.folder)
    check_sees_all(found)


def traffic(config: Optimize, session: Session) -> Traffic:
    """What decoding reads per token on the budget's machine; the cache only where one is asked."""
    share = active_share(session.config)
    if config.budget.memory is None:
        return Traffic(experts=share)
    shape = geometry(session.config)
    kind, context = session.cache.kind, config.budget.context
    bits = memory.stored_bits(shape, config.runtime.name, kind.bits)
    cache = memory.cache_bytes(shape, context, 1, bits, 0 if kind.whole else kind.exact(context))
    return Traffic(config.budget.batch, cache, share)


def _smallest(session: Session, space: SearchSpace) -> int:
    """Bytes of the smallest plan that the policy allows."""
    free = np.ones((len(space.groups), len(space.columns)), dtype=bool)
    free = free if space.allowed is None else space.allowed
    left = {
        name: np.flatnonzero(row)
        for group, row in zip(space.groups, free, strict=True)
        for name in group
    }
    smallest = {
        layer.name: min(
            (space.fitted[layer.name, space.columns[c]] for c in left[layer.name]),
            key=layer.bytes,
        )
        for layer in space.scope
    }
    return stored_bytes(session.inventory, smallest)["total"] + 8 * len(space.scope)


def _unpacked(space: SearchSpace, machine: str) -> int:
    """Bytes while the largest layer is unpacked from the dearest precision."""
    return max(
        max(
            memory.unpacking(layer.weights, space.fitted[layer.name, c], machine)
            for c in space.columns
        )
        for layer in space.scope
    )


def settle(
    config: Optimize,
    session: Session,
    space: SearchSpace,
    found: list[Room],
    solve: Callable[[Budget], tuple[Problem, np.ndarray]],
) -> Settled:
    """The room whose best plan measures best together with its cache. solve: a budget of
    weights -> its problem and the table's optimum. Cost: the search windows once per room, where
    there are several."""
    if len(found) == 1:
        return Settled(session.with_cache(Kept(found[0].kind)), *solve(found[0].budget))
    quantizer = bind(config.quantizer, session)
    tried, solved = [], []
    for room in session.view.track(found, "caches with their plans"):
        problem, assignment = solve(room.budget)
        choice = space.choice(assignment)
        inside = sum(x.bytes(choice[x.name]) for x in space.scope)
        row = {
            "kv": room.kind.bits,
            "keep": room.kind.keep,
            "bytes": stored_bytes(session.inventory, choice)["total"],
            "bits": 8 * inside / sum(x.weights for x in space.scope),
            "kl": session.with_cache(Kept(room.kind)).score(choice, "search", quantizer).mean_kl,
        }
        tried.append(row)
        solved.append((problem, assignment))
    best = min(range(len(found)), key=lambda i: float(tried[i]["kl"]))
    return Settled(session.with_cache(Kept(found[best].kind, tuple(tried))), *solved[best])
