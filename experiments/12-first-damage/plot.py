"""NAME.csv -> NAME.png: how clearly each measure sees damage at equal text, and where probes do.

Usage: plot.py NAME"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

here, name = Path(__file__).parent, sys.argv[1]
rows = list(csv.DictReader((here / f"{name}.csv").open()))
bits = list(dict.fromkeys(row["bits"] for row in rows))
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.5))
marks = iter("osD^vP*X<>")
for measure in dict.fromkeys(row["measure"] for row in rows):
    own = {r["bits"]: float(r["z_equal"]) for r in rows if r["measure"] == measure
           and r["language"] == "en" and r["where"] in ("text", "all")}  # fmt: skip
    if measure != "share of margin lost":
        left.plot(bits, [own[b] for b in bits], marker=next(marks), label=measure)
left.axhspan(-2, 2, color="0.9")
left.set(xlabel="bits", ylabel="excess over bf16's noise / its standard error",
         title="English, scaled to 10,000 tokens (grey: nothing shown)")  # fmt: skip
left.set_yscale("symlog", linthresh=2)
left.legend(fontsize=8)
cells = sorted({r["where"] for r in rows if r["language"] == "en"} - {"text", "all"})
of = {(r["where"], r["bits"]): r for r in rows
      if r["measure"] == "margin: mean change" and r["language"] == "en"}  # fmt: skip
value = np.array([[float(of[c, b]["excess"]) for b in bits] for c in cells])
shown = right.imshow(np.log10(np.maximum(value, 1e-3)), aspect="auto", cmap="cividis")
for i, cell in enumerate(cells):
    for k, b in enumerate(bits):
        sure = float(of[cell, b]["p_holm"]) < 0.05
        text = f"{value[i, k]:.2f}" if sure else f"({value[i, k]:.2f})"
        right.text(k, i, text, ha="center", va="center", fontsize=8,
                   color="white" if value[i, k] < 0.5 else "black")  # fmt: skip
right.set(xticks=range(len(bits)), xticklabels=bits, yticks=range(len(cells)), yticklabels=cells,
          xlabel="bits", title="change of margin, nats; in brackets: not shown")  # fmt: skip
figure.colorbar(shown, ax=right, label="log10")
figure.suptitle(f"{name}: uniform plans, RTN, groups of 64")
figure.tight_layout()
figure.savefig(here / f"{name}.png", dpi=110)
