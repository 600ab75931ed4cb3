from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.certificate import comparison
from optimizer.certificate.comparison import (
    Candidate,
    certify,
    describe,
    difference,
    line,
    ratio,
    verdict,
)
from optimizer.certificate.equivalence import judge
from optimizer.certificate.tolerance import Tolerance
from optimizer.certificate.wording import FEW, MAIN
from optimizer.metrics import embeddings
from optimizer.metrics.bootstrap import resamples
from optimizer.metrics.divergence import Scores
from optimizer.plan.certificate import (
    Certificate,
    Evaluation,
    Interval,
    Line,
    Rival,
    Versus,
    to_json,
)
from optimizer.untrusted import checked

DOCUMENTS = np.repeat(np.arange(20), 3)  # 20 documents of 3 windows


def scores(kl: np.ndarray, documents: np.ndarray = DOCUMENTS) -> Scores:
    rng = np.random.default_rng(1)
    shape = kl.shape
    return Scores(
        kl.astype(np.float32),
        rng.uniform(0.9, 1, shape).astype(np.float32),
        (rng.random(shape) < 0.1).astype(np.float32),
        rng.exponential(2, shape).astype(np.float32),
        rng.exponential(2, shape).astype(np.float32),
        (rng.random(shape) < 0.4).astype(np.float32),
        (rng.random(shape) < 0.4).astype(np.float32),
        documents,
    )


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---------------------------------------------------------------- the bootstrap


def simulated(truth: float, seed: int) -> np.ndarray:
    """KL [60, 4] whose documents differ much more than the windows of one document."""
    own = np.random.default_rng([seed, 5])
    levels = own.normal(truth, 0.3, 20)[DOCUMENTS]
    return levels[:, None] + own.normal(0, 0.05, (60, 4))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """1000 data sets with a known mean. A percentile bootstrap of 20 documents covers a little
    less than 95 %; one over windows would cover about 70 %."""
    counts = resamples(DOCUMENTS, rng())
    single = resamples(np.arange(60), rng())
    held = naive = 0
    for seed in range(1000):
        found = scores(simulated(1.0, seed))
        own = describe_kl(found, counts)
        held += own[0] <= 1 <= own[1]
        wrong = describe_kl(found, single)
        naive += wrong[0] <= 1 <= wrong[1]
    assert 0.90 <= held / 1000 <= 0.97
    assert naive / 1000 < 0.8


def describe_kl(found: Scores, counts: np.ndarray) -> tuple[float, float]:
    zero = scores(np.zeros_like(found.kl))
    interval = difference(found, zero, counts)
    return interval.low, interval.high


def test_the_difference_is_paired() -> None:
    """What is common to two plans cancels: the interval of the difference is far narrower than
    either plan's own."""
    base = np.abs(simulated(1.0, 3))
    mine, other = scores(base), scores(base + 0.01)
    counts = resamples(DOCUMENTS, rng())
    gap = difference(mine, other, counts)
    assert gap.value == pytest.approx(-0.01, rel=1e-3)
    assert gap.low <= gap.value <= gap.high < 0
    own = describe(mine, counts)["kl"]
    assert gap.high - gap.low < 1e-3 * (own.high - own.low)


def test_the_difference_changes_sign_with_its_sides() -> None:
    one, two = scores(simulated(1.0, 1)), scores(simulated(1.2, 2))
    counts = resamples(DOCUMENTS, rng())
    forth, back = difference(one, two, counts), difference(two, one, counts)
    assert forth.value == pytest.approx(-back.value)
    assert forth.low == pytest.approx(-back.high) and forth.high == pytest.approx(-back.low)


def test_describe_is_the_plain_statistics() -> None:
    found = scores(np.abs(simulated(0.5, 4)))
    stats = describe(found, resamples(DOCUMENTS, rng()))
    assert stats["kl"].value == pytest.approx(found.kl.mean(dtype=float))
    assert stats["kl_p99"].value == pytest.approx(np.quantile(found.kl, 0.99))
    assert stats["flips"].value == pytest.approx(found.flip.mean())
    assert stats["ear"].value == pytest.approx(found.ear.mean(dtype=float))
    assert stats["perplexity"].value == pytest.approx(np.exp(found.nll.mean(dtype=float)))
    reference = np.exp(found.nll_reference.mean(dtype=float))
    assert stats["perplexity_reference"].value == pytest.approx(reference)
    for interval in stats.values():
        assert interval.low <= interval.high
    for key in ("kl", "flips", "ear", "perplexity"):
        assert stats[key].low < stats[key].value < stats[key].high, key


