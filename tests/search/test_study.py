"""The ask-and-tell loop on a known loss: budgets, seeds, resuming, pruning, bad settings."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from optimizer.errors import ConfigError, StorageError
from optimizer.search import (
    SAMPLERS,
    SPACES,
    Problem,
    Search,
    Third,
    exact,
    pictures,
    samplers,
    spaces,
)
from optimizer.search import storage as storages
from optimizer.search import study as studies
from optimizer.search.pareto import nondominated
from optimizer.search.spaces import Start
from optimizer.search.study import Study
from optimizer.search.surrogate import Slope, believe
from tests.conftest import slow_beside
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
        return spaces.layers(posed)
    if name == "multipliers":
        return spaces.multipliers(posed, ["a", "b"] * (len(posed.groups) // 2))
    if name == "directions":
        return spaces.directions(posed, slope_at(posed, exact.solve(posed)))
    belief = believe(posed, best, [slope_at(posed, best)], [])
    return spaces.moves(posed, best, belief, len(best))


def slope_at(posed: Problem, best: np.ndarray) -> Slope:
    """The slope of the hidden loss."""
    rows = np.arange(len(best))
    own = posed.loss[rows, best]
    beside = np.r_[own[1:], 0] + np.r_[0, own[:-1]]
    slope = 3 * beside[:, None] * posed.loss - 2 * own[:, None]  # the true loss's at `best`
    slope[rows, best] = 3 * beside * own
    return Slope(best, np.stack([slope, slope]))


def opened(posed: Problem, folder: Path, **settings: object) -> Study:
    search = Search(**{"space": "moves", "first": 2, **settings})
    return Study.open(search, posed, "study", folder / "study.journal", 0)


EVERY = [(s, k) for s in SPACES for k in SAMPLERS if not (s == "layers" and k in ("cmaes", "gp"))]
FIRST = [("multipliers", "tpe"), ("layers", "tpe"), ("directions", "random")]
PAIRS = slow_beside([*FIRST, *(("moves", sampler) for sampler in SAMPLERS)], EVERY)


@pytest.mark.parametrize(("name", "sampler"), PAIRS)
def test_every_trial_fits_and_the_best_is_never_worse_than_the_start(
    name: str, sampler: str, tmp_path: Path
) -> None:
    posed = problem(1, 24, 5, tightness=0.4)
    start = exact.solve(posed)
    study = opened(posed, tmp_path, space=name, sampler=sampler)
    study.begin([Start(plan=start)])
    propose = space(name, posed, start)
    for _ in range(12):
        study.run(propose, hidden_loss(posed), TOKENS)
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
    starts = [Start(plan=exact.solve(posed)), Start(plan=posed.uniform(0))]
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
    study.begin([Start(plan=good), Start(plan=posed.uniform(0))])
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
        return len(storages.open_storage(url, tmp_path / "j").get_all_studies())

    for k in range(3):  # without a second try, each time one or more of the four were refused
        with ThreadPoolExecutor(workers) as pool:
            url = f"sqlite:///{tmp_path}/{k}.db"
            assert list(pool.map(opened, [url] * workers)) == [0] * workers


def test_an_unusable_storage_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="database address"):
        storages.open_storage("study.db", tmp_path / "j")
    missing = f"sqlite:///{tmp_path}/no/such/folder/study.db"
    with pytest.raises(StorageError, match="can't be used"):
        storages.open_storage(missing, tmp_path / "j")
    with pytest.raises(StorageError, match="can't be used") as caught:
        storages.open_storage("postgresql://me:secret@127.0.0.1:9/none", tmp_path / "j")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("torn", [b'{"op_code":4,"wor', b'{"op_code":4,"wor{"op_code":6}\n{}\n'])
def test_a_journal_that_a_full_disk_tore_goes_on(tmp_path: Path, torn: bytes) -> None:
    posed = problem(1, 6, 4, tightness=0.5)
    study = opened(posed, tmp_path)
    study.run(space("layers", posed, posed.largest), hidden_loss(posed), TOKENS)
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    assert not storages.mend(journal) and not storages.mend(tmp_path / "none")
    journal.write_bytes(whole + torn)
    assert storages.mend(journal) and journal.read_bytes() == whole
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
            return spaces.layers(sub, toll)
        return spaces.multipliers(sub, roles, toll)

    suggest = spaces.sized(proposed, posed, (posed.limit / 1.3, posed.limit * 1.3))
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


# ---------------------------------------------------------------- what a study reads


def ended(posed: Problem, folder: Path, **settings: object) -> Path:
    study = opened(posed, folder, space="multipliers", **settings)
    for _ in range(2):
        study.run(space("multipliers", posed, posed.largest), hidden_loss(posed), TOKENS)
    return folder / "study.journal"


FOREIGN = [
    b"{}", b"5", b"null", b'"a"', b"[[[]]]", b'{"op_code":99,"worker_id":"x"}', b"[" * 100_000,
    b'{"op_code":true,"worker_id":"x"}', b'{"op_code":4,"worker_id":"x","study_id":0}',
    b'{"op_code":6,"worker_id":"x","trial_id":0,"state":9,"values":null}',
    b'{"op_code":5,"worker_id":"x","trial_id":0,"param_name":"a","param_value_internal":1,'
    b'"distribution":"{}"}',
    b'{"op_code":0,"worker_id":"x","study_name":"b","directions":["up"]}',
    b'{"op_code":4,"worker_id":"x","study_id":0,"datetime_start":"yesterday"}',
    b'{"op_code":8,"worker_id":"x","trial_id":0,"user_attr":{}}',
]  # fmt: skip


@pytest.mark.parametrize("line", FOREIGN)
def test_a_foreign_line_is_refused_by_its_number(tmp_path: Path, line: bytes) -> None:
    posed = problem(1, 6, 4, tightness=0.5)
    journal = ended(posed, tmp_path)
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:7], line + b"\n", *lines[7:]]))
    with pytest.raises(StorageError, match=r"Line 8 of the study's journal .*Remove that line"):
        opened(posed, tmp_path).tried()
    journal.write_bytes(whole)
    assert len(opened(posed, tmp_path).tried()) == 2


def test_a_changed_digit_is_seen(tmp_path: Path) -> None:
    posed = problem(1, 6, 4, tightness=0.5)
    journal = ended(posed, tmp_path)
    data = bytearray(journal.read_bytes())
    place = data.index(b'"user_attr":{"loss":') + len(b'"user_attr":{"loss":')
    data[place] = ord("7") if data[place] != ord("7") else ord("8")
    journal.write_bytes(data)
    with pytest.raises(StorageError, match="checksum"):
        opened(posed, tmp_path).tried()


def test_mutated_journals_are_read_mended_or_refused(tmp_path: Path) -> None:
    posed = problem(1, 6, 4, tightness=0.5)
    journal = ended(posed, tmp_path)
    whole = journal.read_bytes()
    rng = np.random.default_rng(20)
    ends = {"read": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(whole)
        place, size = int(rng.integers(len(data))), int(rng.integers(1, 30))
        data[place : place + size] = rng.bytes(int(rng.integers(0, 30)))
        if rng.random() < 0.5:  # without checksums, as other programs write
            data = bytearray(re.sub(rb',"check":"[0-9a-f]*"', b"", bytes(data)))
        journal.write_bytes(data)
        try:
            opened(posed, tmp_path).tried()
            ends["read"] += 1
        except StorageError:
            ends["refused"] += 1
    assert min(ends.values()) > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("assignment", "[0, 1]"), ("assignment", "{}"), ("assignment", "[9,9,9,9,9,9]"),
        ("assignment", "[" * 100_000), ("loss", "x"), ("loss", None), ("each", "[1, null]"),
        ("each", "5"), ("windows", 99), ("tokens", -1), ("before", "many"),
    ],
)  # fmt: skip
def test_a_trial_of_another_program_is_refused(tmp_path: Path, key: str, value: object) -> None:
    posed = problem(1, 6, 4, tightness=0.5)
    ended(posed, tmp_path)
    study = opened(posed, tmp_path)
    trial = study.inner.ask()
    for name, known in study.inner.trials[0].user_attrs.items():
        trial.set_user_attr(name, known)
    trial.set_user_attr(key, value)
    study.inner.tell(trial, 1.0)
    with pytest.raises(StorageError, match="Trial 2 of the study"):
        study.tried()


def test_what_a_killed_writer_left_is_cut_off_before_the_next_line(tmp_path: Path) -> None:
    posed = problem(1, 6, 4, tightness=0.5)
    study = opened(posed, tmp_path)
    journal = tmp_path / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    study.run(space("multipliers", posed, posed.largest), hidden_loss(posed), TOKENS)
    assert len(opened(posed, tmp_path).tried()) == 1


HOLDER = """
import os, sys, time
from pathlib import Path
from optimizer.search import storage
with storage._locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_writer_holds_nothing_up(tmp_path: Path) -> None:
    posed = problem(1, 6, 4, tightness=0.5)
    journal = ended(posed, tmp_path)
    journal.with_name(journal.name + ".lock").write_text("")  # as Optuna's own lock leaves it
    command = [sys.executable, "-c", HOLDER, str(journal)]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.kill()
    began = time.monotonic()
    ended(posed, tmp_path)
    assert time.monotonic() - began < 20


