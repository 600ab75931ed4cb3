"""The parts of the objective J (`optimizer.metrics.objective`) that are not the mean KL, for the
windows that a search measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.config import Optimize
from optimizer.data.domains import Domain
from optimizer.data.text import Windows
from optimizer.stages.objective import cuts_of, jobs_of, own_head, worst
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace

if TYPE_CHECKING:
    from optimizer.metrics.divergence import Teacher

DOMAIN_WINDOWS = 16  # of a domain that a search reads
PAIRS = 96


CONFIRMED = 32  # windows that tell whether a plan is better, if there are as many


def confirming(used: int, windows: int) -> range:
    """Search windows that nothing reads before the choice, which they confirm. Trials read the first
    `used`; slopes all windows but these. As many as trials read, and where those are few, up to
    CONFIRMED, but for as many again for slopes: the choice is among the few that trials like best."""
    rest = max(used, min(CONFIRMED, windows - 2 * used))
    return range(max(used, windows - rest), windows)


class Beside:
    """What J adds to the loss of a search window: the KL of one window of the worst domain, or of one
    of each domain where they are summed, and the lost margins of some probes, so that the mean over
    the trials' windows has a domain's whole KL and the mean over the probes. The windows that confirm
    a choice get other documents and other probes.

    Made while the model holds its own weights. Cost of a window: `tokens`.
    """

    def __init__(self, session: Session, config: Optimize, space: SearchSpace, used: int) -> None:
        from optimizer.metrics.divergence import Teacher
        from optimizer.models.head import Predictor

        self.meaning, self.net, self.used = config.meaning, session.model.net, used
        self.rest = confirming(used, len(session.windows("search").ids))
        self.teachers: dict[Domain, Teacher] = {}
        if self.meaning.domain:
            for domain, cut in cuts_of(session, self.meaning.domains).items():
                some = Windows(*(x[_spread(len(x))] for x in (cut.ids, cut.documents)))
                own = session.model.own_head if own_head(session, space) else None
                self.teachers[domain] = Teacher(self.net, some, own)
        self.domain: Domain | None = None
        self.aim(0)
        self.jobs: list[Any] = []
        self.margins, self.each = np.zeros(0), np.zeros(0)
        if self.meaning.probes:
            self.jobs, self.margins, self.each = jobs_of(session, config, PAIRS)
            self.predict = Predictor(self.net)

    @property
    def key(self) -> list[Any]:
        """What two workers must agree on."""
        texts = [[d.name, d.weight, t.windows.ids.tolist()] for d, t in self.teachers.items()]
        counted = [] if (self.each == 1).all() else [self.each.tolist()]
        combined = [] if self.meaning.combine == "worst" else [self.meaning.combine]
        return [texts, [asdict(job) for job in self.jobs], *counted, *combined]

    @property
    def tokens(self) -> int:
        """Of one window, on average."""
        text = sum(self.teachers[domain].windows.ids.shape[1] for domain in self.counted)
        words = sum(len(job.good) + len(job.bad) for job in self.jobs) / 2
        return text + round(words / self.used)

    @property
    def counted(self) -> list[Domain]:
        """The domains whose KL is part of J now."""
        if self.meaning.combine == "sum":
            return list(self.teachers)
        return [] if self.domain is None else [self.domain]

    def choose(self) -> int:
        """The number of the domain that is worst with the weights that the model holds now."""
        if not self.teachers:
            return 0
        kl = [
            np.mean([t.window(self.net, i) for i in self._windows(t, True)])
            for t in self.teachers.values()
        ]
        return list(self.teachers).index(worst(list(self.teachers), np.array(kl)))

    def aim(self, number: int) -> None:
        """Let this one count as the worst."""
        self.domain = list(self.teachers)[number] if self.teachers else None

    @property
    def live(self) -> Callable[[int], Any] | None:
        """For slopes; None if there is nothing that has one."""
        return self.of if self.teachers or self.jobs else None

    def loss(self, window: int) -> float:
        """With the weights that the model holds now, nats."""
        import torch

        with torch.inference_mode():
            return float(self.of(window))

    def of(self, window: int) -> Any:
        """The same, as a scalar with a gradient if those are on."""
        import torch

        from optimizer.metrics import margins

        total: Any = torch.zeros(())
        trial = window < self.rest.start
        turn = (window if trial else window - self.rest.start) % self.used
        for domain in self.counted:
            teacher = self.teachers[domain]
            own = self._windows(teacher, trial)
            kl = teacher.divergence(self.net, own[turn % len(own)]).mean()
            total = total + self.meaning.domain * domain.weight * kl
        mine = list(range(0 if trial else 1, len(self.jobs), 2))
        some = mine[turn :: self.used]
        if some:
            now = margins.live(self.net, self.predict, [self.jobs[i] for i in some])
            lost = (torch.from_numpy(self.margins[some]).to(now.device) - now).clamp(min=0)
            each = torch.from_numpy(self.each[some]).to(now.device)
            share = self.used / self.each[mine].sum()
            total = total + self.meaning.probes * share * (each * lost).sum()
        return total

    def _windows(self, teacher: Any, trial: bool) -> range:
        count = len(teacher.windows.ids)
        return range(count - count // 2) if trial else range(count - count // 2, count)


def _spread(windows: int) -> np.ndarray:
    """DOMAIN_WINDOWS of them at most, from all documents."""
    return np.unique(np.linspace(0, windows - 1, min(windows, DOMAIN_WINDOWS)).round().astype(int))
