"""Blur map: where in a text a plan changed what the model would have said.

For every token, p is the reference's distribution at its prediction and q the quantized model's;
what is shown is KL(p || q) in nats, and the likeliest words of both. A text that is longer than the
context is read in windows that overlap by a quarter, so that every token but the first ones is
predicted from at least a quarter of a window.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.data.documents import read_text
from optimizer.data.text import Windows, text_start
from optimizer.errors import ModelError, TextError
from optimizer.plan import Precision

LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0)  # nats; the shades of a token, 0 to 5, fixed for all pages
LABELS = ("under 0.01", "0.01", "0.03", "0.1", "0.3", "1 and more")
MARKED = 4  # from this level on a token is also marked without colour
SHORT, LONG = 24, 96  # units; a passage ends at a sentence or line between the two
ENDS = ".!?…。！？\n"


@dataclass(frozen=True)
class Unit:
    """A stretch of the text that is shaded as one: a token, or several that share a character.
    text[start:end] is it; tokens: their numbers."""

    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A text in windows. windows: int64 [w, length]; at: for each token the flat index of its
    prediction in [w, length - 1], or -1 if nothing stands before it. notes: what was left out."""

    text: str
    ids: np.ndarray
    units: tuple[Unit, ...]
    windows: np.ndarray
    at: np.ndarray
    top: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Weights:
    """What is compared with the reference. bytes: of its tensors. choice: for `holding`; None: what it
    makes of it."""

    name: str
    bytes: int
    choice: Mapping[str, Precision] | None


@dataclass(frozen=True)
class Reading:
    """One model on the text. Over tokens: kl and true (probability of the real token) [n], NaN
    where nothing is predicted; flip [n]; words (ids), chances [n, top], the likeliest first;
    opened [n]: where planes were open, None: the model has none."""

    name: str
    bytes: int
    kl: np.ndarray
    true: np.ndarray
    flip: np.ndarray
    words: np.ndarray
    chances: np.ndarray
    opened: np.ndarray | None = None

    def unpacked(self, unit: Unit) -> bool:
        """Whether planes were open for any of its tokens."""
        return self.opened is not None and bool(self.opened[list(unit.tokens)].any())

    def shade(self, unit: Unit) -> float:
        """KL of a unit: of its worst token. NaN if none is predicted."""
        values = self.kl[list(unit.tokens)]
        return math.nan if np.isnan(values).all() else float(np.nanmax(values))


@dataclass(frozen=True)
class Map:
    """The result. others: the plan, then the uniform plan if there is one. passages: ranges of
    units, in the text's order; worst: their numbers, the one with the largest mean KL first."""

    text: str
    ids: np.ndarray
    units: tuple[Unit, ...]
    reference: Reading
    others: tuple[Reading, ...]
    passages: tuple[range, ...]
    worst: tuple[int, ...]
    spelling: Mapping[int, str]
    notes: tuple[str, ...]

    @property
    def plan(self) -> Reading:
        return self.others[0]

    @property
    def unpacking(self) -> str | None:
        """What was unpacked and what it saved, in a sentence; None: nothing could be."""
        opened = self.plan.opened
        if opened is None:
            return None
        seen = ~np.isnan(self.plan.kl)
        mine, base = (float(r.kl[seen].mean()) for r in self.others[:2])
        saved = f", {100 * (1 - mine / base):.0f} % less" if base > 0 else ""
        share = f"{100 * opened[seen].mean():.0f} % of the tokens"
        return (
            f"Planes were opened for {share}: mean KL {mine:.4f} instead of {base:.4f} "
            f"nats{saved}."
        )

    def mean_kl(self, reading: Reading, passage: range) -> float:
        tokens = [token for unit in passage for token in self.units[unit].tokens]
        values = reading.kl[tokens]
        return math.nan if np.isnan(values).all() else float(np.nanmean(values))

    def worst_units(self, count: int) -> list[int]:
        """Units in the order of falling KL under the plan."""
        shades = np.array([self.plan.shade(unit) for unit in self.units])
        order = np.argsort(-np.nan_to_num(shades, nan=-1.0), kind="stable")
        return [int(i) for i in order[:count] if shades[i] > 0]

    def worst_token(self, unit: Unit) -> int:
        """The unit's token with the largest KL under the plan."""
        values = np.nan_to_num(self.plan.kl[list(unit.tokens)], nan=-1.0)
        return unit.tokens[int(values.argmax())]

    def passage_of(self, unit: int) -> int:
        return bisect_right([passage.start for passage in self.passages], unit) - 1


