"""What was measured on held-out text, as tables and sentences for the terminal. Of a language model
it is tokens, of an encoder texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from optimizer.certificate.wording import in_short, in_unit, in_words
from optimizer.cli.screen import within
from optimizer.plan.certificate import Certificate, Evaluation, Row
from optimizer.plan.measures import Measure, measure, shown

if TYPE_CHECKING:
    from optimizer.commands.deploy import Evaluated

NEIGHBOURS = "neighbours among all held-out texts; cosines: mean absolute change"


def certificate(proof: Certificate) -> Table:
    unit, columns = proof.unit, shown(proof.unit)
    size = in_unit(f"{proof.documents} documents, {proof.tokens} tokens", unit)
    table = Table(title=Text(f"Held-out: {size}; {proof.interval}"), title_justify="left")
    table.add_column("plan")
    for name in ("size", *(column.short for column in columns)):
        table.add_column(name, justify="right")
    between = proof.versus.line
    for row in proof.rows:
        own = row.name == "plan"
        cells = [Text(row.name), decimal(row.bytes), *(_cell(row, column) for column in columns)]
        table.add_row(*cells, style="bold" if own else None, end_section=own)
        if own and between is not None:
            table.add_row(
                Text(between.name),
                decimal(row.bytes),
                f"{between.kl:.4f}",
                Text(f"plan is {between.ratio.value:.2f}x", "dim"),
                *[""] * (len(columns) - 2),
                end_section=True,
            )
    if unit == "text":
        table.caption = f"{NEIGHBOURS}; lower is better, except for those that stay"
    else:
        reference = proof.own["perplexity_reference"].value
        table.caption = f"reference perplexity {reference:.3f}; lower is better, EAR: higher"
    table.caption_justify = "left"
    return table


def _cell(row: Row, measure: Measure) -> str | Text:
    """With its interval where it is the loss."""
    found = row[measure.name]
    if measure.name != "kl":
        return measure.number(found.value)
    return within(*(measure.number(value) for value in (found.value, found.low, found.high)))


def answer(out: Console, proof: Certificate) -> None:
    """The verdicts of a certificate: against the tolerance, and against uniform plans."""
    if proof.meaning is not None:  # plans of earlier versions have none
        meaning(out, proof.meaning)
    out.print(proof.verdict, style="bold", soft_wrap=True, markup=False)


def meaning(out: Console, found: Evaluation) -> None:
    """Whether it is the reference within the tolerance: by text, with what supports it."""
    if len(found.texts) > 1 or found.noise:
        out.print(_texts(found))
    for line in in_words(found):
        out.print(line, soft_wrap=True, markup=False)
    out.print(found.verdict, style="bold", soft_wrap=True, markup=False)


def _texts(found: Evaluation) -> Table:
    table = Table(title="By text, and the reference against itself", title_justify="left")
    table.add_column("text")
    last = "overlap" if found.unit == "text" else "ear"
    columns = [measure(name, found.unit) for name in ("kl", "flips", last)]
    heads = (in_unit("documents", found.unit), *(column.short for column in columns))
    for name in (*heads, "within tolerance"):
        table.add_column(name, justify="right")
    for i, row in enumerate([*found.texts, *found.noise]):
        table.add_row(
            Text(row.name),
            str(row.documents),
            *(_cell(row, column) for column in columns),
            in_short({finding.state for finding in found.of(row.name)}),
            end_section=i == len(found.texts) - 1,
        )
    return table


def packed(found: Evaluated) -> Table:
    """What `mezzotint evaluate` measured: a packed model beside its reference."""
    unit = found.meaning.unit
    size = in_unit(f"{found.documents} documents, {found.tokens} tokens", unit)
    table = Table(
        title=f"Packed against reference: {size}; {in_unit('95 % over documents', unit)}",
        title_justify="left",
    )
    table.add_column("measure")
    for name in ("packed", "95 %", "reference"):
        table.add_column(name, justify="right")
    for own in shown(unit):
        value = found.row[own.name]
        same = own.reference
        if same is None:
            same = found.row["perplexity_reference"].value
        table.add_row(
            own.title,
            own.number(value.value),
            f"{own.number(value.low)} to {own.number(value.high)}",
            own.number(same),
        )
    return table
