"""Which measure sees damage first? Uniform plans of 8 to 3 bits, and the reference in bf16 as noise.

measure.py MODEL TEXT [SECONDS]   measures what is not in the store yet; stops after SECONDS (exit 75)
measure.py MODEL TEXT report      NAME.csv from the store, no model
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from experiments.rows import write
from optimizer.certificate import pairs as damage
from optimizer.data import domains
from optimizer.data import pairs as probes
from optimizer.data.domains import Domain
from optimizer.data.text import Data, Windows
from optimizer.metrics import margins
from optimizer.metrics.bootstrap import cvar, resamples
from optimizer.metrics.divergence import Scores, Teacher
from optimizer.models.source import context_length
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Precision, digest
from optimizer.quantization.methods import Rtn, bind
from optimizer.stages.session import Session

HERE = Path(__file__).parent
BITS = (8, 6, 5, 4, 3)
NOISE, REFERENCE = "bf16", "reference"
WEIGHTS = (REFERENCE, NOISE, *map(str, BITS))
PAIRS = {"en": 48, "ru": 16}  # of each phenomenon: Russian costs 2.7 times the tokens
THRESHOLD = 0.5  # nats; as `mezzotint probe`
EQUAL = 10_000  # tokens at which the measures are compared
UNFINISHED = 75


class Work:
    def __init__(self, model: str, text: str) -> None:
        store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
        self.session = Session.open(model, Data(source="text", path=text), store)
        self.quantizer = bind(Rtn(), self.session)
        tokenizer = load_tokenizer(self.session.source.folder)
        self.context = context_length(self.session.source.folder)
        self.texts: dict[str, Windows] = {"en": self.session.windows("heldout")}
        cut = domains.cut(Domain("russian"), tokenizer, 256, Data()).windows
        if cut is not None:
            self.texts["ru"] = cut
        self.pairs = [
            pair
            for language, most in PAIRS.items()
            for cell in _cells(probes.built_in([language])).values()
            for pair in cell[:most]
        ]
        encoded = margins.encode(self.pairs, tokenizer, self.context)
        known = [i for i, job in enumerate(encoded) if not isinstance(job, str)]
        self.pairs = [self.pairs[i] for i in known]
        self.jobs: list[Any] = [encoded[i] for i in known]

    @contextmanager
    def holding(self, weights: str) -> Iterator[Any]:
        bits = int(weights) if weights.isdigit() else 16
        choice = {
            layer.name: Precision("int", bits, 64).nearest(layer.cols)
            for layer in self.session.inventory.scoped(["blocks"])
            if bits < 16
        }
        low = torch.autocast("cpu", torch.bfloat16) if weights == NOISE else nullcontext()
        with self.session.model.rounded(self.quantizer.rounder(choice), choice), low:
            yield self.session.model.net

    def key(self, weights: str, part: Any) -> str:
        """part: a text's language or a cell of probes."""
        if isinstance(part, str):
            what: Any = self.texts[part].ids.tolist()
        else:
            what = [asdict(self.jobs[i]) for i in self.rows(part)]
        return digest(["12", self.session.source.fingerprint, what, weights])

    def score(self, weights: str, language: str, net: Any = None) -> Scores | None:
        """From the store, or with `net`, which holds these weights."""
        make = None if net is None else lambda: self.teachers[language].score(net).arrays()
        found = self.session.store.arrays("scores", self.key(weights, language), make)
        return None if found is None else Scores(**found)

    def margins(self, weights: str, cell: tuple[str, str], net: Any = None) -> Any:
        jobs = [self.jobs[i] for i in self.rows(cell)]
        make = None if net is None else lambda: {"margins": margins.measure(net, jobs)}
        found = self.session.store.arrays("margins", self.key(weights, cell), make)
        return None if found is None else found["margins"]

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        return {name: Teacher(self.session.model.net, cut) for name, cut in self.texts.items()}

    def rows(self, cell: tuple[str, str]) -> list[int]:
        return [i for i, pair in enumerate(self.pairs) if pair.cell == cell]


def _cells(pairs: list[probes.Pair]) -> dict[tuple[str, str], list[probes.Pair]]:
    return {key: [p for p in pairs if p.cell == key] for key in probes.cells(pairs)}


def measure(work: Work, seconds: float) -> None:
    begun = time.monotonic()
    for weights in WEIGHTS:
        texts = [] if weights == REFERENCE else list(work.texts)
        todo = [name for name in texts if work.score(weights, name) is None]
        cells = [c for c in _cells(work.pairs) if work.margins(weights, c) is None]
        if not todo and not cells:
            continue
        _ = work.teachers  # while the model holds its own weights
        with work.holding(weights) as net:
            for name in todo:
                work.score(weights, name, net)
            for cell in cells:
                if time.monotonic() - begun > seconds:
                    sys.exit(UNFINISHED)
                work.margins(weights, cell, net)
        print(weights, f"{time.monotonic() - begun:.0f} s", flush=True)


# ---------------------------------------------------------------- report


def excess(values: np.ndarray, units: np.ndarray) -> tuple[float, float, float]:
    """Mean, its standard error over units (documents, couples) and the one-sided p of "not above
    0" by Student's t."""
    sums = np.bincount(np.unique(units, return_inverse=True)[1], weights=values)
    sizes = np.bincount(np.unique(units, return_inverse=True)[1])
    n, mean = len(sums), sums.sum() / sizes.sum()
    error = float(np.sqrt(((sums - mean * sizes) ** 2).sum() * n / (n - 1)) / sizes.sum())
    return float(mean), error, float(student.sf(mean / max(error, 1e-12), n - 1))


