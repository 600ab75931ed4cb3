"""The verdict against the tolerance: never "lossless" without evidence, never "lossy" by chance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from optimizer.certificate import equivalence
from optimizer.certificate.equivalence import (
    MOST,
    concentration,
    documents_needed,
    judge,
    mcnemar,
    power,
    worst_documents,
)
from optimizer.certificate.tolerance import Tolerance
from optimizer.certificate.wording import FEW, MAIN, in_short, in_words
from optimizer.errors import ConfigError
from optimizer.metrics.bootstrap import per_document
from optimizer.metrics.divergence import Scores
from optimizer.plan.certificate import Evaluation, McNemar, to_json
from optimizer.untrusted import checked


def made(kl: np.ndarray, flips: float = 0.01, lost: float = 0.0, seed: int = 0) -> Scores:
    """kl [documents, tokens], a window each; the other measures drawn."""
    rng = np.random.default_rng([seed, 1])
    shape = kl.shape
    reference = rng.random(shape) < 0.5
    hit = reference & (rng.random(shape) >= lost)
    return Scores(
        kl=kl.astype(np.float32),
        ear=np.full(shape, 0.99, np.float32),
        flip=(rng.random(shape) < flips).astype(np.float32),
        nll=np.ones(shape, np.float32),
        nll_reference=np.ones(shape, np.float32),
        hit=hit.astype(np.float32),
        hit_reference=reference.astype(np.float32),
        documents=np.arange(len(kl)),
    )


def even(mean: float, documents: int = 24, spread: float = 0.2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, 2])
    return mean * rng.lognormal(-(spread**2) / 2, spread, documents)[:, None] * np.ones((1, 60))


def answer(texts: dict[str, Scores], noise: dict[str, Scores] | None = None, **limits: float):
    return to_json(judge(texts, {}, noise or {}, Tolerance(**limits), 0))


# ---------------------------------------------------------------- the three answers


def test_lossless_needs_every_bound_inside() -> None:
    found = answer({MAIN: made(even(0.001))})
    assert found["state"] == "lossless"
    assert found["verdict"].startswith("Lossless within the tolerance on 24 held-out documents")
    assert all(f["high"] <= f["tolerated"] for f in found["findings"])
    flipping = answer({MAIN: made(even(0.001), flips=0.048)})
    assert flipping["state"] == "open", "a bound of the flips lies beyond"


def test_lossy_says_which_measure_and_where() -> None:
    texts = {MAIN: made(even(0.001)), "code": made(even(0.02, 12))}
    found = answer(texts)
    assert found["state"] == "lossy"
    assert found["verdict"].startswith("Lossy: on code KL 0.0")
    assert "on the held-out text" not in found["verdict"] and "flips" not in found["verdict"]
    assert found["worst_domain"] == "code"


def test_a_loss_below_the_tolerance_with_few_documents_is_not_lossless() -> None:
    """The point estimate is fine, the bound is not: more text is asked for, and how much."""
    found = answer({MAIN: made(np.linspace(0.001, 0.007, 10)[:, None] * 0.8 * np.ones((1, 60)))})
    assert found["state"] == "open"
    needed = next(f["needed"] for f in found["findings"] if f["measure"] == "kl")
    assert needed > 10 and f"About {needed} documents" in found["verdict"]


def test_too_few_documents_are_never_enough() -> None:
    for kl in (1e-6, 1.0):
        found = answer({MAIN: made(even(kl, FEW - 1))})
        assert found["state"] == "open"
        assert found["verdict"].startswith(f"Not enough text to say: {FEW - 1} documents")


def test_a_domain_with_too_little_text_is_named_and_does_not_hide() -> None:
    texts = {MAIN: made(even(0.001)), "russian": made(even(0.001, 4))}
    found = answer(texts)
    assert found["state"] == "lossless"
    assert "Not enough text to say in russian (4 documents; about" in found["verdict"]


def test_a_gain_of_accuracy_is_a_change_too() -> None:
    scores = made(even(0.001, 60), lost=0.2)
    turned = Scores(
        **{k: v for k, v in vars(scores).items() if k not in ("hit", "hit_reference")},
        hit=scores.hit_reference, hit_reference=scores.hit,
    )  # fmt: skip
    for one in (scores, turned):
        found = answer({MAIN: one})
        assert found["state"] == "lossy" and "change of accuracy" in found["verdict"]


def test_a_tolerance_below_the_noise_is_pointed_out() -> None:
    noise = {"reference in bf16": made(even(0.0002))}
    said = answer({MAIN: made(even(0.00001))}, noise, kl=0.0001)["verdict"]
    assert "no more than what the arithmetic alone changes" in said
    assert "arithmetic" not in answer({MAIN: made(even(0.00001))}, noise)["verdict"]


@settings(max_examples=50)
@given(
    st.floats(1e-5, 0.05), st.floats(0, 0.2), st.integers(2, 40), st.floats(0.05, 1.5),
    st.integers(0, 5),
)  # fmt: skip
def test_no_word_goes_beyond_the_bounds(
    kl: float, flips: float, documents: int, spread: float, seed: int
) -> None:
    found = answer({MAIN: made(even(kl, documents, spread, seed), flips, seed=seed)})
    said = found["verdict"]
    findings = found["findings"]
    if "Lossless" in said:
        assert documents >= FEW and all(f["high"] <= f["tolerated"] for f in findings)
    if "Lossy" in said:
        assert documents >= FEW
        assert any(max(f["least"], -f["low"]) > f["tolerated"] for f in findings)
    assert sum(word in said for word in ("Lossless within", "Lossy:", "Not enough text")) >= 1
    assert json.loads(json.dumps(found)) == found


# ---------------------------------------------------------------- error rates


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of answers without the other half of the work: how much text would be enough."""
    monkeypatch.setattr(equivalence, "documents_needed", lambda *_: None)


