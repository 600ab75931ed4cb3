"""From the table's optimum to the plan whose *measured* loss is lowest.

Each trial is a plan that fits the budget, measured on the search windows, one after the other, so
that a hopeless one stops early. `moves` proposes exchanges around the best plan from the slope of
the loss there; the slope is taken anew whenever the best plan changes. The final choice is
confirmed on windows that pruned nothing, and it is never worse there than the table's optimum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.bench import Bench, Choices, make_quantizer
from optimizer.config import Optimize
from optimizer.errors import ConfigError
from optimizer.plan import digest
from optimizer.search import Problem, exact
from optimizer.sensitivity import Table, Task

if TYPE_CHECKING:
    from optimizer.search.study import Study, Tried

LOW_BIT_FACTORS = (1.5, 2.0, 3.0, 5.0)
SLOPE_WINDOWS = 16
MEMORY = 0.6  # of older slopes, taken at earlier best plans; never compared with other values
POLL = 1.0  # seconds
FEWEST = 2  # windows on which trials are measured
STALE = 6  # trials without progress, then the slope is taken again on other windows


@dataclass(frozen=True)
class Refined:
    """assignment: the chosen plan [G]. history: one row per trial. confirmed: mean loss on the
    confirmation windows of the start and of the choice."""

    assignment: np.ndarray
    history: list[dict[str, float]]
    confirmed: dict[str, float]
    spent: int


def refine(
    bench: Bench,
    config: Optimize,
    chosen: Choices,
    table: Table,
    problem: Problem,
    start: np.ndarray,
    journal: Path,
) -> Refined:
    """Search until `search.tokens` evaluated tokens are spent. Resumes from its storage."""
    from optimizer.search.study import Study

    settings = config.search
    windows = bench.windows("search")
    half = len(windows.ids) // 2
    if half < FEWEST:
        raise ConfigError(
            f"A search needs at least {2 * FEWEST} search windows, of which half confirm the choice; "
            f"data.search.sequences is {len(windows.ids)}. Raise it, or take search=exact."
        )
    settings = replace(settings, first=min(settings.first, half))
    name = _name(bench, config, problem)
    study = Study.open(settings, problem, name, journal, config.seed)
    scout = Scout(bench, config, chosen, table, problem, study, half)
    scout.seed(start)
    begun, before = time.monotonic(), study.spent
    with bench.view.meter("search", settings.tokens) as show:
        while study.spent < settings.tokens:
            scout.step()
            spent = study.spent
            rate = (spent - before) / (time.monotonic() - begun)
            show(spent, f"best {scout.leader.loss:.4f}  {spent} tokens, {rate:.0f}/s")
    return scout.confirm(start)


def _name(bench: Bench, config: Optimize, problem: Problem) -> str:
    """The study's name: everything that two workers must agree on to share their trials."""
    content = [
        bench.part_key("calibration"), bench.part_key("search"),
        make_quantizer(config.quantizer, bench).key,
        problem.groups, problem.columns, problem.limit, problem.unit, problem.free.tolist(),
        config.search.space, config.seed,
    ]  # fmt: skip
    return f"mezzotint-{config.search.space}-{digest(content)[:24]}"


