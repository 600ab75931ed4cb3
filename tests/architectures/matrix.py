"""The support matrix: every architecture through optimize, apply and load.

    python -m tests.architectures.matrix [KIND ...]              measures; without names, all of them
    python -m tests.architectures.matrix transformers [KIND ...] the same for transformers' own loader
    python -m tests.architectures.matrix gguf                    takes over what llama.cpp computes
    python -m tests.architectures.matrix render                  writes the page from the data

A row is exact if the loaded model gives the logits of the reference rounded in place, bit for bit, the
file has the bytes that the plan promises, and every tensor of the checkpoint is accounted for. With
`scope=all`, so that nothing is left to hope.

The column of transformers: a plan with `runtime=transformers`, exported in the compressed-tensors
format; transformers' own loader reads the folder and computes the packed model's logits, see
`formats.safetensors.read_back`. It is `read` or `refused`, with the words.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers

import optimizer
from optimizer import Budget, MezzotintError, Plan
from optimizer.commands import export
from optimizer.config import Proof
from optimizer.data.text import Data, Part
from optimizer.formats.gguf.base import ALIKE
from optimizer.formats.runtime import Runtime
from optimizer.models.checkpoint import open_checkpoint
from optimizer.models.model import Model, take_inventory
from optimizer.models.source import quiet
from optimizer.plan import Palette
from optimizer.quantization.methods import Rtn
from optimizer.quantization.uniform import Nearest
from optimizer.search import Search
from optimizer.sensitivity.estimators import Fisher
from tests.architectures import zoo

DOCS = Path(__file__).parents[2] / "docs"
DATA, PAGE = DOCS / "support-matrix.json", DOCS / "support-matrix.md"
IDS = torch.arange(5, 29).view(2, 12)
SMALL = Data(
    calibration=Part(sequences=8, length=16),
    search=Part(sequences=2, length=16),
    heldout=Part(sequences=2, length=16),
)
TRANSFORMERS = Runtime(
    name="transformers", experts="model", executes=["none", "int[2-8]_*_sym"]
)  # as conf/runtime/transformers.yaml
COLUMN = ("transformers", "transformers_why")
GGUF, MEASURED = "gguf", DOCS.parent / "experiments" / "17-gguf-architectures" / "results.csv"
LEAST = 1e-3  # what rounding moves logits by, at least


@dataclass(frozen=True)
class Row:
    """class_: transformers' class. outcome: `exact`, `refused`, `not built` or `WRONG`; why: the
    sentence. share: of the checkpoint's numbers that are in layers. notes: what the inventory says."""

    kind: str
    class_: str
    outcome: str
    why: str = ""
    share: float = 0.0
    notes: tuple[str, ...] = ()
    transformers: str = ""
    transformers_why: str = ""


