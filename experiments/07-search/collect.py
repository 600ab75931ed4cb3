"""Runs of compare.py or sweep.py -> results.csv, ranks.csv, results.png and curves-MODEL.png.

Usage: collect.py RUNS HERE, where RUNS has a folder of runs for each model, of the model's name. Rows
that results.csv has of other runs are kept and ranked with the new ones.

A cell is a model, its terms, tokens, budget and seed. In each cell methods are ranked by held-out KL
(equal plans share their mean rank); the table's optimum has no seed and takes part in every one.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from experiments.rows import read as read_rows
from experiments.rows import write

SPACES = {"moves": "#0072b2", "multipliers": "#009e73", "directions": "#aa4499",
          "layers": "#e69f00", "multipliers+moves": "#56b4e9", "directions+moves": "black",
          "evolution": "#d55e00", "random": "#888888"}  # fmt: skip
SAMPLERS = {"tpe": "-", "gp": "--", "cmaes": ":", "nsgaii": "-.", "": "-"}
MARKS = {"tpe": "o", "gp": "s", "cmaes": "^", "nsgaii": "D", "": "o"}
START, RULE = "exact", "moves tpe"  # what all begin from; what the program does by default
Group = tuple[str, str, int]  # model, terms, tokens allowed
Cell = tuple[str, str, int, float, int]  # and budget, seed


Row = Mapping[str, Any]  # of results.csv


def name(run: Mapping[str, Any]) -> str:
    return f"{run['method']} {run['sampler']}".strip()


def read(runs: Path) -> list[dict[str, Any]]:
    return [
        {"model": file.parent.name} | json.loads(file.read_text())
        for file in sorted(runs.glob("*/*.json"))
    ]


def starts_of(runs: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The table's optimum of each budget."""
    return {_place(run): run for run in runs if name(run) == START}


def _place(run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["model"], run["terms"], run["tokens_allowed"], run["budget"]


def kl(run: Mapping[str, Any]) -> float:
    return float(run["heldout"]["kl"]["value"])


def over(run: Mapping[str, Any], start: Mapping[str, Any]) -> tuple[float, float, float]:
    """Held-out KL over that of the start, with a 95 % bootstrap interval over the same documents."""
    own, other = np.array(run["documents"]), np.array(start["documents"])
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(own), (2000, len(own)))
    ratios = own[picked].mean(1) / other[picked].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return kl(run) / kl(start), float(low), float(high)


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run."""
    keys = [
        (k, e) for k in ("kl", "kl_p99", "kl_cvar99", "flips") for e in ("value", "low", "high")
    ]
    starts = starts_of(runs)
    rows = []
    for run in runs:
        if _place(run) not in starts:
            continue
        ratio = dict(
            zip(
                ("over_table", "over_low", "over_high"),
                over(run, starts[_place(run)]),
                strict=True,
            )
        )
        where = dict(zip(("model", "terms", "tokens_allowed", "budget"), _place(run), strict=True))
        rows.append(
            where
            | {"seed": run["seed"], "method": name(run), "tokens": run["tokens"]}
            | {"seconds": f"{run['seconds']:.0f}"}
            | {k: f"{v:.4f}" for k, v in ratio.items()}
            | {f"{k}_{e}": f"{run['heldout'][k][e]:.5f}" for k, e in keys}
            | {k: run.get(k, "") for k in ("commit", "config")}
        )
    return rows


def joined(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """A run that was made again replaces its row."""
    return list({(*_cell(row), row["method"]): row for row in [*old, *new]}.values())


def _cell(row: Row) -> Cell:
    return (
        str(row["model"]),
        str(row["terms"]),
        int(row["tokens_allowed"]),
        float(row["budget"]),
        int(row["seed"]),
    )


def cells(rows: list[Row]) -> dict[Cell, dict[str, float]]:
    """Held-out KL by method in each cell, the start's with them."""
    starts = {_cell(row)[:4]: float(row["kl_value"]) for row in rows if row["method"] == START}
    found: dict[Cell, dict[str, float]] = defaultdict(dict)
    for row in rows:
        cell = _cell(row)
        if row["method"] != START and cell[:4] in starts:
            found[cell][START] = starts[cell[:4]]
            found[cell][row["method"]] = float(row["kl_value"])
    return found


