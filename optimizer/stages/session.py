"""One model with its text: source, inventory, tokens, sensitivity table and measured scores, each made
once and kept under a content key. Nothing here depends on a budget.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from optimizer.data.text import Data, Tokens, Windows
from optimizer.errors import ConfigError, ModelError
from optimizer.models.residence import Residence
from optimizer.models.source import (
    Source,
    context_length,
    is_encoder,
    locate,
    read_config,
)
from optimizer.plan import Inventory, Precision, digest
from optimizer.plan.cache import WHOLE, CacheKind
from optimizer.stages import tokens
from optimizer.stages.keys import ChainKey, InventoryKey, ScoresKey
from optimizer.stages.processes import ALONE, Processes
from optimizer.stages.view import View
from optimizer.store import Store

if TYPE_CHECKING:
    from optimizer.metrics.divergence import AnyScores, AnyTeacher
    from optimizer.models.model import Model

CHECK_WINDOWS = 8
T = TypeVar("T")


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
    # read at the first allocation: blocks that come and go leave no holes
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"device is cpu, cuda, cuda:1 or another that PyTorch can use on this machine, not "
            f"{name!r} ({reason})."
        ) from None


class Lazy(Generic[T]):
    """An attribute that is made at its first use, once for a session and its copies, which differ in
    their cache alone."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make, self._name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, session: Session, _owner: type) -> T:
        values = session._values
        if self._name not in values:
            values[self._name] = self._make(session)
        return values[self._name]


@dataclass(frozen=True, eq=False)
class Session:
    """One model with its text and store: everything that doesn't depend on a budget. cache: how plans
    keep keys and values while they are measured."""

    source: Source
    data: Data
    store: Store
    device: str
    view: View
    residence: Residence
    cache: Kept = Kept()
    processes: Processes = ALONE
    _values: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(
        cls,
        name: str,
        data: Data,
        store: str,
        view: View | None = None,
        *,
        revision: str | None = None,
        device: str = "cpu",
        residence: Residence | None = None,
        model: Model | None = None,
        processes: Processes | None = None,
    ) -> Session:
        """The model of this name. model: the same, where it is loaded already. Raises ConfigError,
        ModelError and TextError for a device, a name and data that can't be used."""
        view, several = view or View(), processes or ALONE
        where = Store.open(store, view.note)
        device = several.device(device)
        check_device(device)
        view.stage(f"finding {name}")
        source = locate(name, where, revision)
        data.check(context_length(source.folder))
        values = {} if model is None else {"model": model}
        home = replace(residence or Residence(), processes=several.local_of, device=device)
        return cls(source, data, where, device, view, home, processes=several, _values=values)

    def with_cache(self, cache: Kept) -> Session:
        """The same, sharing what is loaded, with plans measured in another cache."""
        return replace(self, cache=cache)

    @Lazy
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

    @Lazy
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return read_config(self.source.folder)

    @Lazy
    def inventory(self) -> Inventory:
        def take() -> dict[str, Any]:
            from optimizer.models.model import take_inventory

            return take_inventory(self.source.folder).to_json()

        key = InventoryKey(self.source.fingerprint).text
        return Inventory.from_json(self.store.json("inventories", key, take))

    @Lazy
    def model(self) -> Model:
        from optimizer.models import arithmetic, halving
        from optimizer.models.offload import block_list

        found = self._loaded()
        halving.tells(found.net, self.view.note)
        blocks = block_list(found.net, self.inventory)
        arithmetic.apply(found.net, blocks, *self._multiplies, self.view.note)
        return found

    @property
    def _multiplies(self) -> tuple[str | None, str | None]:
        """In what passes that guide, and those that measure, multiply; None: fp32."""
        name = self.residence.arithmetic
        if self.device == "cpu" and name in ("auto", "fp32"):  # without torch
            return None, None
        from optimizer.models import arithmetic

        return arithmetic.settled(name, self.device)

    def _loaded(self) -> Model:
        from optimizer.models.model import Model

        few = self.residence.few and not self.encoder and not self._writes
        home = replace(self.residence, few=few)
        where = home.settled(self.inventory)
        self.view.stage("loading the reference")
        if where == "disk" and not (home.few and home.offload == "auto"):
            self.view.note("The model's blocks stay on disk, and are read for each pass.")
        try:
            return Model.load(self.source.folder, self.inventory, self.device, offload=where)
        except ModelError:
            if replace(home, few=False).settled(self.inventory) == where:
                raise
        return Model.load(self.source.folder, self.inventory, self.device, offload="none")

    @property
    def _writes(self) -> bool:
        """Whether the model has to write its own text, token by token."""
        source = self.data.source
        return source == "self" or (source == "bundled" and self.bundled is None)

    @Lazy
    def tokens_key(self) -> str:
        return digest(self.data.key(self.source.fingerprint))

    @Lazy
    def tokens(self) -> Tokens:
        """Windows of each part of the text."""
        return tokens.made(self)

    @Lazy
    def bundled(self) -> Tokens | None:
        """The texts that come with the program, see `tokens.bundled`."""
        return tokens.bundled(self)

    def windows(self, part: str) -> Windows:
        """calibration, search or heldout; `check` is the first search windows, enough to rank
        plans that differ much."""
        if part == "check":
            return self.tokens["search"].head(CHECK_WINDOWS)
        return self.tokens[part]

    def part_key(self, part: str) -> str:
        """What results on these windows depend on: the model, the tokens themselves and, except
        for calibration, the cache and the arithmetic."""
        kind = self.cache.kind
        own = not kind.whole and part != "calibration"
        whole = [kind.first, kind.last] if kind.keep else []
        kept: list[Any] = [[kind.bits, kind.floating, *whole]] if own else []
        measures = self._multiplies[1]
        if part != "calibration" and measures:
            kept.append(measures)
        return self.key_of(self.windows(part), *kept)

    def guide_key(self, windows: Windows) -> str:
        """Of what guides on these windows."""
        guides = self._multiplies[0]
        return self.key_of(windows, *([guides] if guides else []))

    def key_of(self, windows: Windows, *rest: Any) -> str:
        """Of the model and these tokens."""
        ids = np.ascontiguousarray(windows.ids)
        return digest(
            [self.source.fingerprint, list(ids.shape), sha256(ids.tobytes()).hexdigest(), *rest]
        )

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Inside, the model keeps keys and values in the session's cache whenever it holds rounded
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

    @Lazy
    def _teachers(self) -> dict[str, AnyTeacher]:
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

        if part not in self._teachers:
            self._teachers[part] = teacher(self.model, self.windows(part), own_head=True)
        return self._teachers[part]


def unchained(session: Session) -> str | None:
    """Why a quantizer that rounds block after block can't round this model; None: it can."""

    def make() -> str:
        from optimizer.models.blockwise import Stream

        try:
            Stream(session.model, session.calibration()[:1])
        except ModelError as error:
            return str(error)
        return ""

    key = ChainKey(session.source.fingerprint).text
    return str(session.store.json("chains", key, make)) or None
