"""Which rows of which layers each tensor of a GGUF file holds, found by comparing the values.

llama.cpp's converter renames tensors, reorders the rows of queries and keys for its rotation, takes
fused matrices apart and puts experts together, each architecture in a way of its own. All of that
moves whole rows, so no table of architectures is needed: rows are hashed on both sides, matched, and
compared bit by bit. What moves otherwise (MLA's keys, which are stored transposed) matches nothing
and stays in the file as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.errors import ModelError
from optimizer.plan import Layer

FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
CHUNK = 2**22  # values that are hashed at a time
NONE = -1  # a row that is no layer's: the converter's padding
MIX, SEED = np.uint64(0x9E3779B97F4A7C15), 7
# Tensors that llama.cpp multiplies or adds as they are: llama-quant.cpp, tensor_allows_quantization
KEPT = re.compile(
    r"(?<!weight)$|_norm\.weight|ffn_gate_inp|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|"
    r"^position_embd|^token_types|ssm_conv1d|shortconv\.conv|indexer\.[kq]_proj|"
    r"time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.|attn_rel_b"
)


@dataclass(frozen=True)
class Piece:
    """A tensor of the file as rows of layers. layers: their names; layer, row: of each of the tensor's
    rows [n], an index into `layers` and the row there; NONE for padding."""

    layers: tuple[str, ...]
    layer: np.ndarray
    row: np.ndarray


@dataclass(frozen=True)
class Placement:
    """pieces: tensor -> its rows, for tensors that may be retyped. refused: layers that the file
    doesn't hold as rows of such tensors, with the reason. groups: layers that share a tensor, and so
    a type."""

    pieces: Mapping[str, Piece]
    refused: Mapping[str, str]

    @property
    def groups(self) -> tuple[frozenset[str], ...]:
        found: list[set[str]] = []
        for piece in self.pieces.values():
            own = set(piece.layers)
            for other in [g for g in found if g & own]:
                own |= other
                found.remove(other)
            found.append(own)
        return tuple(frozenset(g) for g in found if len(g) > 1)

    def tensors_of(self, layer: str) -> list[str]:
        return [name for name, piece in self.pieces.items() if layer in piece.layers]


def rows_of(tensor: Any) -> np.ndarray:
    """A float tensor of a GGUFReader -> its stored numbers [rows, cols]; BF16 as uint16."""
    dtype = FLOATS[tensor.tensor_type.name]
    return np.asarray(tensor.data).view(dtype).reshape(-1, int(tensor.shape[0]))


def bits_of(values: Any, kind: str) -> np.ndarray:
    """A torch tensor [rows, cols] -> the numbers as a GGUF stores them in `kind`."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    own = values.to(dtype).contiguous()
    found: np.ndarray = own.view(torch.uint16).numpy() if kind == "BF16" else own.numpy()
    return found


