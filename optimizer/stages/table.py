"""The sensitivity table of a model's choices, made chunk by chunk and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from optimizer import sensitivity
from optimizer.config import Optimize
from optimizer.data.text import Windows
from optimizer.errors import ConfigError
from optimizer.plan import digest, glob
from optimizer.quantization.methods import Rtn, bind
from optimizer.sensitivity import Table, Task, Text
from optimizer.stages.keys import TableKey
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace

SO_FAR = 3  # version of what a killed run leaves
FELT = 1e-7  # nats per token that are no float error


@dataclass(frozen=True)
class Reading:
    """Another text than the calibration windows for a table, or the same with weighted tokens.

    key: what determines it. ids [windows, length]. weights: makes those of its tokens, of that shape.
    """

    key: Any
    ids: np.ndarray
    weights: Callable[[], np.ndarray] | None = None


def read_part(config: Optimize) -> str:
    """On which part of the tokens a table is measured. Rounding that was fitted to the calibration
    windows loses less on them than elsewhere (GPTQ on SmolLM2: half as much, and the layers with the
    most columns least), so its table reads search windows; a foretold gain rounds nothing."""
    fitted = config.quantizer.calibrated and config.sensitivity.estimator != "gain"
    return "search" if fitted else "calibration"


def read_for(session: Session, config: Optimize) -> Windows:
    """No more of them than calibration windows."""
    return session.windows(read_part(config)).head(session.data.calibration.sequences)


@dataclass(frozen=True)
class Kept(sensitivity.Desk):
    """A desk in the store."""

    session: Session
    key: str

    def meter(self, text: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
        return self.session.view.meter(text, total)

    def note(self, text: str) -> None:
        self.session.view.note(text)

    def show(self, layers: int, of: int, tokens: int) -> None:
        self.session.view.row("table", {"layers": layers, "layers of all": of, "tokens": tokens})

    def leave(self, state: dict[str, np.ndarray]) -> None:
        self.clear()
        self.session.store.arrays("tables", self.key, lambda: state)

    def left(self) -> dict[str, np.ndarray] | None:
        return self.session.store.arrays("tables", self.key)

    def clear(self) -> None:
        self.session.store.path("tables", self.key, ".safetensors").unlink(missing_ok=True)


def measure_table(
    session: Session, config: Optimize, space: SearchSpace, reading: Reading | None = None
) -> Table:
    """The sensitivity table in nats of mean KL, chunk by chunk from the store or made now."""
    settings = config.sensitivity
    if settings.estimator == "gain":
        return _foretold(session, config, space, reading)
    fitted = [[space.fitted[g[0], c].name for c in space.columns] for g in space.groups]
    windows = read_for(session, config)
    if reading is None and settings.windows is not None:
        windows = windows.spread(settings.windows)
    quantizer = bind(config.quantizer, session)
    key = TableKey(
        windows=session.guide_key(windows),
        estimator=settings.key,
        groups=space.groups,
        columns=space.columns,
        fitted=fitted,
        quantizer=quantizer.key,
        seed=config.seed,
        reading=None if reading is None else reading.key,
    ).text
    task = Task(space.groups, space.columns, space.fitted, quantizer)
    read = reading or Reading(None, windows.ids)
    runs = sensitivity.chunks(len(read.ids), min(settings.chunks, len(read.ids)))
    samples = []
    todo = [i for i in range(len(runs)) if session.store.arrays("tables", _part(key, i)) is None]
    if todo:
        quantizer.prepare(
            {name: [space.fitted[name, c] for c in task.columns] for name in task.layers}
        )
    weights = read.weights() if todo and read.weights is not None else None
    text = sensitivity.Text(read.ids, runs, config.seed, weights)
    if session.processes.of > 1:
        _spread(session, settings, task, text, key)
        todo = []
    if todo:
        desk = Kept(session, digest([key, "so far", SO_FAR]))
        whole = settings.samples(session.model, task, text, desk)
        for i in range(0 if whole is None else len(runs)):
            session.store.arrays("tables", _part(key, i), lambda i=i: {"loss": whole[i]})  # type: ignore
        todo = todo if whole is None else []
        desk.clear()
    for i in session.view.track(range(len(runs)), "sensitivity") if todo else range(len(runs)):

        def make(i: int = i) -> dict[str, np.ndarray]:
            return {"loss": _score(session, settings, task, text, i)}

        found = session.store.arrays("tables", _part(key, i), make)
        assert found is not None
        samples.append(found["loss"])
        if todo:
            read_so_far = len(read.ids[: runs[i].stop]) * read.ids.shape[1]
            Kept(session, "").show(len(task.layers), len(task.layers), read_so_far)
    kept = Table.typical(np.array(samples))
    if not kept.all():
        totals = np.sum(samples, (1, 2))
        session.view.note(
            f"{(~kept).sum()} of {len(kept)} parts of a text are left out of its table: their "
            f"gradients say {totals.max() / np.median(totals):.0f} times the others' loss, which "
            "no rounding has."
        )
    table = Table.from_samples(task, np.array(samples)[kept])
    return table if reading else _measured_rows(session, config, task, table, key)


def _foretold(
    session: Session, config: Optimize, space: SearchSpace, reading: Reading | None
) -> Table:
    """The diagonal table of rounding to nearest, times what GPTQ gains in each group. Layers of a
    group that read the same inputs gain the same; else the mean is taken."""
    quantizer = bind(config.quantizer, session)
    nearest = replace(
        config,
        quantizer=Rtn(clip=config.quantizer.clip),
        sensitivity=sensitivity.Fisher(
            chunks=config.sensitivity.chunks,
            windows=config.sensitivity.windows,
            measured=config.sensitivity.measured,
        ),
    )
    table = measure_table(session, nearest, space, reading)
    gains = quantizer.gains([name for group in space.groups for name in group])
    return table.scaled(np.array([np.mean([gains[n] for n in g]) for g in space.groups]))


def _score(
    session: Session, settings: sensitivity.Estimator, task: Task, text: Text, chunk: int
) -> np.ndarray:
    """One chunk's losses [groups, precisions]."""
    run = text.runs[chunk]
    own = None if text.weights is None else text.weights[run]
    return settings.score(session.model, task, text.ids[run], text.seed_of(chunk), own)


