"""The slope of a plan's loss, block by block against all gradients at once: a process each.

python experiments/14-scale/slopes.py FOLDER blocks|whole OUT.csv [WINDOWS LENGTH]
Everything in scope, at int4, in two parts of 8 windows of 128 tokens; blocks on disk.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import numpy as np

from experiments.rows import append
from optimizer.data.text import Windows
from optimizer.metrics.divergence import teacher
from optimizer.models.model import Model, take_inventory
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Task, slope


def main(folder: Path, way: str, out: Path, windows: int, length: int) -> None:
    model = Model.load(folder, take_inventory(folder), offload="disk")
    ids = np.random.default_rng(0).integers(500, size=(windows, length))
    reference = teacher(model, Windows(ids, np.arange(windows)), own_head=True)
    columns = {f"int{bits}": Precision("int", bits, 64) for bits in range(2, 9)}
    names = [x.name for x in model.inventory.layers]
    fitted = {(name, key): p for name in names for key, p in columns.items()}
    task = Task(tuple((name,) for name in names), tuple(columns), fitted, Nearest())
    if way == "whole":
        slope._by_block = lambda *_: None
    parts = np.arange(windows).reshape(2, -1)
    with model.rounded(Nearest(), dict.fromkeys(names, columns["int4"])):
        began = time.process_time()
        slope.slopes(model, task, reference, list(parts))
        took = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    row = {"model": folder.name, "way": way, "processor_s": f"{took:.0f}", "peak_mb": peak}
    print(row, flush=True)
    append(out, row, folder.name, windows, length)


if __name__ == "__main__":
    own = sys.argv
    main(Path(own[1]), own[2], Path(own[3]), *map(int, own[4:6] or ["16", "128"]))
