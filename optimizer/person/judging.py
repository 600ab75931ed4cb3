"""One comparison as one person goes through it: which questions, in which order, on which side, what
was answered, and when it may stop. Everything follows from the texts, the person's name and the
votes file, so a server that was killed goes on where it was.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256

from optimizer.errors import TextError
from optimizer.person import statistics
from optimizer.person.entrants import REFERENCE, Entrant
from optimizer.person.prompts import Prompt
from optimizer.person.votes import (
    CHOICES,
    TAGS,
    About,
    End,
    Same,
    Undo,
    Vote,
    VoteFile,
    standing,
    turned,
)
from optimizer.person.writing import Material, Written
from optimizer.plan import digest


@dataclass(frozen=True)
class Question:
    """texts: as shown, first and second. about: the same two, with what nobody sees."""

    id: str
    prompt: Prompt
    texts: tuple[str, str]
    about: About


@dataclass(frozen=True)
class Comparison:
    """What one person is asked. alike: pairs that read the same, which are not asked. untold: how many
    pairs of two models differ and are beyond the limit. key: of the comparison, without the person."""

    key: str
    entrants: tuple[Entrant, ...]
    questions: tuple[Question, ...]
    alike: tuple[About, ...]
    untold: dict[tuple[str, str], int]
    reference: Written


def compare(
    entrants: Sequence[Entrant], material: Material, limit: int, catch: float, judge: str
) -> Comparison:
    """The pairs that part soonest in each kind of text, kinds in turn, models in turn; among them
    some of the reference against itself. Raises TextError if nothing differs.

    limit: questions, catch: share of them that are of the reference against itself.
    """
    key = digest(["comparison", material.key, [one.name for one in entrants], limit, catch])[:16]
    real, alike = _pairs(entrants, material)
    if not real:
        raise TextError(alike_text(entrants, material))
    themselves = len({one.identity for one in entrants}) == 1
    traps = [] if themselves else _traps(material, round(catch * limit))
    shown = real[: limit - len(traps)]
    mixed = _scattered(shown, traps, key)
    seeded = [_sided(about, texts, prompt, f"{key} {judge}") for prompt, about, texts in mixed]
    untold = Counter(about.models for _, about, _ in real[len(shown) :])
    return Comparison(
        key, tuple(entrants), tuple(seeded), tuple(alike), dict(untold), material.reference
    )


Pair = tuple[Prompt, About, tuple[str, str]]


def _pairs(entrants: Sequence[Entrant], material: Material) -> tuple[list[Pair], list[About]]:
    """(those that differ, the most telling first; what reads the same)."""
    found: list[tuple[float, int, Pair]] = []
    alike: list[About] = []
    for turn, (one, other) in enumerate(itertools.combinations(entrants, 2)):
        itself = one.identity == other.identity
        second = material.twins if itself else material.written[other.name]
        sides = (material.written[one.name], second)
        if itself:  # which of its two texts goes under which name is by chance, too
            sides = sides if _coin(f"{material.key} {turn}") else sides[::-1]
        for prompt in material.prompts:
            if any(prompt.id not in side.texts for side in sides):
                continue
            about = _about(prompt, (one, other), sides)
            texts = (sides[0].texts[prompt.id], sides[1].texts[prompt.id])
            if texts[0].strip() == texts[1].strip():
                alike.append(about)
            else:
                found.append((_shared(*texts), turn, (prompt, about, texts)))
    return _in_turn(found), alike


def _in_turn(found: list[tuple[float, int, Pair]]) -> list[Pair]:
    """Soonest first within a kind of text and a pair of models; kinds and pairs in turn."""
    turns: dict[tuple[object, int], int] = {}
    ranked = []
    for i, (_, pair, (prompt, about, texts)) in enumerate(sorted(found, key=lambda one: one[:2])):
        place = turns.get((prompt.kind, pair), 0)
        turns[prompt.kind, pair] = place + 1
        ranked.append((place, _mark(f"{prompt.kind} {pair}"), i, (prompt, about, texts)))
    return [one for *_, one in sorted(ranked, key=lambda one: one[:3])]


def _shared(one: str, other: str) -> float:
    """Share of the longer text before the first difference."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    least, most = sorted((len(one), len(other)))
    return (least if same is None else same) / max(most, 1)


