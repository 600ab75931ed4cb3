"""llama.cpp's mixtures under an importance matrix, published layer rules and our plans at equal bytes.

matrix.py mixture SCRATCH TYPE        llama.cpp's own choice of types, payloads under its matrix
matrix.py rules SCRATCH TYPE [LABEL]  the layer rules that people publish, in at most TYPE's bytes
matrix.py ours SCRATCH TYPE [LABEL]   the table's optimum in at most TYPE's bytes, payloads under a
                                      matrix of gradients
matrix.py all SCRATCH TYPE...         these, one type after the other, with and without LABEL
matrix.py gptq SCRATCH TYPE MODEL TEXT WEIGHTING [LABEL]
                                      the same plan as ours, codes by quantizer=gptq, whose tokens
                                      count by WEIGHTING; MODEL, TEXT: as given to measure.py
matrix.py again SCRATCH               the statistics of all rows whose answers are still in SCRATCH
matrix.py foretold SCRATCH            what the table says of all of them, before a byte is written

LABEL without-4: without q4_k, q5_k, q4_1 and q5_1. SCRATCH: what measure.py left there, and
types.json of `engine.py types`. Payloads are kept there by tensor, type and weighting, so files
share them. MODEL names the rows in matrix.csv. LIBRARIES: see engine.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from measure import STORE, data_of, tensors
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from experiments.rows import read, stamped, write
from optimizer.formats.gguf import retyping
from optimizer.formats.gguf.base import Base
from optimizer.formats.gguf.placement import Piece, Placement
from optimizer.plan import GGML, Precision
from optimizer.quantization import ggml, ggml_native
from optimizer.quantization.methods import Gptq, bind
from optimizer.stages.session import Session

HERE = Path(__file__).parent
RESULTS, FORETOLD = HERE / "matrix.csv", HERE / "foretold.csv"
RESAMPLES, CHUNK = 2000, 51  # at most so many positions are drawn together
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
LADDER = (
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "q8_0",
)  # iq types would be better below 3.5 bits, see README
WITHOUT = ("q2_k", "q3_k", "iq4_xs", "q5_0", "q6_k", "q8_0")  # the ladder without OWN_GRID
ROLES = ("ffn_down", "attn_output", "attn_k", "attn_q", "ffn_up", "ffn_gate")
OWN_GRID = ("q4_k", "q5_k", "q4_1", "q5_1")  # what the 1.5B came from, or what holds it
Kinds = Mapping[str, str]  # tensor -> type


class Model:
    """A model's 16-bit file, and all that was measured on it."""

    def __init__(self, scratch: str) -> None:
        self.scratch = Path(scratch)
        reader = GGUFReader(self.scratch / "16.gguf")
        self.tensors = {t.name: t for t in reader.tensors if len(t.shape) > 1}
        pieces = {
            name: Piece((name,), np.zeros(int(t.shape[1]), int), np.arange(int(t.shape[1])))
            for name, t in self.tensors.items()
        }
        self.base = Base(self.scratch / "16.gguf", "given", Placement(pieces, {}))

    @cached_property
    def names(self) -> dict[str, str]:
        """Layer -> tensor."""
        return tensors(self.scratch, self.table["names"].tolist())

    @cached_property
    def table(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.scratch / "table.npz"))

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """`WEIGHTING|tensor` -> [cols]."""
        found = np.load(self.scratch / "columns.npz")
        keys = (key.split("|") for key in found.files)
        return {f"{w}|{self.names[n]}": found[f"{w}|{n}"] for w, n in keys if n in self.names}

    def importance(self, tensor: str, weighting: str) -> Tensor | None:
        """None: all columns alike. llama.cpp's matrix has no entry for embeddings and head."""
        found = self.columns.get(f"{weighting}|{tensor}")
        if found is None and weighting == "gradient" and tensor == HEAD:
            found = self.columns.get(f"alike|{tensor}")
        if found is None or (weighting == "alike" and tensor in (EMBEDDING, HEAD)):
            return None
        return torch.from_numpy(found)

    def weight(self, tensor: str) -> Tensor:
        t = self.tensors[tensor]
        return torch.from_numpy(np.array(t.data)).view(int(t.shape[1]), -1).float()

    def types(self, mixture: str) -> Kinds:
        return dict(json.loads((self.scratch / "types.json").read_text())[mixture])

    def size(self, kinds: Kinds) -> int:
        return retyping.file_bytes(self.base, kinds)

    def loss(self, kinds: Kinds) -> float:
        """What the table says, in nats; NaN where it doesn't know a type."""
        known: dict[tuple[str, str], float] = {}
        means = self.table["samples"].mean(0)
        for name, own, losses in zip(
            *(self.table[k] for k in ("names", "kinds")), means, strict=True
        ):
            known |= {(self.names[str(name)], str(k)): x for k, x in zip(own, losses, strict=True)}
        return float(sum(known.get(pair, np.nan) for pair in kinds.items()))


