"""What a finished comparison says: who was preferred, how surely, where, and what it means for bytes.

Shares are of all prompts. Pairs that read the same count as alike; those that were asked stand for all
that differ, also for the ones beyond the limit. Intervals are 95 % bootstraps over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from optimizer.person import statistics
from optimizer.person.judging import Judging, Tally
from optimizer.person.votes import TAGS, About, Vote
from optimizer.plan.certificate import Interval

SHARES = ("first", "second", "alike", "lost")
SAME_SIZE = 1.005  # files whose sizes differ by less count as equal


@dataclass(frozen=True)
class Row:
    """A heading and the counts below it: preferred the first, the second, alike, both lost."""

    name: str
    counts: tuple[int, int, int, int]


@dataclass(frozen=True)
class Duel:
    """Two models. shares: by SHARES, of all prompts. net: first minus second. same: pairs that
    read the same. by: rows by domain, language and tag."""

    models: tuple[str, str]
    bytes: tuple[int, int]
    tally: Tally
    same: int
    shares: dict[str, Interval]
    net: Interval
    verdict: str
    worth: str
    by: dict[str, list[Row]]


@dataclass(frozen=True)
class Standing:
    """A model's log-strength (Davidson), against the mean of all."""

    name: str
    bytes: int
    strength: Interval


@dataclass(frozen=True)
class Result:
    judge: str
    votes: int
    skipped: int
    duels: list[Duel]
    standings: list[Standing]
    noise: str
    sides: str


def reveal(judging: Judging) -> Result:
    """Of what was answered so far."""
    votes = list(judging.votes.values())
    real = [v for v in votes if not v.about.catch and v.choice != "skip"]
    comparison = judging.comparison
    duels = [
        _duel(tally, judging, [v for v in real if set(v.about.models) == set(tally.models)])
        for tally in judging.tallies
    ]
    names = [one.name for one in comparison.entrants]
    return Result(
        judging.judge,
        len(votes),
        sum(v.choice == "skip" for v in votes),
        duels,
        _standings(names, [one.bytes for one in comparison.entrants], real, comparison.alike),
        _noise([v for v in votes if v.about.catch and v.choice != "skip"]),
        _sides([v for v in votes if v.choice in ("first", "second")]),
    )


def _for(vote: Vote, models: tuple[str, str]) -> str:
    """first, second, alike or lost, for the models in this order, whatever was shown where."""
    if vote.choice in ("alike", "lost") or vote.about.models == models:
        return vote.choice
    return "second" if vote.choice == "first" else "first"


def _duel(tally: Tally, judging: Judging, votes: list[Vote]) -> Duel:
    models = tally.models
    same = [a for a in judging.comparison.alike if a.models == models]
    answers = [_for(vote, models) for vote in votes]
    differing = len(votes) + tally.rest + judging.comparison.untold.get(models, 0)
    each = differing / max(len(votes), 1)
    prompts = np.array([v.about.prompt for v in votes] + [a.prompt for a in same])
    weight = np.array([each] * len(votes) + [1.0] * len(same))
    hits = np.array([[a == s for s in SHARES] for a in [*answers, *["alike"] * len(same)]], float)
    shares, net = _shares(hits.reshape(-1, len(SHARES)), weight, prompts)
    sizes = _bytes(judging, models)
    verdict, worth = _verdict(tally, sizes, judging.alpha, net)
    return Duel(models, sizes, tally, len(same), shares, net, verdict, worth, _by(votes, answers))


def _bytes(judging: Judging, models: tuple[str, str]) -> tuple[int, int]:
    sizes = {one.name: one.bytes for one in judging.comparison.entrants}
    return sizes[models[0]], sizes[models[1]]


def _shares(
    hits: np.ndarray, weight: np.ndarray, prompts: np.ndarray
) -> tuple[dict[str, Interval], Interval]:
    if not len(hits):
        none = Interval(float("nan"), float("nan"), float("nan"))
        return dict.fromkeys(SHARES, none), none

    def measure(w: np.ndarray) -> np.ndarray:
        means = w @ hits / max(w.sum(), 1e-12)
        return np.append(means, means[0] - means[1])

    drawn = statistics.resampled(prompts, weight, np.random.default_rng(0))
    low, high = statistics.bootstrap(measure, drawn)
    found = [
        Interval(float(v), float(a), float(b))
        for v, a, b in zip(measure(weight), low, high, strict=True)
    ]
    return dict(zip(SHARES, found[:-1], strict=True)), found[-1]


