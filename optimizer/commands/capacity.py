"""What a finished plan or run says about machines: does it fit, how long may the context be, which
machine is the smallest, what would more memory buy. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimizer.config import Fit, conf_folder
from optimizer.errors import BudgetError, ConfigError, PlanError
from optimizer.hardware import memory
from optimizer.hardware.geometry import Geometry
from optimizer.hardware.memory import Use
from optimizer.hardware.throughput import Traffic, price
from optimizer.plan import Budget, Plan, parse_size
from optimizer.reports.run import FILE, Point, Run

TOY = "toy_"  # presets to see a sweep with a small model


@dataclass(frozen=True)
class Machine:
    """A preset: its name in conf/budget/ and its budget."""

    name: str
    budget: Budget


@dataclass(frozen=True)
class Step:
    """What `more` bytes of memory buy: the best predicted plan with and without them."""

    more: int
    now: Point
    then: Point


@dataclass(frozen=True)
class Answer:
    """need, room, longest: of the plan on the machine, where one is given. made_for: the model's
    own limit of tokens, 0 = unknown. smallest: the presets that hold it, smallest first. wanted:
    the smallest plan of the front with at most the loss. moved: bytes read for each new token;
    fastest: tokens per second that the bandwidth allows, all sequences together; price: the least
    that a million of them cost."""

    plan: Plan
    budget: Budget
    need: Use
    room: int | None
    longest: int | None
    made_for: int
    smallest: tuple[Machine, ...]
    wanted: Point | None
    step: Step | None
    moved: int | None = None
    fastest: float | None = None
    price: float | None = None


def answer(config: Fit) -> Answer:
    """Raises PlanError, ConfigError or BudgetError before anything is computed in vain."""
    config.check()
    path = Path(config.plan)
    plan = Plan.load(path)
    shape = _shape(plan, path)
    run = Run.load(path) if path.is_dir() and (path / FILE).exists() else None
    budget = config.budget
    if budget.kv == "auto":
        budget = budget.with_cache(plan.kv, plan.keep)
    weights, wanted = memory.resident_weights(plan), None
    unpacked = memory.unpacked_bytes(plan, budget.machine)
    if config.loss is not None:
        wanted = _smallest_plan(_front(run, path), config.loss)
        weights = wanted.bytes
    need = memory.use(shape, plan.runtime, budget, weights, unpacked)
    room = longest = step = None
    if budget.memory is not None:
        room = memory.usable(budget) - need.total
        longest = memory.longest_context(shape, plan.runtime, budget, weights, unpacked)
        if run is not None and config.more is not None:
            step = _step(run, memory.usable(budget) - need.besides, parse_size(config.more))
    fitting = _fitting(shape, plan, budget, weights, unpacked)
    found = Answer(plan, budget, need, room, longest, shape.longest, fitting, wanted, step)
    return _timed(found, config, shape)


def _timed(found: Answer, config: Fit, shape: Geometry) -> Answer:
    read = found.plan.provenance.get("read")
    if read is None or found.wanted is not None:
        return found
    bits = memory.stored_bits(shape, found.plan.runtime, found.budget.kv)
    cache = memory.cache_bytes(shape, found.budget.context, 1, bits)
    moved = Traffic(found.budget.batch, cache).token(int(read))
    if config.bandwidth is None:
        return replace(found, moved=moved)
    fastest = parse_size(config.bandwidth) / moved
    rate = config.hourly_rate
    least = None if rate is None else price(rate, fastest)
    return replace(found, moved=moved, fastest=fastest, price=least)


def _shape(plan: Plan, path: Path) -> Geometry:
    data = plan.provenance.get("geometry")
    if plan.predicted.get("unit") == "text":
        raise PlanError(
            f"The plan in {path} is for an encoder, which keeps no cache: `mezzotint fit` knows the "
            "memory of language models only. `mezzotint show` says how many bytes its weights have."
        )
    if not data:
        raise PlanError(
            f"The plan in {path} doesn't hold its model's sizes: it is from an older version, or of "
            "an architecture whose cache isn't known. Make it again with `mezzotint optimize`."
        )
    try:
        return Geometry.from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"The plan in {path} has sizes of its model that can't be read ({type(error).__name__}: "
            f"{error}). Make it again with `mezzotint optimize`."
        ) from None


def _front(run: Run | None, path: Path) -> tuple[Point, ...]:
    if run is None:
        raise ConfigError(
            f"A loss is looked up in a run's front, and {path} is no run's folder. Give the folder "
            "that `mezzotint optimize` wrote."
        )
    return run.front


def _smallest_plan(front: Sequence[Point], loss: float) -> Point:
    found = [point for point in front if point.predicted <= loss]
    if not found:
        least = min(point.predicted for point in front)
        raise BudgetError(
            f"No plan of this front promises a KL of {loss:g}; the least is {least:.3g}. Set "
            f"loss={least:.3g} or more, or add higher precisions to palette.bits."
        )
    return min(found, key=lambda point: point.bytes)


def _step(run: Run, room: int, more: int) -> Step | None:
    """None where not even the smallest plan fits."""

    def best(size: int) -> Point | None:
        fitting = [point for point in run.front if point.bytes <= size]
        return min(fitting, key=lambda point: point.predicted, default=None)

    now, then = best(room), best(room + more)
    return None if now is None or then is None else Step(more, now, then)


def machines() -> list[Machine]:
    """All presets of machines that exist, smallest usable memory first."""
    from omegaconf import OmegaConf

    found = []
    for path in sorted((conf_folder() / "budget").glob("*.yaml")):
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        if values.get("memory") and not path.stem.startswith(TOY):
            found.append(Machine(path.stem, Budget(**values)))
    return sorted(found, key=lambda machine: memory.usable(machine.budget))


def _fitting(
    shape: Geometry, plan: Plan, budget: Budget, weights: int, unpacked: int
) -> tuple[Machine, ...]:
    """The smallest preset of each kind of machine that holds it."""
    found: dict[str, Machine] = {}
    for machine in machines():
        asked = replace(
            machine.budget,
            context=budget.context,
            batch=budget.batch,
            kv=budget.kv,
            keep=budget.keep,
            overhead=budget.overhead,
        )
        need = memory.use(shape, plan.runtime, asked, weights, unpacked)
        if need.total <= memory.usable(asked):
            found.setdefault(asked.machine, Machine(machine.name, asked))
    return tuple(sorted(found.values(), key=lambda m: memory.usable(m.budget)))