def level(kl: float) -> int:
    """KL in nats -> shade 0 to 5; NaN -> 0."""
    return 0 if math.isnan(kl) else bisect_right(LEVELS, kl)


def read(file: Path) -> str:
    """The user's text. Raises TextError."""
    if not file.is_file():
        raise TextError(f"There is no text at {file}. Correct text=FILE.")
    text = read_text(file)
    if not text.strip():
        raise TextError(f"{file} holds no text. Give a file that does.")
    return text


def cut(text: str, tokenizer: Any, context: int, longest: int | None, limit: int, top: int) -> Cut:
    """Text -> tokens and windows. longest: the model's context; limit: tokens that are read."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "The blur map needs to know which characters a token covers, and this model's tokenizer "
            "doesn't say. Save a fast tokenizer (tokenizer.json) in the model's folder."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    ids, spans = np.array(found["input_ids"], np.int64), list(found["offset_mapping"])
    notes = []
    if len(ids) > limit:
        notes.append(
            f"The text has {len(ids)} tokens; the first {limit} were read and {len(ids) - limit} left "
            f"out. tokens={len(ids)} reads all."
        )
        ids, spans = ids[:limit], spans[:limit]
        text = text[: spans[-1][1]]
    unknown = int((ids == getattr(tokenizer, "unk_token_id", None)).sum())
    if unknown:
        notes.append(
            f"{unknown} of {len(ids)} tokens are words that the tokenizer doesn't know; the model "
            "sees one and the same sign for all of them."
        )
    first = text_start(tokenizer)
    if len(ids) + len(first) < 2:
        raise TextError("A blur map needs a text of at least two tokens. Give a longer one.")
    windows, at = _windows(ids, first, min(context, longest or context))
    if len(windows) > 1:
        notes.append(
            f"Read in {len(windows)} windows of {windows.shape[1]} tokens that overlap by a quarter; "
            "what lies further back than a window doesn't count."
        )
    return Cut(text, ids, units(spans), windows, at, top, tuple(notes))


def _windows(ids: np.ndarray, first: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Equally long windows [w, length], the last one flush with the end, and `Cut.at`."""
    body = min(len(ids), length - len(first))
    stride = body - body // 4
    starts = [*range(0, len(ids) - body, stride), len(ids) - body]
    windows = np.array([[*first, *ids[s : s + body]] for s in starts], dtype=np.int64)
    at, done = np.full(len(ids), -1, dtype=np.int64), 0
    for row, begin in enumerate(starts):
        tokens = np.arange(done, begin + body)
        position = len(first) + tokens - begin - 1
        at[tokens] = np.where(position < 0, -1, row * (windows.shape[1] - 1) + position)
        done = begin + body
    return windows, at


def units(spans: Iterable[tuple[int, int]]) -> tuple[Unit, ...]:
    """Tokens that share a character (bytes of one letter) or cover none are joined."""
    found: list[Unit] = []
    for token, (begin, end) in enumerate(spans):
        if found and (begin < found[-1].end or end <= begin):
            last = found.pop()
            found.append(Unit(last.start, max(last.end, end), (*last.tokens, token)))
        else:
            found.append(Unit(begin, end, (token,)))
    return tuple(found)


def passages(text: str, found: tuple[Unit, ...]) -> tuple[range, ...]:
    """Ranges of units that end with a sentence or a line; a short rest joins the one before."""
    cuts = [0]
    for i, unit in enumerate(found):
        length = i + 1 - cuts[-1]
        following = found[i + 1].start if i + 1 < len(found) else len(text)
        tail = text[unit.start : following]
        ends = tail.rstrip(" \t\"'»”’)").endswith(tuple(ENDS))
        if (length >= SHORT and ends) or length >= LONG:
            cuts.append(i + 1)
    if len(found) - cuts[-1] < SHORT // 2 and len(cuts) > 1:
        cuts.pop()
    return tuple(range(a, b) for a, b in zip(cuts, [*cuts[1:], len(found)], strict=True))


