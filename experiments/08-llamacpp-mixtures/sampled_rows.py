"""What scoring llama.cpp's types on some rows of large layers costs in accuracy and saves in time.

Usage: sampled_rows.py FOLDER OUT.csv BLOCK [WINDOWS LENGTH]
The Fisher table of one block's layers, for every type of ggml that divides their rows, on all rows
and on samples of some sizes: a row a layer, type and size, with the ratio of the two losses.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from experiments.rows import append
from optimizer.models.model import Model, take_inventory
from optimizer.plan import GGML, Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Desk, Task, Text, by_block, chunks, errors

SIZES = (2**16, 2**17, 2**18, 2**19)  # weights of a layer


def main(folder: Path, out: Path, block: int, windows: int, length: int) -> None:
    inventory = take_inventory(folder)
    model = Model.load(folder, inventory, offload="disk")
    layers = [x for x in inventory.layers if x.block == block]
    columns = {
        kind: Precision.ggml(kind)
        for kind, own in GGML.items()
        if all(x.cols % own.weights == 0 for x in layers)
    }
    names = [x.name for x in layers]
    fitted = {(name, key): p for name in names for key, p in columns.items()}
    task = Task(tuple((name,) for name in names), tuple(columns), fitted, Nearest())
    ids = np.random.default_rng(0).integers(1000, 20_000, size=(windows, length))
    read = Text(ids, chunks(windows, min(8, windows)), 0)

    def table(size: int) -> tuple[np.ndarray, float]:
        errors.SAMPLED = size
        began = time.process_time()
        found = by_block.samples(model, task, read, Desk())
        assert found is not None
        return found.mean(0), time.process_time() - began

    whole, took = table(2**40)
    print(f"all rows: {took:.0f} s", flush=True)
    for size in SIZES:
        some, seconds = table(size)
        ratio = some / whole
        for layer, row in zip(layers, ratio, strict=True):
            for kind, value in zip(columns, row, strict=True):
                found = {"layer": layer.name, "weights": layer.weights, "type": kind}
                found |= {"sampled": size, "ratio": f"{value:.4f}"}
                append(out, found | {"seconds": f"{seconds:.0f}", "seconds_all": f"{took:.0f}"})
        off = np.abs(np.log(ratio[[x.weights > size for x in layers]]))
        spread = ratio.std(1).max()  # of types against each other
        print(
            f"{size}: {seconds:.0f} s, off by {off.mean():.3f}, at most {off.max():.3f}, "
            f"types among themselves {spread:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    own = sys.argv
    main(Path(own[1]), Path(own[2]), int(own[3]), *map(int, own[4:6] or ["8", "64"]))