def test_quantiles_of_resamples_against_repeating_the_tokens() -> None:
    found = scores(np.abs(simulated(0.5, 4)))
    counts = resamples(DOCUMENTS, rng())
    stats = describe(found, counts)["kl_p99"]
    brute = [
        np.quantile(np.repeat(found.kl, c, axis=0), 0.99, method="inverted_cdf")
        for c in counts[:500]
    ]
    low, high = np.quantile(brute, [0.025, 0.975])
    assert (stats.low, stats.high) == pytest.approx((low, high), rel=1e-6)


def test_the_line_is_straight() -> None:
    low = Candidate("low", 100, 100, scores(np.full((60, 4), 0.8)))
    high = Candidate("high", 200, 200, scores(np.full((60, 4), 0.2)))
    once = np.ones((1, 60))
    for size, expected in ((100, 0.8), (200, 0.2), (150, 0.5), (125, 0.65)):
        assert line(low, high, size)(once)[0] == pytest.approx(expected)


def test_a_ratio_is_of_means() -> None:
    mine, other = scores(np.full((60, 4), 0.3)), scores(np.full((60, 4), 0.6))
    counts = resamples(DOCUMENTS, rng())
    found = ratio(mine, lambda c: np.full(len(c), 0.6), counts)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert difference(mine, other, counts).value == pytest.approx(-0.3)


# ---------------------------------------------------------------- the certificate


def candidate(name: str, size: int, kl: float, documents: np.ndarray = DOCUMENTS) -> Candidate:
    noise = np.random.default_rng(len(name)).normal(1, 0.05, (len(documents), 4))
    return Candidate(name, size, size, scores(kl * noise, documents))


UNIFORMS = [
    candidate("int8", 800, 0.01), candidate("int3", 300, 0.9), candidate("int4", 400, 0.3),
    candidate("int6", 600, 0.05),
]  # fmt: skip


def test_the_plan_is_held_against_its_neighbours() -> None:
    proof = to_json(
        certify(candidate("plan", 350, 0.4), UNIFORMS, [candidate("random", 350, 0.8)], 0)
    )
    assert proof["versus"]["uniform"]["name"] == "int4"
    assert proof["versus"]["line"]["name"] == "line int3 to int4"
    assert proof["versus"]["line"]["kl"] == pytest.approx(0.6, rel=0.05)
    assert proof["versus"]["line"]["ratio"]["value"] == pytest.approx(0.4 / 0.6, rel=0.05)
    names = [row["name"] for row in proof["rows"]]
    assert names == ["plan", "int3", "int4", "int6", "int8", "random"]
    assert proof["documents"] == 20 and proof["tokens"] == 240
    words = "Better than mixing uniform plans: 0.67 times"
    assert (
        proof["verdict"].startswith(words) and "int4 (0.4 kB), which is larger" in proof["verdict"]
    )


def test_a_plan_of_a_uniforms_size_is_compared_with_that_one() -> None:
    proof = to_json(certify(candidate("plan", 400, 0.2), UNIFORMS, [], 0))
    assert proof["versus"]["uniform"]["name"] == "int4"
    assert "line" not in proof["versus"]
    assert proof["verdict"].startswith("Better than int4")
    assert "in no more bytes" in proof["verdict"]


def test_above_all_uniforms_it_is_held_against_the_largest() -> None:
    proof = to_json(certify(candidate("plan", 900, 0.001), UNIFORMS, [], 0))
    assert proof["versus"].keys() == {"fitting"}
    assert proof["versus"]["fitting"]["name"] == "int8"
    assert proof["verdict"].startswith(
        "Better than int8 (0.8 kB), the largest uniform plan that fits"
    )
    assert "in the same budget" in proof["verdict"]


