"""Do the probes foretell what a plan does to other people's test sets, better than the mean KL does?

measure.py MODEL TEXT DATA [SECONDS]   measures the plans that are not in the store; stops after
                                       SECONDS (exit 75). DATA: a folder with blimp/, rublimp/,
                                       negation/, figqa/ and impli/, as their authors published them
measure.py MODEL TEXT DATA report      NAME-plans.csv and NAME.csv from the store, no model
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from experiments.rows import write
from optimizer.certificate import pairs as damage
from optimizer.commands.optimize import _pose
from optimizer.config import Optimize
from optimizer.data import pairs as probes
from optimizer.data.pairs import Pair
from optimizer.data.text import Data
from optimizer.metrics import margins
from optimizer.metrics.divergence import Scores, Teacher
from optimizer.models.source import context_length
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Budget, Palette, Precision, digest
from optimizer.quantization.methods import bind
from optimizer.search import exact
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from optimizer.stages.table import measure_table

HERE = Path(__file__).parent
PROBES = {"en": 8, "ru": 4}  # pairs of each phenomenon
SETS = {"blimp": 80, "rublimp": 54, "negation": 68, "figqa": 80, "impli": 48}
NEAR = {  # the probes that are about the same thing
    "blimp": [("agreement", "en"), ("anaphora", "en"), ("quantifiers", "en")],
    "rublimp": [("agreement", "ru"), ("aspect_tense", "ru"), ("negation", "ru")],
    "negation": [("negation", "en")],
    "figqa": [("idiom", "en"), ("irony", "en"), ("word_sense", "en")],
    "impli": [("idiom", "en"), ("word_sense", "en")],
}
WINDOWS, THRESHOLD, UNFINISHED, DRAWS = 16, 0.5, 75, 2000


# ---------------------------------------------------------------- the data sets as pairs


def blimp(folder: Path, file: str, group: str, count: int) -> list[Pair]:
    rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    by: dict[str, list[Any]] = {}
    for row in rows:
        by.setdefault(row[group], []).append(row)
    each = -(-count // len(by))
    name = folder.name
    return [
        Pair(f"{key} {i}", name, name, "", row["sentence_good"], row["sentence_bad"])
        for key, own in by.items()
        for i, row in enumerate(own[:each])
    ]


def negation(folder: Path) -> list[Pair]:
    found = []
    for file in ("NEG-136-SIMP.tsv", "NEG-136-NAT.tsv"):
        with (folder / file).open() as lines:
            for row in csv.DictReader(lines, delimiter="\t"):
                yes, no = row["target_aff"].strip(), row["target_neg"].strip()
                for i, (context, good, bad) in enumerate(
                    [(row["context_aff"], yes, no), (row["context_neg"], no, yes)]
                ):
                    ends = [f" {word}" for word in (good, bad)]
                    if "(a|an)" in context:
                        ends = [f" {'an' if w[0] in 'aeiou' else 'a'} {w}" for w in (good, bad)]
                    prefix = context.replace("(a|an)", "").strip()
                    name = f"{file} {row['item']} {i}"
                    found.append(Pair(name, "negation", "negation", prefix, *ends))
    return found


def figqa(folder: Path, count: int) -> list[Pair]:
    with (folder / "dev.csv").open() as lines:
        rows = list(csv.DictReader(lines))[:count]
    found = []
    for i, row in enumerate(rows):
        ends = [f" {row['ending1'].strip()}", f" {row['ending2'].strip()}"]
        good, bad = ends if row["labels"] == "0" else ends[::-1]
        prefix = row["startphrase"].strip().rstrip(".") + "."
        found.append(Pair(str(i), "figqa", "figqa", prefix, good, bad))
    return found


def impli(folder: Path, count: int) -> list[Pair]:
    """Premises that have a hypothesis which follows and one which doesn't."""
    by: dict[str, dict[bool, str]] = {}
    for line in (folder / "impli_manual.jsonl").read_text().splitlines():
        row = json.loads(line)
        by.setdefault(row["premise"].strip(), {}).setdefault(row["entails"], row["hypothesis"])
    both = [(text, ends) for text, ends in by.items() if len(ends) == 2]
    picked = [both[i] for i in np.linspace(0, len(both) - 1, count).astype(int)]
    return [
        Pair(str(i), "impli", "impli", _tidy(text) + " In other words,",
             " " + _tidy(ends[True]), " " + _tidy(ends[False]))
        for i, (text, ends) in enumerate(picked)
    ]  # fmt: skip


