"""Weights are found where votes follow them, stay the default where they don't, and become an
objective that `optimize` reads.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from optimizer.cli import compose
from optimizer.errors import TextError
from optimizer.metrics.objective import Meaning, shares
from optimizer.person import learning, meaning_file, statistics
from optimizer.person.learning import Column, Settings
from optimizer.person.votes import About, Features, Vote
from tests.conftest import Command

DOMAINS = {"prose": "en", "code": "en", "dialogue": "en", "mathematics": "en", "russian": "ru"}
PHENOMENA = ("negation", "numbers", "idiom")


def simulated(
    minds: dict[str, float], count: int, seed: int, judge: str = "me", prompts: int = 10**6
) -> list[Vote]:
    """Votes of a person whose costs are these weights on standardised parts, sometimes unsure."""
    rng = np.random.default_rng(seed)
    kinds = [*DOMAINS, *PHENOMENA]
    return [_vote(kinds[i % len(kinds)], minds, rng, f"{judge} {i}", judge, i % prompts)
            for i in range(count)]  # fmt: skip


def _vote(
    kind: str,
    minds: dict[str, float],
    rng: np.random.Generator,
    name: str,
    judge: str,
    prompt: int,
) -> Vote:
    probe = kind in PHENOMENA
    domain = "prose" if probe else kind
    sides: list[Features] = []
    for _ in range(2):
        kl = float(rng.exponential(0.4))
        side = {"kl": kl, "tail": kl * float(rng.uniform(2, 5)), "length": 0.0,
                "repetition": float(rng.uniform(0, 0.3))}  # fmt: skip
        sides.append(side | ({"margin": float(rng.exponential(1.0))} if probe else {}))
    cost = [minds.get(kind, 0) * s["margin"] / 1.3 if probe else minds.get(kind, 0) * s["kl"] / 0.5
            for s in sides]  # fmt: skip
    log = statistics.log_p(np.array([cost[1] - cost[0]]), 0.0)[0]
    choice = ("second", "alike", "first")[rng.choice(3, p=np.exp(log))]
    about = About(str(prompt), domain, DOMAINS[domain], kind if probe else None, ("a", "b"), (1, 2),
                  (sides[0], sides[1]))  # fmt: skip
    return Vote(judge=judge, session="s", question=name, about=about, choice=choice)  # type: ignore[arg-type]


def cosine(found: learning.Learned, minds: dict[str, float]) -> float:
    weights = {
        w.column.name: w.value for w in found.weights if w.column.family in ("kl", "margin")
    }
    weights |= {"tail": next(w.value for w in found.weights if w.column.family == "tail")}
    true = np.array([minds.get(name, 0.0) for name in weights])
    value = np.array(list(weights.values()))
    return float(true @ value / np.linalg.norm(true) / np.linalg.norm(value))


def test_who_minds_one_domain_is_understood() -> None:
    minds = {"russian": 6.0}
    found = learning.learn(simulated(minds, 120, 1), Settings())
    assert not found.noise
    assert cosine(found, minds) > 0.8
    heaviest = max(found.meaning.domains, key=lambda entry: float(entry.split("*")[1]))
    assert heaviest.startswith("russian")
    assert found.meaning.combine == "sum"
    assert found.meaning.domain > found.meaning.probes
    weights = [float(entry.split("*")[1]) for entry in found.meaning.domains]
    assert min(weights) > 0.005  # a trace isn't worth a text that has to be measured


def test_who_minds_two_phenomena_is_understood() -> None:
    minds = {"negation": 6.0, "numbers": 6.0}
    found = learning.learn(simulated(minds, 160, 2), Settings())
    assert not found.noise
    counted = shares(found.meaning.phenomena)
    assert counted["negation"] + counted["numbers"] > 0.7


def test_votes_by_chance_are_noise_and_change_nothing() -> None:
    found = learning.learn(simulated({}, 60, 3), Settings())
    assert found.noise
    assert replace(found.meaning, combine="worst", level=0.99) == Meaning()
    assert any("can't be told from noise" in line for line in meaning_file.summary(found))


@pytest.mark.slow
def test_who_minds_all_alike_keeps_the_default() -> None:
    """What is common to all domains is the mean KL itself, so nothing is added for it."""
    minds = dict.fromkeys(DOMAINS, 5.0)
    found = learning.learn(simulated(minds, 200, 4), Settings())
    assert not found.noise
    one = learning.learn(simulated({"russian": 5.0}, 200, 4), Settings())
    assert found.meaning.domain < 0.7 * one.meaning.domain


@pytest.mark.slow
def test_more_votes_settle_more() -> None:
    minds = {"russian": 6.0}
    few, many = (learning.learn(simulated(minds, n, 5), Settings()) for n in (24, 300))

    def russian(found: learning.Learned) -> learning.Weight:
        return next(w for w in found.weights if w.column == Column("kl", "russian"))

    assert russian(many).high - russian(many).low < russian(few).high - russian(few).low
    assert russian(many).more == 0
    assert sum(w.more is None or w.more > 0 for w in few.weights) > 0


@pytest.mark.slow
def test_strength_and_scales_are_in_the_objectives_units() -> None:
    """Parts weigh `strength` together at their typical differences, whatever their units."""
    votes = simulated({"russian": 6.0, "negation": 6.0}, 160, 6)
    one, two = (learning.learn(votes, Settings(strength=s)) for s in (1.0, 2.0))
    assert two.meaning.domain == pytest.approx(2 * one.meaning.domain, rel=1e-3)
    typical = one.meaning.domain + one.meaning.probes * one.scales["margin"] / one.scales["kl"]
    typical += one.meaning.cvar * one.scales["tail"] / one.scales["kl"]
    assert 0.5 < typical <= 1.001
    larger = [
        replace(v, about=replace(v.about, features=tuple(_times(f, 10) for f in v.about.features)))  # type: ignore[arg-type]
        for v in votes
    ]
    scaled = learning.learn(larger, Settings())
    assert scaled.meaning.probes == pytest.approx(one.meaning.probes / 10, rel=0.05)
    assert scaled.meaning.domain == pytest.approx(one.meaning.domain, rel=0.05)


def _times(features: Features, factor: float) -> Features:
    return features | {"margin": factor * features["margin"]} if "margin" in features else features


@pytest.mark.slow
def test_sides_do_not_matter() -> None:
    votes = simulated({"russian": 6.0}, 60, 7)
    turned = []
    for i, vote in enumerate(votes):
        other = {"first": "second", "second": "first"}.get(vote.choice, vote.choice)
        about = replace(vote.about, models=vote.about.models[::-1],
                        features=vote.about.features[::-1])  # fmt: skip
        turned.append(replace(vote, about=about, choice=other) if i % 2 else vote)  # type: ignore[arg-type]
    one, same = (learning.learn(v, Settings()) for v in (votes, turned))
    for a, b in zip(one.weights, same.weights, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-3)


def test_catch_trials_and_skips_teach_nothing() -> None:
    votes = simulated({"russian": 6.0}, 40, 8)
    extra = [
        replace(votes[0], about=replace(votes[0].about, catch=True)),
        replace(votes[1], choice="skip"),
    ]
    assert len(learning.usable([*votes, *extra])) == 40


def test_people_who_agree_are_told_apart_from_those_who_do_not() -> None:
    anna = simulated({"russian": 9.0}, 60, 9, "anna")
    ben = [replace(v, judge="ben", id=f"ben {i}") for i, v in enumerate(anna)]
    assert learning.agreement([*anna, *ben]) == pytest.approx(1)
    flip = {"first": "second", "second": "first", "alike": "alike"}
    against = [replace(v, choice=flip[v.choice]) for v in ben]  # type: ignore[arg-type]
    assert learning.agreement([*anna, *against]) < 0  # type: ignore[operator]
    assert learning.agreement(anna) is None


def test_too_few_votes_are_refused() -> None:
    with pytest.raises(TextError, match="there are 3"):
        learning.learn(simulated({}, 3, 0), Settings())


def test_a_domain_without_a_text_is_named() -> None:
    parts = {Column("kl", "law"): 0.5, Column("kl", "code"): 0.25}
    meaning, left_out = learning.as_meaning(parts, Settings())
    assert left_out == ["law"]
    assert meaning.domains == ["code * 1.0"]
    meaning, left_out = learning.as_meaning(parts, Settings(texts=["law = law.txt"]))
    assert not left_out
    assert meaning.domains[0].startswith("law = law.txt * 0.66")


# ---------------------------------------------------------------- the file


def learned(tmp_path: Path) -> learning.Learned:
    choices = tmp_path / "choices.jsonl"
    choices.write_text('{"prefix": "A", "good": " b", "bad": " c", "phenomenon": "choice"}\n')
    law = tmp_path / "law.txt"
    law.write_text("law")
    found = learning.learn(
        simulated({"russian": 6.0, "negation": 6.0}, 80, 10), Settings((str(choices), 20))
    )
    return replace(
        found,
        meaning=replace(found.meaning, domains=[*found.meaning.domains, f"law = {law} * 0.5"]),
    )


def test_what_is_written_is_read_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = learned(tmp_path)
    (tmp_path / "meaning.yaml").write_text(meaning_file.text(found, "votes.jsonl", tmp_path))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    again = Meaning.load("../meaning.yaml")
    again.check("fisher", by_token=True)
    assert Path(str(again.choices)).resolve() == tmp_path / "choices.jsonl"
    assert shares(again.phenomena) == shares(found.meaning.phenomena)
    assert again.domain == found.meaning.domain
    assert again.domains[-1].endswith("law.txt * 0.5")
    assert Path(again.domains[-1].split("=")[1].split("*")[0].strip()).exists()
    words = compose.objective(["model=stories", "meaning=../meaning.yaml", "seed=1"])
    assert words[0] == "model=stories"
    assert f"meaning.domain={again.domain}" in words


def test_names_from_files_end_no_comment(tmp_path: Path) -> None:
    votes = simulated({"russian": 6.0}, 40, 11, judge="eve\ncvar: 5")
    text = meaning_file.text(learning.learn(votes, Settings()), "a\nb", tmp_path)
    assert yaml.safe_load(text)["cvar"] != 5


def test_learn_is_a_command(mezzotint: Command, tmp_path: Path) -> None:
    from optimizer.person.votes import VoteFile

    anna, ben = (VoteFile(tmp_path / f"{name}.jsonl") for name in ("anna", "ben"))
    votes = simulated({"russian": 8.0}, 60, 12, "anna")
    anna.append(*votes)
    ben.append(*(replace(v, judge="ben", id=f"ben {i}") for i, v in enumerate(votes[:30])))
    with ben.path.open("a") as file:
        file.write("half a li")
    ended = mezzotint("learn", "anna.jsonl", "ben.jsonl", "out=meaning.yaml")
    assert ended.code == 0, ended.err
    assert "ben.jsonl, line 31" in ended.out
    assert "alpha 1.00" in ended.out
    assert "KL in russian" in ended.out
    assert asdict(Meaning.load("meaning.yaml"))["combine"] == "sum"
    again = mezzotint("learn", "anna.jsonl", "out=meaning.yaml")
    assert again.code == 2
    assert "overwrite=true" in again.err
    for files, message in (
        (["none.jsonl"], "no file of votes"),
        (["meaning.yaml"], "there are 0"),
        ([], "needs files"),
    ):
        wrong = mezzotint("learn", *files, "out=other.yaml")
        assert wrong.code == 2
        assert message in wrong.err
        assert not (tmp_path / "other.yaml").exists()
