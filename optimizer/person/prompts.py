"""What the models are asked to continue: the user's own file, passages of the built-in domains, and
the prefixes of probes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from optimizer.data import domains
from optimizer.data import pairs as probes
from optimizer.data.documents import read_documents, read_text
from optimizer.errors import TextError
from optimizer.person.votes import STRICT, Name

WORDS = 24  # of a passage that is given to the models
OWN_WORDS = 200  # of a user's prompt, at most
# of built-in domains; the others are English
LANGUAGES = {
    "russian": "ru",
    "german": "de",
    "french": "fr",
    "spanish": "es",
    "italian": "it",
    "chinese": "zh",
}
LONG_WORD, SHORT = 12, 2  # characters a word: above the first it is a script without spaces
PROSE = {"en": "prose", "ru": "russian"}  # the domain that a probe's sentence belongs to
OWN = "own"
EXAMPLE = '{"prompt": "The recipe needs", "domain": "kitchen", "language": "en"}'


@dataclass(frozen=True)
class Prompt:
    """domain: whose KL it counts to. pair: the probe that it is the prefix of."""

    text: str
    domain: str
    language: str
    pair: probes.Pair | None = None

    @property
    def phenomenon(self) -> str | None:
        return None if self.pair is None else self.pair.phenomenon

    @property
    def kind(self) -> tuple[str, str]:
        """What is asked about in turn: a domain, or a phenomenon in a language."""
        return (self.phenomenon or "", self.language) if self.pair else (self.domain, "")

    @property
    def id(self) -> str:
        text = f"{self.domain}\n{self.phenomenon}\n{self.text}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Prompt:
        pair = data["pair"]
        return cls(**(data | {"pair": None if pair is None else probes.Pair(**pair)}))


@dataclass(frozen=True)
class _Row:
    __pydantic_config__ = STRICT
    prompt: Annotated[str, Field(min_length=1)]
    domain: Name = OWN
    language: Name = "-"


ROW = TypeAdapter(_Row)


def gather(file: str | None, chosen: Sequence[str], phenomena: Iterable[str]) -> list[Prompt]:
    """All prompts. file: the user's, which then stands alone; else of the built-in domains and of
    the probes' phenomena. Raises TextError."""
    if file is not None:
        return _once(own(Path(file)))
    found = [prompt for name in chosen for prompt in of_domain(name)]
    wanted = set(phenomena)
    pairs = [pair for pair in probes.built_in() if pair.phenomenon in wanted]
    missing = wanted - {pair.phenomenon for pair in pairs}
    if missing:
        known = sorted({pair.phenomenon for pair in probes.built_in()})
        raise TextError(
            f"There are no built-in probes of {', '.join(sorted(missing))}; there are "
            f"{', '.join(known)}. Correct phenomena."
        )
    found += [
        Prompt(p.prefix, PROSE[p.language], p.language, p) for p in pairs if p.prefix.strip()
    ]
    return _once(found)


def _once(found: list[Prompt]) -> list[Prompt]:
    return list({prompt.id: prompt for prompt in found}.values())


def own(file: Path) -> list[Prompt]:
    """A .jsonl of objects with `prompt` and perhaps `domain` and `language`; or a text or a folder,
    whose documents' beginnings are the prompts. Raises TextError that names the line."""
    if not file.exists():
        raise TextError(f"There are no prompts at {file}. Correct prompts=FILE.")
    if file.suffix == ".jsonl":
        found = _rows(file)
    else:
        texts = (_beginning(text.strip(), OWN_WORDS) for text in read_documents(file, "text"))
        found = [Prompt(text, OWN, "-") for text in texts if text]
    if not found:
        raise TextError(f"{file} holds no prompts. A line of a .jsonl is, for example: {EXAMPLE}")
    return found


def _rows(file: Path) -> list[Prompt]:
    found = []
    for number, line in enumerate(read_text(file).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = ROW.validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TextError(
                f"{file}, line {number} is no prompt ({where + ': ' if where else ''}"
                f"{first['msg']}). A line is, for example: {EXAMPLE}"
            ) from None
        found.append(Prompt(row.prompt, row.domain, row.language))
    return found


def of_domain(name: str) -> list[Prompt]:
    """The beginning of every document, then a passage from the middle of the long ones."""
    (domain,) = domains.parse([name])
    language = LANGUAGES.get(domain.name, "en") if domain.path is None else "-"
    first, later = [], []
    for document in read_documents(domain.source, "text"):
        text = document.strip()
        first.append(_beginning(text, WORDS))
        rest = _from_the_middle(text)
        later += [_beginning(rest, WORDS)] if len(rest.split()) > WORDS else []
    return [Prompt(text, domain.name, language) for text in (*first, *later) if text]


def _beginning(text: str, words: int) -> str:
    """Its first words with the space between them, never half a word; of a script without spaces so
    many characters as that many words would take."""
    end = 0
    for _ in range(words):
        while end < len(text) and text[end].isspace():
            end += 1
        while end < len(text) and not text[end].isspace():
            end += 1
    return text[: SHORT * words if end > LONG_WORD * words else end].rstrip()


def _from_the_middle(text: str) -> str:
    """From the line, or else the sentence, that begins behind the middle."""
    middle = len(text) // 2
    for mark in ("\n", ". ", "? ", "! ", "。"):
        at = text.find(mark, middle)
        if at >= 0:
            return text[at + len(mark) :].strip()
    return ""


def in_turn(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most `most`, one of each kind in turn, so that every kind takes part."""
    turns: dict[tuple[str, str], int] = {}
    ranked = []
    for i, prompt in enumerate(prompts):
        turns[prompt.kind] = turns.get(prompt.kind, 0) + 1
        ranked.append((turns[prompt.kind], i, prompt))
    return [prompt for _, _, prompt in sorted(ranked, key=lambda one: one[:2])[:most]]