def payload(model: Model, tensor: str, kind: str, weighting: str) -> np.ndarray:
    """Blocks [rows, bytes]. weighting alike: all by ggml's functions. gradient: by ours where the
    program packs the type itself."""
    file = model.scratch / "payloads" / weighting / f"{tensor}.{kind}.npy"
    if file.exists():
        return np.load(file)
    weight, v = model.weight(tensor), model.importance(tensor, weighting)
    if weighting == "alike":
        pointer = None if v is None else v.numpy().ctypes.data
        data = ggml_native._encode(weight, kind, pointer)
    elif kind in ggml_native.NATIVE:
        data = ggml_native.encode(weight, kind, v)
    else:
        grids = [ggml.fit(rows, kind, v) for rows in ggml.slices(weight)]
        data = ggml.encode(weight, Precision.ggml(kind), grids).data
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, data.numpy())
    return np.asarray(data.numpy())


# ---------------------------------------------------------------- types


def fitted(model: Model, tensor: str, kind: str) -> str:
    """What llama.cpp falls back to where rows have no whole blocks of 256."""
    return Precision.ggml(kind).nearest(int(model.tensors[tensor].shape[0])).kind


def rules(model: Model, limit: int, ladder: tuple[str, ...] = LADDER) -> Kinds:
    """Embeddings, head and attention values two steps above the rest, the head at least 5 bits, the
    first and last two blocks one step; the largest rest that fits, then ROLES one step higher, one
    after the other, from the first block on, as long as they fit, and so on step by step. {}: they
    have nothing so small."""
    blocks = 1 + max(int(n.split(".")[1]) for n in model.tensors if n.startswith("blk."))
    found: dict[str, str] = {}
    used = -1
    for step in range(len(ladder) - 2):
        kinds = {}
        for name in model.names.values():
            own = name.split(".")
            edge = own[0] == "blk" and (int(own[1]) < 2 or int(own[1]) >= blocks - 2)
            up = 2 if own[0] != "blk" or own[2] == "attn_v" else int(edge)
            least = 3 if name == HEAD else 0
            kinds[name] = fitted(model, name, ladder[max(step + up, least)])
        if model.size(kinds) <= limit:
            found, used = kinds, step
    for kind, role, block in product(ladder[used + 1 :], ROLES, range(blocks)):
        name = f"blk.{block}.{role}.weight"
        if name not in found or block in (0, 1, blocks - 2, blocks - 1):
            continue
        more = found | {name: fitted(model, name, kind)}
        if model.size(more) <= limit:
            found = more
    return found


