"""A packed model against its reference, without measuring twice what the store has."""

from __future__ import annotations

from pathlib import Path

from optimizer.commands import deploy
from optimizer.config import Evaluate
from optimizer.data.text import Data, Part
from optimizer.plan import Plan
from tests.conftest import Command


def test_certified_scores_are_used_where_two_windows_agree(
    mezzotint: Command, packed_folder: Path
) -> None:
    """Without a word about text it is the plan's own; measured again, the numbers are the same."""
    first = mezzotint("evaluate", f"model={packed_folder}")
    assert first.code == 0, first.err
    assert "Its scores on 2 windows are those of its plan" in first.out
    assert "the packed model reads ..." not in first.out
    again = mezzotint("evaluate", f"model={packed_folder}", "again=true")
    assert "the packed model reads ..." in again.out and "are those of its plan" not in again.out

    def row(text: str) -> str:
        return next(line for line in text.splitlines() if "mean KL" in line)

    assert row(first.out) == row(again.out)
    assert "12 documents" in first.out


def test_the_text_is_the_plans_own_unless_another_is_asked_for(
    packed_folder: Path, run_folder: Path
) -> None:
    plan = Plan.load(run_folder)
    own = deploy._read(Evaluate(model=str(packed_folder)), plan)
    assert own.heldout == Part(sequences=12, length=64)
    other = Data(source="self", seed=3)
    assert deploy._read(Evaluate(model="x", data=other), plan) == other
    plan.provenance["data"] = {"source": "text", "path": "gone.txt", "new": 1}
    assert deploy._read(Evaluate(model="x"), plan) == Data()
