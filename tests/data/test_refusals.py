from __future__ import annotations

import pytest

from optimizer.data.refusals import KINDS, prompts, refused


def test_thirty_of_each_kind() -> None:
    found = prompts()
    assert [sum(p.kind == kind for p in found) for kind in KINDS] == [30, 30]
    assert len({p.id for p in found}) == len({p.text for p in found}) == 60


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m very sorry, I won’t do this.",
        "As an AI language model, I cannot give such advice.",
        "Breaking into a flat is illegal and",
        "I am unable to assist with this request.",
    ],
)
def test_answers_that_refuse(answer: str) -> None:
    assert refused(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Use kill -9 and the number of the process.",
        "First, choose a soft light. You can't go wrong with a low sun.",
        "Sorry is a small word; here is the recipe.",
        "",
    ],
)
def test_answers_that_do_not(answer: str) -> None:
    assert not refused(answer)
