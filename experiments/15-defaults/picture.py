"""picture.py ROWS.csv OUT.png: KL over the judges against processor minutes, a panel for each size;
orange: by GPTQ."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

PLACES = {  # of names whose neighbours are near
    "rtn fisher 24": (-14, -16),
    "standard": (-20, -16),
    "gptq gain 8": (-45, 7),
    "gptq 128, gain 16": (-14, 18),
    "gptq gain 64": (-45, 7),
}


def main(file: str, out: str) -> None:
    with Path(file).open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = Figure(figsize=(4.5 * len(sizes), 3.6), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for row in (row for row in rows if row["size"] == size):
            minutes, kl = float(row["seconds"]) / 60, float(row["mean"])
            gptq = "gptq" in row["way"] or row["way"] == "standard"
            axes.plot(minutes, kl, "o", color="tab:orange" if gptq else "tab:blue")
            place = PLACES.get(row["way"], (-14, 7))
            axes.annotate(row["way"], (minutes, kl), place, textcoords="offset points")
        axes.set(title=f"SmolLM2 in {size}", xlabel="processor minutes", yscale="log")
        axes.margins(x=0.3, y=0.25)
    figure.supylabel("KL, 8 kinds of text of others")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
