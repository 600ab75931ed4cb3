"""Small pieces of the search, by hand."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from optimizer.errors import ConfigError, StorageError
from optimizer.search import Problem, Search, Third, exact, nested, pictures, samplers, storage
from optimizer.search import study as studies
from optimizer.search.samplers import Axis, CmaEs
from optimizer.search.spaces import Start
from optimizer.search.study import Study, Tried
from tests.search.test_contract import problem


def hand() -> Problem:
    """Three groups of three columns; the limit leaves room for two steps up."""
    return replace(
        problem(0, 3, 3),
        loss=np.array([[9.0, 4, 1], [6, 5, 0.5], [3, 2, 1.5]]),
        size=np.array([[1.0, 2, 4], [1, 3, 4], [1, 2, 3]]),
        limit=5.0,
    )


def opened(folder: Path, posed: Problem | None = None, **settings: Any) -> Study:
    search = Search(**{"space": "multipliers", "first": 2} | settings)
    told: list[str] = []
    made = Study.open(search, posed or hand(), "name", folder / "a" / "j", 7, told.append)
    vars(made)["told"] = told
    return made


def losses(values: list[float]) -> Any:
    return lambda _assignment: enumerate(values)


def plan(*columns: int) -> Any:
    def suggest(trial: optuna.Trial) -> np.ndarray:
        trial.suggest_float("x", 0, 1)
        return np.array(columns)

    return suggest


# ---------------------------------------------------------------- trials


def test_a_trial_costs_its_windows_and_what_came_before(tmp_path: Path) -> None:
    study = opened(tmp_path)
    found = study.run(plan(0, 1, 0), losses([2.0, 4.0]), 10, before=5)
    assert (found.loss, found.windows, found.tokens, found.before) == (3.0, 2, 20, 5)
    assert found.complete and found.each.tolist() == [2.0, 4.0]
    again = study.run(plan(0, 1, 0), losses([9.0]), 10, before=6)  # known: nothing is measured
    assert (again.loss, again.windows, again.tokens, again.before) == (3.0, 2, 0, 6)
    study.spend(100, "slope 1")
    study.spend(50, "slope 2")
    assert study.spent == 20 + 5 + 6 + 100 + 50
    assert [t.value for t in study.inner.trials] == [3.0, 3.0]
    other = opened(tmp_path)
    assert [t.before for t in other.tried()] == [5, 6] and other.spent == 181
    assert [t.number for t in study.inner.trials] == [0, 1]


def test_the_best_fits_and_was_measured_whole(tmp_path: Path) -> None:
    study = opened(tmp_path)
    assert study.best is None

    def tried(loss: float, columns: list[int], complete: bool = True) -> Tried:
        return Tried(np.array(columns), loss, 1, 1, complete, np.array([loss]))

    over, cut = tried(1.0, [2, 2, 2]), tried(2.0, [0, 0, 0], complete=False)
    good, worse = tried(3.0, [1, 0, 0]), tried(4.0, [0, 1, 0])
    assert study.best_of([over, cut, worse, good]) is good
    assert study.best_of([over, cut]) is None
    points = study.points([good, worse])
    assert points.tolist() == [[4.0, 3.0], [5.0, 4.0]]
    assert study.front([worse, good]) == [good]
    small = tried(8.0, [0, 0, 0])
    assert study.front([good, worse, small]) == [small, good]
    assert study.points([]).shape == (0, 2)


def test_a_stopped_trial_is_worth_the_best_and_what_it_lost_on_the_same_windows(
    tmp_path: Path,
) -> None:
    study = opened(tmp_path)
    study.run(plan(0, 1, 0), losses([2.0, 4.0, 6.0]), 10)
    best = study.best
    assert best is not None

    def stopped(*each: float) -> Tried:
        return Tried(np.zeros(3, int), float(np.mean(each)), len(each), 0, False, np.array(each))

    assert study._estimate(stopped(3.0, 7.0)) == 4.0 + (1 + 3) / 2
    assert study._estimate(stopped(1.0, 4.0)) == 4.0  # never better than the best
    trial = study.inner.ask()
    trial.suggest_float("x", 0, 1)
    study._finish(trial, stopped(3.0, 7.0))
    last = study.inner.trials[-1]
    assert last.value == 6.0 and last.user_attrs["loss"] == 5.0
    assert not study.tried()[-1].complete and study.best.loss == 4.0
    assert len(study.finished) == 1 and len(study.tried()) == 2


def test_the_seed_of_a_trial_counts_trials_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    own = studies._sampler

    def watched(*given: Any) -> Any:
        asked.append(given)
        return own(*given)

    monkeypatch.setattr(studies, "_sampler", watched)
    study = opened(tmp_path, worker=3, sampler="random")
    study.run(plan(0, 0, 0), losses([1.0]), 1)
    study.run(plan(0, 0, 1), losses([1.0]), 1)
    assert asked == [("random", 7 + 17 * 3, False), ("random", 7 + 1000 + 17 * 3, False)]


def test_starts_are_queued_with_their_plans_and_known_when_they_are_done(tmp_path: Path) -> None:
    study = opened(tmp_path)
    first, second = Start({"x": 0.25}, np.array([0, 1, 0])), Start({"x": 0.5})
    assert first.told == [{"x": 0.25}, [0, 1, 0]] and second.told == [{"x": 0.5}, None]
    study.begin([first, second])
    assert study.waiting == 2 and study.missing([first, second]) == [first, second]
    found = study.run(plan(0, 0, 0), losses([1.0]), 1)  # decoded, but queued with a plan
    assert found.assignment.tolist() == [0, 1, 0]
    assert study.inner.trials[0].params == {"x": 0.25}
    assert study.waiting == 1 and study.missing([first, second]) == [second]
    assert [t.assignment.tolist() for t in study.started] == [[0, 1, 0]]
    found = study.run(plan(0, 0, 2), losses([1.0]), 1)
    assert found.assignment.tolist() == [0, 0, 2] and not study.missing([first, second])
    study.run(plan(1, 0, 0), losses([1.0]), 1)
    assert len(study.started) == 2 and study.running == {}
    queued = study.inner
    queued.enqueue_trial({"x": 0.1}, user_attrs={"start": [{}, [0, 9, 0]]})
    with pytest.raises(StorageError, match=r"Trial 3 of the study name .*columns are 0 to 2"):
        study.run(plan(0, 0, 0), losses([1.0]), 1)


def test_a_journals_running_trials_were_left_by_a_dead_worker(tmp_path: Path) -> None:
    study = opened(tmp_path)
    trial = study.inner.ask()
    assert study.running == {trial.number: trial._trial_id} and not study.shared
    again = opened(tmp_path)
    assert not again.running and again.inner.trials[0].state == TrialState.FAIL
    journal = tmp_path / "a" / "j"
    journal.write_bytes(journal.read_bytes() + b'{"op')
    told = vars(opened(tmp_path))["told"]
    assert told == [f"{tmp_path}/a/j is damaged; its trials from there on are made again"]


@pytest.mark.parametrize(
    ("settings", "directions", "pruner"),
    [
        ({}, 1, "WilcoxonPruner"),
        ({"prune": 0}, 1, "NopPruner"),
        ({"front": True, "sampler": "nsgaii"}, 2, "NopPruner"),
        ({"front": True, "sampler": "nsgaii", "third": "read"}, 3, "NopPruner"),
    ],
)
def test_a_front_has_an_objective_more_and_is_not_pruned(
    tmp_path: Path, settings: dict[str, Any], directions: int, pruner: str
) -> None:
    study = opened(tmp_path, **settings)
    assert [d.name for d in study.inner.directions] == ["MINIMIZE"] * directions
    assert type(study.inner.pruner).__name__ == pruner and study.inner.study_name == "name"


def test_a_study_quiets_its_own_libraries_and_no_other(tmp_path: Path) -> None:
    names = ("", "sqlalchemy", "optuna")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.INFO)
        opened(tmp_path)
        levels = [logging.getLogger(name).level for name in names]
        assert levels == [logging.INFO, logging.ERROR, logging.WARNING]
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def test_optunas_warnings_are_told_once_for_each_kind(tmp_path: Path) -> None:
    study, logger = opened(tmp_path), logging.getLogger("optuna")
    told = vars(study)["told"]
    logger.disabled = True  # as logging.config leaves it, Hydra's too
    with study._listening():
        logger.warning("Trial 12 is\n  odd")
        logger.warning("Trial 13 is odd")
        logger.info("nothing")
        warnings.warn("a setting is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("used on purpose", ExperimentalWarning, stacklevel=1)
        warnings.warn("Heartbeat of storage is supposed to be", UserWarning, stacklevel=1)
    assert told == ["Optuna: Trial 12 is odd", "Optuna: a setting is deprecated"]
    with pytest.raises(ZeroDivisionError), study._listening():
        raise ZeroDivisionError
    assert not any(isinstance(h, studies._Heard) for h in logger.handlers)
    logger.warning("outside")
    assert len(told) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [("[0, 1]", "3 groups"), ("{}", "3 groups"), ("[0, 1, 3]", "0 to 2"), ("[0, -1, 0]", "0 to 2"),
     ("[0, true, 0]", "0 to 2"), ("[0, 1.0, 0]", "0 to 2")],
)  # fmt: skip
def test_what_is_no_plan(text: str, said: str) -> None:
    assert studies._plan("[2, 0, 1]", 3, 3) == [2, 0, 1]
    with pytest.raises(ValueError, match=said):
        studies._plan(text, 3, 3)


# ---------------------------------------------------------------- samplers


def test_an_axis_by_hand() -> None:
    plain = Axis(FloatDistribution(2.0, 6.0))
    assert plain.share(3.0) == 0.25 and plain.value(0.25) == 3.0
    assert plain.value(-1) == 2.0 and plain.value(2) == 6.0
    log = Axis(FloatDistribution(1.0, 100.0, log=True))
    assert log.share(10.0) == pytest.approx(0.5) and log.value(0.5) == pytest.approx(10.0)
    whole = Axis(IntDistribution(2, 6))
    assert whole.value(0.3) == 3 and isinstance(whole.value(0.3), int) and whole.share(6) == 1.0
    far = Axis(IntDistribution(1, 64, log=True))
    assert far.value(0.5) == 8 and far.value(1.0) == 64
    with pytest.raises(TypeError, match="cmaes samples numbers"):
        Axis(CategoricalDistribution(["a"]))


def study_of(seed: int, trials: int, dimensions: int = 2) -> optuna.Study:
    """Asked and told with a bowl around 0.8, 0.3, ... as the program does: a sampler each time."""
    study = optuna.create_study()
    at = np.array([0.8, 0.3, 0.5])[:dimensions]
    for i in range(trials):
        study.sampler = samplers.sampler("cmaes", seed + 1000 * i, False)
        trial = study.ask()
        x = [trial.suggest_float(f"x{k}", 0, 1) for k in range(dimensions)]
        study.tell(trial, float(((np.array(x) - at) ** 2).sum()))
    return study


def test_cma_es_comes_near_and_counts_generations() -> None:
    study = study_of(3, 60)
    values = [t.value for t in study.trials]
    assert np.median(values[-20:]) < 0.4 * np.median(values[:20])
    generations = [t.system_attrs.get(samplers.GENERATION) for t in study.trials]
    assert generations[0] is None and generations[1] == 0
    size = generations.count(0)  # a population; the next one knows it
    assert size == 6 and generations[1:] == [i // size for i in range(59)]
    assert [t.params for t in study_of(3, 12).trials] == [t.params for t in study.trials[:12]]


def test_cma_es_begins_at_the_best_that_it_did_not_sample() -> None:
    study = optuna.create_study(sampler=samplers.sampler("random", 0, False))
    axes = {name: Axis(FloatDistribution(0, 4)) for name in ("x0", "x1")}
    assert samplers._centre(axes, []).tolist() == [0.5, 0.5]
    for y in (2.0, 0.5, 1.0):
        trial = study.ask()
        for name in axes:
            trial.suggest_float(name, 0, 4)
        study.tell(trial, y)
    best = min(study.trials, key=lambda t: t.value or 0.0)
    wanted = [best.params["x0"] / 4, best.params["x1"] / 4]
    assert samplers._centre(axes, study.trials).tolist() == pytest.approx(wanted)
    one = study_of(0, 3, dimensions=1)
    assert all(samplers.GENERATION not in t.system_attrs for t in one.trials)


def test_cma_es_starts_again_when_all_of_a_generation_is_known() -> None:
    """A stair: near the best trial's corner there are two losses, the lowest is far away."""
    study = optuna.create_study()
    study.enqueue_trial({"x0": 0.1, "x1": 0.1})
    for i in range(120):
        study.sampler = samplers.sampler("cmaes", 1000 * i, False)
        trial = study.ask({f"x{k}": FloatDistribution(0, 1) for k in range(2)})
        x = np.array(list(trial.params.values()))
        study.tell(trial, 0.0 if x.min() > 0.6 else 2.0 - float(x.max() < 0.5))
    assert [trial.value for trial in study.trials].count(0.0) > 0
    generations = [t.system_attrs.get(samplers.GENERATION) for t in study.trials[1:]]
    sizes = [generations.count(g) for g in range(max(generations))]  # all but the last are whole
    assert sizes[0] == 6 and 12 in sizes and set(sizes) <= {6, 12, 24, 48}
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("shared", [False, True])
def test_samplers_are_those_of_optuna_with_our_settings(shared: bool) -> None:
    tpe: Any = samplers.sampler("tpe", 5, shared)
    assert (tpe._constant_liar, tpe._multivariate, tpe._n_startup_trials) == (shared, True, 8)
    kinds = [type(samplers.sampler(n, 5, shared)).__name__ for n in ("nsgaii", "gp", "random")]
    assert kinds == ["NSGAIISampler", "GPSampler", "RandomSampler"]
    nsga: Any = samplers.sampler("nsgaii", 5, shared)
    assert nsga._population_size == 16 and isinstance(samplers.sampler("cmaes", 5, shared), CmaEs)
    assert samplers.sampler("gp", 5, shared)._n_startup_trials == 8  # type: ignore[attr-defined]


