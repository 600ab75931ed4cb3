"""What files are compared with and made from: a reference, two importance matrices and a table.

measure.py MODEL TEXT SCRATCH [WINDOWS]    WINDOWS: held-out, of 256 tokens each; 4
    16.gguf              the model by llama.cpp's converter
    ids.npy, log_p.npy   held-out windows, and the reference's log-probabilities at all but the last
                         position of each
    columns.npz          `WEIGHTING|layer`: mean squares of each layer's inputs on the calibration
                         windows [cols], as `quantizer=importance` counts them. alike: llama.cpp's
                         importance matrix; gradient: tokens count by the loss's gradient at the
                         layer's output
    table.npz            samples [chunks, layers, types]: the Fisher table of ggml's types on half of
                         these windows, rounded under the matrix of gradients; names [layers]; kinds
                         [layers, types]: what a type means for a layer's rows
    matrix.npz           alike, by tensor, for engine.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

from optimizer.data.text import Data, Part
from optimizer.formats.gguf import converter
from optimizer.models.model import Model
from optimizer.plan import Precision
from optimizer.quantization.methods import Importance, bind
from optimizer.sensitivity import Desk, Task, Text, by_block, chunks
from optimizer.stages.session import Session

LENGTH = 256  # of a held-out window
SHORTEST = 32  # weights of a block; other rows stay in 16 bits
STORE = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
KINDS = (
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s",
    "iq4_xs",
)  # fmt: skip


def data_of(text: str, windows: int) -> Data:
    return Data(
        source="text", path=text, calibration=Part(sequences=16, length=128),
        search=Part(sequences=8, length=128), heldout=Part(sequences=windows, length=LENGTH),
    )  # fmt: skip


def reference(session: Session, out: Path) -> None:
    ids = session.windows("heldout").ids
    net = Model.load(session.source.folder, session.inventory).net
    with torch.inference_mode():
        rows = [net(input_ids=torch.from_numpy(row[None])).logits[0, :-1] for row in ids]
    np.save(out / "ids.npy", ids)
    np.save(
        out / "log_p.npy", torch.stack([torch.log_softmax(r.float(), -1) for r in rows]).numpy()
    )


def columns(session: Session, out: Path) -> None:
    found: dict[str, Any] = {}
    for weighting in ("alike", "gradient"):
        rounder = bind(Importance(weighting=weighting), session)
        found |= {f"{weighting}|{name}": v for name, v in rounder.columns.items()}
    np.savez(out / "columns.npz", **found)
    names = tensors(out, [x.name for x in session.inventory.layers])
    inside = {n: t for n, t in names.items() if t.startswith("blk.") and f"alike|{n}" in found}
    np.savez(out / "matrix.npz", **{t: found[f"alike|{n}"] for n, t in inside.items()})


def tensors(scratch: Path, layers: list[str]) -> dict[str, str]:
    """Layer -> tensor of 16.gguf, by the names of the package gguf."""
    fields = GGUFReader(scratch / "16.gguf").fields
    kind = fields["general.architecture"].contents()
    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == kind)
    known = get_tensor_name_map(arch, fields[f"{kind}.block_count"].contents())
    return {x: f"{known.get_name(x.removesuffix('.weight'))}.weight" for x in layers}


def table(session: Session, out: Path) -> None:
    layers = [x for x in session.inventory.layers if x.cols % SHORTEST == 0]
    fitted = {(x.name, k): Precision.ggml(k).nearest(x.cols) for x in layers for k in KINDS}
    task = Task(tuple((x.name,) for x in layers), KINDS, fitted, bind(Importance(), session))
    ids = session.windows("calibration").ids[::2]
    text = Text(ids, chunks(len(ids), len(ids)), 0)
    samples = by_block.samples(session.model, task, text, Desk())
    assert samples is not None
    kinds = [[fitted[x.name, k].kind for k in KINDS] for x in layers]
    np.savez(out / "table.npz", samples=samples, names=[x.name for x in layers], kinds=kinds)


def main(model: str, text: str, scratch: str, windows: str = "4") -> None:
    torch.set_num_threads(1)
    out = Path(scratch)
    out.mkdir(parents=True, exist_ok=True)
    session = Session.open(model, data_of(text, int(windows)), STORE)
    steps = {
        "16.gguf": lambda: converter.convert(
            session.source.folder, out / "16.gguf", "f16", "model"
        ),
        "log_p.npy": lambda: reference(session, out),
        "matrix.npz": lambda: columns(session, out),
        "table.npz": lambda: table(session, out),
    }
    for name, step in steps.items():
        if not (out / name).exists():
            step()
            print(out / name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