def _verdict(tally: Tally, sizes: tuple[int, int], alpha: float, net: Interval) -> tuple[str, str]:
    """Who was preferred, and what it means for bytes."""
    n = tally.won + tally.lost
    count = f"{tally.won} to {tally.lost} votes, {tally.alike} alike, {tally.both_lost} both lost"
    if not statistics.clear(tally.won, tally.lost, alpha):
        text = (
            f"No preference between {tally.models[0]} and {tally.models[1]} was shown ({count}). That "
            "none was shown doesn't mean that there is none: on all prompts together the difference "
            f"may lie between {100 * net.low:+.0f} and {100 * net.high:+.0f} of 100."
        )
        text = text if n or tally.alike else f"Nothing was answered ({count})."
        return text, _worth_of_a_draw(tally, sizes) if n or tally.alike else ""
    winner = 0 if tally.won > tally.lost else 1
    text = (
        f"{tally.models[winner]} was preferred to {tally.models[1 - winner]} ({count}); clear at "
        f"{100 * (1 - statistics.ALPHA):.0f} %."
    )
    ratio = sizes[winner] / max(sizes[1 - winner], 1)
    size = f"{_mb(sizes[winner])} against {_mb(sizes[1 - winner])}"
    if 1 / SAME_SIZE < ratio < SAME_SIZE:
        return text, f"Both take as much ({size}): the better one costs nothing."
    if ratio < 1:
        return text, f"The preferred one is the smaller, too ({size})."
    return text, (
        f"The preferred one takes {ratio:.2f} times the bytes ({size}): that is what it costs."
    )


def _worth_of_a_draw(tally: Tally, sizes: tuple[int, int]) -> str:
    small = int(sizes[1] < sizes[0])
    ratio = sizes[1 - small] / max(sizes[small], 1)
    if ratio < SAME_SIZE:
        return "Both take as much."
    return (
        f"{tally.models[small]} saves {_mb(sizes[1 - small] - sizes[small])} "
        f"({_mb(sizes[small])} against {_mb(sizes[1 - small])}), and no loss that you mind was shown."
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.4g} MB"


def _by(votes: Sequence[Vote], answers: Sequence[str]) -> dict[str, list[Row]]:
    """Counts by kind of text, by language and by tag; rows in the order in which they appear."""
    headings: dict[str, Callable[[Vote], Iterable[str]]] = {
        "kind of text": lambda v: [v.about.phenomenon or v.about.domain],
        "language": lambda v: [v.about.language],
        "tag": lambda v: v.tags,
    }
    found = {}
    for heading, names in headings.items():
        counts: dict[str, list[int]] = {tag: [0] * 4 for tag in TAGS} if heading == "tag" else {}
        for vote, answer in zip(votes, answers, strict=True):
            for name in names(vote):
                counts.setdefault(name, [0] * 4)[SHARES.index(answer)] += 1
        found[heading] = [
            Row(name, (n[0], n[1], n[2], n[3])) for name, n in counts.items() if any(n)
        ]
    return found


def _standings(
    names: list[str], sizes: list[int], votes: list[Vote], alike: Sequence[About]
) -> list[Standing]:
    """Strengths with intervals over prompts, strongest first; of two, their duel says everything."""
    if not votes or len(names) < 3:
        return []
    rows = [(v.about, _y(v.choice)) for v in votes] + [(a, 0) for a in alike]
    pairs = np.array([[names.index(m) for m in about.models] for about, _ in rows])
    y = np.array([value for _, value in rows])
    prompts = np.array([about.prompt for about, _ in rows])
    weight = np.ones(len(rows))
    drawn = statistics.resampled(prompts, weight, np.random.default_rng(0), samples=100)

    def measure(w: np.ndarray) -> np.ndarray:
        return statistics.strengths(pairs, y, w, len(names))

    value = measure(weight)
    low, high = statistics.bootstrap(measure, drawn)
    found = [
        Standing(names[i], sizes[i], Interval(float(value[i]), float(low[i]), float(high[i])))
        for i in range(len(names))
    ]
    return sorted(found, key=lambda one: -one.strength.value)


def _y(choice: str) -> int:
    return {"first": 1, "second": -1}.get(choice, 0)


def _noise(votes: list[Vote]) -> str:
    """What the judge makes of two texts of the reference."""
    if not votes:
        return (
            "No pair of the reference against itself was answered, so your own noise isn't known."
        )
    chosen = sum(v.choice in ("first", "second") for v in votes)
    return (
        f"Your own noise: of {len(votes)} pairs that were the reference against itself, you preferred "
        f"one text in {chosen}, and found {len(votes) - chosen} alike or lost. So many decisions say "
        "nothing about the models."
    )


def _sides(votes: list[Vote]) -> str:
    first = sum(v.choice == "first" for v in votes)
    if len(votes) < 2:
        return ""
    p = float(binomtest(first, len(votes)).pvalue)
    text = f"You took the first text in {first} of {len(votes)} decisions"
    if p < statistics.ALPHA:
        return f"{text}, unlike chance (p = {p:.2g}). Sides were by chance, so it favours nobody."
    return f"{text}, as by chance."
