"""Optuna over plans: spaces, samplers, storage, and the ask-and-tell loop. The only module that
imports optuna.

A trial is a plan. A space turns a trial's parameters into an assignment [G] that fits the budget;
the caller measures it and tells. Every trial keeps its assignment and its evaluated tokens, so a
killed study goes on from its storage, and any number of workers can share one.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import NopPruner, WilcoxonPruner
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState

from optimizer.errors import ConfigError, StorageError
from optimizer.search import Problem, Search, credentials, exact
from optimizer.search.pareto import nondominated
from optimizer.search.surrogate import Belief

OUTSIDE = "tokens outside trials "
BANDS = 5  # depth bands of `multipliers`
PULLS = (0.03, 30.0)  # weights of a third objective, see Problem.toll


@dataclass(frozen=True)
class Tried:
    """A measured plan: mean loss over the windows that it was measured on."""

    assignment: np.ndarray
    loss: float
    windows: int
    tokens: int
    complete: bool
    each: np.ndarray = field(default_factory=lambda: np.zeros(0))  # per window, in their order


@dataclass
class Study:
    """Ask for plans, tell their losses. One per model, palette, tokens and budget (its name)."""

    inner: optuna.Study
    problem: Problem
    search: Search
    seed: int
    _cache: dict[int, Tried] = field(default_factory=dict)

    @classmethod
    def open(cls, search: Search, problem: Problem, name: str, default: Path, seed: int) -> Study:
        """Create, or go on. name: the content key, so that a study is never mixed with another
        model's. default: the journal file used where search.storage is not given."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("sqlalchemy").setLevel(logging.ERROR)
        with _unwarned():
            inner = optuna.create_study(
                study_name=name,
                storage=open_storage(search.storage, default, search.heartbeat),
                pruner=WilcoxonPruner(p_threshold=search.prune, n_startup_steps=search.first)
                if search.prune and not search.front
                else NopPruner(),
                directions=["minimize"] * _objectives(search),
                load_if_exists=True,
            )
        return cls(inner, problem, search, seed)

    def tried(self) -> list[Tried]:
        """All finished trials, of all workers, in order."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        for trial in self.inner.get_trials(deepcopy=False, states=states):
            if trial.number not in self._cache and "assignment" in trial.user_attrs:
                self._cache[trial.number] = Tried(
                    np.array(json.loads(trial.user_attrs["assignment"]), dtype=np.int64),
                    float(trial.user_attrs["loss"]),
                    int(trial.user_attrs["windows"]),
                    int(trial.user_attrs["tokens"]),
                    trial.state == TrialState.COMPLETE,
                    np.array(json.loads(trial.user_attrs["each"])),
                )
        return [self._cache[number] for number in sorted(self._cache)]

    @property
    def spent(self) -> int:
        """Evaluated tokens of all workers."""
        extra = self.inner.user_attrs
        outside = sum(int(v) for k, v in extra.items() if k.startswith(OUTSIDE))
        return outside + sum(t.tokens for t in self.tried())

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
    def finished(self) -> list[Tried]:
        """Trials that were measured on all windows."""
        return [tried for tried in self.tried() if tried.complete]

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

    def begin(self, starts: Sequence[np.ndarray]) -> None:
        """Queue the plans that a shared study starts from, and those again whose worker died."""
        there = [
            trial.user_attrs["start"]
            for trial in self.inner.get_trials(deepcopy=False)
            if "start" in trial.user_attrs and trial.state != TrialState.FAIL
        ]
        for assignment in starts:
            if assignment.tolist() not in there:
                there.append(assignment.tolist())
                self.inner.enqueue_trial({}, user_attrs={"start": there[-1]})

    @property
    def shared(self) -> bool:
        """Whether workers beat on the storage, so that dead ones are known. On a journal there is
        one worker, and a trial that is running was left by a dead one."""
        return _has_heartbeat(self.inner._storage)

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
    ) -> Tried:
        """One trial. losses yields (window, loss) one window after the other; the trial is
        pruned as soon as Wilcoxon's signed-rank test against the best says that it is worse."""
        self.revive()
        done = len(self.tried())  # the same trials so far, the same next one: also after a kill
        self.inner.sampler = _sampler(
            self.search.sampler, self.seed + 1000 * done + 17 * self.search.worker, self.shared
        )
        with _unwarned():
            trial = self.inner.ask()
        self._beat(trial)
        start = trial.user_attrs.get("start")
        chosen = suggest(trial) if start is None else np.array(start, dtype=np.int64)
        known = next((t for t in self.tried() if np.array_equal(t.assignment, chosen)), None)
        seen: list[float] = []
        pruned = False
        if known is not None:  # a repeated proposal costs nothing and teaches the sampler
            seen, pruned = known.each.tolist(), not known.complete
        else:
            for window, loss in losses(chosen):
                seen.append(loss)
                self._beat(trial)
                if self.search.front:
                    continue  # optuna prunes studies of one objective only
                trial.report(loss, window)
                if trial.should_prune():
                    pruned = True
                    break
        mean = float(np.mean(seen))
        cost = 0 if known is not None else len(seen) * window_tokens
        for key, value in (
            ("assignment", json.dumps(chosen.tolist())),
            ("loss", mean),
            ("windows", len(seen)),
            ("tokens", cost),
            ("each", json.dumps(seen)),
        ):
            trial.set_user_attr(key, value)
        if pruned:
            self.inner.tell(trial, state=TrialState.PRUNED)
        else:
            self.inner.tell(trial, self._values(chosen, mean) if self.search.front else mean)
        return Tried(chosen, mean, len(seen), cost, not pruned, np.array(seen))

    def _beat(self, trial: optuna.Trial) -> None:
        """Tell the other workers that this one lives."""
        storage: Any = self.inner._storage
        if _has_heartbeat(storage):
            storage.record_heartbeat(trial._trial_id)

    def revive(self) -> None:
        """Queue the trials of dead workers again: none is lost, and a failed one never counts."""
        if self.shared:
            with _unwarned():
                optuna.storages.fail_stale_trials(self.inner)


