"""The sensitivity table of a model's choices, made chunk by chunk and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from optimizer import sensitivity
from optimizer.config import Optimize
from optimizer.data.text import Windows
from optimizer.errors import ConfigError
from optimizer.plan import digest, glob
from optimizer.quantization.methods import Rtn, bind
from optimizer.sensitivity import Table, Task
from optimizer.stages.keys import TableKey
from optimizer.stages.session import Bench, Choices

SO_FAR = 2  # version of what a killed run leaves


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


def read_for(bench: Bench, config: Optimize) -> Windows:
    """No more of them than calibration windows."""
    return bench.windows(read_part(config)).head(bench.data.calibration.sequences)


@dataclass(frozen=True)
class Kept(sensitivity.Desk):
    """A desk in the store."""

    bench: Bench
    key: str

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        return self.bench.view.track(items, text)

    def show(self, layers: int, of: int, tokens: int) -> None:
        self.bench.view.row("table", {"layers": layers, "layers of all": of, "tokens": tokens})

    def leave(self, state: dict[str, np.ndarray]) -> None:
        self.clear()
        self.bench.store.arrays("tables", self.key, lambda: state)

    def left(self) -> dict[str, np.ndarray] | None:
        return self.bench.store.arrays("tables", self.key)

    def clear(self) -> None:
        self.bench.store.path("tables", self.key, ".safetensors").unlink(missing_ok=True)


def measure_table(
    bench: Bench, config: Optimize, chosen: Choices, reading: Reading | None = None
) -> Table:
    """The sensitivity table in nats of mean KL, chunk by chunk from the store or made now."""
    settings = config.sensitivity
    if settings.estimator == "gain":
        return _foretold(bench, config, chosen, reading)
    fitted = [[chosen.fitted[g[0], c].name for c in chosen.columns] for g in chosen.groups]
    windows = read_for(bench, config)
    if reading is None and settings.windows is not None:
        windows = windows.spread(settings.windows)
    quantizer = bind(config.quantizer, bench)
    key = TableKey(
        windows=bench.key_of(windows),
        estimator=settings.key,
        groups=chosen.groups,
        columns=chosen.columns,
        fitted=fitted,
        quantizer=quantizer.key,
        seed=config.seed,
        reading=None if reading is None else reading.key,
    ).text
    task = Task(chosen.groups, chosen.columns, chosen.fitted, quantizer)
    read = reading or Reading(None, windows.ids)
    runs = sensitivity.chunks(len(read.ids), min(settings.chunks, len(read.ids)))
    samples = []
    todo = [i for i in range(len(runs)) if bench.store.arrays("tables", _part(key, i)) is None]
    if todo:
        quantizer.prepare(
            {name: [chosen.fitted[name, c] for c in task.columns] for name in task.layers}
        )
    weights = read.weights() if todo and read.weights is not None else None
    if todo:
        text = sensitivity.Text(read.ids, runs, config.seed, weights)
        desk = Kept(bench, digest([key, "so far", SO_FAR]))
        whole = settings.samples(bench.model, task, text, desk)
        for i in range(0 if whole is None else len(runs)):
            bench.store.arrays("tables", _part(key, i), lambda i=i: {"loss": whole[i]})  # type: ignore
        todo = todo if whole is None else []
        desk.clear()
    for i in bench.view.track(range(len(runs)), "sensitivity") if todo else range(len(runs)):

        def make(i: int = i) -> dict[str, np.ndarray]:
            seed = [config.seed, runs[i].start]
            own = None if weights is None else weights[runs[i]]
            return {"loss": settings.score(bench.model, task, read.ids[runs[i]], seed, own)}

        found = bench.store.arrays("tables", _part(key, i), make)
        assert found is not None
        samples.append(found["loss"])
        if todo:
            read_so_far = len(read.ids[: runs[i].stop]) * read.ids.shape[1]
            Kept(bench, "").show(len(task.layers), len(task.layers), read_so_far)
    kept = Table.typical(np.array(samples))
    if not kept.all():
        totals = np.sum(samples, (1, 2))
        bench.view.note(
            f"{(~kept).sum()} of {len(kept)} parts of a text are left out of its table: their "
            f"gradients say {totals.max() / np.median(totals):.0f} times the others' loss, which "
            "no rounding has."
        )
    table = Table.from_samples(task, np.array(samples)[kept])
    return table if reading else _measured_rows(bench, config, task, table, key)


def _foretold(bench: Bench, config: Optimize, chosen: Choices, reading: Reading | None) -> Table:
    """The diagonal table of rounding to nearest, times what GPTQ gains in each group. Layers of a
    group that read the same inputs gain the same; else the mean is taken."""
    quantizer = bind(config.quantizer, bench)
    nearest = replace(
        config,
        quantizer=Rtn(clip=config.quantizer.clip),
        sensitivity=sensitivity.Fisher(
            chunks=config.sensitivity.chunks,
            windows=config.sensitivity.windows,
            measured=config.sensitivity.measured,
        ),
    )
    table = measure_table(bench, nearest, chosen, reading)
    gains = quantizer.gains([name for group in chosen.groups for name in group])
    return table.scaled(np.array([np.mean([gains[n] for n in g]) for g in chosen.groups]))


def _part(key: str, index: Any) -> str:
    return digest([key, index])


def _measured_rows(bench: Bench, config: Optimize, task: Task, table: Table, key: str) -> Table:
    settings = config.sensitivity.measured
    if not settings.groups:
        return table
    if settings.at != "reference" and settings.at not in task.columns:
        raise ConfigError(
            "sensitivity.measured.at is reference or a precision of the palette "
            f"({', '.join(task.columns)}), not {settings.at!r}."
        )
    wanted = [
        i
        for i, group in enumerate(task.groups)
        if any(glob(p).fullmatch(name) for p in settings.groups for name in group)
    ]
    if not wanted:
        raise ConfigError(f"sensitivity.measured.groups={settings.groups} matches no layer.")
    rows = {}
    for i in bench.view.track(wanted, "measuring single groups"):

        def make(i: int = i) -> dict[str, np.ndarray]:
            from optimizer.sensitivity import measured

            windows = read_for(bench, config)
            return measured.measure(bench.model, task, windows, task.groups[i], settings.at)

        found = bench.store.arrays("tables", _part(key, ["measured", settings.at, i]), make)
        assert found is not None
        rows[i] = (found["loss"], found["stderr"])
    return table.with_rows(rows)
