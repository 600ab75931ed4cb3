"""Settings of the quantizer that are fixed by hand, as dimensions of one study: group sizes,
symmetric or not, GPTQ's damping, order and weighting, and how much dearer the lowest bits are.

Usage: settings.py MODEL TEXT SIZE TRIALS OUT.csv   e.g. settings.py smollm2 wiki.txt 60MB 30 out.csv
       settings.py apart MODEL TEXT SIZE,SIZE.. OUT.csv SETTING[+SETTING]..
                    what was found there (FOUND), some settings at a time; none: nothing changed
e.g. settings.py apart smollm2 wiki.txt 60MB,75MB apart.csv none damping damping+weighting
TEXT is a file, or self. Every trial is the exact optimum of its table at exactly the budget, rounded
jointly, measured on all search windows; the first is what the program does by itself. The best few are
measured on held-out text.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from compare import data_of

from experiments.rows import append
from optimizer.commands import effort, optimize
from optimizer.config import Optimize
from optimizer.plan import Budget, Palette
from optimizer.quantization.methods import Gptq, bind
from optimizer.search import exact
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from optimizer.stages.table import measure_table

BITS = [2, 3, 4, 5, 6, 8]
GROUPS = {"32": [32], "64": [64], "32 or 64": [32, 64]}
DEFAULT = {"groups": "64", "symmetric": False, "damping": 0.05, "order": "columns",
           "weighting": "alike", "low": 0.0}  # fmt: skip
FINALISTS = 3
FOUND: dict[str, dict[str, Any]] = {
    "none": {},
    "groups": {"groups": "32 or 64"},
    "damping": {"damping": 0.15},
    "weighting": {"weighting": "gradient"},
}
HELDOUT = {"self": 96}  # windows; a model that writes its own text is a small one


class Job:
    """One model and budget."""

    def __init__(self, model: str, text: str, size: str) -> None:
        store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
        data = data_of(text, HELDOUT.get(text, 24))
        base = Optimize(
            model=model, data=data, budget=Budget(size=size), quantizer=Gptq(), store=store
        )
        self.config = effort.reading(base)
        self.session = Session.open(model, self.config.data, store)

    def planned(self, params: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The plan's choice and what rounds it."""
        quantizer = Gptq(
            damping=params["damping"], order=params["order"], weighting=params["weighting"]
        )
        palette = Palette(
            bits=BITS,
            group_size=GROUPS[params["groups"]],
            symmetric=params["symmetric"],
            fit="nearest",
        )
        config = replace(self.config, quantizer=quantizer, palette=palette)
        config, _ = effort.settle(config, False, lambda: None)
        space = search_space(config, self.session.inventory, self.session.source.folder)
        table = measure_table(self.session, config, space)
        loss = table.loss.copy()
        for column, name in enumerate(space.columns):
            if name.startswith("int2"):
                loss[:, column] *= np.exp(params["low"])
        problem = optimize._pose(config, self.session.inventory, space, loss)
        return space.choice(exact.solve(problem)), bind(quantizer, self.session)

    def loss(self, params: dict[str, Any], part: str) -> tuple[float, float]:
        """Mean KL of the joint rounding and its standard error over windows."""
        choice, quantizer = self.planned(params)
        rounder = quantizer.rounder(choice)
        teacher = self.session.teacher(part)
        with self.session.model.rounded(rounder, choice):
            each = np.array(
                [
                    teacher.window(self.session.model.net, i)
                    for i in range(len(teacher.windows.ids))
                ]
            )
        return float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def asked(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "groups": trial.suggest_categorical("groups", list(GROUPS)),
        "symmetric": trial.suggest_categorical("symmetric", [False, True]),
        "damping": trial.suggest_float("damping", 0.003, 0.5, log=True),
        "order": trial.suggest_categorical("order", ["columns", "groups", "none"]),
        "weighting": trial.suggest_categorical("weighting", ["alike", "gradient", "fisher"]),
        "low": trial.suggest_float("low", -0.5, 2.0),
    }


def main(model: str, text: str, size: str, trials: int, out: Path) -> None:
    job = Job(model, text, size)
    sampler = optuna.samplers.TPESampler(seed=0, multivariate=True, n_startup_trials=8)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(DEFAULT)

    def row(number: int, params: dict[str, Any], part: str) -> float:
        began = time.monotonic()
        kl, stderr = job.loss(params, part)
        took = time.monotonic() - began
        figures = {"kl": f"{kl:.5f}", "stderr": f"{stderr:.5f}", "seconds": f"{took:.0f}"}
        append(out, {"trial": number, **params, "part": part, **figures}, model, size)
        print(number, params, part, f"{kl:.4f}", f"{took:.0f} s", flush=True)
        return kl

    study.optimize(lambda trial: row(trial.number, asked(trial), "search"), n_trials=trials)
    best = sorted(study.trials, key=lambda t: t.value or np.inf)[:FINALISTS]
    for trial in {t.number: t for t in [study.trials[0], *best]}.values():
        row(trial.number, trial.params, "heldout")


def apart(model: str, text: str, sizes: list[str], out: Path, changes: list[str]) -> None:
    """What the settings found are worth by themselves, and with others, on held-out text."""
    for changed in changes:
        params: dict[str, Any] = dict(DEFAULT)
        for one in changed.split("+"):
            params |= FOUND[one]
        for size in sizes:
            began = time.monotonic()
            kl, stderr = Job(model, text, size).loss(params, "heldout")
            figures = {"kl": f"{kl:.5f}", "stderr": f"{stderr:.5f}"}
            figures |= {"seconds": f"{time.monotonic() - began:.0f}"}
            name = Path(model).name
            append(out, {"model": name, "size": size, **params, **figures}, name, size)
            print(size, params, f"{kl:.4f}", flush=True)


if __name__ == "__main__":
    own = sys.argv[1:]
    if own[0] == "apart":
        apart(own[1], own[2], own[3].split(","), Path(own[4]), own[5:])
    else:
        main(own[0], own[1], own[2], int(own[3]), Path(own[4]))
