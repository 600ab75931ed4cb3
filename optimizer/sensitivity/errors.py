"""Errors of rounding, and their squares, some rows of a layer at a time.

llama.cpp's types cost up to two hundred times as much as rounding to nearest, since their scales are
searched for. In large layers they are scored on some rows only, in units of a proxy p, integers that
are rounded to nearest: with losses l on all rows and s on the sampled ones,
    l_type = l_p s_type / s_p            (a ratio estimate; Cochran, Sampling Techniques, chapter 6)
Losses of a layer therefore have two columns more than the task while they are added up: l_p and s_p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from optimizer.models.arithmetic import sized
from optimizer.plan import BY_ROW, GGML, Layer, Precision
from optimizer.sensitivity.table import Task

CACHED = 2**17  # weights that are rounded at a time
STACK = 2**23  # bytes of errors that exist at a time, where rows are rounded by themselves
LARGE_STACK = 2**27  # on a GPU
SAMPLED = 2**19  # weights of a layer that llama.cpp's types are scored on
GROUP = 32  # weights a scale of the proxy


def stacks(
    task: Task, layer: Layer, weight: Tensor, sample: Tensor, power: int = 2
) -> Iterator[tuple[list[int], slice | Tensor, Tensor]]:
    """Some columns' numbers, some rows, and the errors of those precisions there, to a power [columns,
    weights]. Rows go by themselves where the rounding of one doesn't depend on the others. weight:
    the layer's matrix, or some of its rows where all do. sample: which rows stand for the others, of
    squares."""
    precisions = [task.fitted[layer.name, column] for column in task.columns]
    proxies = [Precision("int", 4, GROUP if layer.cols % GROUP == 0 else None)] * 2
    every = [*precisions, *proxies]
    dear, split = _sampled(task, layer, power), by_row(task, layer)
    stack = sized(weight.device, STACK, LARGE_STACK)
    most = max(1, stack // (4 * layer.cols * max(len(split), 1)))
    cheap = [i for i in split if i not in dear] + [len(precisions)] * bool(dear)
    for start in range(0, len(weight) if cheap else 0, most):
        rows = slice(start, start + most)
        here = [every[i] for i in cheap]
        yield cheap, rows, errors_of_rows(task, layer, weight[rows], here, power)
    for some in sample.split(most) if dear and len(sample) else ():
        columns = [*dear, len(precisions) + 1]
        here = [every[i] for i in columns]
        yield columns, some, errors_of_rows(task, layer, weight[some], here, power)
    for i, precision in enumerate(precisions):
        if precision.kind != "none" and i not in split:
            error = task.quantizer.round(weight, precision, layer.name).sub_(weight)
            yield [i], slice(None), error.pow_(power).reshape(1, -1)


def blank(task: Task, sums: int) -> np.ndarray:
    """No losses yet of a layer [sums, precisions + 2]."""
    return np.zeros((sums, len(task.columns) + 2))


def settled(task: Task, layer: Layer, losses: np.ndarray, power: int = 2) -> np.ndarray:
    """A layer's losses as they were added up -> [sums, precisions]. Chunks know nothing of each
    other: another process may measure some of them. Where no sampled row costs anything, a type
    costs what the proxy does."""
    *_, whole, some = losses.T
    found = losses[:, : len(task.columns)].copy()
    for i in _sampled(task, layer, power):
        ratios = np.divide(losses[:, i], some, out=np.ones_like(some), where=some > 0)
        found[:, i] = whole * ratios
    return found


def add_power(total: Tensor, gradient: Tensor, power: int) -> None:
    """Adds a gradient, or its square, in place."""
    if power == 2:
        total.addcmul_(gradient, gradient)
    else:
        total.add_(gradient)


def sample(layer: Layer, among: Tensor | None = None) -> Tensor:
    """Evenly spread rows with at most SAMPLED weights, of all or of the given ones."""
    rows = torch.arange(layer.rows) if among is None else among
    step = max(1, -(-len(rows) * layer.cols // SAMPLED))
    return rows[min(step // 2, max(len(rows) - 1, 0)) :: step]


def by_row(task: Task, layer: Layer) -> list[int]:
    """Numbers of the columns that round each row of the layer by itself."""
    alone = getattr(task.quantizer, "by_row", False)
    kinds = [task.fitted[layer.name, column].kind for column in task.columns]
    return [i for i, kind in enumerate(kinds) if alone and kind in BY_ROW]


def _sampled(task: Task, layer: Layer, power: int) -> list[int]:
    """Numbers of the columns that are scored on some rows only: of squares, whose ratios tell all."""
    if power == 1 or layer.weights <= SAMPLED:
        return []
    kinds = [task.fitted[layer.name, column].kind for column in task.columns]
    return [i for i in by_row(task, layer) if kinds[i] in GGML]


def errors_of_rows(
    task: Task, layer: Layer, weight: Tensor, precisions: Sequence[Precision], power: int
) -> Tensor:
    """W' - W, or its square [precisions, weights], of some rows that are rounded by themselves; as
    many at a time as stay in a processor's cache."""
    of_rows = getattr(task.quantizer, "of_rows", None)
    rounder = task.quantizer if of_rows is None else of_rows(layer.name)
    found = torch.empty(len(precisions), weight.numel(), device=weight.device)
    some = max(1, CACHED // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    for part, out in zip(
        weight.split(some), found.split(some * weight.shape[1], dim=1), strict=True
    ):
        done: dict[Precision, Tensor] = {}  # odd rows take one type for several columns
        for precision, own in zip(precisions, out, strict=True):
            if precision in done:
                own.copy_(done[precision])
                continue
            done[precision] = own
            error = rounder.round(part, precision, "").sub_(part).reshape(-1)
            torch.pow(error, power, out=own)
    return found
