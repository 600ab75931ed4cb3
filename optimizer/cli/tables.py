"""Probes and blur maps in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimizer.cli.screen import note, within
from optimizer.commands.inspect import Probed
from optimizer.metrics.blur import LABELS, MARKED, level, visible
from optimizer.plan.certificate import Interval

if TYPE_CHECKING:
    from optimizer.certificate.pairs import Cell
    from optimizer.metrics.blur import Map, Reading

# the page's shades on a dark ground and on a light one are both readable with their own ink
SHADES = (
    "",
    "#1b1d21 on #fff7cf",
    "#1b1d21 on #fee391",
    "#1b1d21 on #fdb84a",
    "bold underline #000000 on #e0700f",
    "bold underline #ffffff on #7f2704",
)
WORST_TOKENS = 10
FEW = 8  # pairs; below this a bootstrap's interval is too narrow to be believed


# ---------------------------------------------------------------- probes


def probes(out: Console, found: Probed) -> None:
    """One row per phenomenon and language, totals below, then what may be said."""
    names = list(found.sizes)
    rival = names[1] if len(names) > 1 else None
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in found.sizes.items())
    title = f"Margins of minimal pairs ({found.source}); {sizes}"
    table = Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("\nphenomenon")
    heads = ["\nused", "plan\nflips %", "\nloss of margin", "\nworst 10th", "\np"]
    if rival is not None:
        heads += ["uniform\nflips %", "\nloss", "plan -\nuniform", "\np"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for i, cell in enumerate(found.cells):
        table.add_row(*_row(cell, rival), end_section=i == len(found.cells) - 1)
    for cell in found.totals:
        table.add_row(*_row(cell, rival), style="bold")
    table.caption = Text(_caption(found, rival))
    table.caption_justify = "left"
    out.print(table)
    for reason, count in found.skipped.items():
        note(out, f"{count} pairs skipped, {reason}.")
    silent = [f"{c.phenomenon} {c.language}" for c in found.cells if not c.damage]
    if silent:
        out.print(
            f"Without an informative pair: {', '.join(silent)}.", soft_wrap=True, markup=False
        )
    out.print(found.verdict, style="bold", soft_wrap=True, markup=False)


def _caption(found: Probed, rival: str | None) -> str:
    wrong, weak = (sum(getattr(c.count, key) for c in found.cells) for key in ("wrong", "weak"))
    text = (
        f"In nats. used: pairs that the reference separates by more than {found.threshold:g}; not "
        f"counted: {wrong} that it gets wrong, {weak} that it separates by less. flips: used pairs "
        "turned over. p: of no loss, Holm."
    )
    return text if rival is None else f"{text} Beside it: {rival}."


def _row(cell: Cell, rival: str | None) -> list[str | Text]:
    count = cell.count
    name = Text(f"{cell.phenomenon} {cell.language}")
    used = f"{count.used}/{count.pairs}"
    if not cell.damage:
        return [name, used]
    plan = cell.damage["plan"]
    row: list[str | Text] = [name, used, f"{100 * plan.flips.value:.0f}"]
    row += [_interval(plan.loss, count.used), f"{plan.tail.value:.2f}", _p(plan.p)]
    if rival is not None and cell.gap is not None:
        other = cell.damage[rival]
        row += [f"{100 * other.flips.value:.0f}", f"{other.loss.value:.2f}"]
        row += [f"{cell.gap.value:.2f}", _p(cell.gap_p)]
    return row


def _interval(found: Interval, used: int) -> Text:
    if used < FEW:
        return Text.assemble(f"{found.value:.2f} ", ("(too few)", "dim"))
    return within(f"{found.value:.2f}", f"{found.low:.2f}", f"{found.high:.2f}")


def _p(p: float | None) -> Text:
    if p is None:
        return Text()
    return Text(f"{p:.3f}", "bold") if p < 0.05 else Text(f"{p:.2f}")


# ---------------------------------------------------------------- blur map


def blur(out: Console, found: Map, listed: int, whole: bool) -> None:
    """What was read and how far it moved; if `whole`, the worst passages and tokens too."""
    if whole:
        _passages(out, found, listed)
        out.print(_tokens(found))
    table = Table(title=f"{len(found.ids)} tokens read", title_justify="left")
    table.add_column("weights")
    for head in ("MB", "mean KL (nats/token)", "worst token", "other top word %"):
        table.add_column(head, justify="right")
    for reading in found.others:
        kl = reading.kl[~np.isnan(reading.kl)]
        table.add_row(
            Text(reading.name),
            f"{reading.bytes / 1e6:.2f}",
            f"{kl.mean():.4f}",
            f"{kl.max():.2f}",
            f"{100 * reading.flip.mean():.1f}",
        )
    out.print(table)
    if found.unpacking is not None:
        out.print(found.unpacking, soft_wrap=True, markup=False)
    for line in found.notes:
        note(out, line)


def _passages(out: Console, found: Map, listed: int) -> None:
    plain = out.no_color or out.color_system is None
    legend = Text("KL in nats: ")
    for i, label in enumerate(LABELS):
        legend.append(f" {label} ", SHADES[i])
    legend.append("  underlined" if not plain else f"  [[...]]: {LABELS[MARKED]} and more")
    out.print(legend)
    for rank, number in enumerate(found.worst[:listed], 1):
        passage = found.passages[number]
        means = ", ".join(f"{r.name} {found.mean_kl(r, passage):.3f}" for r in found.others)
        out.print(
            Text.assemble(
                "\n",
                (f"{rank}.", "bold"),
                f" passage {number + 1} of {len(found.passages)}, mean KL: {means}",
            )
        )
        out.print(_shaded(found, found.plan, passage, plain))
    out.print()


def _shaded(found: Map, reading: Reading, passage: range, plain: bool) -> Text:
    text = Text()
    for index in passage:
        unit = found.units[index]
        shade = level(reading.shade(unit))
        word = visible(found.text[unit.start : unit.end])
        inner = word.lstrip(" \n\t")
        text.append("" if index == passage.start else word[: len(word) - len(inner)])
        shown = f"[[{inner}]]" if plain and shade >= MARKED else inner
        text.append(f"\u2039{shown}\u203a" if reading.unpacked(unit) else shown, SHADES[shade])
        if index + 1 < len(found.units):
            text.append(visible(found.text[unit.end : found.units[index + 1].start]))
    text.rstrip()
    return text


def _tokens(found: Map) -> Table:
    table = Table(title="The worst tokens", title_justify="left")
    table.add_column("KL", justify="right")
    table.add_column("before the token, and it", overflow="fold")
    for reading in (found.reference, *found.others):
        table.add_column(Text(reading.name), overflow="fold")
    for index in found.worst_units(WORST_TOKENS):
        unit = found.units[index]
        token = found.worst_token(unit)
        before = " ".join(found.text[max(0, unit.start - 24) : unit.start].split())
        place = Text(visible(f"... {before} "))
        place.append(visible(found.text[unit.start : unit.end].strip()), "bold")
        words = [Text(_said(found, r, token)) for r in (found.reference, *found.others)]
        table.add_row(f"{found.plan.shade(unit):.2f}", place, *words)
    return table


def _said(found: Map, reading: Reading, token: int) -> str:
    """The three likeliest words at a token's prediction, with their probabilities."""
    pairs = zip(reading.words[token][:3], reading.chances[token][:3], strict=True)
    return "  ".join(f"{found.spelling[int(word)]} {100 * chance:.0f} %" for word, chance in pairs)
