"""Votes -> the weights of an objective.

A vote says which of two texts keeps the meaning better; the features of both say how far their models
are from the reference there (`writing`). The cost of a text is a weighted sum of
    KL in a domain, of prompts of that domain          default: the same weight in all domains
    tail, the worst tenth of the tokens                default: 0
    margin of a phenomenon, of prompts of that probe   default: 0
    length and repetition of the text                  default: 0; not part of an objective
and log(strength of one / of the other) is the other's cost minus its own: Davidson's model in
`statistics`. Features are divided by their family's typical difference, so that weights compare.
Most people mind little beside it all: weights are averaged over models in which at most two differ
from the default, whose size the votes choose (`statistics.believed`). Pairs that read the same are
left out: they are alike whatever a person minds.

The objective has what a domain is minded more than the median one, the tail and the margins,
    J = mean KL + W sum_k (b_k / sum b) (scale of KL / scale of k) part_k
where b are the shrunk weights, W = strength * sum b / (sum b + the common weight of KL).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from optimizer.errors import TextError
from optimizer.metrics.objective import Meaning
from optimizer.person import statistics
from optimizer.person.votes import Features, Vote
from optimizer.person.writing import WORST

FAMILIES = ("kl", "tail", "margin", "length", "repetition")
FREE = ("length", "repetition")  # may be liked, too; not part of an objective
NOISE = 0.05  # p above which votes count as noise
SMALL = 0.25  # standardised; a weight this close to its default needs no more votes
FEW = 4  # votes below which nothing is fitted
SPREAD = 6.0  # of standardised weights; 3 and 12 pointed as well
TRACE = 0.01  # of all that is minded; less is left from models that hardly anything speaks for
ENOUGH = 2000  # more votes than this are not worth a number
CHOICE = "choice"  # the phenomenon of a person's choices
HALF = 20  # choices that have half of the weight that many would have


@dataclass(frozen=True)
class Column:
    """family of FAMILIES; name: of the domain or phenomenon, empty for the others."""

    family: str
    name: str = ""

    @property
    def title(self) -> str:
        words = {"kl": f"KL in {self.name}", "margin": f"margin of {self.name}"}
        return words.get(self.family, self.family)


@dataclass(frozen=True)
class Weight:
    """Standardised value with its 95 % interval over prompts; default: what it is shrunk to. votes:
    that speak about it. more: votes that would settle it, 0 = it is settled, None = too many."""

    column: Column
    value: float
    low: float
    high: float
    default: float
    votes: int
    more: int | None


@dataclass(frozen=True)
class Learned:
    """scales: typical differences by family. noise_p: of "nothing but noise". judges: votes of each.
    agreement: Krippendorff's alpha, None if nobody shares a question."""

    weights: list[Weight]
    scales: dict[str, float]
    base: float
    votes: int
    noise_p: float
    judges: dict[str, int]
    agreement: float | None
    meaning: Meaning
    left_out: list[str]

    @property
    def noise(self) -> bool:
        return self.noise_p > NOISE


@dataclass(frozen=True)
class Settings:
    """choices: the file of a person's choices and how many there are. strength: W at most. texts:
    'NAME = FILE' for domains that aren't built in. seed: of the bootstrap."""

    choices: tuple[str, int] | None = None
    strength: float = 1.0
    texts: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """x [n, k] standardised cost of the second text minus the first's, y [n] in -1, 0, 1."""

    columns: list[Column]
    x: np.ndarray
    y: np.ndarray
    prompts: np.ndarray
    scales: dict[str, float]


def usable(votes: Iterable[Vote]) -> list[Vote]:
    """Answers about two models, with features."""
    return [v for v in votes if not v.about.catch and v.choice != "skip" and _common(v)]


def _common(vote: Vote) -> list[str]:
    first, second = vote.about.features
    return [name for name in FAMILIES if name in first and name in second]


def data_of(votes: Sequence[Vote]) -> Data:
    """The votes as numbers. Raises TextError if there are too few."""
    if len(votes) < FEW:
        raise TextError(
            f"Weights are learned from {FEW} votes or more about two models; there are {len(votes)}. "
            "Pairs of the reference against itself and skipped questions don't count. Vote on with: "
            "mezzotint judge A B"
        )
    rows = [_row(vote, _spoken(votes)) for vote in votes]
    columns = sorted(
        {c for row in rows for c in row}, key=lambda c: (FAMILIES.index(c.family), c.name)
    )
    raw = np.array([[row.get(column, 0.0) for column in columns] for row in rows])
    use = np.abs(raw).max(0) > 0
    columns, raw = [c for c, used in zip(columns, use, strict=True) if used], raw[:, use]
    scales = {}
    for family in dict.fromkeys(c.family for c in columns):
        values = raw[:, [c.family == family for c in columns]]
        scales[family] = float(np.sqrt(np.square(values[values != 0]).mean()))
    x = raw / np.array([scales[c.family] for c in columns])
    y = np.array([{"first": 1, "second": -1}.get(v.choice, 0) for v in votes])
    return Data(columns, x, y, np.array([v.about.prompt for v in votes]), scales)


def _spoken(votes: Sequence[Vote]) -> set[str]:
    """Domains that occur in several languages, which are then told apart."""
    pairs = {(v.about.domain, v.about.language) for v in votes}
    return {d for d, _ in pairs if sum(d == other for other, _ in pairs) > 1}