# ---------------------------------------------------------------- samplers


def begun(posed: Problem, folder: Path, name: str, sampler: str, seed: int = 0) -> Study:
    """A study whose first plans are measured."""
    roles = ["a", "b"] * (len(posed.groups) // 2)
    search = Search(space=name, sampler=sampler, prune=0)
    study = Study.open(search, posed, f"{name} {sampler}", folder / "study.journal", seed)
    best = exact.solve(posed)
    slope = slope_at(posed, best)
    for start in spaces.starts_of(name, posed, roles, best, False, slope):
        study.begin([start])
        study.run(space(name, posed, best), hidden_loss(posed), TOKENS)
    return study


@pytest.mark.parametrize(("name", "sampler"), PAIRS)
def test_every_sampler_samples_the_whole_space_jointly(
    name: str, sampler: str, tmp_path: Path
) -> None:
    posed = problem(1, 24, 5, tightness=0.4)
    study = begun(posed, tmp_path, name, sampler)
    propose = space(name, posed, exact.solve(posed))
    assert len(study.tried()) >= 3
    joint: list[set[str]] = []
    inner = studies._sampler

    def watched(*arguments: Any) -> optuna.samplers.BaseSampler:
        made = inner(*arguments)
        real = made.sample_relative

        def relative(*given: Any) -> dict[str, Any]:
            found = real(*given)
            joint.append(set(found))
            return found

        made.sample_relative = relative  # type: ignore[method-assign]
        return made

    studies._sampler = watched
    try:
        for _ in range(samplers.POPULATION + 1 if sampler == "nsgaii" else 8):
            study.run(propose, hidden_loss(posed), TOKENS)
    finally:
        studies._sampler = inner
    whole = set(study.inner.trials[-1].params)
    assert all(set(trial.params) == whole for trial in study.inner.trials)
    if sampler == "nsgaii":  # what a mutation drops is sampled again, alone
        assert any(joint)
    else:
        assert sampler == "random" or joint[-1] == whole


@pytest.mark.parametrize("name", SPACES)
def test_the_first_plans_have_the_parameters_that_decode_to_them(
    name: str, tmp_path: Path
) -> None:
    posed = problem(1, 24, 5, tightness=0.4)
    study = begun(posed, tmp_path, name, "random")
    first = study.tried()[0]
    assert np.array_equal(first.assignment, exact.solve(posed))
    if name == "moves":  # exchanges around a best plan: these are the first ones
        return
    for trial, tried in zip(study.inner.trials, study.tried(), strict=True):
        again = space(name, posed, first.assignment)(optuna.trial.FixedTrial(trial.params))
        assert np.array_equal(again, tried.assignment)


def planted(posed: Problem, seed: int) -> Callable[[np.ndarray], Iterator[tuple[int, float]]]:
    """A landscape whose optimum within the budget `multipliers` can reach: the table with other
    weights for types and depths, and what types do to each other."""
    rng = np.random.default_rng([seed, 77])
    groups = len(posed.groups)
    roles = np.exp(rng.choice([-0.35, 0.35], 2))[np.arange(groups) % 2]
    bands = np.exp(rng.choice([-0.35, 0.35], spaces.BANDS))[
        np.arange(groups) * spaces.BANDS // groups
    ]
    true = posed.loss * (roles * bands)[:, None]
    target = exact.solve(replace(posed, loss=true))
    rows = np.arange(groups)
    least = true[rows, target]

    def losses(assignment: np.ndarray) -> Iterator[tuple[int, float]]:
        over = true[rows, assignment] - least
        value = float(over.sum() + 0.5 * (over[1:] * over[:-1]).sum())
        for window in range(2):
            yield window, value

    return losses


def reached(sampler: str, folder: Path, trials: int, seed: int) -> float:
    posed = problem(seed, 30, 5, tightness=0.35)
    roles = ["a", "b"] * 15
    search = Search(space="multipliers", sampler=sampler, prune=0)
    name = f"{sampler} {seed}"
    study = Study.open(search, posed, name, folder / f"{name}.journal", seed)
    losses = planted(posed, seed)
    suggest = spaces.multipliers(posed, roles)
    start = Start(spaces.multipliers_of(posed, roles, 1.0))
    study.begin([start])
    for _ in range(trials):
        study.run(suggest, losses, TOKENS)
    assert study.best is not None
    return study.best.loss / study.tried()[0].loss


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    posed = problem(1, 12, 4, tightness=0.4)
    study = begun(posed, tmp_path, "multipliers", "random")
    found = pictures.draw(study.inner)
    assert set(found) == {"history", "importances", "landscape"}
    assert all(data.startswith(b"\x89PNG") for data in found.values())
    assert pictures.draw(optuna.create_study()) == {}


@pytest.mark.campaign
def test_joint_sampling_beats_random_by_what_a_broken_sampler_cannot_reach(tmp_path: Path) -> None:
    """What is left of the start's loss after 40 trials, mean of three landscapes. Seen: random .59,
    tpe .21, gp .17, cmaes .29; samplers that never sample jointly are random."""
    left = {
        sampler: np.mean([reached(sampler, tmp_path, 40, seed) for seed in range(3)])
        for sampler in ("random", "tpe", "gp", "cmaes")
    }
    for sampler in ("tpe", "gp", "cmaes"):
        assert left[sampler] < 0.65 * left["random"], left