def test_a_sampler_that_repeats_itself_gets_random_company(tmp_path: Path) -> None:
    """A sampler has closed in on few plans, tokens are left: half of the trials are random then."""
    study = opened(tmp_path, sampler="tpe", prune=0)

    def kind(*columns: int) -> str:
        study.run(plan(*columns), losses([1.0, 2.0]), 10)
        return type(study.inner.sampler).__name__

    kinds = [kind(0, 0, 0) for _ in range(12)]  # the first is measured, seven repeat it
    assert kinds == ["TPESampler"] * 9 + ["RandomSampler"] * 3
    others = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)][1:]
    kinds = [kind(*columns) for columns in others[:10]]
    assert kinds[0] == "RandomSampler" and kinds[-1] == "TPESampler"


# ---------------------------------------------------------------- journals


def test_what_of_a_journal_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "j"
    good, torn, odd = b'{"a":1}\n', b'{"a":', b'{"a":\n'
    cases = [
        (b"", 0, 0), (good, 8, 8), (good + torn, 8, 8), (good + odd + good, 8, 22), (torn, 0, 0),
        (good + good, 16, 16), (b"[" * 100_000 + b"\n", 100_001, 100_001),
    ]  # fmt: skip
    for data, whole, by_its_end in cases:
        file.write_bytes(data)
        with file.open("r+b") as opened:
            assert storage._whole(opened) == whole
            assert storage._whole(opened, last=True) == by_its_end
    assert not storage.mend(file)
    file.write_bytes(good + torn)
    assert storage.mend(file) and file.read_bytes() == good and not storage.mend(file)


