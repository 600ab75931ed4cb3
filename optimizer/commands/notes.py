"""What a run says to a person beside its tables, a sentence or two each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from optimizer.config import Optimize
from optimizer.formats import registry
from optimizer.formats.format import Subject, format_of
from optimizer.plan import UNTOUCHED, Inventory, Plan, policy
from optimizer.search import Problem, exact
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace

if TYPE_CHECKING:
    from optimizer.stages.refine import Refined

LARGE = 0.2  # a share of the file that is worth a word
PRICED = 32  # pins whose price is told; each takes an exact solution


def unwatched(config: Optimize, space: SearchSpace) -> list[str]:
    """Layers that a calibrated quantizer rounds to nearest."""
    head, experts = config.quantizer.reads_head, config.quantizer.reads_experts
    names = [
        x.name
        for x in space.scope
        if not (x.watchable or (head and x.predicts) or (experts and x.fused))
    ]
    if not config.quantizer.calibrated or not names:
        return []
    return [
        f"{config.quantizer.name} needs a layer's inputs. {len(names)} of {len(space.scope)} layers "
        f"in scope have none that can be watched (embeddings, fused experts: "
        f"{names[0]}); they are rounded to nearest."
    ]


def ample(config: Optimize, problem: Problem) -> list[str]:
    """What there is to say where the budget exceeds every plan."""
    largest = problem.largest
    if not problem.fits(largest):
        return []
    name = problem.columns[int(largest[0])]
    what = "the reference itself" if name == "none" else f"{name} everywhere"
    if len(set(largest)) > 1:
        what = "the largest that the policy allows"
    return [
        f"The budget of {config.budget.text} is above the largest plan of this palette, so the plan "
        f"is {what}."
    ]


def aim(problem: Problem, objective: str, parts: Mapping[str, np.ndarray]) -> list[str]:
    """What an objective beyond the mean KL changed, by the table: the plan that it would take against
    the mean KL's own, in the same bytes. problem: J's."""
    if len(parts) < 2 or problem.fits(problem.largest):
        return []
    plain = next(iter(parts))
    mine = exact.solve(problem)
    rival = exact.solve(replace(problem, loss=parts[plain]))
    moved = mine != rival
    if not moved.any():
        return [
            f"{objective} takes the same plan as the mean KL alone in these bytes, by the table."
        ]
    up = problem.size > np.take_along_axis(problem.size, rival[:, None], 1)
    rows = np.arange(len(mine))
    more = up[rows, mine]
    change = problem.size[rows, mine] - problem.size[rows, rival]
    share = float(np.clip(change, 0, None).sum() / problem.sizes(rival))
    changes = {name: _change(loss, mine, rival) for name, loss in parts.items()}
    kept = [f"{name} {text}" for name, (text, less) in changes.items() if less]
    paid = [f"{name} {text}" for name, (text, less) in changes.items() if not less]
    return [
        f"What {objective} changed compared with the mean KL alone, in the same bytes, by the table: "
        f"{int(moved.sum())} of {len(mine)} groups have other bits ({int(more.sum())} more of them; "
        f"{100 * share:.2g} % of the size moved). Less lost: {', '.join(kept) or 'nowhere'}. More "
        f"lost: {', '.join(paid) or 'nowhere'}."
    ]


def _change(loss: np.ndarray, mine: np.ndarray, rival: np.ndarray) -> tuple[str, bool]:
    """(from what to what, whether it became less)."""
    rows = np.arange(len(mine))
    now, before = (float(loss[rows, x].sum()) for x in (mine, rival))
    return (
        f"{before:.4g} -> {now:.4g} ({100 * (now / max(before, 1e-12) - 1):+.1f} %)",
        now < before,
    )


def gain(refined: Refined, objective: str) -> str:
    """What a search found and spent."""
    start, choice = refined.confirmed["start"], refined.confirmed["choice"]
    front = ""
    if refined.front:
        first, last = (refined.history[i]["hypervolume"] for i in (0, -1))
        front = (
            f" Its front has {len(refined.front)} plans (searched 0 is the smallest); the "
            f"hypervolume grew from {first:.4f} to {last:.4f}."
        )
    return (
        f"The search measured {len(refined.history)} plans with {refined.spent} evaluated tokens; on "
        f"search text that it hadn't used, {objective} went from {start:.4f} (the table's optimum) to "
        f"{choice:.4f}.{front}"
    )


def price_of_policy(
    config: Optimize, space: SearchSpace, problem: Problem, assignment: np.ndarray
) -> list[str]:
    """What the policy cost against the engine's best plan of the same bytes, by the table."""
    if (problem.free == space.held).all():
        return []
    limit = problem.sizes(assignment)
    rival = exact.solve(replace(problem, allowed=space.held, limit=limit))
    own, free = problem.losses(assignment), problem.losses(rival)
    pins = f" with {len(config.policy.listed)} pins" if config.policy.listed else ""
    return [
        f"policy={config.policy.name}{pins}: predicted KL {own:.4f}; the free plan of the same "
        f"bytes has {free:.4f}, so the policy costs {own - free:.4f} ({own / max(free, 1e-12):.3g} "
        "times), by the table.",
        *_prices(config, space, problem, assignment),
    ]