def _tidy(text: str) -> str:
    return re.sub(r"\s+([?.!,;:’'])", r"\1", text.strip())


# ---------------------------------------------------------------- plans


class Work:
    def __init__(self, model: str, text: str, folder: str) -> None:
        store, root = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint"), Path(folder)
        self.config = Optimize(
            model=model,
            budget=Budget(code_bits=4),
            palette=Palette(bits=[2, 3, 4, 5, 6, 8], fit="nearest"),
            data=Data(source="text", path=text),
            store=store,
        )
        self.session = Session.open(model, self.config.data, store)
        self.quantizer = bind(self.config.quantizer, self.session)
        own = [
            p
            for language, most in PROBES.items()
            for cell in _cells(probes.built_in([language])).values()
            for p in cell[:most]
        ]
        given = [
            *blimp(root / "blimp", "blimp_dev.jsonl", "UID", SETS["blimp"]),
            *blimp(root / "rublimp", "rublimp_dev.jsonl", "PID", SETS["rublimp"]),
            *negation(root / "negation"),
            *figqa(root / "figqa", SETS["figqa"]),
            *impli(root / "impli", SETS["impli"]),
        ]
        self.pairs = own + given
        encoded = margins.encode(
            self.pairs,
            load_tokenizer(self.session.source.folder),
            context_length(self.session.source.folder),
        )
        read = [(pair, job) for pair, job in zip(self.pairs, encoded, strict=True)
                if not isinstance(job, str)]  # fmt: skip
        self.pairs, self.jobs = [pair for pair, _ in read], [job for _, job in read]
        self.what = digest([self.session.source.fingerprint, [asdict(j) for j in self.jobs]])

    def plans(self) -> dict[str, dict[str, Precision]]:
        """Uniform ones, the table's optima, random mixtures, and some that are one-sided on
        purpose, so that a plan's KL doesn't say everything about it."""
        config = self.config
        space = search_space(config, self.session.inventory)
        table = measure_table(self.session, config, space)
        bits = [space.fitted[space.groups[0][0], c].bits for c in space.columns]
        found: dict[str, dict[str, Precision]] = {"reference": {}}
        rng = np.random.default_rng(13)
        for i, budget in enumerate((4, 3, 5, 3.5, 2.6, 4.5)):
            config.budget = Budget(code_bits=budget)
            problem = _pose(config, self.session.inventory, space, table.loss)
            found[f"table {budget}"] = space.choice(exact.solve(problem))
            if i < 5:
                uniform = space.choice(problem.uniform(bits.index((4, 3, 5, 6, 2)[i])))
                found[f"uniform {(4, 3, 5, 6, 2)[i]}"] = uniform
            if i < 4:
                for k in range(2):
                    plan = exact.random_plan(problem, rng)
                    found[f"random {budget} {k}"] = space.choice(plan)
        layers = {layer.name: layer for layer in space.scope}
        half = max(layer.block or 0 for layer in space.scope) // 2
        parts = {
            "attention 2": lambda x: 2 if "self_attn" in x.name else 6,
            "mlp 3": lambda x: 3 if "mlp" in x.name else 6,
            "early 3": lambda x: 3 if (x.block or 0) <= half else 6,
            "late 3": lambda x: 3 if (x.block or 0) > half else 6,
        }
        for name, of in parts.items():
            found[name] = {
                n: Precision("int", of(layer), 64).nearest(layer.cols)
                for n, layer in layers.items()
            }
        return found

    def margins(self, choice: dict[str, Precision], net: Any = None) -> Any:
        key = digest(["13", self.what, {k: p.name for k, p in choice.items()}])
        make = None if net is None else lambda: {"margins": margins.measure(net, self.jobs)}
        found = self.session.store.arrays("margins", key, make)
        return None if found is None else found["margins"]

    def score(self, choice: dict[str, Precision], net: Any = None, teacher: Any = None) -> Any:
        windows = self.session.windows("search").head(WINDOWS)
        key = digest(["13", self.session.source.fingerprint, windows.ids.tolist(),
                      {k: p.name for k, p in choice.items()}])  # fmt: skip
        make = None if net is None else lambda: teacher.score(net).arrays()
        found = self.session.store.arrays("scores", key, make)
        return None if found is None else Scores(**found)


def _cells(pairs: list[Pair]) -> dict[tuple[str, str], list[Pair]]:
    return {key: [p for p in pairs if p.cell == key] for key in probes.cells(pairs)}


