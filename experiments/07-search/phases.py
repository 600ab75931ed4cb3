"""Global, then local: a first share of the tokens in a space of few numbers, whose trials change many
groups at once; the rest in `moves`, from the best plans found, with all that was measured as evidence.

Both phases try plans on the same windows, a study each; `Local` measures nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from optimizer.quantization.methods import bind
from optimizer.search import Problem, Search, spaces
from optimizer.search.study import Study, Tried
from optimizer.search.surrogate import Seen
from optimizer.stages import refine, studies, trials
from optimizer.stages.beside import Beside
from optimizer.stages.prepared import Prepared

FINALISTS = 3  # of the first phase, from which the second begins


class Local(refine.Scout):
    """`moves` after another search of the same problem, on the same windows."""

    def continues(self, earlier: refine.Scout) -> None:
        """Begin from its best plans. A slope that it took at the start is evidence, too: one at the
        best plan is due as soon as that is another."""
        self.earlier = earlier.study.tried()
        self.fallback = earlier.fallback
        first = self.earlier[0].assignment
        fitting = [t for t in earlier.study.finished if self.problem.fits(t.assignment)]
        for tried in _different(sorted(fitting, key=lambda t: t.loss))[:FINALISTS]:
            self._known(tried, first)
        self.seen = len(self.study.tried())
        self.slopes = list(earlier.slopes)
        self.taken = [self.seen - refine.FRESH for _ in earlier.slopes]

    def _known(self, tried: Tried, first: np.ndarray) -> None:
        """A trial of the same losses, without tokens: they were counted in the first phase."""
        start = spaces.Start(
            spaces.moves_of(self.problem, tried.assignment, first), tried.assignment
        )
        self.study.begin([start])
        given = spaces.given(self.problem, tried.assignment)
        self.study.run(given, lambda _plan: enumerate(tried.each.tolist()), 0)

    def _seen(self, best: np.ndarray) -> list[Seen]:
        leader = self.leader.each
        found = super()._seen(best)
        there = {tried.assignment.tobytes() for tried in self.study.tried()}
        for tried in _different(self.earlier):
            gap = tried.each - leader[: len(tried.each)]
            if len(gap) > 1 and tried.assignment.tobytes() not in there:
                error = float(gap.std(ddof=1) / np.sqrt(len(gap)))
                found.append(Seen(tried.assignment, float(gap.mean()), error))
        return found


def _different(tried: Sequence[Tried]) -> list[Tried]:
    return list({t.assignment.tobytes(): t for t in reversed(tried)}.values())[::-1]


def search(
    prepared: Prepared,
    problem: Problem,
    start: np.ndarray,
    journal: Path,
    first: Search,
    share: float,
) -> tuple[np.ndarray, int, list[tuple[float, float]]]:
    """The plan, the tokens of both phases and of confirming, the curve. first: the first phase's
    space and sampler, and the tokens of both, of which it has `share`."""
    session, space, total = prepared.session, prepared.space, first.tokens
    windows, length = session.windows("search").ids.shape
    used = studies.tried_on(first, windows, length, problem.losses(start))
    config = replace(prepared.config, search=first)
    beside = Beside(session, config, space, used)
    quantizer = bind(config.quantizer, session)
    quantizer.prepare(space.offered)
    curve: list[tuple[float, float]] = []
    earlier: refine.Scout | None = None
    spent = 0
    for settings, until in ((first, int(share * total)), (Search(space="moves"), total)):
        phase = replace(settings, tokens=max(until - spent, 1))
        own = replace(config, search=phase)
        name = f"{studies.name(session, own, problem, beside, used)}-{first.space}-{total}-{share}"
        study = Study.open(phase, problem, name, journal, config.seed, session.view.note)
        kind = Local if earlier is not None else refine.Scout
        with session.model.rounded(quantizer) as rounding:  # a scout begins at the own weights
            scout = kind(replace(prepared, config=own), problem, study, rounding, beside)
            scout.aim(start)
            if isinstance(scout, Local):
                assert earlier is not None
                scout.continues(earlier)
            else:
                scout.seed(start)
            refine._search(session, phase, study, scout)
        curve += [(spent + row["tokens"], row["best"]) for row in trials.history(study)]
        spent += study.spent
        earlier = scout
    assert earlier is not None
    found = earlier.confirm(start)
    return found.assignment, spent + found.spent - study.spent, curve
