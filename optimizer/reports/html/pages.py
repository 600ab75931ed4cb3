"""Pages from templates (Jinja2). What is put into one is escaped, and a missing name is an error."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from optimizer.certificate.wording import brief, in_unit, in_words, marks
from optimizer.metrics.blur import level, visible
from optimizer.plan.measures import shown
from optimizer.reports.html import chart

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {}"


def environment(folder: Path) -> Environment:
    """The templates of a folder."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, style: str, script: str | None = None, **values: Any) -> str:
    """One self-contained page. style, script: names of files beside this module. No other script
    than this one runs in the page, and nothing is loaded."""
    code = None if script is None else Markup(asset(script))  # noqa: S704 - files of this package
    digest = "" if code is None else b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = POLICY.format("'none'" if code is None else f"'sha256-{digest}'")
    own = {"policy": Markup(policy), "style": Markup(asset(style)), "script": code}  # noqa: S704
    return _environment().get_template(template).render(own | values) + "\n"


def asset(name: str) -> str:
    """The text of a file beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    made = environment(Path(__file__).parent / "templates")
    filters: list[Any] = [chart.size, chart.loss, chart.points, level, visible]
    functions: list[Any] = [brief, in_unit, in_words, marks]
    made.filters |= {filter.__name__: filter for filter in filters}
    made.globals |= {function.__name__: function for function in functions}
    for name in ("WIDTH", "HEIGHT", "TOP", "LEFT", "OUTLINES", "RADIUS"):
        made.globals[name] = getattr(chart, name)
    made.globals["measures_of"] = shown
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return made
