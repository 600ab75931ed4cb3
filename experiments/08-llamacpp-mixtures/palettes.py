"""What a table of llama.cpp's types takes beside one of integers, in one process.

Usage: palettes.py FOLDER OUT.csv [WINDOWS LENGTH]    (14-scale's make.py 1.5b, or any model)
The Fisher table of all layers by rounding to nearest: of 2 to 8 bits, of the types that a llama.cpp
file may have by default, and of every type of ggml that divides the rows. Beside the whole: what a
block takes on the way back, where it is scored, and what embeddings and head take at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from experiments.rows import append
from optimizer.models.model import Model, take_inventory
from optimizer.plan import GGML, Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Desk, Task, Text, by_block, chunks

DEFAULT = Path(__file__).parents[2] / "conf" / "palette" / "llamacpp.yaml"


class Clock(Desk):
    """Processor seconds at the end of each block."""

    def __init__(self) -> None:
        self.began, self.at = time.process_time(), list[float]()

    def leave(self, state: dict[str, np.ndarray]) -> None:
        self.at.append(time.process_time() - self.began)


def main(folder: Path, out: Path, windows: int, length: int) -> None:
    inventory = take_inventory(folder)
    model = Model.load(folder, inventory, offload="disk")
    names = [x.name for x in inventory.layers]
    fits = [
        k for k, own in GGML.items() if all(x.cols % own.weights == 0 for x in inventory.layers)
    ]
    default = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))["bits"]
    palettes: dict[str, Mapping[str, Precision]] = {
        "integers": {f"int{bits}": Precision("int", bits, 64) for bits in range(2, 9)},
        "default of llama.cpp": {k: Precision.ggml(k) for k in default if k in fits},
        "all of ggml": {k: Precision.ggml(k) for k in fits},
    }
    ids = np.random.default_rng(0).integers(500, size=(windows, length))
    read = Text(ids, chunks(windows, min(8, windows)), 0)
    for palette, columns in palettes.items():
        fitted = {(name, key): p for name in names for key, p in columns.items()}
        task = Task(tuple((name,) for name in names), tuple(columns), fitted, Nearest())
        clock = Clock()
        by_block.samples(model, task, read, clock)
        took, at = time.process_time() - clock.began, clock.at
        row = {"model": folder.name, "palette": palette, "types": len(columns)}
        row |= {"processor_s": f"{took:.0f}", "blocks": len(at), "ends_s": f"{took - at[-1]:.0f}"}
        row |= {"block_s": f"{np.diff(at).mean():.1f}"}
        print(row, flush=True)
        append(out, row, folder.name, windows, length)


if __name__ == "__main__":
    own = sys.argv
    main(Path(own[1]), Path(own[2]), *map(int, own[3:5] or ["8", "128"]))
