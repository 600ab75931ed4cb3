"""The end of a run on one screen: how small, how near the reference, beside what, and how to go on.
Everything else is in the report."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from optimizer.certificate.wording import brief, in_unit
from optimizer.cli import nested, screen
from optimizer.commands.product import Outcome
from optimizer.plan import Plan
from optimizer.plan.certificate import Certificate, Interval
from optimizer.plan.measures import Measure, Unit, measure

SHOWN: dict[Unit, tuple[str, ...]] = {
    "token": ("kl", "flips", "perplexity"),
    "text": ("kl", "flips", "cosine"),
}
STOCK = "llama.cpp's "  # an engine's own mixtures
NOTES = 3  # that are shown; all of them are in the report


def outcome(out: Console, result: Outcome) -> None:
    """At most some 20 lines for any run."""
    plan = result.plan
    out.print()
    out.print(size(plan), style="bold", soft_wrap=True, markup=False)
    if plan.proof is not None:
        out.print(table(plan.proof, whole(plan)))
        out.print(brief(plan.proof), style="bold", soft_wrap=True, markup=False)
        worst = worst_domain(plan.proof)
        if worst:
            out.print(worst, soft_wrap=True, markup=False)
    else:
        promise = plan.prediction
        out.print(
            f"Predicted KL {promise.kl:.4f} +- {promise.stderr:.4f} nats per "
            f"{promise.unit}; nothing was measured on held-out text.",
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
        f"{plan.model['name']}: {decimal(now)}, {was / now:.2g} times smaller than its {decimal(was)} "
        f"at 16 bits; {plan.effective_bits:.2f} bits per weight in scope"
    )


def table(proof: Certificate, reference: int) -> Table:
    """The plan beside what it was compared with, and the reference. reference: its bytes."""
    sized = in_unit(f"{proof.documents} documents, {proof.tokens} tokens", proof.unit)
    found = Table(
        title=f"On held-out text: {sized}; {proof.interval} in brackets", title_justify="left"
    )
    found.add_column("")
    found.add_column("size", justify="right")
    columns = [measure(n, proof.unit) for n in SHOWN[proof.unit] if n in proof.own.measures]
    for column in columns:
        found.add_column(column.short, justify="right")
    rival = None if proof.versus.rival is None else proof.versus.rival.name
    for row in proof.rows:
        stock = row.name.startswith(STOCK)
        if row.name not in ("plan", rival) and not stock:
            continue
        cells = [Text(_cell(row[column.name], column)) for column in columns]
        name = row.name if stock else f"{row.name} everywhere"
        name = "this plan" if row.name == "plan" else name
        style = "bold" if row.name == "plan" else None
        found.add_row(Text(name), decimal(row.bytes), *cells, style=style)
    last = ("0" if column.reference is not None else _reference(proof) for column in columns)
    found.add_row("reference", decimal(reference), *last, style="dim")
    return found


def _reference(proof: Certificate) -> str:
    return measure("perplexity").number(proof.own["perplexity_reference"].value)


def _cell(interval: Interval, column: Measure) -> str:
    ends = (interval.value, interval.low, interval.high)
    value, low, high = (column.number(end) for end in ends)
    return f"{value} [{low}, {high}]"


def worst_domain(proof: Certificate) -> str:
    """One sentence, empty where there are no domains."""
    row = None if proof.meaning is None else proof.meaning.worst
    if row is None:
        return ""
    kl, count = row["kl"], row.documents
    documents = "document" if count == 1 else "documents"
    return (
        f"Worst kind of text: {row.name}, KL {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}] on {count} "
        f"{documents}."
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