class Scout:
    """One worker's side of a study."""

    def __init__(
        self,
        bench: Bench,
        config: Optimize,
        chosen: Choices,
        table: Table,
        problem: Problem,
        study: Study,
        half: int,
    ) -> None:
        from optimizer.meaning import Teacher

        self.bench, self.config, self.chosen = bench, config, chosen
        self.table, self.problem, self.study, self.half = table, problem, study, half
        self.quantizer = make_quantizer(config.quantizer, bench)
        self.task = Task(chosen.groups, chosen.columns, chosen.fitted, self.quantizer)
        self.teacher = Teacher(bench.model.net, bench.windows("search"), own_head=True)
        self.length = bench.windows("search").ids.shape[1]
        self.rng = np.random.default_rng([config.seed, 9])
        self.slope: np.ndarray | None = None
        self.at: np.ndarray | None = None
        self.idle = 0
        self.fallback = problem.largest
        self.roles = [bench.model.layers[group[0]].role for group in chosen.groups]

    def losses(self, windows: range) -> Callable[[np.ndarray], Iterator[tuple[int, float]]]:
        def measure(assignment: np.ndarray) -> Iterator[tuple[int, float]]:
            model = self.bench.model
            choice = self.chosen.choice(assignment)
            rounder = self.quantizer.rounder(choice, joint=False)
            with model.rounded(rounder, choice):
                for window in windows:
                    yield window, self.teacher.window(model.net, window)

        return measure

    def run(self, suggest: Callable[[Any], np.ndarray]) -> Tried:
        """One trial on the first half of the search windows."""
        return self.study.run(suggest, self.losses(range(self.half)), self.length)

    def seed(self, start: np.ndarray) -> None:
        """The plans that the study starts from: the table's optimum, the same with the lowest
        bits made dearer (where the second order ends, the table is too kind to them), and the
        largest uniform plan that fits."""
        starts = [start]
        lowest = int(self.problem.order[0])
        for factor in LOW_BIT_FACTORS:
            loss = self.problem.loss.copy()
            loss[:, lowest] *= factor
            starts.append(exact.solve(replace(self.problem, loss=loss)))
        uniform = [self.problem.uniform(c) for c in range(len(self.problem.columns))]
        fitting = [u for u in uniform if self.problem.fits(u) and self.problem.allows(u)]
        starts += [max(fitting, key=self.problem.sizes)] if fitting else []
        self.fallback = start
        self.study.begin(starts)
        for _ in self.bench.view.track(range(self.study.waiting), "search: first plans"):
            if self.study.waiting:
                self.run(self._nothing)
        while self.study.best is None:  # another worker measures the last of them
            time.sleep(POLL)

    def _nothing(self, _trial: Any) -> np.ndarray:
        """Another worker took the last queued plan in this very moment: repeat the first."""
        return self.study.tried()[0].assignment if self.study.tried() else self.fallback

    def step(self) -> None:
        """One proposal in the chosen space."""
        from optimizer.search import study

        space = self.config.search.space
        if space == "layers":
            self.run(study.layers(self.problem))
            return
        if space == "multipliers":
            self.run(study.multipliers(self.problem, self.roles))
            return
        leader = self.leader
        best = leader.assignment
        if self.at is None or not np.array_equal(self.at, best) or self.idle >= STALE:
            self._take_slope(best)
        self.run(study.moves(self.problem, best, self._local))
        self.idle = 0 if self.leader.loss < leader.loss else self.idle + 1

    @property
    def leader(self) -> Tried:
        best = self.study.best
        assert best is not None  # seed() saw to it
        return best

    def _take_slope(self, best: np.ndarray) -> None:
        from optimizer.sensitivity.slope import slopes

        count = min(SLOPE_WINDOWS, self.half)
        picked = self.rng.choice(self.half, count, replace=False)
        choice = self.chosen.choice(best)
        fresh = slopes(self.bench.model, self.task, self.teacher, picked, choice)
        old = self.slope
        self.slope = fresh if old is None else MEMORY * old + (1 - MEMORY) * fresh
        self.at, self.idle = best, 0
        self.study.spend(3 * count * self.length)

    def _local(self, trust: float, stiff: float) -> np.ndarray:
        """Expected change of the loss around the best plan [G, P]; see sensitivity.slope."""
        assert self.slope is not None and self.at is not None
        rows = np.arange(len(self.at))
        first = self.slope - self.slope[rows, self.at][:, None]
        loss = self.table.loss
        own = loss[rows, self.at][:, None]
        cross = first + 2 * own  # what the additive table doesn't know
        change = loss - own + trust * cross + (stiff - 1) * (loss + own)
        change[rows, self.at] = 0
        return np.asarray(change)

    def confirm(self, start: np.ndarray) -> Refined:
        """Measure the best few on the other half of the windows; the start is always among
        them, so the choice is never worse than it there."""
        finalists = {start.tobytes(): start}
        complete = sorted((t for t in self.study.tried() if t.complete), key=lambda t: t.loss)
        for tried in complete[:3]:
            finalists[tried.assignment.tobytes()] = tried.assignment
        rest = range(self.half, len(self.teacher.windows.ids))
        found = {
            key: float(np.mean([loss for _, loss in self.losses(rest)(assignment)]))
            for key, assignment in finalists.items()
        }
        winner = min(found, key=lambda key: found[key])
        history, spent, best = [], 0, np.inf
        for tried in self.study.tried():
            spent += tried.tokens
            best = min(best, tried.loss if tried.complete else np.inf)
            history.append({"tokens": spent, "loss": tried.loss, "best": best})
        return Refined(
            finalists[winner],
            history,
            {"start": found[start.tobytes()], "choice": found[winner]},
            self.study.spent + len(finalists) * len(rest) * self.length,
        )
