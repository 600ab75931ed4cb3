"""From a table and a budget to plans: arrays in, arrays out, no torch.

Notation: G groups, P columns of the palette; loss, size [G, P]; an assignment is one column
index per group, int64 [G].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optimizer.errors import BudgetError, ConfigError
from optimizer.plan import UNTOUCHED, Budget, Choices, Inventory, parse_size, stored_bytes
from optimizer.search import credentials

SPACES = ("moves", "multipliers", "directions", "layers")
SAMPLERS = ("tpe", "nsgaii", "cmaes", "gp", "random")
DECODED = ("multipliers", "layers")
CONTINUOUS = ("cmaes", "gp")
THIRDS = ("read", "time", "price")


@dataclass(kw_only=True)
class Search:
    """`search=`: exact (the table's optimum, nothing measured) or one of the spaces.

    moves: exchanges around the best plan, guided by the slope of the measured loss there.
    multipliers: log-factors on the table per layer type, depth band and low bits, decoded by the
    exact solver. directions: a few numbers along what a slope at the table's optimum says, decoded
    the same way. layers: the assignment itself, one categorical choice a group.
    tokens: no trial begins once so many search tokens are evaluated (a backward pass counts as two
        more forward passes); confirming the best four on unused windows comes on top.
    trials, seconds: further limits, None = none.
    front: search sizes around the budget too, size and loss as two objectives of one study.
    third: one more objective of a front: read (bytes read per new token), time (seconds per new token
    of the packed model, measured layer by layer) or price (of a million tokens at hourly_rate).
    storage: a database's address, without its password as soon as it is given: see `credentials`.
    heartbeat: seconds; a worker on a database that is silent for twice as long is taken for dead.
    """

    space: str = "moves"
    sampler: str = "tpe"
    tokens: int = 60_000
    trials: int | None = None
    seconds: float | None = None
    front: bool = False
    third: str | None = None
    hourly_rate: float | None = None
    storage: str | None = None
    heartbeat: int = 30
    worker: int = 0  # a number of its own for each worker of one study
    first: int = 4  # windows before the pruner may stop a trial
    prune: float = 0.1  # p-value of the Wilcoxon test; 0 = never prune

    def __post_init__(self) -> None:
        self.storage = credentials.hidden(self.storage)

    def check(self) -> None:
        if self.space not in ("auto", "exact", *SPACES):
            raise ConfigError(f"search.space is exact, {', '.join(SPACES)}, not {self.space!r}.")
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"search.sampler is {', '.join(SAMPLERS)}, not {self.sampler!r}.")
        if self.space == "layers" and self.sampler in CONTINUOUS:
            raise ConfigError(
                f"The space layers is categorical, which {self.sampler} can't sample. Take "
                "search.sampler=tpe, nsgaii or random, or search=multipliers."
            )
        if self.front and (self.space not in DECODED or self.sampler in ("cmaes", "gp")):
            raise ConfigError(
                "A front (search.front=true) needs a space that is decoded for any size and a "
                f"sampler of two objectives: search.space one of {', '.join(DECODED)} and "
                f"search.sampler one of tpe, nsgaii, random, not {self.space} and {self.sampler}."
            )
        self._check_third()
        if self.tokens < 1:
            raise ConfigError(
                f"A search needs evaluated tokens; search.tokens is {self.tokens}. Give a positive "
                "number, or search=exact to measure nothing."
            )
        for key in ("trials", "seconds"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"search.{key} is a limit above 0, or null for none, not {value}. Take "
                    "search=exact to measure nothing."
                )
        if not 0 <= self.worker < 10**6:
            raise ConfigError(
                f"search.worker is a number of its own, 0 to 999999, for each worker of a study, not "
                f"{self.worker}."
            )
        if self.heartbeat < 1:
            raise ConfigError(f"search.heartbeat is at least 1 second, not {self.heartbeat}.")
        if not 0 <= self.prune < 1 or self.first < 1:
            raise ConfigError("search.prune is a p-value in [0, 1) and search.first at least 1.")

    def _check_third(self) -> None:
        if self.third is not None and self.third not in THIRDS:
            raise ConfigError(
                f"search.third is {', '.join(THIRDS)} or null, not {self.third!r}: bytes read per "
                "new token, seconds per new token, or what a million tokens cost."
            )
        if self.third is not None and not self.front:
            raise ConfigError(
                f"A third objective (search.third={self.third}) is one of a front's: take "
                "search=front, or leave search.third out."
            )
        if self.third == "price" and self.hourly_rate is None:
            raise ConfigError(
                "A price follows from what the machine costs: give search.hourly_rate, such as 0.5 "
                "an hour, or take search.third=time."
            )
        if self.hourly_rate is not None and self.third not in ("time", "price"):
            raise ConfigError(
                "A price follows from a measured time: search.hourly_rate needs search.third=price or "
                f"time, not {self.third}."
            )
        if self.hourly_rate is not None and not 0 < self.hourly_rate < float("inf"):
            raise ConfigError(f"search.hourly_rate is an amount above 0, not {self.hourly_rate}.")


@dataclass(frozen=True)
class Third:
    """What a front weighs besides size and loss, lower is better: outside + the sum of each [G, P].
    name: read, in bytes per token; time, in seconds per token; price, of a million tokens."""

    name: str
    each: np.ndarray
    outside: float

    def of(self, assignment: np.ndarray) -> float:
        return self.outside + float(self.each[np.arange(len(self.each)), assignment].sum())


@dataclass(frozen=True)
class Problem:
    """Choose one column per group: least total loss with total size <= limit.

    loss: predicted nats per token [G, P], lower is better. size: in `unit`s [G, P]; limit in the
    same unit. code_bits [P] orders the columns. weights [G]. allowed: what a policy leaves.
    third: of a front with three objectives.
    """

    groups: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    loss: np.ndarray
    size: np.ndarray
    limit: float
    code_bits: np.ndarray
    weights: np.ndarray
    blocks: tuple[int | None, ...]
    unit: str = "bytes"
    allowed: np.ndarray | None = None
    third: Third | None = None

    @property
    def free(self) -> np.ndarray:
        """Which columns a group may take, bool [G, P]."""
        every = np.ones(self.loss.shape, dtype=bool)
        return every if self.allowed is None else self.allowed

    def allows(self, assignment: np.ndarray) -> bool:
        return bool(self.free[np.arange(len(self.groups)), assignment].all())

    @property
    def largest(self) -> np.ndarray:
        """The largest assignment that is allowed."""
        return np.asarray(np.where(self.free, self.size, -1).argmax(1))

    def sizes(self, assignment: np.ndarray) -> float:
        return float(self.size[np.arange(len(self.groups)), assignment].sum())

    def losses(self, assignment: np.ndarray) -> float:
        return float(self.loss[np.arange(len(self.groups)), assignment].sum())

    def fits(self, assignment: np.ndarray) -> bool:
        return self.sizes(assignment) <= self.limit + 1e-13 * abs(self.limit)  # float sums

    @property
    def order(self) -> np.ndarray:
        """Columns from the smallest to the largest."""
        return np.argsort(self.size.sum(0), kind="stable")

    def uniform(self, column: int) -> np.ndarray:
        """That column wherever it is allowed, elsewhere the largest that is: an engine that keeps
        embeddings untouched has uniform plans, too."""
        return np.asarray(np.where(self.free[:, column], column, self.largest))

    def toll(self, pull: float) -> np.ndarray:
        """The third objective as a loss [G, P] for a solver: at pull 1, the way from the dearest plan
        to the cheapest counts as much as the loss of the largest uniform plan that fits."""
        if self.third is None or pull == 0:
            return np.zeros(self.loss.shape)
        each = self.third.each
        span = float((each.max(1) - each.min(1)).sum()) or 1.0
        fitting = [p for p in map(self.uniform, self.order) if self.fits(p)]
        unit = self.losses(fitting[-1] if fitting else self.uniform(int(self.order[0])))
        return pull * abs(unit) / span * each


def pose(
    inventory: Inventory,
    choices: Choices,
    loss: np.ndarray,
    budget: Budget,
    overhead: int = 0,
) -> Problem:
    """Turn names into arrays. loss: of the choices [G, P]. overhead: bytes of an engine's file beyond
    our own, for budget.size. Raises BudgetError if even the smallest plan is over the budget."""
    groups, columns, fitted = choices.groups, choices.columns, choices.fitted
    layers = {layer.name: layer for layer in choices.scope}

    def total(group: Sequence[str], column: str, coded: bool) -> float:
        precisions = [(layers[name], fitted[name, column]) for name in group]
        if coded:
            return float(sum(p.code_bits * layer.weights for layer, p in precisions))
        return float(sum(layer.bytes(p) for layer, p in precisions))

    coded = budget.code_bits is not None
    size = np.array([[total(group, column, coded) for column in columns] for group in groups])
    weights = np.array([sum(layers[name].weights for name in group) for group in groups])
    names = [group[0] for group in groups]  # a column may leave some layers untouched
    bits = np.array([min(float(fitted[n, c].code_bits) for n in names) for c in columns])
    problem = Problem(
        groups,
        columns,
        loss,
        size,
        _limit(budget, inventory, choices, float(weights.sum())) - overhead,
        bits,
        weights,
        tuple(layers[group[0]].block for group in groups),
        "code bits" if coded else "bytes",
        choices.allowed,
    )
    smallest = float(np.where(problem.free, size, np.inf).min(1).sum())
    if not problem.fits(np.where(problem.free, size, np.inf).argmin(1)):
        raise BudgetError(_too_small(budget, problem, smallest))
    return problem


def _limit(budget: Budget, inventory: Inventory, choices: Choices, weights: float) -> float:
    if budget.code_bits is not None:
        return budget.code_bits * weights
    if budget.bits is not None:
        return budget.bits * weights / 8
    return parse_size(str(budget.size)) - _constant_bytes(inventory, choices)


def _constant_bytes(inventory: Inventory, choices: Choices) -> int:
    """Bytes of a file that don't depend on the assignment: what is out of scope, and the largest
    header that any assignment can have (headers differ by some bytes)."""
    headers, outside = [], 0
    inside = sum(layer.bytes(UNTOUCHED) for layer in choices.scope)
    for column in choices.columns:
        choice = {x.name: choices.fitted[x.name, column] for x in choices.scope}
        stored = stored_bytes(inventory, choice)
        headers.append(stored["container"])
    outside = stored_bytes(inventory, {})["untouched"] - inside
    slack = 4 * len(choices.scope)  # offsets may need more digits than in any uniform plan
    return max(headers) + slack + outside


def _too_small(budget: Budget, problem: Problem, smallest: float) -> str:
    over = smallest - problem.limit
    if budget.size is not None:
        least = parse_size(budget.size) + over
        value = f"{budget.text}; the smallest plan takes {int(np.ceil(least))} bytes"
        remedy = f"budget.size={int(np.ceil(least))}"
    else:
        key = "code_bits" if budget.code_bits is not None else "bits"
        factor = 1 if key == "code_bits" else 8
        least = np.ceil(1e4 * factor * smallest / problem.weights.sum()) / 1e4
        value = f"{budget.text}; the smallest plan has {least:g}"
        remedy = f"budget.{key}={least:g}"
    lowest = f"{problem.columns[int(problem.order[0])]}, the smallest of the palette"
    if not problem.free.all():
        lowest = "the smallest precision that the policy and its pins allow"
    return (
        f"A plan must fit its budget. The budget is {value}, with every layer in scope at {lowest}"
        f". Set {remedy} or more, add lower precisions to palette.bits, "
        "or widen scope."
    )
