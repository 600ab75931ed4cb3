"""Optuna over plans: the ask-and-tell loop. Only the files of this folder import optuna.

A trial is a plan. A space turns a trial's parameters into an assignment [G] that fits the budget;
the caller measures it and tells. Every trial keeps its assignment and its evaluated tokens, so a
killed study goes on from its storage, and any number of workers can share one.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import NopPruner, WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState

from optimizer.errors import StorageError
from optimizer.search import Problem, Search, samplers
from optimizer.search.pareto import nondominated
from optimizer.search.samplers import sampler as _sampler
from optimizer.search.spaces import Start
from optimizer.search.storage import has_heartbeat, mend, open_storage

OUTSIDE = "tokens outside trials "
KNOWN = "Heartbeat of storage is supposed"  # to be used with Study.optimize; here `_beat` does it


@dataclass(frozen=True)
class Tried:
    """A measured plan: mean loss over the windows that it was measured on. tokens: evaluated for it;
    before: those of the slopes that its proposal was the first to use."""

    assignment: np.ndarray
    loss: float
    windows: int
    tokens: int
    complete: bool
    each: np.ndarray = field(default_factory=lambda: np.zeros(0))  # per window, in their order
    before: int = 0


def _silent(_text: str) -> None:
    """Who gives no `tell` isn't told."""


