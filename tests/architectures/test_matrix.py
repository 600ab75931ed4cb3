"""The support matrix holds: what the data says of an architecture is what happens."""

from __future__ import annotations

import pytest

from tests.architectures import matrix

FEW = ["gpt2", "granitemoe", "zamba2", "gemma3_text", "bert encoder", "deepseek_v32", "prophetnet"]
ROWS = {row["kind"]: row for row in matrix.load()["rows"]}


@pytest.mark.parametrize("kind", FEW)
def test_a_few_architectures(kind: str) -> None:
    row = matrix.measure(kind)
    assert (row.outcome, row.why) == ("exact", "")


@pytest.mark.campaign
@pytest.mark.parametrize("kind", [k for k in ROWS if k not in FEW])
def test_every_architecture(kind: str) -> None:
    assert matrix.measure(kind).outcome == ROWS[kind]["outcome"]


READ = ["llama", "mixtral", "falcon"]


@pytest.mark.parametrize("kind", READ)
def test_transformers_reads_the_export_of_a_few(kind: str) -> None:
    outcome, why = matrix.read_by_transformers(kind)
    assert outcome == "read", why
    assert float(why.partition("KL ")[2].split()[0]) < 1e-6


@pytest.mark.campaign
@pytest.mark.parametrize("kind", [k for k, row in ROWS.items() if row.get("transformers")])
def test_transformers_reads_what_the_data_says(kind: str) -> None:
    assert matrix.read_by_transformers(kind)[0] == ROWS[kind]["transformers"]


def test_transformers_reads_most_and_nothing_is_wrong() -> None:
    outcomes = [row.get("transformers", "") for row in ROWS.values()]
    assert outcomes.count("read") >= 60 and "WRONG" not in outcomes
    assert all(row["transformers_why"] for row in ROWS.values() if row.get("transformers"))


def test_nothing_is_silently_wrong_and_most_is_exact() -> None:
    outcomes = [row["outcome"] for row in ROWS.values() if not row["kind"].endswith(" encoder")]
    assert "WRONG" not in outcomes
    assert outcomes.count("exact") >= 110
    assert all(row["why"] for row in ROWS.values() if row["outcome"] != "exact")


def test_the_page_is_the_datas() -> None:
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.render(matrix.load())
