"""What a cache of few bits costs when its first and last tokens stay at 16 bits.

    cache.py MODEL OUT.csv [LENGTH] [WINDOWS]

The weights are the reference's own; only keys and values are rounded. Mean KL in nats per token, 95 %
over documents, on held-out text, beside the cache's bytes at the window's length and at 8,192 tokens.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.rows import write
from optimizer.data.text import Data, Part
from optimizer.hardware import memory
from optimizer.hardware.geometry import geometry
from optimizer.metrics import bootstrap
from optimizer.plan import Budget
from optimizer.quantization.methods import Rtn, bind
from optimizer.stages.session import Kept, Session

TRIED = ((8, None), (4, None), (4, "4+0"), (4, "0+16"), (4, "4+16"), (4, "4+64"), (4, "4+256"))
LONG = 8192


def main(model: str, out: str, length: str = "384", windows: str = "12") -> None:
    data = Data(source="bundled", heldout=Part(sequences=int(windows), length=int(length)))
    session = Session.open(model, data, os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint"))
    quantizer, shape = bind(Rtn(), session), geometry(session.config)
    documents = session.windows("heldout").documents
    counts = bootstrap.resamples(documents, np.random.default_rng(0))
    rows = []
    for bits, keep in TRIED:
        cached = session.with_cache(Kept(memory.kind("torch", bits, keep)))
        kl = cached.score({}, "heldout", quantizer).kl

        def size(tokens: int, bits: int = bits, keep: str | None = keep) -> int:
            asked = Budget(memory="1GiB", context=tokens, kv=bits, keep=keep)
            return memory.use(shape, "torch", asked, 0).cache

        row = {"model": Path(model).name, "tokens": length, "kv": bits, "keep": keep or ""}
        row |= {"bytes": size(int(length)), f"bytes at {LONG}": size(LONG)}
        rows.append(row | asdict(bootstrap.mean(kl, counts)))
        print(rows[-1], flush=True)
    write(Path(out), rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
