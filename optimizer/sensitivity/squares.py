"""What roundings cost by sums of gradients of the layers' size, or of their squares, which are kept
for a while."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from optimizer.models.model import Model, read
from optimizer.plan import Layer
from optimizer.sensitivity.errors import add_power, sample, stacks
from optimizer.sensitivity.table import Task, Text

SQUARES = 2**27  # bytes of squares that exist at a time, if more than one chunk's are to


class Squares:
    """Sums of squared gradients of some layers' parameters: of several chunks at a time, as far as
    memory goes, since each precision is rounded once for all of them. Of a text whose windows stand
    apart, each window's gradients.

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
        turns = -(-text.sums // self._some)
        self.at_once = batches < turns
        self._first = 0
        self._sums: dict[int, dict[str, Tensor]] = {}  # by their numbers

    def add(self, window: int, name: str, gradient: Tensor) -> None:
        """Windows come in order."""
        number = self._text.sum_of(window)
        if number >= self._first + self._some:
            self.score()
            self._first = number
        own = self._sums.setdefault(number, {})
        if name in own:
            add_power(own[name], gradient, self._text.power)
        else:
            own[name] = gradient.pow(self._text.power)

    def score(self) -> None:
        """sum_ij F_ij dW_ij^2 of each layer, precision and chunk that is here, or sum_ij G_ij dW_ij of
        each window."""
        for layer in self._layers:
            known = [i for i, sums in self._sums.items() if layer.parameter in sums]
            if not known:  # no token's loss depends on it
                continue
            weight, found = self._model.weight(layer.name), self._losses[layer.name]
            power = self._text.power
            for columns, rows, errors in stacks(self._task, layer, weight, sample(layer), power):
                own = [read(self._sums[i].__getitem__, layer)[rows] for i in known]
                products = torch.stack(own).flatten(1) @ errors.T
                found[np.ix_(known, columns)] += products.double().cpu().numpy()
        self._sums = {}
