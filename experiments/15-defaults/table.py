"""results.csv as ratios to one text or way: table.py results.csv MODEL SIZE "bundled: quick"

For each row of that model and size: the geometric mean over judges of its KL over the rival's, with a
95 % bootstrap interval over the windows of each judge, paired; and each judge's own ratio.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np

DRAWS = 2000


def main(file: str, model: str, size: str, rival: str) -> None:
    with Path(file).open(newline="", encoding="utf-8") as lines:
        rows = [r for r in csv.DictReader(lines) if (r["model"], r["size"]) == (model, size)]
    for row in rows:
        name = f"{row['text']}: {row['way']}"
        base = next(
            (r for r in rows if f"{r['text']}: {r['way']}" == rival and r["seed"] == row["seed"]),
            None,
        )
        if base is None:
            continue
        mine, other = json.loads(row["each"]), json.loads(base["each"])
        rng = np.random.default_rng(0)
        logs = []
        for judge, kl in mine.items():
            picked = rng.integers(0, len(kl), (DRAWS, len(kl)))
            picked[0] = range(len(kl))
            means = [np.array(x)[picked].mean(1) for x in (kl, other[judge])]
            logs.append(np.log(means[0] / means[1]))
        ratios = np.exp(np.mean(logs, 0))
        low, high = np.quantile(ratios, [0.025, 0.975])
        own = ", ".join(f"{j} {np.exp(x[0]):.2f}" for j, x in zip(mine, logs, strict=True))
        print(
            f"{name:24} seed {row['seed']} KL {row['mean']} {ratios[0]:.3f} [{low:.3f}, {high:.3f}] "
            f"{row['seconds'] or '?'} s   {own}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
