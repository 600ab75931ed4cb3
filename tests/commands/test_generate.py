"""`mezzotint generate`: the text, its marks, what each way of unpacking read, and mistakes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.commands.generate import REFERENCE, Generate, generate
from optimizer.formats.torch import packed
from optimizer.plan import Plan
from tests.conftest import Command

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def asked(nested_folder: Path, store: Path) -> Generate:
    return Generate(
        model=str(nested_folder), prompt=PROMPT, share=0.3, tokens=12, store=str(store)
    )


def test_every_way_is_told_beside_the_reference(asked: Generate) -> None:
    found = generate(asked)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["hard", "never", "always", REFERENCE]
    assert not found.notes
    read = {name: row.read for name, row in rows.items()}
    assert read["never"] < read["always"] < read[REFERENCE]
    hard = rows["hard"]
    assert 0 < hard.share < 1 and hard.share == pytest.approx(hard.passes[1] - 1 / 12, abs=0.1)
    assert len(found.pieces) == 12 and any(mark for _, mark in found.pieces[1:])


def test_what_a_word_reads_is_what_is_held(asked: Generate) -> None:
    """Unpacked: the plan's own bytes of each layer. Held in 4 or 8 bits to be multiplied: more."""
    exact = generate(replace(asked, unpack="never", share=None, compare=False, fast=False))
    wide = generate(replace(asked, unpack="never", share=None, compare=False))
    plan, inventory = Plan.load(asked.model), packed.read_inventory(Path(asked.model))
    own = sum(layer.bytes(plan.choice[layer.name]) for layer in inventory.layers)
    assert exact.asked.read == own < wide.asked.read < 3 * own


@pytest.mark.filterwarnings("ignore")
def test_drafts_say_what_always_says(asked: Generate) -> None:
    found = generate(Generate(**{**vars(asked), "unpack": "draft", "share": None}))
    rows = {row.name: row for row in found.rows}
    assert rows["draft"].ids == rows["always"].ids
    assert rows["draft"].acceptance is not None and 0 < rows["draft"].acceptance <= 1
    assert rows["draft"].passes[1] < 1


def test_marks_are_printed(mezzotint: Command, nested_folder: Path) -> None:
    found = mezzotint("generate", nested_folder, PROMPT, "unpack=hard", "tokens=12", "share=.5")
    assert found.code == 0, found.err
    assert PROMPT in found.out and "\u2039" in found.out and "read a token" in found.out


def test_a_folder_without_a_refinement_writes(mezzotint: Command, packed_folder: Path) -> None:
    found = mezzotint("generate", packed_folder, PROMPT, "tokens=4", "compare=false")
    assert found.code == 0 and "never" in found.out
    refused = mezzotint("generate", packed_folder, PROMPT, "unpack=hard")
    assert refused.code == 2 and "needs a refinement" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokens=0"], "1 or more"),
        (["tokens=100000"], "context"),
        (["unpack=much"], "never, always, draft, hard"),
        (["unpack=hard", "kl=1e-12"], "No share of tokens"),
    ],
)
def test_mistakes_are_explained(
    mezzotint: Command, nested_folder: Path, words: list[str], said: str
) -> None:
    found = mezzotint("generate", nested_folder, PROMPT, *words)
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1


def test_a_missing_refinement_is_told(
    mezzotint: Command, nested_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(nested_folder, tmp_path / "model")
    (folder / "refinement.safetensors").unlink()
    found = mezzotint("generate", folder, PROMPT)
    assert found.code == 2 and "The base still works" in found.err
    assert mezzotint("generate", folder, PROMPT, "unpack=never", "tokens=4").code == 0
