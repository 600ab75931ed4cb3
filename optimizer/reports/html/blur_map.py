"""The blur map as one HTML file that needs no network and no server.

The text is untrusted: it is escaped here, enters the script as JSON data only, and the page's
content policy runs no script but this module's own (by its hash) and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.metrics.blur import LABELS, LEVELS, MARKED, Map, Reading, level, visible

HERE = Path(__file__).parent
WORST_TOKENS = 12
SNIPPET = 90  # characters


def render(found: Map, title: str, listed: int) -> str:
    """listed: how many of the worst passages are named on top."""
    css = (HERE / "blur_map.css").read_text(encoding="utf-8")
    js = (HERE / "blur_map.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Blur map, {_text(title)}</title><style>{css}</style></head>",
        f'<body style="--panes:{len(found.others)}">',
        f"<h1>Blur map, {_text(title)}</h1>",
        _summary(found),
        _legend(),
        _worst_passages(found, listed),
        _worst_tokens(found),
        _panes(found),
        _panel(),
        f'<script type="application/json" id="data">{_data(found)}</script>',
        f"<script>{js}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _text(text: str) -> str:
    return escape(visible(text), quote=True)


def _summary(found: Map) -> str:
    rows = []
    for reading in found.others:
        kl = reading.kl[~np.isnan(reading.kl)]
        worst = np.sort(kl)[-max(1, math.ceil(len(kl) / 100)) :]
        cells = [
            f"{reading.bytes / 1e6:.2f}",
            f"{kl.mean():.4f}",
            f"{worst.mean():.3f}",
            f"{100 * reading.flip.mean():.1f} %",
        ]
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f"<tr><th>{_text(reading.name)}</th>{numbers}</tr>")
    heads = ("MB of weights", "mean KL", "mean of the worst 1 %", "other top word")
    columns = "".join(f'<th class="n">{head}</th>' for head in heads)
    notes = "".join(f'<p class="quiet">{_text(note)}</p>' for note in found.notes)
    if found.unpacking is not None:
        notes = (
            f"<p>{_text(found.unpacking)} Tokens that they were opened for are "
            f'<span class="o">framed</span>.</p>{notes}'
        )
    return (
        "<p>Each token is shaded by how far the quantized model's distribution at its prediction "
        f"moved from the reference's: KL in nats. {len(found.ids)} tokens were read. Choose a token "
        "to see the words that each model would have said.</p>"
        f'<div class="scroll"><table><thead><tr><th></th>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _legend() -> str:
    shades = "".join(f'<span class="k{i}">{label}</span>' for i, label in enumerate(LABELS))
    return (
        f'<div class="legend" id="legend"><b>KL from</b>{shades}'
        f"<em>underlined: {LEVELS[MARKED - 1]:g} nats and more</em></div>"
    )


def _worst_passages(found: Map, listed: int) -> str:
    items = []
    for number in found.worst[:listed]:
        passage = found.passages[number]
        start = found.units[passage.start].start
        snippet = " ".join(found.text[start : start + SNIPPET].split())
        values = ", ".join(
            f"{_text(reading.name)} {_number(found.mean_kl(reading, passage))}"
            for reading in found.others
        )
        items.append(
            f'<li><a href="#p{number}"><bdi>{_text(snippet)} …</bdi></a> '
            f'<span class="quiet">({values})</span></li>'
        )
    return (
        '<h2 id="worst">The worst passages</h2><p class="quiet">By mean KL under the plan; choose '
        f'one to jump there.</p><ol class="worst">{"".join(items)}</ol>'
        '<p><button class="walk" type="button">Walk through the marked tokens</button></p>'
    )


def _worst_tokens(found: Map) -> str:
    heads = "".join(
        f"<th>{_text(reading.name)}</th>" for reading in (found.reference, *found.others)
    )
    rows = []
    for index in found.worst_units(WORST_TOKENS):
        unit = found.units[index]
        token = found.worst_token(unit)
        before = found.text[max(0, unit.start - 40) : unit.start]
        here = found.text[unit.start : unit.end]
        words = "".join(
            f"<td>{_said(found, reading, token)}</td>"
            for reading in (found.reference, *found.others)
        )
        rows.append(
            f'<tr><td class="n">{found.plan.shade(unit):.2f}</td>'
            f'<td><bdi>… {_text(" ".join(before.split()))} <a href="#p{found.passage_of(index)}">'
            f"<b>{_text(here.strip() or '⏎')}</b></a></bdi></td>{words}</tr>"
        )
    return (
        "<h2>The worst tokens</h2>"
        '<div class="scroll"><table><thead><tr><th class="n">KL</th><th>before the token, and it</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _said(found: Map, reading: Reading, token: int) -> str:
    pairs = zip(reading.words[token][:3], reading.chances[token][:3], strict=True)
    return " ".join(
        f'<span class="said"><bdi>{_text(found.spelling[int(word)])}</bdi> '
        f'<span class="quiet">{100 * chance:.0f} %</span></span>'
        for word, chance in pairs
    )


def _panes(found: Map) -> str:
    names = [_text(reading.name) for reading in found.others]
    picks = "".join(
        f'<label><input type="radio" name="pick" id="pick{i}"{" checked" if i == 0 else ""}> '
        f"{name}</label>"
        for i, name in enumerate(names)
    )
    pick = f'<div class="pick">{picks}</div>' if len(names) > 1 else ""
    heads = "".join(f"<div>{name}</div>" for name in names)
    rows = "".join(_row(found, number) for number in range(len(found.passages)))
    return f'<h2>The text</h2>{pick}<div class="head">{heads}</div><main>{rows}</main>'


def _row(found: Map, number: int) -> str:
    passage = found.passages[number]
    panes = "".join(
        f'<div class="text r{i}" dir="auto">{_shaded(found, reading, passage)}</div>'
        for i, reading in enumerate(found.others)
    )
    means = ", ".join(
        f"{_text(reading.name)} {_number(found.mean_kl(reading, passage))}"
        for reading in found.others
    )
    return (
        f'<section class="row" id="p{number}">{panes}<div class="meta">mean KL: {means} '
        '<a class="up" href="#worst">back to the list</a></div></section>'
    )


def _shaded(found: Map, reading: Reading, passage: range) -> str:
    parts = []
    for index in passage:
        unit = found.units[index]
        shade = level(reading.shade(unit))
        marks = [f"k{shade}"] * bool(shade) + ["o"] * reading.unpacked(unit)
        name = f' class="{" ".join(marks)}"' if marks else ""
        word = found.text[unit.start : unit.end]
        inner = word.lstrip(" \n\t")
        space = word[: len(word) - len(inner)]
        if index == passage.start:  # a row begins with its text, but code keeps its indentation
            space = space.rpartition("\n")[2] if "\n" in space else ""
        parts.append(_text(space))  # no shade on the space before a word
        parts.append(f'<span data-i="{index}"{name}>{_text(inner)}</span>' if inner else "")
        if index + 1 < len(found.units):
            parts.append(_text(found.text[unit.end : found.units[index + 1].start]))
    return "".join(parts).rstrip()


def _panel() -> str:
    return (
        '<aside id="panel" hidden aria-live="polite"><div class="bar"><strong>At '
        '<bdi id="token"></bdi></strong><button id="previous" type="button">previous marked'
        '</button><button id="next" type="button">next marked</button><button id="close" '
        'type="button">close</button></div><div class="scroll"><table id="words"></table></div>'
        "</aside>"
    )


def _data(found: Map) -> str:
    """Everything that the panel shows, as JSON that can't end its script element."""
    numbers: dict[int, int] = {}

    def number(word: int) -> int:
        return numbers.setdefault(word, len(numbers))

    readings = (found.reference, *found.others)
    units: list[dict[str, Any]] = []
    for unit in found.units:
        token = found.worst_token(unit)
        entry: dict[str, Any] = {"token": number(int(found.ids[token]))}
        entry["kl"] = [_number(float(reading.kl[token])) for reading in found.others]
        if not math.isnan(found.plan.kl[token]):
            entry["true"] = [round(float(reading.true[token]), 4) for reading in readings]
            entry["top"] = [
                [
                    [number(int(word)), round(float(chance), 4)]
                    for word, chance in zip(r.words[token], r.chances[token], strict=True)
                ]
                for r in readings
            ]
        units.append(entry)
    data = {
        "models": [reading.name for reading in readings],
        "words": [found.spelling[word] for word in numbers],
        "units": units,
        "marked": [i for i, u in enumerate(found.units) if level(found.plan.shade(u)) >= MARKED],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _number(kl: float) -> str:
    return "not predicted" if math.isnan(kl) else f"{kl:.3f}"
