"""Runs of compare.py -> results.csv and results.png. Usage: collect.py RUNS HERE"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.rows import write

COLOURS = {"moves tpe": "#0072b2", "multipliers tpe": "#009e73", "multipliers gp": "#56b4e9",
           "multipliers cmaes": "#f0e442", "directions tpe": "#cc79a7", "directions gp": "#882255",
           "directions cmaes": "#aa4499", "layers tpe": "#ddcc77", "layers nsgaii": "#999933",
           "evolution": "#d55e00", "random": "#999999"}  # fmt: skip


def main(runs: Path, here: Path) -> None:
    found = [json.loads(p.read_text()) for p in sorted(runs.glob("*.json"))]
    keys = [
        (k, e) for k in ("kl", "kl_p99", "kl_cvar99", "flips") for e in ("value", "low", "high")
    ]
    rows = [
        {"code_bits": run["bits"], "method": run["method"], "seed": run["seed"]}
        | {"tokens": run["tokens"], "seconds": f"{run['seconds']:.0f}"}
        | {f"{k}_{e}": f"{run['heldout'][k][e]:.5f}" for k, e in keys}
        | {name: run.get(name, "") for name in ("commit", "config")}
        for run in found
    ]
    write(here / "results.csv", rows)
    budgets = sorted({run["bits"] for run in found if run["curve"]})
    figure, axes = plt.subplots(1, len(budgets), figsize=(5.5 * len(budgets), 4), squeeze=False)
    for axis, bits in zip(axes[0], budgets, strict=True):
        for method, colour in COLOURS.items():
            own = [r for r in found if r["bits"] == bits and r["method"] == method]
            for i, run in enumerate(own):
                curve = np.array(run["curve"])
                axis.step(curve[:, 0] / 1e3, curve[:, 1], where="post", color=colour, alpha=0.8,
                          label=method if i == 0 else None)  # fmt: skip
        axis.set(title=f"{bits:g} code bits", xlabel="evaluated tokens, thousands",
                 ylabel="best KL on search windows, nats", yscale="log")  # fmt: skip
        axis.legend()
    figure.tight_layout()
    figure.savefig(here / "results.png", dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
