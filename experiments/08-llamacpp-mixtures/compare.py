"""Our GGUF files and llama.cpp's own mixtures, measured by llama.cpp on the same held-out windows.

compare.py reference TEXT SCRATCH            the reference's log-probabilities, and its 16-bit GGUF
compare.py theirs TYPE SCRATCH               llama_model_quantize makes TYPE from that file
compare.py ours TYPE NAME PLAN SCRATCH       the plan's export, which must be no larger than TYPE's

The last two append a row to results.csv. CYLLAMA: a folder that holds the cyllama package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.rows import read, stamped, write
from optimizer.commands import export
from optimizer.data.text import Data, Part
from optimizer.models.model import Model
from optimizer.plan import Plan, assemble
from optimizer.stages.session import Session

HERE = Path(__file__).parent
RESULTS, MODEL = HERE / "results.csv", "smollm2"
STORE = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
RESAMPLES = 2000


def reference(text: str, scratch: str) -> None:
    if (Path(scratch) / "request.npz").exists():
        return
    data = Data(source="text", path=text, heldout=Part(sequences=12, length=256))
    session = Session.open(MODEL, data, STORE)
    ids, net = (
        session.windows("heldout").ids,
        Model.load(session.source.folder, session.inventory).net,
    )
    with torch.inference_mode():
        rows = [net(input_ids=torch.from_numpy(row[None])).logits[0, :-1] for row in ids]
        log_p = torch.stack([torch.log_softmax(row, -1) for row in rows]).numpy()
    np.savez(Path(scratch) / "request.npz", ids=ids, log_p=log_p)
    plan = assemble(
        session.inventory, session.inventory.scoped(["all"]), {},
        model={"name": session.source.name, "fingerprint": session.source.fingerprint},
        runtime="llamacpp", quantizer={"name": "rtn"}, predicted={"kl": 0.0, "stderr": 0.0},
    )  # fmt: skip
    export.export(plan, "gguf", Path(scratch) / "16", STORE, overwrite=True)


def theirs(kind: str, scratch: str) -> None:
    file = Path(scratch) / f"{kind}.gguf"
    if not file.exists():
        _mixture("quantize", str(Path(scratch) / "16" / "model.gguf"), str(file), kind)
    _keep(kind, "llama.cpp", file, Path(scratch), None)


def ours(kind: str, name: str, plan: str, scratch: str) -> None:
    folder = Path(scratch) / f"{kind}-{name}-gguf"
    export.export(Plan.load(plan), "gguf", folder, STORE, overwrite=True)
    _keep(kind, name, folder / "model.gguf", Path(scratch), Plan.load(plan))


def _mixture(*arguments: str) -> None:
    paths = os.pathsep.join([os.environ["CYLLAMA"], os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "mixture.py"), *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})


def _types(file: Path) -> str:
    from gguf import GGUFReader

    found = Counter(t.tensor_type.name for t in GGUFReader(file).tensors if len(t.shape) > 1)
    head = next(t for t in GGUFReader(file).tensors if t.name == "token_embd.weight")
    own = " ".join(f"{kind}:{n}" for kind, n in sorted(found.items()))
    return f"embedding {head.tensor_type.name}; {own}"


def _keep(kind: str, name: str, file: Path, scratch: Path, plan: Plan | None) -> None:
    _mixture("score", str(file), str(scratch / "request.npz"), str(scratch / f"{kind}-{name}.npz"))
    found = np.load(scratch / f"{kind}-{name}.npz")
    windows = found["kl"].mean(1)
    draws = np.random.default_rng(0).integers(0, len(windows), (RESAMPLES, len(windows)))
    low, high = np.quantile(windows[draws].mean(1), [0.025, 0.975])
    rows = [r for r in read(RESULTS) if (r["mixture"], r["file"]) != (kind, name)]
    rival = next((r for r in rows if (r["mixture"], r["file"]) == (kind, "llama.cpp")), None)
    row = {
        "mixture": kind, "file": name, "bytes": file.stat().st_size,
        "predicted_kl": f"{plan.predicted['kl']:.4f}" if plan else "",
        "kl": f"{windows.mean():.5f}", "low": f"{low:.5f}", "high": f"{high:.5f}",
        "flips": f"{found['flip'].mean():.4f}",
        "ratio": f"{windows.mean() / float(rival['kl']):.3f}" if rival else "1",
        "fits": int(file.stat().st_size <= int(rival["bytes"])) if rival else 1,
        "tensors": _types(file),
    }  # fmt: skip
    print(row, flush=True)
    order = ["Q2_K", "Q3_K_M", "Q4_K_M", "Q6_K"]
    rows.append(stamped(row, kind, name, plan.id if plan else None))
    rows.sort(key=lambda r: (order.index(r["mixture"]), r["file"] != "llama.cpp", r["file"]))
    write(RESULTS, rows)


if __name__ == "__main__":
    commands: dict[str, Any] = {"reference": reference, "theirs": theirs, "ours": ours}
    commands[sys.argv[1]](*sys.argv[2:])
