"""Squared errors of rounding, some rows of a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optimizer.models.model import Model
from optimizer.plan import Layer, Precision
from optimizer.sensitivity.table import Task

CACHED = 2**17  # weights that are rounded at a time
STACK = 2**23  # bytes of errors that exist at a time, where rows are rounded by themselves


def stacks(model: Model, task: Task, layer: Layer) -> Iterator[tuple[list[int], slice, Tensor]]:
    """Some columns' numbers, some rows, and the squared errors of those precisions there [columns,
    weights]. Rows go by themselves where the rounding of one doesn't depend on the others."""
    precisions = [task.fitted[layer.name, column] for column in task.columns]
    split = by_row(task, layer)
    weight = model.weight(layer.name)
    some = max(1, STACK // (4 * layer.cols * max(len(split), 1)))
    for start in range(0, layer.rows if split else 0, some):
        rows = slice(start, start + some)
        yield split, rows, squared_errors(task, weight[rows], [precisions[i] for i in split])
    for i, precision in enumerate(precisions):
        if precision.kind != "none" and i not in split:
            error = task.quantizer.round(weight, precision, layer.name).sub_(weight)
            yield [i], slice(None), error.square_().reshape(1, -1)


def by_row(task: Task, layer: Layer) -> list[int]:
    """Numbers of the columns that round each row of the layer by itself."""
    alone = getattr(task.quantizer, "by_row", False)
    kinds = [task.fitted[layer.name, column].kind for column in task.columns]
    return [i for i, kind in enumerate(kinds) if alone and kind in ("int", "ternary")]


def squared_errors(task: Task, weight: Tensor, precisions: Sequence[Precision]) -> Tensor:
    """(W' - W)^2 [precisions, weights] of some rows that are rounded by themselves; as many at a
    time as stay in a processor's cache."""
    found = torch.empty(len(precisions), weight.numel(), device=weight.device)
    some = max(1, CACHED // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    for part, out in zip(
        weight.split(some), found.split(some * weight.shape[1], dim=1), strict=True
    ):
        for precision, own in zip(precisions, out, strict=True):
            error = task.quantizer.round(part, precision, "").sub_(part).reshape(-1)
            torch.mul(error, error, out=own)
    return found
