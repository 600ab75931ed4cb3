"""Bytes and KL promised by a plan against bytes on disk and KL inside the engine.

run.py MODEL ENGINE PLAN OUT.csv [windows] [length]    PLAN: a plan.json, or a type of llama.cpp
for every layer that takes it, such as q8_0. Appends one row; for
`torch` three: multiplied packed, unpacked exactly, and the reference in bf16, measured in turn.
AUTOROUND_PYTHON: an interpreter that has auto-round (run.sh makes one), for autoround and gptq.

KL is taken at the same positions in three ways: reference || our rounded weights in fp32 (what a
certificate promises), reference || engine (what a user gets), ours || engine (the engine's noise).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import engine
import numpy as np
import torch

from experiments.rows import append
from optimizer.commands import deploy, export
from optimizer.data.text import Data, Part
from optimizer.formats.gguf import writer as gguf
from optimizer.formats.safetensors import checkpoint
from optimizer.models.model import Model, take_inventory
from optimizer.models.source import PACKED_FILE, locate
from optimizer.plan import GGML, Plan, Precision, assemble
from optimizer.stages.session import Session
from optimizer.stages.view import View
from optimizer.store import Store

STORE = Path("~/.cache/mezzotint").expanduser()
EVERY = 6  # positions that are compared
ENGINES = {"vllm": "transformers", "gptq": "autoround"}  # who loads the format here


def everywhere(kind: str, model: str, store: Path) -> Plan:
    """One type of llama.cpp in all blocks; no promise."""
    source = locate(model, Store(store))
    inventory = take_inventory(source.folder)
    scope = inventory.scoped(["blocks"])
    precision = Precision.ggml(kind)
    choice = {x.name: precision if precision.fits(x.cols) else Precision() for x in scope}
    return assemble(
        inventory, scope, choice, runtime="llamacpp", quantizer={"name": "rtn"},
        model={"name": source.name, "fingerprint": source.fingerprint},
        predicted={"kl": float("nan"), "stderr": float("nan")},
    )  # fmt: skip


def mean_and_error(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """KL and its standard error over windows; log-probabilities [windows, positions, words]."""
    rows = (np.exp(p) * (p - q)).sum(-1).mean(-1)
    return float(rows.mean()), float(rows.std(ddof=1) / np.sqrt(len(rows)))


def main(model: str, to: str, given: str, out: str, windows: int = 6, length: int = 48) -> None:
    store = Path(os.environ.get("MEZZOTINT_STORE", STORE))
    kind = given if given in GGML else None
    plan = everywhere(kind, model, store) if kind else Plan.load(given)
    part = Part(sequences=windows, length=length)
    text = os.environ.get("TEXT")
    data = Data(source="text" if text else "self", path=text, calibration=part, search=part,
                heldout=part)  # fmt: skip
    session = Session.open(model, data, str(store))
    ids = session.windows("heldout").ids
    positions = list(range(EVERY - 1, length - 1, EVERY))
    reference = Model.load(session.source.folder, session.inventory)

    def log_p() -> np.ndarray:
        with torch.inference_mode():
            logits = reference.net(input_ids=torch.from_numpy(ids)).logits[:, positions]
        return torch.log_softmax(logits.float(), -1).numpy()

    p = log_p()
    rounder: Any = deploy.codes_of(plan, session.source, session.inventory, Store(store), View())
    with reference.rounded(rounder, plan.choice):
        ours = log_p()
    with tempfile.TemporaryDirectory() as scratch:
        folder, names = Path(scratch) / "out", [ENGINES.get(to, to)]
        if to == "torch":
            deploy.apply(plan, folder, str(store))
            predicted: int | None = plan.bytes["total"]
            file = folder / PACKED_FILE
            names += ["torch-exact", "reference"]
        else:
            predicted = export.export(plan, to, folder, str(store)).bytes
            file = folder / (gguf.FILE if to == "llamacpp" else checkpoint.FILE)
        size, own = file.stat().st_size, "autoround" in names
        python = os.environ["AUTOROUND_PYTHON"] if own else sys.executable
        runs = {
            name: engine.run(
                name,
                session.source.folder if name == "reference" else folder,
                ids,
                positions,
                python,
            )
            for name in names
        }
    promised, error = mean_and_error(p, ours)
    for name, run in runs.items():
        measured, _ = mean_and_error(p, run.log_q)
        noise, _ = mean_and_error(ours, run.log_q)
        keep(Path(out), {
            "model": Path(model).name, "format": to, "engine": name,
            "plan": kind or plan.id,
            "bits_per_weight": f"{plan.effective_bits:.3f}", "bytes_predicted": predicted,
            "bytes_on_disk": size, "positions": p.shape[0] * p.shape[1],
            "kl_promised": f"{promised:.5f}", "kl_promised_stderr": f"{error:.5f}",
            "kl_in_engine": f"{measured:.5f}", "kl_ours_to_engine": f"{noise:.6f}",
            "load_seconds": f"{run.load_seconds:.2f}",
            "tokens_per_second": f"{run.tokens_per_second:.1f}", "peak_MB": run.peak_mb,
        })  # fmt: skip


def keep(out: Path, row: dict[str, object]) -> None:
    append(out, row)
    print(row)


if __name__ == "__main__":
    model, to, given, out = sys.argv[1:5]
    main(model, to, given, out, *map(int, sys.argv[5:]))