@pytest.mark.usefixtures("alone")
def test_at_the_border_neither_answer_comes_often() -> None:
    """The true loss is the tolerance: "lossy" and "within" are both wrong, each in about 5 %. With
    percentiles of the bootstrap "within" would come in more than 10 %."""
    states = []
    for seed in range(200):
        scores = made(even(0.004, 24, 0.6, seed + 1000), seed=seed)
        found = equivalence.judge_text(MAIN, scores, Tolerance(), 3, seed)
        states.append(next(f.state for f in found if f.measure == "kl"))
    assert states.count("over") / 200 <= 0.05
    assert states.count("within") / 200 <= 0.075


@pytest.mark.usefixtures("alone")
def test_power_is_what_a_simulation_gives() -> None:
    """Chance to call a loss of .006 lossy (tolerated .004), 30 documents that differ much."""
    decided = 0
    for seed in range(200):
        scores = made(even(0.006, 30, 0.9, seed + 500), seed=seed)
        kl = equivalence.judge_text(MAIN, scores, Tolerance(), 1, seed)[0]
        decided += kl.state == "over"
    promised = power(even(0.006, 2000, 0.9)[:, 0], np.ones(2000), 0.004, 30)
    assert 0.3 < promised < 0.97
    assert decided / 200 == pytest.approx(promised, abs=0.1)


@pytest.mark.usefixtures("alone")
def test_the_promise_of_lossless_knows_the_long_tail() -> None:
    """The normal approximation promises more than is given."""
    pool, size = even(0.003, 96, 0.6)[:, 0], np.ones(96)
    decided = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scores = made(rng.choice(pool, (24, 1)) * np.ones((1, 60)), seed=seed)
        kl = equivalence.judge_text(MAIN, scores, Tolerance(), 1, seed)[0]
        decided += kl.state == "within"
    normal = float(
        norm.cdf(
            (0.004 - pool.mean()) * np.sqrt(24) / pool.std() - norm.ppf(1 - equivalence.INSIDE)
        )
    )
    promised = power(pool, size, 0.004, 24, equivalence.INSIDE)
    assert decided / 100 == pytest.approx(promised, abs=0.1)
    assert promised < 0.9 * normal


