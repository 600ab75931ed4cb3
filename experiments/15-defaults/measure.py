"""Held-out KL against processor time, for ways and texts of making a plan of one size.

    measure.py MODEL SIZE,SIZE JUDGES OUT.csv SEEDS "TEXT: WAY"...

JUDGES: a folder of .txt files, documents separated by `---` (for an encoder: one text a line), none
of which any combination reads; each is one column of a row. TEXT: see texts.py; WAY: see WAYS. Time
is that of this process and its threads (one with OMP_NUM_THREADS=1), by stage; every text, way and
seed has a store of its own, and what a second size takes from it costs what it cost for the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import texts

from experiments.rows import append
from optimizer.commands import optimize
from optimizer.config import Optimize, Proof
from optimizer.data.documents import read_documents
from optimizer.data.text import Data, Part, Windows, encode, text_prefix
from optimizer.metrics.divergence import AnyTeacher, teacher
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Budget
from optimizer.quantization.methods import Gptq, Quantizer, Rtn, bind
from optimizer.search import Search
from optimizer.sensitivity import estimator as estimator_of
from optimizer.stages.session import Session
from optimizer.stages.view import View

COUNT, LENGTH = 4, 128  # windows of each judge
SEARCH = Part(sequences=64, length=128)
# name -> (quantizer, estimator, search space, windows of calibration, how many of them a table reads)
WAYS: dict[str, tuple[Quantizer, str, str, int, int | None]] = {
    "quick": (Rtn(), "fisher", "exact", 8, None),
    "rtn fisher 24": (Rtn(), "fisher", "exact", 24, None),
    "rtn fisher 64": (Rtn(), "fisher", "exact", 64, None),
    "rtn tokenwise": (Rtn(), "tokenwise", "exact", 64, None),
    "rtn moves": (Rtn(), "fisher", "moves", 64, None),
    "gptq gain 8": (Gptq(), "gain", "exact", 64, 8),
    "standard": (Gptq(), "gain", "exact", 64, 16),
    "gptq gain 32": (Gptq(), "gain", "exact", 64, 32),
    "gptq gain 64": (Gptq(), "gain", "exact", 64, None),
    "gptq 128, gain 16": (Gptq(), "gain", "exact", 128, 16),
    "gptq tokenwise": (Gptq(), "tokenwise", "exact", 64, None),
    "thorough": (Gptq(), "gain", "moves", 64, 16),
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


def judges(folder: Path, session: Session) -> dict[str, AnyTeacher]:
    """The reference on each file's first windows: one from a document, or batches of short texts."""
    found = {}
    for path in sorted(folder.glob("*.txt")):
        if session.encoder:
            part = Part(sequences=COUNT, length=LENGTH)
            few = Data(source="text", path=str(path), calibration=part, search=part, heldout=part)
            read = Session.open(session.source.name, few, str(session.store.root))
            found[path.stem] = teacher(session.model, read.windows("heldout"))
            continue
        tokenizer = load_tokenizer(session.source.folder)
        start, rows = text_prefix(tokenizer), []
        for text in read_documents(path, "text"):
            own = start + encode(tokenizer, text.strip())
            if len(own) >= LENGTH:
                rows.append(own[:LENGTH])
        ids = np.array(rows[:COUNT], dtype=np.int64)
        found[path.stem] = teacher(session.model, Windows(ids, np.arange(len(ids))), True)
    return found


class Costs:
    """What stages cost, kept in a file: a second size uses what the store holds of the first one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, float]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )

    def of(self, key: str, spent: dict[str, float]) -> dict[str, float]:
        """Seconds of every stage that plans of this key ever had, as it was when it was made."""
        known = self._known.setdefault(key, {})
        for stage, seconds in spent.items():
            known[stage] = max(known.get(stage, 0.0), seconds)
        self._path.write_text(json.dumps(self._known, indent=1))
        return dict(known)


def own_store(base: Session, key: str, folder: Path) -> str:
    """A store that holds the model and nothing that another way measured."""
    store = folder / "stores" / hashlib.sha256(key.encode()).hexdigest()[:12]
    store.mkdir(parents=True, exist_ok=True)
    for name in ("models", "hashes"):
        kept = base.store.root / name
        if kept.exists() and not (store / name).exists():
            (store / name).symlink_to(kept.resolve())
    return str(store)


def main(model: str, sizes: str, folder: str, out: str, seeds: str, *names: str) -> None:
    store, target = os.environ["MEZZOTINT_STORE"], Path(out)
    costs = Costs(target.with_suffix(".costs.json"))
    base = Session.open(model, Data(source="self"), store)
    truth = judges(Path(folder), base)
    for name in names:
        for seed in map(int, seeds.split(",")):
            for size in sizes.split(","):
                row = one(base, truth, costs, size, seed, name, target.parent)
                append(target, row)
                print({k: v for k, v in row.items() if k not in ("stages", "each")}, flush=True)


def one(
    base: Session,
    truth: dict[str, AnyTeacher],
    costs: Costs,
    size: str,
    seed: int,
    name: str,
    out: Path,
) -> dict[str, Any]:
    """A row: a plan, what each judge says of it, and its processor time."""
    source, _, way = name.partition(": ")
    quantizer, estimator, space, windows, some = WAYS[way]
    part = Part(sequences=windows, length=128)
    search = SEARCH if space != "exact" else texts.FEW
    data = texts.data(source, base, part, search, seed, out)
    key = f"{base.source.name} {source} {way} {seed}"
    store = own_store(base, key, out)
    clock = Clock()
    config = Optimize(
        model=base.source.name, budget=Budget(size=size), quantizer=quantizer, data=data, seed=seed,
        sensitivity=estimator_of(estimator)(chunks=8, windows=some), search=Search(space=space),
        store=store, proof=Proof(certify=False),
    )  # fmt: skip
    made = optimize.optimize(config, out / "run", clock).plan
    session = Session.open(base.source.name, data, store, clock, model=base.model)

    rounder = bind(quantizer, session).rounder(made.choice, joint=True)
    spent = costs.of(key, clock.end())
    row: dict[str, Any] = {
        "model": Path(base.source.name).name, "size": size, "text": source, "way": way, "seed": seed,
        "bytes": made.bytes["total"], "predicted": f"{made.predicted['kl']:.5f}",
        "seconds": f"{sum(spent.values()):.1f}",
    }  # fmt: skip
    each = {}
    with base.model.rounded(rounder, made.choice):
        for title, reference in truth.items():
            kl = reference.score(base.model.net).kl
            each[title] = [round(float(x), 6) for x in kl.reshape(len(kl), -1).mean(1)]
    means = {title: float(np.mean(values)) for title, values in each.items()}
    row["mean"] = f"{np.mean(list(means.values())):.5f}"
    return row | {"each": json.dumps(each), "stages": json.dumps(spent)}


if __name__ == "__main__":
    main(*sys.argv[1:])
