"""What a table costs at least: the model's blocks forward, and backward with every weight's gradient,
on the windows of a table. One block in memory at a time, each read from disk twice.

python experiments/14-scale/passes.py FOLDER WINDOWS LENGTH
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from optimizer.models.blockwise import Stream
from optimizer.models.model import Model, take_inventory
from optimizer.sensitivity.fisher import gradients


def main(folder: Path, windows: int, length: int) -> None:
    inventory = take_inventory(folder)
    model = Model.load(folder, inventory, offload="disk")
    ids = np.random.default_rng(0).integers(1000, size=(windows, length))
    start, used = time.monotonic(), time.process_time()
    stream = Stream(model, ids, frozen=True, together=max(1, 1024 // length))
    borders: list[list[torch.Tensor]] = []
    for block in range(len(stream.blocks)):
        borders.append([batch.hidden for batch in stream.batches])
        stream.advance(block)
    arrived = [torch.ones_like(batch.hidden) for batch in stream.batches]
    for block in reversed(range(len(stream.blocks))):
        names = {p for x in inventory.layers if x.block == block for p in x.parameters}
        for i, batch in enumerate(stream.batches):
            hidden = borders[block][i].clone().requires_grad_(True)
            with gradients(model.net, names, lambda _name, _gradient: None):
                stream.through(block, batch, hidden.clone()).backward(arrived[i])
            assert hidden.grad is not None
            arrived[i] = hidden.grad
    wall, busy = time.monotonic() - start, time.process_time() - used
    print(f"without loading: wall {wall:.0f} s, processor {busy:.0f} s")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
