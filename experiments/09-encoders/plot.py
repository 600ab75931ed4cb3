"""results.csv -> results.png: held-out KL and what it means for neighbours, against size."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TEXTS = {"own": "the project's sentences", "given": "WikiText-2 paragraphs"}
KINDS = {"uniform": "o-", "table": "s", "searched": "^", "matched": "v"}

rows = list(csv.DictReader((HERE / "results.csv").open()))
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
for colour, (text, about) in enumerate(TEXTS.items()):
    for kind, look in KINDS.items():
        own = [r for r in rows if r["text"] == text and r["plan"].startswith(f"{kind}-")]
        own = sorted(own, key=lambda r: int(r["bytes"]))
        if not own:
            continue
        x = [int(r["bytes"]) / 1e6 for r in own]
        for axis, key, scale in ((axes[0], "kl", 1), (axes[1], "overlap", 100)):
            y, low, high = ([scale * float(r[k]) for r in own]
                            for k in (key, f"{key}_low", f"{key}_high"))  # fmt: skip
            errors = [[v - a for v, a in zip(y, low, strict=True)],
                      [b - v for v, b in zip(y, high, strict=True)]]  # fmt: skip
            axis.errorbar(x, y, errors, fmt=look, color=f"C{colour}", capsize=3, markersize=5,
                          label=f"{kind}, {about}")  # fmt: skip
        if text == "own":
            promised = [float(r["predicted"]) for r in own]
            axes[2].plot(promised, [float(r["kl"]) for r in own], look[0], color="C0", label=kind)
        else:
            promised = [float(r["predicted"]) for r in own]
            axes[2].plot(promised, [float(r["kl"]) for r in own], look[0], color="C1")
axes[0].set(
    yscale="log",
    ylim=(1e-4, 60),
    xlabel="MB of the blocks' layers",
    ylabel="held-out KL, nats per text",
)
axes[1].set(xlabel="MB of the blocks' layers", ylabel="10 nearest texts that stay, %")
ends = [1e-4, 2]
axes[2].plot(ends, ends, ":", color="gray")
axes[2].set(xscale="log", yscale="log", xlabel="promised by the table", ylabel="measured")
axes[0].legend(fontsize=6, loc="upper right")
figure.suptitle("all-MiniLM-L6-v2, RTN asymmetric g64")
figure.tight_layout()
figure.savefig(HERE / "results.png", dpi=120)
