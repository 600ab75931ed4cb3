"""Before: the model's folder and its calibration windows as text, for tools that take those.
After: allocations of such a tool, measured on held-out documents with our rounding.

Usage: allocation.py give TEXT OUT.jsonl   prints the model's folder
       allocation.py take TEXT PLANS.json OUT_FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from optimizer.certificate import comparison
from optimizer.data.text import Data
from optimizer.metrics import bootstrap
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Precision
from optimizer.quantization.methods import Rtn, bind
from optimizer.stages.session import Session


def bench_of(text: str) -> Session:
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    return Session.open("smollm2", Data(source="text", path=text), store)


def give(text: str, out: Path) -> None:
    session = bench_of(text)
    tokenizer = load_tokenizer(session.source.folder)
    lines = []
    for window in session.windows("calibration").ids:
        # a window read back may be a token or two shorter, and short samples are dropped
        words = tokenizer.decode(np.concatenate([window, window[:16]]))
        lines.append(json.dumps({"text": words}))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(session.source.folder)


def take(text: str, plans: Path, out: Path) -> None:
    session, found = bench_of(text), json.loads(plans.read_text())
    quantizer = bind(Rtn(), session)
    for bits, plan in found["plans"].items():
        weights = {x.name: x.weights for x in session.inventory.layers}
        choice = {name: Precision("int", b, 64, False) for name, b in plan.items()}
        average = sum(plan[n] * weights[n] for n in plan) / sum(weights[n] for n in plan)
        scores = session.score(choice, "heldout", quantizer)
        counts = bootstrap.resamples(scores.documents, np.random.default_rng(0))
        row = {k: asdict(v) for k, v in comparison.describe(scores, counts).items()}
        record = {"bits": float(bits), "seed": 0, "method": "autoscheme", "tokens": 0,
                  "seconds": found["seconds"], "heldout": row, "curve": [],
                  "average": average}  # fmt: skip
        (out / f"{float(bits):g}-0-autoscheme.json").write_text(json.dumps(record))
        print(bits, f"{average:.4f}", row["kl"]["value"], flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "give":
        give(sys.argv[2], Path(sys.argv[3]))
    else:
        take(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
