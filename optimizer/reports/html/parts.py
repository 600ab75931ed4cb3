"""What the sections of the report show, as values: the template report.html says it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimizer.plan import Plan, Precision
from optimizer.reports import heat_map
from optimizer.reports.html import chart
from optimizer.reports.run import Point, Run, overrides

EXPERTS = 6  # experts of a cell that are named; the rest is counted
READ = {"token": "read per token", "text": "read per pass"}


def facts(plan: Plan, run: Run) -> Iterator[tuple[str, str]]:
    """The few numbers that matter: a number and what it is."""
    yield chart.size(plan.bytes["total"]), "whole weight file"
    yield f"{plan.effective_bits:.3f}", "bits per weight in scope, scales counted"
    if plan.proof is None:
        yield f"{plan.prediction.kl:.4f}", "KL, predicted only; not measured on held-out text"
    else:
        kl = plan.proof.own["kl"]
        yield f"{kl.value:.4f}", f"KL on held-out text, 95 %: {kl.low:.4f} to {kl.high:.4f}"
    if "spearman" in run.prediction:
        what = f"rank correlation of prediction, {run.prediction['plans']:.0f} plans"
        yield f"{run.prediction['spearman']:.3f}", what


# ---------------------------------------------------------------- measured plans


@dataclass(frozen=True)
class Row:
    """A plan of the table below the chart. index: of chart.shown(); speeds: cells."""

    index: int
    name: str
    point: Point
    speeds: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """speeds: titles of the columns that say how fast a plan is. hidden: how many random plans are in
    the chart alone."""

    speeds: tuple[str, ...]
    rows: tuple[Row, ...]
    hidden: int


def measured(run: Run) -> Measured:
    plans = [
        (i, "chosen plan" if role == "chosen" else point.name, point)
        for i, (point, role) in enumerate(chart.shown(run))
        if role not in ("front", "random")
    ]
    speeds = speed_columns(run, [point for _, _, point in plans])
    cells = zip(*speeds.values(), strict=True)
    rows = tuple(Row(*plan, own) for plan, own in zip(plans, cells, strict=True))
    hidden = sum(role == "random" for _, role in chart.shown(run))
    return Measured(tuple(speeds), rows, hidden)


def speed_columns(run: Run, points: Sequence[Point]) -> dict[str, list[str]]:
    """What is known of the plans' speed, by the column's title; a cell per plan."""
    found = {READ[run.unit]: [chart.size(p.moved) if p.moved else "" for p in points]}
    if any(p.seconds for p in points):
        found["ms per token"] = [f"{1000 * p.seconds:.3g}" if p.seconds else "" for p in points]
        found["tokens/s"] = [f"{1 / p.seconds:.3g}" if p.seconds else "" for p in points]
    prices = [run.price(p) for p in points]
    if any(prices):
        found["a million cost"] = ["" if cost is None else f"{cost:.3g}" for cost in prices]
    return found


# ---------------------------------------------------------------- heat map


@dataclass(frozen=True)
class Cell:
    """Layers of one kind in one block. shade: of heat_map.COLOURS. groups: of the search, for the
    script; empty where it can't redraw the cell."""

    text: str
    shade: int
    title: str
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Heat:
    """blocks: the columns. rows: a kind of layers with a cell a block, or one outside the blocks with
    its own; None if they are too many to draw."""

    kinds: int
    blocks: tuple[int, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...] | None


def heat(plan: Plan, group: Mapping[str, int]) -> Heat:
    """Kinds of layers x blocks. group: layer name -> index in `layers`, for the script."""
    choice = plan.choice
    cells, rest = heat_map.arrange(choice)
    blocks = tuple(sorted({block for row in cells.values() for block in row}))
    if len(blocks) * len(cells) > heat_map.MOST_CELLS:
        return Heat(len(cells), blocks, None)
    rows = [
        (kind, tuple(_cell(row.get(block, []), choice, group) for block in blocks))
        for kind, row in cells.items()
    ]
    rows += [(name.removesuffix(".weight"), (_cell([name], choice, group),)) for name in rest]
    return Heat(len(cells), blocks, tuple(rows))


def _cell(
    names: list[str], choice: Mapping[str, Precision], group: Mapping[str, int]
) -> Cell | None:
    if not names:
        return None
    text, shade = heat_map.label([choice[name] for name in names])
    kinds = list(dict.fromkeys(choice[name].name for name in names))
    title = names[0] if len(names) == 1 else f"{len(names)} layers like {names[0]}"
    known = [group[name] for name in names if name in group]
    groups = tuple(dict.fromkeys(known)) if len(known) == len(names) else ()
    return Cell(text, shade, f"{title}: {', '.join(kinds[:EXPERTS])}", groups)


# ---------------------------------------------------------------- bytes


@dataclass(frozen=True)
class Share:
    """Some of the file's bytes. bits: per weight, "" where that says nothing."""

    name: str
    stored: float
    percent: float
    bits: str


def shares(plan: Plan) -> list[Share]:
    """Kinds of layers by their bytes in the packed file, largest first; then what else is in it."""
    cells, rest = heat_map.arrange(plan.layers)
    choice = plan.choice
    kinds = {kind: [n for names in row.values() for n in names] for kind, row in cells.items()}
    kinds |= {name.removesuffix(".weight"): [name] for name in rest}
    rows: list[tuple[str, float, str]] = []
    for kind, names in kinds.items():
        shapes = {name: plan.shapes[name] for name in names if name in plan.shapes}
        stored = sum(choice[name].bytes(*shape) for name, shape in shapes.items())
        weights = sum(rows * cols for rows, cols in shapes.values())
        rows.append((kind, stored, f"{8 * stored / max(weights, 1):.2f}"))
    rows.sort(key=lambda row: -row[1])
    known = sum(stored for _, stored, _ in rows)
    tensors = plan.bytes["quantized"] + plan.bytes.get("untouched", 0)
    rows.append(("norms, biases and other tensors", tensors - known, ""))
    rows.append(("the file's header", plan.bytes.get("container", 0), ""))
    whole = max(plan.bytes["total"], 1)
    return [
        Share(name, stored, min(100.0, 100 * stored / whole), bits) for name, stored, bits in rows
    ]


# ---------------------------------------------------------------- reproduce


def command(run: Run) -> str:
    return shlex.join(["mezzotint", "optimize", *overrides(run.config)])


def origin(plan: Plan, run: Run) -> dict[str, str]:
    """What the run was made from."""
    versions = plan.provenance.get("versions", {})
    return {
        "model": f"{run.model}, {plan.model.get('fingerprint', '')}",
        "plan": plan.id,
        "run": run.key,
        "seeds": f"search {run.config.get('seed')}, data {_data_seed(run)}",
        "text": _text(run),
        "quantizer": str(plan.quantizer.get("name")),
        "table": str(plan.predicted.get("estimator", "")),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "time": f"{run.seconds:.0f} s, with what the store already held",
    }


def _data_seed(run: Run) -> Any:
    return run.config.get("data", {}).get("seed")


def _text(run: Run) -> str:
    data = run.config.get("data", {})
    if data.get("source") == "bundled" and run.unit != "text":
        return "the bundled texts"
    if data.get("source") in ("self", "bundled"):
        own = "the project's own sentences"
        return own if run.unit == "text" else "sampled from the reference itself"
    return f"{data.get('source')}: {data.get('path')}"