def test_needed_documents_give_the_promised_power() -> None:
    for value in (0.002, 0.006):
        pool, size = even(value, 200, 2.0)[:, 0], np.ones(200)
        count = documents_needed(pool, size, 0.004, 0.05)
        assert count is not None and count > FEW
        assert 0.8 <= power(pool, size, 0.004, count) < 0.92
        assert power(pool, size, 0.004, count // 2) < 0.7
    pool = even(0.004, 200, 0.8)[:, 0]
    for tolerated in (pool.mean(), 1.00001 * pool.mean()):
        assert documents_needed(pool, np.ones(200), tolerated, 0.05) is None
    assert documents_needed(even(1.0, 50, 0.5)[:, 0], np.ones(50), 0.004, 0.05) == FEW < MOST
    flat = np.full(10, 0.002)
    assert power(flat, np.ones(10), 0.004, 8) == 1 and power(-flat, np.ones(10), 0.004, 8) == 1


@pytest.mark.parametrize(("kl", "state"), [(0.0001, "within"), (1.0, "over")])
def test_what_is_decided_needs_no_more_documents(kl: float, state: str) -> None:
    found = to_json(judge({MAIN: made(np.full((90, 5), kl))}, {}, {}, Tolerance(), 0))
    (finding,) = (f for f in found["findings"] if f["measure"] == "kl")
    assert (finding["state"], finding["needed"]) == (state, None)


def test_more_documents_are_needed_than_did_not_do() -> None:
    """The estimate of power may say that as many would be enough: these had bad luck."""
    scores = made(even(0.001, 12, 1.3, 5), seed=5)
    sums, sizes, _ = per_document(scores.kl, scores.documents)
    assert documents_needed(sums, sizes, 0.004, equivalence.INSIDE) == 11
    found = equivalence.judge_text(MAIN, scores, Tolerance(), 1, 5)[0]
    assert (found.measure, found.state, found.needed) == ("kl", "open", 13)


# ---------------------------------------------------------------- McNemar over documents


def discordant(lost: list[int], won: list[int]) -> Scores:
    """A document per entry with so many tokens that only the one side, or the other, ranks first."""
    width = max(map(sum, zip(lost, won, strict=True))) + 1
    scores = made(np.zeros((len(lost), width)))
    hit, reference = np.zeros_like(scores.kl), np.zeros_like(scores.kl)
    for i, (a, b) in enumerate(zip(lost, won, strict=True)):
        reference[i, :a] = 1
        hit[i, a : a + b] = 1
    rest = {k: v for k, v in vars(scores).items() if k not in ("hit", "hit_reference")}
    return Scores(**rest, hit=hit, hit_reference=reference)


def test_with_one_token_a_document_it_is_mcnemars_exact_test() -> None:
    found = mcnemar(discordant([1] * 12 + [0] * 8, [0] * 15 + [1] * 5), 0)
    assert (found.lost, found.won) == (12, 5)
    assert found.p == pytest.approx(binomtest(12, 17).pvalue, abs=0.02)


def test_tokens_of_one_document_are_one_witness() -> None:
    """All thirty lost tokens in one document prove nothing; in thirty documents they do."""
    assert mcnemar(discordant([30] + [0] * 29, [0] * 30), 0).p > 0.5
    assert mcnemar(discordant([1] * 30, [0] * 30), 0).p < 0.001


def test_nothing_discordant_is_no_difference() -> None:
    assert mcnemar(discordant([0] * 9, [0] * 9), 0) == McNemar(0, 0, 1.0)


# ---------------------------------------------------------------- where the loss is


def test_where_the_loss_is() -> None:
    kl = np.full((20, 5), 0.001)
    kl[7] = 0.05
    scores = made(kl)
    assert concentration(scores) == 1
    assert concentration(made(np.zeros((20, 5)))) == 0
    found = worst_documents({MAIN: scores, "code": made(np.full((3, 5), 0.01))})
    assert [(one.text, one.document) for one in found[:2]] == [(MAIN, 7), ("code", 0)]
    assert found[0].kl == pytest.approx(0.05)


def test_weights_of_domains() -> None:
    texts = {
        MAIN: made(even(0.001)),
        "a": made(np.full((9, 5), 0.01)),
        "b": made(np.full((9, 5), 0.002)),
    }
    answer = judge(texts, {"a": 3.0}, {}, Tolerance(), 0)
    found = to_json(answer)
    assert found["weighted_kl"] == pytest.approx((3 * 0.01 + 0.002) / 4)
    assert any("Worst domain: a, KL 0.0100" in line for line in in_words(answer))


def test_words_of_one_cell() -> None:
    assert in_short(["within", "open"]) == "can't say"
    assert in_short(["within", "over"]) == "no" and in_short(["within"]) == "yes"
    assert in_short([]) == ""


@pytest.mark.parametrize("limits", [{"kl": 0.0}, {"flips": 1.0}, {"accuracy": -0.1}])
def test_a_tolerance_of_nothing_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Tolerance(**limits).check()


@pytest.mark.parametrize("domains", [(), ("code", "law")])
def test_an_answer_is_what_a_plan_may_hold(domains: tuple[str, ...]) -> None:
    texts = {name: made(even(0.003, seed=i)) for i, name in enumerate((MAIN, *domains))}
    found = to_json(judge(texts, {"law": 2.0}, {"itself": made(even(1e-6))}, Tolerance(), 0))
    whole = checked(Evaluation, json.loads(json.dumps(found)))
    assert to_json(whole) == found
    assert [row.name for row in whole.texts] == [MAIN, *domains]
    assert [(row.documents, row.tokens) for row in whole.noise] == [(24, 24 * 60)]
    assert (whole.mcnemar is not None) and (whole.worst_domain is not None) == bool(domains)


def test_parts_of_the_first_text_are_no_documents_of_their_own() -> None:
    texts = {MAIN: made(even(0.003)), "code": made(even(0.9))}
    moved = judge(texts, {}, {}, Tolerance(), 0).documents
    assert {one.text for one in moved} == {"code"} and len(moved) == equivalence.WORST
    moved = judge(texts, {}, {}, Tolerance(), 0, parts=["code"]).documents
    assert {one.text for one in moved} == {MAIN}
