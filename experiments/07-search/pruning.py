"""When should a trial stop early? Wilcoxon's test against the best plan, Hyperband, both or neither,
at equal evaluated tokens.

Usage: pruning.py MODEL TEXT OUT_FOLDER HELDOUT TOKENS BUDGET,BUDGET.. SEED,SEED..
       pruning.py rows OUT_FOLDER CSV     all runs there, over the table's optimum of results.csv
e.g. pruning.py stories260k self out 96 40000 2.5,3,4 0,1,2

Wilcoxon's test, the program's own rule, sees a trial's loss on each window beside the best plan's on
the same one. Hyperband (Li et al., JMLR 18, 2018; optuna's HyperbandPruner, halves, from 4 windows on)
sees the mean over the windows so far beside all other trials' at as many.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
from compare import Job, Race, measure, over_table, without_pictures
from optuna.pruners import HyperbandPruner
from scipy.stats import wilcoxon

from experiments.rows import write
from optimizer.search import Search
from optimizer.search.study import Study

RULES = {"neither": (False, False), "wilcoxon": (True, False), "hyperband": (False, True),
         "both": (True, True)}  # fmt: skip
METHODS = (("moves", "tpe"), ("multipliers", "gp"))
P, HALF = Search().prune, 2


def measured(
    study: Study, trial: optuna.Trial, losses: Iterator[tuple[int, float]], rule: tuple[bool, bool]
) -> tuple[list[float], bool]:
    """In place of Study._measure: the losses by window, and whether these are all windows."""
    test, halving = rule
    seen: list[float] = []
    for _, loss in losses:
        seen.append(loss)
        trial.report(float(np.mean(seen)), len(seen))
        if halving and trial.should_prune():
            return seen, False
        if test and _worse(study, seen):
            return seen, False
    return seen, True


def _worse(study: Study, seen: list[float]) -> bool:
    """As optuna's WilcoxonPruner decides."""
    best = study.best
    if best is None or len(seen) < study.search.first:
        return False
    gap = np.array(seen) - best.each[: len(seen)]
    if not gap.any() or gap.mean() <= 0:
        return False
    return bool(wilcoxon(gap, alternative="greater", zero_method="zsplit").pvalue < P)


def patch(name: str) -> None:
    """Trials of the next run stop by this rule."""
    test, halving = RULES[name]

    def own(
        study: Study, trial: optuna.Trial, losses: Iterator[tuple[int, float]]
    ) -> tuple[list[float], bool]:
        if halving and not isinstance(study.inner.pruner, HyperbandPruner):
            study.inner.pruner = HyperbandPruner(study.search.first, "auto", HALF)
        return measured(study, trial, losses, (test, halving))

    setattr(Study, "_measure", own)  # noqa: B010


def main(words: list[str]) -> None:
    if words[0] == "rows":
        write(Path(words[2]), over_table(Path(words[1]), "rule"))
        return
    model, text, out, heldout, tokens, budgets, seeds = words
    without_pictures()
    race = Race(model, text, "blocks", int(heldout))
    for seed in map(int, seeds.split(",")):
        for budget in map(float, budgets.split(",")):
            for method, sampler in METHODS:
                for rule in RULES:
                    job = Job("blocks", int(tokens), budget, seed, method, sampler)
                    folder = Path(out) / rule / Path(model).name
                    folder.mkdir(parents=True, exist_ok=True)
                    if not job.file(folder).exists():
                        patch(rule)
                        measure(race, job, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
