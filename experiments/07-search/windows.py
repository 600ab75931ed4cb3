"""On how many windows should a trial of `moves` be measured, at equal tokens?

Usage: windows.py MODEL TEXT OUT_FOLDER HELDOUT TOKENS BUDGET SEED,SEED.. WINDOWS,WINDOWS..
       windows.py rows OUT_FOLDER CSV     all runs there, over the table's optimum of results.csv
e.g. windows.py stories260k self out 96 160000 3 0,1,2 12,24,48
"""

from __future__ import annotations

import sys
from pathlib import Path

from compare import Job, Race, measure, over_table, without_pictures

from experiments.rows import write
from optimizer.stages import studies


def run(race: Race, job: Job, windows: int, out: Path) -> None:
    setattr(studies, "affordable", lambda *_: windows)  # noqa: B010
    folder = out / str(windows) / Path(race.base.model).name
    folder.mkdir(parents=True, exist_ok=True)
    if not job.file(folder).exists():
        measure(race, job, folder)


def main(words: list[str]) -> None:
    if words[0] == "rows":
        write(Path(words[2]), over_table(Path(words[1]), "windows"))
        return
    model, text, out, heldout, tokens, budget, seeds, windows = words
    without_pictures()
    race = Race(model, text, "blocks", int(heldout))
    for seed in map(int, seeds.split(",")):
        job = Job("blocks", int(tokens), float(budget), seed, "moves", "tpe")
        for count in map(int, windows.split(",")):
            run(race, job, count, Path(out))


if __name__ == "__main__":
    main(sys.argv[1:])
