"""Probes: minimal pairs of one prefix and two continuations, of which the prefix calls for one.

Reading and checking them. Measuring is in `margins`, the statistics in `damage`. README.md beside
this file says what the fields mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from optimizer import untrusted
from optimizer.data.documents import read_text
from optimizer.errors import ConfigError, TextError

HERE = Path(__file__).parent
LANGUAGES = ("en", "ru")
NEEDED = ("prefix", "good", "bad")
EXAMPLE = '{"prefix": "The shop was closed, so we", "good": " went home.", "bad": " went in."}'


@dataclass(frozen=True)
class Pair:
    """good and bad are continuations of prefix; good is the one that the prefix calls for."""

    id: str
    phenomenon: str
    language: str
    prefix: str
    good: str
    bad: str

    @property
    def cell(self) -> tuple[str, str]:
        """Phenomenon and language: what is judged together."""
        return self.phenomenon, self.language


FIELDS = tuple(field.name for field in fields(Pair))


def built_in(languages: Iterable[str] = LANGUAGES) -> list[Pair]:
    """The project's own pairs. Raises ConfigError for a language that it doesn't have."""
    pairs: list[Pair] = []
    for language in languages:
        if language not in LANGUAGES:
            raise ConfigError(
                f"The built-in probes are in {' and '.join(LANGUAGES)}, not in {language!r}. Change "
                "languages, or give pairs of your own with probes=FILE."
            )
        for file in sorted((HERE / language).glob("*.jsonl")):
            pairs += read(file)
    return pairs


def read(file: Path) -> list[Pair]:
    """The pairs of a JSONL file. Raises TextError that names file, line and field."""
    if not file.is_file():
        raise TextError(f"There is no probe file at {file}. Correct probes=FILE.")
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        pair = _pair(line, f"{file}, line {number}", number)
        if pair.id in seen:
            raise TextError(
                f"Every id is used once; {file}, line {number} has the id {pair.id[:60]!r} of line "
                f"{seen[pair.id]}. Change one of them."
            )
        seen[pair.id] = number
        pairs.append(pair)
    if not pairs:
        raise TextError(f"{file} holds no pairs. A line is, for example: {EXAMPLE}")
    return pairs


def _pair(line: str, where: str, number: int) -> Pair:
    try:
        row = untrusted.parse(line)
    except ValueError as error:
        raise TextError(
            f"{where} isn't JSON ({error}). A line is, for example: {EXAMPLE}"
        ) from None
    if not isinstance(row, dict):
        raise TextError(
            f"{where} is no JSON object but {type(row).__name__}. For example: {EXAMPLE}"
        )
    _check_fields(row, where)
    row = {"id": f"line {number}", "phenomenon": "own", "language": "-"} | row
    pair = Pair(**row)
    for one, other in (("good", "bad"), ("bad", "good")):
        if row[one].startswith(row[other]):
            raise TextError(
                f"{where}: the two continuations must decide by what they say; field {one!r} begins "
                f"with the whole of {other!r}, so only the length would. Let them differ earlier."
            )
    return pair


def _check_fields(row: dict[str, Any], where: str) -> None:
    for name in row:
        if name not in FIELDS:
            raise TextError(
                f"{where} has the field {name[:60]!r}, which a probe doesn't have; it has "
                f"{', '.join(FIELDS)}. Remove or rename it."
            )
    for name in FIELDS:
        if name not in row:
            if name in NEEDED:
                raise TextError(f"{where} lacks the field {name!r}. For example: {EXAMPLE}")
            continue
        if not isinstance(row[name], str):
            raise TextError(
                f"{where}: field {name!r} must be text, not {type(row[name]).__name__}. Put it in "
                "quotation marks."
            )
        if name != "prefix" and not row[name].strip():
            raise TextError(f"{where}: field {name!r} is empty. For example: {EXAMPLE}")


def key(file: str | None) -> str:
    """What determines the pairs of a file; None = the built-in ones."""
    return "built in" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def halves(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to tune on, and the others: every second couple (pairs with the same two continuations)
    of each cell."""
    turns: dict[tuple[str, str], dict[frozenset[str], int]] = {}
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        own = turns.setdefault(pair.cell, {})
        turn = own.setdefault(frozenset((pair.good, pair.bad)), len(own))
        parts[turn % 2].append(pair)
    return parts


def cells(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Phenomenon and language of every group of pairs, in the order in which they first appear."""
    return list(dict.fromkeys(pair.cell for pair in pairs))
