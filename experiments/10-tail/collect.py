"""Plans of run.sh -> results.csv: mean and tail of the held-out KL, and both against the plan that
was made for the mean alone, paired over documents. Usage: collect.py RUNS HERE"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from experiments.rows import write
from optimizer.data.text import Data
from optimizer.metrics import bootstrap
from optimizer.plan import Plan
from optimizer.quantization.methods import Rtn, bind
from optimizer.stages.session import Session


def tail(kl: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """CVaR 0.99 in each resample."""
    windows = np.repeat(np.arange(len(kl)), kl.shape[1])
    order = np.argsort(-kl, axis=None)
    worst, windows = kl.ravel()[order].astype(float), windows[order]
    found = []
    for count in counts:
        weight = count[windows].astype(float)
        mass = 0.01 * weight.sum()
        before = np.cumsum(weight) - weight
        found.append(np.clip(mass - before, 0, weight) @ worst / mass)
    return np.array(found)


def main(runs: Path, here: Path) -> None:
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    rows = []
    plans = {p.parent.name: Plan.load(p) for p in sorted(runs.glob("*/plan.json"))}
    for name, plan in plans.items():
        bits, cvar = name.split("-")
        settings = plan.provenance["data"]
        data = Data(source="text", path=settings["path"])
        session = Session.open("smollm2", data, store)
        quantizer = bind(Rtn(), session)
        scores = session.score(plan.choice, "heldout", quantizer)
        base = session.score(plans[f"{bits}-0"].choice, "heldout", quantizer)
        counts = bootstrap.resamples(scores.documents, np.random.default_rng(0))[:500]
        once = np.ones((1, len(scores.kl)), dtype=int)
        row = {"code_bits": bits, "cvar_weight": cvar}
        measures = {
            "kl": lambda s, c: c @ s.kl.mean(1) / c.sum(1),
            "cvar99": lambda s, c: tail(s.kl, c),
        }
        for key, value in measures.items():
            ratio = value(scores, counts) / value(base, counts)
            low, high = np.quantile(ratio, [0.025, 0.975])
            row |= {key: f"{value(scores, once)[0]:.4f}",
                    f"{key}_ratio": f"{value(scores, once)[0] / value(base, once)[0]:.3f}",
                    f"{key}_low": f"{low:.3f}", f"{key}_high": f"{high:.3f}"}  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    write(here / "results.csv", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
