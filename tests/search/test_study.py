"""The ask-and-tell loop on a known loss: budgets, seeds, resuming, pruning, bad settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from optimizer.errors import ConfigError, StorageError
from optimizer.search import SAMPLERS, SPACES, Problem, Search, Third, exact
from optimizer.search import study as studies
from optimizer.search.pareto import nondominated
from optimizer.search.study import Study
from optimizer.search.surrogate import Slope, believe
from tests.search.test_contract import problem

WINDOWS, TOKENS = 6, 10
FRONT = {"front": True, "space": "multipliers", "sampler": "nsgaii"}


def hidden_loss(posed: Problem) -> Callable[[np.ndarray], Iterator[tuple[int, float]]]:
    """A loss that the table doesn't know: pairs of neighbours interact, windows differ."""
    rng = np.random.default_rng(5)
    noise = rng.normal(1, 0.05, WINDOWS)

    def losses(assignment: np.ndarray) -> Iterator[tuple[int, float]]:
        own = posed.loss[np.arange(len(assignment)), assignment]
        total = own.sum() + 3 * (own[1:] * own[:-1]).sum()
        for window in range(WINDOWS):
            yield window, float(total * noise[window])

    return losses


def space(name: str, posed: Problem, best: np.ndarray) -> Callable[[optuna.Trial], np.ndarray]:
    if name == "layers":
        return studies.layers(posed)
    if name == "multipliers":
        return studies.multipliers(posed, ["a", "b"] * (len(posed.groups) // 2))
    rows = np.arange(len(best))
    own = posed.loss[rows, best]
    beside = np.r_[own[1:], 0] + np.r_[0, own[:-1]]
    slope = 3 * beside[:, None] * posed.loss - 2 * own[:, None]  # the true loss's at `best`
    slope[rows, best] = 3 * beside * own
    belief = believe(posed, best, [Slope(best, np.stack([slope, slope]))], [])
    return studies.moves(posed, best, belief, len(best))


def opened(posed: Problem, folder: Path, **settings: object) -> Study:
    search = Search(**{"space": "moves", "first": 2, **settings})
    return Study.open(search, posed, "study", folder / "study.journal", 0)


PAIRS = [(s, k) for s in SPACES for k in SAMPLERS if not (s == "layers" and k in ("cmaes", "gp"))]


@pytest.mark.parametrize(("name", "sampler"), PAIRS)
def test_every_trial_fits_and_the_best_is_never_worse_than_the_start(
    name: str, sampler: str, tmp_path: Path
) -> None:
    posed = problem(1, 24, 5, tightness=0.4)
    start = exact.solve(posed)
    study = opened(posed, tmp_path, space=name, sampler=sampler)
    study.begin([start])
    for _ in range(12):
        study.run(space(name, posed, start), hidden_loss(posed), TOKENS)
    tried = study.tried()
    assert len(tried) == 12
    assert all(posed.fits(t.assignment) for t in tried)
    assert np.array_equal(tried[0].assignment, start)
    assert study.best is not None and study.best.loss <= tried[0].loss
    assert len({t.assignment.tobytes() for t in tried}) > 1


def test_the_same_seed_gives_the_same_trials(tmp_path: Path) -> None:
    posed = problem(3, 12, 4)
    runs = []
    for folder in ("a", "b"):
        study = opened(posed, tmp_path / folder, space="multipliers")
        for _ in range(6):
            study.run(space("multipliers", posed, posed.uniform(0)), hidden_loss(posed), TOKENS)
        runs.append(np.array([t.assignment for t in study.tried()]))
    assert np.array_equal(*runs)


def test_a_study_goes_on_from_its_journal_and_counts_every_token(tmp_path: Path) -> None:
    posed = problem(4, 12, 4)
    first = opened(posed, tmp_path)
    first.run(lambda _trial: exact.solve(posed), hidden_loss(posed), TOKENS)
    first.spend(123, "a")
    first.spend(123, "a")  # the same work, done again after a kill
    again = opened(posed, tmp_path)
    assert len(again.tried()) == 1 and not again.shared
    assert again.spent == 123 + WINDOWS * TOKENS


@pytest.mark.filterwarnings("ignore:Heartbeat")
def test_a_shared_study_queues_each_start_once_and_those_of_dead_workers_again(
    tmp_path: Path,
) -> None:
    posed = problem(4, 12, 4)
    study = opened(posed, tmp_path, storage=f"sqlite:///{tmp_path}/study.db")
    starts = [exact.solve(posed), posed.uniform(0)]
    study.begin(starts)
    study.begin(starts)
    assert study.shared and study.waiting == 2
    trial = study.inner.ask()
    study.begin(starts)
    assert study.waiting == 1  # the other is under way
    study.inner.tell(trial, state=TrialState.FAIL)
    study.begin(starts)
    assert study.waiting == 2


@pytest.mark.filterwarnings("ignore:Heartbeat")
@pytest.mark.filterwarnings("ignore:.*experimental")
def test_a_trial_whose_worker_died_before_its_first_beat_is_queued_again(tmp_path: Path) -> None:
    posed = problem(4, 12, 4)
    study = opened(posed, tmp_path, storage=f"sqlite:///{tmp_path}/study.db", heartbeat=1)
    dead = study.inner.ask()
    time.sleep(2.5)
    study.revive()
    assert list(study.running) == [dead.number] and study.waiting == 0
    study.beat_for(study.running.values())
    time.sleep(3.5)
    study.revive()
    assert not study.running and study.waiting == 1


def test_a_killed_study_makes_the_trials_that_an_unhurt_one_makes(tmp_path: Path) -> None:
    posed = problem(3, 12, 4)

    def run(study: Study) -> None:
        study.run(space("multipliers", posed, posed.uniform(0)), hidden_loss(posed), TOKENS)

    unhurt = opened(posed, tmp_path / "unhurt", space="multipliers")
    for _ in range(14):
        run(unhurt)

    suggest = space("multipliers", posed, posed.uniform(0))
    for _ in range(14):
        run(opened(posed, tmp_path / "hurt", space="multipliers"))
        hurt = opened(posed, tmp_path / "hurt", space="multipliers")
        suggest(hurt.inner.ask())  # killed before it was measured
    both = [np.array([t.assignment for t in study.tried()]) for study in (unhurt, hurt)]
    assert np.array_equal(*both)


def test_a_repeated_plan_costs_nothing(tmp_path: Path) -> None:
    posed = problem(4, 12, 4)
    study = opened(posed, tmp_path)
    for _ in range(2):
        study.run(lambda _trial: posed.uniform(0), hidden_loss(posed), TOKENS)
    assert [t.tokens for t in study.tried()] == [WINDOWS * TOKENS, 0]


def test_a_hopeless_plan_stops_early_and_never_becomes_the_best(tmp_path: Path) -> None:
    posed = problem(6, 12, 4, tightness=1.0)
    good = exact.solve(posed)
    study = opened(posed, tmp_path, prune=0.2)
    study.begin([good, posed.uniform(0)])
    for _ in range(2):
        study.run(space("moves", posed, good), hidden_loss(posed), TOKENS)
    bad = study.tried()[1]
    assert not bad.complete and bad.windows < WINDOWS
    assert study.best is not None and np.array_equal(study.best.assignment, good)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"space": "layer"}, "moves"),
        ({"sampler": "annealing"}, "tpe"),
        ({"space": "layers", "sampler": "cmaes"}, "categorical"),
        ({"tokens": 0}, "search.tokens is 0"),
        ({"prune": 1.5}, "p-value"),
        ({"trials": 0}, "search.trials"),
        ({"seconds": 0}, "search.seconds"),
        ({"worker": -1}, "search.worker"),
        ({"front": True, "space": "moves"}, "decoded for any size"),
        ({"front": True, "space": "multipliers", "sampler": "cmaes"}, "two objectives"),
        ({"third": "read"}, "search=front"),
        (FRONT | {"third": "watts"}, "read, time, price"),
        (FRONT | {"third": "price"}, "search.hourly_rate"),
        (FRONT | {"third": "read", "hourly_rate": 1.0}, "search.third=price"),
        (FRONT | {"third": "price", "hourly_rate": 0.0}, "above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Search(**settings).check()


def test_workers_that_start_together_all_get_the_storage(tmp_path: Path) -> None:
    workers = 4
    start = Barrier(workers)

    def opened(url: str) -> int:
        start.wait(10)
        return len(studies.open_storage(url, tmp_path / "j").get_all_studies())

    for k in range(3):  # without a second try, each time one or more of the four were refused
        with ThreadPoolExecutor(workers) as pool:
            url = f"sqlite:///{tmp_path}/{k}.db"
            assert list(pool.map(opened, [url] * workers)) == [0] * workers


def test_an_unusable_storage_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="database address"):
        studies.open_storage("study.db", tmp_path / "j")
    missing = f"sqlite:///{tmp_path}/no/such/folder/study.db"
    with pytest.raises(StorageError, match="can't be used"):
        studies.open_storage(missing, tmp_path / "j")
    with pytest.raises(StorageError, match="can't be used") as caught:
        studies.open_storage("postgresql://me:secret@127.0.0.1:9/none", tmp_path / "j")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("torn", [b'{"op_code":4,"wor', b'{"op_code":4,"wor{"op_code":6}\n{}\n'])
