"""The tensors of a safetensors file, read one at a time into memory of their own.

The library maps the file, and pages of a mapping are resident as long as one of its tensors lives: of
a packed model as much again as its weights, at the very moment when they are copied. Here a tensor is
read in pieces and cast on the way, so that loading needs hardly more than what is loaded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from optimizer import untrusted
from optimizer.errors import PlanError

PIECE = 4 * 2**20  # bytes that are read at once
TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Tensors:
    """An open file: its header, and where the data begins."""

    file: BinaryIO
    header: dict[str, Any]
    begin: int

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, cast to `dtype` if one is given and it holds floating-point numbers. Raises
        KeyError for a name that the file doesn't have."""
        entry = self.header[name]
        stored = TYPES[entry["dtype"]]
        wanted = dtype if dtype is not None and stored.is_floating_point else stored
        value = torch.empty(entry["shape"], dtype=wanted)
        first, last = entry["data_offsets"]
        if last - first != math.prod(entry["shape"]) * stored.itemsize:
            raise ValueError(f"{name} has {last - first} bytes")
        self.file.seek(self.begin + first)
        flat, at = value.view(-1), 0
        while at < len(flat):
            piece = bytearray(min(PIECE, (len(flat) - at) * stored.itemsize))
            if self.file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise ValueError(f"the file ends within {name}")
            part = torch.frombuffer(piece, dtype=stored)
            flat[at : at + len(part)] = part
            at += len(part)
        return value


@contextmanager
def tensors(path: Path) -> Iterator[Tensors]:
    """Raises PlanError for a file that isn't whole or doesn't hold what is asked."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            yield Tensors(file, untrusted.parse(file.read(length)), 8 + length)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise PlanError(
            f"{path} and its config.json don't belong together ({type(error).__name__}: {error}). "
            "Make the folder again."
        ) from None