def measure(kind: str) -> Row:
    """One architecture. Never raises."""
    try:
        net = zoo.build(kind)
    except Exception as error:  # noqa: BLE001  each architecture's own
        return Row(kind, str(zoo.CAUSAL.get(kind, kind)), "not built", _line(error))
    name = type(net).__name__
    with tempfile.TemporaryDirectory() as draft:
        folder = Path(draft) / "model"
        try:
            with quiet():
                net.to(torch.bfloat16).save_pretrained(folder)
            del net
            return _measured(kind, name, folder, Path(draft))
        except MezzotintError as error:
            return Row(kind, name, "refused", _line(error).replace(str(folder), "the model"))
        except Exception as error:  # noqa: BLE001  what the matrix is there to find
            return Row(kind, name, "WRONG", f"{type(error).__name__}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def read_by_transformers(kind: str) -> tuple[str, str]:
    """`read`, `refused`, `not built` or `WRONG` for the export to transformers, and the words. Never
    raises."""
    try:
        net = zoo.build(kind)
    except Exception as error:  # noqa: BLE001  each architecture's own
        return "not built", _line(error)
    with tempfile.TemporaryDirectory() as draft:
        folder = Path(draft) / "model"
        try:
            with quiet():
                net.to(torch.bfloat16).save_pretrained(folder)
            store = str(Path(draft) / "store")
            plan = planned(folder, Path(draft), TRANSFORMERS)
            found = export.export(plan, "transformers", Path(draft) / "out", store)
            own = [x for x in found.readers if "the plan's logits" in x]
            rounded = sum(name != "none" for name in plan.layers.values())
            if not own:
                return "refused", "; ".join(found.readers)
            return "read", f"{rounded} of {len(plan.layers)} layers rounded; {own[0]}"
        except MezzotintError as error:
            return "refused", _line(error).replace(str(folder), "the model")
        except Exception as error:  # noqa: BLE001  what the matrix is there to find
            return "WRONG", f"{type(error).__name__}: {_line(error)}"


def planned(folder: Path, draft: Path, runtime: Runtime | None = None) -> Plan:
    """`optimize` with everything in scope and no more text than it takes."""
    symmetric = runtime is not None
    return optimizer.optimize(
        str(folder),
        draft / "run",
        runtime=runtime or Runtime(),
        budget=Budget(bits=7 if symmetric else 5),
        scope=["all"],
        palette=Palette(
            bits=[4, 8, 16] if symmetric else [2, 3, 4, 8], group_size=16, symmetric=symmetric
        ),
        data=SMALL,
        quantizer=Rtn(),
        sensitivity=Fisher(),
        search=Search(space="exact"),
        proof=Proof(certify=False, random=0, domains=[]),
        store=str(draft / "store"),
    )


def _measured(kind: str, name: str, folder: Path, draft: Path) -> Row:
    plan = planned(folder, draft)
    packed = optimizer.apply(plan, draft / "packed", store=str(draft / "store"))
    inventory = take_inventory(folder)
    model = Model.load(folder, inventory)
    before = logits(model)
    with model.rounded(Nearest(), plan.choice):
        rounded = logits(model)
    model.net = optimizer.load(packed)
    found = logits(model)
    faults = []
    if not torch.equal(found, rounded):
        faults.append(f"logits are off by {float((found - rounded).abs().max()):.2g}")
    if not float((rounded - before).abs().max()) > LEAST:
        faults.append("nothing was rounded")
    if (packed / "packed.safetensors").stat().st_size != plan.bytes["total"]:
        faults.append("the file has other bytes than promised")
    stored = open_checkpoint(folder).tensors
    told = [x.name for x in (*inventory.layers, *inventory.others)]
    told += [left for left, _ in inventory.left_out]
    if sorted(told) != sorted(stored):
        faults.append(f"unaccounted: {sorted(set(told) ^ set(stored))[:3]}")
    share = sum(x.weights for x in inventory.layers) / sum(prod(x.shape) for x in stored.values())
    outcome = "WRONG" if faults else "exact"
    return Row(kind, name, outcome, "; ".join(faults), round(share, 3), inventory.notes)


def logits(model: Model) -> Any:
    with torch.no_grad():
        if model.pooling is not None:
            return model.net(input_ids=IDS, attention_mask=torch.ones_like(IDS))[0]
        return model.net(input_ids=IDS, use_cache=False).logits


# ---------------------------------------------------------------- data and page


def load() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found


def save(rows: list[Row]) -> None:
    """Add the rows to the data, in place of older ones."""
    old = load()["rows"] if DATA.exists() else []
    every = {row["kind"]: row for row in old}
    for row in rows:
        kept = {k: v for k, v in every.get(row.kind, {}).items() if k in (*COLUMN, GGUF)}
        every[row.kind] = asdict(row) | kept
    _write([every[kind] for kind in sorted(every)])


def save_column(kind: str, outcome: str, why: str) -> None:
    """What transformers' own loader said, beside the row that is there."""
    rows = load()["rows"]
    for row in rows:
        if row["kind"] == kind:
            row |= dict(zip(COLUMN, (outcome, why), strict=True))
    _write(rows)


def save_gguf() -> None:
    """What llama.cpp computes from GGUF files of the same types (experiments/17-gguf-architectures):
    the divergence from transformers' own predictions, or `refused`; in the place of older words."""
    with MEASURED.open(encoding="utf-8", newline="") as stream:
        measured = {row["architecture"]: row for row in csv.DictReader(stream)}
    rows = load()["rows"]
    for row in rows:
        row.pop(GGUF, None)
        found = measured.get(row["kind"])
        if found is not None:
            near = found["worst kl"] and float(found["worst kl"]) <= ALIKE
            row[GGUF] = f"KL {float(found['worst kl']):.5f}" if near else "refused"
    _write(rows)


def _write(rows: list[dict[str, Any]]) -> None:
    data = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "rows": rows,
    }
    DOCS.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def render(data: dict[str, Any]) -> str:
    """The page in Markdown."""
    rows = data["rows"]
    causal = [row for row in rows if not row["kind"].endswith(zoo.ENCODER)]
    lines = [
        "# Support matrix",
        "",
        f"Every model type that transformers {data['transformers']} maps to a causal language model, "
        "and common encoders, built small with random weights and put through `optimize`, `apply` and "
        "`load` with `scope=all`. *Exact*: the loaded model gives the logits of the reference rounded "
        "in place bit for bit, the file has the promised bytes, and every tensor of the checkpoint is "
        "accounted for. Made by `python -m tests.architectures.matrix`; the data is in "
        "[support-matrix.json](support-matrix.json).",
        "",
        f"Of {len(causal)} causal model types {_count(causal, 'exact')} are exact, "
        f"{_count(causal, 'refused')} are refused with the reason below, and "
        f"{_count(causal, 'not built')} couldn't be built small.",
        "",
        "*transformers*: a plan for `runtime=transformers`, exported in the compressed-tensors format "
        "and loaded by transformers' own loader, which computes the packed model's logits. Of the "
        f"{sum(bool(row.get(COLUMN[0])) for row in causal)} types tried, "
        f"{_count(causal, 'read', COLUMN[0])} are read; where one is refused, the words are among the "
        "remarks.",
        "",
        "*llama.cpp*: a GGUF file by llama.cpp's own converter, every layer's rows found in it by "
        "value, and how far llama.cpp's predictions from it are from transformers', in nats. Of the "
        f"{sum(GGUF in row for row in causal)} types tried, "
        f"{sum(row.get(GGUF, '').startswith('KL') for row in causal)} are right; the others are "
        "refused, for reasons in experiments/17-gguf-architectures.",
        "",
        "| model type | class | torch | share that can be rounded | transformers | llama.cpp | "
        "remarks |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_rendered(row) for row in rows]
    return "\n".join(lines) + "\n"


def _count(rows: list[dict[str, Any]], outcome: str, column: str = "outcome") -> int:
    return sum(row.get(column) == outcome for row in rows)


def _rendered(row: dict[str, Any]) -> str:
    share = f"{row['share']:.0%}" if row["outcome"] == "exact" else ""
    remarks = row["why"] or " ".join(row["notes"])
    other, why = (row.get(key, "") for key in COLUMN)
    if other not in ("", "read") and row["outcome"] == "exact":
        remarks = f"{remarks} transformers: {why}".strip()
    shown = other if row["outcome"] == "exact" else ""
    cells = (row["kind"], row["class_"], row["outcome"], share, shown, row.get(GGUF, ""), remarks)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def main(words: list[str]) -> None:
    if words[:1] == ["transformers"]:
        for kind in words[1:] or zoo.kinds():
            outcome, why = read_by_transformers(kind)
            print(kind, outcome, why, flush=True)
            save_column(kind, outcome, why)
    elif words == ["gguf"]:
        save_gguf()
    elif words != ["render"]:
        for kind in words or [*zoo.kinds(), *zoo.encoders()]:
            row = measure(kind)
            print(row.kind, row.outcome, row.why, flush=True)
            save([row])
    PAGE.write_text(render(load()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
