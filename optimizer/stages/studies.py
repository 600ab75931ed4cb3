"""What the workers of one search agree on: the study's name, on how many windows its trials are
measured, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optimizer.config import Optimize
from optimizer.plan import digest
from optimizer.quantization.methods import bind
from optimizer.search import Problem, Search
from optimizer.stages.beside import Beside
from optimizer.stages.session import Session
from optimizer.store import alone

VERSION = 6  # raised when trials can't be compared with older ones
FEWEST = 2  # windows on which trials are measured
WHOLE_TRIALS = 0.5  # whole trials that the tokens allow, over the windows of each
ENOUGH, MUCH = 16, 0.25  # windows that do where so many nats are lost, or more


@contextmanager
def in_turn(session: Session, settings: Search, key: Path) -> Iterator[None]:
    """A journal's study has one worker: the same command, given twice at once, waits for the other,
    then finds its trials and ends with its plan. Workers on a database share a study."""
    if settings.storage is not None:
        yield
        return
    with alone(
        key, lambda: session.view.note("another command is on this very search; waiting for it")
    ):
        yield


def tried_on(settings: Search, windows: int, length: int, loss: float) -> int:
    """How many search windows a trial is measured on: with more tokens both the windows and the
    trials grow, and a quarter of the windows at least is left to confirm the choice. loss: what is
    foretold for the plan that the search starts from. Where much is lost, plans differ by more than
    windows do, and more trials on ENOUGH windows find more; where less is lost, on more windows in
    proportion (experiments/07-search)."""
    most = windows // 2 if windows < 4 * FEWEST else 3 * windows // 4
    return min(max(FEWEST, affordable(settings, length, loss)), most)


def affordable(settings: Search, length: int, loss: float) -> int:
    """On how many windows the tokens allow trials."""
    enough = ENOUGH * max(1.0, MUCH / max(loss, 1e-9))
    return int(min((settings.tokens / length / WHOLE_TRIALS) ** 0.5, enough))


def name(session: Session, config: Optimize, problem: Problem, beside: Beside, used: int) -> str:
    """The study's name: everything that two workers must agree on to share their trials. used: windows
    of a trial."""
    from optimizer.search import samplers, spaces

    search = config.search
    content = [
        *(VERSION, spaces.VERSION, search.sampler, samplers.SETTINGS, search.prune, search.first),
        *(session.part_key("calibration"), session.part_key("search")),
        bind(config.quantizer, session).key,
        *(problem.groups, problem.columns, problem.limit, problem.unit, problem.free.tolist()),
        *(config.search.space, config.search.front, config.seed),
        used,
        *(config.meaning.name, beside.key),
        *([problem.third.name, problem.third.each.tolist()] if problem.third else []),
    ]
    return f"mezzotint-{config.search.space}-{digest(content)[:24]}"
