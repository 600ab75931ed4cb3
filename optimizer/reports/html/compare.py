"""compare.html: the runs of a sweep on one page, their fronts in one chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optimizer.errors import ConfigError, PlanError
from optimizer.plan import Plan
from optimizer.reports.html import chart, pages
from optimizer.reports.html.chart import Chart, Mark
from optimizer.reports.html.parts import speed_columns
from optimizer.reports.run import FILE, Run, overrides
from optimizer.store import write_atomically

PAGE = "compare.html"
LINES = 6  # looks of lines before they repeat; the last column of the table names them


@dataclass(frozen=True)
class Job:
    """A finished run of a sweep. label: what was asked of it and not of all others."""

    folder: str
    label: str
    plan: Plan
    run: Run

    @property
    def heldout(self) -> tuple[float, float, float] | None:
        """KL on held-out text with its interval, if it was measured."""
        if self.plan.proof is None:
            return None
        kl = self.plan.proof.own["kl"]
        return kl.value, kl.low, kl.high


@dataclass(frozen=True)
class Sweep:
    """jobs: finished, smallest plan first. unfinished: folders with a job but no whole result, with
    what was asked."""

    jobs: tuple[Job, ...]
    unfinished: tuple[tuple[str, str], ...]


def gather(folder: Path) -> Sweep:
    """All runs directly below `folder`. Raises ConfigError if there is none."""
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Give a sweep's: multirun/DAY/TIME")
    found: list[tuple[str, Plan, Run, list[str]]] = []
    unfinished = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if not (path / FILE).exists() and not (path / ".hydra").exists():
            continue
        try:
            plan, run = Plan.load(path), Run.load(path)
        except PlanError:
            unfinished.append((path.name, " ".join(_asked(path))))
            continue
        found.append((path.name, plan, run, _asked(path) or overrides(run.config)))
    if not found:
        raise ConfigError(
            f"A sweep's folder holds one folder per job, with {FILE} in each; {folder} has no "
            "finished one. Give the folder that `mezzotint optimize -m` wrote."
        )
    shared = set.intersection(*(set(words) for *_, words in found))
    jobs = [
        Job(name, " ".join(w for w in words if w not in shared) or run.model, plan, run)
        for name, plan, run, words in found
    ]
    return Sweep(tuple(sorted(jobs, key=lambda job: job.run.chosen.bytes)), tuple(unfinished))


def _asked(path: Path) -> list[str]:
    """The words of a job as they were typed, which Hydra noted."""
    file = path / ".hydra" / "overrides.yaml"
    lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def write(folder: Path) -> Path:
    """Write compare.html into the sweep's folder."""
    sweep = gather(folder)
    speeds = speeds_of(sweep.jobs)
    page = pages.render(
        "compare.html",
        "style.css",
        "page.js",
        models=", ".join(dict.fromkeys(job.run.model for job in sweep.jobs)),
        unfinished=sweep.unfinished,
        jobs=sweep.jobs,
        looks=LINES,
        fronts=_fronts(sweep.jobs),
        columns=(
            "job",
            "size",
            "bits",
            *speeds,
            "predicted KL",
            "held-out KL",
            "seconds",
            "report",
        ),
        rows=zip(sweep.jobs, zip(*speeds.values(), strict=True), strict=True),
        data={},
    )
    return write_atomically(folder / PAGE, page.encode())


def _fronts(jobs: Sequence[Job]) -> Chart:
    points = [point for job in jobs for point in (*job.run.front, job.run.chosen)]
    x, y = chart.axes([p.bytes for p in points], [chart.value(p) for p in points])
    unit = " or ".join(sorted({job.run.unit for job in jobs}, reverse=True))
    return Chart(
        "front",
        f"The fronts of {len(jobs)} runs; numbers in the table.",
        x,
        y,
        "bytes of the model's tensors",
        f"KL, nats per {unit}",
        chart.size,
        tuple(
            (f"look{i % LINES}", chart.line(x, y, ((p.bytes, p.predicted) for p in job.run.front)))
            for i, job in enumerate(jobs)
        ),
        tuple(
            Mark(-1, "chosen", x.at(plan.bytes), y.at(chart.value(plan)))
            for plan in (job.run.chosen for job in jobs)
        ),
    )


def speeds_of(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Columns of what is known of the chosen plans' speed; empty cells where a job didn't ask."""
    each = [speed_columns(job.run, [job.run.chosen]) for job in jobs]
    titles = dict.fromkeys(title for columns in each for title in columns)
    return {title: [columns.get(title, [""])[0] for columns in each] for title in titles}
