"""One row of results.csv: a command in a process of its own, its time and its real peak.

python experiments/14-scale/measure.py ROW [FOLDER [CAP]]

imports     the libraries alone
job PLACE   SmolLM2's whole job with its weights in PLACE (none, cpu, disk); FOLDER isn't needed
table       FOLDER, of make.py: table of the default palette from 8 x 128 tokens and exact plan, blocks
            on disk, under a cap such as 5GB
pack        FOLDER: `apply` to the plan of `table`, to nearest, written a tensor at a time, read back
gptq        FOLDER: the whole job with gptq and certificate, under a cap such as 4GB
passes      FOLDER: plain passes of the same windows, see passes.py
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.rows import append

HERE = Path(__file__).parent
SHORT = """data.calibration.sequences=8 data.calibration.length=64 data.search.sequences=2
    data.search.length=64 data.heldout.sequences=16 data.heldout.length=64"""
LONG = """data.calibration.sequences=8 data.calibration.length=128 data.search.sequences=2
    data.search.length=32 data.heldout.sequences=2 data.heldout.length=32 data=text"""
MIDDLE = """data.calibration.sequences=16 data.calibration.length=128 data.search.sequences=8
    data.search.length=64 data.heldout.sequences=8 data.heldout.length=64 data=text"""
JOB = "budget.bits=4.5 search=exact quantizer=rtn sensitivity=fisher wandb=off"


def command(row: str, folder: str, cap: str, scratch: str) -> list[str]:
    """What runs. scratch: a folder for what nobody needs afterwards."""
    what, _, place = row.partition(" ")
    if what == "passes":
        return [sys.executable, str(HERE / "passes.py"), folder, "8", "128"]
    words = {
        "imports": "--help",
        "job": f"optimize model=smollm2 {JOB} {SHORT} offload={place} hydra.run.dir={scratch}/run",
        "table": f"optimize model={folder} {JOB} {LONG} data.path={folder}/words.txt "
        f"proof.certify=false offload=disk memory={cap} hydra.run.dir={folder}-run",
        "gptq": f"optimize model={folder} budget.bits=3.5 search=exact quantizer=gptq wandb=off "
        f"{MIDDLE} data.path={folder}/words.txt offload=disk memory={cap} "
        f"hydra.run.dir={folder}-gptq",
        "pack": f"apply {folder}-run/plan.json out={folder}-packed overwrite=true",
    }[what]
    return [sys.executable, "-m", "optimizer", *shlex.split(words)]


def main(row: str, folder: str = "", cap: str = "null") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        store.mkdir()
        kept = Path(os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")).expanduser()
        for name in ("models", "hashes"):  # the model, and nothing that was measured before
            if (kept / name).exists():
                (store / name).symlink_to((kept / name).resolve())
        start = time.monotonic()
        environment = os.environ | {"MEZZOTINT_STORE": str(store)}
        done = subprocess.run(command(row, folder, cap, scratch), env=environment, check=False)
        seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"row": f"{row} {Path(folder).name}".strip(), "exit": done.returncode}
    found |= {"peak_mb": used.ru_maxrss // 1000}
    found |= {"processor_s": f"{used.ru_utime + used.ru_stime:.0f}", "wall_s": f"{seconds:.0f}"}
    append(HERE / "results.csv", found, row, Path(folder).name, cap)


if __name__ == "__main__":
    main(*sys.argv[1:])
