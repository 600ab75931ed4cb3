"""How near sixty votes bring learned weights to a judge's own, without the page.

cosines.py OUT.csv [SEEDS]

SEEDS judges a row answer as in simulate.py, with several costs of a typical difference and weights of
"alike", on drawn losses over 5 and over 10 kinds of text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simulate

from experiments.rows import write
from optimizer.data.domains import BUILT_IN
from optimizer.person import learning, statistics
from optimizer.person.judging import compare
from optimizer.person.settings import DOMAINS
from optimizer.person.votes import Vote

SURE = ((5.0, 0.5), (8.0, 1.0), (8.0, 2.0))
ASKED, JUDGES = 67, ("russian", "negation and numbers")


def votes(domains: Sequence[str], name: str, seed: int, sure: float, tie: float) -> list[Vote]:
    both = [simulate.made_up("even"), simulate.made_up("odd")]
    drawn = simulate.drawn(seed, ["even", "odd"], domains)
    asked = compare(both, drawn, ASKED, 0.1, f"{name} {seed}").questions
    unit, minds = simulate.scales(asked), simulate.MINDS[name]
    rng, found = np.random.default_rng(seed), []
    for i, question in enumerate(q for q in asked if not q.about.catch):
        row = simulate.costs(question.about)
        u = sure * sum(w * row.get(c, 0.0) / unit[c.family] for c, w in minds.items())
        p = np.exp(statistics.log_p(np.array([u]), tie))[0]
        choice = ("second", "alike", "first")[rng.choice(3, p=p / p.sum())]
        found.append(
            Vote(judge="me", session="s", question=str(i), about=question.about, choice=choice)  # type: ignore[arg-type]
        )
    return found


def main(out: str, seeds: str = "20") -> None:
    rows = []
    for domains in (DOMAINS, list(BUILT_IN)):
        for sure, tie in SURE:
            for name in JUDGES:
                found = []
                for seed in range(int(seeds)):
                    data = learning.data_of(votes(domains, name, seed, sure, tie))
                    belief = statistics.believed(
                        data.x, data.y, np.ones(len(data.y)), learning.prior_of(data.columns)
                    )
                    true = np.array([simulate.MINDS[name].get(c, 0.0) for c in data.columns])
                    length = np.linalg.norm(belief.weights) * np.linalg.norm(true)
                    found.append(float(belief.weights @ true / length) if length else 0.0)
                about = {"judge": name, "cost": sure, "alike": tie, "domains": len(domains)}
                said = {"judges": len(found), "mean": float(np.mean(found))}
                said |= {"quarter": float(np.quantile(found, 0.25)), "worst": min(found)}
                rows.append(about | said)
                print(rows[-1], flush=True)
    write(Path(out), rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
