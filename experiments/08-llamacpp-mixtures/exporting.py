"""What an export of a plan with IQ types takes: time of each stage and the most memory.

exporting.py MODEL TEXT SCRATCH TYPE NAME    SCRATCH: what measure.py left there; TYPE: whose bytes
                                             the table's optimum may take. A row NAME of exporting.csv

Run it twice: the first run makes the payloads and keeps them in the store, where a plan's certificate
would have left them; the second finds them there. Seconds are of all threads' processor time; `wall`
is the whole by the clock. Memory is the process's largest resident set.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from matrix import Model
from matrix import optimum as plan_of
from measure import STORE, data_of

from experiments.rows import append
from optimizer.commands.export import export
from optimizer.plan import Precision, assemble
from optimizer.quantization.methods import Importance, bind
from optimizer.stages.session import Session
from optimizer.stages.view import View

RESULTS = Path(__file__).parent / "exporting.csv"


class Stages(View):
    """Processor seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last, self._name = time.process_time(), "opening"

    def stage(self, text: str) -> None:
        now = time.process_time()
        self.seconds[self._name] += now - self._last
        self._last, self._name = now, text
        print(text, f"{now:.0f} s, {_memory():.2f} GB", flush=True)


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(model: str, text: str, scratch: str, at: str, name: str) -> None:
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    session = Session.open(model, data_of(text, 4), STORE)
    own = Model(scratch)
    kinds = plan_of(own, own.size(own.types(at)))
    layers = {x: Precision.ggml(kinds[t]) for x, t in own.names.items()}
    quantizer = Importance().described(session.calibration_key)
    plan = assemble(
        session.inventory, session.inventory.scoped(["all"]), layers,
        model={"name": model, "fingerprint": session.source.fingerprint},
        runtime="llamacpp", quantizer=quantizer, predicted={"kl": 0.0, "stderr": 0.0},
    )  # fmt: skip
    _ = bind(Importance(), session).columns  # measured when the plan was made
    del session, own
    codes = Path(STORE).expanduser() / "codes"
    before = len(list(codes.glob("*"))) if codes.is_dir() else 0
    start, view = _memory(), Stages()
    clock = time.monotonic()
    found = export(plan, "gguf", Path(scratch) / "exported", STORE, overwrite=True, view=view)
    clock = time.monotonic() - clock
    view.stage("")
    made = len(list(codes.glob("*"))) - before
    row: dict[str, Any] = {
        "model": name, "at": at, "bytes": found.bytes, "threads": torch.get_num_threads(),
        "layers": len(kinds), "payloads_made": made, "wall": f"{clock:.0f}",
        "seconds": f"{sum(view.seconds.values()):.0f}", "gb_before": f"{start:.2f}",
        "gb": f"{_memory():.2f}",
        "stages": "; ".join(f"{k} {v:.0f}" for k, v in view.seconds.items()),
    }  # fmt: skip
    print(row)
    append(RESULTS, row, name, at)


if __name__ == "__main__":
    main(*sys.argv[1:])
