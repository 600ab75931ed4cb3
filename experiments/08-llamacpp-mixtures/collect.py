"""collect.py PLAN MIXTURE BYTES KL SEARCH: a row of results.csv from a finished run's plan."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from pathlib import Path

from optimizer import export
from optimizer.plan import Plan

RESULTS = Path(__file__).parent / "results.csv"
STORE = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")


def main(path: str, mixture: str, size: str, kl: str, search: str) -> None:
    plan = Plan.load(path)
    own = next(r for r in plan.certificate["rows"] if r["name"] == "plan")["kl"]
    row = {
        "mixture": mixture, "its_bytes": size, "its_kl": kl, "search": search,
        "our_bytes": export.check(plan, "gguf", STORE).bytes,
        "predicted_kl": f"{plan.predicted['kl']:.4f}", "our_kl": f"{own['value']:.4f}",
        "low": f"{own['low']:.4f}", "high": f"{own['high']:.4f}",
        "ratio": f"{own['value'] / float(kl):.2f}",
        "layers": " ".join(f"{k}:{n}" for k, n in sorted(Counter(plan.layers.values()).items())),
    }  # fmt: skip
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, row, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    print(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