def _row(vote: Vote, several: set[str]) -> dict[Column, float]:
    about = vote.about
    domain = about.domain
    if domain in several:
        domain = f"{domain} ({about.language})"
    names = {"kl": domain, "margin": about.phenomenon or ""}
    return {
        Column(family, names.get(family, "")): _cost(about.features[1], family)
        - _cost(about.features[0], family)
        for family in _common(vote)
    }


def _cost(features: Features, family: str) -> float:
    value = features[family]
    return abs(value) if family == "length" else value


def prior_of(columns: Sequence[Column]) -> statistics.Prior:
    towards = np.array([float(c.family == "kl") for c in columns])
    low = np.array([-np.inf if c.family in FREE else 0.0 for c in columns])
    return statistics.Prior(towards, SPREAD, low)


def learn(votes: Sequence[Vote], settings: Settings) -> Learned:
    """Raises TextError where there is nothing to learn from."""
    used = usable(votes)
    if settings.choices is not None and not used:
        meaning, left_out = as_meaning({}, settings)
        return Learned([], {}, 0.0, 0, 1.0, {}, None, meaning, left_out)
    data = data_of(used)
    weight, rng = np.ones(len(used)), np.random.default_rng(settings.seed)
    prior = prior_of(data.columns)
    belief = statistics.believed(data.x, data.y, weight, prior)
    drawn = statistics.resampled(data.prompts, weight, rng)
    low, high = statistics.bootstrap(
        lambda w: statistics.believed(data.x, data.y, w, prior, belief).weights, drawn
    )
    p = statistics.noise_p(data.x, data.y, weight, replace(prior, spread=1.0), rng)
    counts = (data.x != 0).sum(0)
    rows = [
        _weight(column, float(b), (float(a), float(z)), belief.scale * float(t), int(n))
        for column, b, a, z, t, n in zip(
            data.columns, belief.weights, low, high, prior.towards, counts, strict=True
        )
    ]
    parts = {} if p > NOISE else _parts(data, belief, settings.strength)
    meaning, left_out = as_meaning(parts, settings)
    return Learned(
        rows,
        data.scales,
        belief.scale,
        len(used),
        p,
        _judges(used),
        agreement(used),
        meaning,
        left_out,
    )


def _weight(
    column: Column, value: float, ends: tuple[float, float], default: float, votes: int
) -> Weight:
    away, half = max(abs(value - default), SMALL), (ends[1] - ends[0]) / 2
    more = max(0, math.ceil(votes * ((half / away) ** 2 - 1)))
    return Weight(
        column, value, ends[0], ends[1], default, votes, more if more <= ENOUGH else None
    )


def _parts(data: Data, belief: statistics.Belief, strength: float) -> dict[Column, float]:
    """Weights of the objective's parts beside the mean KL, in its own units."""
    b = dict(zip(data.columns, belief.weights.tolist(), strict=True))
    kl = {c: v for c, v in b.items() if c.family == "kl"}
    common = float(np.median(list(kl.values()))) if kl else 0.0
    minded = {c: max(v - common, 0.0) for c, v in kl.items()}
    minded |= {c: v for c, v in b.items() if c.family in ("tail", "margin")}
    total = sum(minded.values())
    if total <= 0:
        return {}
    whole = strength * total / (total + common)
    unit = data.scales.get("kl", 1.0)
    return {
        c: whole * v / total * unit / data.scales[c.family]
        for c, v in minded.items()
        if v > TRACE * total
    }


def as_meaning(parts: dict[Column, float], settings: Settings) -> tuple[Meaning, list[str]]:
    """(the objective, what has no text to be measured on and is left out)."""
    from optimizer.data import domains

    own = {entry.partition("=")[0].strip(): entry for entry in settings.texts}
    names = {c.name: v for c, v in parts.items() if c.family == "kl"}
    known = {n: v for n, v in names.items() if n in own or n in domains.BUILT_IN}
    phenomena = {c.name: v for c, v in parts.items() if c.family == "margin"}
    if settings.choices is not None:
        count = settings.choices[1]
        phenomena[CHOICE] = settings.strength * count / (count + HALF)
    whole, lost = sum(known.values()), sum(phenomena.values())
    meaning = Meaning(
        cvar=_short(sum(v for c, v in parts.items() if c.family == "tail")),
        level=1 - WORST,
        domain=_short(whole),
        domains=[f"{own.get(n, n)} * {_short(v / whole)}" for n, v in known.items()],
        combine="sum",
        probes=_short(lost),
        phenomena=[f"{n} * {_short(v / lost)}" for n, v in phenomena.items()],
        choices=settings.choices[0] if settings.choices else None,
    )
    return meaning, sorted(names.keys() - known.keys())


def _short(value: float) -> float:
    """Four digits are more than votes can tell."""
    return float(f"{value:.4g}")


def _judges(votes: Sequence[Vote]) -> dict[str, int]:
    return {j: sum(v.judge == j for v in votes) for j in dict.fromkeys(v.judge for v in votes)}


def agreement(votes: Sequence[Vote]) -> float | None:
    """Between people, on the same prompt and models."""
    judges = list(_judges(votes))
    questions: dict[tuple[str, ...], list[float]] = {}
    for vote in votes:
        models = sorted(vote.about.models)
        row = questions.setdefault((vote.about.prompt, *models), [math.nan] * len(judges))
        sign = {"first": 1.0, "second": -1.0}.get(vote.choice, 0.0)
        row[judges.index(vote.judge)] = sign if list(vote.about.models) == models else -sign
    return statistics.agreement(np.array(list(questions.values())).T.tolist())
