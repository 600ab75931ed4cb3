"""What a plan is worth on documents that nothing was tuned on, with intervals.

All intervals are percentile bootstraps over *documents* (tokens of one document are not
independent), 95 %. Plans are compared on the same resampled documents, so what is common to them
cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from optimizer.certificate.wording import FEW, in_unit
from optimizer.metrics.bootstrap import (
    LEVEL,
    cvar,
    interval,
    mean,
    means,
    quantiles,
    resamples,
)
from optimizer.plan.certificate import Certificate, Interval, Line, PlanRow, Rival, Versus

if TYPE_CHECKING:
    from optimizer.metrics import embeddings
    from optimizer.metrics.divergence import AnyScores, Scores


@dataclass(frozen=True)
class Candidate:
    """A measured plan: its name in the table, its tensors' bytes, its size in the budget's own
    unit (bytes or code bits; comparisons "at equal size" use it) and its scores."""

    name: str
    bytes: int
    size: float
    scores: AnyScores


def describe(scores: AnyScores, counts: np.ndarray) -> dict[str, Interval]:
    """kl and its tail (p99, p99.9, CVaR 0.99: the mean of the worst 1 % of tokens or texts), flips,
    and what only one kind of model has."""
    found = {
        "kl": mean(scores.kl, counts),
        "kl_p99": _tail(scores.kl, counts, 0.99),
        "kl_p999": _tail(scores.kl, counts, 0.999),
        "kl_cvar99": cvar(scores.kl, counts, 0.99),
        "flips": mean(scores.flip, counts),
    }
    own = _geometry(scores, counts) if scores.unit == "text" else _predictions(scores, counts)
    return found | own


def _tail(values: np.ndarray, counts: np.ndarray, level: float) -> Interval:
    return interval(float(np.quantile(values, level)), quantiles(values, counts, level))


def _geometry(scores: embeddings.Scores, counts: np.ndarray) -> dict[str, Interval]:
    """Of an encoder: the change of cosines, mean and 99th percentile of the pairs, and the share of
    nearest texts that stay."""
    return {
        "cosine": mean(scores.cosine, counts),
        "cosine_p99": _tail(scores.cosine, counts, 0.99),
        "overlap": mean(scores.overlap, counts),
    }


def _predictions(scores: Scores, counts: np.ndarray) -> dict[str, Interval]:
    """Of a language model: ear, drift (RMS change of the true token's probability), perplexity (of
    this model and of the reference)."""

    def perplexity(nll: np.ndarray) -> Interval:
        own = float(np.exp(nll.mean(dtype=np.float64)))
        return interval(own, np.exp(means(nll, counts)))

    change = np.square(np.exp(-scores.nll) - np.exp(-scores.nll_reference))
    return {
        "ear": mean(scores.ear, counts),
        "drift": interval(float(np.sqrt(change.mean())), np.sqrt(means(change, counts))),
        "perplexity": perplexity(scores.nll),
        "perplexity_reference": perplexity(scores.nll_reference),
    }


def difference(mine: AnyScores, other: AnyScores, counts: np.ndarray) -> Interval:
    """Mean KL of `mine` minus that of `other`, paired; negative = mine is closer."""
    gap = mine.kl.astype(np.float64) - other.kl
    return interval(float(gap.mean()), means(gap, counts))


def ratio(
    mine: AnyScores, other: Callable[[np.ndarray], np.ndarray], counts: np.ndarray
) -> Interval:
    """Mean KL of `mine` over another mean KL that is computed from the same resamples."""
    once = np.ones((1, len(mine.kl)), dtype=counts.dtype)
    value = means(mine.kl, once) / np.maximum(other(once), 1e-12)
    return interval(float(value[0]), means(mine.kl, counts) / np.maximum(other(counts), 1e-12))


def line(low: Candidate, high: Candidate, size: float) -> Callable[[np.ndarray], np.ndarray]:
    """The straight line between two plans at `size`: resamples -> mean KL there."""
    share = (size - low.size) / max(high.size - low.size, 1)

    def at(counts: np.ndarray) -> np.ndarray:
        return (1 - share) * means(low.scores.kl, counts) + share * means(high.scores.kl, counts)

    return at


def certify(
    plan: Candidate, uniforms: Sequence[Candidate], others: Sequence[Candidate], seed: int
) -> Certificate:
    """The certificate of a plan.

    uniforms: measured uniform plans, any sizes. The plan is compared with the smallest uniform
    plan of at least its size, with the largest that is no larger than it, and with the straight
    line between the two at its own size. Where only smaller ones were measured (the best that fits
    the budget), with the largest of them.
    """
    rng = np.random.default_rng([seed, 77])
    counts = resamples(plan.scores.documents, rng)
    rows = [plan, *sorted(uniforms, key=_size), *others]
    above = min((u for u in uniforms if u.size >= plan.size), key=_size, default=None)
    below = max((u for u in uniforms if u.size <= plan.size), key=_size, default=None)
    versus = Versus()
    if above is not None:
        versus = Versus(uniform=_against(plan, above, counts))
    elif below is not None:
        versus = Versus(fitting=_against(plan, below, counts))
    if above is not None and below is not None and above is not below:
        at = line(below, above, plan.size)
        between = Line(
            f"line {below.name} to {above.name}",
            float(at(np.ones((1, len(plan.scores.kl))))[0]),
            ratio(plan.scores, at, counts),
        )
        versus = replace(versus, line=between)
    documents, unit = len(np.unique(plan.scores.documents)), plan.scores.unit
    return Certificate(
        documents=documents,
        tokens=int(plan.scores.kl.size),
        interval=in_unit(f"{LEVEL:.0%} bootstrap over documents", unit),
        rows=[PlanRow(c.name, **describe(c.scores, counts), bytes=c.bytes) for c in rows],
        versus=versus,
        unit=unit,
        verdict=in_unit(verdict(versus, documents), unit),
    )


def _size(candidate: Candidate) -> float:
    return candidate.size


def _against(plan: Candidate, other: Candidate, counts: np.ndarray) -> Rival:
    return Rival(
        other.name,
        other.bytes,
        difference(plan.scores, other.scores, counts),
        ratio(plan.scores, lambda c: means(other.scores.kl, c), counts),
    )


def verdict(versus: Versus, documents: int) -> str:
    """One sentence; never more than the intervals allow."""
    uniform = versus.rival
    if uniform is None:
        return "No uniform plan was measured, so nothing is claimed against one."
    gap, share, size = uniform.difference, uniform.ratio, uniform.bytes
    stored = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
    name = f"{uniform.name} ({stored})"
    room = "no more bytes"
    if versus.uniform is None:
        name += ", the largest uniform plan that fits"
        room = "the same budget"
    if documents < FEW:
        return (
            f"Not enough text to say: {documents} documents; {FEW} or more are needed. Measured "
            f"{share.value:.2f} times the KL of {name}."
        )
    if gap.low == gap.value == gap.high == 0:
        return f"The same as {name}: nothing was gained over rounding every layer alike."
    if gap.high < 0:
        return (
            f"Better than {name}: {share.value:.2f} times its KL "
            f"(95 %: {share.low:.2f} to {share.high:.2f}) in {room}."
        )
    if versus.line is not None:
        return _beside_line(versus.line, name, gap.low > 0)
    if gap.low > 0:
        return f"Worse than {name}: {share.value:.2f} times its KL."
    return (
        f"Not distinguishable from {name} on {documents} documents: {share.value:.2f} times its "
        f"KL (95 %: {share.low:.2f} to {share.high:.2f}). More held-out text would narrow it."
    )


def _beside_line(between: Line, larger: str, worse: bool) -> str:
    """The plan lies between two uniform plans and doesn't beat the larger one."""
    share = between.ratio
    interval = f"{share.value:.2f} times (95 %: {share.low:.2f} to {share.high:.2f}) the KL"
    where = f"of the straight {between.name} at the same size"
    word = "Better than" if share.high < 1 else "Worse than" if share.low > 1 else "Like"
    also = f"; {larger}, which is larger, is closer to the reference" if worse else ""
    return f"{word} mixing uniform plans: {interval} {where}{also}."
