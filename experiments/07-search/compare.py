"""Searches on the measured loss at equal evaluated tokens, on the same windows, from the same
table; every final plan measured on held-out documents.

Usage: compare.py TEXT TOKENS OUT_FOLDER BITS... -> OUT_FOLDER/BITS-SEED-METHOD.json, one per run;
runs whose file exists are skipped. collect.py joins them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from optimizer.certificate import comparison
from optimizer.commands import optimize
from optimizer.config import Optimize
from optimizer.data.text import Data
from optimizer.metrics import bootstrap
from optimizer.metrics.divergence import Teacher
from optimizer.plan import Budget, Palette
from optimizer.search import Problem, Search, exact, starts
from optimizer.stages import refine
from optimizer.stages.prefix import Prefix, Shortcut
from optimizer.stages.session import Bench, View, choices, make_quantizer, measure_table

SEEDS = (0, 1, 2)
OURS = ("moves", "multipliers", "layers")
OTHERS = ("evolution", "random")
FIRST = 4  # windows before a random plan may be dropped


class Meter:
    """Losses of plans on single search windows, counting evaluated tokens. windows: as many as
    ours are tried on."""

    def __init__(
        self, bench: Bench, chosen, rounding, teacher: Teacher, windows: int, limit: int
    ) -> None:
        self.bench, self.chosen, self.rounding, self.teacher = bench, chosen, rounding, teacher
        self.windows = windows
        self.length = teacher.windows.ids.shape[1]
        self.spent, self.limit = 0, limit
        self.curve: list[tuple[int, float]] = []
        self.shortcut = Shortcut(bench.model, teacher)

    def losses(self, plan: np.ndarray, windows: Iterator[int]) -> np.ndarray:
        self.rounding.set(self.chosen.choice(plan))
        own = Prefix(self.chosen.choice(plan))
        found = []
        for window in windows:
            found.append(self.shortcut.window(int(window), None, own))
            self.spent += self.length
        return np.array(found)

    def best_start(self, starts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The best of the plans that ours start from too, and its losses [windows]."""
        found = []
        for plan in starts:
            found.append(self.losses(plan, range(self.windows)))
            self.best(min(float(each.mean()) for each in found))
        winner = int(np.argmin([each.mean() for each in found]))
        return starts[winner], found[winner]

    @property
    def over(self) -> bool:
        return self.spent >= self.limit

    def best(self, loss: float) -> None:
        self.curve.append((self.spent, loss))


def switched(problem: Problem, plan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """EvoPress' mutation: one to three times, one group a level up and others a level down until
    the plan fits again (Sieberling et al., arXiv:2410.14649, section 3)."""
    order = problem.order
    rank = np.argsort(order)[plan]
    rows = np.arange(len(plan))
    for _ in range(int(rng.integers(1, 4))):
        up = rng.choice(np.flatnonzero(rank < len(order) - 1))
        rank[up] += 1
        while not problem.fits(order[rank]):
            down = rng.choice(np.flatnonzero((rank > 0) & (rows != up)))
            rank[down] -= 1
    return order[rank]


def evolution(problem: Problem, starts: list[np.ndarray], meter: Meter, seed: int) -> np.ndarray:
    """(1 + 8) evolution with three rounds of selection: 8 children on 2 windows, the best 2 on 8,
    the best on all, against the parent."""
    rng = np.random.default_rng([seed, 41])
    every = range(meter.windows)
    parent, each = meter.best_start(starts)
    loss = float(each.mean())
    while not meter.over:
        children = [switched(problem, parent, rng) for _ in range(8)]
        for keep, count in ((2, 2), (1, 8)):
            some = rng.choice(meter.windows, min(count, meter.windows), replace=False)
            scores = [meter.losses(child, some).mean() for child in children]
            children = [children[i] for i in np.argsort(scores)[:keep]]
        found = float(meter.losses(children[0], every).mean())
        if found < loss:
            parent, loss = children[0], found
        meter.best(loss)
    return parent


def random(problem: Problem, starts: list[np.ndarray], meter: Meter, seed: int) -> np.ndarray:
    """Random plans that use their budget; dropped after FIRST windows if not better there."""
    rng = np.random.default_rng([seed, 42])
    best, each = meter.best_start(starts)
    while not meter.over:
        plan = exact.random_plan(problem, rng)
        found = meter.losses(plan, range(FIRST))
        if found.mean() < each[:FIRST].mean():
            found = np.r_[found, meter.losses(plan, range(FIRST, meter.windows))]
            if found.mean() < each.mean():
                best, each = plan, found
        meter.best(float(each.mean()))
    return best


def main(text: str, tokens: int, out: Path, budgets: list[float]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    base = Optimize(
        model="smollm2",
        budget=Budget(code_bits=4),
        palette=Palette(bits=[2, 3, 4, 5, 6, 8]),
        data=Data(source="text", path=text),
        store=store,
    )
    bench = Bench("smollm2", None, base.data, store, "cpu", View())
    chosen = choices(base, bench.inventory)
    table = measure_table(bench, base, chosen)
    quantizer = make_quantizer(base.quantizer, bench)
    teacher = Teacher(bench.model.net, bench.windows("search"))
    for bits in budgets:
        config = replace(
            base, budget=Budget(code_bits=bits), search=Search(space="moves", tokens=tokens)
        )
        problem = optimize._pose(config, bench.inventory, chosen, table.loss)
        start = exact.solve(problem)
        for seed in SEEDS:
            for method in (*OURS, *OTHERS, "exact"):
                file = out / f"{bits:g}-{seed}-{method}.json"
                if file.exists() or (method == "exact" and seed):
                    continue
                began = time.perf_counter()
                if method in OURS:
                    search = Search(space=method, tokens=tokens)
                    own = replace(config, search=search, seed=seed)
                    with tempfile.TemporaryDirectory() as folder:
                        found = refine.refine(bench, own, chosen, problem, start,
                                              Path(folder) / "journal")  # fmt: skip
                    plan, spent = found.assignment, found.spent
                    curve = [(row["tokens"], row["best"]) for row in found.history]
                elif method == "exact":
                    plan, spent, curve = start, 0, []
                else:
                    with bench.model.rounded(quantizer) as rounding:
                        used = refine.tried_on(config.search, *teacher.windows.ids.shape)
                        confirm = 4 * used * teacher.windows.ids.shape[1]  # as ours spends
                        meter = Meter(bench, chosen, rounding, teacher, used, tokens + confirm)
                        search = evolution if method == "evolution" else random
                        plan = search(problem, starts.of_a_budget(problem, start), meter, seed)
                    spent, curve = meter.spent, meter.curve
                seconds = time.perf_counter() - began
                scores = bench.score(chosen.choice(plan), "heldout", quantizer)
                counts = bootstrap.resamples(scores.documents, np.random.default_rng(0))
                row = {k: asdict(v) for k, v in comparison.describe(scores, counts).items()}
                record = {"bits": bits, "seed": seed, "method": method, "tokens": spent,
                          "seconds": seconds, "heldout": row, "curve": curve}  # fmt: skip
                file.write_text(json.dumps(record))
                print(
                    bits, seed, method, spent, f"{seconds:.0f} s", row["kl"]["value"], flush=True
                )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), [float(b) for b in sys.argv[4:]])
