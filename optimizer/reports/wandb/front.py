"""The front as a chart of W&B's own: size against loss on a logarithmic axis, one colour for each
run of a sweep. Runs and kinds of plans are chosen by a click on the legend, a plan shows its numbers
under the pointer.

The chart is a Vega-Lite specification of ours inside the record's own panel, so that it needs no
preset on W&B's server and works offline. What doesn't know inline specifications shows the same
table by W&B's preset for lines, whose field names are used here for that reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

NAME = "mezzotint-front"
PRESET = "wandb/lineseries/v0"
COLUMNS = ("MB", "KL", "kind", "plan")
FIELDS = {"step": "MB", "lineVal": "KL", "lineKey": "kind", "plan": "plan"}
LINES = ("predicted front", "uniform, predicted", "uniform, measured")  # the others are points


def _encoding() -> dict[str, Any]:
    shown = {"test": {"and": [{"param": "runs"}, {"param": "kinds"}]}, "value": 1}
    return {
        "x": {
            "field": "${field:step}",
            "type": "quantitative",
            "title": "${string:xname}",
            "scale": {"zero": False},
        },
        "y": {
            "field": "${field:lineVal}",
            "type": "quantitative",
            "title": "${string:yname}",
            "scale": {"type": "log"},
        },
        "color": {"field": "name", "type": "nominal", "title": "run"},
        "opacity": {"condition": shown, "value": 0.08},
        "tooltip": [
            {"field": "name", "type": "nominal", "title": "run"},
            {"field": "${field:lineKey}", "type": "nominal", "title": "kind"},
            {"field": "${field:plan}", "type": "nominal", "title": "plan"},
            {"field": "${field:step}", "type": "quantitative", "title": "MB", "format": ".2f"},
            {"field": "${field:lineVal}", "type": "quantitative", "title": "KL", "format": ".3g"},
        ],
    }


def spec() -> dict[str, Any]:
    """Vega-Lite with W&B's references to fields and strings; data: rows of COLUMNS with the run's
    `name`."""
    drawn = json.dumps(LINES)
    kinds = {"field": "${field:lineKey}", "type": "nominal", "title": "kind"}
    legends = [
        {"name": "runs", "select": {"type": "point", "fields": ["name"]}, "bind": "legend"},
        {
            "name": "kinds",
            "select": {"type": "point", "fields": ["${field:lineKey}"]},
            "bind": "legend",
        },
    ]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"name": "wandb"},
        "title": "${string:title}",
        "width": "container",
        "height": "container",
        "transform": [{"filter": "datum['${field:lineVal}'] > 0"}],
        "layer": [
            {
                "params": legends,
                "transform": [{"filter": f"indexof({drawn}, datum['${{field:lineKey}}']) >= 0"}],
                "mark": {"type": "line", "point": {"size": 14}},
                "encoding": _encoding() | {"strokeDash": kinds},
            },
            {
                "transform": [{"filter": f"indexof({drawn}, datum['${{field:lineKey}}']) < 0"}],
                "mark": {"type": "point", "filled": True, "size": 50},
                "encoding": _encoding() | {"shape": kinds},
            },
        ],
    }


Plans = Mapping[str, Sequence[tuple[float, float, str]]]


def chart(plans: Plans, unit: str = "token") -> Any:
    """A W&B chart. plans: kind -> (bytes, loss, plan) of each; a loss of zero has no place on a
    logarithmic axis and is left out."""
    import wandb
    from wandb.plot.custom_chart import CustomChart, CustomChartSpec

    class Inline(CustomChartSpec):
        @property
        def config_value(self) -> dict[str, Any]:
            found: dict[str, Any] = super().config_value
            found["panel_config"]["customPanelDef"] = {
                "name": NAME,
                "displayName": "Front of sizes and losses",
                "description": "Plans of all chosen runs, size against loss",
                "spec": json.dumps(spec()),
                "access": "PRIVATE",
            }
            return found

    rows = [
        [size / 1e6, loss, kind, plan]
        for kind, some in plans.items()
        for size, loss, plan in sorted(some)
        if loss > 0
    ]
    table = wandb.Table(columns=[*COLUMNS], data=rows)
    strings = {
        "title": "Front of sizes and losses",
        "xname": "MB",
        "yname": f"KL, nats per {unit}",
    }
    return CustomChart(table, Inline(PRESET, dict(FIELDS), strings))
