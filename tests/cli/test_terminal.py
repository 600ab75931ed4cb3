from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from optimizer.cli import progress, summary, terminal
from optimizer.commands.product import Outcome
from optimizer.plan import Plan

ODD = "my [red]model[/x]"


def said(result: Outcome) -> str:
    out = Console(file=io.StringIO(), width=400, highlight=False)
    summary.outcome(out, result)
    return out.file.getvalue()


def test_brackets_in_names_are_text(run_folder: Path) -> None:
    plan = Plan.load(run_folder)
    found = said(Outcome(plan, {"plan": Path(ODD) / "plan.json"}, notes=[f"about {ODD}"]))
    assert f"apply '{ODD}/plan.json' out=packed" in found and f"Note: about {ODD}" in found
    out = Console(file=io.StringIO(), width=400, highlight=False)
    terminal.show(out, replace(plan, model={**plan.model, "name": ODD}))
    view = progress.Terminal(out)
    view.stage(f"finding {ODD}")
    view.note(f"kept in {ODD}")
    list(view.track([1], ODD))
    for words in (f"for {ODD} (", f"finding {ODD} ...", f"kept in {ODD}"):
        assert words in out.file.getvalue()
