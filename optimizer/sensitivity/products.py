"""What roundings cost where a layer's gradient is known as a product.

The gradient of a layer W [rows, cols] for a window is d' x, with its inputs x [tokens, cols] and the
gradients d [tokens, rows] at its outputs, so that some rows of it need only these columns of d, and
nothing of a layer's size has to exist. A token's own slope along an error dW is d_t' dW x_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from optimizer.models.model import Model
from optimizer.plan import Layer
from optimizer.sensitivity.errors import add_power, sample, stacks
from optimizer.sensitivity.fisher import rounding_errors
from optimizer.sensitivity.table import Task


@dataclass(frozen=True)
class Product:
    """What a layer met in (a part of) a window: inputs [tokens, cols], and the gradients [tokens,
    rows] at its outputs. number: of the sum that it belongs to, the chunk's or the window's own."""

    number: int
    inputs: Tensor
    gradients: Tensor


def add_losses(
    model: Model,
    task: Task,
    layer: Layer,
    met: Sequence[Product],
    found: np.ndarray,
    power: int = 2,
) -> None:
    """Adds sum_ij (G_ij dW_ij)^power over the windows' gradients G to found [sums, precisions + 2],
    see `errors`. Every precision is rounded once."""
    if not met:
        return
    weight, known = model.weight(layer.name), sorted({x.number for x in met})
    for columns, rows, errors in stacks(task, layer, weight, sample(layer), power):
        sums = torch.zeros(len(known), errors.shape[1], device=errors.device)
        for own in met:
            gradient = (own.gradients[:, rows].T @ own.inputs).view(-1)
            add_power(sums[known.index(own.number)], gradient, power)
        found[np.ix_(known, columns)] += (sums @ errors.T).double().cpu().numpy()


def add_token_losses(
    model: Model, task: Task, layer: Layer, met: Sequence[Product], found: np.ndarray
) -> None:
    """Adds sum_t (d_t' dW x_t)^2 over tokens to found [chunks, precisions + 2]; see
    `fisher.tokenwise`. Every precision is rounded once."""
    count = found.shape[1]
    slopes = [torch.zeros(len(x.inputs), count, device=x.inputs.device) for x in met]
    weight, nothing = model.weight(layer.name), torch.empty(0, dtype=torch.long)
    for columns, rows, errors in stacks(task, layer, weight, nothing, power=1) if met else ():
        wide = errors.view(-1, layer.cols).T
        for own, slope in zip(met, slopes, strict=True):
            moved = (own.inputs @ wide).view(len(own.inputs), len(columns), -1)
            slope[:, columns] += torch.einsum("tcr,tr->tc", moved, own.gradients[:, rows])
    for own, slope in zip(met, slopes, strict=True):
        found[own.number] += slope.square_().sum(0, dtype=torch.float64).cpu().numpy()


def add_factored_losses(
    model: Model, task: Task, layer: Layer, met: Sequence[Product], found: np.ndarray
) -> None:
    """Adds tr(G dW A dW') / tau to found [chunks, precisions + 2], of chunks that are met whole; see
    `hessian`. Every precision is rounded once a chunk. Memory: rows^2 + cols^2."""
    for number in sorted({x.number for x in met}):
        factors = Factors.none(layer, met[0].inputs.device)
        for own in met:
            if own.number == number:
                factors.add(own.inputs, own.gradients)
        for column, (_, error) in enumerate(rounding_errors(model, task, layer)):
            found[number, column] += factors.loss(error)


@dataclass(frozen=True)
class Factors:
    """A layer's Fisher matrix as a Kronecker product; see `hessian`. inputs: A = sum |d|^2 x x'
    [cols, cols]; outputs: G = sum |x|^2 d d' [rows, rows], both over tokens."""

    inputs: Tensor
    outputs: Tensor

    @classmethod
    def none(cls, layer: Layer, device: torch.device) -> Factors:
        return cls(*(torch.zeros(n, n, device=device) for n in (layer.cols, layer.rows)))

    def add(self, x: Tensor, d: Tensor) -> None:
        """Inputs [tokens, cols] and output gradients [tokens, rows] of some tokens."""
        self.inputs.addmm_((x * d.square().sum(-1, keepdim=True)).T, x)
        self.outputs.addmm_((d * x.square().sum(-1, keepdim=True)).T, d)

    def loss(self, error: Tensor) -> float:
        """tr(G dW A dW') / tau of an error dW [rows, cols]."""
        tau = self.inputs.trace().clamp(min=1e-30)
        return float(((self.outputs @ error @ self.inputs) * error).sum() / tau)


class Met:
    """Products with the parameters of a block. names: of all parameters that any was met of."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.number = 0  # of the sum that the window that runs belongs to
        self.clear()

    def clear(self) -> None:
        self.bytes = 0
        self._products: dict[str, list[tuple[int, Product]]] = {}

    def add(self, parameter: str, first: int, x: Tensor, d: Tensor) -> None:
        self.names.add(parameter)
        self.bytes += 4 * (x.numel() + d.numel())
        product = Product(self.number, x, d)
        self._products.setdefault(parameter, []).append((first, product))

    def of(self, layer: Layer, parameter: str, first: int) -> list[Product]:
        """Those that its rows took part in."""
        found = []
        for before, x in self._products.get(parameter, []):
            row, last = (first - before) // layer.cols, x.gradients.shape[1]
            if row >= 0 and row + layer.rows <= last and x.inputs.shape[1] == layer.cols:
                found.append(replace(x, gradients=x.gradients[:, row : row + layer.rows]))
        return found