def tail(one: Scores, noise: Scores, what: str) -> tuple[float, float, float]:
    """The same for measures that are no means: the error from 500 resamples of documents."""
    counts = resamples(one.documents, np.random.default_rng(0))[:500]

    def at(kl: np.ndarray, count: np.ndarray) -> float:
        if what == "CVaR 0.99":
            return cvar(kl, count[None], 0.99).low
        return float(np.quantile(np.repeat(kl, count, 0), 0.99))

    once = np.ones(len(one.kl), dtype=int)
    gaps = [at(one.kl, c) - at(noise.kl, c) for c in counts]
    value, error = at(one.kl, once) - at(noise.kl, once), float(np.std(gaps, ddof=1))
    p = student.sf(value / max(error, 1e-12), len(np.unique(one.documents)) - 1)
    return value, error, float(p)


def of_text(one: Scores, noise: Scores) -> dict[str, tuple[float, float, float]]:
    """measure -> excess over the noise. The ordinary ones last: perplexity and accuracy."""
    per = {
        "mean KL": one.kl - noise.kl,
        "1 - EAR": noise.ear - one.ear,
        "top-1 flips": one.flip - noise.flip,
        "log perplexity": one.nll - noise.nll,
        "accuracy lost": noise.hit - one.hit,
    }
    found = {name: excess(v.astype(float).mean(1), one.documents) for name, v in per.items()}
    return found | {name: tail(one, noise, name) for name in ("p99 KL", "CVaR 0.99")}


def of_probes(
    margin: np.ndarray, own: np.ndarray, noise: np.ndarray, couples: np.ndarray
) -> dict[str, tuple[float, float, float]]:
    """margin: the reference's; own, noise: with the other weights. Informative pairs only."""
    return {
        "margin: mean loss": excess(noise - own, couples),
        "margin: mean change": excess(np.abs(own - margin) - np.abs(noise - margin), couples),
        "margin: sign flips": excess((own <= 0) * 1.0 - (noise <= 0), couples),
    }


def report(work: Work) -> None:
    rows: list[list[Any]] = []
    cells = _cells(work.pairs)
    read = {c: sum(len(work.jobs[i].good) + len(work.jobs[i].bad) for i in work.rows(c))
            for c in cells}  # fmt: skip
    weights = [w for w in WEIGHTS[2:] if _whole(work, w)]
    for name in weights:
        for language in work.texts:
            one, least = (work.score(w, language) for w in (name, NOISE))
            assert one is not None and least is not None
            for measure_name, found in of_text(one, least).items():
                rows.append([name, measure_name, "text", language, *found, one.kl.size, 1, ""])
        per: dict[str, dict[Any, tuple[float, float, float]]] = {}
        for cell, pairs in [
            *cells.items(),
            *(_all(work, lang) for lang in PAIRS if any(c[1] == lang for c in cells)),
        ]:
            margin, own, noise = (_margin(work, w, cell) for w in (REFERENCE, name, NOISE))
            use = damage.informative(margin, THRESHOLD)
            if use.sum() < 8:
                continue
            couples = damage._couples([p for p, u in zip(pairs, use, strict=True) if u])
            for key, found in of_probes(margin[use], own[use], noise[use], couples).items():
                per.setdefault(key, {})[cell] = found
            per.setdefault("share of margin lost", {})[cell] = excess(
                (margin - own)[use] / margin[use].mean(), couples
            )
        for key, of_cell in per.items():
            single = [c for c in of_cell if c in cells]
            corrected = dict(
                zip(single, damage.holm([of_cell[c][2] for c in single]), strict=True)
            )
            for cell, found in of_cell.items():
                tokens = read[cell] if cell in read else sum(
                    n for c, n in read.items() if c[1] == cell[1]
                )  # fmt: skip
                holm = f"{corrected[cell]:.4g}" if cell in corrected else ""
                rows.append([name, key, *cell, *found, tokens, 0, holm])
    head = ("bits", "measure", "where", "language", "excess", "error", "p", "tokens", "z_equal",
            "p_holm")  # fmt: skip
    shown = []
    for row in rows:
        value, error, p, tokens = row[4:8]
        z = value / max(error, 1e-12) * (EQUAL / tokens) ** 0.5
        said = (*row[:4], f"{value:.6g}", f"{error:.3g}", f"{p:.3g}", tokens, f"{z:.2f}", row[9])
        shown.append(dict(zip(head, said, strict=True)))
    write(HERE / f"{Path(work.session.source.name).name}.csv", shown)


def _whole(work: Work, weights: str) -> bool:
    return all(work.margins(weights, c) is not None for c in _cells(work.pairs))


def _all(work: Work, language: str) -> tuple[tuple[str, str], list[probes.Pair]]:
    return ("all", language), [p for p in work.pairs if p.language == language]


def _margin(work: Work, weights: str, cell: tuple[str, str]) -> np.ndarray:
    if cell[0] != "all":
        return np.asarray(work.margins(weights, cell))
    parts = [c for c in _cells(work.pairs) if c[1] == cell[1]]
    return np.concatenate([work.margins(weights, c) for c in parts])


if __name__ == "__main__":
    rest, work = sys.argv[3:], Work(*sys.argv[1:3])
    if rest == ["report"]:
        report(work)
    else:
        measure(work, float(rest[0]) if rest else float("inf"))
