"""What a person looks at in the terminal: progress, the final table, the heat map of a plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from optimizer.backends.rules import Verdict
from optimizer.bench import View
from optimizer.layer import Precision
from optimizer.pipeline import Outcome
from optimizer.plan import Plan

# viridis, dark to light: readable by people with any kind of colour-blindness
COLOURS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
BLOCKS_PER_LINE = 32


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=110)


class Terminal(View):
    """Progress with a remaining time; notes and stages as lines."""

    def __init__(self, out: Console) -> None:
        self.out = out

    def stage(self, text: str) -> None:
        self.out.print(f"[dim]{text} ...[/dim]")

    def note(self, text: str) -> None:
        self.out.print(text, soft_wrap=True)

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        items = list(items)
        columns = (
            TextColumn(f"{text:<32}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/dim]"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.out) as progress:
            yield from progress.track(items)


def outcome(out: Console, result: Outcome) -> None:
    """The end of a run: what was gained, what it cost, how sure that is, where the files are."""
    plan = result.plan
    out.print()
    if plan.certificate:
        out.print(certificate(plan))
        out.print()
        out.print(plan.certificate["verdict"], style="bold", soft_wrap=True)
    line = (
        f"Plan {plan.id}: {plan.bytes['total'] / 1e6:.1f} MB, {plan.effective_bits:.3f} bits per "
        f"weight in scope ({plan.code_bits:.3f} of codes), predicted KL "
        f"{plan.predicted['kl']:.4f} +- {plan.predicted['stderr']:.4f}."
    )
    out.print(line, soft_wrap=True)
    quality = result.prediction
    if "spearman" in quality:
        out.print(
            f"The table foretold {quality['plans']:.0f} measured plans with rank correlation "
            f"{quality['spearman']:.3f}; measured / predicted is {quality['calibration']:.2f} "
            f"(median), {quality.get('calibration_plan', float('nan')):.2f} for the plan.",
            soft_wrap=True,
        )
    for note in result.notes:
        out.print(f"[yellow]Note:[/yellow] {note}", soft_wrap=True)
    files = ", ".join(str(path) for path in result.files.values())
    out.print(f"Wrote {files} in {result.seconds:.0f} s.", soft_wrap=True)


def certificate(plan: Plan) -> Table:
    proof = plan.certificate
    table = Table(
        title=f"Held-out: {proof['documents']} documents, {proof['tokens']} tokens; "
        f"{proof['interval']}",
        title_justify="left",
    )
    table.add_column("plan")
    for name in ("MB", "KL (nats/token)", "KL p99", "flips %", "EAR", "perplexity"):
        table.add_column(name, justify="right")
    rows = list(proof["rows"])
    between = proof["versus"].get("line")
    for row in rows:
        own = row["name"] == "plan"
        table.add_row(*_cells(row), style="bold" if own else None, end_section=own)
        if own and between:
            share = between["ratio"]
            table.add_row(
                between["name"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{between['kl']:.4f}",
                f"[dim]plan is {share['value']:.2f}x[/dim]",
                *[""] * 3,
                end_section=True,
            )
    reference = rows[0]["perplexity_reference"]["value"]
    table.caption = f"reference perplexity {reference:.3f}; lower is better, EAR: higher"
    table.caption_justify = "left"
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    kl = row["kl"]
    return [
        str(row["name"]),
        f"{row['bytes'] / 1e6:.1f}",
        f"{kl['value']:.4f} [dim]\\[{kl['low']:.4f}, {kl['high']:.4f}][/dim]",
        f"{row['kl_p99']['value']:.3f}",
        f"{100 * row['flips']['value']:.1f}",
        f"{row['ear']['value']:.4f}",
        f"{row['perplexity']['value']:.2f}",
    ]


def evaluation(out: Console, found: Mapping[str, Any]) -> None:
    """Reference against packed."""
    row, plan = found["row"], found["plan"]
    table = Table(
        title=f"Packed against reference: {found['documents']} documents, {found['tokens']} tokens; "
        "95 % over documents",
        title_justify="left",
    )
    table.add_column("measure")
    for name in ("packed", "95 %", "reference"):
        table.add_column(name, justify="right")
    reference = {"perplexity": row["perplexity_reference"]["value"], "kl": 0.0, "kl_p99": 0.0}
    reference |= {"flips": 0.0, "ear": 1.0}
    for key, label in (
        ("kl", "mean KL (nats/token)"),
        ("kl_p99", "KL, 99th percentile"),
        ("flips", "top-1 flips"),
        ("ear", "EAR (1 - total variation)"),
        ("perplexity", "perplexity"),
    ):
        value = row[key]
        table.add_row(
            label,
            f"{value['value']:.4f}",
            f"{value['low']:.4f} to {value['high']:.4f}",
            f"{reference[key]:.4f}",
        )
    out.print(table)
    whole = 2 * sum(r * c for r, c in plan.shapes.values())
    out.print(
        f"{found['bytes'] / 1e6:.1f} MB packed; the reference's layers alone take "
        f"{whole / 1e6:.1f} MB at 16 bits.",
        soft_wrap=True,
    )


def verdict(out: Console, found: Verdict) -> None:
    """Whether an engine would load a plan: each reason against it, or size and notes."""
    for error in found.errors:
        out.print(f"[red]would fail:[/red] {escape(error)}", soft_wrap=True)
    if found.errors:
        return
    out.print(f"{found.engine} loads and executes this plan: {found.bytes} bytes of weights.")
    for key, stored in sorted(found.stored.items()):
        if key != stored:
            out.print(f"  {key} is stored as {stored}")
    for note in found.notes:
        out.print(f"[yellow]Note:[/yellow] {escape(note)}", soft_wrap=True)


def show(out: Console, plan: Plan) -> None:
    """Heat map of bits, bytes, promise, certificate."""
    out.print(
        f"Plan {plan.id} for {plan.model['name']} ({plan.runtime}, {plan.quantizer['name']})",
        style="bold",
    )
    out.print(heat_map(plan))
    size = plan.bytes
    out.print(
        f"{size['total']} bytes: {size['quantized']} quantized, {size.get('untouched', 0)} untouched, "
        f"{size.get('container', 0)} header. {plan.effective_bits:.3f} bits per weight in scope.",
        soft_wrap=True,
    )
    promise = plan.predicted
    out.print(f"Promise: KL {promise['kl']:.4f} +- {promise['stderr']:.4f} nats per token.")
    if plan.certificate:
        out.print(certificate(plan))
        out.print(plan.certificate["verdict"], style="bold", soft_wrap=True)
    else:
        out.print("No certificate: not measured on held-out text yet.")


def heat_map(plan: Plan) -> Text:
    """Rows: kinds of layers; columns: blocks; each cell the bits, on a colour. Layers outside the
    blocks follow by name. Several layers in a cell (experts): their average."""
    cells: dict[str, dict[int, list[Precision]]] = {}
    rest: list[tuple[str, Precision]] = []
    for name, precision in plan.choice.items():
        stem = re.sub(r"\.weight$", "", name)
        match = re.search(r"\.(\d+)\.", stem)
        if match is None:
            rest.append((stem, precision))
            continue
        role = re.sub(r"\.\d+\.", ".", stem[match.end() :])
        cells.setdefault(role, {}).setdefault(int(match.group(1)), []).append(precision)
    text = Text()
    blocks = sorted({block for row in cells.values() for block in row})
    width = max([len(role) for role in cells] + [5])
    for first in range(0, len(blocks), BLOCKS_PER_LINE):
        part = blocks[first : first + BLOCKS_PER_LINE]
        text.append(f"{'block':<{width}} " + "".join(f"{b:>2}" for b in part) + "\n", "dim")
        for role, row in cells.items():
            text.append(f"{role:<{width}} ")
            for block in part:
                text.append(*_cell(row.get(block, [])))
            text.append("\n")
    for name, precision in rest:
        text.append(f"{name:<{width}} ")
        text.append(*_cell([precision]))
        text.append(f" {precision.name}\n", "dim")
    text.append("bits: ")
    for bits in (1, 2, 3, 4, 5, 6, 8, 16):
        text.append(f"{bits:>2}", _style(bits))
    text.append("  (t: ternary, 16: untouched)\n", "dim")
    return text


def _cell(precisions: list[Precision]) -> tuple[str, str]:
    if not precisions:
        return "  ", ""
    bits = round(sum(float(p.code_bits) for p in precisions) / len(precisions))
    label = " t" if all(p.kind == "ternary" for p in precisions) else f"{bits:>2}"
    return label, _style(bits)


def _style(bits: int) -> str:
    steps = (1, 2, 3, 4, 5, 6, 8, 16)
    index = sum(bits > step for step in steps[:-1])
    return f"{'white' if index < 4 else 'black'} on {COLOURS[index]}"
