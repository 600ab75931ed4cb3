"""The slope of the measured loss at a plan: what each change of one group would do *there*.

For a plan with weights W', the mean KL (or another objective) over T tokens changes, when a layer
goes from W' to V', by
    <g, V' - W'>  +  1/2 (V' - W')' F (V' - W'),      g = d mean KL / d W'
to second order. One backward pass gives the first term for every group and precision, cross terms
with all other layers' errors included: they are what the additive table at the reference lacks.
The curvature is the table's own: rounding errors of different precisions are nearly independent,
so the second term is about table[V'] + table[W'], and the sum is table[V'] - table[W'] where
layers do not interact.

Where the blocks are a chain, they run one after the other on all windows, forward and back, and the
gradients of one block's layers are all that is kept beside embeddings' and heads'. Elsewhere every
scored layer has its gradient at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
from torch import Tensor

from optimizer.errors import ModelError
from optimizer.metrics.divergence import AnyTeacher, Teacher
from optimizer.models.arithmetic import TooLargeError
from optimizer.models.blockwise import Stream
from optimizer.models.halving import fitting
from optimizer.models.model import Model, read
from optimizer.plan import Layer
from optimizer.sensitivity import Task, agreement
from optimizer.sensitivity.borders import Borders
from optimizer.sensitivity.fisher import backward, gradients, watching

TOGETHER = 1024  # tokens that run through a block at a time

Beside = Callable[
    [int], Tensor
]  # what else a window's loss is made of; see `optimizer.stages.objective`


def slopes(
    model: Model,
    task: Task,
    teacher: AnyTeacher,
    parts: Sequence[np.ndarray],
    beside: Beside | None = None,
) -> np.ndarray:
    """<g, rounded weights> [parts, groups, precisions], nats per token, at the plan that the model
    holds now; one estimate for each part of the windows.

    Differences along a row are first-order changes of the loss. parts: indices into the teacher's
    windows. beside: further terms of a window's loss. Cost: a forward and a backward pass over them,
    and one rounding of each precision a part.
    """
    found = []
    for windows in parts:
        own = None
        if beside is None and isinstance(teacher, Teacher):
            try:
                own = _by_block(model, task, teacher, windows)
            except TooLargeError:  # once more, in fp32
                own = _by_block(model, task, teacher, windows)
        found.append(_whole(model, task, teacher, windows, beside) if own is None else own)
    return np.stack(found)


def _by_block(
    model: Model, task: Task, teacher: Teacher, windows: np.ndarray
) -> np.ndarray | None:
    """Block after block; None where that isn't the model's own gradient, or where tokens pass by some
    of the layers."""
    layers = [model.layers[name] for name in task.layers]
    inside = [x for x in layers if x.block is not None]
    if not all(x.watchable and len(x.parameters) == 1 for x in inside):
        return None
    ids = teacher.windows.ids[windows]
    try:
        together = fitting(model.net, max(1, TOGETHER // ids.shape[1]))
        stream = Stream(model, ids, frozen=True, together=together)
    except ModelError:
        return None
    chained = stream.ends and not agreement.shared(stream.blocks)
    if not (chained and all(stream.sees_all(x.name) for x in inside)):
        return None
    size = sum(x.hidden.numel() * x.hidden.element_size() for x in stream.batches)
    ends: dict[str, Tensor] = {}
    names = {name for x in layers if x.block is None for name in x.parameters}
    with (
        closing(Borders(size * len(stream.blocks), "A slope", "data.search.sequences")) as borders,
        gradients(model.net, names, partial(_add, ends)),
    ):
        for block in range(len(stream.blocks)):
            for i, batch in enumerate(stream.batches):
                borders.keep(block, i, batch.hidden)
            stream.advance(block)
        arrived = _at_the_end(stream, teacher, windows)
        values: dict[str, np.ndarray] = {}
        for block in reversed(range(len(stream.blocks))):
            sums = _back(
                model, stream, borders, block, [x for x in inside if x.block == block], arrived
            )
            values |= {name: _products(model, task, name, own) for name, own in sums.items()}
        first = int(windows[0])

        def scalar() -> Tensor:
            return teacher.objective.of(teacher.divergence(model.net, first)).sum()

        if len(values) < len(inside) or not agreement.agrees(model, stream, scalar, arrived[0][0]):
            return None
        for batch, gradient in zip(stream.batches, arrived, strict=True):
            before = stream.front(batch.ids)
            if before.requires_grad:
                before.backward(gradient)
    for layer in layers:
        if layer.block is None:
            own = read(partial(_found, model, ends), layer)
            values[layer.name] = _products(model, task, layer.name, own)
    return task.collect(values) / (len(windows) * (ids.shape[1] - 1))


def _at_the_end(stream: Stream, teacher: Teacher, windows: np.ndarray) -> list[Tensor]:
    """Each batch's gradient [b, l, width] at the last block's output."""
    arrived, turn = [], iter(windows)
    for batch in stream.batches:
        hidden = batch.hidden.clone().requires_grad_(True)
        x = stream.tail(batch.ids, hidden)
        leaf = x.detach().requires_grad_(True)
        for row in leaf:
            kl = teacher.divergence_of(row, int(next(turn)))
            backward(teacher.objective.of(kl).sum())
        if leaf.grad is not None:
            x.backward(leaf.grad)
        arrived.append(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad)
    return arrived


def _back(
    model: Model,
    stream: Stream,
    borders: Borders,
    block: int,
    layers: Sequence[Layer],
    arrived: list[Tensor],
) -> dict[str, Tensor]:
    """Sums of the layers' gradients [rows, cols]. arrived: gradients at the block's output; at its
    input afterwards."""
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(stream.batches):
        hidden = borders.take(block, i, batch.hidden).requires_grad_(True)
        with watching(
            model,
            [x.name for x in layers],
            lambda name, x, d: _add(sums, name, d.T @ x),
            begin=False,
        ):
            stream.through(block, batch, hidden.clone()).backward(arrived[i])
        assert hidden.grad is not None
        arrived[i] = hidden.grad
    return sums


def _add(total: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    if name in total:
        total[name].add_(gradient)
    else:
        total[name] = gradient.clone()


def _found(model: Model, total: dict[str, Tensor], name: str) -> Tensor:
    return total[name] if name in total else torch.zeros_like(model.parameter(name))


def _products(model: Model, task: Task, layer: str, gradient: Tensor) -> np.ndarray:
    """<g, rounded weights> [precisions] of a layer. gradient [rows, cols]."""
    weight = model.reference(layer)
    return np.array(
        [float((gradient * _rounded(task, layer, c, weight)).sum()) for c in task.columns]
    )


def _whole(
    model: Model, task: Task, teacher: AnyTeacher, windows: np.ndarray, beside: Beside | None
) -> np.ndarray:
    """All layers' gradients at once."""
    total: dict[str, Tensor] = {}
    layers = [model.layers[name] for name in task.layers]
    tokens = 0
    names = {name for layer in layers for name in layer.parameters}
    with gradients(model.net, names, partial(_add, total)):
        for window in windows:
            kl = teacher.divergence(model.net, int(window))
            backward(teacher.objective.of(kl).sum())
            tokens += kl.numel()
            rest = None if beside is None else beside(int(window))
            if rest is not None:
                backward(kl.numel() * rest)
    values = {
        layer.name: _products(model, task, layer.name, read(partial(_found, model, total), layer))
        for layer in layers
    }
    return task.collect(values) / tokens


def _rounded(task: Task, layer: str, column: str, weight: Tensor) -> Tensor:
    return task.quantizer.round(weight, task.fitted[layer, column], layer)
