"""Held-out KL and flips of roundings and plans; appends a row per measurement to results.csv.

measure.py MODEL TEXT uniform METHOD BITS...          every layer at these bits
measure.py MODEL TEXT time METHOD                     seconds, all precisions at once and alone
measure.py MODEL TEXT plan METHOD TABLE BUDGET...     TABLE = estimator-quantizer, code bits
METHOD: rtn, rtn-clip, awq, gptq-ORDER[-clip][-reference]. Finished work is in the store.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optimizer import pipeline
from optimizer.bench import Bench, View, choices, make_quantizer, measure_table
from optimizer.config import Optimize, Palette, Quantizer
from optimizer.data import Data, Part
from optimizer.layer import Precision
from optimizer.plan import Budget
from optimizer.search import exact
from optimizer.sensitivity import Sensitivity

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = ["model", "method", "plan", "code_bits", "kl", "flips", "seconds"]
GROUP = {"smollm2": 64, "stories": 32}


def quantizer(method: str) -> Quantizer:
    name, *rest = method.split("-")
    if name == "rtn":
        return Quantizer(name="rtn", clip="clip" in rest)
    if name == "awq":
        return Quantizer(name="awq")
    return Quantizer(
        name="gptq",
        order=rest[0],
        clip="clip" in rest,
        inputs="reference" if "reference" in rest else "rounded",
    )


def configuration(model: str, text: str, method: str, estimator: str, bits: float) -> Optimize:
    return Optimize(
        model=model,
        budget=Budget(code_bits=bits),
        palette=Palette(group_size=GROUP[model]),
        quantizer=quantizer(method),
        data=Data(source="text", path=text, heldout=Part(sequences=12, length=256)),
        sensitivity=Sensitivity(estimator=estimator),
        store=os.environ["MEZZOTINT_STORE"],
    )


class Lines(View):
    def stage(self, text: str) -> None:
        print(text, flush=True)

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        begun = time.monotonic()
        yield from items
        print(f"{text}: {time.monotonic() - begun:.0f} s", flush=True)


def timing(model: str, text: str, method: str) -> None:
    """Seconds of rounding the first block, all six precisions from one Hessian and each alone."""
    from optimizer.gptq import Gptq
    from optimizer.stream import Stream

    config = configuration(model, text, method, "fisher", 8)
    bench = Bench(model, None, config.data, config.store, "cpu", Lines())
    settings, size = config.quantizer, GROUP[model]
    solver = Gptq(settings.damping, settings.order, settings.clip)
    stream = Stream(bench.model, bench.calibration())
    sets = stream.inputs(0)
    hessians = stream.hessians(0, sets)
    palette = [Precision("int", bits, size) for bits in (2, 3, 4, 5, 6, 8)]
    for name, chosen in (("all six", palette), *((p.name, [p]) for p in palette)):
        begun = time.process_time()
        for names, hessian in zip(sets, hessians, strict=True):
            solver.solve([(bench.model.weight(n), p) for n in names for p in chosen], hessian)
        seconds = time.process_time() - begun
        print(name, f"{seconds:.2f} s of processor time")
        keep([model, method, f"time of the first block at {name}", "", "", "", f"{seconds:.2f}"])


def main(model: str, text: str, kind: str, method: str, *rest: str) -> None:
    if kind == "time":
        timing(model, text, method)
        return
    estimator, _, scored_with = rest[0].partition("-") if kind == "plan" else ("fisher", "", "")
    config = configuration(model, text, scored_with or method, estimator, 8)
    bench = Bench(model, None, config.data, config.store, "cpu", Lines())
    chosen = choices(config, bench.inventory)
    rounder = make_quantizer(quantizer(method), bench)
    table = measure_table(bench, config, chosen) if kind == "plan" else None
    for value in rest[1:] if kind == "plan" else rest:
        if table is None:
            choice = {
                x.name: chosen.fitted[x.name, f"int{value}_g{GROUP[model]}"] for x in chosen.scope
            }
        else:
            own = configuration(model, text, scored_with, estimator, float(value))
            problem = pipeline._pose(own, bench.inventory, chosen, table.loss)
            choice = chosen.choice(exact.solve(problem))
        begun = time.monotonic()
        scores = bench.score(choice, "heldout", rounder)
        row = [model, method, rest[0] if table else "uniform", value, f"{scores.mean_kl:.6f}",
               f"{scores.flip.mean():.6f}", f"{time.monotonic() - begun:.1f}"]  # fmt: skip
        print(*row, flush=True)
        keep(row)


def keep(row: list[str]) -> None:
    """Replace the row of the same measurement; a repeated run leaves its first seconds."""
    rows = list(csv.reader(RESULTS.open())) if RESULTS.exists() else [FIELDS]
    if not any(old[:4] == row[:4] for old in rows):
        rows.append(row)
    with RESULTS.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([rows[0], *sorted(rows[1:])])


if __name__ == "__main__":
    main(*sys.argv[1:])
