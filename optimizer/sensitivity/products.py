"""What roundings cost where a layer's gradient is known as a product.

The gradient of a layer W [rows, cols] for a window is d' x, with its inputs x [tokens, cols] and the
gradients d [tokens, rows] at its outputs, so that some rows of it need only these columns of d, and
nothing of a layer's size has to exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from optimizer.models.model import Model
from optimizer.plan import Layer
from optimizer.sensitivity.errors import sample, stacks
from optimizer.sensitivity.table import Task


@dataclass(frozen=True)
class Product:
    """What a layer met in (a part of) a window of a chunk: inputs [tokens, cols], and the gradients
    [tokens, rows] at its outputs."""

    chunk: int
    inputs: Tensor
    gradients: Tensor


def add_losses(
    model: Model, task: Task, layer: Layer, met: Sequence[Product], found: np.ndarray
) -> None:
    """Adds sum_ij G_ij^2 dW_ij^2 over the windows' gradients G to found [chunks, precisions + 2], see
    `errors`. Every precision is rounded once."""
    if not met:
        return
    chunks = sorted({x.chunk for x in met})
    for columns, rows, errors in stacks(task, layer, model.weight(layer.name), sample(layer)):
        squares = torch.zeros(len(chunks), errors.shape[1], device=errors.device)
        for own in met:
            gradient = (own.gradients[:, rows].T @ own.inputs).view(-1)
            squares[chunks.index(own.chunk)].addcmul_(gradient, gradient)
        found[np.ix_(chunks, columns)] += (squares @ errors.T).double().cpu().numpy()


class Met:
    """Products with the parameters of a block. names: of all parameters that any was met of."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.chunk = 0  # which the window that runs belongs to
        self.clear()

    def clear(self) -> None:
        self.bytes = 0
        self._products: dict[str, list[tuple[int, Product]]] = {}

    def add(self, parameter: str, first: int, x: Tensor, d: Tensor) -> None:
        self.names.add(parameter)
        self.bytes += 4 * (x.numel() + d.numel())
        product = Product(self.chunk, x, d)
        self._products.setdefault(parameter, []).append((first, product))

    def of(self, layer: Layer, parameter: str, first: int) -> list[Product]:
        """Those that its rows took part in."""
        found = []
        for before, x in self._products.get(parameter, []):
            row, last = (first - before) // layer.cols, x.gradients.shape[1]
            if row >= 0 and row + layer.rows <= last and x.inputs.shape[1] == layer.cols:
                found.append(replace(x, gradients=x.gradients[:, row : row + layer.rows]))
        return found
