"""Is the plan the reference, within a tolerance that was fixed beforehand? A verdict in plain words.

    lossless   every measure's 95 % interval lies within its tolerance. One-sided non-inferiority
               for kl and flips, which are never negative; two one-sided tests for the signed change
               of accuracy (Schuirmann 1987). All must hold, so none is corrected for the others.
    lossy      some measure's lower bound lies above its tolerance. Any may fire, so the 5 % are
               shared by all measures and texts (Bonferroni).
    open       neither: there is not enough text to say, and how much would probably be enough.

"No difference was found" is never "lossless". The unit is the document: bounds are bootstrap-t over
documents, and McNemar's test flips the signs of whole documents.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from math import sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import norm

from optimizer.certificate import wording
from optimizer.certificate.comparison import describe
from optimizer.certificate.tolerance import Tolerance
from optimizer.certificate.wording import FEW, MAIN
from optimizer.metrics.bootstrap import bounds, per_document, resamples, sign_flips
from optimizer.plan.certificate import (
    Evaluation,
    Finding,
    McNemar,
    Moved,
    State,
    TextRow,
    Tolerated,
)

if TYPE_CHECKING:
    from optimizer.metrics.divergence import AnyScores, Scores

Held = Literal["kl", "flips", "accuracy"]  # against a tolerance

ERROR = 0.05  # of a wrong answer
INSIDE = (
    ERROR / 2
)  # nominal, of a bound that speaks for "lossless". Losses have a long right tail:
# simulated with 24 documents (lognormal with sigma .6 and 1, gamma, normal; 250 data sets each), an
# upper bound was too low in 5 to 10 % with a nominal error of 5 %, and in 3 to 6 % with 2.5 %
POWER = 0.8
DRAWS = 1000  # samples of a power estimate
MOST = 100_000  # documents; a loss so near its tolerance is not going to be told apart from it
WORST = 5  # documents that are named


def measures(scores: AnyScores) -> dict[Held, np.ndarray]:
    """What is held against a tolerance, token by token. accuracy: the loss of it, -1, 0 or 1. Of an
    encoder, text by text: nothing says which neighbour is the right one, so it has no accuracy."""
    if scores.unit == "text":
        return {"kl": scores.kl, "flips": scores.flip}
    lost = scores.hit_reference.astype(np.float64) - scores.hit
    return {"kl": scores.kl, "flips": scores.flip, "accuracy": lost}


def judge(
    texts: Mapping[str, AnyScores],
    weights: Mapping[str, float],
    noise: Mapping[str, AnyScores],
    tolerance: Tolerance,
    seed: int,
    parts: Collection[str] = (),
) -> Evaluation:
    """The certificate's answer. parts: texts that are parts of the first.

    texts: the plan's scores on the held-out text (MAIN, the first) and on domains; weights: of the
    domains, for the weighted mean. noise: the reference against itself on the held-out text.
    """
    findings = [
        finding
        for name, scores in texts.items()
        for finding in judge_text(
            name, scores, tolerance, len(measures(scores)) * len(texts), seed
        )
    ]
    floor = [_row(name, scores, seed) for name, scores in noise.items()]
    rows = [_row(name, scores, seed) for name, scores in texts.items()]
    main = texts[MAIN]
    found = Evaluation(
        state=state(findings, len(np.unique(main.documents))),
        tolerance=Tolerated(**asdict(tolerance)),
        findings=findings,
        texts=rows,
        noise=floor,
        documents=worst_documents({n: s for n, s in texts.items() if n not in parts}),
        half_of_loss=concentration(main),
        unit=main.unit,
        mcnemar=mcnemar(main, seed) if main.unit == "token" else None,
    )
    kl = {name: scores.mean_kl for name, scores in texts.items() if name != MAIN}
    if kl:
        total = sum(weights.get(name, 1.0) for name in kl)
        mean = sum(weights.get(name, 1.0) * loss for name, loss in kl.items()) / total
        worst = max(kl, key=lambda name: kl[name])
        found = replace(found, worst_domain=worst, weighted_kl=mean)
    return replace(found, verdict=wording.sentence(found))


def _row(name: str, scores: AnyScores, seed: int) -> TextRow:
    counts = resamples(scores.documents, np.random.default_rng([seed, 79]))
    documents, tokens = len(np.unique(scores.documents)), int(scores.kl.size)
    return TextRow(name, **describe(scores, counts), documents=documents, tokens=tokens)


def judge_text(
    text: str, scores: AnyScores, tolerance: Tolerance, tests: int, seed: int
) -> list[Finding]:
    """One text's findings; tests: how many there are in all, which share the 5 % of "lossy"."""
    counts = resamples(scores.documents, np.random.default_rng([seed, 80]))
    return [
        _finding(text, key, values, scores.documents, getattr(tolerance, key), counts, tests)
        for key, values in measures(scores).items()
    ]


