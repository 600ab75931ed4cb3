"""On how many windows should a trial of `moves` be measured, at equal tokens?

Usage: windows.py MODEL TEXT OUT_FOLDER HELDOUT TOKENS BUDGET SEED,SEED.. WINDOWS,WINDOWS..
       windows.py rows OUT_FOLDER CSV     all runs there, over the table's optimum of results.csv
e.g. windows.py stories260k self out 96 160000 3 0,1,2 12,24,48
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compare import Job, Race, measure

from experiments.rows import read, write
from optimizer.search import pictures
from optimizer.stages import studies


def run(race: Race, job: Job, windows: int, out: Path) -> None:
    setattr(studies, "affordable", lambda *_: windows)  # noqa: B010
    folder = out / str(windows) / Path(race.base.model).name
    folder.mkdir(parents=True, exist_ok=True)
    if not job.file(folder).exists():
        measure(race, job, folder)


def rows(out: Path, csv: Path) -> None:
    table = {
        (row["model"], row["terms"], float(row["budget"])): float(row["kl_value"])
        for row in read(Path(__file__).parent / "results.csv")
        if row["method"] == "exact" and row["terms"] == "blocks"
    }
    found = []
    for file in sorted(out.glob("*/*/*.json")):
        record = json.loads(file.read_text())
        kl = record["heldout"]["kl"]
        start = table[file.parent.name, record["terms"], record["budget"]]
        found.append({
            "model": file.parent.name, "budget": record["budget"],
            "tokens_allowed": record["tokens_allowed"], "windows": file.parts[-3],
            "seed": record["seed"], "kl": f"{kl['value']:.4f}", "low": f"{kl['low']:.4f}",
            "high": f"{kl['high']:.4f}", "over_table": f"{kl['value'] / start:.3f}",
            "tokens": record["tokens"], "commit": record["commit"], "config": record["config"],
        })  # fmt: skip
    write(csv, found)


def main(words: list[str]) -> None:
    if words[0] == "rows":
        rows(Path(words[1]), Path(words[2]))
        return
    model, text, out, heldout, tokens, budget, seeds, windows = words
    setattr(pictures, "draw", lambda _study: {})  # noqa: B010  seconds a run, for no reader
    race = Race(model, text, "blocks", int(heldout))
    for seed in map(int, seeds.split(",")):
        job = Job("blocks", int(tokens), float(budget), seed, "moves", "tpe")
        for count in map(int, windows.split(",")):
            run(race, job, count, Path(out))


if __name__ == "__main__":
    main(sys.argv[1:])
