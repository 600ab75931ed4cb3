"""The header of a safetensors file, before any of its tensors exist.

The format: an 8-byte length, then JSON padded with spaces to a multiple of 8; tensors lie in the
order of the library's own list of dtypes, then name.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optimizer.plan.inventory import Inventory
from optimizer.plan.precision import UNTOUCHED, WIDTH, Precision

Entry = tuple[str, str, Sequence[int], int]  # name, dtype, shape, bytes


def header(entries: Iterable[Entry], said: Mapping[str, str] | None = None) -> bytes:
    """With its length in front. said: what its metadata hold besides the format."""
    rank = {dtype: i for i, dtype in enumerate(WIDTH)}
    found: dict[str, Any] = {"__metadata__": {"format": "pt", **(said or {})}}
    offset = 0
    for name, dtype, shape, size in sorted(entries, key=lambda e: (rank[e[1]], e[0])):
        found[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def container_bytes(entries: Iterable[Entry], said: Mapping[str, str] | None = None) -> int:
    """Bytes of the header."""
    return len(header(entries, said))


def stored_entries(inventory: Inventory, choice: Mapping[str, Precision]) -> list[Entry]:
    """The packed file's tensors. choice: layer name -> precision; layers that it doesn't name stay
    untouched."""
    entries: list[Entry] = []
    for layer in inventory.layers:
        precision = choice.get(layer.name, UNTOUCHED)
        if precision.kind == "none":
            entries.append((layer.name, layer.dtype, layer.shape, layer.bytes(precision)))
            continue
        for suffix, (dtype, shape) in precision.parts(layer.rows, layer.cols).items():
            part = math.prod(shape) * WIDTH[dtype]
            entries.append((f"{layer.name}.{suffix}", dtype, shape, part))
    for tensor in inventory.others:
        size = math.prod(tensor.shape) * WIDTH[tensor.dtype]
        entries.append((tensor.name, tensor.dtype, tensor.shape, size))
    return entries
