"""Time and peak memory of the diagonal Fisher table against plain forward and backward passes.

Usage: measure.py passes|table|load TEXT -> one JSON line. Each in a process of its own, so that
the peak is that work's alone (VmHWM of /proc/self/status).
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

from experiments.rows import stamped
from optimizer.config import Optimize
from optimizer.data.text import Data
from optimizer.plan import Budget, Palette
from optimizer.quantization.methods import bind
from optimizer.sensitivity import Task, fisher
from optimizer.stages.session import Session
from optimizer.stages.space import search_space


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(what: str, text: str) -> None:
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    config = Optimize(
        model="smollm2", budget=Budget(bits=4), palette=Palette(bits=[2, 3, 4, 5, 6, 8])
    )
    data = Data(source="text", path=text)
    session = Session.open("smollm2", data, store)
    ids = session.windows("calibration").ids
    space = search_space(config, session.inventory)
    model = session.model
    task = Task(space.groups, space.columns, space.fitted, bind(config.quantizer, session))
    scored = sum(model.layers[name].weights for name in task.layers)
    begun = time.perf_counter()
    if what == "table":
        for part in np.split(ids, 8):
            fisher.diagonal(model, task, part, [0])
    elif what == "passes":
        for name in task.layers:
            model.net.get_parameter(model.layers[name].parameter).requires_grad_(True)
        for i, window in enumerate(ids):
            loss = fisher.likelihood(model, torch.from_numpy(window)[None], [0, i])
            loss.backward()
            model.net.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - begun
    size = sum(p.numel() * p.element_size() for p in model.net.parameters())
    row = {"what": what, "seconds": seconds, "peak": peak(), "model": size,
           "accumulator": 4 * scored, "tokens": int(ids.size)}  # fmt: skip
    print(json.dumps(stamped(row, config, data)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