def _about(
    prompt: Prompt,
    pair: tuple[Entrant, Entrant],
    sides: tuple[Written, Written],
    catch: bool = False,
) -> About:
    first, second = (side.features[prompt.id] for side in sides)
    return About(
        prompt=prompt.id,
        domain=prompt.domain,
        language=prompt.language,
        phenomenon=prompt.phenomenon,
        models=(pair[0].name, pair[1].name),
        bytes=(pair[0].bytes, pair[1].bytes),
        features=(first, second),
        catch=catch,
    )


def _traps(material: Material, count: int) -> list[Pair]:
    """The reference's own text against what it says with its second choice."""
    sides = (material.reference, material.twins)
    found = []
    for prompt in material.prompts:
        texts = tuple(side.texts.get(prompt.id, "") for side in sides)
        if texts[1] and texts[0].strip() != texts[1].strip():
            names = (REFERENCE, f"{REFERENCE}, second choice")
            features = (sides[0].features[prompt.id], sides[1].features[prompt.id])
            about = About(
                prompt.id,
                prompt.domain,
                prompt.language,
                prompt.phenomenon,
                names,
                (0, 0),
                features,
                True,
            )
            found.append((prompt, about, (texts[0], texts[1])))
    return found[:count]


def _scattered(shown: Sequence[Pair], traps: Sequence[Pair], key: str) -> list[Pair]:
    """The traps at places that nobody can foretell without the key."""
    total = len(shown) + len(traps)
    order = sorted(range(total), key=lambda i: _mark(f"{key} place {i}"))
    places = set(order[: len(traps)])
    real, trap = iter(shown), iter(traps)
    return [next(trap) if i in places else next(real) for i in range(total)]


def _sided(about: About, texts: tuple[str, str], prompt: Prompt, seed: str) -> Question:
    """The side of each text by chance, anew for each person and question."""
    name = digest([seed, about.prompt, about.models, about.catch])[:20]
    if _coin(f"side {name}"):
        return Question(name, prompt, texts, about)
    return Question(name, prompt, texts[::-1], turned(about))


