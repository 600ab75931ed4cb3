"""A safetensors file written one tensor at a time, so that nothing holds a packed model.

Its header is known before its tensors are: each is written to its own place as it comes, and read
back when all are there. The bytes are those of the library's `save_file`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from optimizer.errors import PlanError
from optimizer.formats.torch.reader import TYPES, tensors
from optimizer.plan.container import Entry, header

REMADE = "The plan was made for another version or another checkpoint; make it again."


def write(file: Path, entries: Sequence[Entry], parts: Iterable[tuple[str, Tensor]]) -> None:
    """parts: tensors by name, in any order, those of `entries`. Raises PlanError for others, and if
    the file isn't what was written; OSError where it can't be written."""
    before = header(entries)
    with file.open("wb") as out:
        out.write(before)
        out.truncate(len(before) + sum(entry[3] for entry in entries))
    known = {entry[0]: entry for entry in entries}
    digests: dict[str, bytes] = {}
    with tensors(file) as opened, file.open("r+b") as out:
        for name, value in parts:
            _check(name, value, known.get(name))
            data = _bytes(value)
            out.seek(opened.begin + opened.header[name]["data_offsets"][0])
            out.write(data)
            digests[name] = hashlib.blake2b(data).digest()
    lacking = sorted(known.keys() - digests.keys())
    if lacking:
        raise PlanError(f"The plan promises {lacking[0]}, which the model doesn't have. {REMADE}")
    with tensors(file) as opened:
        for name, digest in digests.items():
            if hashlib.blake2b(_bytes(opened.get(name))).digest() != digest:
                raise PlanError(f"Read back, {name} is not what was written. Is the disk sound?")


def _check(name: str, value: Tensor, promised: Entry | None) -> None:
    if promised is None:
        raise PlanError(f"The plan promises no {name}, which the model has. {REMADE}")
    wanted = (TYPES[promised[1]], tuple(promised[2]))
    if (value.dtype, tuple(value.shape)) != wanted:
        raise PlanError(
            f"The plan promises {name} as {wanted[0]} {list(wanted[1])}, and it is {value.dtype} "
            f"{list(value.shape)}. {REMADE}"
        )


def _bytes(value: Tensor) -> memoryview:
    data: Any = value.cpu().contiguous().reshape(-1).view(uint8).numpy()
    return memoryview(data)