def _finding(
    text: str,
    measure: Held,
    values: np.ndarray,
    documents: np.ndarray,
    tolerated: float,
    counts: np.ndarray,
    tests: int,
) -> Finding:
    sums, sizes, _ = per_document(values, documents)
    value = float(sums.sum() / sizes.sum())
    low, high = bounds(values, documents, counts, INSIDE)
    least, most = bounds(values, documents, counts, ERROR / tests)
    if measure == "accuracy":  # signed: a gain of accuracy is a change, too
        within, over = -tolerated <= low and high <= tolerated, max(least, -most) > tolerated
    else:
        within, over = high <= tolerated, least > tolerated
    enough = len(np.unique(documents)) >= FEW
    said: State = "open" if not enough else "over" if over else "within" if within else "open"
    error = ERROR / tests if abs(value) > tolerated else INSIDE
    needed = None if said != "open" else documents_needed(sums, sizes, tolerated, error)
    if needed is not None and needed <= len(sums):  # so many were probably enough, and weren't
        needed = len(sums) + 1
    return Finding(text, measure, value, low, high, least, tolerated, said, needed)


def documents_needed(
    sums: np.ndarray, sizes: np.ndarray, tolerated: float, error: float
) -> int | None:
    """Documents like these with which their loss is decided with probability POWER; at least FEW,
    None if more than MOST. sums, sizes: see `certificate.per_document`."""
    ladder = np.unique(np.geomspace(FEW, MOST, 96).round().astype(int))
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        enough = power(sums, sizes, tolerated, int(ladder[middle]), error) >= POWER
        low, high = (low, middle) if enough else (middle + 1, high)
    return int(ladder[low]) if low < len(ladder) else None


def power(
    sums: np.ndarray, sizes: np.ndarray, tolerated: float, documents: int, error: float = ERROR
) -> float:
    """Chance that this many documents like these show their mean loss to be on its side of the
    tolerance: "lossy" where it is above, "lossless" where it is below.

    The share of DRAWS samples in which a one-sided bound does. Each is drawn with replacement from
    these documents, whose losses are skewed: a normal approximation would promise too much. The
    bound's bootstrap-t would be too slow inside every sample; see `_quantile`.
    """
    rng = np.random.default_rng(82)
    counts = rng.multinomial(documents, np.full(len(sums), 1 / len(sums)), size=DRAWS)
    total, center = counts @ sizes, sums.sum() / sizes.sum()
    moved = sums - center * sizes  # against cancellation in the powers below
    gap = counts @ moved / total  # the sample's mean minus `center`
    each = moved[None] - gap[:, None] * sizes
    square, cube = (counts * each**2).sum(1), (counts * each**3).sum(1)
    if not square.any():
        return 1.0 if abs(center) != tolerated else 0.0
    spread = np.sqrt(square * documents / (documents - 1)) / total
    cubed = (square / documents) ** 1.5
    skew = np.divide(cube / documents, cubed, out=np.zeros(DRAWS), where=cubed > 0)
    sign = 1.0 if center >= 0 else -1.0  # a gain of accuracy is a change, too
    mean, skew = sign * (center + gap), sign * skew / sqrt(documents)
    if abs(center) > tolerated:
        return float((mean - _quantile(1 - error, skew) * spread > tolerated).mean())
    return float((mean - _quantile(error, skew) * spread <= tolerated).mean())


def _quantile(level: float, skew: np.ndarray) -> np.ndarray:
    """Of the studentized mean; skew: that of the documents over the root of their number.

    The inverse of Hall's transformation to normality (1992, Annals of Statistics 20:221):
        g(t) = t + k t^2 / 3 + k^2 t^3 / 27 + k / 6,   k = skew
    """
    k = np.where(np.abs(skew) < 1e-6, 1e-6, skew)
    return np.asarray(3 / k * (np.cbrt(1 + k * (norm.ppf(level) - k / 6)) - 1))


def mcnemar(scores: Scores, seed: int) -> McNemar:
    """Which of the two finds the true next token where only one does.

    lost, won: tokens that only the reference, or only the plan, ranks first. p: McNemar's exact test
    draws a sign for every discordant token; tokens of one document aren't independent, so here a
    document's tokens share their sign (a randomised sign-flip test of lost - won per document;
    with one token a document it is McNemar's). Small p: accuracy changed. Large p: nothing shown.
    """
    lost = (scores.hit_reference > scores.hit).sum(1)
    won = (scores.hit > scores.hit_reference).sum(1)
    _, index = np.unique(scores.documents, return_inverse=True)
    rng = np.random.default_rng([seed, 81])
    p = sign_flips((lost - won).astype(np.float64), index, rng, two_sided=True)
    return McNemar(int(lost.sum()), int(won.sum()), p)


def concentration(scores: AnyScores) -> int:
    """The smallest number of documents that hold half of the whole KL."""
    sums = np.sort(per_document(scores.kl, scores.documents)[0])[::-1]
    return int(np.searchsorted(np.cumsum(sums), sums.sum() / 2) + 1) if sums.sum() > 0 else 0


def worst_documents(texts: Mapping[str, AnyScores]) -> list[Moved]:
    """The documents of the highest mean KL, of all texts together."""
    found: list[Moved] = []
    for name, scores in texts.items():
        sums, sizes, first = per_document(scores.kl, scores.documents)
        found += [
            Moved(name, int(scores.documents[w]), int(w), float(s / n))
            for s, n, w in zip(sums, sizes, first, strict=True)
        ]
    return sorted(found, key=lambda one: one.kl, reverse=True)[:WORST]


def state(findings: Sequence[Finding], documents: int) -> Literal["lossy", "lossless", "open"]:
    """Of the whole: a lossy domain is lossy; a domain with too little text is only named."""
    if any(finding.state == "over" for finding in findings):
        return "lossy"
    main = [finding.state for finding in findings if finding.text == MAIN]
    return "lossless" if documents >= FEW and set(main) == {"within"} else "open"