def optimum(model: Model, limit: int, without: tuple[str, ...] = ()) -> Kinds:
    """The table's, whose embeddings and head are in it."""
    table = model.table
    types, loss = table["kinds"], np.maximum(table["samples"].mean(0), 0)
    names = [model.names[n] for n in table["names"].tolist()]
    weights = np.array([int(model.tensors[t].n_elements) for t in names])
    each = np.array([[GGML[k].size / GGML[k].weights for k in own] for own in types])
    size = weights[:, None] * each
    untouched = model.size({t: str(k) for t, k in zip(names, types[:, 0], strict=True)})
    untouched -= int(size[:, 0].sum())
    count, columns = loss.shape
    # rows without blocks of 256 have a type several times: the solver would try them all
    first = np.array([[k not in own[:i] for i, k in enumerate(own)] for own in types.tolist()])
    one_each = sparse.kron(sparse.eye(count), np.ones((1, columns)))
    result = milp(
        loss.ravel() / loss.max(),
        integrality=np.ones(loss.size),
        bounds=Bounds(0, (first & ~np.isin(types, without)).ravel().astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size.ravel()[None] / limit, -np.inf, 1 - untouched / limit - 1e-6),
        ],
        options={"mip_rel_gap": 1e-3, "time_limit": 30},
    )
    picked = result.x.reshape(count, columns).argmax(1)
    return {t: str(own[k]) for t, own, k in zip(names, types, picked, strict=True)}


# ---------------------------------------------------------------- files and rows


def measured(model: Model, at: str, name: str, kinds: Kinds, rows: retyping.Rows) -> None:
    """Write the file, have llama.cpp compute it, and put a row into matrix.csv. rows: a tensor, its
    type -> its blocks."""
    file = model.scratch / f"{at}-{name}.gguf"
    answer = file.with_suffix(".npz")
    if not answer.exists():
        retyping.write(model.base, kinds, rows, file)
        command = [sys.executable, str(HERE / "engine.py"), "score", str(file)]
        subprocess.run([*command, str(model.scratch), str(answer)], check=True)
    size = model.size(kinds)
    file.unlink(missing_ok=True)
    keep(model, at, name, kinds, size)


def keep(model: Model, at: str, name: str, kinds: Kinds, size: int) -> None:
    label = os.environ["MODEL"]
    counts = Counter(kinds.values())
    row: dict[str, Any] = {
        "model": label, "at": at, "file": name, "bytes": size,
        "foretold": f"{model.loss(kinds):.4f}", **statistics(model.scratch, at, name),
        "embedding": kinds.get(EMBEDDING, ""), "head": kinds.get(HEAD, ""),
        "types": " ".join(f"{k}:{n}" for k, n in sorted(counts.items())),
    }  # fmt: skip
    print(row, flush=True)
    rows = [r for r in read(RESULTS) if (r["model"], r["at"], r["file"]) != (label, at, name)]
    write(RESULTS, [*rows, stamped(row, label, at, name)])


def again(model: Model) -> None:
    """The statistics of all rows whose answers are still there."""
    rows = read(RESULTS)
    for row in rows:
        if row["model"] == os.environ["MODEL"] and _answer(model.scratch, row["at"], row["file"]):
            row.update(statistics(model.scratch, row["at"], row["file"]))
    write(RESULTS, rows)


