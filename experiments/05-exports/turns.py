"""Tokens per second of a packed model and of its bf16 reference, in turns in one process.

turns.py MODEL FOLDER OUT.csv [tokens]      FOLDER: written by `mezzotint apply`. Appends a row.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import optimizer
from experiments.rows import append
from optimizer.hardware import throughput
from optimizer.models.source import locate
from optimizer.plan import Plan
from optimizer.store import Store

THREADS = int(os.environ.get("THREADS", "2"))


def main(model: str, folder: str, out: str, tokens: int = 64) -> None:
    torch.set_num_threads(THREADS)
    store = Store(Path(os.environ["MEZZOTINT_STORE"]).expanduser())
    source = locate(model, store)
    reference = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.bfloat16).eval()
    net = optimizer.load(folder, fast=True)
    plan = Plan.load(Path(folder) / "plan.json")

    def cache(one: Any) -> Any:
        return DynamicCache(config=one.config)

    ids = np.arange(64) % 90
    found = throughput.measure(net, reference, ids, tokens, cache)
    row = {
        "model": model, "plan": plan.id, "bits_per_weight": f"{plan.effective_bits:.2f}",
        "precisions": " ".join(sorted(set(plan.layers.values()))), "tokens": tokens,
        "packed": f"{found.packed:.2f}", "reference_bf16": f"{found.reference:.2f}",
        "ratio": f"{found.ratio:.3f}", "threads": THREADS,
    }  # fmt: skip
    print(row)
    append(Path(out), row)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
