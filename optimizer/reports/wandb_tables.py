"""What a W&B record shows: tables, a chart and a summary, from a finished run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optimizer.plan import Plan
from optimizer.reports.html import chart
from optimizer.reports.run import Point, Run


def plan_table(run: Run) -> Any:
    """A row per measured plan: who, bytes, bits, promise, and each measure with its interval."""
    import wandb

    points = [(p, role) for p, role in chart.shown(run) if role != "front"]
    measures = list(dict.fromkeys(key for point, _ in points for key in point.measures))
    columns: list[str | int] = ["plan", "role", "plan_id", "bytes", "bits", "bytes_per_token"]
    columns += ["seconds_per_token", "price_of_a_million", "predicted_kl"]
    for key in measures:
        columns += [key, f"{key}_low", f"{key}_high"]
    rows = [_plan_row(run, point, role, measures) for point, role in points]
    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


def _plan_row(run: Run, point: Point, role: str, measures: list[str]) -> list[Any]:
    row: list[Any] = [point.name, role, point.id, point.bytes, point.bits, point.moved]
    row += [point.seconds or None, run.price(point), point.predicted]
    for key in measures:
        row += _three(point.measures.get(key, {}))
    return row


def _three(interval: Mapping[str, float]) -> list[float | None]:
    return [interval.get(end) for end in ("value", "low", "high")]


def certificate_table(proof: Mapping[str, Any]) -> Any:
    """The held-out rows: plan, bytes, each measure with its interval."""
    import wandb

    measures = [key for key, value in proof["rows"][0].items() if isinstance(value, dict)]
    columns: list[str | int] = ["plan", "bytes"]
    for key in measures:
        columns += [key, f"{key}_low", f"{key}_high"]
    rows = [
        [row["name"], row["bytes"], *(v for key in measures for v in _three(row.get(key, {})))]
        for row in proof["rows"]
    ]
    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


def front_chart(run: Run) -> Any:
    """Size against loss as W&B's own lines. Its preset has linear axes, so the loss is its log10;
    a loss of zero has none and is left out."""
    import wandb

    shown = chart.shown(run)
    uniform = [p for p, role in shown if role == "uniform"]
    lines = {
        "predicted front": [(p.bytes, p.predicted) for p in run.front],
        "uniform, predicted": [(p.bytes, p.predicted) for p in uniform],
        "uniform, measured": [(p.bytes, p.measured or 0.0) for p in uniform],
        "chosen plan": [(run.chosen.bytes, run.chosen.measured or run.chosen.predicted)],
    }
    xs: list[list[float]] = []
    ys: list[list[float]] = []
    keys: list[str] = []
    for name, values in lines.items():
        usable = [(size, math.log10(loss)) for size, loss in sorted(values) if loss > 0]
        if usable:
            keys.append(name)
            xs.append([size / 1e6 for size, _ in usable])
            ys.append([loss for _, loss in usable])
    title = f"log10 of KL (nats per {run.unit}) against size"
    return wandb.plot.line_series(xs=xs, ys=ys, keys=keys, title=title, xname="MB")


def summary(plan: Plan, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {
        "plan_id": plan.id,
        "bytes": plan.bytes["total"],
        "bits": plan.effective_bits,
        "predicted_kl": plan.predicted["kl"],
        "seconds": run.seconds,
        "notes": list(run.notes),
    }
    found |= {f"prediction.{key}": value for key, value in run.prediction.items()}
    if plan.certificate:
        found["verdict"] = plan.certificate["verdict"]
        row = plan.certificate["rows"][0]
        for key, value in row.items():
            if isinstance(value, dict):
                found[f"heldout.{key}"] = value["value"]
    return found