def statistics(scratch: Path, at: str, name: str) -> dict[str, str]:
    """Of a file's answers, and of their ratio to llama.cpp's mixture. rest: without the first
    position of a window, where a model sees one word, here the same in all windows. half: the second
    half of each window alone, as llama-perplexity --kl-divergence counts (its `first = n_ctx/2`).
    Intervals are by runs of positions within a window, of equal length to one, at most CHUNK."""
    found = np.load(scratch / f"{at}-{name}.npz")
    mine, rival = found["kl"], _answer(scratch, at, "llama.cpp")
    theirs = None if name == "llama.cpp" or rival is None else np.load(rival)["kl"]
    row, length = {"positions": str(mine.size)}, mine.shape[1]
    for prefix, skipped in (("", 0), ("rest_", 1), ("half_", (length + 1) // 2)):
        runs = -(-(length - skipped) // CHUNK)
        starts = skipped + np.arange(runs) * (length - skipped) // runs
        own, count = _summed(mine, starts), _summed(np.ones_like(mine), starts)
        draws = np.random.default_rng(0).integers(0, len(own), (RESAMPLES, len(own)))
        low, high = np.quantile(own[draws].sum(1) / count[draws].sum(1), [0.025, 0.975])
        row |= {f"{prefix}kl": f"{own.sum() / count.sum():.5f}"}
        row |= {f"{prefix}low": f"{low:.5f}", f"{prefix}high": f"{high:.5f}"}
        row |= {f"{prefix}p99": f"{np.quantile(mine[:, skipped:], 0.99):.4f}"}
        row |= {f"{prefix}flips": f"{found['flip'][:, skipped:].mean():.4f}"}
        if theirs is not None:
            other = _summed(theirs, starts)
            low, high = np.quantile(own[draws].sum(1) / other[draws].sum(1), [0.025, 0.975])
            row |= {f"{prefix}ratio": f"{own.sum() / other.sum():.3f}"}
            row |= {f"{prefix}ratio_low": f"{low:.3f}", f"{prefix}ratio_high": f"{high:.3f}"}
    return row


def _summed(each: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[windows, positions] -> sums of runs [windows x runs], which begin at `starts`."""
    return np.add.reduceat(each, starts, axis=1).ravel()


def _answer(scratch: Path, at: str, name: str) -> Path | None:
    file = scratch / f"{at}-{name}.npz"
    return file if file.exists() else None


def foretell(model: Model) -> None:
    """All mixtures' rows of foretold.csv."""
    label = os.environ["MODEL"]
    rows: list[dict[str, Any]] = [r for r in read(FORETOLD) if r["model"] != label]
    for mixture in json.loads((model.scratch / "types.json").read_text()):
        kinds = model.types(mixture)
        size = model.size(kinds)
        every = {"theirs": kinds, "rules": rules(model, size), "ours": optimum(model, size)}
        every["ours-without-4"] = optimum(model, size, OWN_GRID)
        every["rules-without-4"] = rules(model, size, WITHOUT)
        row = {"model": label, "at": mixture, "bytes": size}
        told = {name: model.loss(k) if k else np.nan for name, k in every.items()}
        row |= {name: "" if np.isnan(x) else f"{x:.4f}" for name, x in told.items()}
        print(row, flush=True)
        rows.append(stamped(row, label, mixture))
        write(FORETOLD, rows)


def main(command: str, scratch: str, *rest: str) -> None:
    torch.set_num_threads(1)
    model = Model(scratch)
    if command == "foretold":
        foretell(model)
    elif command == "again":
        again(model)
    elif command == "all":
        for at in rest:
            one(model, "mixture", at)
            for label in ((), ("without-4",)):
                one(model, "rules", at, *label)
                one(model, "ours", at, *label)
    elif command == "gptq":
        by_gptq(model, *rest)
    else:
        one(model, command, *rest)


def one(model: Model, command: str, at: str, *label: str) -> None:
    weighting = "gradient" if command == "ours" else "alike"
    rows = lambda tensor, kind: payload(model, tensor, kind, weighting)  # noqa: E731
    limit = model.size(model.types(at))
    if command == "mixture":
        measured(model, at, "llama.cpp", model.types(at), rows)
        return
    if command == "rules":
        found = rules(model, limit, WITHOUT if label else LADDER)
    else:
        found = optimum(model, limit, OWN_GRID if label else ())
    if found:
        measured(model, at, "-".join([command, *label]), found, rows)


def by_gptq(model: Model, at: str, source: str, text: str, weighting: str, *label: str) -> None:
    kinds = optimum(model, model.size(model.types(at)), OWN_GRID if label else ())
    session = Session.open(source, data_of(text, 4), STORE)
    layers = {tensor: layer for layer, tensor in model.names.items()}
    choice = {layers[tensor]: Precision.ggml(kind) for tensor, kind in kinds.items()}
    own = session.model
    weights = {name: own.weight(name) for name in choice}
    rounder = bind(Gptq(weighting=weighting), session).rounder(choice)

    def rows(tensor: str, _kind: str) -> np.ndarray:
        name = layers[tensor]
        found = rounder.encode(weights[name], choice[name], name)
        places = {row.tobytes(): i for i, row in enumerate(weights[name].float().numpy())}
        order = [places[row.tobytes()] for row in model.weight(tensor).numpy()]
        return np.asarray(found.data.numpy())[
            order
        ]  # llama.cpp has other rows of queries and keys

    measured(model, at, "-".join(["ours", *label, "gptq", weighting]), kinds, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