def operation(code: int, **more: Any) -> dict[str, Any]:
    return {"op_code": code, "worker_id": "w", **more}


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ([], "names no operation"), (operation(True), "names no operation"),
        (operation(42), "no operation 42"), ({"op_code": 1, "study_id": 0}, "worker_id is missing"),
        (operation(1), "study_id is missing"), (operation(1, study_id=True), "study_id is missing"),
        (operation(1, study_id=0, check="x"), "checksum"),
        (operation(6, trial_id=0, state=1, values=["a"]), "values are no numbers"),
        (operation(6, trial_id=0, state=1, values=[True]), "values are no numbers"),
        (operation(8, trial_id=0, user_attr={"a": 1, "b": 2}), "not one attribute"),
        (operation(9, trial_id=0, system_attr={}), "not one attribute"),
        (operation(4, study_id=0, datetime_start=None, user_attrs=[]), "attributes are no object"),
        (operation(4, study_id=0, datetime_start="x"), "ValueError"),
        (operation(0, study_name="a", directions=[7]), "ValueError"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line(log: Any, said: str) -> None:
    assert said in str(storage._fault(log))


def test_lines_that_are_as_they_were_written() -> None:
    choice = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": ["a", "b"]}})
    for log in (
        operation(0, study_name="a", directions=[1, 2]),
        operation(4, study_id=0, datetime_start=None),
        operation(6, trial_id=0, state=1, values=[1, 2.5]),
        operation(6, trial_id=0, state=3, values=None),
        operation(8, trial_id=0, user_attr={"a": [1]}),
        operation(5, trial_id=0, param_name="x", param_value_internal=1, distribution=choice),
        operation(
            4, study_id=0, datetime_start=None, params={"x": 1}, distributions={"x": choice}
        ),
    ):
        assert storage._fault(log) is None
        assert storage._fault(log | {"check": storage._check(log)}) is None
        again = storage._check({**log, "check": "other"})
        assert len(again) == 12 and again == storage._check(dict(reversed(log.items())))
        assert again != storage._check(log | {"worker_id": "v"})
    wrong = operation(5, trial_id=0, param_name="x", param_value_internal=9, distribution=choice)
    assert "IndexError" in str(storage._fault(wrong))
    queued = operation(4, study_id=0, datetime_start=None)
    for params, text in (({"x": 9}, choice), ({"y": 1}, choice), ({"x": 1}, "{}")):
        assert storage._fault(queued | {"params": params, "distributions": {"x": text}})


def test_a_journal_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=rf"journal {tmp_path}/file/j can't be opened"):
        storage.open_storage(None, tmp_path / "file" / "j")
    with pytest.raises(StorageError, match=r"Line 7 of the study's journal j .*\(odd\)\. Remove"):
        raise storage.refused("j", 7, "odd")


