"""What is said of a nested plan: both models on held-out text, and what nesting costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from optimizer.commands.generate import Answer
from optimizer.plan import Plan
from optimizer.untrusted import printable

OPENED = "bold cyan"


def lines(plan: Plan) -> Iterator[str]:
    """Some sentences; nothing for a plan without a refinement."""
    section = plan.refinement
    if section is None:
        return
    total = plan.bytes["total"] + section.bytes["total"]
    yield (
        f"Refinement: planes for {len(section.layers)} layers, {decimal(section.bytes['total'])} "
        f"more, {decimal(total)} together. Predicted KL with them {section.predicted['kl']:.4f}."
    )
    proof = section.certificate
    if not proof:
        return
    yield (
        f"On held-out text: KL {_within(proof['kl']['base'])} by the base, "
        f"{_within(proof['kl']['refined'])} with the refinement; the refined model would keep "
        f"{100 * proof['acceptance']['value']:.1f} % of the base's words (unpack=draft)."
    )
    if "base over separate" in proof:
        yield (
            "Compared with two separate plans of these sizes, the base has "
            f"{_within(proof['base over separate'], 2)} times the KL, the refined model "
            f"{_within(proof['refined over separate'], 2)} times."
        )
    hard = section.hard
    if hard:
        held = hard["heldout"]
        yield (
            f"unpack=hard share={hard['share']:g}: KL {_within(held['kl'])} with "
            f"{100 * held['share']:.1f} % of the tokens unpacked, those of largest {hard['signal']}."
        )


def answer(out: Console, prompt: str, found: Answer) -> None:
    """The text, with marks where it was unpacked, and what each way of writing took."""
    text = Text(printable(prompt).replace("\\x0a", "\n"), style="dim")
    for piece, opened in found.pieces:
        shown = printable(piece).replace("\\x0a", "\n")
        marked = opened and found.asked.name in ("hard", "draft") and bool(piece)
        text.append(f"\u2039{shown}\u203a" if marked else shown, OPENED if marked else "default")
    out.print(text, soft_wrap=True)
    out.print()
    table = Table()
    table.add_column("unpack=")
    for name in ("unpacked", "passes a token", "read a token", "tokens/s"):
        table.add_column(name, justify="right")
    for row in found.rows:
        base, refined = row.passes
        share = {"hard": f"{100 * row.share:.0f} %", "always": "all", "never": "none"}
        passes = f"{base:.2f} + {refined:.2f}" if base and refined else f"{base + refined:.2f}"
        style = "bold" if row is found.asked else None
        speed = f"{row.per_second:.3g}"
        cells = (share.get(row.name, ""), passes, decimal(int(row.read)), speed)
        table.add_row(Text(row.name), *cells, style=style)
    out.print(table)
    if found.asked.acceptance is not None:
        out.print(f"{100 * found.asked.acceptance:.0f} % of the base's words were kept.")
    meant = {"hard": "chosen with the planes open", "draft": "the refined model's own words"}
    if found.asked.name in meant:
        what = meant[found.asked.name]
        out.print(f"\u2039marked\u203a: {what}. Passes: base + refined.", markup=False)
    for line in found.notes:
        out.print(line, soft_wrap=True, markup=False)


def _within(found: Mapping[str, Any], digits: int = 4) -> str:
    low, value, high = (f"{found[key]:.{digits}f}" for key in ("low", "value", "high"))
    return f"{value} [{low}, {high}]"
