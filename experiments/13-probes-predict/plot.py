"""NAME-plans.csv -> NAME.png: share of test items turned over, against mean KL and the probes' flips.

Usage: plot.py NAME"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

here, name = Path(__file__).parent, sys.argv[1]
rows = list(csv.DictReader((here / f"{name}-plans.csv").open()))
figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True)
for axis, key in zip(axes, ("mean KL", "probes: flips"), strict=True):
    for kind, mark in (("uniform", "s"), ("table", "o"), ("random", "^"), ("", "x")):
        own = [r for r in rows if r["plan"].startswith(kind)] if kind else [
            r for r in rows if r["plan"].split()[0] not in ("uniform", "table", "random")]  # fmt: skip
        axis.scatter([float(r[key]) for r in own], [float(r["all sets: flips"]) for r in own],
                     marker=mark, label=kind or "one-sided")  # fmt: skip
    axis.set(xlabel=key, ylabel="items of the test sets turned over")
axes[0].set_xscale("log")
axes[0].legend()
figure.suptitle(f"{name}: {len(rows)} plans")
figure.tight_layout()
figure.savefig(here / f"{name}.png", dpi=110)
