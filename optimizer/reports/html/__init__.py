"""report.html: one self-contained file about a run, made from plan.json and run.json.

Charts are SVG and the heat map is an HTML table, both complete without scripts: they print, they
are read aloud, and they need no library. (Plotly's bundle would be 4.8 MB of the page; this page is
well under one.) The script adds hovering and choosing. Every name is escaped: a model's layers may
be called anything.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from optimizer.plan import Plan
from optimizer.reports.html import chart, parts
from optimizer.reports.run import Run
from optimizer.store import write_atomically

FILE = "report.html"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"
PICTURES = {
    "history": "The loss of every trial, and the best until then",
    "importances": "How much each parameter of the search mattered",
    "landscape": "The loss of every trial against each parameter",
}


def write(folder: Path) -> Path:
    """Make the report of the run in `folder` again. Raises PlanError if it holds none."""
    pictures = {
        name: (folder / f"search-{name}.png").read_bytes()
        for name in PICTURES
        if (folder / f"search-{name}.png").is_file()
    }
    page = render(Plan.load(folder), Run.load(folder), pictures)
    return write_atomically(folder / FILE, page.encode())


def render(plan: Plan, run: Run, pictures: Mapping[str, bytes] | None = None) -> str:
    """The whole page. pictures: PNG files of the search, by name."""
    sections = [
        ("Size against loss", parts.front(plan, run)),
        *([("Speed against loss", parts.third(run))] if run.third is not None else []),
        ("Where the bits go", parts.heat(plan, run)),
        ("Predicted against measured", parts.prediction(run)),
        *([("What the search saw", _pictures(pictures))] if pictures else []),
        ("Where the bytes go", parts.bytes_table(plan)),
        ("Certificate", parts.certificate(plan)),
        ("How to make this again", parts.reproduce(plan, run)),
    ]
    body = "".join(
        f'<section aria-labelledby="s{i}"><h2 id="s{i}">{title}</h2>{html}</section>'
        for i, (title, html) in enumerate(sections)
    )
    return document(f"{run.model}: plan {plan.id}", parts.head(plan, run) + body, _data(run))


def _pictures(pictures: Mapping[str, bytes]) -> str:
    return "".join(
        f'<figure><img alt="{PICTURES[name]}" style="max-width:100%" '
        f'src="data:image/png;base64,{b64encode(data).decode()}">'
        f"<figcaption>{PICTURES[name]} (drawn by Optuna).</figcaption></figure>"
        for name, data in pictures.items()
    )


def document(title: str, body: str, data: Any) -> str:
    """A page with this body; `data` is what the script may look up."""
    script = _asset("page.js")
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(digest)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_asset('style.css')}</style></head>"
        f'<body><main>{body}</main><div id="tip" role="status" hidden></div>'
        f'<script type="application/json" id="data">{encoded}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def heat_document(plan: Plan) -> str:
    """The heat map alone, for places that show a small page."""
    return document(f"plan {plan.id}", parts.heat_table(plan, {}), {})


def _asset(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _data(run: Run) -> dict[str, Any]:
    """What the script draws from. Same order as chart.shown()."""
    points = [
        {"text": chart.summary(point, role), "layers": point.layers}
        for point, role in chart.shown(run)
    ]
    columns = [[float(p.code_bits), p.kind == "ternary", name] for name, p in run.columns.items()]
    return {"points": points, "columns": columns}