@contextmanager
def _unwarned() -> Iterator[None]:
    """optuna warns of features that it calls experimental, used here on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _has_heartbeat(storage: BaseStorage) -> bool:
    return isinstance(getattr(storage, "_backend", storage), RDBStorage)


def _objectives(search: Search) -> int:
    return 1 + search.front + (search.third is not None)


def _loss(tried: Tried) -> float:
    return tried.loss


def open_storage(url: str | None, default: Path, heartbeat: int = 30) -> BaseStorage:
    """A journal file, or a database that several machines reach. Raises StorageError."""
    if url is None:
        try:
            default.parent.mkdir(parents=True, exist_ok=True)
            lock = JournalFileOpenLock(str(default))
            return JournalStorage(JournalFileBackend(str(default), lock_obj=lock))
        except OSError as error:
            raise StorageError(
                f"The study's journal {default} can't be opened ({error})."
            ) from None
    check_address(url)
    return _database(credentials.whole(str(credentials.hidden(url))), heartbeat)


def check_address(url: str) -> None:
    """Raises ConfigError for what can't be a database's address. Parts of it aren't quoted: what
    can't be understood may be a password."""
    import sqlalchemy

    if "://" not in url:
        raise ConfigError(
            f"search.storage is a database address such as postgresql://user@host/name or "
            f"sqlite:///study.db, not {credentials.masked(url)!r}."
        )
    try:
        sqlalchemy.make_url(credentials.whole(url))
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise ConfigError(
            f"search.storage is {credentials.masked(url)}, which isn't a database's address: "
            "SCHEME://USER:PASSWORD@HOST:PORT/NAME. Write @, :, / and % in a password as %40, %3A, "
            "%2F and %25."
        ) from None


