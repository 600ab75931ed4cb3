"""raw.jsonl -> results.csv: medians, ratio of times, peaks over the loaded model's."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from experiments.rows import write

here = Path(__file__).parent
rows = [json.loads(line) for line in (here / "raw.jsonl").read_text().splitlines()]
by = {w: [r for r in rows if r["what"] == w] for w in ("load", "passes", "table")}
base = median(r["peak"] for r in by["load"])
plain = [r["seconds"] for r in by["passes"]]
table = []
for what in ("load", "passes", "table"):
    seconds = [r["seconds"] for r in by[what]]
    high = median(r["peak"] for r in by[what])
    table.append({
        "what": what, "seconds": f"{median(seconds):.1f}", "seconds_min": f"{min(seconds):.1f}",
        "seconds_max": f"{max(seconds):.1f}",
        "ratio_to_passes": f"{median(s / p for s, p in zip(seconds, plain, strict=True)):.2f}",
        "peak_MB": f"{high / 1e6:.0f}", "peak_over_loaded_MB": f"{(high - base) / 1e6:.0f}",
        "commit": by[what][0].get("commit", ""), "config": by[what][0].get("config", ""),
    })  # fmt: skip
write(here / "results.csv", table)
print((here / "results.csv").read_text())
