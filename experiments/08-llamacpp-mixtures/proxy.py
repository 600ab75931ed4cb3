"""A plan in ggml's types from the Fisher table of plain integers, which the store often has already.

proxy.py BYTES EMBEDDING QUANTIZER TEXT OUT/plan.json      for compare.py ours; QUANTIZER: rtn or gptq

Each type borrows a column's loss; one price of a byte (bisected) then decides for every layer alike.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from optimizer.config import Optimize
from optimizer.data.text import Data, Part
from optimizer.plan import Budget, Layer, Palette, Precision, assemble
from optimizer.quantization.methods import method
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from optimizer.stages.table import measure_table

BESIDES = 1_910_000  # bytes of a GGUF file that aren't layers
STORE = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")


def types(layer: Layer) -> list[tuple[str, str, float]]:
    """(ggml type, the column whose loss it borrows, times)."""
    wide = layer.cols % 256 == 0
    third = ("q6_k", "int6_g64", 1.0) if wide else ("q5_1", "int5_g64", 0.6)
    first = ("q4_k" if wide else "iq4_nl", "int4_g64", 1.0)
    second = ("q5_k" if wide else "q5_0", "int5_g64", 1.0)
    return [first, second, third, ("q8_0", "int8_g64", 1.0)]


def main(limit: str, embedding: str, quantizer: str, text: str, out: str) -> None:
    palette = Palette(bits=[2, 3, 4, 5, 6, 8])
    config = Optimize(model="smollm2", budget=Budget(code_bits=4), palette=palette, store=STORE,
                      data=Data(source="text", path=text))  # fmt: skip
    data = Data(source="text", path=text, heldout=Part(sequences=12, length=256))
    session = Session.open("smollm2", data, STORE)
    table = measure_table(session, config, search_space(config, session.inventory))
    layers = {x.name: x for x in session.inventory.layers}
    firsts = [layers[group[0]] for group in table.groups]
    loss = np.array([[table.loss[i, table.columns.index(c)] * f for _, c, f in types(x)]
                     for i, x in enumerate(firsts)])  # fmt: skip
    size = np.array(
        [[Precision.ggml(k).bytes(x.rows, x.cols) for k, _, _ in types(x)] for x in firsts]
    )
    tied = next(x for x in session.inventory.layers if x.kind == "embedding")
    own = Precision.ggml(embedding)
    left = int(limit) - BESIDES - own.bytes(tied.rows, tied.cols)
    rows, low, high = np.arange(len(firsts)), 0.0, 1e-3
    for _ in range(80):
        middle = (low + high) / 2
        over = size[rows, (loss + middle * size).argmin(1)].sum() > left
        low, high = (middle, high) if over else (low, middle)
    picked = (loss + high * size).argmin(1)
    choice = {x.name: Precision.ggml(types(x)[k][0]) for x, k in zip(firsts, picked, strict=True)}
    source = session.source
    assemble(
        session.inventory, session.inventory.scoped(["all"]), choice | {tied.name: own},
        model={"name": source.name, "fingerprint": source.fingerprint}, runtime="llamacpp",
        quantizer=method(quantizer)().described(session.calibration_key),
        predicted={"kl": float(loss[rows, picked].sum()), "stderr": 0.0},
        provenance={"data": asdict(data)},
    ).save(Path(out))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
