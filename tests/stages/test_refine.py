"""The search on the measured loss, on a real model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.commands import optimize
from optimizer.config import Optimize
from optimizer.data.text import Part
from optimizer.errors import ConfigError, StorageError
from optimizer.metrics import divergence
from optimizer.models.source import Source
from optimizer.plan import Budget
from optimizer.quantization.methods import Gptq, bind
from optimizer.search import SPACES, Search
from optimizer.sensitivity import slope
from optimizer.stages import refine, studies
from optimizer.stages.beside import Beside, confirming
from optimizer.stages.prefix import Shortcut
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from tests.commands.test_optimize import SHORT, Seen, settings

TOKENS = 4000


def searched(source: Source, store: Path, **changes: Any) -> Optimize:
    search = Search(**{"space": "moves", "tokens": TOKENS, **changes.pop("search", {})})
    config = settings(source, store, budget=Budget(bits=3.6), search=search, **changes)
    config.data.search = Part(sequences=12, length=32)
    return config


@pytest.mark.parametrize(
    "space", [pytest.param(s, marks=[] if s == "moves" else pytest.mark.slow) for s in SPACES]
)
def test_a_searched_plan_fits_and_the_second_run_measures_nothing(
    source: Source, tmp_path: Path, space: str
) -> None:
    config = searched(source, tmp_path / "s", search={"space": space})
    first = optimize.optimize(config, tmp_path / "one")
    assert first.plan.effective_bits <= 3.6
    note = next(n for n in first.notes if n.startswith("The search measured"))
    start, choice = re.findall(r"\d+\.\d+", note)
    assert float(choice) <= float(start)
    again = optimize.optimize(config, tmp_path / "two", Seen())
    assert again.plan == first.plan and note in again.notes


@pytest.mark.slow
def test_a_search_on_disk_measures_windows_together_and_finds_the_same(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    own = Shortcut.windows

    def seen(self: Shortcut, some: range, *rest: Any) -> list[float]:
        sizes.append(len(some))
        return own(self, some, *rest)

    monkeypatch.setattr(Shortcut, "windows", seen)
    found = []
    for place in ("none", "disk"):
        sizes.clear()
        config = searched(source, tmp_path / place, offload=place)
        done = optimize.optimize(config, tmp_path / f"run {place}")
        note = next(n for n in done.notes if n.startswith("The search measured"))
        found.append((done.plan.choice, note))
        tried = sizes[:-4]  # not the plans that are confirmed, four at most
        assert (max(tried) > 1) == (place == "disk")
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_search_works_with_gptq(source: Source, tmp_path: Path) -> None:
    config = searched(source, tmp_path / "s", quantizer=Gptq())
    assert optimize.optimize(config, tmp_path / "r").plan.effective_bits <= 3.6


@pytest.mark.slow
def test_the_best_are_confirmed_as_they_would_be_packed(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials share codes of layers by themselves; the choice is made with codes that were made one
    block after the other."""
    found: list[tuple[Any, refine.Refined]] = []
    own = refine.refine

    def told(prepared: Any, *args: Any) -> refine.Refined:
        found.append(((prepared, *args), own(prepared, *args)))
        return found[-1][1]

    monkeypatch.setattr(refine, "refine", told)
    config = searched(
        source, tmp_path / "s", quantizer=Gptq(inputs="rounded"), search={"tokens": 1500}
    )
    optimize.optimize(config, tmp_path / "r")
    (prepared, problem, start, _), refined = found[0]
    session, choice = prepared.session, prepared.space.choice(refined.assignment)
    rest = confirming(studies.tried_on(config.search, 12, 32, problem.losses(start)), 12)
    quantizer = bind(config.quantizer, session)
    teacher = divergence.teacher(session.model, session.windows("search"))
    measured = []
    for rounder in (quantizer.rounder(choice), quantizer.rounder(choice, joint=False)):
        with session.model.rounded(rounder, choice):
            measured.append(np.mean([teacher.window(session.model.net, w) for w in rest]))
    assert refined.confirmed["choice"] == pytest.approx(measured[0], rel=1e-5)
    assert abs(measured[1] / measured[0] - 1) > 1e-3


def test_a_database_that_cannot_be_reached_is_told_before_a_model_is_looked_for(
    tmp_path: Path,
) -> None:
    search = Search(storage="postgresql://me:secret@127.0.0.1:9/none")
    config = Optimize(model="/no/such/model", budget=Budget(bits=4), search=search)
    config.store = str(tmp_path)
    with pytest.raises(StorageError, match="can't be used") as caught:
        optimize.optimize(config, tmp_path / "r")
    assert "secret" not in str(caught.value)
    assert search.storage == "postgresql://me:***@127.0.0.1:9/none"


