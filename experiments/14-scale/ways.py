"""Two ways to a table in one process, in turn: gradients that are kept as squares of a block, as far
as they fit, against those that are scored as products while they come.

python experiments/14-scale/ways.py FOLDER OUT.csv [WINDOWS LENGTH]    (make.py's blocks or experts)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from experiments.rows import append
from optimizer.models.model import Model, take_inventory
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Desk, Task, Text, by_block, chunks
from optimizer.sensitivity.squares import Squares


class Kept(Squares):
    """Never scored while they come."""

    at_once = property(lambda _: False, lambda _self, _value: None)


def main(folder: Path, out: Path, windows: int, length: int) -> None:
    inventory = take_inventory(folder)
    model = Model.load(folder, inventory, offload="disk")
    layers = [x for x in inventory.layers if x.block is not None]
    columns = {f"int{bits}": Precision("int", bits, 64) for bits in range(2, 9)}
    names = [x.name for x in layers]
    fitted = {(name, key): p for name in names for key, p in columns.items()}
    task = Task(tuple((name,) for name in names), tuple(columns), fitted, Nearest())
    ids = np.random.default_rng(0).integers(512, size=(windows, length))
    read = Text(ids, chunks(windows, min(8, windows)), 0)
    products = by_block._Passes._by_products
    found = {}
    for way in ("products", "squares"):
        by_block.Squares = Squares if way == "products" else Kept  # type: ignore[attr-defined]
        by_block._Passes._by_products = (  # type: ignore[method-assign]
            products if way == "products" else lambda *_: False
        )
        began = time.process_time()
        table = by_block.samples(model, task, read, Desk())
        assert table is not None
        took, found[way] = time.process_time() - began, table
        row = {"model": folder.name, "way": way, "processor_s": f"{took:.0f}"}
        append(out, row, folder.name, windows, length)
        print(row, flush=True)
    met = found["squares"] > 0  # an expert that no token visits costs nothing
    print("largest difference", np.abs(found["products"][met] / found["squares"][met] - 1).max())


if __name__ == "__main__":
    own = sys.argv
    main(Path(own[1]), Path(own[2]), *map(int, own[3:5] or ["8", "128"]))
