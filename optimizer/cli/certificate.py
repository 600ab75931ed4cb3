"""What was measured on held-out text, as tables and sentences for the terminal. Of a language model
it is tokens, of an encoder texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimizer.certificate.wording import LABELS, in_short, in_unit, in_words, unit_of
from optimizer.cli.screen import within
from optimizer.plan import Plan

# what a certificate's columns are called, by what was measured: tokens, or an encoder's texts
COLUMNS = {
    "token": {
        "kl": "KL (nats/token)",
        "kl_p99": "KL p99",
        "flips": "flips %",
        "ear": "EAR",
        "perplexity": "perplexity",
    },
    "text": {
        "kl": "KL (nats/text)",
        "kl_p99": "KL p99",
        "flips": "other nearest %",
        "overlap": "10 nearest stay %",
        "cosine": "cosines change by",
    },
}
PATTERNS = {"kl_p99": "{:.3f}", "ear": "{:.4f}", "perplexity": "{:.2f}", "cosine": "{:.4f}"}
NEIGHBOURS = "neighbours among all held-out texts; cosines: mean absolute change"


def human(size: float) -> str:
    """Decimal units, as disks and downloads are sold: 121.4 kB, 114.0 MB."""
    power = min(int(math.log(max(size, 1), 1000)), 3)
    return f"{size / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB')[power]}"


def certificate(plan: Plan) -> Table:
    proof = plan.certificate
    unit = unit_of(proof)
    size = in_unit(f"{proof['documents']} documents, {proof['tokens']} tokens", unit)
    table = Table(title=Text(f"Held-out: {size}; {proof['interval']}"), title_justify="left")
    table.add_column("plan")
    for name in ("size", *COLUMNS[unit].values()):
        table.add_column(name, justify="right")
    rows = list(proof["rows"])
    between = proof["versus"].get("line")
    for row in rows:
        own = row["name"] == "plan"
        table.add_row(*_cells(row, unit), style="bold" if own else None, end_section=own)
        if own and between:
            share = between["ratio"]
            table.add_row(
                Text(between["name"]),
                human(row["bytes"]),
                f"{between['kl']:.4f}",
                Text(f"plan is {share['value']:.2f}x", "dim"),
                *[""] * (len(COLUMNS[unit]) - 2),
                end_section=True,
            )
    if unit == "text":
        table.caption = f"{NEIGHBOURS}; lower is better, except for those that stay"
    else:
        reference = rows[0]["perplexity_reference"]["value"]
        table.caption = f"reference perplexity {reference:.3f}; lower is better, EAR: higher"
    table.caption_justify = "left"
    return table


def _cells(row: Mapping[str, Any], unit: str) -> list[str | Text]:
    kl = row["kl"]
    return [
        Text(str(row["name"])),
        human(row["bytes"]),
        within(*(f"{kl[key]:.4f}" for key in ("value", "low", "high"))),
        *(_measure(row, key) for key in COLUMNS[unit] if key != "kl"),
    ]


def _measure(row: Mapping[str, Any], key: str) -> str:
    value = row[key]["value"]
    return PATTERNS[key].format(value) if key in PATTERNS else f"{100 * value:.1f}"


def answer(out: Console, plan: Plan) -> None:
    """The verdicts of a certificate: against the tolerance, and against uniform plans."""
    meaning(out, plan.certificate.get("meaning", {}))
    out.print(plan.certificate["verdict"], style="bold", soft_wrap=True, markup=False)


def meaning(out: Console, found: Mapping[str, Any]) -> None:
    """Whether it is the reference within the tolerance: by text, with what supports it."""
    if not found:  # a plan of an earlier version
        return
    if len(found["texts"]) > 1 or found["noise"]:
        out.print(_texts(found))
    for line in in_words(found):
        out.print(line, soft_wrap=True, markup=False)
    out.print(found["verdict"], style="bold", soft_wrap=True, markup=False)


def _texts(found: Mapping[str, Any]) -> Table:
    table = Table(title="By text, and the reference against itself", title_justify="left")
    table.add_column("text")
    unit = unit_of(found)
    last = "overlap" if unit == "text" else "ear"
    names = (COLUMNS[unit][key] for key in ("kl", "flips", last))
    for name in (in_unit("documents", unit), *names, "within tolerance"):
        table.add_column(name, justify="right")
    states: dict[str, set[str]] = {}
    for finding in found["findings"]:
        states.setdefault(finding["text"], set()).add(finding["state"])
    rows = list(found["texts"])
    for i, row in enumerate(rows + list(found["noise"])):
        kl = row["kl"]
        table.add_row(
            Text(row["name"]),
            str(row["documents"]),
            within(*(f"{kl[key]:.4f}" for key in ("value", "low", "high"))),
            _measure(row, "flips"),
            _measure(row, last),
            in_short(states.get(row["name"], set())),
            end_section=i == len(rows) - 1,
        )
    return table


def packed(found: Mapping[str, Any]) -> Table:
    """What `mezzotint evaluate` measured: a packed model beside its reference."""
    row = found["row"]
    unit = unit_of(found["meaning"])
    size = in_unit(f"{found['documents']} documents, {found['tokens']} tokens", unit)
    table = Table(
        title=f"Packed against reference: {size}; {in_unit('95 % over documents', unit)}",
        title_justify="left",
    )
    table.add_column("measure")
    for name in ("packed", "95 %", "reference"):
        table.add_column(name, justify="right")
    reference = {"ear": 1.0, "overlap": 1.0}
    if "perplexity" in row:
        reference["perplexity"] = row["perplexity_reference"]["value"]
    for key, label in LABELS[unit].items():
        value = row[key]
        table.add_row(
            label,
            f"{value['value']:.4f}",
            f"{value['low']:.4f} to {value['high']:.4f}",
            f"{reference.get(key, 0.0):.4f}",
        )
    return table
