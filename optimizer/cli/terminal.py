"""What a person looks at in the terminal: progress, the final table, the heat map of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from optimizer.cli import certificate, nested
from optimizer.cli.screen import note, within
from optimizer.commands.advise import Advice
from optimizer.commands.capacity import Answer
from optimizer.commands.store import Kind, Pruned
from optimizer.formats.rules import Verdict
from optimizer.hardware.memory import kind as cache_kind
from optimizer.hardware.memory import kind_of, mib, usable
from optimizer.hardware.throughput import price
from optimizer.plan import Plan, Precision
from optimizer.reports import heat_map as grid
from optimizer.reports.html.compare import Sweep, speeds_of
from optimizer.stages import kv_budget as room

if TYPE_CHECKING:
    from optimizer.commands.deploy import Evaluated

BLOCKS_PER_LINE = 32


def evaluation(out: Console, found: Evaluated) -> None:
    """Reference against packed."""
    plan = found.plan
    out.print(certificate.packed(found))
    if found.unpack is not None:
        out.print(f"Its refinement was used as unpack={found.unpack} says.", markup=False)
    certificate.meaning(out, found.meaning)
    whole = 2 * sum(r * c for r, c in plan.shapes.values())
    out.print(
        f"{decimal(found.bytes)} packed; the reference's layers take {decimal(whole)} at 16 bits.",
        soft_wrap=True,
    )
    speed(out, found)
    questions(out, found)


def questions(out: Console, found: Evaluated) -> None:
    """Tasks and refusals, the same questions asked of both models."""
    for rows, title, share in (
        (found.tasks, "Tasks", "right"),
        (found.refusals, "Prompts, and how many are refused", "refused"),
    ):
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in ("questions", f"reference {share} %", f"packed {share} %", "lost", "won", "p"):
            table.add_column(name, justify="right")
        for row in rows:
            shares = (f"{100 * row.reference:.1f}", f"{100 * row.packed:.1f}")
            flips = (str(row.lost), str(row.won), f"{row.p:.2g}")
            table.add_row(Text(row.name), str(row.count), *shares, *flips)
        table.caption = (
            "lost, won: only the reference, only the packed model; p: McNemar's exact test"
        )
        table.caption_justify = "left"
        out.print(table)


def speed(out: Console, found: Evaluated) -> None:
    """Tokens per second of both models, and the price of a million."""
    if found.speed is None:
        return
    both, rate = found.speed, found.hourly_rate
    out.print(
        f"Writing {both.tokens} tokens, one sequence: {both.packed:.3g} tokens per second packed, "
        f"{both.reference:.3g} as the reference: {both.ratio:.2f} times.",
        soft_wrap=True,
    )
    if rate is not None:
        costs = [price(rate, tokens) for tokens in (both.packed, both.reference)]
        out.print(
            f"At {rate:g} an hour, a million tokens cost {costs[0]:.3g} packed, {costs[1]:.3g} as the "
            "reference.",
            soft_wrap=True,
        )


def verdict(out: Console, found: Verdict) -> None:
    """Whether an engine would load a plan: each reason against it, or size and notes."""
    for error in found.errors:
        note(out, error, "would fail:", "red")
    if found.errors:
        return
    told = f"{found.engine} loads and executes this plan: {found.bytes} bytes of weights."
    if found.bytes is None:
        told = f"{found.engine} can make this plan's model itself; the recipe has no weights."
    out.print(told, markup=False)
    for key, stored in sorted(found.stored.items()):
        if key != stored:
            out.print(f"  {key} is stored as {stored}", markup=False)
    for reader in found.readers:
        out.print(f"Read back: {reader}.", soft_wrap=True, markup=False)
    for line in found.notes:
        note(out, line)


def show(out: Console, plan: Plan) -> None:
    """Heat map of bits, bytes, promise, certificate."""
    out.print(
        f"Plan {plan.id} for {plan.model['name']} ({plan.runtime}, {plan.quantizer['name']})",
        style="bold",
        markup=False,
    )
    out.print(heat_map(plan))
    size = plan.bytes
    out.print(
        f"{size['total']} bytes: {size['quantized']} quantized, {size.get('untouched', 0)} untouched, "
        f"{size.get('container', 0)} header. {plan.effective_bits:.3f} bits per weight in scope.",
        soft_wrap=True,
    )
    for line in caches(plan):
        out.print(line, soft_wrap=True, markup=False)
    promise = plan.prediction
    out.print(f"Promise: KL {promise.kl:.4f} +- {promise.stderr:.4f} nats per {promise.unit}.")
    if plan.proof is not None:
        out.print(certificate.certificate(plan.proof))
        certificate.answer(out, plan.proof)
    else:
        out.print("No certificate: not measured on held-out text yet, or changed since.")
    for line in nested.lines(plan):
        out.print(line, soft_wrap=True, markup=False)


def caches(plan: Plan) -> list[str]:
    """Which cache the plan is for, and why."""
    tried = plan.provenance.get("caches")
    if tried:
        return [room.told(tried, plan.kv, plan.keep)]
    return [f"Measured with a cache of {kind_of(plan).said}."] if plan.kv < 16 else []


def heat_map(plan: Plan) -> Text:
    """Rows: kinds of layers; columns: blocks; each cell the bits, on a colour. Layers outside the
    blocks follow by name. Several layers in a cell (experts): their average."""
    cells, rest = grid.arrange(plan.choice)
    text = Text()
    blocks = sorted({block for row in cells.values() for block in row})
    if len(blocks) * len(cells) > grid.MOST_CELLS:
        return Text(
            f"{len(cells)} kinds of layers in {len(blocks)} blocks are too many to draw.\n"
        )
    choice = plan.choice
    width = max([len(role) for role in cells] + [5])
    for first in range(0, len(blocks), BLOCKS_PER_LINE):
        part = blocks[first : first + BLOCKS_PER_LINE]
        text.append(f"{'block':<{width}} " + "".join(f"{b:>2}" for b in part) + "\n", "dim")
        for role, row in cells.items():
            text.append(f"{role:<{width}} ")
            for block in part:
                text.append(*_cell([choice[name] for name in row.get(block, [])]))
            text.append("\n")
    for name in rest:
        text.append(f"{name.removesuffix('.weight'):<{width}} ")
        text.append(*_cell([plan.choice[name]]))
        text.append(f" {plan.choice[name].name}\n", "dim")
    text.append("bits: ")
    for bits in grid.STEPS:  # a space before 16, too, where nothing has a colour
        text.append(" " if bits > 9 else "").append(f"{bits:>2}", _style(grid.shade(bits)))
    text.append("  (t: ternary, 16: untouched)\n", "dim")
    return text


def _cell(precisions: list[Precision]) -> tuple[str, str]:
    if not precisions:
        return "  ", ""
    text, shade = grid.label(precisions)
    return f"{text:>2}", _style(shade)


def _style(shade: int) -> str:
    return f"{'white' if shade < grid.DARK else 'black'} on {grid.COLOURS[shade]}"


def advice(out: Console, found: Advice) -> None:
    """Bits a weight that fit, by machine and context."""
    size = found.size
    out.print(
        f"{found.model}: {(size.weights + size.others) / 1e6:.4g} million weights, "
        f"{decimal(int(size.bytes(16)))} at 16 bits, {decimal(int(size.bytes(8.375)))} at 8, "
        f"{decimal(int(size.bytes(4.375)))} at 4. Bits a weight that fit, scales counted:",
        soft_wrap=True,
        markup=False,
    )
    table = Table()
    table.add_column("machine")
    table.add_column("budget=")
    for context in found.contexts or (0,):
        table.add_column(f"{context} tokens" if context else "bits", justify="right")
    rows = ([found.here] if found.here is not None else []) + list(found.rows)
    for i, row in enumerate(rows):
        own = found.here is not None and i == 0
        name = "none" if own else row.machine.name
        cells = (Text("no" if not bits else f"{bits:.1f}") for bits in row.bits)
        table.add_row(Text(str(row.machine.budget.device)), name, *cells, end_section=own)
    out.print(table)
    if found.here is None:
        out.print("How much memory this machine has couldn't be found out.")


def fitting(out: Console, found: Answer) -> None:
    """Memory line by line, and the questions that people ask."""
    budget, need = found.budget, found.need
    where = f" on {budget.device or budget.memory}" if budget.memory else ""
    out.print(f"Plan {found.plan.id} with {found.plan.runtime}{where}", style="bold", markup=False)
    table = Table()
    table.add_column("")
    table.add_column("memory", justify="right")
    cache = cache_kind(found.plan.runtime, budget.kv, budget.keep).said
    tokens = f"{budget.context} tokens, batch {budget.batch}, {cache}"
    table.add_row("weights", mib(need.weights))
    table.add_row(f"cache: {tokens}", mib(need.cache))
    table.add_row("activations", mib(need.activations))
    table.add_row("runtime", mib(need.runtime), end_section=True)
    table.add_row("together", mib(need.total), style="bold")
    if budget.memory:
        table.add_row(
            f"usable: {100 * budget.usable:.0f} % of {budget.memory}", mib(usable(budget))
        )
    out.print(table)
    for line in _answers(found):
        out.print(line, soft_wrap=True, markup=False)


def _answers(found: Answer) -> Iterable[str]:
    if 0 < found.made_for < found.budget.context:
        yield (
            f"The model was made for {found.made_for} tokens, fewer than budget.context="
            f"{found.budget.context}."
        )
    if found.moved is not None:
        text = f"Each new token reads {mib(found.moved)} of weights and cache."
        if found.fastest is not None:
            text += f" Memory bandwidth allows at most {found.fastest:.3g} tokens per second"
            text += "." if found.price is None else f": a million cost at least {found.price:.3g}."
        yield text
    if found.wanted is not None:
        yield (
            f"Smallest plan of the front with this loss: {mib(found.wanted.bytes)}, "
            f"{found.wanted.bits:.3f} bits per weight, predicted KL {found.wanted.predicted:.4g}. "
            f"To make it: budget.bits={found.wanted.bits + 5e-7:.6f}"
        )
    if found.room is not None:
        room = f"{mib(found.room)} to spare" if found.room >= 0 else f"{mib(-found.room)} too much"
        yield f"It {'fits' if found.room >= 0 else 'does not fit'}: {room}."
        yield (
            f"Longest context that fits: {found.longest} tokens per sequence"
            f"{', all that the model was made for' if found.longest == found.made_for else ''}."
            if found.longest
            else "No context fits beside these weights."
        )
    if found.smallest:
        names = ", ".join(f"{m.budget.device} (budget={m.name})" for m in found.smallest)
        yield f"Smallest machine of each kind: {names}."
    else:
        yield "No preset is large enough."
    if found.step is not None:
        now, then = found.step.now, found.step.then
        share = then.predicted / now.predicted if now.predicted else 1.0
        gain = f"{share:.2g} times the loss" if share < 1 else "nothing more: the front ends there"
        yield (
            f"{mib(found.step.more)} more would buy: predicted KL {now.predicted:.3g} at "
            f"{now.bits:.2f} bits -> {then.predicted:.3g} at {then.bits:.2f} bits, {gain}."
        )


def sweep(out: Console, found: Sweep, written: Path) -> None:
    """The runs of a sweep, smallest plan first, and the jobs that didn't finish."""
    table = Table()
    table.add_column("job", overflow="fold")
    speeds = speeds_of(found.jobs)
    for name in ("MB", "bits", *speeds, "predicted KL", "held-out KL", "s"):
        table.add_column(name, justify="right")
    for i, job in enumerate(found.jobs):
        kl = job.heldout
        table.add_row(
            Text(job.label),
            f"{job.plan.bytes['total'] / 1e6:.2f}",
            f"{job.plan.effective_bits:.3f}",
            *(column[i] for column in speeds.values()),
            f"{job.run.chosen.predicted:.4f}",
            within(*(f"{value:.4f}" for value in kl)) if kl else "not measured",
            f"{job.run.seconds:.0f}",
        )
    out.print(table)
    for name, asked in found.unfinished:
        out.print(f"Not finished: job {name} ({asked}).", style="yellow", markup=False)
    out.print(f"Wrote {written}.", soft_wrap=True, markup=False)


def kept(out: Console, root: Path, kinds: Sequence[Kind]) -> None:
    """What a store holds."""
    if not kinds:
        out.print(f"{root} holds nothing yet.", markup=False, soft_wrap=True)
        return
    table = Table("kind", "what", title=str(root), title_justify="left")
    for name in ("entries", "size", "last used"):
        table.add_column(name, justify="right")
    for kind in kinds:
        day = datetime.fromtimestamp(kind.used, tz=UTC).date().isoformat()
        words = "" if kind.words == kind.name else kind.words
        table.add_row(kind.name, words, str(kind.entries), decimal(kind.bytes), day)
    out.print(table)
    total = decimal(sum(kind.bytes for kind in kinds))
    out.print(f"{total} in all. `mezzotint store prune 30d` removes what is unused for 30 days.")


def pruned(out: Console, root: Path, done: Pruned) -> None:
    out.print(
        f"Removed {done.entries} entries from {root}, {decimal(done.bytes)}; {decimal(done.left)} are "
        "left.",
        markup=False,
        soft_wrap=True,
    )
