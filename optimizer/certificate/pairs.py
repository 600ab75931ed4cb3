"""What a plan did to the margins of probes, per phenomenon and language.

    m    a pair's margin with the reference's weights, m' with the plan's   nats, higher is better
    d    m - m', the loss of margin                                         nats, lower is better
    flip m' <= 0 although m > 0                                             share, lower is better
Only informative pairs count: those that the reference separates by more than `threshold`. Flips are
gross: a pair that the reference gets wrong and the plan right never makes up for a lost one.

Intervals are 95 % bootstraps over couples (pairs that share their two continuations, which are not
independent). Tests are randomised sign flips of the couples' sums; p-values of one family are
corrected by Holm's step-down method. "No loss shown" is never called "no loss".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from optimizer.data.pairs import Pair, cells
from optimizer.metrics import bootstrap
from optimizer.metrics.bootstrap import sign_flips
from optimizer.plan.certificate import Interval

TAIL = 0.9  # CVaR: the mean of the worst tenth; of 64 pairs that is six
ALPHA = 0.05


@dataclass(frozen=True)
class Count:
    """What became of the pairs: pairs = used + wrong + weak + skipped.

    wrong: the reference prefers the bad one. weak: it separates by no more than the threshold.
    """

    pairs: int
    used: int
    wrong: int
    weak: int
    skipped: int


@dataclass(frozen=True)
class Damage:
    """flips: share. loss: mean of d. tail: CVaR of d. p: one-sided, of "no loss", Holm-corrected."""

    flips: Interval
    loss: Interval
    tail: Interval
    p: float | None


@dataclass(frozen=True)
class Cell:
    """One phenomenon in one language; `damage` by the name of the weights. gap: the plan's mean
    loss minus the uniform plan's (negative = the plan lost less); gap_p: two-sided, Holm-corrected.
    Without informative pairs the last three are empty or None."""

    phenomenon: str
    language: str
    count: Count
    margin: float | None
    damage: dict[str, Damage]
    gap: Interval | None = None
    gap_p: float | None = None


def judge(
    pairs: Sequence[Pair],
    reference: np.ndarray,
    others: Mapping[str, np.ndarray],
    threshold: float,
    seed: int = 0,
) -> tuple[list[Cell], list[Cell]]:
    """(a cell for each phenomenon and language, a total for each language).

    reference, others[name]: margins [pairs], NaN where a pair was skipped. The first two names of
    `others` are compared with each other. Totals have no p-values: they are no test of their own.
    """
    rng = np.random.default_rng([seed, 64])

    def cell(key: tuple[str, str], row: list[bool], test: bool) -> Cell:
        return _cell(key, pairs, np.array(row), reference, others, threshold, rng, test)

    languages = list(dict.fromkeys(pair.language for pair in pairs))
    found = [cell(key, [pair.cell == key for pair in pairs], test=True) for key in cells(pairs)]
    totals = [
        cell(("all", language), [pair.language == language for pair in pairs], test=False)
        for language in languages
    ]
    return _corrected(found), totals


def informative(reference: np.ndarray, threshold: float) -> np.ndarray:
    """Which pairs count, bool [pairs]; NaN (skipped) doesn't."""
    return np.asarray(reference > threshold)


def _cell(
    key: tuple[str, str],
    pairs: Sequence[Pair],
    row: np.ndarray,
    reference: np.ndarray,
    others: Mapping[str, np.ndarray],
    threshold: float,
    rng: np.random.Generator,
    test: bool,
) -> Cell:
    skipped = row & np.isnan(reference)
    use = row & informative(reference, threshold)
    wrong = row & (reference <= 0)
    weak = row & (reference > 0) & (reference <= threshold)
    count = Count(*(int(mask.sum()) for mask in (row, use, wrong, weak, skipped)))
    if not use.any():
        return Cell(*key, count, None, {})
    couples = _couples([pair for pair, used in zip(pairs, use, strict=True) if used])
    counts = bootstrap.resamples(couples, rng)
    losses = {name: (reference - margins)[use] for name, margins in others.items()}
    damage = {
        name: Damage(
            bootstrap.mean(~(others[name][use] > 0), counts),
            bootstrap.mean(loss, counts),
            bootstrap.cvar(loss, counts, TAIL),
            sign_flips(loss, couples, rng, two_sided=False) if test else None,
        )
        for name, loss in losses.items()
    }
    gap = gap_p = None
    if len(losses) > 1:
        mine, rival = list(losses.values())[:2]
        gap = bootstrap.mean(mine - rival, counts)
        if test:
            gap_p = sign_flips(mine - rival, couples, rng, two_sided=True)
    return Cell(*key, count, float(reference[use].mean()), damage, gap, gap_p)


def _couples(pairs: Sequence[Pair]) -> np.ndarray:
    """The number of each pair's couple: pairs with the same two continuations share it."""
    numbers: dict[frozenset[str], int] = {}
    for pair in pairs:
        numbers.setdefault(frozenset((pair.good, pair.bad)), len(numbers))
    return np.array([numbers[frozenset((pair.good, pair.bad))] for pair in pairs])


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm 1979: the k-th smallest of n p-values times n - k + 1, made monotone, at most 1."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    scaled = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def _corrected(tested: list[Cell]) -> list[Cell]:
    """One family per column: each plan's losses, and the gaps."""
    used = [i for i, cell in enumerate(tested) if cell.damage]
    if not used:
        return tested
    found = list(tested)
    for name in tested[used[0]].damage:
        corrected = holm([_p(tested[i].damage[name].p) for i in used])
        for i, p in zip(used, corrected, strict=True):
            changed = found[i].damage | {name: replace(found[i].damage[name], p=float(p))}
            found[i] = replace(found[i], damage=changed)
    if tested[used[0]].gap is not None:
        for i, p in zip(used, holm([_p(tested[i].gap_p) for i in used]), strict=True):
            found[i] = replace(found[i], gap_p=float(p))
    return found


def _p(value: float | None) -> float:
    return 1.0 if value is None else value


def verdict(judged: Sequence[Cell], plan: str, rival: str | None) -> str:
    """What may be said, in plain words."""
    tested = [cell for cell in judged if cell.damage]
    if not tested:
        return (
            "No pair was informative: the reference itself doesn't separate them. Nothing is said."
        )
    lost = [c for c in tested if _p(c.damage[plan].p) < ALPHA]
    flips = Counter(_name(c) for c in tested if c.damage[plan].flips.value > 0)
    text = (
        f"Loss of margin shown in {len(lost)} of {len(tested)} cells (Holm, {ALPHA:.0%}); "
        f"distinctions turned over in {len(flips)}."
    )
    if lost:
        worst = sorted(lost, key=lambda c: -c.damage[plan].loss.value)[:3]
        text += " Most: " + ", ".join(
            f"{_name(c)} ({c.damage[plan].loss.value:.2f} nats)" for c in worst
        )
        text += "."
    else:
        text += " That doesn't prove that nothing was lost: the intervals say how much may be."
    if rival is not None:
        gaps = [c for c in tested if c.gap is not None and _p(c.gap_p) < ALPHA]
        better = sum(c.gap is not None and c.gap.value < 0 for c in gaps)
        text += (
            f" Against {rival}: less lost in {better} cells, more in {len(gaps) - better}, "
            f"no difference shown in {len(tested) - len(gaps)}."
        )
    return text


def _name(cell: Cell) -> str:
    return f"{cell.phenomenon} {cell.language}"