def _prices(
    config: Optimize, space: SearchSpace, problem: Problem, assignment: np.ndarray
) -> Iterator[str]:
    """What each pin cost: against the best plan of the same bytes that keeps all others."""
    own, limit = problem.losses(assignment), problem.sizes(assignment)
    assert space.held is not None
    for i, pin in enumerate(config.policy.listed[:PRICED]):
        others = [p for j, some in enumerate(space.pins) if j != i for p in some]
        left = policy.allowed(replace(config.policy, pins=others), space)
        rival = exact.solve(replace(problem, allowed=space.held & left, limit=limit))
        free = problem.losses(rival)
        yield f"The pin {pin!r} costs {own - free:.4f} nats of {own:.4f}, by the table."


def outside(inventory: Inventory, space: SearchSpace, plan: Plan, total: int) -> list[str]:
    """Much of the file, of `total` bytes, out of scope, though the engine could hold it rounded."""
    real = [p for p in plan.choice.values() if p.kind != "none"]
    if not real:
        return []
    scope, widest = {layer.name for layer in space.scope}, max(real, key=lambda p: p.code_bits)
    left = [
        layer
        for layer in inventory.layers
        if layer.name not in scope and space.demands.refusal(layer, widest) is None
    ]
    size = sum(layer.bytes(UNTOUCHED) for layer in left)
    if size < LARGE * total:
        return []
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return [
        f"{size / 1e6:.4g} of {total / 1e6:.4g} MB are layers out of scope and untouched "
        f"({left[0].name}{more}). scope=all budget.size={total} lets the search round them, too, in "
        "the same bytes."
    ]


def file(config: Optimize, session: Session, space: SearchSpace, plan: Plan) -> list[str]:
    """What the plan weighs in its engine's own format, and what of that is out of scope."""
    runtime = config.runtime
    subject = Subject(session.inventory, session.source.folder, space.base)
    verdict = registry.check(plan, runtime, subject)
    if verdict.errors:
        return [f"{runtime.name} would not run this plan: {' '.join(verdict.errors)}"]
    if verdict.bytes is None:
        return [
            f"As a recipe: mezzotint export plan.json to={runtime.name} out=DIR.",
            *verdict.notes,
        ]
    left = outside(session.inventory, space, plan, verdict.bytes)
    if not format_of(runtime.name).larger:
        return left
    return [
        *left,
        f"As a file for {runtime.name}: {verdict.bytes} bytes (mezzotint export plan.json "
        f"to={runtime.name} out=DIR).",
    ]
