"""One uniform plan of SmolLM2: every token measure on a text, every phenomenon of the probes.

python measure.py BITS TEXT FOLDER        writes FOLDER/BITS.json; what is measured is kept
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from optimizer import certificate, examine, probes
from optimizer.bench import Bench, View, make_quantizer
from optimizer.config import Probe, Quantizer
from optimizer.data import Data, Part
from optimizer.layer import Precision
from optimizer.plan import assemble

MODEL, GROUP, PAIRS = "smollm2", 64, 24  # pairs of each phenomenon and language
STORE = "~/.cache/mezzotint"


def plan_of(bench: Bench, bits: int, folder: Path) -> Path:
    scope = bench.inventory.scoped(["blocks"])
    choice = {layer.name: Precision("int", bits, GROUP) for layer in scope}
    model = {"name": MODEL, "revision": None, "fingerprint": bench.source.fingerprint}
    plan = assemble(
        bench.inventory, scope, choice, model=model, runtime="torch", quantizer={"name": "rtn"},
        predicted={"kl": 0.0, "stderr": 0.0},
    )  # fmt: skip
    return plan.save(folder / f"uniform-{bits}.json")


def pairs_file(folder: Path) -> Path:
    pairs = probes.built_in()
    chosen = [
        p for cell in probes.cells(pairs) for p in [q for q in pairs if q.cell == cell][:PAIRS]
    ]
    lines = [json.dumps(asdict(pair), ensure_ascii=False) for pair in chosen]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main(bits: int, text: str, folder: Path, store: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = Part(sequences=1, length=256)
    data = Data(
        source="text", path=text, calibration=part, search=part,
        heldout=Part(sequences=12, length=256),
    )  # fmt: skip
    bench = Bench(MODEL, None, data, store, "cpu", View())
    plan = plan_of(bench, bits, folder)
    choice = {x.name: Precision("int", bits, GROUP) for x in bench.inventory.scoped(["blocks"])}
    scores = bench.score(choice, "heldout", make_quantizer(Quantizer()))
    counts = certificate.resamples(scores.documents, np.random.default_rng(0))
    rows = {name: asdict(value) for name, value in certificate.describe(scores, counts).items()}
    ratio = np.exp(scores.nll.mean(1) - scores.nll_reference.mean(1))
    rows["perplexity_ratio"] = asdict(certificate.mean(ratio, counts))
    found = examine.probe(Probe(plan=str(plan), probes=str(pairs_file(folder)), store=store))
    result = {"bits": bits, "text": rows, "probes": found.to_json()}
    (folder / f"{bits}.json").write_text(json.dumps(result), encoding="utf-8")
    print(bits, found.verdict, flush=True)


if __name__ == "__main__":
    import os

    main(
        int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), os.environ.get("MEZZOTINT_STORE", STORE)
    )
