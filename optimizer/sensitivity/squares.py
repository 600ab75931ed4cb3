"""What roundings cost by sums of squared gradients of the layers' size, which are kept for a while."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from optimizer.models.model import Model, read
from optimizer.plan import Layer
from optimizer.sensitivity.errors import sample, stacks
from optimizer.sensitivity.fisher import add_square
from optimizer.sensitivity.table import Task, Text

SQUARES = 2**27  # bytes of squares that exist at a time, if more than one chunk's are to


class Squares:
    """Sums of squared gradients of some layers' parameters: of several chunks at a time, as far as
    memory goes, since each precision is rounded once for all of them.

    at_once: a batch's gradients are better scored as they come, some rows at a time. Nothing of the
    layers' size is kept then, and each precision is rounded once a batch, not once for the chunks
    that fit."""

    def __init__(
        self,
        model: Model,
        task: Task,
        text: Text,
        layers: Sequence[Layer],
        batches: int,
        losses: Mapping[str, np.ndarray],
    ) -> None:
        """batches: in which the text's windows run. losses: of each layer, which are added to."""
        self._model, self._task, self._text = model, task, text
        self._layers, self._losses = layers, losses
        self.names = {x.parameter for x in layers}
        size = 4 * sum(x.weights for x in layers)
        self._some = max(1, SQUARES // max(size, 1))
        turns = -(-len(text.runs) // self._some)
        self.at_once = batches < turns
        self._first = 0
        self._sums: dict[int, dict[str, Tensor]] = {}  # by chunk

    def add(self, window: int, name: str, gradient: Tensor) -> None:
        """Windows come in order."""
        chunk = self._text.chunk(window)
        if chunk >= self._first + self._some:
            self.score()
            self._first = chunk
        add_square(self._sums.setdefault(chunk, {}), name, gradient)

    def score(self) -> None:
        """sum_ij F_ij dW_ij^2 of each layer, precision and chunk that is here."""
        for layer in self._layers:
            chunks = [c for c, sums in self._sums.items() if layer.parameter in sums]
            if not chunks:  # no token's loss depends on it
                continue
            weight, found = self._model.weight(layer.name), self._losses[layer.name]
            for columns, rows, errors in stacks(self._task, layer, weight, sample(layer)):
                squares = [read(self._sums[c].__getitem__, layer)[rows] for c in chunks]
                fisher = torch.stack(squares).flatten(1)
                found[np.ix_(chunks, columns)] += (fisher @ errors.T).double().cpu().numpy()
        self._sums = {}
