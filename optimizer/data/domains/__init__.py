"""Domains: kinds of text of which a plan must not lose one silently.

Ten sets come with the program (written for it or in the public domain, see README.md beside this
file); `long` is sampled from the reference, because only the model's own text is as long as its
context. Users name their own files. With `data=bundled` a run is calibrated and searched on every
second document of the ten sets and certified on the others. Otherwise the certificate reads them
beside its held-out text; those of `meaning.domains` are tuned on with the same half.
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
from optimizer.data.text import Data, Part, Tokens, Windows, documents_of, encode, text_prefix
from optimizer.errors import ConfigError, TextError

HERE = Path(__file__).parent
# name -> share of a bundled run's windows
MIXTURE = {
    "prose": 3,
    "dialogue": 1,
    "code": 2,
    "mathematics": 1,
    "russian": 1,
    "german": 1,
    "french": 1,
    "spanish": 1,
    "italian": 1,
    "chinese": 1,
}
BUILT_IN = tuple(MIXTURE)
LONG = "long"
VERSION = 3  # raised when the same text gives other windows
SHORTEST = 32  # tokens of a document; shorter ones are skipped
MOST = 16  # windows of a domain
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
    documents, skipped = _readable(domain, tokenizer, data)
    needed, word = (2, "two") if domain.half is None else (4, "four")
    if len(documents) >= needed:
        documents = documents if domain.half is None else documents[domain.half :: 2]
        return Cut(_windows(documents, text_prefix(tokenizer), longest), skipped)
    if domain.path is not None:
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "no more"
        raise TextError(
            f"A domain needs at least {word} documents of {SHORTEST} tokens; {domain.path} "
            f"has {len(documents)} (skipped: {why}). Give more text, or leave {domain.name} out."
        )
    return Cut(None, skipped)


def _readable(
    domain: Domain, tokenizer: Any, data: Data
) -> tuple[list[list[int]], dict[str, int]]:
    """Token ids of the documents that take part, and how many don't, by reason."""
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
    return documents, {reason: count for reason, count in skipped.items() if count}


# ---------------------------------------------------------------- a run's own text


def bundled(data: Data, tokenizer: Any) -> Tokens:
    """The ten sets -> windows for every part. Documents with even numbers are shared by calibration
    (two of three) and search, the others are held out. Windows are drawn from the sets in turn, by
    their shares, so that the first windows of a part are a mixture, too; a set that the model can't
    read leaves its share to the others. Raises TextError if there is too little text."""
    start, none = text_prefix(tokenizer), Data(source="self")
    pools: dict[str, dict[str, list[list[int]]]] = {name: {} for name in data.parts}
    for name in BUILT_IN:
        documents, _ = _readable(Domain(name), tokenizer, none)
        tuned = documents[::2]
        pools["calibration"][name] = [d for i, d in enumerate(tuned) if i % 3 != 2]
        pools["search"][name] = tuned[2::3]
        pools["heldout"][name] = documents[1::2]
    return {
        name: _mixed(pools[name], part, start, name, data.seed)
        for name, part in data.parts.items()
    }


def _mixed(
    pools: dict[str, list[list[int]]], part: Part, start: list[int], name: str, seed: int
) -> Windows:
    """part.sequences windows; pools: documents of each set."""
    body = part.length - len(start)
    rng = np.random.default_rng([seed, part.length])
    queues = {kind: _turns(documents, body, rng) for kind, documents in pools.items()}
    have = sum(map(len, queues.values()))
    if have < part.sequences:
        raise TextError(
            f"data.{name} needs {part.sequences} windows of {part.length} tokens, and the bundled "
            f"texts that this model can read give {have}. Lower data.{name}.sequences or "
            f"data.{name}.length, take data=self, or give a text of your own with data=text."
        )
    taken = dict.fromkeys(queues, 0)
    rows: list[tuple[str, int, list[int]]] = []
    while len(rows) < part.sequences:
        open_ = [kind for kind in queues if taken[kind] < len(queues[kind])]
        kind = min(open_, key=lambda k: (taken[k] + 0.5) / MIXTURE[k])
        rows.append((kind, *queues[kind][taken[kind]]))
        taken[kind] += 1
    numbers: dict[tuple[str, int], int] = {}
    documents = [numbers.setdefault((kind, owner), len(numbers)) for kind, owner, _ in rows]
    ids = np.array([start + row for _, _, row in rows], dtype=np.int64)
    kinds = tuple(kind for kind, _, _ in rows)
    return Windows(ids, np.array(documents, dtype=np.int64), kinds)


def _turns(
    documents: list[list[int]], body: int, rng: np.random.Generator
) -> list[tuple[int, list[int]]]:
    """(document, window) of a set, each document's first window before any second one."""
    order = rng.permutation(len(documents)).tolist()
    rows = [
        (turn, place, number, documents[number][first : first + body])
        for place, number in enumerate(order)
        for turn, first in enumerate(range(0, len(documents[number]) - body + 1, body))
    ]
    return [(number, row) for _, _, number, row in sorted(rows, key=lambda r: r[:2])]


def content() -> str:
    """Hash of the bundled texts."""
    return hashlib.sha256(
        "".join(h for n in BUILT_IN for h in Domain(n).key()).encode()
    ).hexdigest()


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
