"""The support matrix holds: what the data says of an architecture is what happens."""

from __future__ import annotations

import pytest

from tests.architectures import matrix

FEW = ["gpt2", "granitemoe", "zamba2", "gemma3_text", "bert encoder"]
ROWS = {row["kind"]: row for row in matrix.load()["rows"]}


@pytest.mark.parametrize("kind", FEW)
def test_a_few_architectures(kind: str) -> None:
    row = matrix.measure(kind)
    assert (row.outcome, row.why) == ("exact", "")


@pytest.mark.campaign
@pytest.mark.parametrize("kind", [k for k in ROWS if k not in FEW])
def test_every_architecture(kind: str) -> None:
    assert matrix.measure(kind).outcome == ROWS[kind]["outcome"]


def test_nothing_is_silently_wrong_and_most_is_exact() -> None:
    outcomes = [row["outcome"] for row in ROWS.values() if not row["kind"].endswith(" encoder")]
    assert "WRONG" not in outcomes
    assert outcomes.count("exact") >= 110
    assert all(row["why"] for row in ROWS.values() if row["outcome"] != "exact")


def test_the_page_is_the_datas() -> None:
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.render(matrix.load())
