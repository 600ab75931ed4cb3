"""Searches on the measured loss at equal evaluated tokens, on the same windows, from the same
table; every final plan measured on held-out documents.

Usage: compare.py MODEL TEXT TOKENS OUT_FOLDER TERMS BUDGET... -> one JSON file per run in OUT_FOLDER;
runs whose file exists are skipped. TEXT is a file, or self. TERMS: blocks (rtn, budgets in code bits)
or all (everything in scope, gptq, budgets in MB). sweep.py does the same in several processes;
collect.py joins the files.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import phases

from experiments.rows import read, stamped
from optimizer.certificate import comparison
from optimizer.commands import effort, optimize
from optimizer.config import Optimize
from optimizer.data.text import Data, Part
from optimizer.metrics import bootstrap
from optimizer.metrics.divergence import Teacher, teacher
from optimizer.plan import Budget, Palette
from optimizer.quantization.methods import Gptq, Rtn, bind
from optimizer.search import Problem, Search, exact, pictures, starts
from optimizer.sensitivity import Fisher
from optimizer.stages import refine, studies
from optimizer.stages.objective import own_head
from optimizer.stages.prefix import Prefix, Shortcut
from optimizer.stages.prepared import Prepared
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace, search_space
from optimizer.stages.table import measure_table
from optimizer.store import write_atomically

SEEDS = (0, 1, 2)
Found = tuple[np.ndarray, int, Sequence[tuple[float, float]]]  # plan, tokens spent, curve
THEN, SHARE = "+moves", 0.4  # of the tokens for a first space, see phases.py
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
    yield f"multipliers{THEN}", "gp"
    yield f"directions{THEN}", "cmaes"
    yield "evolution", ""
    yield "random", ""


@dataclass(frozen=True)
class Job:
    """One run. budget: code bits (terms=blocks) or MB (terms=all)."""

    terms: str
    tokens: int
    budget: float
    seed: int
    method: str
    sampler: str = ""

    @property
    def name(self) -> str:
        return f"{self.method} {self.sampler}".strip()

    def file(self, out: Path) -> Path:
        words = [self.terms, self.tokens, f"{self.budget:g}", self.seed, self.name]
        return out / f"{'-'.join(map(str, words)).replace(' ', '-')}.json"


def jobs(
    terms: str, tokens: int, budgets: Sequence[float], seeds: Sequence[int] = SEEDS
) -> Iterator[Job]:
    """All methods at all budgets with the first seed, then with the next: a time limit cuts seeds.
    The table's optimum has no seed and no tokens."""
    for seed in seeds:
        for budget in budgets:
            for method, sampler in methods():
                if method != "exact" or seed == seeds[0]:
                    yield Job(terms, tokens, budget, seed, method, sampler)


def data_of(text: str, heldout: int) -> Data:
    """text: a file, or self. heldout: windows that final plans are measured on."""
    part = Part(sequences=heldout, length=256)
    if text == "self":
        return Data(source="self", heldout=part)
    return Data(source="text", path=text, heldout=part)