def test_without_uniforms_nothing_is_claimed() -> None:
    proof = to_json(certify(candidate("plan", 900, 0.001), [], [], 0))
    assert proof["versus"] == {} and "nothing is claimed" in proof["verdict"]


def test_below_all_uniforms_there_is_no_line() -> None:
    proof = to_json(certify(candidate("plan", 200, 2.0), UNIFORMS, [], 0))
    assert proof["versus"].keys() == {"uniform"}
    assert proof["versus"]["uniform"]["name"] == "int3"


def test_the_same_seed_gives_the_same_certificate() -> None:
    plan = candidate("plan", 350, 0.4)
    assert certify(plan, UNIFORMS, [], 3) == certify(plan, UNIFORMS, [], 3)
    assert certify(plan, UNIFORMS, [], 3) != certify(plan, UNIFORMS, [], 4)


def test_few_documents_are_not_believed() -> None:
    few = np.repeat(np.arange(FEW - 1), 9)
    rivals = [candidate("int4", 400, 0.9, few)]
    proof = to_json(certify(candidate("plan", 350, 0.1, few), rivals, [], 0))
    assert proof["verdict"].startswith(f"Not enough text to say: {FEW - 1} documents")


# ---------------------------------------------------------------- the wording


def versus(low: float, value: float, high: float) -> Versus:
    share = Interval(1 + value, 1 + low, 1 + high)
    return Versus(uniform=Rival("int4", 4_000_000, Interval(value, low, high), share))


@given(st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3).map(sorted), st.integers(0, 40))
def test_no_word_goes_beyond_the_interval(gap: list[float], documents: int) -> None:
    said = verdict(versus(*gap), documents)
    low, _, high = gap
    better, worse = (re.search(word, said, re.I) for word in (r"\bbetter", r"\bworse"))
    if documents < FEW:
        assert not better and not worse and "Not enough text" in said
    elif low == high == 0:
        assert not better and not worse and "The same as" in said
    elif low <= 0 <= high:
        assert not better and not worse and "Not distinguishable" in said
    else:
        assert bool(better) == (high < 0) and bool(worse) == (low > 0)


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ((-0.3, -0.2, -0.1), "Better than int4 (4.0 MB): 0.80 times its KL (95 %: 0.70 to 0.90)"),
        ((0.1, 0.2, 0.3), "Worse than int4 (4.0 MB): 1.20 times its KL."),
        ((-0.1, 0.0, 0.1), "Not distinguishable from int4 (4.0 MB) on 20 documents: 1.00 times"),
        ((-0.2, -0.1, 0.0), "Not distinguishable from int4"),
        ((0.0, 0.1, 0.2), "Not distinguishable from int4"),
        ((0.0, 0.0, 0.0), "The same as int4 (4.0 MB): nothing was gained"),
    ],
)
def test_verdicts(gap: tuple[float, float, float], words: str) -> None:
    assert verdict(versus(*gap), 20).startswith(words)


def test_without_a_rival_nothing_is_claimed() -> None:
    assert "nothing is claimed" in verdict(Versus(), 100)


@pytest.mark.parametrize(
    ("size", "beside"), [(350, {"uniform", "line"}), (200, {"uniform"}), (900, {"fitting"})]
)
def test_a_certificate_is_what_a_plan_may_hold(size: int, beside: set[str]) -> None:
    found = to_json(
        certify(candidate("plan", size, 0.2), UNIFORMS, [candidate("random", 350, 1.0)], 0)
    )
    whole = checked(Certificate, json.loads(json.dumps(found)))
    assert to_json(whole) == found
    assert found["versus"].keys() == beside
    names = ["plan", "int3", "int4", "int6", "int8", "random"]
    assert [row.name for row in whole.rows] == names and whole.rows[1].bytes == 300
    assert (whole.documents, whole.tokens, whole.unit) == (20, 240, "token")
    assert whole.interval == "95% bootstrap over documents"
    if "line" in beside:
        assert whole.versus.line is not None and whole.versus.line.name == "line int3 to int4"
        assert whole.versus.line.kl == pytest.approx(0.6, rel=0.02)


