"""NAME-curve.csv -> NAME-curve.png: tail against mean as the weights grow. Usage: plot.py NAME"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

here, name = Path(__file__).parent, sys.argv[1]
rows = list(csv.DictReader((here / f"{name}-curve.csv").open()))
sizes = list(dict.fromkeys(row["code_bits"] for row in rows))
figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4.5), squeeze=False)
for axis, size in zip(axes[0], sizes, strict=True):
    for part, mark in (("cvar", "o"), ("domain", "s"), ("probes", "^")):
        own = [r for r in rows if r["code_bits"] == size and r["part"] == part]
        x, y = ([float(r[f"{k}_ratio"]) for r in own] for k in ("mean", "cvar99"))
        low, high = ([float(r[f"cvar99_{k}"]) for r in own] for k in ("low", "high"))
        errors = [[b - a for a, b in zip(low, y, strict=True)],
                  [b - a for a, b in zip(y, high, strict=True)]]  # fmt: skip
        axis.errorbar(x, y, errors, marker=mark, capsize=2, label=f"weight of {part}")
        for r, a, b in zip(own, x, y, strict=True):
            axis.annotate(
                r["weight"], (a, b), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
    axis.fill_between([0.97, 1.03], 0, 0.9, color="0.92", label="wanted")
    axis.set(xlabel="mean KL over weight 0", ylabel="CVaR 0.99 over weight 0",
             title=f"{size} code bits", ylim=(0.75, 1.2))  # fmt: skip
axes[0, 0].legend(fontsize=8)
figure.suptitle(f"{name}, held-out text, exact plans of the table")
figure.tight_layout()
figure.savefig(here / f"{name}-curve.png", dpi=110)
