"""compare.html: the runs of a sweep on one page, their fronts in one chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from optimizer.errors import ConfigError, PlanError
from optimizer.plan import Plan
from optimizer.reports.html import chart, document
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
    lost = "".join(
        f"<p class=note><b>Not finished:</b> job {escape(name)} ({escape(asked)}).</p>"
        for name, asked in sweep.unfinished
    )
    models = ", ".join(dict.fromkeys(job.run.model for job in sweep.jobs))
    body = (
        f"<header><p class=over>Mezzotint sweep</p><h1>{escape(models)}</h1>{lost}</header>"
        f"<section><h2>Size against loss</h2>{_legend(sweep.jobs)}{_chart(sweep.jobs)}"
        "<p class=hint>Lines are predicted fronts, stars the chosen plans (measured where that was "
        "done). Runs with other calibration text or another model have other losses.</p></section>"
        f"<section><h2>Jobs</h2>{_table(sweep.jobs)}</section>"
    )
    return write_atomically(folder / PAGE, document(f"sweep: {models}", body, {}).encode())


def _legend(jobs: Sequence[Job]) -> str:
    keys = "".join(
        f'<li><svg viewBox="0 0 24 24" aria-hidden="true"><line class="look{i % LINES}" x1="1" '
        f'x2="23" y1="12" y2="12"/></svg>{escape(job.label)}</li>'
        for i, job in enumerate(jobs)
    )
    return f"<ul class=legend>{keys}</ul>"


def _chart(jobs: Sequence[Job]) -> str:
    points = [point for job in jobs for point in (*job.run.front, job.run.chosen)]
    x = chart.linear([p.bytes for p in points], chart.LEFT, chart.WIDTH - chart.RIGHT)
    losses = [chart.value(point) for point in points]
    y = chart.logarithmic(losses, chart.HEIGHT - chart.BOTTOM, chart.TOP)
    unit = " or ".join(sorted({job.run.unit for job in jobs}, reverse=True))
    body = [chart.axes(x, y, "bytes of the model's tensors", f"KL, nats per {unit}", chart.size)]
    for i, job in enumerate(jobs):
        line = [(p.bytes, p.predicted) for p in job.run.front]
        body.append(chart.path(x, y, line, f"look{i % LINES}"))
    for job in jobs:
        at = x.at(job.run.chosen.bytes), y.at(chart.value(job.run.chosen))
        body.append(chart.shape(-1, "chosen", *at))
    return chart.svg("front", f"The fronts of {len(jobs)} runs; numbers in the table.", body)


def _table(jobs: Sequence[Job]) -> str:
    speeds = speeds_of(jobs)
    names = ("job", "size", "bits", *speeds, "predicted KL", "held-out KL", "seconds", "report")
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    rows = (_row(job, [column[i] for column in speeds.values()]) for i, job in enumerate(jobs))
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>"
        f"{''.join(rows)}</tbody></table></div>"
    )


def speeds_of(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Columns of what is known of the chosen plans' speed; empty cells where a job didn't ask."""
    each = [speed_columns(job.run, [job.run.chosen]) for job in jobs]
    titles = dict.fromkeys(title for columns in each for title in columns)
    return {title: [columns.get(title, [""])[0] for columns in each] for title in titles}


def _row(job: Job, speeds: Sequence[str]) -> str:
    heldout = "not measured"
    if job.heldout:
        kl, low, high = (f"{v:.4f}" for v in job.heldout)
        heldout = f"{kl} <small>[{low}, {high}]</small>"
    cells = [
        chart.size(job.plan.bytes["total"]),
        f"{job.plan.effective_bits:.3f}",
        *speeds,
        chart.loss(job.run.chosen.predicted),
        heldout,
        f"{job.run.seconds:.0f}",
        f'<a href="./{escape(quote(job.folder))}/report.html">open</a>',
    ]
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr><th scope=row>{escape(job.label)}</th>{numbers}</tr>"
