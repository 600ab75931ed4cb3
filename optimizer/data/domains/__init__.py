"""Domains: kinds of text of which a plan must not lose one silently.

Five short sets are the project's own (MIT, see README.md beside this file); `long` is sampled from
the reference, because only the model's own text is as long as its context. Users name their own
files. The certificate reads them. Those of `meaning.domains` are tuned on with every second document
and certified with the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.data.documents import by_template, read_documents, text_files
from optimizer.data.text import Data, Windows, documents_of, encode, text_prefix
from optimizer.errors import ConfigError, TextError

HERE = Path(__file__).parent
BUILT_IN = ("prose", "dialogue", "code", "mathematics", "russian")
LONG = "long"
VERSION = 2  # raised when the same text gives other windows
SHORTEST = 32  # tokens of a document; shorter ones are skipped
MOST = 64  # windows of a domain
UNKNOWN = 0.1  # share of unknown tokens above which a document counts as not representable
ENTRY = re.compile(r"\s*([\w-]+)\s*(?:=\s*(.*?)\s*)?(?:\*\s*([+-]?[0-9.][\w.+-]*)\s*)?$")


@dataclass(frozen=True)
class Domain:
    """path: the user's own .txt or .jsonl file or folder; None for a built-in set. weight: in the
    weighted mean of the certificate, and for the worst domain of the objective. half: 0 = only the
    documents to tune on, 1 = only the others, None = all."""

    name: str
    path: Path | None = None
    weight: float = 1.0
    half: int | None = None

    @property
    def source(self) -> Path:
        return self.path or HERE / f"{self.name}.txt"

    def key(self) -> list[str]:
        """What determines its text; the name doesn't."""
        own = [] if self.half is None else [f"half {self.half}"]
        if self.name == LONG and self.path is None:
            return [LONG, *own]
        hashes = [hashlib.sha256(f.read_bytes()).hexdigest() for f in text_files(self.source)]
        return [*hashes, *own]


def parse(entries: Iterable[str]) -> list[Domain]:
    """'NAME' of a built-in set or 'NAME = FILE', each with an optional '* WEIGHT'."""
    found: dict[str, Domain] = {}
    for entry in entries:
        match = ENTRY.fullmatch(str(entry))
        name, path, weight = match.groups() if match else ("", None, None)
        if path is None and name not in (*BUILT_IN, LONG):
            raise ConfigError(
                f"A domain is one of {', '.join(BUILT_IN)}, {LONG}, or 'NAME = FILE', each with "
                f"'* WEIGHT' if wanted; {entry!r} is neither. Correct it."
            )
        if path is not None and not Path(path).exists():
            raise TextError(f"There is no text at {path} for the domain {name}. Correct its path.")
        if path is not None:
            text_files(Path(path))
        if name in found or name == "held-out":
            raise ConfigError(f"Two texts of the certificate are named {name}. Rename one domain.")
        found[name] = Domain(name, Path(path) if path else None, _weight(weight, str(entry)))
    return list(found.values())


def _weight(text: str | None, entry: str) -> float:
    try:
        value = 1.0 if text is None else float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ConfigError(f"A domain's weight is a number above 0; {entry!r} has {text}.")
    return value


@dataclass(frozen=True)
class Cut:
    """windows: None if nothing is left. skipped: how many documents, by reason."""

    windows: Windows | None
    skipped: dict[str, int]


def cut(domain: Domain, tokenizer: Any, longest: int, data: Data) -> Cut:
    """A domain's documents -> windows of equal length, each inside one document.

    The length is the tenth percentile of the documents' lengths, `longest` at most, so that nearly
    all of them take part. Documents that are also in the data of `data.path` are skipped: that text
    was tuned on. So are repeated ones, which could be in both halves. Raises TextError for a user's
    own file that gives fewer than two documents, or four where they are halved.
    """
    own, start = _marks(data, tokenizer), text_prefix(tokenizer)
    reasons = ("also in data.path", "repeated", "not representable", "too short")
    skipped, seen = dict.fromkeys(reasons, 0), set[str]()
    documents: list[list[int]] = []
    for text in read_documents(domain.source, spoken=by_template(tokenizer)):
        ids = encode(tokenizer, text.strip())
        if _mark(text) in own:
            skipped["also in data.path"] += 1
        elif _mark(text) in seen:
            skipped["repeated"] += 1
        elif _unknown(ids, tokenizer) > UNKNOWN:
            skipped["not representable"] += 1
        elif len(ids) + len(start) < SHORTEST:
            skipped["too short"] += 1
        else:
            documents.append(ids)
            seen.add(_mark(text))
    skipped = {reason: count for reason, count in skipped.items() if count}
    needed, word = (2, "two") if domain.half is None else (4, "four")
    if len(documents) >= needed:
        documents = documents if domain.half is None else documents[domain.half :: 2]
        return Cut(_windows(documents, start, longest), skipped)
    if domain.path is not None:
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no more"
        raise TextError(
            f"A domain needs at least {word} documents of {SHORTEST} tokens; {domain.path} "
            f"has {len(documents)} (skipped: {why}). Give more text, or leave {domain.name} out."
        )
    return Cut(None, skipped)


def _windows(documents: Sequence[list[int]], start: list[int], longest: int) -> Windows:
    """Drawn in turn from all documents, MOST at most."""
    usual = int(np.quantile([len(document) for document in documents], 0.1))
    body = min(longest - len(start), usual)
    rows = [
        (number, document[first : first + body])
        for number, document in enumerate(documents)
        for first in range(0, len(document) - body + 1, body)
    ]
    turn = {number: 0 for number, _ in rows}
    order = []
    for number, row in rows:
        order.append((turn[number], number, row))
        turn[number] += 1
    order.sort(key=lambda one: one[:2])
    chosen = sorted(order[:MOST], key=lambda one: (one[1], one[0]))
    ids = np.array([start + row for _, _, row in chosen], dtype=np.int64)
    return Windows(ids, np.array([number for _, number, _ in chosen], dtype=np.int64))


def _unknown(ids: list[int], tokenizer: Any) -> float:
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not ids or unknown is None:
        return 0.0 if ids else 1.0
    return sum(i == unknown for i in ids) / len(ids)


def _marks(data: Data, tokenizer: Any) -> set[str]:
    if data.source != "text" or data.path is None:
        return set()
    return {_mark(text) for text in documents_of(data, tokenizer)}


def _mark(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()
