"""One model on the bench: its source, inventory, tokens, sensitivity table and measured scores,
each made once and kept under a content key. Nothing here depends on a budget.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer import sensitivity
from optimizer.config import Optimize, Quantizer
from optimizer.data import Data, Tokens, Windows
from optimizer.errors import ConfigError
from optimizer.layer import Inventory, Layer, Precision, fuse, glob
from optimizer.plan import digest
from optimizer.sensitivity import Table, Task
from optimizer.source import Source, locate
from optimizer.store import Store

if TYPE_CHECKING:
    from optimizer.meaning import Scores, Teacher
    from optimizer.model import Model

VERSION = 3  # raised when a stage's numbers change


class View:
    """What a person sees while it runs; this one shows nothing."""

    def stage(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:  # noqa: ARG002
        return items


class Bench:
    """One model with its store: everything that doesn't depend on a budget."""

    def __init__(
        self, name: str, revision: str | None, data: Data, store: str, device: str, view: View
    ) -> None:
        self.store = Store(Path(store).expanduser())
        self.view, self.data, self.device = view, data, device
        view.stage(f"finding {name}")
        self.source: Source = locate(name, self.store, revision)
        data.check(self._context())

    def _context(self) -> int | None:
        config = json.loads((self.source.folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(config.get(key), int):
                return int(config[key])
        return None

    @cached_property
    def inventory(self) -> Inventory:
        def take() -> dict[str, Any]:
            from optimizer.model import take_inventory

            return take_inventory(self.source.folder).to_json()

        key = digest(["inventory", VERSION, self.source.fingerprint])
        return Inventory.from_json(self.store.json("inventories", key, take))

    @cached_property
    def model(self) -> Model:
        from optimizer.model import Model

        self.view.stage("loading the reference")
        return Model.load(self.source.folder, self.inventory, self.device)

    @cached_property
    def tokens_key(self) -> str:
        return digest(self.data.key(self.source.fingerprint))

    @cached_property
    def tokens(self) -> Tokens:
        from optimizer import data as texts

        if self.data.source != "self":
            from optimizer.model import load_tokenizer

            return texts.cut(self.data, load_tokenizer(self.source.folder))

        def keep(name: str, make: Any) -> dict[str, np.ndarray]:
            found = self.store.arrays("tokens", digest([self.tokens_key, name]), make)
            assert found is not None
            return found

        return texts.sample(self.data, LazyModel(self), keep, self.view.track)

    def windows(self, part: str) -> Windows:
        return self.tokens[part]

    def calibration(self) -> np.ndarray:
        """Token ids [windows, length]."""
        return self.windows("calibration").ids

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        return self.view.track(items, text)

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        return {}

    def score(self, choice: Mapping[str, Precision], part: str, quantizer: Any) -> Scores:
        """The plan's scores on a part of the tokens; kept by content. Held-out: of the plan's joint
        rounding, which is what gets packed. Search: of layers rounded by themselves, whose codes
        all plans share."""
        from optimizer.meaning import Scores, Teacher

        real = {name: p.name for name, p in sorted(choice.items()) if p.kind != "none"}
        key = digest(["scores", VERSION, self.tokens_key, part, quantizer.key, real])
        found = self.store.arrays("scores", key)
        if found is None:
            # first what is kept piece by piece, so that a killed run doesn't read again for nothing
            rounder = quantizer.rounder(choice, joint=part == "heldout")
            if part not in self.teachers:
                self.teachers[part] = Teacher(self.model.net, self.windows(part), own_head=True)
            with self.model.rounded(rounder, choice):
                scores = self.teachers[part].score(self.model.net)
            found = self.store.arrays("scores", key, scores.arrays)
        assert found is not None
        return Scores(**found)


class LazyModel:
    """Stands for the bench's model, loaded at the first use: stored batches don't need it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    @property
    def net(self) -> Any:
        return self._bench.model.net


@dataclass(frozen=True)
class Choices:
    """The table's rows and columns: what may be chosen for what."""

    scope: tuple[Layer, ...]
    groups: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    fitted: dict[tuple[str, str], Precision]

    def choice(self, assignment: np.ndarray) -> dict[str, Precision]:
        """Column index per group -> precision per layer."""
        return {
            name: self.fitted[name, self.columns[column]]
            for group, column in zip(self.groups, assignment, strict=True)
            for name in group
        }


def choices(config: Optimize, inventory: Inventory) -> Choices:
    scope = inventory.scoped(config.scopes)
    palette = config.palette.precisions()
    fitted = sensitivity.palette_columns(scope, palette, config.palette.fit == "nearest")
    if config.runtime.experts not in ("tensor", "block"):
        raise ConfigError(f"runtime.experts is tensor or block, not {config.runtime.experts!r}.")
    groups = fuse(scope, config.runtime.fused, config.runtime.experts)
    return Choices(scope, groups, tuple(p.name for p in palette), fitted)


def measure_table(bench: Bench, config: Optimize, chosen: Choices) -> Table:
    """The sensitivity table, chunk by chunk from the store or made now."""
    settings = config.sensitivity
    fitted = [[chosen.fitted[g[0], c].name for c in chosen.columns] for g in chosen.groups]
    estimator = [settings.estimator, settings.chunks, settings.probes]
    quantizer = make_quantizer(config.quantizer, bench)
    key = digest(
        ["table", VERSION, bench.tokens_key, estimator, chosen.groups, chosen.columns, fitted,
         quantizer.key, config.seed]
    )  # fmt: skip
    task = Task(chosen.groups, chosen.columns, chosen.fitted, quantizer)
    runs = sensitivity.chunks(config.data.calibration.sequences, settings.chunks)
    samples = []
    todo = [i for i in range(len(runs)) if bench.store.arrays("tables", _part(key, i)) is None]
    if todo:
        quantizer.prepare(
            {name: [chosen.fitted[name, c] for c in task.columns] for name in task.layers}
        )
        _ = bench.calibration()
    for i in bench.view.track(range(len(runs)), "sensitivity") if todo else range(len(runs)):

        def make(i: int = i) -> dict[str, np.ndarray]:
            ids = bench.calibration()[runs[i]]
            seed = [config.seed, runs[i].start]
            return {"loss": settings.score(bench.model, task, ids, seed)}

        found = bench.store.arrays("tables", _part(key, i), make)
        assert found is not None
        samples.append(found["loss"])
    table = Table.from_samples(task, np.array(samples))
    return _measured_rows(bench, config, task, table, key)


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

            windows = bench.windows("calibration")
            return measured.measure(bench.model, task, windows, task.groups[i], settings.at)

        found = bench.store.arrays("tables", _part(key, ["measured", settings.at, i]), make)
        assert found is not None
        rows[i] = (found["loss"], found["stderr"])
    return table.with_rows(rows)


class LazyQuantizer:
    """A quantizer made at its first use: a finished table or score doesn't need torch."""

    def __init__(self, settings: Quantizer, material: Any) -> None:
        self._settings, self._material = settings, material

    @property
    def key(self) -> Any:
        """What determines the codes, besides weights and precisions."""
        tokens = self._material.tokens_key if self._settings.calibrated else None
        return self._settings.key(tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    @cached_property
    def _made(self) -> Any:
        settings = self._settings
        if not settings.calibrated:
            from optimizer.quantizer import Rtn

            return Rtn(clip=settings.clip)
        from optimizer.gptq import Gptq
        from optimizer.rounding import Calibrated

        method = Gptq(settings.damping, settings.order, settings.clip)
        return Calibrated(method, settings.inputs == "rounded", self._material)


def make_quantizer(settings: Quantizer, material: Any) -> Any:
    """material: the bench, or whatever has its model, tokens and store; see `rounding.Material`."""
    settings.check()
    return LazyQuantizer(settings, material)
