"""From the table's optimum to the plan whose *measured* loss is lowest.

Each trial is a plan that fits the budget, measured on the search windows, one after the other, so
that a hopeless one stops early. `moves` proposes exchanges around the best plan from slopes of the
loss there and at earlier best plans; see `_slope_is_due` for when one is taken. The final choice is
confirmed on windows that pruned nothing, and it is never worse there than the table's optimum.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.errors import ConfigError
from optimizer.metrics.objective import Objective
from optimizer.plan import digest
from optimizer.quantization.methods import bind
from optimizer.search import Problem, Search, starts
from optimizer.search.surrogate import Seen, Slope, believe
from optimizer.sensitivity import Task
from optimizer.stages import studies
from optimizer.stages.baselines import tensor_bytes
from optimizer.stages.beside import Beside
from optimizer.stages.objective import own_head
from optimizer.stages.prepared import Prepared
from optimizer.stages.session import Session
from optimizer.stages.trials import history, shown, volume

if TYPE_CHECKING:
    from optimizer.models.model import Rounding
    from optimizer.search.study import Study, Tried
    from optimizer.stages.prefix import Prefix

SLOPE_VERSION = 4  # raised when slopes change
SLOPE_WINDOWS = 16
KEPT = 8  # slopes that proposals are drawn from
POLL = 1.0  # seconds
EXHAUSTED = 60  # trials in a row that repeat plans: there is nothing left to measure
FRESH, STALE = 2, 6  # trials until the slope is taken again: with a new best plan, without one


@dataclass(frozen=True)
class Refined:
    """assignment: the chosen plan [G]. history: one row per trial. confirmed: mean loss on the
    confirmation windows of the start and of the choice. front: of search.front, plans of other
    sizes that none beats in all objectives on the search windows. pictures: see `search.pictures`."""

    assignment: np.ndarray
    history: list[dict[str, float]]
    confirmed: dict[str, float]
    spent: int
    front: tuple[np.ndarray, ...] = ()
    pictures: dict[str, bytes] = field(default_factory=dict)


def refine(prepared: Prepared, problem: Problem, start: np.ndarray, journal: Path) -> Refined:
    """Search until `search.tokens` evaluated tokens are spent. Resumes from its storage."""
    from optimizer.search.credentials import masked
    from optimizer.search.study import Study

    session, config, space = prepared.session, prepared.config, prepared.space
    settings = config.search
    windows = session.windows("search")
    length, foretold = windows.ids.shape[1], problem.losses(start)
    used = studies.tried_on(settings, len(windows.ids), length, foretold)
    if used < studies.FEWEST:
        raise ConfigError(
            f"A search needs at least {2 * studies.FEWEST} search windows, of which some confirm the "
            f"choice; data.search.sequences is {len(windows.ids)}. Raise it, or take search=exact."
        )
    if used < studies.affordable(settings, length, foretold):
        session.view.note(
            f"{settings.tokens} tokens would allow trials on more than {used} windows, which overfit "
            f"less: data.search.sequences={2 * len(windows.ids)} gives the search more text"
        )
    settings = replace(settings, first=min(settings.first, used))
    beside = Beside(session, config, space, used)
    name = studies.name(session, config, problem, beside, used)
    where = masked(settings.storage) if settings.storage else str(journal)
    session.view.note(f"trials are kept in {where}; optuna-dashboard shows them live")
    with studies.in_turn(session, settings, journal.with_name(name)):
        study = Study.open(settings, problem, name, journal, config.seed, session.view.note)
        quantizer = bind(config.quantizer, session)
        quantizer.prepare(space.offered)  # all codes, while the model holds its own weights
        with session.model.rounded(quantizer) as rounding:
            scout = Scout(prepared, problem, study, rounding, beside)
            scout.aim(start)
            scout.seed(start)
            scout.tell()
            _search(session, settings, study, scout)
            scout.settle()
        return scout.confirm(start)


def _search(session: Session, settings: Search, study: Study, scout: Scout) -> None:
    begun, before = time.monotonic(), study.spent
    with session.view.meter("search", settings.tokens) as show:
        while not _over(settings, study, begun):
            scout.step()
            scout.tell()
            spent = study.spent
            rate = (spent - before) / (time.monotonic() - begun)
            show(spent, f"{scout.news}  {spent} tokens, {rate:.0f}/s")


def _over(settings: Search, study: Study, begun: float) -> bool:
    """Whether tokens, trials or time are spent, or nothing new is proposed any more."""
    if settings.trials is not None and len(study.tried()) >= settings.trials:
        return True
    last = study.tried()[-EXHAUSTED:]
    if len(last) == EXHAUSTED and not any(tried.tokens for tried in last):
        return True
    late = settings.seconds is not None and time.monotonic() - begun >= settings.seconds
    return late or study.spent >= settings.tokens


class Scout:
    """One worker's side of a study. Everything that decides the next proposal is derived from the
    study and the store, so that a killed search goes on as if nothing had happened."""

    def __init__(
        self,
        prepared: Prepared,
        problem: Problem,
        study: Study,
        rounding: Rounding,
        beside: Beside,
    ) -> None:
        from optimizer.metrics.divergence import teacher
        from optimizer.stages.prefix import Shortcut

        session, config, space = prepared.session, prepared.config, prepared.space
        self.session, self.config, self.space = session, config, space
        self.problem, self.study, self.used = problem, study, beside.used
        self.quantizer, self.rounding = bind(config.quantizer, session), rounding
        self.task = Task(space.groups, space.columns, space.fitted, self.quantizer)
        self.teacher = teacher(session.model, session.windows("search"), own_head(session, space))
        self.shortcut = Shortcut(session.model, self.teacher)
        self.prefix: Prefix | None = None
        self.beside = beside
        self.length = session.windows("search").ids.shape[1] + beside.tokens
        self.slopes: list[Slope] = []
        self.taken: list[int] = []  # finished trials when each slope was taken
        self.seen = 0  # finished trials after which slopes were looked for
        self.told = 0  # trials that a person, or a record, was shown
        self.fallback = problem.largest
        self.roles = [session.model.layers[group[0]].role for group in space.groups]

    def aim(self, start: np.ndarray) -> None:
        """Fix what J depends on at the start: the quantile of its token losses, and its worst
        domain."""
        meaning = self.config.meaning
        if not (meaning.cvar or meaning.domain):
            return
        key = digest(["threshold", self.study.inner.study_name])

        def make() -> dict[str, np.ndarray]:
            import torch

            self._set(start)
            with torch.inference_mode():
                each = (
                    self.teacher.divergence(self.session.model.net, w) for w in range(self.used)
                )
                found = np.concatenate([losses.cpu().numpy() for losses in each])
                domain = self.beside.choose()
            threshold = np.quantile(found, meaning.level)
            return {"threshold": threshold, "domain": np.array(domain)}

        found = self.session.store.arrays("thresholds", key, make)
        assert found is not None
        self.study.spend(self.used * self.length, key)
        self.teacher.objective = Objective(
            meaning.cvar, meaning.level, float(found["threshold"].item())
        )
        self.beside.aim(int(found["domain"].item()))

    def losses(self, windows: range) -> Callable[[np.ndarray], Iterator[tuple[int, float]]]:
        from optimizer.stages.prefix import Prefix

        def measure(assignment: np.ndarray) -> Iterator[tuple[int, float]]:
            self._set(assignment)
            own = Prefix(self.space.choice(assignment))
            total = 0.0
            for some in self._groups(windows):
                found = self.shortcut.windows(some, self.prefix, own, self.beside.loss)
                for window, loss in zip(some, found, strict=True):
                    total += loss
                    if window == windows[-1] and self._leads(total / len(windows), windows):
                        self.prefix = own
                    yield window, loss

        return measure

    def _groups(self, windows: range) -> Iterator[range]:
        """Windows that are measured before a trial may be stopped: each by itself in memory. Blocks on
        disk are read once for a group; the first has as many as a stop needs, each other one as
        many as were measured before."""
        from optimizer.models.offload import offloaded

        alone, start = offloaded(self.session.model.net) is None, windows.start
        while start < windows.stop:
            size = 1 if alone else max(start - windows.start, self.config.search.first)
            yield range(start, min(start + size, windows.stop))
            start += size

    def _set(self, assignment: np.ndarray) -> None:
        """Change the layers in which the model differs from this plan, and no others."""
        self.rounding.set(self.space.choice(assignment))

    def _leads(self, loss: float, windows: range) -> bool:
        best = self.study.best
        return windows.start == 0 and (best is None or loss < best.loss)

    def run(self, suggest: Callable[[Any], np.ndarray], before: int = 0) -> Tried:
        """One trial on the first `used` search windows. before: tokens of its slope."""
        return self.study.run(suggest, self.losses(range(self.used)), self.length, before)

    def seed(self, start: np.ndarray) -> None:
        """Measure the plans that the study starts from."""
        from optimizer.search import spaces

        search = self.config.search
        if search.space == "directions":
            self._take_slope(0, start)
        slope = self.slopes[0] if self.slopes else None
        first = spaces.starts_of(
            search.space, self.problem, self.roles, start, search.front, slope
        )
        self.fallback, self.seen = start, len(first)
        if self.study.shared:
            self.study.begin(first)
            for _ in self.session.view.track(range(self.study.waiting), "search: first plans"):
                if self.study.waiting:
                    paid = self._slope_tokens if self._slope_is_unpaid else 0
                    self.run(self._starting(), paid)
            while self.study.best is None:  # another worker measures the last of them
                time.sleep(POLL)
            return
        missing = self.study.missing(first)
        for plan in self.session.view.track(missing, "search: first plans") if missing else ():
            self.study.begin([plan])
            self.run(self._starting(), self._slope_tokens if self._slope_is_unpaid else 0)

    def tell(self) -> None:
        """Show the trials that ended since the last time, of all workers."""
        tried = self.study.tried()  # once: other workers end trials meanwhile
        rows = history(self.study, self.told, tried)
        for row, one in zip(rows, tried[self.told :], strict=True):
            size = tensor_bytes(self.session.inventory, self.space.choice(one.assignment))
            self.session.view.row("trial", row | {"bytes": size})
        self.told = len(tried)

    @property
    def news(self) -> str:
        best = f"best {self.leader.loss:.4f}"
        if not self.config.search.front:
            return best
        return f"{best}  hypervolume {volume(self.study, self.study.finished):.4f}"

    def _starting(self) -> Callable[[Any], np.ndarray]:
        """For plans that the study starts from. Where another worker took the last of them in this
        very moment, `moves` repeats the first."""
        from optimizer.search import spaces

        if self.config.search.space != "moves":
            return self._decoded()
        tried = self.study.tried()
        return spaces.given(self.problem, tried[0].assignment if tried else self.fallback)

    def _decoded(self) -> Callable[[Any], np.ndarray]:
        """A space whose parameters alone say which plan is meant."""
        from optimizer.search import spaces

        def space(problem: Problem, toll: np.ndarray | float = 0.0) -> Callable[[Any], np.ndarray]:
            if self.config.search.space == "layers":
                return spaces.layers(problem, toll)
            if self.config.search.space == "directions":
                return spaces.directions(problem, self.slopes[0])
            return spaces.multipliers(problem, self.roles, toll)

        if self.config.search.front:
            return spaces.sized(space, self.problem, starts.span(self.problem))
        return space(self.problem)

    def step(self) -> None:
        """One proposal in the chosen space."""
        from optimizer.search import spaces

        if self.config.search.space != "moves":
            self.run(self._decoded())
            return
        taken = self._take_due_slopes()
        best, count = self.leader.assignment, len(self.study.tried())
        belief = believe(self.problem, best, self.slopes[-KEPT:], self._seen(best))
        self.run(
            spaces.moves(self.problem, best, belief, count), self._slope_tokens if taken else 0
        )

    @property
    def leader(self) -> Tried:
        best = self.study.best
        assert best is not None  # seed() saw to it
        return best

    def _take_due_slopes(self) -> bool:
        """Whether the next trial is the first to use one. Those that were due after each trial since
        the last look: one at most while the search runs, all of its past ones, from the store, when a
        killed search goes on. Of a shared study's past only the last trial counts: other workers have
        slopes of their own."""
        tried = self.study.tried()
        first = len(tried) if self.study.shared else self.seen
        for count in range(first, len(tried) + 1):
            best = self.study.best_of(tried[:count])
            if best is not None and self._slope_is_due(count, best.assignment):
                self._take_slope(count, best.assignment)
        self.seen = len(tried) + 1
        return bool(self.taken) and self.taken[-1] == len(tried)

    @property
    def _slope_is_unpaid(self) -> bool:
        """Of a space that begins with a slope: the first trial pays for it."""
        return bool(self.slopes) and not self.study.tried()

    def _slope_is_due(self, count: int, best: np.ndarray) -> bool:
        if not self.slopes:
            return True
        moved = not np.array_equal(self.slopes[-1].at, best)
        return count - self.taken[-1] >= (FRESH if moved else STALE)

    @property
    def _slope_half(self) -> int:
        """Windows of one half of a slope."""
        return min(SLOPE_WINDOWS, self.used) // 2

    @property
    def _slope_tokens(self) -> int:
        """A backward pass counts as two more forward passes."""
        return 3 * 2 * self._slope_half * self.length

    def _take_slope(self, count: int, best: np.ndarray) -> None:
        """On text that no trial reads, too, where there is some. Kept in the store under what it
        depends on: a resumed search takes it from there."""
        from optimizer.sensitivity.slope import slopes

        number = len(self.slopes)
        half = self._slope_half
        rng = np.random.default_rng([self.config.seed, 9, number])
        picked = rng.choice(self.beside.rest.start, 2 * half, replace=False).reshape(2, -1)
        parts = [picked[0], picked[1]]
        key = digest([SLOPE_VERSION, self.study.inner.study_name, number, best.tolist()])

        def make() -> dict[str, np.ndarray]:
            self._set(best)
            return {
                "halves": slopes(
                    self.session.model, self.task, self.teacher, parts, self.beside.live
                )
            }

        found = self.session.store.arrays("slopes", key, make)
        assert found is not None
        self.slopes.append(Slope(best, found["halves"]))
        self.taken.append(count)

    def _seen(self, best: np.ndarray) -> list[Seen]:
        """All measured plans against the best, on the windows that both were measured on."""
        leader, found = self.leader.each, []
        for tried in self.study.tried():
            gap = tried.each - leader[: len(tried.each)]
            if len(gap) > 1 and not np.array_equal(tried.assignment, best):
                error = float(gap.std(ddof=1) / np.sqrt(len(gap)))
                found.append(Seen(tried.assignment, float(gap.mean()), error))
        return found

    def settle(self) -> None:
        """Let the trials that other workers have under way end, so that all choose from the same
        ones. Those whose worker dies meanwhile are run here: none is lost."""
        if not self.study.shared:
            return
        under_way = self.study.running
        if under_way:
            self.session.view.note(f"waiting for {len(under_way)} trials of other workers")
            self.study.beat_for(under_way.values())
        while under_way.keys() & self.study.running.keys():
            time.sleep(POLL)
            self.study.revive()
        while self.study.waiting:
            self.step()

    def confirm(self, start: np.ndarray) -> Refined:
        """Measure the best few on windows that no trial used, rounded as they would be packed; the
        start is always among them, so the choice is never worse than it there. The model must hold
        its own weights."""
        finalists = {start.tobytes(): start}
        fitting = [t for t in self.study.finished if self.problem.fits(t.assignment)]
        for tried in sorted(fitting, key=lambda t: t.loss)[:3]:
            finalists[tried.assignment.tobytes()] = tried.assignment
        plans = self.session.view.track(list(finalists.items()), "search: the best as packed")
        found = {key: self._as_packed(assignment) for key, assignment in plans}
        from optimizer.search import pictures

        winner = min(found, key=lambda key: found[key])
        return Refined(
            finalists[winner],
            history(self.study),
            {"start": found[start.tobytes()], "choice": found[winner]},
            self.study.spent + len(finalists) * len(self.beside.rest) * self.length,
            shown(self.study),
            pictures.draw(self.study.inner),
        )

    def _as_packed(self, assignment: np.ndarray) -> float:
        """Mean loss on the confirmation windows. Trials share codes of layers that are rounded by
        themselves; here they are rounded jointly where the quantizer does that."""
        from optimizer.stages.prefix import Prefix

        choice = self.space.choice(assignment)
        rounder, own = self.quantizer.rounder(choice), Prefix(choice)
        with self.session.model.rounded(rounder, choice):
            losses = self.shortcut.windows(self.beside.rest, None, own, self.beside.loss)
        return float(np.mean(losses))
