"""A base file with some of its tensors in other types: same tensors, same metadata, other payloads.

Nothing of the header is written anew. A tensor's entry has fixed places for its type and its offset;
these are changed where they are, and everything else stays as it was, byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from optimizer.formats.gguf.base import Base
from optimizer.formats.gguf.placement import NONE, Piece
from optimizer.models import gguf_metadata
from optimizer.plan import GGML

FILE_TYPE, MIXED = "general.file_type", 1024  # llama.cpp's "not told: tensors differ"
ROWS = 2**11  # that are decoded at a time: a vocabulary's numbers need not be held twice
Rows = Callable[[str, str], np.ndarray]  # a layer's name, a ggml type -> its blocks [rows, bytes]


@dataclass(frozen=True)
class Entry:
    """A tensor of the new file. kind: a ggml type in lower case, None: as in the base. size: bytes."""

    name: str
    kind: str | None
    size: int


def entries(base: Base, kinds: Mapping[str, str]) -> list[Entry]:
    """kinds: tensor -> its new type."""
    found = []
    for tensor in base.reader.tensors:
        kind, count = kinds.get(tensor.name), int(tensor.n_elements)
        size = int(tensor.n_bytes)
        if kind is not None:
            size = count // GGML[kind].weights * GGML[kind].size
        found.append(Entry(tensor.name, kind, size))
    return found


def file_bytes(base: Base, kinds: Mapping[str, str]) -> int:
    """Exact bytes of the file."""
    align = int(base.reader.alignment)
    return int(base.reader.data_offset) + sum(
        _aligned(e.size, align) for e in entries(base, kinds)
    )


def _aligned(size: int, align: int) -> int:
    return -(-size // align) * align


def write(base: Base, kinds: Mapping[str, str], rows: Rows, out: Path) -> None:
    """rows: gives the blocks of whole layers; a tensor takes from them the rows that it holds."""
    from gguf import GGMLQuantizationType

    reader, new = base.reader, entries(base, kinds)
    with out.open("wb") as file:
        with base.file.open("rb") as old:
            file.write(old.read(int(reader.data_offset)))
        offset = 0
        for tensor, entry in zip(reader.tensors, new, strict=True):
            kind = tensor.tensor_type
            if entry.kind is not None:
                kind = GGMLQuantizationType[entry.kind.upper()]
            _patch(file, tensor, int(kind), offset)
            offset += _aligned(entry.size, int(reader.alignment))
        _patch_file_type(file, reader)
        file.seek(int(reader.data_offset))
        for tensor, entry in zip(reader.tensors, new, strict=True):
            for part in _payload(base, tensor, entry, rows):
                file.write(np.ascontiguousarray(part).data)
            file.write(bytes(_aligned(entry.size, int(reader.alignment)) - entry.size))


def _patch(file: BinaryIO, tensor: Any, kind: int, offset: int) -> None:
    """An entry is its name with a 64-bit length, a 32-bit number of dimensions, as many 64-bit sizes,
    then the type in 32 and the offset in 64 bits."""
    place = tensor.field.offset + 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape)
    file.seek(place)
    file.write(struct.pack("<IQ", kind, offset))


def _patch_file_type(file: BinaryIO, reader: Any) -> None:
    field = reader.get_field(FILE_TYPE)
    if field is not None:  # after the key with its 64-bit length, and the value's 32-bit type
        file.seek(field.offset + 8 + len(FILE_TYPE) + 4)
        file.write(struct.pack("<I", MIXED))


def _payload(base: Base, tensor: Any, entry: Entry, rows: Rows) -> Iterator[np.ndarray]:
    if entry.kind is None:
        yield np.asarray(tensor.data)
        return
    piece: Piece = base.placed.pieces[entry.name]
    width = entry.size // len(piece.row)
    whole = np.empty((len(piece.row), width), np.uint8)
    for i, layer in enumerate(piece.layers):
        own = piece.layer == i
        whole[own] = rows(layer, entry.kind)[piece.row[own]]
    missing = piece.layer == NONE
    if missing.any():
        zeros = rows("", entry.kind)  # one block
        whole[missing] = np.tile(zeros, width // zeros.shape[1])
    yield whole


class Decoded(Mapping[str, Any]):
    """A file's layers as the gguf package reads them: name -> W' [rows, cols] fp32, one at a time."""

    def __init__(self, file: Path, base: Base, layers: Mapping[str, tuple[int, int]]) -> None:
        """layers: name -> (rows, cols)"""
        self._reader = gguf_metadata.opened(file)
        self._tensors = {t.name: t for t in self._reader.tensors}
        self._base, self._layers = base, layers

    @property
    def tensors(self) -> set[str]:
        return set(self._tensors)

    def __getitem__(self, layer: str) -> Any:
        """Rows that the file leaves out are NaN."""
        import torch
        from gguf.quants import dequantize

        found = np.full(self._layers[layer], np.nan, np.float32)
        for name in self._base.placed.tensors_of(layer):
            piece, tensor = self._base.placed.pieces[name], self._tensors[name]
            own = np.flatnonzero(piece.layer == piece.layers.index(layer))
            data = np.asarray(tensor.data).reshape(len(piece.row), -1)
            for first in range(0, len(own), ROWS):
                some = own[first : first + ROWS]
                found[piece.row[some]] = dequantize(data[some], tensor.tensor_type)
            gguf_metadata.release(self._reader)
        return torch.from_numpy(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
