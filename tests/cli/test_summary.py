"""The end of a run on one screen."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from optimizer.certificate.wording import brief, marks
from optimizer.cli import summary
from optimizer.commands.product import Outcome
from optimizer.plan import Plan
from tests.certificate.typed import finding


def said(plan: Plan, folder: Path, width: int = 100) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False)
    files = {"plan": folder / "plan.json", "report": folder / "report.html"}
    summary.outcome(out, Outcome(plan, files, notes=list("abcde"), seconds=150.0))
    return out.file.getvalue()


def test_a_run_ends_on_one_screen(run_folder: Path) -> None:
    plan = Plan.load(run_folder)
    text = said(plan, run_folder)
    assert len(text.splitlines()) <= 24
    row = plan.certificate["rows"][0]
    for words in (
        "times smaller than its",
        f"{row['kl']['value']:.4f} [{row['kl']['low']:.4f}, {row['kl']['high']:.4f}]",
        f"{row['perplexity']['value']:.2f}",
        "this plan", "everywhere", "reference",
        f"mezzotint apply {run_folder}/plan.json out=packed",
        "mezzotint evaluate model=packed",
        "Note: c", "with 2 more notes", "report.html (made in 2.5 min)",
    ):  # fmt: skip
        assert words in text, words


def test_the_reference_size_is_that_of_16_bits(run_folder: Path) -> None:
    plan = Plan.load(run_folder)
    whole = summary.whole(plan)
    layers = 2 * sum(rows * cols for rows, cols in plan.shapes.values())
    assert layers <= whole < 1.05 * layers


def test_one_sentence_says_whether_it_is_the_same_and_beside_what(run_folder: Path) -> None:
    proof = Plan.load(run_folder).proof
    assert proof is not None and proof.meaning is not None
    sentence, state = brief(proof), proof.meaning.state
    begins = {"lossy": "Lossy", "lossless": "Lossless", "open": "Not enough text"}[state]
    assert sentence.startswith(begins) and sentence.endswith(".") and ". " not in sentence[:60]
    assert brief(replace(proof, meaning=None)) == proof.verdict


def test_marks_say_what_each_measure_is(run_folder: Path) -> None:
    found = [
        finding(text="prose", measure="kl", state="within"),
        finding(text="prose", measure="flips", state="over"),
        finding(text="code", measure="kl", state="open"),
    ]
    assert marks(found, "prose") == "\u2713 KL \u2717 flips"
    assert marks(found, "code") == "? KL"
