"""Short texts for encoders, in batches. One line is one text.

Without a data set they are the project's own: the sentences of its English and Russian probes and
of its prose, dialogue and mathematics. An encoder can't sample text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from optimizer.data import pairs as probes
from optimizer.data.documents import (
    PROSE,
    Documents,
    kind_of,
    read_documents,
    read_text,
    text_files,
)
from optimizer.data.domains import HERE
from optimizer.data.text import OWN as SOURCES
from optimizer.data.text import Data, Part, Windows, documents_of, texts_of
from optimizer.errors import TextError

TEXTS = 12  # in a batch; the project's own English sentences are enough for the default parts
PADDING = -1  # in ids: no token of any vocabulary, so that masks need no tokenizer
VERSION = 2  # raised when the same texts give other batches
OWN = (
    "prose",
    "dialogue",
    "mathematics",
    "russian",
)  # domains whose sentences are used; code has none
# Letters and digits a token; with fewer the tokenizer spells a script that the model didn't learn. In
# all-MiniLM-L6-v2's, Russian sentences have .84 to 1.12, English ones 3.2 (the median).
LETTERS = 1.2
SENTENCE = re.compile(r"(?<=[.!?…])\s+")
PARAGRAPH = re.compile(r"\n[ \t]*\n")


@dataclass(frozen=True)
class Cut:
    """skipped: texts left out of the project's own, because the tokenizer only spells them. shortened:
    texts longer than their part's length. texts: all of them."""

    parts: dict[str, Windows]
    texts: int
    shortened: int
    skipped: int


def cut(data: Data, tokenizer: Any) -> Cut:
    """Texts -> batches for every part; no text is in two parts, and neither are the texts of one
    document (a paragraph of lines, a row of JSONL, two twin probes). Raises TextError if there are
    too few."""
    documents = [list(dict.fromkeys(d)) for d in _documents(data)]
    seen: set[str] = set()
    kept: list[list[str]] = []
    spelled = 0
    for document in documents:
        fresh = [text for text in document if text not in seen]
        seen.update(fresh)
        if data.source in SOURCES:
            readable = [text for text in fresh if _readable(tokenizer, text)]
            spelled += len(fresh) - len(readable)
            fresh = readable
        kept += [fresh] if fresh else []
    rng = np.random.default_rng(data.seed)
    shares = _dealt([kept[i] for i in rng.permutation(len(kept))], data.parts)
    count = sum(map(len, kept))
    parts, shortened = {}, 0
    for name, part in data.parts.items():
        texts = [shares[name][i] for i in rng.permutation(len(shares[name]))]
        if len(texts) < part.sequences * TEXTS:
            raise TextError(_too_few(name, part, len(texts), count))
        parts[name], longer = _batches(tokenizer, texts[: part.sequences * TEXTS], part)
        shortened += longer
    return Cut(parts, count, shortened, spelled)


def told(texts: int, shortened: int, skipped: int) -> str:
    """What became of the texts, in a sentence."""
    said = f"{texts} texts, in batches of {TEXTS}"
    said += f"; {shortened} were longer than their part's length and were cut" if shortened else ""
    if skipped:
        said += f"; {skipped} of the built-in ones were skipped, which the tokenizer only spells"
    return said + "."


def _too_few(name: str, part: Part, have: int, count: int) -> str:
    return (
        f"An encoder is measured on batches of {TEXTS} texts, one text a line: data.{name} needs "
        f"{part.sequences} batches, {part.sequences * TEXTS} different texts of its own; of the "
        f"{count} texts it got {have}. Give more text, or lower data.{name}.sequences."
    )


def _dealt(documents: list[list[str]], parts: dict[str, Part]) -> dict[str, list[str]]:
    """Each document to the part that lacks the largest share of what it needs."""
    shares: dict[str, list[str]] = {name: [] for name in parts}
    for document in documents:
        name = min(shares, key=lambda n: len(shares[n]) / parts[n].sequences)
        shares[name] += document
    return shares


def _batches(tokenizer: Any, texts: list[str], part: Part) -> tuple[Windows, int]:
    """ids [sequences, TEXTS * length], padded to the longest of the part; how many were longer."""
    ids = [_encoded(tokenizer, text) for text in texts]
    longer = sum(len(own) > part.length for own in ids)
    ids = [own if len(own) <= part.length else _shortened(own, part.length) for own in ids]
    width = max(map(len, ids))
    block = np.full((len(ids), width), PADDING, dtype=np.int64)
    for row, own in zip(block, ids, strict=True):
        row[: len(own)] = own
    return Windows(block.reshape(part.sequences, -1), np.arange(part.sequences)), longer


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """With the special tokens that the model was trained with."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def _shortened(ids: list[int], length: int) -> list[int]:
    """The last token is the one that ends a text ([SEP]); it stays."""
    return [*ids[: length - 1], ids[-1]]


def _readable(tokenizer: Any, text: str) -> bool:
    letters = sum(character.isalnum() for character in text)
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return letters >= LETTERS * tokens


def _documents(data: Data) -> Iterator[list[str]]:
    if data.source in SOURCES:
        yield from own()
    elif data.source == "hub":
        yield from (_lines(text) for text in texts_of(data, documents_of(data)))
    else:
        yield from given(documents_of(data))


def given(source: Documents) -> Iterator[list[str]]:
    """A row is a document; prose is cut at blank lines, or, without any, at every line. Raises
    TextError if nothing is there."""
    found = False
    for file in text_files(source.path):
        if kind_of(file) in PROSE:
            documents = [_lines(part) for part in PARAGRAPH.split(read_text(file))]
        else:
            documents = [_lines(row) for row in source.of(file)]
        documents = [lines for lines in documents if lines]
        found = found or bool(documents)
        yield from documents if len(documents) > 1 else ([x] for lines in documents for x in lines)
    if not found:
        raise TextError(f"{source.path} holds no text. Give a .txt or .jsonl file that does.")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def own() -> Iterator[list[str]]:
    """The project's own sentences. Two probes in a row are often twins, and both sentences of a
    probe differ in a word or two; they stay together."""
    for language in probes.LANGUAGES:
        pairs = probes.built_in([language])
        for first in range(0, len(pairs), 2):
            yield [p.prefix + end for p in pairs[first : first + 2] for end in (p.good, p.bad)]
    for name in OWN:
        for text in read_documents(HERE / f"{name}.txt"):
            yield [s for line in _lines(text) for s in SENTENCE.split(line) if _long(s.split())]


def _long(words: Iterable[str]) -> bool:
    return len(list(words)) > 2
