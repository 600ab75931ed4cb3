"""Which questions are asked, on which side, and when it stops; over votes as a simulated person gives
them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimizer.errors import TextError
from optimizer.person.judging import Judging, Kept, compare
from optimizer.person.reveal import reveal
from optimizer.person.votes import Same, VoteFile
from tests.person.comparisons import comparison, entrant, judging, material, prompts


def answer(made: Judging, better: str, rng: np.random.Generator, sure: float = 1.0) -> None:
    """Vote for the model `better` with probability `sure` until nothing more is asked."""
    while (question := made.current) is not None:
        right = question.about.models.index(better) if better in question.about.models else 0
        place = right if rng.random() < sure else 1 - right
        assert made.vote(question.id, ("first", "second")[place], []) is Kept.NEW


def test_kinds_of_text_take_turns_and_the_earliest_parting_comes_first() -> None:
    found = comparison(60, 40)
    kinds = [q.about.domain for q in found.questions]
    assert set(Counter(kinds).values()) == {10}
    assert all(len(set(kinds[i : i + 4])) == 4 for i in range(0, 40, 4))
    assert found.untold == {("sparrow", "heron"): 20}


def test_sides_are_by_chance_and_another_persons_are_others() -> None:
    first = {q.about.prompt: q.about.models[0] for q in comparison(200, 200).questions}
    assert 70 < Counter(first.values())["heron"] < 130
    other = {
        q.about.prompt: q.about.models[0] for q in comparison(200, 200, judge="anna").questions
    }
    assert 60 < sum(first[p] == other[p] for p in first) < 140
    assert comparison(60).questions == comparison(60).questions


def test_texts_and_features_stay_together() -> None:
    for question in comparison(30).questions:
        for text, name in zip(question.texts, question.about.models, strict=True):
            assert f"as {name} " in text


def test_pairs_that_read_the_same_are_noted_once_and_count_as_alike(tmp_path: Path) -> None:
    made = judging(tmp_path, count=60, same=20)
    assert len(made.comparison.alike) == 20
    again = Judging(made.comparison, VoteFile(made.file.path), "me")
    again.begin()
    assert sum(isinstance(line, Same) for line in again.file.lines) == 20
    answer(made, "heron", np.random.default_rng(0))
    duel = reveal(made).duels[0]
    assert duel.same == 20
    assert duel.shares["second"].value == pytest.approx(40 / 60)
    assert duel.shares["alike"].value == pytest.approx(20 / 60)


def test_models_that_say_the_same_are_told_apart_from_a_broken_run() -> None:
    given = prompts(8)
    both = [entrant("sparrow"), entrant("heron")]
    with pytest.raises(
        TextError, match=r"sparrow and heron are alike to within .* on your 8 prompts"
    ):
        compare(both, material(given, ["sparrow", "heron"], same=8), 40, 0.1, "me")


def test_it_stops_when_the_preference_is_clear(tmp_path: Path) -> None:
    made = judging(tmp_path)
    answer(made, "sparrow", np.random.default_rng(0))
    assert len(made.votes) == 8
    assert made.stopped == "The preference is clear at 95 %."
    duel = reveal(made).duels[0]
    assert duel.verdict.startswith("sparrow was preferred to heron (8 to 0 votes")
    assert "smaller" in duel.worth


def test_it_stops_when_nothing_can_become_clear_any_more(tmp_path: Path) -> None:
    made = judging(tmp_path, limit=20)
    while (question := made.current) is not None:
        made.vote(question.id, "alike", [])
    assert len(made.votes) == 13  # seven more could not do it
    assert "could not make a preference clear" in str(made.stopped)
    assert "saves" in reveal(made).duels[0].worth


def test_traps_are_no_votes_about_models(tmp_path: Path) -> None:
    made = judging(tmp_path, catch=0.25, limit=40)
    assert sum(q.about.catch for q in made.comparison.questions) == 10
    while (question := made.current) is not None:
        made.vote(question.id, "first" if question.about.catch else "alike", [])
    result = reveal(made)
    assert sum(result.duels[0].tally.__dict__[k] for k in ("won", "lost")) == 0
    assert "preferred one text in" in result.noise


def test_answers_are_kept_once_and_undone_in_order(tmp_path: Path) -> None:
    made = judging(tmp_path)
    one = made.current
    assert one is not None
    assert made.vote(one.id, "first", ["tone", "negation"]) is Kept.NEW
    assert made.vote(one.id, "first", []) is Kept.AGAIN
    assert made.vote(one.id, "second", []) is Kept.OTHER
    assert made.vote("nothing", "first", []) is Kept.UNKNOWN
    assert made.vote(made.current.id, "third", []) is Kept.UNKNOWN  # type: ignore[union-attr]
    assert made.votes[one.id].tags == ("negation", "tone")
    two = made.current
    assert two is not None
    made.vote(two.id, "skip", [])
    assert not made.undo(made.votes[one.id].id)
    assert made.undo(made.votes[two.id].id)
    assert made.current == two
    made.end()
    assert made.vote(two.id, "first", []) is Kept.OVER
    assert not made.undo(made.votes[one.id].id)


def test_a_new_start_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    made = judging(tmp_path)
    for _ in range(3):
        made.vote(made.current.id, "second", [])  # type: ignore[union-attr]
    again = judging(tmp_path)
    assert again.current == made.current
    assert len(again.votes) == 3
    other = judging(tmp_path, judge="anna")
    assert not other.votes


def test_several_models_are_compared_two_by_two(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    some = [entrant(name, 100 * (i + 1)) for i, name in enumerate(names)]
    found = compare(some, material(prompts(40), names), 60, 0.0, "me")
    assert set(Counter(tuple(sorted(q.about.models)) for q in found.questions).values()) == {20}
    made = Judging(found, VoteFile(tmp_path / "votes.jsonl"), "me")
    made.begin()
    assert made.alpha == pytest.approx(0.05 / 3)
    while (question := made.current) is not None:
        best = min(question.about.models)
        made.vote(question.id, ("first", "second")[question.about.models.index(best)], [])
    assert [one.name for one in reveal(made).standings] == names


def itself(seed: int) -> tuple[object, object]:
    twice = [entrant("reference"), replace(entrant("reference"), name="reference, number 2")]
    made = material(prompts(48), ["reference"], seed)
    sides = {one.name: made.reference for one in twice}
    return twice, replace(made, written=sides)


@pytest.mark.parametrize("people", [25, pytest.param(200, marks=pytest.mark.campaign)])
def test_the_reference_is_rarely_preferred_to_itself(tmp_path: Path, people: int) -> None:
    """People who prefer at random, some mostly the first text, 40 votes at most each."""
    wrong = 0
    for seed in range(people):
        rng = np.random.default_rng(seed)
        both, made = itself(seed)
        found = compare(both, made, 40, 0.1, f"judge {seed}")  # type: ignore[arg-type]
        assert not any(q.about.catch for q in found.questions)
        one = Judging(found, VoteFile(tmp_path / f"{seed}.jsonl"), f"judge {seed}")
        first, tie = rng.choice([0.5, 0.8]), rng.choice([0.0, 0.3])
        while (question := one.current) is not None:
            choice = (
                "alike" if rng.random() < tie else ("second", "first")[int(rng.random() < first)]
            )
            one.vote(question.id, choice, [])
        wrong += one.stopped == "The preference is clear at 95 %."
    assert wrong <= max(3, 0.05 * people)
