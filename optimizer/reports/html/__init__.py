"""report.html: one self-contained file about a run, made from plan.json and run.json.

Charts are SVG and the heat map is an HTML table, both complete without scripts: they print, they
are read aloud, and they need no library. (Plotly's bundle would be 4.8 MB of the page; this page is
well under one.) The script adds hovering and choosing. Every name is escaped: a model's layers may
be called anything.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimizer.plan import Plan
from optimizer.reports import heat_map
from optimizer.reports.html import chart, pages, parts
from optimizer.reports.run import Run
from optimizer.store import write_atomically

FILE = "report.html"
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
    found = {PICTURES[k]: b64encode(data).decode() for k, data in (pictures or {}).items()}
    groups = {name: i for i, names in enumerate(run.groups) for name in names}
    was_measured = any(point.measured is not None for point in run.measured)
    return pages.render(
        "report.html",
        "style.css",
        "page.js",
        plan=plan,
        run=run,
        proof=plan.proof,
        facts=parts.facts(plan, run),
        roles={role for _, role in chart.shown(run)},
        front=chart.front(run),
        measured=parts.measured(run),
        third=None if run.third is None else chart.third(run),
        heat=parts.heat(plan, groups),
        steps=[(bits, heat_map.shade(bits)) for bits in heat_map.STEPS],
        prediction=chart.prediction(run) if was_measured else None,
        pictures=found,
        shares=parts.shares(plan),
        command=parts.command(run),
        origin=parts.origin(plan, run),
        data=_data(run),
    )


def heat_document(plan: Plan) -> str:
    """The heat map alone, for places that show a small page."""
    return pages.render(
        "heat_page.html", "style.css", "page.js", plan=plan, heat=parts.heat(plan, {}), data={}
    )


def _data(run: Run) -> dict[str, Any]:
    """What the script draws from. Same order as chart.shown()."""
    points = [
        {"text": chart.summary(point, role), "layers": point.layers}
        for point, role in chart.shown(run)
    ]
    columns = [[float(p.code_bits), p.kind == "ternary", name] for name, p in run.columns.items()]
    return {"points": points, "columns": columns}
