"""Searches on the measured loss at equal evaluated tokens, on the same windows, from the same
table; every final plan measured on held-out documents.

Usage: compare.py MODEL TEXT TOKENS OUT_FOLDER TERMS BUDGET... -> one JSON file per run in OUT_FOLDER;
runs whose file exists are skipped. TEXT is a file, or self. TERMS: blocks (rtn, budgets in code bits)
or all (everything in scope, gptq, budgets in MB). collect.py joins them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rows import stamped
from optimizer.certificate import comparison
from optimizer.commands import optimize
from optimizer.config import Optimize
from optimizer.data.text import Data
from optimizer.metrics import bootstrap
from optimizer.metrics.divergence import Teacher
from optimizer.plan import Budget, Palette
from optimizer.quantization.methods import Gptq, Rtn, bind
from optimizer.search import Problem, Search, exact, starts
from optimizer.sensitivity import Fisher
from optimizer.stages import refine, studies
from optimizer.stages.prefix import Prefix, Shortcut
from optimizer.stages.prepared import Prepared
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace, search_space
from optimizer.stages.table import measure_table

SEEDS = (0, 1, 2)
Found = tuple[np.ndarray, int, Sequence[tuple[float, float]]]  # plan, tokens spent, curve
FIRST = 4  # windows before a random plan may be dropped


class Meter:
    """Losses of plans on single search windows, counting evaluated tokens. windows: as many as
    ours are tried on."""

    def __init__(
        self,
        session: Session,
        space: SearchSpace,
        rounding: Any,
        teacher: Teacher,
        windows: int,
        limit: int,
    ) -> None:
        self.session, self.space, self.rounding, self.teacher = session, space, rounding, teacher
        self.windows = windows
        self.length = teacher.windows.ids.shape[1]
        self.spent, self.limit = 0, limit
        self.curve: list[tuple[int, float]] = []
        self.shortcut = Shortcut(session.model, teacher)

    def losses(self, plan: np.ndarray, windows: Iterable[int]) -> np.ndarray:
        self.rounding.set(self.space.choice(plan))
        own = Prefix(self.space.choice(plan))
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


def methods() -> Iterator[tuple[str, str]]:
    """(space, sampler), or another search and nothing."""
    yield "exact", ""
    yield "moves", "tpe"
    for space in ("multipliers", "directions"):
        for sampler in ("tpe", "gp", "cmaes"):
            yield space, sampler
    yield "layers", "tpe"
    yield "layers", "nsgaii"
    yield "evolution", ""
    yield "random", ""


class Race:
    """All methods on one model, text and table."""

    def __init__(self, model: str, text: str, tokens: int, terms: str) -> None:
        store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
        data = Data() if text == "self" else Data(source="text", path=text)
        self.tokens = tokens
        self.terms = terms
        own: dict[str, Any] = {"scope": ["all"], "quantizer": Gptq()}
        if terms == "blocks":  # as in the tables of 2026-11-24
            own = {"scope": ["blocks"], "quantizer": Rtn(), "sensitivity": Fisher()}
        palette = Palette(bits=[2, 3, 4, 5, 6, 8], fit="nearest")
        self.base = Optimize(
            model=model, budget=self.budget(4), palette=palette, data=data, store=store, **own
        )
        self.session = Session.open(model, data, store)
        self.space = search_space(self.base, self.session.inventory)
        self.table = measure_table(self.session, self.base, self.space)
        self.quantizer = bind(self.base.quantizer, self.session)
        self.teacher = Teacher(self.session.model.net, self.session.windows("search"))

    def budget(self, number: float) -> Budget:
        return Budget(code_bits=number) if self.terms == "blocks" else Budget(size=f"{number:g}MB")

    def run(self, bits: float, method: str, sampler: str, seed: int) -> dict[str, Any]:
        """The found plan on held-out documents, and how the search went."""
        config = replace(self.base, budget=self.budget(bits), seed=seed)
        problem = optimize._pose(config, self.session.inventory, self.space, self.table.loss)
        start = exact.solve(problem)
        began = time.process_time()
        if sampler:
            plan, spent, curve = self._ours(config, problem, start, method, sampler)
        elif method == "exact":
            plan, spent, curve = start, 0, []
        else:
            plan, spent, curve = self._other(config, problem, start, method)
        seconds = time.process_time() - began
        scores = self.session.score(self.space.choice(plan), "heldout", self.quantizer)
        counts = bootstrap.resamples(scores.documents, np.random.default_rng(0))
        row = {k: asdict(v) for k, v in comparison.describe(scores, counts).items()}
        found = {"bits": bits, "seed": seed, "method": f"{method} {sampler}".strip(),
                 "tokens": spent, "seconds": seconds, "heldout": row, "curve": curve}  # fmt: skip
        return stamped(found, config, self.tokens, method, sampler)

    def _ours(
        self, config: Optimize, problem: Problem, start: np.ndarray, space: str, sampler: str
    ) -> Found:
        search = Search(space=space, sampler=sampler, tokens=self.tokens)
        with tempfile.TemporaryDirectory() as folder:
            searching = replace(config, search=search)
            prepared = Prepared(self.session, searching, self.space, self.table)
            found = refine.refine(prepared, problem, start, Path(folder) / "journal")
        curve = [(row["tokens"], row["best"]) for row in found.history]
        return found.assignment, found.spent, curve

    def _other(self, config: Optimize, problem: Problem, start: np.ndarray, method: str) -> Found:
        with self.session.model.rounded(self.quantizer) as rounding:
            settings = Search(space="moves", tokens=self.tokens)
            used = studies.tried_on(settings, *self.teacher.windows.ids.shape)
            confirm = 4 * used * self.teacher.windows.ids.shape[1]  # as ours spends
            meter = Meter(self.session, self.space, rounding, self.teacher, used,
                          self.tokens + confirm)  # fmt: skip
            search = evolution if method == "evolution" else random
            plan = search(problem, starts.of_a_budget(problem, start), meter, config.seed)
        return plan, meter.spent, meter.curve


def main(model: str, text: str, tokens: int, out: Path, terms: str, budgets: list[float]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    race = Race(model, text, tokens, terms)
    for bits in budgets:
        for seed in SEEDS:
            for method, sampler in methods():
                name = f"{method}-{sampler}".strip("-")
                file = out / f"{bits:g}-{seed}-{tokens}-{name}.json"
                if file.exists() or (method == "exact" and seed):
                    continue
                record = race.run(bits, method, sampler, seed)
                file.write_text(json.dumps(record))
                print(bits, seed, name, record["tokens"], f"{record['seconds']:.0f} s",
                      record["heldout"]["kl"]["value"], flush=True)  # fmt: skip


if __name__ == "__main__":
    own = sys.argv
    main(own[1], own[2], int(own[3]), Path(own[4]), own[5], [float(b) for b in own[6:]])