# ---------------------------------------------------------------- measuring


def measure(
    made: Cut,
    net: Any,
    holding: Callable[[Any], AbstractContextManager[Any]],
    weights: list[Weights],
    tokenizer: Any,
    track: Callable[..., Iterable[Any]],
) -> Map:
    """Read the text with the reference and each of the weights. Memory: the reference's hidden
    states, and the logits of one chunk of tokens twice."""
    from optimizer.metrics.divergence import Teacher
    from optimizer.models.head import OwnHead

    windows = Windows(made.windows, np.zeros(len(made.windows), dtype=np.int64))
    teacher = Teacher(net, windows, OwnHead(net))
    readings: list[Reading] = []
    reference: Reading | None = None
    for one in track(weights, "reading the text"):
        with holding(one.choice) as changed:
            mine, other = _read(teacher, changed, made, one)
        readings.append(mine)
        reference = reference or other
    assert reference is not None
    parts = passages(made.text, made.units)
    unsorted = Map(
        made.text,
        made.ids,
        made.units,
        reference,
        tuple(readings),
        parts,
        (),
        _spelling(tokenizer, [reference, *readings], made.ids),
        made.notes,
    )
    return _sorted(unsorted)


def _sorted(found: Map) -> Map:
    means = [found.mean_kl(found.plan, passage) for passage in found.passages]
    order = sorted(range(len(means)), key=lambda i: -np.nan_to_num(means[i], nan=-1.0))
    return replace(found, worst=tuple(order))


def _read(teacher: Any, net: Any, made: Cut, one: Weights) -> tuple[Reading, Reading]:
    """(the changed model's reading, the reference's)."""
    from optimizer.metrics.divergence import compare

    columns: dict[str, list[np.ndarray]] = {}
    state = getattr(net, "unpacking", None)
    for log_p, log_q, target in teacher.pairs(net) if state is None else teacher.whole_pairs(net):
        top = min(made.top, log_p.shape[-1])
        found: dict[str, Any] = {}
        found["p"], found["p_words"] = log_p.topk(top)
        found["q"], found["q_words"] = log_q.topk(top)
        found |= compare(log_p, log_q, target)
        if state is not None and state.read is not None:
            found["opened"] = state.read[0, :-1]
        for name, value in found.items():
            columns.setdefault(name, []).append(value.cpu().numpy())
    flat = {name: np.concatenate(values)[made.at] for name, values in columns.items()}
    blind = made.at < 0
    for name in ("kl", "nll", "nll_reference"):
        flat[name] = np.where(blind, np.nan, flat[name])
    kl, flip = flat["kl"], flat["flip"] & ~blind
    opened = flat["opened"] & ~blind if "opened" in flat else None
    words, chances = flat["q_words"], np.exp(flat["q"])
    mine = Reading(one.name, one.bytes, kl, np.exp(-flat["nll"]), flip, words, chances, opened)
    other = Reading(
        "reference",
        0,
        np.zeros_like(kl),
        np.exp(-flat["nll_reference"]),
        np.zeros_like(flip),
        flat["p_words"],
        np.exp(flat["p"]),
    )
    return mine, other


def _spelling(tokenizer: Any, readings: list[Reading], ids: np.ndarray) -> dict[int, str]:
    """How a predicted token is shown, by its id."""
    wanted = np.unique(np.concatenate([ids, *(reading.words.ravel() for reading in readings)]))
    anchor = int(ids[0])
    before = tokenizer.decode([anchor])
    spelling = {}
    for token in wanted.tolist():
        # decoded behind another token: some tokenizers drop the space of a first one
        both = tokenizer.decode([anchor, token])
        word = both[len(before) :] if both.startswith(before) else tokenizer.decode([token])
        spelling[token] = shown(word)
    return spelling


def shown(word: str) -> str:
    """A token for people: its space and line break visible, part of a letter named so."""
    if not word:
        return "(nothing)"
    if "\ufffd" in word:
        return "(part of a letter)"
    return visible(word.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣"))


def visible(text: str) -> str:
    """Control characters, which could command a terminal or break a page, as their pictures."""
    return "".join(_picture(char) for char in text)


def _picture(char: str) -> str:
    code = ord(char)
    if code < 0x20 and char not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    hidden = 0x80 <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return "\ufffd" if hidden else char
