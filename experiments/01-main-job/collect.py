"""All plans of a folder of runs -> results.csv, measured on the same held-out windows of one text,
whatever text each plan was calibrated on. Usage: collect.py RUNS TEXT OUT.csv"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.rows import write
from optimizer.certificate import comparison
from optimizer.data.text import Data
from optimizer.metrics import bootstrap
from optimizer.plan import Plan
from optimizer.quantization.methods import Rtn, bind
from optimizer.stages.session import Session


def main(runs: Path, text: str, out: Path) -> None:
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    session = Session.open("smollm2", Data(source="text", path=text), store)
    plans = {p.parent.name: Plan.load(p) for p in sorted(runs.glob("*/plan.json"))}
    uniform = {}
    first = next(iter(plans.values()))
    for key, precision in first.palette.items():
        if key != "none":
            uniform[f"uniform {key}"] = dict.fromkeys(first.scope, precision)
    choices = uniform | {name: plan.choice for name, plan in plans.items()}
    rows = []
    for name, choice in choices.items():
        scores = session.score(choice, "heldout", bind(Rtn(), session))
        counts = bootstrap.resamples(scores.documents, np.random.default_rng(0))
        found = {k: asdict(v) for k, v in comparison.describe(scores, counts).items()}
        bits = [
            float(choice[n].code_bits) * first.shapes[n][0] * first.shapes[n][1]
            for n in first.scope
        ]
        weights = sum(first.shapes[n][0] * first.shapes[n][1] for n in first.scope)
        row = {"plan": name, "code_bits": round(sum(bits) / weights, 4)}
        for key in ("kl", "kl_p99", "flips", "ear", "perplexity"):
            row |= {f"{key}_{k}": f"{v:.5f}" for k, v in found[key].items()}
        rows.append(row)
        print(row["plan"], row["code_bits"], row["kl_value"], flush=True)
    write(out, rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