@dataclass
class Study:
    """Ask for plans, tell their losses. One per model, palette, tokens, budget, space and sampler
    (its name). tell: hears of damage, and of optuna's warnings, each once."""

    inner: optuna.Study
    problem: Problem
    search: Search
    seed: int
    tell: Callable[[str], None] = _silent
    _cache: dict[int, Tried] = field(default_factory=dict)
    _heard: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls,
        search: Search,
        problem: Problem,
        name: str,
        default: Path,
        seed: int,
        tell: Callable[[str], None] = _silent,
    ) -> Study:
        """Create, or go on. name: the content key, so that a study is never mixed with another
        model's. default: the journal file used where search.storage is not given, by one process at
        a time: a trial that is under way there was left by a dead one."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        optuna.logging.disable_default_handler()  # its warnings are told, see _listening
        logging.getLogger("sqlalchemy").setLevel(logging.ERROR)
        if search.storage is None and mend(default):
            tell(f"{default} is damaged; its trials from there on are made again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            inner = optuna.create_study(
                study_name=name,
                storage=open_storage(search.storage, default, search.heartbeat),
                pruner=WilcoxonPruner(p_threshold=search.prune, n_startup_steps=search.first)
                if search.prune and not search.front
                else NopPruner(),
                directions=["minimize"] * _objectives(search),
                load_if_exists=True,
            )
        study = cls(inner, problem, search, seed, tell)
        if not study.shared:
            for number in study.running:
                inner.tell(number, state=TrialState.FAIL)
        return study

    def tried(self) -> list[Tried]:
        """All finished trials, of all workers, in order. Raises StorageError for one that isn't
        this program's."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        for trial in self.inner.get_trials(deepcopy=False, states=states):
            if trial.number not in self._cache:
                self._cache[trial.number] = self._read(trial)
        return [self._cache[number] for number in sorted(self._cache)]

    def _read(self, trial: FrozenTrial) -> Tried:
        groups, columns = self.problem.loss.shape
        try:
            found = trial.user_attrs
            tried = Tried(
                np.array(_plan(found["assignment"], groups, columns)),
                float(found["loss"]),
                int(found["windows"]),
                int(found["tokens"]),
                bool(found["complete"]),
                np.array(json.loads(found["each"]), dtype=float),
                int(found["before"]),
            )
            counted = tried.windows == len(tried.each) > 0 <= min(tried.tokens, tried.before)
            if not (counted and np.isfinite([tried.loss, *tried.each]).all()):
                raise ValueError("its numbers don't go together")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StorageError(
                f"Trial {trial.number} of the study {self.inner.study_name} isn't as this program "
                f"writes it ({type(error).__name__}: {error}). Take another search.storage or store."
            ) from None
        return tried

    @property
    def spent(self) -> int:
        """Evaluated tokens of all workers."""
        extra = self.inner.user_attrs
        outside = sum(int(v) for k, v in extra.items() if k.startswith(OUTSIDE))
        return outside + sum(t.tokens + t.before for t in self.tried())

    def spend(self, tokens: int, key: str) -> None:
        """Count tokens that were evaluated outside trials; the same key counts once."""
        if f"{OUTSIDE}{key}" not in self.inner.user_attrs:
            self.inner.set_user_attr(f"{OUTSIDE}{key}", tokens)

    @property
    def best(self) -> Tried | None:
        """The lowest loss among trials within the budget that were not stopped early."""
        return self.best_of(self.tried())

    def best_of(self, trials: Sequence[Tried]) -> Tried | None:
        fitting = (t for t in trials if t.complete and self.problem.fits(t.assignment))
        return min(fitting, key=_loss, default=None)

    @property
    def repeating(self) -> bool:
        """Whether half of the last trials only repeated plans: the sampler has closed in on what it
        knows, though tokens are left. Proposals of `moves` change by themselves."""
        if self.search.space == "moves":
            return False
        last = self.tried()[-samplers.RECENT :]
        return 2 * sum(not tried.tokens for tried in last) >= samplers.RECENT

    @property
    def finished(self) -> list[Tried]:
        """Trials that were measured on all windows."""
        return [tried for tried in self.tried() if tried.complete]

    @property
    def started(self) -> list[Tried]:
        """The finished ones among the plans that the study began with."""
        done = self.inner.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self.tried()
        first = [self._cache[t.number] for t in done if "start" in t.user_attrs]
        return [tried for tried in first if tried.complete]

    def front(self, trials: Sequence[Tried]) -> list[Tried]:
        """Those that none beats in all objectives, from the smallest up."""
        points = self.points(trials)
        kept = np.flatnonzero(nondominated(points))
        return [trials[i] for i in kept[np.argsort(points[kept, 0])]]

    def points(self, trials: Sequence[Tried]) -> np.ndarray:
        """(size, loss) or (size, loss, third objective) [N, 2 or 3]."""
        found = [self._values(t.assignment, t.loss) for t in trials]
        return np.array(found).reshape(-1, 2 if self.problem.third is None else 3)

    def _values(self, assignment: np.ndarray, loss: float) -> list[float]:
        third = self.problem.third
        own = [] if third is None else [third.of(assignment)]
        return [self.problem.sizes(assignment), loss, *own]

    def begin(self, starts: Sequence[Start]) -> None:
        """Queue the plans that a study starts from, and those again whose worker died."""
        there = [
            trial.user_attrs["start"]
            for trial in self.inner.get_trials(deepcopy=False)
            if "start" in trial.user_attrs and trial.state != TrialState.FAIL
        ]
        for start in starts:
            if start.told not in there:
                there.append(start.told)
                self.inner.enqueue_trial(start.params, user_attrs={"start": start.told})

    @property
    def shared(self) -> bool:
        """Whether workers beat on the storage, so that dead ones are known. On a journal there is
        one worker, and a trial that is running was left by a dead one."""
        return has_heartbeat(self.inner._storage)

    def missing(self, starts: Sequence[Start]) -> list[Start]:
        """Those that aren't measured yet."""
        done = [
            trial.user_attrs.get("start")
            for trial in self.inner.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ]
        return [start for start in starts if start.told not in done]

    @property
    def waiting(self) -> int:
        states = (TrialState.WAITING,)
        return len(self.inner.get_trials(deepcopy=False, states=states))

    @property
    def running(self) -> dict[int, int]:
        """Trials under way, of all workers, those of dead ones too until they are revived: their
        ids in the storage by number."""
        found = self.inner.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return {trial.number: trial._trial_id for trial in found}

    def beat_for(self, trials: Iterable[int]) -> None:
        """A heartbeat for others' trials (ids): one whose worker died before its first beat would
        otherwise never be found dead."""
        storage: Any = self.inner._storage
        for trial in trials:
            storage.record_heartbeat(trial)

    def run(
        self,
        suggest: Callable[[optuna.Trial], np.ndarray],
        losses: Callable[[np.ndarray], Iterator[tuple[int, float]]],
        window_tokens: int,
        before: int = 0,
    ) -> Tried:
        """One trial. losses yields (window, loss) one window after the other; the trial is
        stopped as soon as Wilcoxon's signed-rank test against the best says that it is worse.
        before: tokens of slopes that this proposal is the first to use."""
        self.revive()
        done = len(self.tried())  # the same trials so far, the same next one: also after a kill
        kind = "random" if self.repeating else self.search.sampler
        self.inner.sampler = _sampler(
            kind, self.seed + 1000 * done + 17 * self.search.worker, self.shared
        )
        with self._listening():
            trial = self.inner.ask()
            self._beat(trial)
            chosen = self._chosen(trial, suggest)
        known = next((t for t in self.tried() if np.array_equal(t.assignment, chosen)), None)
        if known is not None:  # a repeated proposal costs nothing and teaches the sampler
            tried = Tried(chosen, known.loss, known.windows, 0, known.complete, known.each, before)
        else:
            seen, whole = self._measure(trial, losses(chosen))
            cost = len(seen) * window_tokens
            tried = Tried(
                chosen, float(np.mean(seen)), len(seen), cost, whole, np.array(seen), before
            )
        self._finish(trial, tried)
        return tried

    def _chosen(
        self, trial: optuna.Trial, suggest: Callable[[optuna.Trial], np.ndarray]
    ) -> np.ndarray:
        """The trial's plan: what its parameters decode to, or the one that it was queued with."""
        decoded = suggest(trial)  # gives the trial its parameters in either case
        _, plan = trial.user_attrs.get("start", (None, None))
        if plan is None:
            return decoded
        try:
            return np.array(_plan(json.dumps(plan), *self.problem.loss.shape))
        except (TypeError, ValueError) as error:
            raise StorageError(
                f"Trial {trial.number} of the study {self.inner.study_name} was queued with a plan "
                f"of another program ({error}). Take another search.storage or store."
            ) from None

    def _measure(
        self, trial: optuna.Trial, losses: Iterator[tuple[int, float]]
    ) -> tuple[list[float], bool]:
        """Losses by window, and whether these are all windows."""
        seen: list[float] = []
        for window, loss in losses:
            seen.append(loss)
            self._beat(trial)
            if self.search.front:
                continue  # optuna prunes studies of one objective only
            trial.report(loss, window)
            with self._listening():
                if trial.should_prune():
                    return seen, False
        return seen, True

    def _finish(self, trial: optuna.Trial, tried: Tried) -> None:
        for key, value in (
            ("assignment", json.dumps(tried.assignment.tolist())),
            ("loss", tried.loss),
            ("windows", tried.windows),
            ("tokens", tried.tokens),
            ("before", tried.before),
            ("complete", tried.complete),
            ("each", json.dumps(tried.each.tolist())),
        ):
            trial.set_user_attr(key, value)
        loss = tried.loss if tried.complete else self._estimate(tried)
        values = self._values(tried.assignment, loss) if self.search.front else loss
        self.inner.tell(trial, values)

    def _estimate(self, tried: Tried) -> float:
        """Of a trial that was stopped: the best plan's loss and the mean difference on the windows
        that both were measured on. Samplers learn from it; without a value gp and cmaes would propose
        the same hopeless corner again."""
        best = self.best
        assert best is not None  # else nothing was stopped
        gap = tried.each - best.each[: len(tried.each)]
        return best.loss + max(float(gap.mean()), 0.0)

    def _beat(self, trial: optuna.Trial) -> None:
        """Tell the other workers that this one lives."""
        storage: Any = self.inner._storage
        if has_heartbeat(storage):
            storage.record_heartbeat(trial._trial_id)

    def revive(self) -> None:
        """Queue the trials of dead workers again: none is lost, and a failed one never counts."""
        if self.shared:
            with self._listening():
                optuna.storages.fail_stale_trials(self.inner)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Optuna's warnings reach the user, each once; but not that features used here on purpose are
        experimental."""
        handler = _Heard(self._hear)
        logger = logging.getLogger("optuna")
        level = logger.level
        logger.setLevel(min(level or logging.WARNING, logging.WARNING))
        for name in [n for n in logging.root.manager.loggerDict if f"{n}.".startswith("optuna.")]:
            logging.getLogger(name).disabled = False  # whoever configures logging silences them
        logger.addHandler(handler)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
            for warning in caught:
                if not issubclass(warning.category, ExperimentalWarning):
                    self._hear(str(warning.message))
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def _hear(self, text: str) -> None:
        line = " ".join(text.split())
        if line.startswith(KNOWN):
            return
        kind = "".join(c for c in line if not c.isdigit())
        if kind not in self._heard:
            self._heard.add(kind)
            self.tell(f"Optuna: {line}")


class _Heard(logging.Handler):
    def __init__(self, hear: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        self._hear(record.getMessage())


def _plan(text: str, groups: int, columns: int) -> list[int]:
    """Raises ValueError for what is no assignment."""
    found = json.loads(text)
    if not isinstance(found, list) or len(found) != groups:
        raise ValueError(f"a plan has {groups} groups")
    if not all(type(c) is int and 0 <= c < columns for c in found):
        raise ValueError(f"a plan's columns are 0 to {columns - 1}")
    return found


def _objectives(search: Search) -> int:
    return 1 + search.front + (search.third is not None)


def _loss(tried: Tried) -> float:
    return tried.loss
