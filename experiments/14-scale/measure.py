"""One row of results.csv: a command in a process of its own, its time and its real peak.

python experiments/14-scale/measure.py ROW    (README.md lists them; LLAMA: a folder of make.py)
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
LLAMA = os.environ.get("LLAMA", "llama-1b")
SHORT = """data.calibration.sequences=8 data.calibration.length=64 data.search.sequences=2
    data.search.length=64 data.heldout.sequences=16 data.heldout.length=64"""
SMALL = f"""sensitivity.chunks=2 data.calibration.sequences=4 data.calibration.length=32
    data.search.sequences=2 data.search.length=32 data.heldout.sequences=2 data.heldout.length=32
    data=text data.path={LLAMA}/words.txt"""
JOB = "search=exact quantizer=rtn sensitivity=fisher wandb=off"
TABLE = f"optimize model=smollm2 budget.bits=4.5 {JOB} {SHORT}"
BIG = f"optimize model={LLAMA} budget.bits=4.5 {JOB} {SMALL} proof.certify=false"
ROWS = {
    "imports": "--help",
    "smollm2 none": f"{TABLE} offload=none",
    "smollm2 cpu": f"{TABLE} offload=cpu",
    "smollm2 disk": f"{TABLE} offload=disk",
    "llama none": f"{BIG} offload=none",
    "llama disk": f"{BIG} offload=disk",
    "llama pack": f"apply {LLAMA}-run/plan.json out={LLAMA}-packed overwrite=true",
}


def main(row: str) -> None:
    command = [sys.executable, "-m", "optimizer", *shlex.split(ROWS[row])]
    with tempfile.TemporaryDirectory() as store:
        if row.endswith(("none", "disk", "cpu")):
            command += [
                f"hydra.run.dir={LLAMA}-run" if "llama" in row else f"hydra.run.dir={store}/run"
            ]
        kept = Path(os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")).expanduser()
        for name in ("models", "hashes"):  # the model, and nothing that was measured before
            if (kept / name).exists():
                (Path(store) / name).symlink_to((kept / name).resolve())
        start = time.monotonic()
        done = subprocess.run(command, env=os.environ | {"MEZZOTINT_STORE": store}, check=False)
        seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    file = HERE / "results.csv"
    found = {"row": row, "exit": done.returncode, "peak_mb": used.ru_maxrss // 1000}
    found |= {"processor_s": f"{used.ru_utime + used.ru_stime:.0f}", "wall_s": f"{seconds:.0f}"}
    append(file, found, row)


if __name__ == "__main__":
    main(sys.argv[1])
