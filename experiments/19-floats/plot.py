"""results.csv -> results.png: KL against bits a weight."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
rows = list(csv.DictReader((HERE / "results.csv").open()))
for row in rows:
    quantizer, _, arm = row["arm"].partition(" ")
    x, y, error = (float(row[key]) for key in ("bits", "kl", "stderr"))
    color = "tab:blue" if arm.startswith("int") else "tab:orange"
    marker = {"rtn": "o", "gptq": "s"}[quantizer]
    plt.errorbar(x, y, error, color=color, marker=marker, fillstyle="none")
    plt.annotate(row["arm"], (x, y), fontsize=7, xytext=(4, 2), textcoords="offset points")
plt.yscale("log")
plt.xlabel("bits a weight, with scales")
plt.ylabel("KL to the reference, nats per token")
plt.title(rows[0]["model"])
plt.savefig(HERE / "results.png", dpi=120)
