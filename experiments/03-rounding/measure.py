"""Held-out KL and flips of roundings and plans; appends a row per measurement to results.csv.

measure.py MODEL TEXT uniform METHOD BITS...          every layer at these bits
measure.py MODEL TEXT time METHOD                     seconds, all precisions at once and alone
measure.py MODEL TEXT plan METHOD TABLE BUDGET...     TABLE = estimator-quantizer, code bits
measure.py MODEL TEXT file METHOD TABLE BITS...       a plan of all layers, embeddings too, whose file
                                                      is no larger than with uniform BITS in the blocks
measure.py MODEL TEXT saved METHOD PLAN.json          a searched plan; METHOD only names the row
measure.py MODEL TEXT tokens - FOLDER                 the model and its calibration tokens for peers.py
measure.py MODEL TEXT given TOOL BITS FILE            weights that another tool rounded (peers.py)
MODEL: smollm2, stories, or the folder of stories260k (one scale a channel: its rows have no groups).
METHOD: rtn, rtn-clip, awq, gptq-ORDER[-clip][-reference][-gradient | -fisher][-loose]. Work is kept.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor

from experiments.rows import read, stamped, write
from optimizer.certificate.comparison import describe
from optimizer.commands import optimize
from optimizer.config import Optimize
from optimizer.data.text import Data, Part
from optimizer.metrics.bootstrap import resamples
from optimizer.plan import Budget, Palette, Plan, Precision, stored_bytes
from optimizer.quantization.methods import Awq, Gptq, Quantizer, Rtn, bind, of_plan
from optimizer.search import exact
from optimizer.sensitivity import estimator as estimator_of
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace, search_space
from optimizer.stages.table import measure_table
from optimizer.stages.view import View

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = ["model", "method", "plan", "code_bits", "kl", "flips", "seconds", "kl_low", "kl_high",
          "flips_low", "flips_high"]  # fmt: skip
GROUP = {"smollm2": 64, "stories": 32, "stories260k": 0}


def group_of(model: str) -> int:
    return GROUP[Path(model).name]


def quantizer(method: str) -> Quantizer:
    name, *rest = method.split("-")
    if name == "rtn":
        return Rtn(clip="clip" in rest)
    if name == "awq":
        return Awq()
    return Gptq(
        order=rest[0],
        clip="clip" in rest,
        inputs="reference" if "reference" in rest else "rounded",
        weighting=next((w for w in ("gradient", "fisher") if w in rest), "alike"),
        damping=0.01 if "loose" in rest else 0.05,
    )


def configuration(model: str, text: str, method: str, estimator: str, bits: float) -> Optimize:
    return Optimize(
        model=model,
        budget=Budget(code_bits=bits),
        palette=Palette(group_size=group_of(model)),
        quantizer=quantizer(method),
        data=Data(source="text", path=text, heldout=Part(sequences=12, length=256)),
        sensitivity=estimator_of(estimator)(),
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
    from optimizer.models.blockwise import Stream
    from optimizer.quantization.gptq import Solver

    config = configuration(model, text, method, "fisher", 8)
    session = Session.open(model, config.data, config.store, Lines())
    settings, size = config.quantizer, group_of(model)
    solver = Solver(settings.damping, settings.order, settings.clip)
    stream = Stream(session.model, session.calibration())
    sets = stream.inputs(0)
    hessians = stream.hessians(0, sets)
    palette = [Precision("int", bits, size) for bits in (2, 3, 4, 5, 6, 8)]
    for name, chosen in (("all six", palette), *((p.name, [p]) for p in palette)):
        begun = time.process_time()
        for names, hessian in zip(sets, hessians, strict=True):
            solver.solve([(session.model.weight(n), p) for n in names for p in chosen], hessian)
        seconds = time.process_time() - begun
        print(name, f"{seconds:.2f} s of processor time")
        keep([model, method, f"time of the first block at {name}", "", "", "", f"{seconds:.2f}"])


def main(model: str, text: str, kind: str, method: str, *rest: str) -> None:
    if kind == "time":
        timing(model, text, method)
    elif kind in ("plan", "file"):
        planned(model, text, method, *rest, whole=kind == "file")
    elif kind == "uniform":
        session = bench_of(model, text)
        space = search_space(configuration(model, text, "rtn", "fisher", 8), session.inventory)
        for bits in rest:
            choice = uniform(model, space, bits)
            score(session, bind(quantizer(method), session), choice, model, method, "uniform",
                  bits)  # fmt: skip
    elif kind == "saved":
        plan, session = Plan.load(rest[0]), bench_of(model, text)
        settings = {k: v for k, v in plan.quantizer.items() if k != "tokens"}
        rounder = bind(of_plan(settings), session)
        score(session, rounder, plan.choice, model, method, "searched", f"{plan.code_bits:.3g}")
    elif kind == "tokens":
        session = bench_of(model, text)
        np.save(Path(rest[0]) / "tokens.npy", session.calibration())
        (Path(rest[0]) / "folder").write_text(str(session.source.folder))
    else:
        given(model, text, method, *rest)


def uniform(model: str, space: SearchSpace, bits: str) -> dict[str, Precision]:
    column = Precision("int", int(bits), group_of(model) or None).name
    return {x.name: space.fitted[x.name, column] for x in space.scope}


def bench_of(model: str, text: str) -> Session:
    config = configuration(model, text, "rtn", "fisher", 8)
    return Session.open(model, config.data, config.store, Lines())


def planned(
    model: str, text: str, method: str, table_of: str, *budgets: str, whole: bool = False
) -> None:
    """whole: all layers are planned, and a budget is the file that has these bits in its blocks."""
    estimator, _, scored_with = table_of.partition("-")
    session = bench_of(model, text)
    config = configuration(model, text, scored_with, estimator, 8)
    blocks = search_space(config, session.inventory)
    config = replace(config, scope=["all"]) if whole else config
    space = search_space(config, session.inventory) if whole else blocks
    table = measure_table(session, config, space)
    for bits in budgets:
        size = (
            stored_bytes(session.inventory, uniform(model, blocks, bits))["total"] if whole else 0
        )
        budget = Budget(size=str(size)) if whole else Budget(code_bits=float(bits))
        problem = optimize._pose(
            replace(config, budget=budget), session.inventory, space, table.loss
        )
        choice = space.choice(exact.solve(problem))
        name = table_of + " file" * whole
        if whole:
            outside = {
                n: p.name for n, p in choice.items() if n not in uniform(model, blocks, bits)
            }
            used = stored_bytes(session.inventory, choice)["total"]
            print(f"{used} of {size} bytes; {outside}", flush=True)
        score(session, bind(quantizer(method), session), choice, model, method, name, bits)


def given(model: str, text: str, tool: str, bits: str, file: str) -> None:
    session = bench_of(model, text)
    with safe_open(file, framework="pt") as found:
        seconds = found.metadata()["seconds"]
        rounder = Foreign({name: found.get_tensor(name) for name in found.keys()}, tool)  # noqa: SIM118
    scope = session.inventory.scoped(["blocks"])
    assert {x.name for x in scope} == rounder.weights.keys()
    named = Precision("int", int(bits), group_of(model) or None)
    choice = {x.name: named for x in scope}
    score(session, rounder, choice, model, tool, "uniform", bits, seconds)


class Foreign:
    """Weights that another tool rounded, in a quantizer's place. Each is checked to lie on a grid of
    the promised size: at most 2^bits values in a group."""

    def __init__(self, weights: dict[str, Tensor], tool: str) -> None:
        self.weights = weights
        sums = [hashlib.sha256(w.numpy().tobytes()).hexdigest() for w in weights.values()]
        self.key = ["foreign", tool, sums]

    def rounder(self, choice: Any, joint: bool = True) -> Foreign:
        return self

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        own = self.weights[layer].view(
            weight.shape[0], -1, precision.group_size or weight.shape[1]
        )
        distinct = own.sort(-1).values.diff(dim=-1).ne(0).sum(-1).max() + 1
        assert distinct <= 2**precision.bits, (layer, distinct)
        return self.weights[layer]


def score(
    session: Session, rounder: Any, choice: Any, model: str, method: str, plan: str, bits: str,
    seconds: str | None = None,
) -> None:  # fmt: skip
    """Append the row of a choice. seconds: of the rounding elsewhere; else of rounding and reading."""
    begun = time.monotonic()
    scores = session.score(choice, "heldout", rounder)
    found = describe(scores, resamples(scores.documents, np.random.default_rng(0)))
    kl, flips = found["kl"], found["flips"]
    row = [model, method, plan, bits, f"{kl.value:.6f}", f"{flips.value:.6f}",
           seconds or f"{time.monotonic() - begun:.1f}",
           *(f"{x:.6f}" for x in (kl.low, kl.high, flips.low, flips.high))]  # fmt: skip
    print(*row, flush=True)
    keep(row)


def keep(row: list[str]) -> None:
    """Replace the row of the same measurement; a repeated run leaves its first seconds. Of a model's
    folder the name is kept."""
    values = [Path(row[0]).name, *row[1:]]
    new = dict(zip(FIELDS, values + [""] * (len(FIELDS) - len(values)), strict=True))
    rows = read(RESULTS)
    before = next((old for old in rows if all(old[k] == new[k] for k in FIELDS[:4])), None)
    if before is not None:
        new["seconds"] = before["seconds"]
        rows.remove(before)
    rows.append(stamped(new, *values[:4]))
    write(RESULTS, sorted(rows, key=lambda old: [old[k] for k in FIELDS]))


if __name__ == "__main__":
    main(*sys.argv[1:])
