"""Certificates from the few fields that a test is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimizer.plan.certificate import (
    Certificate,
    Evaluation,
    Finding,
    Greedy,
    Interval,
    McNemar,
    Median,
    Moved,
    PlanRow,
    TextRow,
    Tolerated,
    Versus,
)

LIMITS = {"kl": 0.01, "flips": 0.01, "accuracy": 0.01}


def interval(found: Mapping[str, float]) -> Interval:
    value = found["value"]
    return Interval(value, found.get("low", value), found.get("high", value))


def finding(**given: Any) -> Finding:
    blank = {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
        "least": 0.0,
        "tolerated": 0.01,
        "needed": None,
    }
    return Finding(**{**blank, **given})


def row(found: Mapping[str, Any]) -> TextRow:
    measures = {key: interval(value) for key, value in found.items() if isinstance(value, Mapping)}
    name, documents = found.get("name", "itself"), found.get("documents", 9)
    return TextRow(name, **measures, documents=documents, tokens=90)


def greedy(found: Mapping[str, Any]) -> Greedy:
    repeated = {name: interval(share) for name, share in found["repeated"].items()}
    counts = (found["prompts"], found["limit"], found["never"])
    return Greedy(*counts, interval(found["mean"]), Median(**found["median"]), repeated)


def evaluation(found: Mapping[str, Any]) -> Evaluation:
    chance, said = found.get("mcnemar"), found.get("greedy")
    return Evaluation(
        state=found.get("state", "open"),
        tolerance=Tolerated(**{**LIMITS, **found.get("tolerance", {})}),
        findings=[
            f if isinstance(f, Finding) else finding(**f) for f in found.get("findings", [])
        ],
        texts=[row(one) for one in found.get("texts", [])],
        noise=[row(one) for one in found.get("noise", [])],
        documents=[Moved(**one) for one in found.get("documents", [])],
        half_of_loss=found.get("half_of_loss", 0),
        unit=found.get("unit", "token"),
        mcnemar=None if chance is None else McNemar(**chance),
        worst_domain=found.get("worst_domain"),
        weighted_kl=found.get("weighted_kl"),
        greedy=None if said is None else greedy(said),
    )


def certificate(verdict: str, meaning: Mapping[str, Any] | None = None) -> Certificate:
    return Certificate(
        9, 90, "95 %", [PlanRow("plan", bytes=1)], Versus(), verdict=verdict,
        meaning=None if meaning is None else evaluation(meaning),
    )  # fmt: skip
