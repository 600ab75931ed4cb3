"""What each token sends through the layers of a block, and how a table is made of it.

A layer's inputs and the gradients at its outputs are kept for some batches, until they are much or
all, so that each precision is rounded once for many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from optimizer.models.model import Model
from optimizer.plan import Layer
from optimizer.sensitivity.fisher import watching
from optimizer.sensitivity.products import Product
from optimizer.sensitivity.table import Task, Text


@dataclass(frozen=True)
class Way:
    """How layers are scored of which it is known what each token sends: add(model, task, layer,
    products, losses). whole: all of a chunk's products are needed at once."""

    add: Callable[[Model, Task, Layer, Sequence[Product], np.ndarray], None]
    whole: bool = False


class Sent:
    """Of some layers of a block, in one way back through it."""

    def __init__(
        self,
        model: Model,
        task: Task,
        text: Text,
        way: Way | None,
        layers: Sequence[Layer],
        windows: Sequence[range],
        losses: Mapping[str, np.ndarray],
        most: int,
    ) -> None:
        """way: None only where there are no layers. windows: of each batch. losses: of each layer,
        which are added to. most: bytes from which they are scored."""
        self._model, self._task, self._text, self._way = model, task, text, way
        self._layers, self._windows, self._losses, self._most = layers, windows, losses, most
        self._met: dict[str, list[Product]] = {x.name: [] for x in layers}
        self._seen: set[str] = set()
        self._bytes = 0

    def watched(self, index: int) -> AbstractContextManager[None]:
        """While a batch runs forward and back."""
        if not self._layers:
            return nullcontext()
        names = [x.name for x in self._layers]
        return watching(self._model, names, partial(self._keep, index), begin=False)

    def _keep(self, index: int, name: str, x: Tensor, d: Tensor) -> None:
        windows = self._windows[index]
        each = zip(windows, x.chunk(len(windows)), d.chunk(len(windows)), strict=True)
        self._met[name] += [Product(self._text.sum_of(window), *pair) for window, *pair in each]
        self._seen.add(name)
        self._bytes += 4 * (x.numel() + d.numel())

    def score(self, index: int) -> None:
        """After a batch: what has come, where it is much or all."""
        way, last = self._way, index + 1 == len(self._windows)
        if way is None or not (self._layers and (last or self._bytes > self._most)):
            return
        text = self._text
        following = text.sums if last else text.sum_of(self._windows[index + 1][0])
        for layer in self._layers:
            met = self._met[layer.name]
            ready = [x for x in met if not way.whole or x.number < following]
            way.add(self._model, self._task, layer, ready, self._losses[layer.name])
            self._met[layer.name] = [x for x in met if way.whole and x.number >= following]
        every = [x for met in self._met.values() for x in met]
        self._bytes = sum(4 * (x.inputs.numel() + x.gradients.numel()) for x in every)

    @property
    def unseen(self) -> str | None:
        """After all batches: a layer that is used in a way that can't be watched, if there is one. An
        expert that no token visited has no gradient, either."""
        seen = {x.role for x in self._layers if x.name in self._seen}
        for layer in self._layers:
            visited = layer.expert is not None and layer.role in seen
            if layer.name not in self._seen and not visited:
                return layer.name
        return None