def test_the_tail_and_the_drift_are_their_definitions() -> None:
    one = scores(np.random.default_rng(3).exponential(1, (60, 4)))
    stats = describe(one, resamples(DOCUMENTS, rng()))
    flat = np.sort(one.kl.ravel())[::-1]
    assert stats["kl_p999"].value == pytest.approx(np.quantile(one.kl, 0.999))
    assert stats["kl_cvar99"].value == pytest.approx((flat[0] + flat[1] + 0.4 * flat[2]) / 2.4)
    change = np.exp(-one.nll.astype(float)) - np.exp(-one.nll_reference.astype(float))
    assert stats["drift"].value == pytest.approx(np.sqrt((change**2).mean()))
    assert stats["drift"].low < stats["drift"].value < stats["drift"].high


def test_a_loss_of_nothing_has_a_ratio() -> None:
    none = scores(np.zeros((60, 4)))
    found = ratio(none, lambda c: np.zeros(len(c)), resamples(DOCUMENTS, rng()))
    assert (found.value, found.low, found.high) == (0, 0, 0)


# ---------------------------------------------------------------- encoders


def geometry(seed: int) -> embeddings.Scores:
    """20 batches of four texts, which have 12 ordered pairs."""
    own = np.random.default_rng([seed, 9])
    kl, cosine = own.exponential(0.1, (20, 4)), own.exponential(0.01, (20, 12))
    flip, overlap = own.random((20, 4)) < 0.2, own.integers(5, 11, (20, 4)) / 10
    each = (values.astype(np.float32) for values in (kl, cosine, flip, overlap))
    return embeddings.Scores(*each, documents=np.arange(20))


def only(scores: embeddings.Scores, batches: int) -> embeddings.Scores:
    return embeddings.Scores(**{key: value[:batches] for key, value in scores.arrays().items()})


def test_of_an_encoder_the_geometry_is_described() -> None:
    one = geometry(0)
    stats = describe(one, resamples(np.arange(20), rng()))
    assert stats.keys() == {
        "kl", "kl_p99", "kl_p999", "kl_cvar99", "flips", "cosine", "cosine_p99", "overlap",
    }  # fmt: skip
    assert stats["cosine"].value == pytest.approx(one.cosine.mean(dtype=float))
    assert stats["cosine_p99"].value == pytest.approx(np.quantile(one.cosine, 0.99))
    assert stats["overlap"].value == pytest.approx(one.overlap.mean(dtype=float))
    assert stats["overlap"].low < stats["overlap"].value < stats["overlap"].high


def test_an_encoders_certificate_speaks_of_batches_and_texts() -> None:
    plan, other = (Candidate(n, 300, 300, geometry(i)) for i, n in enumerate(("plan", "int4")))
    found = to_json(certify(plan, [other], [], 0))
    whole = checked(Certificate, json.loads(json.dumps(found)))
    assert (whole.unit, whole.documents, whole.tokens) == ("text", 20, 80)
    assert whole.interval == "95% bootstrap over batches"
    same = certify(plan, [replace(plan, name="int4")], [], 0).verdict
    assert same.startswith("The same as int4 (0.3 kB)")
    few = Candidate("few", 300, 300, only(geometry(0), 5))
    assert "Not enough text to say: 5 batches" in certify(few, [few], [], 0).verdict
    answer = to_json(judge({MAIN: plan.scores}, {}, {"itself": geometry(3)}, Tolerance(), 0))
    meaning = checked(Evaluation, json.loads(json.dumps(answer)))
    assert meaning.unit == "text" and meaning.mcnemar is None
    assert [finding.measure for finding in meaning.findings] == ["kl", "flips"]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.5, 0.99, "Better than"), (1.01, 2.0, "Worse than"), (0.9, 1.1, "Like")],
)
@pytest.mark.parametrize("worse", [True, False])
def test_beside_the_straight_between_two_uniform_plans(
    low: float, high: float, said: str, worse: bool
) -> None:
    ratio = Interval((low + high) / 2, low, high)
    text = comparison._beside_line(Line("line", 0.01, ratio), "int5", worse)
    assert text.startswith(f"{said} mixing uniform plans: {ratio.value:.2f} times")
    assert ("int5, which is larger, is closer" in text) is worse
