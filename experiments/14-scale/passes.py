"""What a table costs at least: plain passes, forward and backward with every weight's gradient but the
ends', on the windows of a table. One block in memory at a time, each read from disk twice.

python experiments/14-scale/passes.py FOLDER WINDOWS LENGTH            plain passes, for their peak
python experiments/14-scale/passes.py FOLDER WINDOWS LENGTH N OUT.csv  N times in turn with the table
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.rows import append
from optimizer.models.blockwise import Batch, Stream
from optimizer.models.head import output_head
from optimizer.models.model import Model, take_inventory
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Desk, Task, Text, by_block, chunks
from optimizer.sensitivity.fisher import gradients


def plain(model: Model, ids: np.ndarray) -> None:
    """ids [windows, length]"""
    stream = Stream(model, ids, frozen=True, together=max(1, 1024 // ids.shape[1]))
    borders: list[list[Tensor]] = []
    for block in range(len(stream.blocks)):
        borders.append([batch.hidden for batch in stream.batches])
        stream.advance(block)
    arrived = [_at_the_end(model, stream, batch) for batch in stream.batches]
    for block in reversed(range(len(stream.blocks))):
        own = [x for x in model.inventory.layers if x.block == block]
        names = {p for x in own for p in x.parameters}
        for i, batch in enumerate(stream.batches):
            hidden = borders[block][i].clone().requires_grad_(True)
            with gradients(model.net, names, lambda _name, _gradient: None):
                stream.through(block, batch, hidden.clone()).backward(arrived[i])
            assert hidden.grad is not None
            arrived[i] = hidden.grad


def _at_the_end(model: Model, stream: Stream, batch: Batch) -> Tensor:
    """The gradient of the text's own likelihood at the last block's output, window by window."""
    head: Any = output_head(model.net)
    found = []
    for ids, hidden in zip(batch.ids, batch.hidden, strict=True):
        own = hidden[None].clone().requires_grad_(True)
        logits = head(stream.tail(ids[None], own))[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        assert own.grad is not None
        found.append(own.grad[0])
    return torch.stack(found)


def table(model: Model, ids: np.ndarray) -> None:
    """The default palette's, of everything."""
    columns = {f"int{bits}": Precision("int", bits, 64) for bits in (2, 3, 4, 5, 6, 7, 8)}
    names = [x.name for x in model.inventory.layers]
    fitted = {(name, key): p for name in names for key, p in columns.items()}
    task = Task(tuple((name,) for name in names), tuple(columns), fitted, Nearest())
    by_block.samples(model, task, Text(ids, chunks(len(ids), min(8, len(ids))), 0), Desk())


def processor(run: Callable[[Model, np.ndarray], None], model: Model, ids: np.ndarray) -> float:
    """Seconds."""
    began = time.process_time()
    run(model, ids)
    return time.process_time() - began


def main(folder: Path, windows: int, length: int, times: int, out: Path) -> None:
    model = Model.load(folder, take_inventory(folder), offload="disk")
    ids = np.random.default_rng(0).integers(500, size=(windows, length))
    if not times:
        print(f"without loading: processor {processor(plain, model, ids):.0f} s")
    for turn in range(times):
        passes, own = (processor(run, model, ids) for run in (plain, table))
        row = {"model": folder.name, "turn": turn, "passes_s": f"{passes:.1f}"}
        row |= {"table_s": f"{own:.1f}", "ratio": f"{own / passes:.2f}"}
        print(row, flush=True)
        append(out, row, folder.name, windows, length)


if __name__ == "__main__":
    torch.manual_seed(0)
    given = sys.argv
    times, out = (int(given[4]), Path(given[5])) if given[4:] else (0, Path())
    main(Path(given[1]), int(given[2]), int(given[3]), times, out)
