"""Fisher's diagonal of a large embedding or output head, some rows of the vocabulary at a time, so
that no gradient of the whole exists.

The gradient of a head W [vocabulary, width] for a window whose tokens it reads as x [l, width] is
d' x, with d [l, vocabulary] the gradient at its products z. Some columns of d need only those columns
of z, once the sampled labels y and the normaliser n = logsumexp of each token's logits f(z) are known:
    d_tv = r_t (1[v = y_t] - exp(f(z_tv) - n_t)) f'(z_tv)
with r_t the root of the token's weight. An embedding's gradient has rows for the window's own tokens
alone. A tied embedding's gradient is the sum of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.models.arithmetic import sized
from optimizer.models.head import entrywise, output_head
from optimizer.models.layout import holders
from optimizer.models.model import Model
from optimizer.plan import Layer
from optimizer.sensitivity.errors import add_power, blank, by_row, sample, stacks
from optimizer.sensitivity.table import Task, Text

LARGE = 2**24  # bytes in fp32 from which rows go by themselves
SQUARES = 2**26  # bytes of squares that exist at a time, of all chunks together
MANY_SQUARES = 2**28  # on a GPU
TOGETHER = 1024  # tokens whose products exist at a time


@dataclass(frozen=True)
class Ends:
    """What is known of all windows at both ends of the model. inputs: the head's [windows, length,
    width]. labels, normalisers [windows, length]. shape: f. looked: of each window, the tokens that
    the embedding looked up, and the gradients of their rows."""

    inputs: Tensor
    labels: np.ndarray
    normalisers: np.ndarray
    shape: Callable[[Tensor], Tensor]
    looked: Sequence[tuple[Tensor, Tensor]]


def suits(model: Model, task: Task, layer: Layer, shape: Callable[[Tensor], Tensor]) -> bool:
    """Whether `losses` can be asked of the layer: it is large, only looks tokens up or multiplies
    the head's inputs, and is rounded row by row."""
    if 4 * layer.weights < LARGE or len(layer.parameters) > 1 or not entrywise(shape):
        return False
    net: Any = model.net
    value = net.get_parameter(layer.parameter)
    head, table = output_head(net), net.get_input_embeddings()
    known = all(
        (module is table and isinstance(module, nn.Embedding))
        or (module is head and type(module) is nn.Linear)
        for module, _ in holders(net)[id(value)]
    )
    real = [i for i, c in enumerate(task.columns) if task.fitted[layer.name, c].kind != "none"]
    return known and value.shape == (layer.rows, layer.cols) and by_row(task, layer) == real


def losses(model: Model, task: Task, layer: Layer, text: Text, ends: Ends) -> np.ndarray:
    """sum_ij F_ij dW_ij^2 [sums, precisions + 2], see `errors`, of a layer that `suits`; of a text
    whose windows stand apart, sum_ij G_ij dW_ij. The model holds its own weights. Cost: the head's
    products twice."""
    head = output_head(model.net)
    net: Any = model.net
    value = net.get_parameter(layer.parameter)
    predicts = getattr(head, "weight", None) is value
    looked = ends.looked if net.get_input_embeddings().weight is value else ()
    bias = getattr(head, "bias", None)
    found = blank(task, text.sums)
    among = None if predicts else torch.cat([ids for ids, _ in looked]).unique().cpu()
    chosen = sample(layer, among)
    squares = sized(ends.inputs.device, SQUARES, MANY_SQUARES)
    some = max(1, squares // (4 * layer.cols * text.sums))
    for start in range(0, layer.rows, some):
        weight = model.rows(layer.name, slice(start, start + some))
        sums = torch.zeros(text.sums, *weight.shape, device=weight.device)
        own = None if bias is None else bias[start : start + some].float()
        if predicts:
            _add_gradients(sums, text, replace(ends, looked=looked), start, (weight, own))
        else:
            _add_looked(sums, text, looked, start)
        here = chosen[(chosen >= start) & (chosen < start + some)] - start
        for columns, rows, errors in stacks(task, layer, weight, here, text.power):
            fisher = sums[:, rows].flatten(1)
            found[:, columns] += (fisher @ errors.T).double().cpu().numpy()
    return found


def _add_gradients(
    sums: Tensor, text: Text, ends: Ends, start: int, head: tuple[Tensor, Tensor | None]
) -> None:
    """Adds every window's squared gradient of the rows from `start` on to its chunk's sum [sums,
    rows, width], or the gradient to its own. head: weight and bias of these rows."""
    together = max(1, TOGETHER // text.ids.shape[1])
    for first in range(0, len(text.ids), together):
        windows = range(first, min(first + together, len(text.ids)))
        x = ends.inputs[windows.start : windows.stop].float()
        for window, own, d in zip(
            windows, x, _at_products(x, windows, text, ends, start, *head), strict=True
        ):
            gradient = d.T @ own
            if ends.looked:
                ids, values = _within(ends.looked[window], start, len(gradient))
                gradient.index_add_(0, ids, values)
            add_power(sums[text.sum_of(window)], gradient, text.power)


def _add_looked(
    sums: Tensor, text: Text, looked: Sequence[tuple[Tensor, Tensor]], start: int
) -> None:
    """The same of embeddings that no head shares."""
    for window, rows in enumerate(looked):
        ids, values = _within(rows, start, sums.shape[1])
        sums[text.sum_of(window)].index_add_(0, ids, values.pow(text.power))


def _within(rows: tuple[Tensor, Tensor], start: int, count: int) -> tuple[Tensor, Tensor]:
    """Those of some tokens' rows that are among `count` from `start` on, counted from there."""
    ids, values = rows
    here = (ids >= start) & (ids < start + count)
    return ids[here] - start, values[here]


def _at_products(
    x: Tensor,
    windows: range,
    text: Text,
    ends: Ends,
    start: int,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """d [windows, length, rows] of the head's rows from `start` on. x [windows, length, width]."""
    part = slice(windows.start, windows.stop)
    with torch.enable_grad():
        z = nn.functional.linear(x, weight, bias).requires_grad_(True)
        y = ends.shape(z)
    d = torch.exp(y.detach() - torch.from_numpy(ends.normalisers[part]).to(y)[..., None]).neg_()
    labels = torch.from_numpy(ends.labels[part]).to(z.device) - start
    here = (labels >= 0) & (labels < len(weight))
    d[here, labels[here]] += 1
    if text.weights is not None:
        d *= torch.from_numpy(np.sqrt(text.weights[part])).to(d)[..., None]
    return d if y is z else torch.autograd.grad(y, z, d)[0]
