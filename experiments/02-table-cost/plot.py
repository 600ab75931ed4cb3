"""raw.jsonl -> results.csv: medians, ratio of times, peaks over the loaded model's."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import median

here = Path(__file__).parent
rows = [json.loads(line) for line in (here / "raw.jsonl").read_text().splitlines()]
by = {w: [r for r in rows if r["what"] == w] for w in ("load", "passes", "table")}
base = median(r["peak"] for r in by["load"])
plain = [r["seconds"] for r in by["passes"]]
with (here / "results.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["what", "seconds", "seconds_min", "seconds_max", "ratio_to_passes",
                     "peak_MB", "peak_over_loaded_MB"])  # fmt: skip
    for what in ("load", "passes", "table"):
        seconds = [r["seconds"] for r in by[what]]
        high = median(r["peak"] for r in by[what])
        ratio = median(s / p for s, p in zip(seconds, plain, strict=True))
        writer.writerow([what, f"{median(seconds):.1f}", f"{min(seconds):.1f}",
                         f"{max(seconds):.1f}", f"{ratio:.2f}", f"{high / 1e6:.0f}",
                         f"{(high - base) / 1e6:.0f}"])  # fmt: skip
print((here / "results.csv").read_text())