def _mark(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _coin(text: str) -> bool:
    return sha256(text.encode()).digest()[0] % 2 == 0


def alike_text(entrants: Sequence[Entrant], material: Material) -> str:
    """What there is to say where no prompt is continued in two ways."""
    names = " and ".join(one.name for one in entrants)
    kl = [
        written.features[p.id]["kl"]
        for written in material.written.values()
        for p in material.prompts
        if "kl" in written.features[p.id]
    ]
    within = f"within {max(kl):.2g} nats per token" if kl else "to the last letter"
    return (
        f"{names} are alike to {within} on your {len(material.prompts)} prompts: every greedy text is "
        "the same, so there is nothing to judge. Give other prompts with prompts=FILE, or longer "
        "texts with tokens=."
    )


# ---------------------------------------------------------------- answers


class Kept(Enum):
    """What became of an answer."""

    NEW = "new"
    AGAIN = "the same answer again"
    OTHER = "answered before, in another way"
    OVER = "the names were revealed"
    UNKNOWN = "no question of this comparison"


@dataclass(frozen=True)
class Tally:
    """Of one pair of models, by its names. won: votes for the first of them. rest: questions left."""

    models: tuple[str, str]
    won: int = 0
    lost: int = 0
    alike: int = 0
    both_lost: int = 0
    rest: int = 0


@dataclass
class Judging:
    """The answers of one person to one comparison. Safe for threads and for several processes. stop:
    before the last question, as soon as nothing more can be found out."""

    comparison: Comparison
    file: VoteFile
    judge: str
    stop: bool = True
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _shown: dict[str, float] = field(default_factory=dict)
    _votes: dict[str, Vote] | None = None
    _over: bool = False

    def begin(self) -> None:
        """Read what is there, and note the pairs that aren't asked."""
        with self._lock:
            self.file.refresh()
            self.file.mend()
            self.file.refresh()
            known = {
                (line.about.prompt, line.about.models)
                for line in self.file.lines
                if isinstance(line, Same) and self._mine(line)
            }
            self.file.append(
                *(
                    Same(judge=self.judge, session=self.comparison.key, about=about)
                    for about in self.comparison.alike
                    if (about.prompt, about.models) not in known
                )
            )

    def _mine(self, line: Vote | Same | Undo | End) -> bool:
        return line.session == self.comparison.key and line.judge == self.judge

    @property
    def votes(self) -> dict[str, Vote]:
        """Standing votes by question, in the order in which they were given."""
        with self._lock:
            if self.file.refresh() or self._votes is None:
                own = [line for line in self.file.lines if self._mine(line)]
                self._votes = {vote.question: vote for vote in standing(own)}
                self._over = any(isinstance(line, End) for line in own)
            return self._votes

    @property
    def over(self) -> bool:
        """Whether the names were revealed."""
        _ = self.votes
        return self._over

    @property
    def last(self) -> Vote | None:
        return next(reversed(self.votes.values()), None)

    def question(self, name: str) -> Question | None:
        return next((q for q in self.comparison.questions if q.id == name), None)

    @property
    def current(self) -> Question | None:
        """The next question; None if there is none left or nothing more to find out."""
        votes = self.votes
        if self.over or self.stopped is not None:
            return None
        found = next((q for q in self.comparison.questions if q.id not in votes), None)
        if found is not None:
            self._shown.setdefault(found.id, time.monotonic())
        return found

    def vote(self, question: str, choice: str, tags: Sequence[str]) -> Kept:
        """Keep an answer; the same one twice counts once."""
        with self._lock:
            asked, before = self.question(question), self.votes.get(question)
            if asked is None or choice not in CHOICES:
                return Kept.UNKNOWN
            if before is not None:
                return Kept.AGAIN if before.choice == choice else Kept.OTHER
            if self.over or self.stopped is not None:
                return Kept.OVER
            begun = self._shown.pop(question, None)
            self._add(
                Vote(
                    judge=self.judge,
                    session=self.comparison.key,
                    question=question,
                    about=asked.about,
                    choice=choice,  # type: ignore[arg-type]  # checked above
                    tags=tuple(tag for tag in TAGS if tag in tags),  # type: ignore[misc]
                    seconds=round(time.monotonic() - begun, 2) if begun is not None else 0.0,
                )
            )
            return Kept.NEW

    def undo(self, vote: str) -> bool:
        """Take the last vote back, if it is this one; not after the names were revealed."""
        with self._lock:
            last = self.last
            if self.over or last is None or last.id != vote:
                return False
            self._add(Undo(judge=self.judge, session=self.comparison.key, of=vote))
            self._shown.pop(last.question, None)
            return True

    def end(self) -> None:
        with self._lock:
            if not self.over:
                self._add(End(judge=self.judge, session=self.comparison.key))

    def _add(self, line: Vote | Undo | End) -> None:
        self.file.append(line)
        self._votes = None

    # ------------------------------------------------------------ stopping

    @property
    def tallies(self) -> list[Tally]:
        """For each pair of models, catch trials left out."""
        votes = self.votes
        found = {
            (one.name, other.name): [0] * 5
            for one, other in itertools.combinations(self.comparison.entrants, 2)
        }
        for question in self.comparison.questions:
            if question.about.catch:
                continue
            turn = question.about.models not in found
            models = question.about.models[::-1] if turn else question.about.models
            vote = votes.get(question.id)
            place = 4 if vote is None else _place(vote.choice, turn)
            if place is not None:
                found[models][place] += 1
        return [Tally(models, *counts) for models, counts in found.items()]

    @property
    def alpha(self) -> float:
        """Of each pair of models, so that together they err in one of twenty comparisons at most."""
        return statistics.ALPHA / len(self.tallies)

    @property
    def stopped(self) -> str | None:
        """Why nothing more is asked, in words without names; None while something is."""
        tallies, alpha = self.tallies, self.alpha
        if not any(tally.rest for tally in tallies):
            return "All questions are answered."
        if not self.stop:
            return None
        settled = [statistics.clear(t.won, t.lost, alpha) for t in tallies]
        hopeless = [not statistics.reachable(t.won, t.lost, t.rest, alpha) for t in tallies]
        if all(settled):
            return "The preference is clear at 95 %."
        if all(a or b for a, b in zip(settled, hopeless, strict=True)):
            left = sum(t.rest for t in tallies)
            return f"The {left} questions left could not make a preference clear at 95 % any more."
        return None


def _place(choice: str, turn: bool) -> int | None:
    """In a tally; None for a skipped question."""
    if choice == "skip":
        return None
    if choice in ("alike", "lost"):
        return 2 if choice == "alike" else 3
    return int((choice == "first") == turn)