def mend(journal: Path) -> bool:
    """Cut off what a full disk left half-written, and what was appended to it; else no later run
    could read the journal. Returns whether there was anything."""
    if not journal.exists():
        return False
    whole, lock = 0, JournalFileOpenLock(str(journal))
    lock.acquire()
    try:
        with journal.open("r+b") as file:
            for line in file:
                if not (line.endswith(b"\n") and _is_json(line)):
                    file.truncate(whole)
                    return True
                whole += len(line)
    finally:
        lock.release()
    return False


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _database(url: str, heartbeat: int, tries: int = 10) -> BaseStorage:
    """Workers that start together make the tables together: who is beaten tries again."""
    import sqlalchemy.exc
    from optuna.exceptions import StorageInternalError

    driver = url
    if url.startswith("postgresql://"):  # SQLAlchemy would look for the older driver psycopg2
        driver = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        with _unwarned():
            return RDBStorage(
                driver,
                heartbeat_interval=heartbeat,
                grace_period=2 * heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
    except (
        sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError, ValueError, OSError
    ) as error:  # fmt: skip
        if tries == 1 or not _beaten(error):
            raise _unusable(url, error) from None
    time.sleep(np.random.default_rng().uniform(0.05, 0.5))
    return _database(url, heartbeat, tries - 1)


def _beaten(error: Exception) -> bool:
    """Another worker was making the same tables at this moment; they will be there soon."""
    text = str(error).lower()
    return any(sign in text for sign in ("already exists", "duplicate key", "unique", "locked"))


def _unusable(url: str, error: Exception) -> StorageError:
    said = credentials.clean(str(error)).strip()
    reason = said.splitlines()[0] if said else type(error).__name__
    return StorageError(
        f"The study's database {credentials.masked(url)} can't be used ({reason}). Check the "
        "address, that the server runs, and that its driver is installed "
        "(pip install 'mezzotint[postgres]')."
    )


def _sampler(name: str, seed: int, shared: bool) -> optuna.samplers.BaseSampler:
    kinds: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=shared, n_startup_trials=8
        ),
        "nsgaii": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=16),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=8),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    return kinds[name]()


# ---------------------------------------------------------------- spaces


def layers(
    problem: Problem, toll: np.ndarray | float = 0.0
) -> Callable[[optuna.Trial], np.ndarray]:
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


def multipliers(
    problem: Problem, roles: Sequence[str], toll: np.ndarray | float = 0.0
) -> Callable[[optuna.Trial], np.ndarray]:
    """Factors e^u on the table's rows and columns, decoded at exactly the budget. roles [G]; toll
    [G, P]: see `Problem.toll`."""
    kinds = sorted(set(roles))
    depth = [-1 if b is None else b for b in problem.blocks]
    band = np.clip(np.array(depth) * BANDS // (max(depth) + 1), 0, BANDS - 1)
    low = [int(c) for c in problem.order[:2]]

    def suggest(trial: optuna.Trial) -> np.ndarray:
        by_role = {kind: trial.suggest_float(f"type {kind}", -1.5, 1.5) for kind in kinds}
        by_band = [trial.suggest_float(f"band {i}", -1.5, 1.5) for i in range(BANDS)]
        rows = np.array([by_role[role] for role in roles]) + np.array(by_band)[band]
        loss = problem.loss * np.exp(rows)[:, None]
        for column in low:
            loss[:, column] *= np.exp(
                trial.suggest_float(f"low {problem.columns[column]}", -0.5, 2)
            )
        return exact.solve(replace(problem, loss=loss + toll))

    return suggest


def sized(
    space: Callable[[Problem, np.ndarray], Callable[[optuna.Trial], np.ndarray]],
    problem: Problem,
    span: tuple[float, float],
) -> Callable[[optuna.Trial], np.ndarray]:
    """A space of any size within `span`: the trial also samples the size (on a log scale) and, with
    a third objective, how much that one weighs."""

    def suggest(trial: optuna.Trial) -> np.ndarray:
        limit = trial.suggest_float("size", *span, log=True)
        pull = trial.suggest_float("pull", *PULLS, log=True) if problem.third else 0.0
        return space(replace(problem, limit=limit), problem.toll(pull))(trial)

    return suggest


def moves(
    problem: Problem, best: np.ndarray, belief: Belief, seed: int
) -> Callable[[optuna.Trial], np.ndarray]:
    """Exchanges around `best`: at most `groups` of them change, together exactly at the budget,
    optimal for one draw of `belief` (Thompson sampling). What a trial samples is how far to go and
    how much to believe."""

    def suggest(trial: optuna.Trial) -> np.ndarray:
        largest = max(2, len(problem.groups) // 4)
        count = trial.suggest_int("groups", 2, largest, log=True)
        trust = trial.suggest_float("trust", 0.3, 1.0)
        spread = trial.suggest_float("spread", 0.0, 1.0)
        rng = np.random.default_rng([seed, 5])
        table = belief.draw(rng, spread, trust)
        return exact.solve_near(replace(problem, loss=table), best, count)

    return suggest
