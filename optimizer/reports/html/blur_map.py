"""The blur map as one HTML file that needs no network and no server.

The text is untrusted: the template escapes it, it enters the script as JSON data only, and the page's
content policy runs no script but the page's own (by its hash) and loads nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from optimizer.metrics.blur import LABELS, LEVELS, MARKED, Map, Reading, level
from optimizer.reports.html import pages

WORST_TOKENS = 12
SNIPPET = 90  # characters


def render(found: Map, title: str, listed: int) -> str:
    """listed: how many of the worst passages are named on top."""
    return pages.render(
        "blur_map.html",
        "blur_map.css",
        "blur_map.js",
        found=found,
        title=title,
        readings=(found.reference, *found.others),
        summaries=[summary(reading) for reading in found.others],
        labels=LABELS,
        marked_from=LEVELS[MARKED - 1],
        passages=worst_passages(found, listed),
        tokens=worst_tokens(found),
        mean_kl=lambda reading, passage: _number(found.mean_kl(reading, passage)),
        words=words,
        data=_data(found),
    )


@dataclass(frozen=True)
class Summary:
    """worst: mean KL of the worst 1 % of tokens. flips: share of tokens with another top word."""

    name: str
    bytes: int
    mean: float
    worst: float
    flips: float


def summary(reading: Reading) -> Summary:
    kl = reading.kl[~np.isnan(reading.kl)]
    worst = np.sort(kl)[-max(1, math.ceil(len(kl) / 100)) :]
    return Summary(
        reading.name,
        reading.bytes,
        float(kl.mean()),
        float(worst.mean()),
        float(reading.flip.mean()),
    )


def worst_passages(found: Map, listed: int) -> list[tuple[int, str]]:
    """Numbers of passages and how each begins."""
    starts = {n: found.units[found.passages[n].start].start for n in found.worst[:listed]}
    return [(n, " ".join(found.text[at : at + SNIPPET].split())) for n, at in starts.items()]


@dataclass(frozen=True)
class Worst:
    """A token and what stands before it. said: the likeliest words of each model and their chances."""

    kl: float
    before: str
    here: str
    passage: int
    said: tuple[tuple[tuple[str, float], ...], ...]


def worst_tokens(found: Map) -> list[Worst]:
    made = []
    for index in found.worst_units(WORST_TOKENS):
        unit = found.units[index]
        token = found.worst_token(unit)
        before = found.text[max(0, unit.start - 40) : unit.start]
        here = found.text[unit.start : unit.end].strip() or "⏎"
        said = tuple(
            tuple(
                (found.spelling[int(word)], float(chance))
                for word, chance in zip(
                    reading.words[token][:3], reading.chances[token][:3], strict=True
                )
            )
            for reading in (found.reference, *found.others)
        )
        passage = found.passage_of(index)
        made.append(Worst(found.plan.shade(unit), " ".join(before.split()), here, passage, said))
    return made


@dataclass(frozen=True)
class Word:
    """Some of the text in a pane. index: of its unit; before, after: what has no shade, as the space
    before a word. marks: its classes."""

    index: int
    before: str
    text: str
    after: str
    marks: str


def words(found: Map, reading: Reading, passage: range) -> list[Word]:
    """A passage with its shades under the weights of `reading`. It ends without white space, and
    begins with none but its first line's own indentation, which code keeps."""
    made = []
    for index in passage:
        unit = found.units[index]
        shade = level(reading.shade(unit))
        marks = [f"k{shade}"] * bool(shade) + ["o"] * reading.unpacked(unit)
        word = found.text[unit.start : unit.end]
        inner = word.lstrip(" \n\t")
        space = word[: len(word) - len(inner)]
        if index == passage.start:
            space = space.rpartition("\n")[2] if "\n" in space else ""
        last = index + 1 == len(found.units)
        after = "" if last else found.text[unit.end : found.units[index + 1].start]
        made.append(Word(index, space, inner, after, " ".join(marks)))
    return made


def _data(found: Map) -> dict[str, Any]:
    """Everything that the panel shows."""
    numbers: dict[int, int] = {}

    def number(word: int) -> int:
        return numbers.setdefault(word, len(numbers))

    readings = (found.reference, *found.others)
    units: list[dict[str, Any]] = []
    for unit in found.units:
        token = found.worst_token(unit)
        entry: dict[str, Any] = {"token": number(int(found.ids[token]))}
        entry["kl"] = [_number(float(reading.kl[token])) for reading in found.others]
        if not math.isnan(found.plan.kl[token]):
            entry["true"] = [round(float(reading.true[token]), 4) for reading in readings]
            entry["top"] = [
                [
                    [number(int(word)), round(float(chance), 4)]
                    for word, chance in zip(r.words[token], r.chances[token], strict=True)
                ]
                for r in readings
            ]
        units.append(entry)
    return {
        "models": [reading.name for reading in readings],
        "words": [found.spelling[word] for word in numbers],
        "units": units,
        "marked": [i for i, u in enumerate(found.units) if level(found.plan.shade(u)) >= MARKED],
    }


def _number(kl: float) -> str:
    return "not predicted" if math.isnan(kl) else f"{kl:.3f}"