def test_who_is_beaten_to_the_tables_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in (
        "table x already exists",
        "DUPLICATE key",
        "UNIQUE constraint",
        "database is locked",
    ):
        assert storage._beaten(ValueError(said))
    assert not storage._beaten(ValueError("no such host"))
    asked: list[Any] = []

    def made(driver: str, **settings: Any) -> Any:
        asked.append((driver, settings["heartbeat_interval"], settings["grace_period"]))
        if len(asked) < 3:
            raise ValueError("database is locked")
        return "storage"

    monkeypatch.setattr(storage, "RDBStorage", made)
    monkeypatch.setattr(storage.time, "sleep", lambda _seconds: None)
    found: Any = storage._database("postgresql://me@host/db", 15)
    assert found == "storage" and asked == [("postgresql+psycopg://me@host/db", 15, 30)] * 3
    asked.clear()
    with pytest.raises(StorageError, match=r"database is locked\)\. Check"):
        storage._database("sqlite:///a.db", 5, tries=2)
    assert asked == [("sqlite:///a.db", 5, 10)] * 2


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 1}, {"trials": 1}, {"seconds": 0.5}, {"worker": 10**6 - 1}, {"heartbeat": 1},
        {"prune": 0.0}, {"prune": 0.999}, {"first": 1}, {"space": "exact"}, {"space": "auto"},
        {"space": "layers", "sampler": "nsgaii"}, {"space": "moves", "sampler": "cmaes"},
        {"space": "layers", "front": True}, {"space": "multipliers", "front": True, "third": "time"},
        {"space": "layers", "front": True, "third": "price", "hourly_rate": 0.01},
        {"space": "layers", "front": True, "third": "time", "hourly_rate": 2.0},
    ],
    ids=repr,
)  # fmt: skip
def test_settings_at_their_ends_are_taken(settings: dict[str, Any]) -> None:
    Search(**settings).check()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": 0}, "search.tokens is 0"), ({"trials": -1}, "search.trials"),
        ({"seconds": float("nan")}, "search.seconds"), ({"worker": 10**6}, "not 1000000"),
        ({"heartbeat": 0}, "at least 1 second, not 0"), ({"prune": 1.0}, "p-value"),
        ({"prune": -0.1}, "p-value"), ({"first": 0}, "search.first at least 1"),
        ({"space": "layers", "sampler": "gp"}, "gp can't sample"),
        ({"space": "multipliers", "front": True, "sampler": "gp"}, "not multipliers and gp"),
        ({"space": "directions", "front": True}, "not directions and tpe"),
        ({"space": "layers", "front": True, "third": "time", "hourly_rate": float("inf")}, "not inf"),
        ({"hourly_rate": 1.0}, "time, not None"),
    ],
    ids=repr,
)  # fmt: skip
def test_settings_beyond_their_ends_are_not(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Search(**settings).check()


# ---------------------------------------------------------------- problems


def test_a_problem_by_hand() -> None:
    posed = hand()
    assert posed.sizes(np.array([0, 1, 2])) == 7 and posed.losses(np.array([0, 1, 2])) == 15.5
    assert posed.order.tolist() == [0, 1, 2] and posed.largest.tolist() == [2, 2, 2]
    assert posed.fits(np.array([1, 0, 1])) and not posed.fits(np.array([1, 1, 0]))
    allowed = np.array([[True, True, False], [True, False, False], [False, True, True]])
    some = replace(posed, allowed=allowed)
    assert some.largest.tolist() == [1, 0, 2] and some.uniform(0).tolist() == [0, 0, 2]
    assert some.uniform(1).tolist() == [1, 0, 1] and some.uniform(2).tolist() == [1, 0, 2]
    assert some.allows(np.array([1, 0, 2])) and not some.allows(np.array([1, 1, 2]))
    assert posed.allows(np.array([2, 2, 2]))
    third = Third("read", np.array([[1.0, 2, 3]] * 3), 10.0)
    assert third.of(np.array([0, 1, 2])) == 16


def test_what_is_left_is_spent_where_it_gains_most_and_saved_where_it_costs_least() -> None:
    """By hand: from the smallest plan (3) to 5: group 0's first step gains 5 a byte."""
    posed = hand()
    assert exact.repaired(posed, np.zeros(3, int)).tolist() == [1, 0, 1]
    assert exact.repaired(replace(posed, limit=4.5), np.zeros(3, int)).tolist() == [1, 0, 0]
    assert exact.repaired(posed, np.array([2, 2, 2])).tolist() == [1, 0, 1]
    banned = replace(posed, allowed=np.array([[True, False, True], [True] * 3, [True] * 3]))
    found = exact.repaired(banned, np.array([1, 0, 0]))
    assert found[0] == 0 and banned.fits(found) and banned.allows(found)
    assert exact._shrunk(posed, np.array([1, 1, 0])).tolist() == [1, 0, 0]  # half a nat a byte
    start = np.array([2, 2, 2])
    exact._shrunk(posed, start)
    assert start.tolist() == [2, 2, 2]


@pytest.mark.parametrize("seed", range(6))
def test_a_random_plan_may_fill_its_budget_to_the_last_byte(seed: int) -> None:
    """The largest plan has 11; and of the smallest, 3, nothing is taken away."""
    rng = np.random.default_rng(seed)
    assert exact.random_plan(replace(hand(), limit=11.0), rng).tolist() == [2, 2, 2]
    assert exact.random_plan(replace(hand(), limit=3.0), rng).tolist() == [0, 0, 0]
    found = exact.random_plan(replace(hand(), limit=4.0), rng)
    assert hand().sizes(found) == 4 and found.tolist() in ([1, 0, 0], [0, 0, 1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_near_a_plan_the_best_of_those_that_differ_little_is_found(seed: int, most: int) -> None:
    posed = problem(seed, 5, 3, tightness=0.5)
    rows, start = np.arange(5), exact.random_plan(posed, np.random.default_rng(seed))
    every = [np.array(p) for p in product(range(3), repeat=5)]
    near = [p for p in every if (p != start).sum() <= most and posed.fits(p)]
    found = exact.solve_near(posed, start, most)
    assert (found != start).sum() <= most and posed.fits(found)
    least = min(float(posed.loss[rows, p].sum()) for p in near)
    assert posed.losses(found) <= least + 1e-3 * abs(least)


def test_bases_and_planes_by_hand() -> None:
    free = np.ones((2, 2, 2), bool)
    pairs = nested.Pairs(
        base=np.array([[4.0, 1], [4, 1]]), refined=np.array([[[4.0, 2], [1, 0.5]]] * 2),
        size=np.array([[1.0, 2], [1, 2]]), extra=np.array([[[0.0, 1], [0, 2]]] * 2), free=free,
        first=3.0, both=4.0, units=(1.0, 1.0), weight=0.0,
    )  # fmt: skip
    columns, planes = np.array([0, 1]), np.array([1, 0])
    assert pairs.sizes(columns, planes) == (3, 4) and pairs.fits(columns, planes)
    assert not pairs.fits(columns, np.array([1, 1])) and not pairs.fits(np.array([1, 1]), planes)
    found = nested.solve(pairs)[0]
    assert sorted(found.tolist()) == [0, 1]  # one larger base
    fixed = pairs.fixed(np.array([1, 0]))
    assert fixed.free[0, 1].all() and fixed.free[1, 0].all() and fixed.free.sum() == 4
    best = nested.solve(replace(fixed, weight=1.0))
    assert best[0].tolist() == [1, 0] and best[1].tolist() == [0, 1]  # two nats for a byte
    assert nested.solve(replace(fixed, weight=1.0, both=5.0))[1].tolist() == [0, 1]
    assert nested.solve(replace(fixed, weight=1.0, both=6.0))[1].tolist() == [1, 1]


# ---------------------------------------------------------------- pictures


def test_pictures_need_four_different_losses_of_one_objective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of(values: list[float]) -> optuna.Study:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        for value in values:
            trial = study.ask()
            trial.suggest_float("x", 0, 1)
            study.tell(trial, value)
        return study

    monkeypatch.setattr(pictures, "_png", lambda _plot: b"")
    assert pictures.draw(of([1.0, 2.0, 3.0])) == {} and pictures.draw(of([1.0] * 6)) == {}
    assert set(pictures.draw(of([1.0, 2.0, 3.0, 2.5]))) == {"history", "importances", "landscape"}
    two = optuna.create_study(directions=["minimize"] * 2)
    for i in range(5):
        two.tell(two.ask(), [float(i), 1.0])
    assert pictures.draw(two) == {}
