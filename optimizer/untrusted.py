"""JSON from files that somebody else may have written, as plain values or as checked types.

Python's own reader takes `NaN`, of two equal names the last, half of a surrogate pair, and nests as
deep as its stack; each of these ends in an exception somewhere far from the file. Here they are
refused where the file is read, with a reason for a person. Types are checked by pydantic.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

DEEPEST = 64  # containers inside each other; plans have 7, transformers' configs up to 10
MOST_BYTES = 512 * 2**20  # of one JSON file: 20 times the plan of a model with 50,000 experts
NO_CHARACTER = re.compile("[\ud800-\udfff]")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

KIND = re.compile(r"function-|[A-Z]\w*$")  # pydantic's names of alternatives, no names of fields

T = TypeVar("T")

# ---------------------------------------------------------------- types that fields are made of

LARGEST = 2**62  # bytes, shapes, counts
Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Number = Annotated[float, Field(strict=True, ge=-1e30, le=1e30, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1e30, allow_inf_nan=False)]
Name = Annotated[str, Field(strict=True, max_length=512, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
LineOfText = Annotated[
    str, Field(strict=True, max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
]
Words = Annotated[
    str, Field(strict=True, max_length=10**6, pattern=r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$")
]


class Fields(BaseModel):
    """An object of a file. Fields that it doesn't name are kept as they are: a later version of the
    program may have written them."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())


# ---------------------------------------------------------------- reading


def parse(text: str | bytes, constants: Literal["refuse", "null", "keep"] = "refuse") -> Any:
    """JSON text -> its value. constants: what NaN and infinities are, which Python writes and JSON
    doesn't have. Raises ValueError with the reason."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=CONSTANTS[constants])
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _look_through(value)
    return value


def read(path: Path, constants: Literal["refuse", "null", "keep"] = "refuse") -> Any:
    """The value in a UTF-8 JSON file; see `parse`. Raises OSError, or ValueError with the reason."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    return parse(path.read_bytes().decode("utf-8-sig"), constants)


def checked(kind: type[T] | TypeAdapter[T], value: Any) -> T:
    """The value as a pydantic type. Raises ValueError that names the first wrong field."""
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        parts = [str(part)[:80] for part in first["loc"] if not KIND.match(str(part))]
        place = ".".join(parts) or "the whole"
        raise ValueError(f"{place}: {first['msg']}, not {_short(first['input'])}") from None


def printable(text: str) -> str:
    """The text with control characters spelled out, so that it can't steer a terminal."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number of more digits"
    text = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which every name is given once: of two, readers take different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it gives {twice!r} twice")
    return found


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _null(_constant: str) -> None:
    """What a number that isn't known counts as."""


CONSTANTS = {"refuse": _no_number, "null": _null, "keep": float}


def _look_through(value: Any) -> None:
    """Raises ValueError for what is nested too deeply, or text that is no text."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                for name in one:
                    _check_text(name)
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                _check_text(one)
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _check_text(text: str) -> None:
    if NO_CHARACTER.search(text):
        raise ValueError(
            "it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        )
