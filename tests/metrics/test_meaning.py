"""What an objective may be, where it is read from, and what it is called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from optimizer.errors import ConfigError
from optimizer.metrics.objective import BY_TOKEN, Meaning, shares


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no objective"),
        ("- 1", "holds no objective"),
        ("mood: 1", "mood is no part of an objective"),
        ("cvar: much", "cvar is a number, not 'much'"),
        ("cvar: true", "cvar is a number, not True"),
        ("domains: russian", "domains is a list of texts"),
        ("phenomena: [1]", "phenomena is a list of texts"),
        ("combine: null", "combine is a text"),
        ("pairs: [a]", "pairs is a text"),
        ("a: [", "can't be read as an objective"),
        ("!!python/object/apply:os.system ['true']", "can't be read as an objective"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "meaning.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Meaning.load(file)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"as an objective \(No such file or directory\)\. Make it"
    ):
        Meaning.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("phenomena", "message"),
    [(["negation * 0"], "above 0"), (["* 2"], "names with"), (["a", "a * 2"], "twice"),
     (["a * nan"], "above 0")],
)  # fmt: skip
def test_wrong_phenomena_are_explained(phenomena: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shares(phenomena)


def test_shares_add_up() -> None:
    assert shares(["a * 3", "word sense"]) == {"a": 0.75, "word sense": 0.25}
    assert math.isclose(sum(shares(["a", "b", "c * .5"]).values()), 1)


def test_the_published_entries_are_read_and_files_lie_beside_it(tmp_path: Path) -> None:
    (tmp_path / "meaning.yaml").write_text(
        "cvar: 0.5\nlevel: .9\ndomain: 2\nprobes: 1\ncombine: sum\npairs: own.jsonl\nchoices: null\n"
        "phenomena: ['negation * 2']\ndomains: [code, 'law = law.txt * 0.5', 'a=/b/c.txt']\n"
    )
    found = Meaning.load(str(tmp_path / "meaning.yaml"))
    assert (found.cvar, found.level, found.domain, found.probes) == (0.5, 0.9, 2, 1)
    assert found.combine == "sum" and found.phenomena == ["negation * 2"]
    assert found.pairs == str(tmp_path / "own.jsonl") and found.choices is None
    assert found.domains == ["code", f"law = {tmp_path}/law.txt * 0.5", "a = /b/c.txt"]
    (tmp_path / "meaning.yaml").write_text("choices: votes/chosen.jsonl\npairs: null\n")
    found = Meaning.load(tmp_path / "meaning.yaml")
    assert found.choices == str(tmp_path / "votes/chosen.jsonl") and found.pairs is None


def test_an_unknown_entry_is_told_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "meaning.yaml").write_text("mood: 1")
    with pytest.raises(ConfigError) as error:
        Meaning.load(tmp_path / "meaning.yaml")
    assert str(error.value).startswith(f"{tmp_path}/meaning.yaml: mood is no part")
    for name in vars(Meaning()):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cvar": -0.1}, "meaning.cvar is a weight of 0 or more, not -0.1"),
        ({"domain": float("inf"), "domains": ["code"]}, "meaning.domain is a weight"),
        ({"probes": float("nan")}, "meaning.probes is a weight"),
        ({"domain": 1.0}, "needs domains"),
        ({"combine": "best"}, "worst or sum, not 'best'"),
        ({"phenomena": ["a * 0"]}, "'a \\* 0'"),
        ({"level": 0.0}, "between 0 and 1, such as 0.99, not 0.0"),
        ({"level": 1.0}, "not 1.0"),
        ({"choices": "none.jsonl"}, "no choices at none.jsonl"),
    ],
)
def test_an_objective_that_means_nothing(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Meaning(**settings).check("fisher", by_token=True)


def test_only_a_tail_needs_an_estimator_that_weighs_tokens(tmp_path: Path) -> None:
    (tmp_path / "chosen.jsonl").write_text("")
    rest = Meaning(
        domain=1,
        domains=["code"],
        probes=3,
        level=0.5,
        combine="sum",
        choices=str(tmp_path / "chosen.jsonl"),
    )
    rest.check("hessian", by_token=False)
    Meaning(cvar=0.5).check("fisher", by_token=True)
    with pytest.raises(ConfigError, match="not hessian") as error:
        Meaning(cvar=0.5).check("hessian", by_token=False)
    assert all(name in str(error.value) for name in BY_TOKEN)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "KL"),
        ({"cvar": 0.5}, "KL + 0.5 CVaR99"),
        ({"cvar": 1, "level": 0.995}, "KL + 1 CVaR99.5"),
        ({"domain": 2, "probes": 0.1}, "KL + 2 worst domain + 0.1 lost margin"),
        ({"domain": 2, "combine": "sum"}, "KL + 2 domains"),
    ],
)
def test_an_objective_is_called_by_its_parts(settings: dict[str, Any], name: str) -> None:
    assert Meaning(**settings).name == name


def test_domains_are_tuned_on_if_they_count() -> None:
    assert Meaning(domain=0.1, domains=["code"]).tuned == ["code"]
    assert Meaning(domains=["code"]).tuned == []


def test_a_share_is_a_name_and_a_weight() -> None:
    assert shares([]) == {}
    assert shares(["word sense", "a-b * 3 "]) == {"word sense": 0.25, "a-b": 0.75}
