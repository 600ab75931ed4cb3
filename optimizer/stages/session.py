"""One model on the bench: its source, inventory, tokens, sensitivity table and measured scores,
each made once and kept under a content key. Nothing here depends on a budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer import sensitivity
from optimizer.config import Optimize
from optimizer.data.text import Data, Tokens, Windows
from optimizer.errors import ConfigError, ModelError, TextError
from optimizer.formats import registry
from optimizer.formats.rules import Demands
from optimizer.formats.runtime import Runtime
from optimizer.models.residence import Residence
from optimizer.models.source import (
    Source,
    context_length,
    is_encoder,
    locate,
    read_config,
)
from optimizer.plan import Inventory, Layer, Policy, Precision, digest, policy
from optimizer.plan.cache import WHOLE, CacheKind
from optimizer.plan.pins import translated
from optimizer.stages.keys import BundledKey, ChainKey, InventoryKey, ScoresKey, TokensKey
from optimizer.store import Store

if TYPE_CHECKING:
    from optimizer.formats.gguf.base import Base
    from optimizer.metrics.divergence import AnyScores, AnyTeacher
    from optimizer.models.model import Model

CHECK_WINDOWS = 8


class View:
    """What a person sees while it runs; this one shows nothing."""

    def expect(self, stages: Mapping[str, float]) -> None:
        """A run's stages in order, with what each costs in a unit of their own."""

    def enter(self, stage: str) -> None:
        """One of the expected stages begins."""

    def stage(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:  # noqa: ARG002
        return items

    @contextmanager
    def meter(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:  # noqa: ARG002
        """Progress of something that isn't a list: call the yielded (done so far, news)."""
        yield lambda _done, _news: None

    def begin(self, key: str, model: str, config: Mapping[str, Any]) -> None:
        """A run's question is known: its content key, its model's name and its settings."""

    def row(self, kind: str, values: Mapping[str, Any]) -> None:
        """Numbers of one moment: of a trial that ended, or of a table that grows."""

    def plans(self, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        """kind -> (bytes, loss) of plans that are known now."""


@dataclass(frozen=True)
class Kept:
    """How plans keep keys and values while they are measured. tried: what each cache gave, where
    several were."""

    kind: CacheKind = WHOLE
    tried: tuple[dict[str, Any], ...] = ()


def check_device(name: str) -> None:
    """Raises ConfigError for a device that PyTorch can't use here. For cpu it isn't loaded."""
    if name == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"device is cpu, cuda, cuda:1 or another that PyTorch can use on this machine, not "
            f"{name!r} ({reason})."
        ) from None


class Bench:
    """One model with its store: everything that doesn't depend on a budget."""

    def __init__(
        self,
        name: str,
        revision: str | None,
        data: Data,
        store: str,
        device: str,
        view: View,
        residence: Residence | None = None,
    ) -> None:
        self.store, self.residence = Store.open(store, view.note), residence or Residence()
        self.view, self.data, self.device = view, data, device
        self.cache = Kept()
        check_device(device)
        view.stage(f"finding {name}")
        self.source: Source = locate(name, self.store, revision)
        data.check(context_length(self.source.folder))

    @cached_property
    def encoder(self) -> bool:
        """Whether the model embeds texts, see `optimizer.metrics.embeddings`; else it is a language
        model."""
        return is_encoder(self.source.folder)

    def geometry(self) -> dict[str, Any]:
        """For `mezzotint fit`; empty where the memory model doesn't know the architecture."""
        from optimizer.hardware.geometry import geometry

        try:
            found: dict[str, Any] = {} if self.encoder else asdict(geometry(self.config))
        except ModelError:
            return {}
        return dict(json.loads(json.dumps(found)))  # as it reads in plan.json: lists, no tuples

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return read_config(self.source.folder)

    @cached_property
    def inventory(self) -> Inventory:
        def take() -> dict[str, Any]:
            from optimizer.models.model import take_inventory

            return take_inventory(self.source.folder).to_json()

        key = InventoryKey(self.source.fingerprint).text
        return Inventory.from_json(self.store.json("inventories", key, take))

    @cached_property
    def model(self) -> Model:
        from optimizer.models.model import Model

        where = self.residence.settled(self.inventory)
        self.view.stage("loading the reference")
        if where == "disk":
            self.view.note("The model's blocks stay on disk, and are read for each pass.")
        return Model.load(self.source.folder, self.inventory, self.device, offload=where)

    @cached_property
    def tokens_key(self) -> str:
        return digest(self.data.key(self.source.fingerprint))

    @cached_property
    def tokens(self) -> Tokens:
        from optimizer.data import text as texts

        def keep(name: str, make: Any) -> dict[str, np.ndarray]:
            key = TokensKey(texts.VERSION, self.source.fingerprint, name).text
            found = self.store.arrays("tokens", key, make)
            assert found is not None
            return found

        def cut() -> dict[str, np.ndarray]:
            from optimizer.models.tokenizer import load_tokenizer

            said: list[str] = []
            parts = texts.cut(self.data, load_tokenizer(self.source.folder), said.append)
            found = {
                f"{name}.{k}": v
                for name, w in parts.items()
                for k, v in (("ids", w.ids), ("documents", w.documents))
            }
            return found | {"said": np.frombuffer("\n".join(said).encode(), np.uint8)}

        if self.encoder:
            return self._texts(keep)
        if self.data.source == "bundled":
            if self.bundled is not None:
                return self.bundled
        elif self.data.source != "self":
            kept = keep(self.tokens_key, cut)
            if "said" in kept and kept["said"].size:
                self.view.note(kept["said"].tobytes().decode())
            return {
                name: Windows(kept[f"{name}.ids"], kept[f"{name}.documents"])
                for name in self.data.parts
            }

        return texts.sample(self.data, LazyModel(self), keep, self.view.track)

    @cached_property
    def bundled(self) -> Tokens | None:
        """The texts that come with the program; None, with a word, where the model can't read them,
        or where there are fewer than a part asks for by default."""
        from optimizer.data import domains

        def cut() -> dict[str, Any]:
            from optimizer.models.tokenizer import load_tokenizer

            try:
                parts = domains.bundled(self.data, load_tokenizer(self.source.folder))
            except (ModelError, TextError) as error:
                return {"why": str(error)}
            return {
                name: {
                    "ids": w.ids.tolist(),
                    "documents": w.documents.tolist(),
                    "domains": w.domains,
                }
                for name, w in parts.items()
            }

        key = BundledKey(domains.VERSION, domains.content(), self.tokens_key).text
        kept = self.store.json("tokens", key, cut)
        if "why" in kept:
            self.view.note(f"{kept['why']} So text is sampled from the model instead.")
            return None
        return {
            name: Windows(
                np.array(w["ids"], np.int64),
                np.array(w["documents"], np.int64),
                tuple(w["domains"]),
            )
            for name, w in kept.items()
        }

    def _texts(self, keep: Callable[[str, Any], dict[str, np.ndarray]]) -> Tokens:
        """Batches of texts for an encoder, and a word on those that were left out or cut."""
        from optimizer.data import short_texts as texts

        def cut() -> dict[str, np.ndarray]:
            from optimizer.models.tokenizer import load_tokenizer

            found = texts.cut(self.data, load_tokenizer(self.source.folder))
            ids = {name: windows.ids for name, windows in found.parts.items()}
            return ids | {"news": np.array([found.texts, found.shortened, found.skipped])}

        kept = keep(f"{self.tokens_key} texts {texts.VERSION}", cut)
        self.view.note(texts.told(*kept["news"].tolist()))
        return {
            name: Windows(ids, np.arange(len(ids))) for name, ids in kept.items() if name != "news"
        }

    def windows(self, part: str) -> Windows:
        """calibration, search or heldout; `check` is the first search windows, enough to rank
        plans that differ much."""
        if part == "check":
            return self.tokens["search"].head(CHECK_WINDOWS)
        return self.tokens[part]

    def part_key(self, part: str) -> str:
        """What results on these windows depend on: the model, the tokens themselves and, except
        for calibration, the cache."""
        kind = self.cache.kind
        own = not kind.whole and part != "calibration"
        whole = [kind.first, kind.last] if kind.keep else []
        kept = [[kind.bits, kind.floating, *whole]] if own else []
        return self.key_of(self.windows(part), *kept)

    def key_of(self, windows: Windows, *rest: Any) -> str:
        """Of the model and these tokens."""
        ids = np.ascontiguousarray(windows.ids)
        return digest(
            [self.source.fingerprint, list(ids.shape), sha256(ids.tobytes()).hexdigest(), *rest]
        )

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Inside, the model keeps keys and values in the bench's cache whenever it holds rounded
        weights. With its own weights it is the reference, which nothing rounds."""
        from optimizer.models.kv_cache import BITS, rounded

        if self.cache.kind.bits not in BITS:
            yield
            return
        with rounded(self.model.net, self.cache.kind, lambda: self.model.is_rounded):
            yield

    @property
    def calibration_key(self) -> str:
        return self.part_key("calibration")

    def calibration(self) -> np.ndarray:
        """Token ids [windows, length]."""
        return self.windows("calibration").ids

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        return self.view.track(items, text)

    def note(self, text: str) -> None:
        self.view.note(text)

    @cached_property
    def teachers(self) -> dict[str, AnyTeacher]:
        return {}

    def _scores_key(self, choice: Mapping[str, Precision], part: str, quantizer: Any) -> str:
        real = {name: p.name for name, p in sorted(choice.items()) if p.kind != "none"}
        return ScoresKey(self.part_key(part), quantizer.key, real).text

    def ready(self, choices: Iterable[Mapping[str, Precision]], part: str, quantizer: Any) -> None:
        """Make the codes of all plans that have no scores yet in one pass, where they can be."""
        keys = ((x, self._scores_key(x, part, quantizer)) for x in choices)
        new = [x for x, key in keys if self.store.arrays("scores", key) is None]
        if len(new) > 1:
            quantizer.ready(new)

    def score(self, choice: Mapping[str, Precision], part: str, quantizer: Any) -> AnyScores:
        """The plan's scores on a part of the tokens; kept by content. Held-out: of the plan's joint
        rounding, which is what gets packed. Search: of layers rounded by themselves, whose codes
        all plans share."""
        from optimizer.metrics.divergence import stored
        from optimizer.models.kv_cache import rounded

        key = self._scores_key(choice, part, quantizer)

        def make() -> dict[str, np.ndarray]:
            # first what is kept piece by piece, so that a killed run doesn't read again for nothing
            rounder = quantizer.rounder(choice, joint=part == "heldout")
            teacher = self.teacher(part)
            kept = rounded(self.model.net, self.cache.kind)
            with self.model.rounded(rounder, choice), kept:
                return teacher.score(self.model.net).arrays()

        found = self.store.arrays("scores", key, make)
        assert found is not None
        return stored(found)

    def teacher(self, part: str) -> AnyTeacher:
        """The reference on a part of the tokens, made once."""
        from optimizer.metrics.divergence import teacher

        if part not in self.teachers:
            self.teachers[part] = teacher(self.model, self.windows(part), own_head=True)
        return self.teachers[part]


class LazyModel:
    """Stands for the bench's model, loaded at the first use: stored batches don't need it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    @property
    def net(self) -> Any:
        return self._bench.model.net


@dataclass(frozen=True)
class Choices:
    """The table's rows and columns: what may be chosen for what. held: by the engine, allowed: by the
    policy, too; bool [G, P], None: everything. notes: what the engine doesn't hold. overhead: bytes of
    its file beyond our own, counted where the budget is a file's."""

    scope: tuple[Layer, ...]
    groups: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    fitted: dict[tuple[str, str], Precision]
    allowed: np.ndarray | None = None
    held: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    overhead: int = 0
    demands: Demands = field(default_factory=lambda: Demands(Runtime()))
    base: Base | None = None
    pins: Sequence[Sequence[str]] = ()

    def choice(self, assignment: np.ndarray) -> dict[str, Precision]:
        """Column index per group -> precision per layer."""
        return {
            name: self.fitted[name, self.columns[column]]
            for group, column in zip(self.groups, assignment, strict=True)
            for name in group
        }


def choices(
    config: Optimize, inventory: Inventory, folder: Path | None = None, base: Base | None = None
) -> Choices:
    """folder: the model's, whose class an engine may ask for; None: what it asks of any. base: what
    the engine's file is made from, see `formats.registry.base_of`."""
    scope = inventory.scoped(config.scopes)
    palette = config.palette.precisions()
    fitted = sensitivity.palette_columns(scope, palette, config.palette.fit)
    if config.runtime.experts not in ("tensor", "block", "model"):
        raise ConfigError(
            f"runtime.experts is tensor, block or model, not {config.runtime.experts!r}."
        )
    demands = registry.demands(config.runtime, inventory, folder, base)
    outside: tuple[str, ...] = ()
    if config.scopes == ["all"]:  # of what the engine can round
        scope, outside = registry.rounded(demands, scope, [p.name for p in palette], fitted)
    groups = demands.groups(scope)
    columns = tuple(p.name for p in palette)
    fitted = sensitivity.agreeing(groups, columns, fitted, demands.beside)
    rules = registry.offered(demands, inventory, scope, columns, fitted)
    pins = translated(
        config.policy.listed,
        [layer.name for layer in scope],
        None if base is None else {name: p.layers for name, p in base.placed.pieces.items()},
    )
    own = replace(config.policy, pins=[pin for some in pins for pin in some])
    left, held = (
        policy.allowed(p, scope, groups, columns, fitted, rules) for p in (own, Policy())
    )
    notes = demands.notes + outside + registry.told(config.runtime, rules)
    notes += sensitivity.unfitting(scope, palette, config.palette.fit) + inventory.notes
    return Choices(
        scope, groups, columns, fitted, left, held, notes, demands=demands, base=base, pins=pins
    )


def unchained(bench: Bench) -> str | None:
    """Why a quantizer that rounds block after block can't round this model; None: it can."""

    def make() -> str:
        from optimizer.models.blockwise import Stream

        try:
            Stream(bench.model, bench.calibration()[:1])
        except ModelError as error:
            return str(error)
        return ""

    key = ChainKey(bench.source.fingerprint).text
    return str(bench.store.json("chains", key, make)) or None
