"""Held-out KL against processor time, for ways of making a plan of one size.

    measure.py MODEL SIZE JUDGE OUT.csv COMBINATION...

JUDGE: a folder of .txt files, none of which any combination reads; each is one row's column. A
combination is written as in COMBINATIONS. Time is that of this process and its threads (one with
OMP_NUM_THREADS=1), by the stages' own names; a stage that the store already holds costs what it
cost when it was made, which is kept beside the results.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optimizer.commands import optimize
from optimizer.config import Optimize, Proof
from optimizer.data.documents import read_documents
from optimizer.data.text import Data, Part, encode, text_prefix
from optimizer.metrics.divergence import Teacher
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Budget
from optimizer.quantization.methods import Gptq, Quantizer, Rtn, bind
from optimizer.search import Search
from optimizer.sensitivity import estimator as estimator_of
from optimizer.stages.session import Bench, View

WINDOWS, LENGTH = 12, 256  # of each judge
ALIKE = Gptq(weighting="alike")
GRADIENT = Gptq(weighting="gradient")
# name -> (quantizer, estimator, search, windows of calibration, scope)
COMBINATIONS: dict[str, tuple[Quantizer, str, Search, int, str]] = {
    "blocks rtn fisher": (Rtn(), "fisher", Search(space="exact"), 64, "blocks"),
    "rtn fisher 16": (Rtn(), "fisher", Search(space="exact"), 16, "all"),
    "rtn fisher": (Rtn(), "fisher", Search(space="exact"), 64, "all"),
    "rtn moves": (Rtn(), "fisher", Search(space="moves"), 64, "all"),
    "gptq-alike fisher 32": (ALIKE, "fisher", Search(space="exact"), 32, "all"),
    "gptq-alike fisher": (ALIKE, "fisher", Search(space="exact"), 64, "all"),
    "gptq-alike gain 32": (ALIKE, "gain", Search(space="exact"), 32, "all"),
    "gptq-alike gain": (ALIKE, "gain", Search(space="exact"), 64, "all"),
    "gptq gain": (GRADIENT, "gain", Search(space="exact"), 64, "all"),
    "gptq-alike tokenwise": (ALIKE, "tokenwise", Search(space="exact"), 64, "all"),
    "gptq tokenwise": (GRADIENT, "tokenwise", Search(space="exact"), 64, "all"),
    "gptq moves": (GRADIENT, "tokenwise", Search(space="moves"), 64, "all"),
}


class Clock(View):
    """Processor seconds by stage."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._now, self._since = "start", time.process_time()

    def stage(self, text: str) -> None:
        self._enter(text)

    def _enter(self, text: str) -> None:
        now = time.process_time()
        self.spent[self._now] = self.spent.get(self._now, 0.0) + now - self._since
        self._now, self._since = text, now

    def note(self, text: str) -> None:
        print("   ", text[:160], flush=True)

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        before = self._now
        self._enter(text)
        yield from items
        self._enter(before)

    @contextmanager
    def meter(self, text: str, total: int) -> Iterator[Any]:
        before = self._now
        self._enter(text)
        yield lambda _done, _news: None
        self._enter(before)

    def end(self) -> dict[str, float]:
        self._enter("end")
        return {k: round(v, 2) for k, v in self.spent.items() if v > 0.05}


def judges(folder: Path, bench: Bench) -> dict[str, Teacher]:
    """The reference on each file's first windows, one from a document."""
    import numpy as np

    from optimizer.data.text import Windows

    tokenizer = load_tokenizer(bench.source.folder)
    start = text_prefix(tokenizer)
    found = {}
    for path in sorted(folder.glob("*.txt")):
        rows = []
        for text in read_documents(path, "text"):
            ids = start + encode(tokenizer, text.strip())
            if len(ids) >= LENGTH:
                rows.append(ids[:LENGTH])
        ids = np.array(rows[:WINDOWS], dtype=np.int64)
        found[path.stem] = Teacher(bench.model.net, Windows(ids, np.arange(len(ids))), True)
    return found


def main(model: str, size: str, folder: str, out: str, *names: str) -> None:
    store = os.environ["MEZZOTINT_STORE"]
    target, costs = Path(out), Path(out).with_suffix(".costs.json")
    known: dict[str, float] = json.loads(costs.read_text()) if costs.exists() else {}
    truth: dict[str, Teacher] = {}
    for name in names:
        source, _, how = name.partition(": ")
        quantizer, estimator, space, windows, scope = COMBINATIONS[how]
        calibration, search = Part(sequences=windows, length=128), Part(sequences=64, length=128)
        origin, _, path = source.partition("=")
        data = Data(source=origin, path=path or None, calibration=calibration, search=search)
        clock = Clock()
        config = Optimize(
            model=model, scope=scope, budget=Budget(size=size), quantizer=quantizer, data=data,
            sensitivity=estimator_of(estimator)(chunks=8), search=space, store=store,
            proof=Proof(certify=False),
        )  # fmt: skip
        made = optimize.optimize(config, target.parent / "run", clock).plan
        bench = Bench(model, None, data, store, "cpu", clock)
        rounder = bind(quantizer, bench).rounder(made.choice, joint=True)
        bench.model  # noqa: B018  (loaded here, so that no stage pays for it)
        spent = clock.end()
        for stage, seconds in spent.items():
            rounding = f"{quantizer.name} {quantizer.weighting}"
            key = f"{model} {source} {rounding} {estimator} {windows} {stage}"
            known[key] = max(known.get(key, 0.0), seconds)
            spent[stage] = known[key]
        costs.write_text(json.dumps(known, indent=1))
        truth = truth or judges(Path(folder), bench)
        row = {"model": Path(model).name, "text": source, "how": how, "bytes": made.bytes["total"],
               "predicted": f"{made.predicted['kl']:.5f}"}  # fmt: skip
        with bench.model.rounded(rounder, made.choice):
            for title, teacher in truth.items():
                scores = teacher.score(bench.model.net)
                row[title] = f"{scores.mean_kl:.5f}"
                if title == "wiki":
                    means = scores.kl.mean(1)
                    row["wiki_stderr"] = f"{means.std(ddof=1) / len(means) ** 0.5:.5f}"
        row["seconds"] = f"{sum(spent.values()):.1f}"
        row["stages"] = json.dumps(spent)
        new = not target.exists()
        with target.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
