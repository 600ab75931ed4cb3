"""Certificates and provenance in a plan's file: whole, or refused with the place."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from optimizer.errors import PlanError
from optimizer.plan import Plan, digest
from tests.plan.test_plan import CERTIFICATE, SURE, example

TEXT = {**CERTIFICATE["rows"][0], "name": "prose", "documents": 9, "tokens": 90}  # type: ignore[index]
MEANING: dict[str, Any] = {
    "state": "open",
    "tolerance": {"kl": 0.1, "flips": 0.1, "accuracy": 0.1},
    "findings": [],
    "texts": [TEXT],
    "noise": [],
    "documents": [],
    "half_of_loss": 1,
    "verdict": "open",
    "worst_domain": "prose",
    "weighted_kl": 0.2,
    "greedy": {
        "mean": SURE, "median": {"value": 3.0}, "limit": 9, "never": 0, "prompts": 2,
        "repeated": {"plan": SURE, "reference": SURE},
    },
}  # fmt: skip
CACHES = [{"kv": bits, "kl": 0.1, "bits": 4.5} for bits in (16, 8)]


def made(change: Callable[[dict[str, Any]], Any] = lambda _: None) -> Plan:
    """A plan with everything in it, changed and signed again."""
    data = example().to_json()
    data["certificate"] = deepcopy({**CERTIFICATE, "meaning": MEANING})
    data["provenance"] = {"seed": 3, "caches": CACHES}
    change(data)
    del data["checksum"]
    return Plan.from_json({**data, "checksum": digest(data)})


def meaning(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda data: change(data["certificate"]["meaning"])


def row(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda data: change(data["certificate"]["rows"][0])


def second(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """A further row, from the first one; None takes a measure out."""

    def add(data: dict[str, Any]) -> None:
        rows = data["certificate"]["rows"]
        found = {**rows[0], "name": "uniform", **changes}
        rows.append({key: value for key, value in found.items() if value is not None})

    return add


def test_a_whole_one_is_taken_as_it_is() -> None:
    plan = made()
    assert plan.certificate["meaning"] == MEANING
    assert plan.kv == 16 and plan.provenance["caches"] == CACHES


TAKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no certificate": lambda d: d.update(certificate={}),
    "no meaning": lambda d: d["certificate"].update(meaning={}),
    "no domain": meaning(lambda m: (m.pop("worst_domain"), m.pop("weighted_kl"))),
    "no greedy text": meaning(lambda m: m.pop("greedy")),
    "a row more": second(),
    "a row with a measure of its own": second(drift=SURE),
    "no caches": lambda d: d.update(provenance={}, kv=4),
    "another cache that was tried": lambda d: d.update(kv=8),
}

REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a certificate of a word": (
        lambda d: d.update(certificate={"verdict": "lossless"}), r"certificate\.documents: .*"
    ),
    "an empty list": (lambda d: d.update(certificate=[]), "certificate"),
    "meaning of a word": (lambda d: d["certificate"].update(meaning={"state": "open"}), "meaning"),
    "the plan isn't first": (row(lambda r: r.update(name="uniform")), "the first row isn't"),
    "a token's measure is missing": (row(lambda r: r.pop("ear")), "the row plan lacks ear"),
    "a row without bytes": (second(bytes=None), r"rows\.1\.bytes: Field required"),
    "a text without documents": (
        meaning(lambda m: m["texts"][0].pop("documents")), r"texts\.0\.documents"
    ),
    "noise without tokens": (
        meaning(lambda m: m["noise"].append({**TEXT, "tokens": None})), r"noise\.0\.tokens"
    ),
    "a second row without it": (second(flips=None), "the row uniform lacks flips"),
    "less than the first": (
        lambda d: (row(lambda r: r.update(drift=SURE))(d), second(drift=None)(d)),
        "the row uniform lacks what the first one has",
    ),
    "a text's measure is missing": (
        lambda d: d["certificate"].update(unit="text"), "the row plan lacks overlap"
    ),
    "meaning's text lacks one": (
        meaning(lambda m: m["texts"][0].pop("flips")), "the row prose lacks flips"
    ),
    "its noise, too": (
        meaning(lambda m: m["noise"].append({**TEXT, "name": "noise", "kl_p99": None})),
        "the row noise lacks kl_p99",
    ),
    "lossy, and nothing is over": (
        meaning(lambda m: m.update(state="lossy")), "the state is lossy, with 0 findings over"
    ),
    "a domain that isn't there": (
        meaning(lambda m: m.update(worst_domain="verse")), "worst_domain is none of the texts"
    ),
    "a domain without its loss": (
        meaning(lambda m: m.pop("weighted_kl")), "weighted_kl is missing"
    ),
    "greedy text of one model": (
        meaning(lambda m: m["greedy"]["repeated"].pop("reference")), "plan and reference"
    ),
    "a cache that wasn't tried": (lambda d: d.update(kv=4), "none of the caches"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_may_be_absent(case: str) -> None:
    made(TAKEN[case])


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_half_a_certificate(case: str) -> None:
    change, words = REFUSED[case]
    with pytest.raises(PlanError, match=words):
        made(change)