def _spread(
    session: Session, settings: sensitivity.Estimator, task: Task, text: Text, key: str
) -> None:
    """Have every chunk in the store: each process measures some of those that one of them lacks."""
    processes, store = session.processes, session.store
    chunks = len(text.runs)

    def lacking() -> np.ndarray:
        return np.array([store.arrays("tables", _part(key, i)) is None for i in range(chunks)])

    processes.agree(lambda: None, lambda _: {"text": key})
    lacked = np.flatnonzero(np.sum(processes.everyones(lacking), 0)).tolist()
    own = processes.share(chunks)
    mine = [i for i in lacked if i in own]
    if lacked and processes.of > chunks:
        session.view.note(
            f"A table of sensitivity.chunks={chunks} is spread over as many processes; "
            f"{processes.of - chunks} have nothing to do."
        )

    def measured() -> np.ndarray:
        missing = [i for i in mine if store.arrays("tables", _part(key, i)) is None]
        whole: dict[int, np.ndarray] = {}
        if missing:
            desk = Kept(session, digest([key, "so far", SO_FAR, missing]))
            together = settings.samples(session.model, task, text.part(missing), desk)
            whole = {} if together is None else dict(zip(missing, together, strict=True))
            steps = missing if together is not None else session.view.track(missing, "sensitivity")
            for i in steps:

                def make(i: int = i) -> dict[str, np.ndarray]:
                    known = whole.get(i)
                    return {
                        "loss": _score(session, settings, task, text, i)
                        if known is None
                        else known
                    }

                store.arrays("tables", _part(key, i), make)
            desk.clear()
        found = [np.zeros((0, len(task.groups), len(task.columns)))]
        for i in mine:
            entry = store.arrays("tables", _part(key, i))
            assert entry is not None
            found.append(entry["loss"][None])
        return np.concatenate(found)

    every = np.concatenate(processes.everyones(measured))
    for i, loss in zip(lacked, every, strict=True):
        store.arrays("tables", _part(key, i), partial(dict, loss=loss))


def _part(key: str, index: Any) -> str:
    return digest([key, index])


def _measured_rows(
    session: Session, config: Optimize, task: Task, table: Table, key: str
) -> Table:
    settings = config.sensitivity.measured
    if settings.groups and settings.at != "reference" and settings.at not in task.columns:
        raise ConfigError(
            "sensitivity.measured.at is reference or a precision of the palette "
            f"({', '.join(task.columns)}), not {settings.at!r}."
        )
    wanted = [
        i
        for i, group in enumerate(task.groups)
        if any(glob(p).fullmatch(name) for p in settings.groups for name in group)
    ]
    if settings.groups and not wanted:
        raise ConfigError(f"sensitivity.measured.groups={settings.groups} matches no layer.")
    silent = [i for i in _silent(session, task, table) if i not in wanted]
    rows = _measured(session, config, task, key, settings.at, wanted)
    found = _measured(session, config, task, key, "reference", silent)
    reached = [task.groups[i][0] for i, (loss, _) in found.items() if loss.max() > FELT]
    if reached:
        session.view.note(
            f"No gradient reaches {reached[0]}"
            + f" and {len(reached) - 1} more" * (len(reached) > 1)
            + ", on which the predictions depend all the same: what rounding costs there was measured."
        )
    return table.with_rows(rows | found) if rows or found else table


def _silent(session: Session, task: Task, table: Table) -> list[int]:
    """Groups that cost nothing in any precision by gradients. Experts that no token visits are so; of
    other layers the model may cut the gradient (Marian computes positions so), not the dependence."""
    experts = {x.name for x in session.inventory.layers if x.expert is not None}
    return [
        i
        for i, group in enumerate(task.groups)
        if not table.samples[:, i].any()
        and experts.isdisjoint(group)
        and any(task.fitted[x, c].kind != "none" for x in group for c in task.columns)
    ]


def _measured(
    session: Session, config: Optimize, task: Task, key: str, at: str, wanted: Sequence[int]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Group -> (loss, stderr) [precisions], measured one group at a time."""
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if not wanted:
        return rows
    for i in session.view.track(wanted, "measuring single groups"):

        def make(i: int = i) -> dict[str, np.ndarray]:
            from optimizer.sensitivity import measured

            windows = read_for(session, config)
            return measured.measure(session.model, task, windows, task.groups[i], at)

        found = session.store.arrays("tables", _part(key, ["measured", at, i]), make)
        assert found is not None
        rows[i] = (found["loss"], found["stderr"])
    return rows
