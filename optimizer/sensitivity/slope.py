"""The slope of the measured loss at a plan: what each change of one group would do *there*.

For a plan with weights W', the mean KL (or another objective) over T tokens changes, when a layer
goes from W' to V', by
    <g, V' - W'>  +  1/2 (V' - W')' F (V' - W'),      g = d mean KL / d W'
to second order. One backward pass gives the first term for every group and precision, cross terms
with all other layers' errors included: they are what the additive table at the reference lacks.
The curvature is the table's own: rounding errors of different precisions are nearly independent,
so the second term is about table[V'] + table[W'], and the sum is table[V'] - table[W'] where
layers do not interact. Memory: one accumulator of the scored layers' size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from optimizer.metrics.divergence import AnyTeacher
from optimizer.models.model import Model, read
from optimizer.sensitivity import Task
from optimizer.sensitivity.fisher import backward, gradients

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
    return np.stack([_slope(model, task, teacher, windows, beside) for windows in parts])


def _slope(
    model: Model, task: Task, teacher: AnyTeacher, windows: np.ndarray, beside: Beside | None
) -> np.ndarray:
    total: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        if name in total:
            total[name].add_(gradient)
        else:
            total[name] = gradient.clone()

    layers = [model.layers[name] for name in task.layers]
    tokens = 0
    names = {name for layer in layers for name in layer.parameters}
    with gradients(model.net, names, add):
        for window in windows:
            kl = teacher.divergence(model.net, int(window))
            backward(teacher.objective.of(kl).sum())
            tokens += kl.numel()
            rest = None if beside is None else beside(int(window))
            if rest is not None:
                backward(kl.numel() * rest)

    def found(name: str) -> Tensor:
        return total[name] if name in total else torch.zeros_like(model.parameter(name))

    values = {}
    for layer in layers:
        gradient = read(found, layer)
        weight = model.reference(layer.name)
        values[layer.name] = np.array(
            [float((gradient * _rounded(task, layer.name, c, weight)).sum()) for c in task.columns]
        )
    return task.collect(values) / tokens


def _rounded(task: Task, layer: str, column: str, weight: Tensor) -> Tensor:
    return task.quantizer.round(weight, task.fitted[layer, column], layer)
