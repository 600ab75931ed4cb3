"""results.csv -> results.png: held-out KL against code bits."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

here = Path(__file__).parent
rows = list(csv.DictReader((here / "results.csv").open()))
series = {
    "uniform": "uniform",
    "self-exact": "table (self-sampled text)",
    "text-exact": "table (text)",
    "self-moves": "search (self-sampled text)",
    "text-moves": "search (text)",
}
figure, axes = plt.subplots(figsize=(7, 4.5))
for prefix, label in series.items():
    found = sorted((float(r["code_bits"]), r) for r in rows if r["plan"].startswith(prefix))
    found = [(x, r) for x, r in found if x >= 3]
    if not found:
        continue
    y = [float(r["kl_value"]) for _, r in found]
    low = [v - float(r["kl_low"]) for v, (_, r) in zip(y, found, strict=True)]
    high = [float(r["kl_high"]) - v for v, (_, r) in zip(y, found, strict=True)]
    axes.errorbar([x for x, _ in found], y, [low, high], marker="o", capsize=3, label=label)
axes.set(yscale="log", xlabel="average code bits", ylabel="held-out KL, nats per token",
         title="SmolLM2-135M, RTN asymmetric g64")  # fmt: skip
axes.legend()
figure.tight_layout()
figure.savefig(here / "results.png", dpi=120)
