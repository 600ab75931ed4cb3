"""The end of a run on one screen: how small, how near the reference, beside what, and how to go on.
Everything else is in the report."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimizer.certificate.wording import brief, in_unit, unit_of
from optimizer.cli import nested, screen
from optimizer.cli.certificate import human
from optimizer.commands.product import Outcome
from optimizer.plan import Plan

SHOWN = {
    "token": {"kl": "KL (nats/token)", "flips": "flips %", "perplexity": "perplexity"},
    "text": {"kl": "KL (nats/text)", "flips": "other nearest %", "cosine": "cosines change by"},
}
STOCK = "llama.cpp's "  # an engine's own mixtures
NOTES = 3  # that are shown; all of them are in the report
PERCENT = ("flips",)
DIGITS = {"kl": 4, "flips": 1, "perplexity": 2, "cosine": 4}


def outcome(out: Console, result: Outcome) -> None:
    """At most some 20 lines for any run."""
    plan = result.plan
    out.print()
    out.print(size(plan), style="bold", soft_wrap=True, markup=False)
    if plan.certificate:
        out.print(table(plan.certificate, whole(plan)))
        out.print(brief(plan.certificate), style="bold", soft_wrap=True, markup=False)
        worst = worst_domain(plan.certificate)
        if worst:
            out.print(worst, soft_wrap=True, markup=False)
    else:
        promise = plan.predicted
        out.print(
            f"Predicted KL {promise['kl']:.4f} +- {promise['stderr']:.4f} nats per "
            f"{unit_of(promise)}; nothing was measured on held-out text.",
            soft_wrap=True,
        )
    for line in nested.lines(plan):
        out.print(line, soft_wrap=True, markup=False)
    for note in result.notes[:NOTES]:
        screen.note(out, note)
    for line in onward(result):
        out.print(line, soft_wrap=True, markup=False)


def whole(plan: Plan) -> int:
    """Bytes of the reference's layers at 16 bits, with what no plan touches."""
    outside = plan.bytes.get("untouched", 0) - sum(
        2 * rows * cols
        for name, (rows, cols) in plan.shapes.items()
        if plan.choice[name].kind == "none"
    )
    return 2 * sum(rows * cols for rows, cols in plan.shapes.values()) + max(outside, 0)


def size(plan: Plan) -> str:
    """The first line: what it was and what it is."""
    now, was = plan.bytes["total"], whole(plan)
    return (
        f"{plan.model['name']}: {human(now)}, {was / now:.2g} times smaller than its {human(was)} at "
        f"16 bits; {plan.effective_bits:.2f} bits per weight in scope"
    )


def table(proof: Mapping[str, Any], reference: int) -> Table:
    """The plan beside what it was compared with, and the reference."""
    unit = unit_of(proof)
    sized = in_unit(f"{proof['documents']} documents, {proof['tokens']} tokens", unit)
    found = Table(
        title=f"On held-out text: {sized}; {proof['interval']} in brackets", title_justify="left"
    )
    found.add_column("")
    found.add_column("size", justify="right")
    shown = {key: title for key, title in SHOWN[unit].items() if key in proof["rows"][0]}
    for title in shown.values():
        found.add_column(title, justify="right")
    rival = (proof["versus"].get("uniform") or proof["versus"].get("fitting") or {}).get("name")
    for row in proof["rows"]:
        stock = row["name"].startswith(STOCK)
        if row["name"] not in ("plan", rival) and not stock:
            continue
        cells = [Text(_cell(row[key], key)) for key in shown]
        name = row["name"] if stock else f"{row['name']} everywhere"
        name = "this plan" if row["name"] == "plan" else name
        style = "bold" if row["name"] == "plan" else None
        found.add_row(Text(name), human(row["bytes"]), *cells, style=style)
    last = {"perplexity": f"{_reference(proof):.2f}"} if "perplexity" in shown else {}
    found.add_row(
        "reference", human(reference), *(last.get(key, "0") for key in shown), style="dim"
    )
    return found


def _reference(proof: Mapping[str, Any]) -> float:
    return float(proof["rows"][0].get("perplexity_reference", {}).get("value", math.nan))


def _cell(interval: Mapping[str, float], key: str) -> str:
    factor, digits = (100 if key in PERCENT else 1), DIGITS[key]
    value, low, high = (factor * interval[end] for end in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def worst_domain(proof: Mapping[str, Any]) -> str:
    """One sentence, empty where there are no domains."""
    found = proof.get("meaning", {})
    if "worst_domain" not in found:
        return ""
    row = next(row for row in found["texts"] if row["name"] == found["worst_domain"])
    kl, count = row["kl"], row["documents"]
    documents = "document" if count == 1 else "documents"
    return (
        f"Worst kind of text: {row['name']}, KL {kl['value']:.4f} [{kl['low']:.4f}, "
        f"{kl['high']:.4f}] on {count} {documents}."
    )


def onward(result: Outcome) -> list[str]:
    """The two commands to go on with, and where the rest is."""
    plan = shlex.quote(str(result.files["plan"])) if "plan" in result.files else "plan.json"
    lines = [
        f"Next: mezzotint apply {plan} out=packed",
        "      mezzotint evaluate model=packed",
    ]
    if "report" in result.files:
        count = len(result.notes) - NOTES
        more = f", with {count} more {'note' if count == 1 else 'notes'}" if count > 0 else ""
        lines.append(
            f"Everything else{more}: {result.files['report']} (made in {_minutes(result.seconds)})"
        )
    return lines


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