def test_a_journal_that_a_full_disk_tore_goes_on(tmp_path: Path, torn: bytes) -> None:
    posed = problem(1, 6, 4, tightness=0.5)
    study = opened(posed, tmp_path)
    study.run(space("layers", posed, posed.largest), hidden_loss(posed), TOKENS)
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    assert not studies.mend(journal) and not studies.mend(tmp_path / "none")
    journal.write_bytes(whole + torn)
    assert studies.mend(journal) and journal.read_bytes() == whole
    again = opened(posed, tmp_path)
    again.run(space("layers", posed, posed.largest), hidden_loss(posed), TOKENS)
    assert len(again.tried()) == 2


def with_third(posed: Problem) -> Problem:
    """The third objective has nothing to do with the size."""
    each = np.random.default_rng(3).exponential(size=posed.size.shape)
    return replace(posed, third=Third("time", each, 5.0))


@pytest.mark.parametrize("name", ["layers", "multipliers"])
def test_a_third_objective_is_searched_and_told(name: str, tmp_path: Path) -> None:
    posed = with_third(problem(2, 12, 4, tightness=0.5))
    study = opened(posed, tmp_path, **FRONT | {"space": name, "third": "time"})
    roles = ["a", "b"] * (len(posed.groups) // 2)

    def proposed(sub: Problem, toll: np.ndarray) -> Callable[[optuna.Trial], np.ndarray]:
        if name == "layers":
            return studies.layers(sub, toll)
        return studies.multipliers(sub, roles, toll)

    suggest = studies.sized(proposed, posed, (posed.limit / 1.3, posed.limit * 1.3))
    for _ in range(12):
        study.run(suggest, hidden_loss(posed), TOKENS)
    values = np.array([trial.values for trial in study.inner.trials])
    assert np.allclose(values, study.points(study.tried()))
    assert values[:, 2] == pytest.approx([posed.third.of(t.assignment) for t in study.tried()])
    kept = study.points(study.front(study.finished))
    assert len(kept) >= len(kept[nondominated(kept[:, :2])])  # the third keeps more plans
    assert {"size", "pull"} <= study.inner.trials[0].params.keys()


def test_a_toll_pulls_towards_the_cheap(tmp_path: Path) -> None:
    posed = with_third(problem(2, 12, 4, tightness=0.5))
    found = [
        posed.third.of(exact.solve(replace(posed, loss=posed.loss + posed.toll(pull))))
        for pull in (0.0, 1.0, 1000.0)
    ]
    assert found[0] > found[1] >= found[2]
    assert not replace(posed, third=None).toll(3.0).any()