class Race:
    """All methods on one model, text and table. heldout: windows that final plans are measured on."""

    def __init__(self, model: str, text: str, terms: str, heldout: int = 24) -> None:
        store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
        data = data_of(text, heldout)
        own: dict[str, Any] = {"scope": ["all"], "quantizer": Gptq()}
        if terms == "blocks":  # as in the tables of 2026-11-24
            own = {"scope": ["blocks"], "quantizer": Rtn(), "sensitivity": Fisher()}
        palette = Palette(bits=[2, 3, 4, 5, 6, 8], fit="nearest")
        budget = Budget(code_bits=4)
        self.base = Optimize(
            model=model, budget=budget, palette=palette, data=data, store=store, **own
        )
        self.base, _ = effort.settle(self.base, False, lambda: None)  # the quantizer's own table
        self.session = Session.open(model, data, store)
        self.space = search_space(self.base, self.session.inventory)
        self.table = measure_table(self.session, self.base, self.space)
        self.quantizer = bind(self.base.quantizer, self.session)
        head = own_head(self.session, self.space)
        self.teacher = teacher(self.session.model, self.session.windows("search"), head)

    def run(self, job: Job) -> dict[str, Any]:
        """The found plan on held-out documents, and how the search went."""
        size = (
            {"code_bits": job.budget} if job.terms == "blocks" else {"size": f"{job.budget:g}MB"}
        )
        config = replace(self.base, budget=Budget(**size), seed=job.seed)
        problem = optimize._pose(config, self.session.inventory, self.space, self.table.loss)
        start = exact.solve(problem)
        began = time.process_time()
        if job.sampler:
            plan, spent, curve = self._ours(config, problem, start, job)
        elif job.method == "exact":
            plan, spent, curve = start, 0, []
        else:
            plan, spent, curve = self._other(config, problem, start, job)
        seconds = time.process_time() - began
        scores = self.session.score(self.space.choice(plan), "heldout", self.quantizer)
        counts = bootstrap.resamples(scores.documents, np.random.default_rng(0))
        row = {k: asdict(v) for k, v in comparison.describe(scores, counts).items()}
        each = [
            float(scores.kl[scores.documents == d].mean()) for d in np.unique(scores.documents)
        ]
        found = asdict(job) | {"tokens_allowed": job.tokens, "tokens": spent, "seconds": seconds}
        found |= {"heldout": row, "documents": each, "plan": plan.tolist(), "curve": curve}
        return stamped(found, config, job.tokens, job.method, job.sampler)

    def _ours(self, config: Optimize, problem: Problem, start: np.ndarray, job: Job) -> Found:
        space = job.method.removesuffix(THEN)
        search = Search(space=space, sampler=job.sampler, tokens=job.tokens)
        with tempfile.TemporaryDirectory() as folder:
            searching = replace(config, search=search)
            prepared = Prepared(self.session, searching, self.space, self.table)
            journal = Path(folder) / "journal"
            if space != job.method:
                return phases.search(prepared, problem, start, journal, search, SHARE)
            found = refine.refine(prepared, problem, start, journal)
        curve = [(row["tokens"], row["best"]) for row in found.history]
        return found.assignment, found.spent, curve

    def _other(self, config: Optimize, problem: Problem, start: np.ndarray, job: Job) -> Found:
        self.quantizer.prepare(self.space.offered)
        with self.session.model.rounded(self.quantizer) as rounding:
            settings = Search(space="moves", tokens=job.tokens)
            assert isinstance(self.teacher, Teacher)
            windows, length = self.teacher.windows.ids.shape
            used = studies.tried_on(settings, windows, length, problem.losses(start))
            confirm = 4 * (windows - used) * length  # as ours spends at most
            meter = Meter(self.session, self.space, rounding, self.teacher, used,
                          job.tokens + confirm)  # fmt: skip
            search = evolution if job.method == "evolution" else random
            plan = search(problem, starts.of_a_budget(problem, start), meter, config.seed)
        return plan, meter.spent, meter.curve


def measure(race: Race, job: Job, out: Path) -> None:
    """Write the run's file, whole or not at all, and say what it found."""
    record = race.run(job)
    file = job.file(out)
    write_atomically(file, json.dumps(record).encode())
    print(file.stem, record["tokens"], f"{record['seconds']:.0f} s",
          f"{record['heldout']['kl']['value']:.4f}", flush=True)  # fmt: skip


def without_pictures() -> None:
    """They take seconds a run, and nobody looks at them."""
    setattr(pictures, "draw", lambda _study: {})  # noqa: B010


def over_table(out: Path, folder: str) -> list[dict[str, Any]]:
    """Rows of the runs OUT/*/MODEL/*.json, over the table's optimum of results.csv. folder: what the
    first folder's name says of a run."""
    table = {
        (row["model"], row["terms"], float(row["budget"])): float(row["kl_value"])
        for row in read(Path(__file__).parent / "results.csv")
        if row["method"] == "exact"
    }
    found = []
    for file in sorted(out.glob("*/*/*.json")):
        record = json.loads(file.read_text())
        kl = record["heldout"]["kl"]
        start = table[file.parent.name, record["terms"], record["budget"]]
        found.append({
            "model": file.parent.name, "budget": record["budget"],
            "tokens_allowed": record["tokens_allowed"], folder: file.parts[-3],
            "method": f"{record['method']} {record['sampler']}", "seed": record["seed"],
            "kl": f"{kl['value']:.4f}", "low": f"{kl['low']:.4f}", "high": f"{kl['high']:.4f}",
            "over_table": f"{kl['value'] / start:.3f}", "trials": len(record["curve"]),
            "tokens": record["tokens"], "commit": record["commit"], "config": record["config"],
        })  # fmt: skip
    return found


def main(model: str, text: str, tokens: int, out: Path, terms: str, budgets: list[float]) -> None:
    race = Race(model, text, terms)
    for job in jobs(terms, tokens, budgets):
        if not job.file(out).exists():
            measure(race, job, out)


if __name__ == "__main__":
    own = sys.argv
    main(own[1], own[2], int(own[3]), Path(own[4]), own[5], [float(b) for b in own[6:]])
