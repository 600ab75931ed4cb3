"""What the weights of the objective buy by the table alone (nothing is searched): plans of the exact
solver for J with one weight at a time, measured on text that nothing was tuned on.

Usage: curve.py MODEL TEXT [BITS...] -> NAME-curve.csv and NAME-curve.png beside this file. Resumable.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.rows import write
from optimizer.commands.optimize import _pose
from optimizer.config import Optimize
from optimizer.data import domains
from optimizer.data import pairs as probes
from optimizer.data.text import Data
from optimizer.metrics import bootstrap, margins
from optimizer.metrics.divergence import Teacher
from optimizer.metrics.objective import Meaning
from optimizer.models.source import context_length
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Budget, Palette, digest
from optimizer.quantization.methods import bind
from optimizer.search import exact
from optimizer.stages import objective
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from optimizer.stages.table import measure_table

HERE = Path(__file__).parent
WEIGHTS = {
    "cvar": (0, 0.01, 0.03, 0.1, 0.3, 1, 3),
    "domain": (0, 0.1, 0.3, 1, 3, 10),
    "probes": (0, 0.1, 0.3, 1, 3, 10),
}
JUDGED = 16  # pairs of each cell, of the half that is not tuned on


class Judge:
    """Measures on held-out documents, the domains' other documents, and the probes' other half."""

    def __init__(self, session: Session, entries: list[str]) -> None:
        self.session, tokenizer = session, load_tokenizer(session.source.folder)
        parsed = [replace(d, half=1) for d in domains.parse(entries)]
        cuts = {d.name: domains.cut(d, tokenizer, 128, session.data).windows for d in parsed}
        self.texts = {"held-out": session.windows("heldout")}
        self.texts |= {name: cut for name, cut in cuts.items() if cut is not None}
        pairs = objective._in_turn(probes.halves(probes.built_in())[1])
        encoded = margins.encode(pairs, tokenizer, context_length(session.source.folder))
        self.jobs: list[Any] = [job for job in encoded if not isinstance(job, str)]
        self.teachers: dict[str, Teacher] = {}
        self.key = [session.source.fingerprint, [t.ids.tolist() for t in self.texts.values()],
                    [[job.good, job.bad] for job in self.jobs]]  # fmt: skip

    def measure(self, choice: dict[str, Any], quantizer: Any) -> dict[str, np.ndarray]:
        names = {name: p.name for name, p in choice.items()}

        def make() -> dict[str, np.ndarray]:
            net = self.session.model.net
            for name, text in self.texts.items():
                self.teachers.setdefault(name, Teacher(net, text))
            with self.session.model.rounded(quantizer.rounder(choice), choice):
                found = {n: t.score(net).kl for n, t in self.teachers.items()}
                return found | {"margins": margins.measure(net, self.jobs)}

        kept = self.session.store.arrays("scores", digest(["curve", self.key, names]), make)
        assert kept is not None
        return kept


def tails(kl: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """CVaR 0.99 in each resample."""
    return np.array([bootstrap.cvar(kl, count[None], 0.99).low for count in counts])


def row(found: Any, base: Any, reference: np.ndarray, documents: np.ndarray) -> dict[str, str]:
    """The measures, and mean and tail over those of weight 0, paired over held-out documents."""
    counts = bootstrap.resamples(documents, np.random.default_rng(0))[:300]
    once = np.ones((1, len(documents)), dtype=int)
    kl, old = found["held-out"], base["held-out"]
    out: dict[str, str] = {}
    for name, of in (("mean", lambda x, c: c @ x.mean(1) / c.sum(1)), ("cvar99", tails)):
        ratio = of(kl, counts) / of(old, counts)
        low, high = np.quantile(ratio, [0.025, 0.975])
        value = of(kl, once)[0]
        out |= {name: f"{value:.5f}", f"{name}_ratio": f"{value / of(old, once)[0]:.4f}",
                f"{name}_low": f"{low:.4f}", f"{name}_high": f"{high:.4f}"}  # fmt: skip
    texts = {n: float(x.mean()) for n, x in found.items() if n not in ("held-out", "margins")}
    worst = max(texts, key=lambda n: texts[n])
    use = reference > 0.5
    lost = np.clip(reference - found["margins"], 0, None)[use].mean()
    turned = (found["margins"][use] <= 0).mean()
    return out | {"worst_domain": worst, "worst_kl": f"{texts[worst]:.5f}",
                  "lost_margin": f"{lost:.4f}", "turned_over": f"{turned:.4f}"}  # fmt: skip


def main(model: str, text: str, bits: list[float]) -> None:
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    palette = Palette(bits=[2, 3, 4, 5, 6, 8], fit="nearest")
    data = Data(source="text", path=text)
    config = Optimize(model=model, budget=Budget(code_bits=4), palette=palette, data=data)
    session = Session.open(model, data, store)
    space, quantizer = search_space(config, session.inventory), bind(config.quantizer, session)
    plain = measure_table(session, config, space)
    entries = list(domains.BUILT_IN)
    judge = Judge(session, entries)
    reference = judge.measure({}, quantizer)["margins"]
    rows = []
    for size in bits:
        base = None
        for part, weights in WEIGHTS.items():
            for weight in weights:
                weighted: dict[str, Any] = {part: weight}
                config.budget = Budget(code_bits=size)
                config.meaning = Meaning(**weighted, domains=entries)
                loss = objective.losses(session, config, space, plain)
                problem = _pose(config, session.inventory, space, loss)
                choice = space.choice(exact.solve(problem))
                found = judge.measure(choice, quantizer)
                base = base or found
                own = row(found, base, reference, judge.texts["held-out"].documents)
                rows.append({"code_bits": size, "part": part, "weight": weight} | own)
                print(*rows[-1].values(), flush=True)
    name = Path(session.source.name).name
    write(HERE / f"{name}-curve.csv", rows)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [float(b) for b in sys.argv[3:]] or [3.5, 4])