def hashes(rows: np.ndarray) -> np.ndarray:
    """uint64 of each row's bytes [n]."""
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    width = -(-raw.shape[1] // 8)
    weights = np.random.default_rng(SEED).integers(0, 2**63, width, np.uint64) * np.uint64(2)
    weights += np.uint64(1)
    found = np.empty(len(rows), np.uint64)
    step = max(1, CHUNK // max(1, width))
    for i in range(0, len(raw), step):
        part = raw[i : i + step]
        if part.shape[1] % 8:
            part = np.pad(part, ((0, 0), (0, -part.shape[1] % 8)))
        words = np.ascontiguousarray(part).view(np.uint64)
        words = (words ^ (words >> np.uint64(31))) * MIX
        words ^= words >> np.uint64(29)
        found[i : i + step] = (words * weights).sum(1, dtype=np.uint64)
    return found


class Index:
    """All rows of the model's layers of one width, by hash in one kind of number."""

    def __init__(
        self, layers: Sequence[Layer], read: Callable[[Layer], Any], kinds: Iterable[str]
    ) -> None:
        self.layers, self.kinds = list(layers), list(kinds)
        made: dict[str, list[np.ndarray]] = {kind: [] for kind in self.kinds}
        for layer in self.layers:
            weight = read(layer)
            for kind, found in made.items():
                found.append(hashes(bits_of(weight, kind)))
        counts = [layer.rows for layer in self.layers]
        self.layer = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.row = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
        self.sorted: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for kind, found in made.items():
            every = np.concatenate(found)
            order = np.argsort(every, kind="stable")
            self.sorted[kind] = every[order], order

    def find(self, wanted: np.ndarray, kind: str, block: int | None) -> tuple[Any, Any]:
        """Hashes of a tensor's rows [n] -> (layer, row) [n]; NONE where no layer has the row.

        Rows that occur several times (unused words, models that begin with copies) go to the layer
        of the rows around them, one of the tensor's own block if there is a choice.
        """
        every, order = self.sorted[kind]
        first = np.searchsorted(every, wanted, "left")
        last = np.searchsorted(every, wanted, "right")
        layer = np.full(len(wanted), NONE, np.int32)
        row = np.full(len(wanted), NONE, np.int32)
        once = last - first == 1
        layer[once], row[once] = self.layer[order[first[once]]], self.row[order[first[once]]]
        several = np.flatnonzero(last - first > 1)
        votes = np.bincount(layer[once], minlength=len(self.layers)).astype(float)
        if block is not None:
            votes += [0.5 * (x.block == block) for x in self.layers]
        used: set[tuple[int, int]] = set()
        for i in several.tolist():
            places = order[first[i] : last[i]]
            before = int(layer[i - 1]) if i else NONE
            owners, rows = self.layer[places], self.row[places]
            free = [(int(o), int(r)) not in used for o, r in zip(owners, rows, strict=True)]
            rank = np.lexsort((rows, owners, -votes[owners], owners != before, np.invert(free)))
            best = rank[0]
            layer[i], row[i] = owners[best], rows[best]
            used.add((int(owners[best]), int(rows[best])))
        return layer, row


def place(
    tensors: Mapping[str, Any], layers: Sequence[Layer], read: Callable[[Layer], Any], kind: str
) -> Placement:
    """tensors: of a GGUFReader, by name. read: a layer -> its matrix [rows, cols], a torch tensor.
    kind: the numbers that the model itself is stored in; a quantized tensor of the file is compared in
    those. Costs a few seconds for a billion weights."""
    pieces: dict[str, Piece] = {}
    for cols in sorted({layer.cols for layer in layers}):
        own = {
            name: t for name, t in tensors.items() if len(t.shape) > 1 and int(t.shape[0]) == cols
        }
        kinds = {
            t.tensor_type.name if t.tensor_type.name in FLOATS else kind for t in own.values()
        }
        if own:
            index = Index([x for x in layers if x.cols == cols], read, sorted(kinds))
            found = {name: _piece(t, index, kind) for name, t in own.items()}
            pieces |= {name: piece for name, piece in found.items() if piece is not None}
    return _closed(pieces, layers)


def _piece(tensor: Any, index: Index, kind: str) -> Piece | None:
    rows, kind = numbers(tensor, kind)
    block = re.match(r"blk\.(\d+)\.", tensor.name)
    layer, row = index.find(hashes(rows), kind, int(block[1]) if block else None)
    missing = layer == NONE
    if missing.all() or rows[missing].any():
        return None  # other numbers than the model's
    own = np.unique(layer[~missing])
    local = np.searchsorted(own, layer).astype(np.int32)
    local[missing] = NONE
    return Piece(tuple(index.layers[i].name for i in own), local, row)


def numbers(tensor: Any, kind: str) -> tuple[np.ndarray, str]:
    """A tensor's rows, and in which kind of number they are compared."""
    import torch

    if tensor.tensor_type.name in FLOATS:
        return rows_of(tensor), tensor.tensor_type.name
    from gguf.quants import dequantize

    values = np.array(dequantize(tensor.data, tensor.tensor_type)).reshape(
        -1, int(tensor.shape[0])
    )
    return bits_of(torch.from_numpy(values), kind), kind


def _closed(pieces: Mapping[str, Piece], layers: Sequence[Layer]) -> Placement:
    """Only layers of which all rows are in tensors that may be retyped, and only tensors of such
    layers. Rows that the file leaves out are allowed for words (padding of the vocabulary)."""
    sizes = {layer.name: layer.rows for layer in layers}
    words = {layer.name for layer in layers if layer.kind in ("embedding", "head")}
    refused: dict[str, str] = {}
    left = {name: p for name, p in pieces.items() if not KEPT.search(name)}
    for name in pieces.keys() - left.keys():
        for layer in pieces[name].layers:
            refused[layer] = f"llama.cpp takes {name} in whole numbers of 16 or 32 bits only"
    seen: dict[str, np.ndarray] = {name: np.zeros(rows, bool) for name, rows in sizes.items()}
    for piece in left.values():
        for i, layer in enumerate(piece.layers):
            seen[layer][piece.row[piece.layer == i]] = True
    for layer, rows in seen.items():
        if layer in refused or rows.all() or (layer in words and rows.any()):
            continue
        refused[layer] = (
            "its GGUF file holds only some of its rows as they are"
            if rows.any()
            else "its GGUF file doesn't hold it, or changed by more than the order of its rows"
        )
    while bad := [n for n, p in left.items() if any(layer in refused for layer in p.layers)]:
        for name in bad:
            for layer in left.pop(name).layers:
                refused.setdefault(layer, f"it shares {name} with layers that can't be quantized")
    return Placement(left, refused)


def first_difference(
    tensors: Mapping[str, Any], placed: Placement, file: Path
) -> ModelError | None:
    """For a file that somebody else made: an error that names its first matrix that isn't the
    model's, or None."""
    for name, tensor in tensors.items():
        matrix = len([n for n in tensor.shape if int(n) > 1]) > 1
        if matrix and name not in placed.pieces and not KEPT.search(name):
            return ModelError(
                f"gguf= is a 16-bit GGUF file of this very model, and in {file} the tensor {name} "
                "isn't made of the model's rows. Give the file that was converted from this "
                "checkpoint, or leave gguf= out to have it converted."
            )
    return None
