"""The certificate's own error rates. Everything but `score` needs seconds and no model.

measure.py score MODEL [TEXT]   scores of a pool of documents, kept in work/pool.npz
measure.py runs [ARM]           seeded certificates on resampled documents -> results.csv
measure.py topk MODEL [TEXT]    error of the top-K teacher -> topk.csv
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rows import read, stamped, write
from optimizer.certificate import equivalence
from optimizer.certificate.tolerance import Tolerance
from optimizer.certificate.wording import FEW, MAIN
from optimizer.data.text import Data, Part
from optimizer.metrics.bootstrap import per_document
from optimizer.metrics.divergence import COLUMNS, Scores, Teacher, TopTeacher
from optimizer.plan import Precision
from optimizer.quantization.methods import Rtn, bind
from optimizer.stages.session import Session
from optimizer.stages.view import View

HERE = Path(__file__).parent
WORK = HERE / "work"
POOL, LENGTH = int(os.environ.get("POOL", "96")), 96
RUNS, SIZES = 200, (8, 24, 96)
GROUP = {"smollm2": 64, "stories": 32}
# tolerances near the truth: at it both answers are wrong; beyond it power is put to the test
NEAR = {"border": 1.0, "a third above the tolerance": 0.75, "a quarter below it": 4 / 3}
PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
FIELDS = ["arm", "documents", "tolerated", "true", "lossy", "lossless", "promised", "pilot",
          "kl_decided"]  # fmt: skip


class Lines(View):
    def stage(self, text: str) -> None:
        print(text, flush=True)

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        items, begun = list(items), time.monotonic()
        for i, item in enumerate(items):
            yield item
            print(f"{text}: {i + 1}/{len(items)}, {time.monotonic() - begun:.0f} s", flush=True)


def opened(model: str, text: str | None) -> Session:
    few = Part(sequences=1, length=LENGTH)
    parts: dict[str, Any] = {
        "calibration": few,
        "search": few,
        "heldout": Part(sequences=POOL, length=LENGTH),
    }
    data = Data(source="text" if text else "self", path=text, **parts)
    return Session.open(model, data, os.environ["MEZZOTINT_STORE"], Lines())


def damages(session: Session, size: int) -> dict[str, dict[str, Precision]]:
    """Small known damages: one layer at 3 bits, four times; and a whole model at 8 for scale."""
    layers = [layer.name for layer in session.inventory.scoped(["blocks"])]
    last = max(layer.block for layer in session.inventory.layers if layer.block is not None)
    found: dict[str, dict[str, Precision]] = {}
    for block, part in zip((last // 2, 1, last // 2, last - 1), PARTS, strict=True):
        name = next(n for n in layers if f".{block}.{part}." in n)
        found[f"3 bits in {block}.{part}"] = {name: Precision("int", 3, size)}
    found["uniform 8 bits"] = dict.fromkeys(layers, Precision("int", 8, size))
    return found


def score(model: str, text: str | None = None) -> None:
    session = opened(model, text)
    windows = session.windows("heldout")
    teacher = Teacher(session.model.net, windows)
    session.view.stage("noise")
    pool = dict(teacher.noise(session.model.net))
    quantizer = bind(Rtn(), session)
    for name, choice in session.view.track(
        list(damages(session, GROUP[model]).items()), "damages"
    ):
        with session.model.rounded(quantizer.rounder(choice), choice):
            pool[name] = teacher.score(session.model.net)
    arrays = {
        f"{n}/{k}": getattr(s, k).astype(np.float32) for n, s in pool.items() for k in COLUMNS
    }
    WORK.mkdir(exist_ok=True)
    np.savez_compressed(WORK / "pool.npz", documents=windows.documents, **arrays)


def loaded() -> dict[str, Scores]:
    kept = np.load(WORK / "pool.npz")
    names = dict.fromkeys(key.rpartition("/")[0] for key in kept.files if "/" in key)
    return {
        name: Scores(**{k: kept[f"{name}/{k}"] for k in COLUMNS}, documents=kept["documents"])
        for name in names
    }


def drawn(pool: Scores, count: int, rng: np.random.Generator) -> Scores:
    """`count` documents with replacement, each draw a document of its own."""
    documents = np.unique(pool.documents)
    rows = [np.flatnonzero(pool.documents == d) for d in rng.choice(documents, count)]
    index = np.concatenate(rows)
    owners = np.concatenate([np.full(len(row), i) for i, row in enumerate(rows)])
    return Scores(**{k: getattr(pool, k)[index] for k in COLUMNS}, documents=owners)


def arm(name: str, pool: Scores, count: int, tolerated: Tolerance) -> dict[str, Any]:
    """RUNS certificates; how often KL was judged, and what the power estimate promised."""
    states, promises = [], []
    sums, sizes, _ = per_document(pool.kl, pool.documents)
    true = float(sums.sum() / sizes.sum())
    error = equivalence.ERROR / 3 if true > tolerated.kl else equivalence.INSIDE
    for run in range(RUNS):
        rng = np.random.default_rng([run, count])
        found = equivalence.judge_text(MAIN, drawn(pool, count, rng), tolerated, 3, run)
        kl = next(f for f in found if f.measure == "kl")
        whole = equivalence.state(found, count)
        states.append((whole == "lossy", whole == "lossless", kl.state))
        pilot = drawn(pool, 24, rng)
        few = per_document(pilot.kl, pilot.documents)[:2]
        promises.append(equivalence.power(*few, tolerated.kl, count, error))
    promised = equivalence.power(sums, sizes, tolerated.kl, count, error)
    kl_is = "over" if true > tolerated.kl else "within"
    rate = np.mean([s[2] == kl_is for s in states])
    lossy, lossless = (np.mean([s[i] for s in states]) for i in (0, 1))
    row = [name, count, f"{tolerated.kl:.6f}", f"{true:.6f}", f"{lossy:.3f}", f"{lossless:.3f}",
           f"{promised:.3f}", f"{np.median(promises):.3f}", f"{rate:.3f}"]  # fmt: skip
    print(*row, flush=True)
    return stamped(dict(zip(FIELDS, row, strict=True)), name, count, tolerated)


def runs(only: str = "") -> None:
    path = HERE / "results.csv"
    rows: list[dict[str, Any]] = [*read(path)] if only else []
    chosen = {name: pool for name, pool in loaded().items() if only in name}
    for name, pool in Lines().track(list(chosen.items()), "arms"):
        rows = [row for row in rows if not row["arm"].endswith(name)]
        for count in SIZES:
            assert count >= FEW
            rows.append(arm(name, pool, count, Tolerance()))
            for what, factor in NEAR.items() if pool.mean_kl > 1e-6 else ():
                near = Tolerance(kl=pool.mean_kl * factor, flips=0.999, accuracy=0.999)
                rows.append(arm(f"{what}: {name}", pool, count, near))
    write(path, rows)


def topk(model: str, text: str | None = None) -> None:
    session = opened(model, text)
    windows = session.windows("heldout").head(16)
    exact = Teacher(session.model.net, windows)
    tops = {k: TopTeacher(session.model.net, windows, k) for k in (32, 128, 512, 2048)}
    quantizer = bind(Rtn(), session)
    layers = [layer.name for layer in session.inventory.scoped(["blocks"])]
    names = ("bits", "k", "bytes", "bytes_exact", "kl", "kl_exact", "worst_token")
    rows: list[dict[str, Any]] = []
    hidden = sum(part.numel() * part.element_size() for part in exact._hidden)
    for bits in (8, 4):
        choice = dict.fromkeys(layers, Precision("int", bits, GROUP[model]))
        with session.model.rounded(quantizer.rounder(choice), choice):
            kl = exact.score(session.model.net).kl
            for k, top in tops.items():
                found = top.kl(session.model.net)
                row = (bits, k, top.bytes, hidden, f"{found.mean():.6f}", f"{kl.mean():.6f}",
                       f"{np.abs(kl - found).max():.6f}")  # fmt: skip
                rows.append(dict(zip(names, row, strict=True)))
                print(*row, flush=True)
    write(HERE / "topk.csv", rows)


if __name__ == "__main__":
    commands: dict[str, Any] = {"score": score, "runs": runs, "topk": topk}
    commands[sys.argv[1]](*sys.argv[2:])