def ranks(found: Mapping[Cell, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row for each method of a group, and of a model's cells together: only cells in which all of
    the group's methods ended."""
    groups: dict[Group, list[Mapping[str, float]]] = defaultdict(list)
    for cell, own in sorted(found.items()):
        groups[cell[:3]].append(own)
        groups[cell[0], "every", 0].append(own)
    rows = []
    for group, every in groups.items():
        methods = sorted({method for own in every for method in own})
        whole = [own for own in every if len(own) == len(methods)]
        if len(whole) < 2 or len(methods) < 2:
            continue
        losses = np.array([[own[m] for m in methods] for own in whole])
        placed = stats.rankdata(losses, axis=1)
        friedman = stats.friedmanchisquare(*losses.T).pvalue if len(methods) > 2 else np.nan
        log = np.log(losses / losses[:, [methods.index(START)]])
        against = log - log[:, [methods.index(RULE)]] if RULE in methods else np.nan * log
        for i in np.argsort(placed.mean(0)):
            moved = against[:, i]
            p = stats.wilcoxon(moved).pvalue if np.any(moved[np.isfinite(moved)]) else 1.0
            low, high = interval(log[:, i])
            rows.append(
                dict(zip(("model", "terms", "tokens_allowed"), group, strict=True))
                | {"method": methods[i], "cells": len(whole)}
                | {"rank": f"{placed[:, i].mean():.2f}", "rank_sd": f"{placed[:, i].std(ddof=1):.2f}"}
                | {"over_table": f"{np.exp(log[:, i].mean()):.3f}"}
                | {"over_low": f"{low:.3f}", "over_high": f"{high:.3f}"}
                | {"worse_than_table": int((log[:, i] > 0).sum())}
                | {"better_than_moves": int((moved < 0).sum()), "wilcoxon_p": f"{p:.4f}"}
                | {"friedman_p": f"{friedman:.2g}"}
            )  # fmt: skip
    return rows


def interval(logs: np.ndarray) -> tuple[float, float]:
    """95 % of the geometric mean over cells, bootstrapped."""
    rng = np.random.default_rng(0)
    means = rng.choice(logs, (2000, len(logs))).mean(1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return float(low), float(high)


def dots(found: Mapping[Cell, Mapping[str, float]], file: Path) -> None:
    """Held-out KL over the table's optimum: a panel a group, a row a method, a colour a budget."""
    groups = sorted({cell[:3] for cell in found})
    figure, axes = plt.subplots(
        1, len(groups), figsize=(4.4 * len(groups) + 1.6, 5), squeeze=False, sharey=True
    )
    order = [m for m in ordered({m for own in found.values() for m in own}) if m != START][::-1]
    for axis, group in zip(axes[0], groups, strict=True):
        budgets = sorted({cell[3] for cell in found if cell[:3] == group})
        colours = plt.cm.viridis(np.linspace(0, 0.85, len(budgets)))
        for i, budget in enumerate(budgets):
            own = [runs for cell, runs in found.items() if cell[:4] == (*group, budget)]
            points = [
                (runs[m] / runs[START], order.index(m) + 0.16 * (i - len(budgets) / 2))
                for runs in own
                for m in runs
                if m != START
            ]
            unit = "bits" if group[1] == "blocks" else "MB"
            axis.scatter(*zip(*points, strict=True), s=22, color=colours[i],
                         label=f"{budget:g} {unit}", alpha=0.85)  # fmt: skip
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=f"{group[0]}, {group[1]}, {group[2] // 1000}k tokens",
                 xlabel="held-out KL over the table's optimum")  # fmt: skip
        axis.set_yticks(range(len(order)), order)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(budgets)
        )
    save(figure, file)


def curves(runs: list[dict[str, Any]], file: Path) -> None:
    """Best loss on search windows over the first plan's, mean of seeds: a panel a group and budget."""
    places = sorted({_place(run) for run in runs})
    wide = 4
    figure, axes = plt.subplots(
        -(-len(places) // wide), wide, figsize=(17, 3.6 * -(-len(places) // wide)), squeeze=False
    )
    for axis, place in zip(axes.flat, places, strict=False):
        for method in ordered({name(run) for run in runs} - {START}):
            own = [run for run in runs if _place(run) == place and name(run) == method]
            if not own:
                continue
            grid = np.linspace(0, max(run["curve"][-1][0] for run in own), 200)
            mean = np.mean([np.log(at(run["curve"], grid)) for run in own], 0)
            space, _, sampler = method.partition(" ")
            axis.plot(grid / 1e3, np.exp(mean), color=SPACES[space], linestyle=SAMPLERS[sampler],
                      label=method, linewidth=1.4)  # fmt: skip
        unit = "code bits" if place[1] == "blocks" else "MB"
        axis.set(title=f"{place[0]}, {place[1]}, {place[3]:g} {unit}, {place[2] // 1000}k",
                 xlabel="evaluated tokens, thousands")  # fmt: skip
        axis.set_ylabel("best loss over the first plan's")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(places) :]:
        axis.axis("off")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=6)
    save(figure, file, bottom=0.25 / axes.shape[0])


def at(curve: list[list[float]], grid: np.ndarray) -> np.ndarray:
    """The best loss once so many tokens are evaluated, over the first plan's."""
    tokens, best = np.array(curve, dtype=float).T
    index = np.searchsorted(tokens, grid, side="right") - 1
    return np.minimum.accumulate(best)[np.maximum(index, 0)] / best[0]


def ordered(there: set[str]) -> list[str]:
    """As compare.py has them."""
    from compare import methods

    return [m for m in (" ".join(pair).strip() for pair in methods()) if m in there]


def save(figure: Any, file: Path, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main(runs: Path, here: Path) -> None:
    found = read(runs)
    rows = joined(read_rows(here / "results.csv"), table(found))
    write(here / "results.csv", rows)
    measured = cells(rows)
    placed = ranks(measured)
    write(here / "ranks.csv", placed)
    dots(measured, here / "results.png")
    for model in sorted({run["model"] for run in found}):
        curves([run for run in found if run["model"] == model], here / f"curves-{model}.png")
    for row in placed:
        print(*row.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