def measure(work: Work, seconds: float) -> None:
    begun, teacher = time.monotonic(), None
    for name, choice in work.plans().items():
        if work.margins(choice) is not None and work.score(choice) is not None:
            continue
        if time.monotonic() - begun > seconds:
            sys.exit(UNFINISHED)
        model = work.session.model
        if teacher is None:
            teacher = Teacher(model.net, work.session.windows("search").head(WINDOWS))
        with model.rounded(work.quantizer.rounder(choice), choice):
            work.margins(choice, model.net)
            work.score(choice, model.net, teacher)
        print(name, f"{time.monotonic() - begun:.0f} s", flush=True)


# ---------------------------------------------------------------- report


def harm(reference: np.ndarray, own: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Of the informative pairs among `rows`: mean loss of margin, share turned over."""
    use = rows & damage.informative(reference, THRESHOLD)
    return {
        "loss": float((reference - own)[use].mean()),
        "flips": float((own[use] <= 0).mean()),
        "pairs": float(use.sum()),
    }


def correlations(
    x: np.ndarray, y: np.ndarray, given: np.ndarray
) -> tuple[list[float], list[float]]:
    """Rank correlation of x and y, and the partial one with `given` held fixed, each as (value, low,
    high): 95 % percentile bootstraps over plans."""
    rng = np.random.default_rng(0)
    index = np.vstack([np.arange(len(x)), rng.integers(len(x), size=(DRAWS, len(x)))])
    ranks = [rankdata(column[index], axis=1) for column in (x, y, given)]
    ranks = [r - r.mean(1, keepdims=True) for r in ranks]
    unit = [r / np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-12) for r in ranks]
    xy, xz, yz = ((unit[i] * unit[j]).sum(1) for i, j in ((0, 1), (0, 2), (1, 2)))
    beyond = (xy - xz * yz) / np.sqrt(np.maximum((1 - xz**2) * (1 - yz**2), 1e-9))
    found = [[v[0], *np.quantile(v[1:], [0.025, 0.975])] for v in (xy, beyond)]
    return found[0], found[1]


def report(work: Work) -> None:
    plans = {n: c for n, c in work.plans().items() if work.margins(c) is not None}
    reference = work.margins(plans.pop("reference"))
    cells = [pair.cell for pair in work.pairs]
    own = np.array([cell[1] in PROBES for cell in cells])
    masks = {"probes": own} | {
        f"probes {lang}": np.array([c[1] == lang for c in cells]) for lang in PROBES
    }
    masks |= {name: np.array([c == (name, name) for c in cells]) for name in SETS}
    masks |= {f"near {name}": np.array([c in NEAR[name] for c in cells]) for name in SETS}
    masks["all sets"] = ~own
    rows: list[dict[str, Any]] = []
    for name, choice in plans.items():
        margin, scores = work.margins(choice), work.score(choice)
        kl = np.sort(scores.kl.ravel())
        row = {"plan": name, "mean KL": scores.mean_kl,
               "CVaR 0.99": float(kl[-max(1, len(kl) // 100):].mean()),
               "top-1 flips": float(scores.flip.mean())}  # fmt: skip
        for key, mask in masks.items():
            row |= {f"{key}: {k}": v for k, v in harm(reference, margin, mask).items()}
        rows.append(row)
    model = Path(work.session.source.name).name
    write(HERE / f"{model}-plans.csv", [{k: _short(v) for k, v in row.items()} for row in rows])
    column = {key: np.array([row[key] for row in rows]) for key in rows[0] if key != "plan"}
    found = []
    for name in (*SETS, "all sets"):
        for what in ("loss", "flips"):
            target = column[f"{name}: {what}"]
            near = [f"near {name}: loss"] if name in SETS else []
            for predictor in ("mean KL", "CVaR 0.99", "top-1 flips", "probes: loss", "probes: flips",
                              "probes en: loss", "probes ru: loss", *near):  # fmt: skip
                plain, beyond = correlations(column[predictor], target, column["mean KL"])
                row = {"set": name, "damage": what, "predictor": predictor, "plans": len(rows)}
                row |= dict(zip(("spearman", "low", "high"), map(_short, plain), strict=True))
                if predictor != "mean KL":
                    names = ("beyond_kl", "beyond_low", "beyond_high")
                    row |= dict(zip(names, map(_short, beyond), strict=True))
                found.append(row)
    write(HERE / f"{model}.csv", found)


def _short(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else value


if __name__ == "__main__":
    rest, subject = sys.argv[4:], Work(*sys.argv[1:4])
    if rest == ["report"]:
        report(subject)
    else:
        measure(subject, float(rest[0]) if rest else float("inf"))
