"""What a W&B record shows of a finished run: tables, points for the front, a summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from optimizer.plan import Plan
from optimizer.plan.certificate import Certificate
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


def certificate_table(proof: Certificate) -> Any:
    """The held-out rows: plan, bytes, each measure with its interval."""
    import wandb

    measures = list(proof.own.measures)
    columns: list[str | int] = ["plan", "bytes"]
    for key in measures:
        columns += [key, f"{key}_low", f"{key}_high"]
    rows = [
        [row.name, row.bytes, *(v for key in measures for v in astuple(row[key]))]
        for row in proof.rows
    ]
    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


def front_plans(run: Run) -> dict[str, list[tuple[float, float, str]]]:
    """kind -> (bytes, loss, plan) of each plan that the run knows."""
    shown = chart.shown(run)
    uniform = [p for p, role in shown if role == "uniform"]
    measured = [p for p, role in shown if role in ("random", "searched", "baseline")]
    chosen = run.chosen
    found: dict[str, list[tuple[float, float, str]]] = {
        "predicted front": [(p.bytes, p.predicted, p.id) for p in run.front],
        "uniform, predicted": [(p.bytes, p.predicted, p.name) for p in uniform],
        "uniform, measured": [(p.bytes, p.measured or 0.0, p.name) for p in uniform],
        "measured": [(p.bytes, p.measured or 0.0, p.name) for p in measured],
        "chosen plan": [(chosen.bytes, chosen.measured or chosen.predicted, chosen.id)],
    }
    return {kind: plans for kind, plans in found.items() if plans}


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
    if plan.proof is not None:
        found["verdict"] = plan.proof.verdict
        found |= {f"heldout.{key}": v.value for key, v in plan.proof.own.measures.items()}
    return found
