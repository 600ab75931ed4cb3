"""A table of any estimator, block by block against the whole model a window at a time: a process each.

python experiments/14-scale/estimators.py FOLDER ESTIMATOR blocks|whole OUT.csv [WINDOWS LENGTH]
Everything in scope (kronecker: the blocks), seven precisions, eight chunks; blocks on disk.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import numpy as np

from experiments.rows import append
from optimizer.models.model import Model, take_inventory
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Desk, Task, Text, chunks, estimator


def main(folder: Path, name: str, way: str, out: Path, windows: int, length: int) -> None:
    model = Model.load(folder, take_inventory(folder), offload="disk")
    columns = {f"int{bits}": Precision("int", bits, 64) for bits in range(2, 9)}
    layers = model.inventory.scoped(["blocks" if name == "kronecker" else "all"])
    fitted = {(x.name, key): p for x in layers for key, p in columns.items()}
    task = Task(tuple((x.name,) for x in layers), tuple(columns), fitted, Nearest())
    ids = np.random.default_rng(0).integers(500, size=(windows, length))
    read, own = Text(ids, chunks(windows, 8), 0), estimator(name)()
    began = time.process_time()
    if way == "blocks":
        table = own.samples(model, task, read, Desk())
        assert table is not None
    else:
        parts = enumerate(read.runs)
        table = np.array([own.score(model, task, ids[run], read.seed_of(i)) for i, run in parts])
    took = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
    row = {"model": folder.name, "estimator": name, "way": way, "processor_s": f"{took:.0f}",
           "peak_mb": peak, "at_3_bits": f"{table.mean(0)[:, 1].sum():.4e}"}  # fmt: skip
    print(row, flush=True)
    append(out, row, folder.name, name, windows, length)


if __name__ == "__main__":
    own = sys.argv
    main(Path(own[1]), own[2], own[3], Path(own[4]), *map(int, own[5:7] or ["16", "128"]))
