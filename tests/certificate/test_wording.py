"""Whole sentences of a certificate, as a person would write them from its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from optimizer.certificate import wording
from optimizer.certificate.wording import MAIN
from optimizer.plan.certificate import Evaluation, Finding
from tests.certificate import typed


def finding(text: str, measure: str, state: str, value: float, **more: Any) -> Finding:
    bounds = {"low": value / 2, "high": 2 * value, "least": 0.75 * value, "needed": None}
    about = {"text": text, "measure": measure, "state": state, "value": value}
    return typed.finding(**(about | bounds | more))


def found(state: str, *findings: Finding, **more: Any) -> Evaluation:
    names = dict.fromkeys([MAIN, *(f.text for f in findings)])
    texts = [{"name": n, "documents": 20 + i} for i, n in enumerate(names)]
    return typed.evaluation({"texts": texts, "state": state, "findings": findings} | more)


def test_lossless_names_what_may_be_lost_at_most() -> None:
    said = wording.sentence(
        found(
            "lossless",
            finding(MAIN, "kl", "within", 0.002),
            finding(MAIN, "accuracy", "within", -0.004, low=-0.009, high=0.001),
            finding("code", "kl", "within", 0.001),
            finding("law", "kl", "open", 0.008, needed=50),
            finding("law", "flips", "open", 0.008, needed=70),
            finding("prose", "kl", "open", 0.01),
        )
    )
    assert said == (
        "Lossless within the tolerance on 20 held-out documents: KL at most 0.0040 (tolerated "
        "0.0100), change of accuracy at most 0.9 % (tolerated 1.0 %), each with 95 % confidence. "
        "Lossless in code. Not enough text to say in law (22 documents; about 70 would do), prose "
        "(23 documents; too near the tolerance for any amount of text)."
    )


def test_lossy_names_measures_by_text_and_the_bound_that_shows_it() -> None:
    said = wording.sentence(
        found(
            "lossy",
            finding(MAIN, "kl", "over", 0.02),
            finding(MAIN, "flips", "over", 0.12),
            finding(MAIN, "accuracy", "within", 0.001),
            finding("code", "accuracy", "over", -0.04, high=-0.02),
            finding("law", "kl", "within", 0.001),
        )
    )
    assert said == (
        "Lossy: on the held-out text KL 0.0200 (at least 0.0150; tolerated 0.0100), flips 12.0 % (at "
        "least 9.0 %; tolerated 1.0 %); on code change of accuracy -4.0 % (at most -2.0 %; tolerated "
        "1.0 %). Lossless in law."
    )


def test_open_says_how_much_text_would_probably_be_enough() -> None:
    kl = finding(MAIN, "kl", "open", 0.008, needed=44)
    flips = finding(MAIN, "flips", "open", 0.009, low=0.004, needed=90)
    within = finding(MAIN, "accuracy", "within", 0.001)
    said = wording.sentence(found("open", kl, flips, within))
    assert said == (
        "Not enough text to say whether it is lossless, on 20 documents: KL 0.0080, between 0.0040 "
        "and 0.0160, tolerated 0.0100; flips 0.9 %, between 0.4 % and 1.8 %, tolerated 1.0 %. About "
        "90 documents like these would be enough."
    )
    near = wording.sentence(found("open", kl, replace(flips, needed=None)))
    assert near.endswith(
        "The loss is so near its tolerance that no amount of text is likely to decide."
    )
    few = found("open", kl, texts=[{"name": MAIN, "documents": 7}])
    assert wording.sentence(few) == (
        "Not enough text to say: 7 documents; 8 are the least. About 44 documents like these would be "
        "enough."
    )
    enough = found("open", kl, texts=[{"name": MAIN, "documents": 8}])
    assert "8 are the least" not in wording.sentence(enough)


def test_encoders_have_batches_and_texts() -> None:
    said = wording.sentence(
        found("open", finding(MAIN, "kl", "open", 0.008, needed=9), unit="text")
    )
    assert "on 20 batches" in said and "9 batches like these" in said and "document" not in said
    assert wording.in_unit("a document of tokens", "text") == "a batch of texts"
    assert wording.in_unit("a document of tokens", "token") == "a document of tokens"


@pytest.mark.parametrize(("noise", "said"), [(0.0099, False), (0.01, True), (0.02, True)])
def test_a_tolerance_within_the_arithmetics_own_noise_is_pointed_out(
    noise: float, said: bool
) -> None:
    rows = [{"kl": {"value": noise}}, {"kl": {"value": 0.001}}]
    whole = wording.sentence(found("lossless", finding(MAIN, "kl", "within", 0.002), noise=rows))
    assert (f"the reference differs from itself by {noise:.4f}." in whole) == said
    assert ("The tolerated KL of 0.0100" in whole) == said


def test_brief_is_one_sentence_of_both_answers() -> None:
    beside = "Better than int4 (1.0 MB): 0.80 times its KL."
    assert wording.brief(typed.certificate(beside)) == beside

    def brief(meaning: Evaluation) -> str:
        return wording.brief(replace(typed.certificate(beside), meaning=meaning))

    tail = "; better than int4 (1.0 MB): 0.80 times its KL."
    assert brief(found("lossless")) == "Lossless within the tolerance (KL 0.01)" + tail
    assert brief(found("open")) == "Not enough text to say whether it is lossless" + tail
    most = finding("code", "flips", "over", 0.05)
    lossy = [finding(MAIN, "kl", "over", 0.02), most, finding("law", "kl", "within", 0.9)]
    assert brief(found("lossy", *lossy)) == "Lossy: on code flips 5.0 %, tolerated 1.0 %" + tail
    third = finding("law", "kl", "over", 0.02)
    assert brief(found("lossy", *lossy[:2], third)) == (
        "Lossy: on code flips 5.0 %, tolerated 1.0 %, and on 2 more kinds of text" + tail
    )
    assert brief(found("lossy", lossy[0])).startswith("Lossy: on the held-out text KL 0.0200, ")


def test_marks_of_one_text() -> None:
    some = [finding(MAIN, "kl", "within", 0), finding("code", "kl", "over", 1)]
    some += [finding(MAIN, "flips", "over", 1), finding(MAIN, "accuracy", "open", 0)]
    assert wording.marks(some, MAIN) == "\u2713 KL \u2717 flips ? change of accuracy"
    assert wording.marks(some, "law") == ""


def test_what_supports_a_verdict_is_a_sentence_each() -> None:
    kl = {"kl": {"value": 0.25}}
    documents = [
        {"text": MAIN, "document": 3, "kl": 0.5, "begins": "Once"},
        {"text": "code", "document": 7, "kl": 0.25},
        {"text": "code", "document": 8, "kl": 0.125},
        {"text": "code", "document": 9, "kl": 0.1},
    ]
    texts = [{"name": MAIN, "documents": 20} | kl, {"name": "code", "documents": 5} | kl]
    whole = {
        "texts": texts, "worst_domain": "code", "weighted_kl": 0.125, "half_of_loss": 4,
        "mcnemar": {"lost": 12, "won": 7, "p": 0.03125}, "documents": documents,
    }  # fmt: skip
    assert wording.in_words(typed.evaluation(whole)) == [
        "Worst domain: code, KL 0.2500; the weighted mean of the domains is 0.1250.",
        "Of the tokens that only one of the two ranks first, the reference is right at 12 and the "
        "plan at 7 (McNemar over documents: p = 0.031).",
        "Half of the held-out loss is in 4 of 20 documents. The most moved documents: held-out 3 "
        '(0.500, "Once"), code 7 (0.250), code 8 (0.125).',
    ]
    assert wording.in_words(typed.evaluation({"half_of_loss": 0})) == []


def test_greedy_texts_in_a_sentence() -> None:
    cell = {"value": 0.25, "low": 0.2, "high": 0.3}
    greedy = {
        "limit": 64, "prompts": 16, "never": 9, "mean": {"value": 50.0, "low": 40.0, "high": 60.0},
        "median": {"value": 12.0}, "repeated": {"plan": cell, "reference": cell | {"value": 0.125}},
    }  # fmt: skip
    assert wording.in_words(typed.evaluation({"greedy": greedy})) == [
        "Greedy texts of 64 tokens stay the same for 50.0 tokens on average (95 %: 40.0 to 60.0), "
        "half of them for 12 or fewer; 9 of 16 never part. Repeated "
        "4-grams: 25.0 %, the reference 12.5 %."
    ]
    assert "most to the end" in wording.greedy_words(
        typed.greedy(greedy | {"median": {"value": None}})
    )
