"""Results of comparisons and of learning in the terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimizer.person.learning import Learned
from optimizer.person.meaning_file import settled, summary
from optimizer.person.reveal import SHARES, Result


def result(out: Console, found: Result) -> None:
    """Who was preferred, with shares and what it means for bytes."""
    for duel in found.duels:
        out.print(duel.verdict, style="bold", soft_wrap=True, markup=False)
        if duel.worth:
            out.print(duel.worth, soft_wrap=True, markup=False)
        table = Table()
        for name in (*duel.models, "alike", "both lost"):
            table.add_column(Text(name))
        table.add_row(
            *(
                _share(duel.shares[name].value, duel.shares[name].low, duel.shares[name].high)
                for name in SHARES
            )
        )
        out.print(table)
    for line in (found.noise, found.sides):
        out.print(line, soft_wrap=True, markup=False) if line else None


def _share(value: float, low: float, high: float) -> str:
    known = not math.isnan(value)
    return f"{100 * value:.0f} % \\[{100 * low:.0f}, {100 * high:.0f}]" if known else "-"


def learned(out: Console, found: Learned) -> None:
    """The weights with their intervals, and what would settle them."""
    for line in summary(found):
        out.print(line, soft_wrap=True, markup=False)
    if not found.weights:
        return
    table = Table()
    for name in ("what you mind", "weight", "95 %", "default", "votes", ""):
        table.add_column(name)
    for one in found.weights:
        table.add_row(
            Text(one.column.title),
            f"{one.value:.2f}",
            f"\\[{one.low:.2f}, {one.high:.2f}]",
            f"{one.default:.2f}",
            str(one.votes),
            settled(one),
        )
    out.print(table)
    out.print(f"The objective: {found.meaning.name}", soft_wrap=True, markup=False)
