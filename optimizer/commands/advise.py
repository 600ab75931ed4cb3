"""What would fit where, from a model's config alone: `mezzotint advise`, and the budget of a run that
was given none. No weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optimizer.commands.capacity import Machine, machines
from optimizer.config import Advise, Optimize
from optimizer.errors import BudgetError, ModelError
from optimizer.hardware import memory
from optimizer.hardware.geometry import Geometry, geometry
from optimizer.hardware.memory import mib
from optimizer.hardware.this_machine import this_machine
from optimizer.plan import Budget

CONTEXT = 8192  # of a run that was given no budget
WORTH = (
    8,
    6,
    5,
    4,
    3,
)  # bits that are worth choosing between; above 8 nothing measurable is gained
OVERHEAD = 0.375  # bits a weight: fp16 scales and zero points of groups of 64, the default palette
LEAST = 2 + OVERHEAD  # bits a weight of the smallest plan


@dataclass(frozen=True)
class Size:
    """weights: numbers in matrices; others: in vectors, which stay at 16 bits. shape: None for
    models that keep no cache, or one that isn't known."""

    weights: int
    others: int
    shape: Geometry | None

    def bytes(self, bits: float) -> int:
        """Of the weight file at so many bits a weight, scales and zero points counted."""
        return int(self.weights * bits / 8) + 2 * self.others

    def bits(self, room: float) -> float:
        """Bits a weight that so many bytes allow, 16 at most; 0 where no plan is so small."""
        found = min(8 * (room - 2 * self.others) / self.weights, 16.0)
        return found if found >= LEAST else 0.0


@dataclass(frozen=True)
class Row:
    """bits: for each context, 0 = doesn't fit."""

    machine: Machine
    bits: tuple[float, ...]


@dataclass(frozen=True)
class Advice:
    model: str
    size: Size
    contexts: tuple[int, ...]
    here: Row | None
    rows: tuple[Row, ...]


def measured(folder: Path) -> Size:
    """A model's size by its config.json."""

    from optimizer.models.model import skeleton
    from optimizer.models.source import is_encoder, read_config

    net = skeleton(folder)
    counts = [(value.ndim, value.numel()) for _, value in net.named_parameters()]
    weights = sum(count for ndim, count in counts if ndim > 1)
    others = sum(count for ndim, count in counts if ndim <= 1)
    config = read_config(folder)
    try:
        shape = None if is_encoder(folder) else geometry(config)
    except ModelError:
        shape = None
    return Size(weights, others, shape)


def room(size: Size, budget: Budget, runtime: str, kv: int) -> int:
    """Bytes that a machine leaves for weights beside cache, activations and runtime."""
    if size.shape is None:
        return memory.usable(budget)
    return (
        memory.usable(budget) - memory.use(size.shape, runtime, budget.with_cache(kv), 0).besides
    )


def advise(config: Advise, look: Callable[[], Budget] = this_machine) -> Advice:
    """For this machine and every preset the bits a weight that would fit, at some contexts."""
    from optimizer.models.source import configured
    from optimizer.store import Store, root

    config.check()
    folder = configured(config.model, Store(root(config.store)), config.revision)
    size = measured(folder)
    longest = 0 if size.shape is None else size.shape.longest
    contexts = tuple(sorted({min(c, longest or c) for c in config.contexts}))
    contexts = contexts if size.shape is not None else ()

    def row(machine: Machine) -> Row:
        budgets = [replace(machine.budget, context=c) for c in contexts] or [machine.budget]
        rooms = [room(size, b, config.runtime, config.kv) for b in budgets]
        return Row(machine, tuple(size.bits(r) for r in rooms))

    try:
        here = row(Machine("this machine", look()))
    except BudgetError:
        here = None
    return Advice(config.model, size, contexts, here, tuple(row(m) for m in machines()))


def propose(
    config: Optimize, folder: Path, look: Callable[[], Budget] = this_machine
) -> tuple[Optimize, list[str]]:
    """A run without a budget gets the largest of WORTH that fits this machine beside a cache of
    CONTEXT tokens, and the sentences that say so. Raises BudgetError where nothing fits."""
    if config.budget.given:
        return config, []
    size, machine = measured(folder), look()
    longest = CONTEXT if size.shape is None else size.shape.longest or CONTEXT
    context = min(CONTEXT, longest)
    kv = config.budget.caches[0] if config.budget.caches else 16
    left = room(size, replace(machine, context=context), config.runtime.name, kv)
    sizes = {bits: size.bytes(bits + OVERHEAD) for bits in WORTH}
    chosen = next((bits for bits in WORTH if sizes[bits] <= left), None)
    if chosen is None:
        raise BudgetError(_too_large(config, size, left, context, kv))
    beside = f" beside a cache of {context} tokens" if size.shape is not None else ""
    listed = ", ".join(f"{bits} bits {mib(sizes[bits])}" for bits in WORTH)
    whole = size.bytes(16)
    fits = f"It fits whole, too, at 16 bits: {mib(whole)}. " if whole <= left else ""
    said = (
        f"No budget was given. {str(machine.device).capitalize()} leaves {mib(max(left, 0))} for "
        f"weights{beside}. The file would take: {listed}. {fits}Taken: {chosen} bits. For another: "
        f"budget.size={sizes[chosen] // 2 // 10**6 or 1}MB, budget.bits=4.5, or a machine; mezzotint "
        "advise model=... shows which."
    )
    return replace(config, budget=replace(config.budget, size=str(sizes[chosen]))), [said]


def _too_large(config: Optimize, size: Size, left: int, context: int, kv: int) -> str:
    least = size.bytes(WORTH[-1] + OVERHEAD)
    name = smallest(size, machines(), config.runtime.name, context, kv)
    remedy = (
        f"The smallest machine that would do is {name.budget.device} (budget={name.name})."
        if name is not None
        else "No machine among the presets would do."
    )
    return (
        f"{config.model} is too large for this machine: at {WORTH[-1]} bits its file has "
        f"{mib(least)}, and {mib(max(left, 0))} are left beside a cache of {context} tokens. {remedy}"
    )


def smallest(
    size: Size, presets: Sequence[Machine], runtime: str, context: int, kv: int
) -> Machine | None:
    least = size.bytes(WORTH[-1] + OVERHEAD)
    for machine in presets:
        if room(size, replace(machine.budget, context=context), runtime, kv) >= least:
            return machine
    return None


def by_kind(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    """gpu, apple, cpu -> rows, smallest machine first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.machine.budget.machine, []).append(row)
    return found
