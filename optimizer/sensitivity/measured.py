"""The true loss of one group at a time, instead of an estimate.

at the reference            loss[g, p] = KL(only g at p)
at an operating point b     loss[g, p] = KL(all at b, g at p) - KL(all at b, g untouched)
The second sees the interactions that a plan near b will meet.
"""

from __future__ import annotations

import numpy as np

from optimizer.data.text import Windows
from optimizer.metrics.divergence import teacher
from optimizer.models.model import Model
from optimizer.plan import Precision
from optimizer.sensitivity import Task

WINDOWS = 16


def measure(
    model: Model, task: Task, windows: Windows, group: tuple[str, ...], at: str
) -> dict[str, np.ndarray]:
    """{loss, stderr}: each [precisions], nats per token; the error is over windows, paired.

    Cost: a forward pass over at most 16 windows a precision, and one more at an operating point.
    """
    windows = windows.head(WINDOWS)
    base: dict[str, Precision] = {}
    if at != "reference":
        base = {name: task.fitted[name, at] for name in task.layers}
    for name in group:
        base.pop(name, None)
    reference = teacher(model, windows, own_head=True)
    with model.rounded(task.quantizer, base) as rounding:
        floor = reference.score(model.net).kl.mean(1) if base else np.zeros(len(windows.ids))
        gaps = []
        for column in task.columns:
            rounding.set(base | {name: task.fitted[name, column] for name in group})
            gaps.append(reference.score(model.net).kl.mean(1) - floor)
    values = np.array(gaps, dtype=np.float64)
    return {"loss": values.mean(1), "stderr": values.std(1, ddof=1) / np.sqrt(values.shape[1])}