@pytest.mark.slow
def test_a_search_ends_when_there_is_nothing_new_to_measure(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that leaves hardly any choice: all plans are soon known, and tokens are left."""
    monkeypatch.setattr(refine, "EXHAUSTED", 8)
    search = {"space": "multipliers", "tokens": 10**7}
    config = searched(source, tmp_path / "s", search=search)
    config.policy.pins = ["*mlp* = int3_g64", *(f"*{k}_proj* = int3_g64" for k in "kvo")]
    found = optimize.optimize(config, tmp_path / "r")
    assert found.plan.layers


def test_too_few_windows_are_refused(source: Source, tmp_path: Path) -> None:
    config = searched(source, tmp_path / "s")
    config.data.search = Part(sequences=3, length=32)
    with pytest.raises(ConfigError, match="at least 4 search windows"):
        optimize.optimize(config, tmp_path / "r")


def test_windows_of_trials_grow_with_the_tokens_and_where_little_is_lost() -> None:
    tokens = (500, 60_000, 240_000)
    used = {
        loss: [studies.tried_on(Search(tokens=t), 1000, 128, loss) for t in tokens]
        for loss in (2.0, 0.25, 0.2, 0.0625, 0.0)
    }
    assert used[2.0] == used[0.25] == [2, 16, 16]
    assert used[0.2] == [2, 20, 20]
    assert used[0.0625] == used[0.0] == [2, 30, 61]
    assert studies.tried_on(Search(tokens=10**7), 64, 128, 0.0) == 48  # a quarter confirms


@pytest.mark.parametrize(
    ("windows", "used", "confirm"),
    [(64, 30, 30), (64, 48, 16), (192, 60, 60), (64, 16, 32), (40, 10, 20), (12, 6, 6)],
)
def test_what_confirms_a_choice_was_read_by_nothing_before(
    windows: int, used: int, confirm: int
) -> None:
    rest = confirming(used, windows)
    assert rest.stop == windows and used <= rest.start and len(rest) == confirm


@pytest.mark.slow
def test_slopes_read_what_no_trial_reads_and_nothing_that_confirms(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[int] = set()
    whole = slope.slopes

    def spy(model: Any, task: Any, teacher: Any, parts: Any, beside: Any) -> Any:
        read.update(int(w) for part in parts for w in part)
        return whole(model, task, teacher, parts, beside)

    monkeypatch.setattr(slope, "slopes", spy)
    config = searched(source, tmp_path / "s", search={"tokens": 2500})
    config.data.search = Part(sequences=40, length=32)
    used = studies.tried_on(config.search, 40, 32, 0.0)
    optimize.optimize(config, tmp_path / "r")
    assert used < max(read) < confirming(used, 40).start


def test_the_slope_is_the_losss_derivative(source: Source, tmp_path: Path) -> None:
    """A tiny step of one layer towards another precision changes the mean KL by the slope."""
    import torch

    from optimizer.metrics.divergence import Teacher
    from optimizer.sensitivity import Task

    config = settings(source, tmp_path / "s", budget=Budget(bits=3.6))
    table = Session.open(config.model, config.data, config.store)
    space = search_space(config, table.inventory)
    quantizer = bind(config.quantizer, table)
    task = Task(space.groups, space.columns, space.fitted, quantizer)
    teacher = Teacher(table.model.net, table.windows("search"))
    low, high = space.columns.index("int3_g64"), space.columns.index("int8_g64")
    choice = space.choice(np.full(len(space.groups), low))
    windows = np.arange(SHORT.sequences)
    with table.model.rounded(quantizer, choice):
        parts = [windows[::2], windows[1::2]]
        found = slope.slopes(table.model, task, teacher, parts).mean(0)
    group = 5
    (name,) = space.groups[group]
    weight = table.model.weight(name).clone()
    with table.model.rounded(quantizer, choice):
        live = table.model.net.get_parameter(table.model.layers[name].parameter)
        before, step = live.detach().clone(), 1e-2
        goal = quantizer.round(weight, space.fitted[name, space.columns[high]], name)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                live.copy_(before + sign * step * (goal - before))
            values.append(np.mean([teacher.window(table.model.net, int(w)) for w in windows]))
        with torch.no_grad():
            live.copy_(before)
    expected = (values[0] - values[1]) / (2 * step)
    assert found[group, high] - found[group, low] == pytest.approx(expected, rel=0.05, abs=1e-5)


def test_a_study_is_named_by_what_its_workers_share(source: Source, tmp_path: Path) -> None:
    config = searched(source, tmp_path / "s")
    table = Session.open(config.model, config.data, config.store)
    space = search_space(config, table.inventory)
    blank = np.zeros((len(space.groups), len(space.columns)))
    beside = Beside(table, config, space, 8)

    def name(bits: float, used: int = 8) -> str:
        config.budget = Budget(bits=bits)
        posed = optimize._pose(config, table.inventory, space, blank)
        return studies.name(table, config, posed, beside, used)

    assert name(4) == name(4) != name(5)
    assert name(4) != name(4, used=9)


def test_trials_that_another_worker_ends_meanwhile_are_told_the_next_time(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    own = refine.Scout.tell

    def tell(scout: refine.Scout) -> None:
        every, asked = scout.study.tried, list[int]()

        def tried() -> Any:
            """One trial more each time that it is asked."""
            asked.append(len(asked) + 1)
            return every()[: scout.told + asked[-1]]

        with monkeypatch.context() as patched:
            patched.setattr(scout.study, "tried", tried)
            own(scout)
        told.append(scout.told)

    monkeypatch.setattr(refine.Scout, "tell", tell)
    config = searched(source, tmp_path / "s", search={"space": "moves", "tokens": 3000})
    optimize.optimize(config, tmp_path / "r")
    assert told[:3] == [1, 2, 3]


def test_a_front_is_searched_around_the_budget(source: Source, tmp_path: Path) -> None:
    search = {"space": "multipliers", "front": True, "sampler": "nsgaii", "tokens": 5000}
    config = searched(source, tmp_path / "s", search=search)
    found = optimize.optimize(config, tmp_path / "r")
    assert found.plan.effective_bits <= 3.6
    rows = [row for row in found.measured if row.name.startswith("searched")]
    assert len(rows) > 3
    sizes = [row.bits for row in rows]
    assert sizes == sorted(sizes) and sizes[0] < 3.6 < sizes[-1]
    assert all(3.6 * 0.75 - 0.1 <= size <= 3.6 * 4 / 3 + 1e-6 for size in sizes)
    lines = (tmp_path / "r" / "search.csv").read_text().splitlines()
    column = lines[0].split(",").index("hypervolume")
    volumes = [float(line.split(",")[column]) for line in lines[1:]]
    assert volumes == sorted(volumes) and volumes[-1] > 0
    assert any("hypervolume" in note for note in found.notes)
    again = optimize.optimize(config, tmp_path / "again", Seen())
    assert again.plan == found.plan


@pytest.mark.slow
def test_time_and_price_are_objectives_of_a_front(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 bits are made slow: the front offers plans that avoid them, as files of their own, and the
    page, the record's table and the comparison know what a token takes."""
    from optimizer.plan import Plan
    from optimizer.reports.html import compare
    from optimizer.stages import latency

    monkeypatch.setattr(
        latency,
        "_measure",
        lambda _session, _space, todo, _batch: {
            "layers": np.array([1.0 if "int5" in kind[3] else 0.001 for kind in todo]),
            "outside": np.array(0.5),
        },
    )
    search = {"space": "multipliers", "front": True, "sampler": "nsgaii", "tokens": 5000,
              "third": "price", "hourly_rate": 3.6}  # fmt: skip
    config = searched(source, tmp_path / "s", search=search)
    found = optimize.optimize(config, tmp_path / "sweep" / "r")
    run = found.run
    front = [point for point in run.measured if point.name.startswith("searched")]
    fives = [list(Plan.load(tmp_path / "sweep/r/front" / f"searched-{i}.json").layers.values())
             .count("int5_g64") for i in range(len(front))]  # fmt: skip
    rest = [0.001 * (len(run.groups) - five) for five in fives]
    assert [p.seconds for p in front] == pytest.approx(
        [0.5 + five + slow for five, slow in zip(fives, rest, strict=True)]
    )
    assert min(fives) == 0 < max(fives)
    own = next(point for point in run.measured if point.name == "plan")
    assert run.chosen.id == own.id == found.plan.id and run.chosen.measured == own.measured
    assert run.price(front[0]) == pytest.approx(1000 * front[0].seconds)
    header, first = (tmp_path / "sweep/r/search.csv").read_text().splitlines()[:2]
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert float(row["price"]) >= 1000 * 0.5
    text = (tmp_path / "sweep/r/report.html").read_text()
    assert "Speed against loss" in text and "price of a million tokens" in text
    assert "a million cost" in compare.write(tmp_path / "sweep").read_text()
