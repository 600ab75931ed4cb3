"""W&B: the only module that imports wandb. Called when a run is finished and all its files lie in
its folder, so that nothing that happens here can cost a result: failures become notes.

A record holds every measured plan as a row of a table, the held-out rows of the certificate as
another, charts that W&B draws itself, the heat map and shaded examples as small pages,
and the plan, the certificate and the run's files as versioned artifacts. Its id is the run's
content key: the same question about the same model continues the same record.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from optimizer.config import Wandb
from optimizer.plan import Plan
from optimizer.reports import html
from optimizer.reports.html import blur_example, chart
from optimizer.reports.run import Point, Run
from optimizer.store import write_atomically

INIT_SECONDS = 30  # online; after it the record is kept offline instead
FINISH_SECONDS = 120
SECONDS = {
    "online": INIT_SECONDS + FINISH_SECONDS + 30,
    "offline": 300,
}  # the latter needs no network
CERTIFICATE = "certificate.json"
NAME = re.compile(r"[^\w.-]+")  # artifact names: letters, digits, underscore, dash, dot


def record(plan: Plan, folder: Path, settings: Wandb, sweep: str | None = None) -> list[str]:
    """Record the finished run in `folder`; returns lines for the person who ran it.

    W&B works in a process of its own: whatever happens to it (no key, no network, a full disk, a
    crash, a hang), the run goes on, and so does the sweep that it belongs to.
    """
    notes: list[str] = []
    for mode in dict.fromkeys((settings.mode, "offline")):
        line, error = _attempt(folder, replace(settings, mode=mode), sweep)
        if error is None:
            return [*notes, line]
        notes.append(f"W&B, {mode}, could not record plan {plan.id}: {error}")
    return [*notes, "The run's own files are complete."]


def _attempt(folder: Path, settings: Wandb, sweep: str | None) -> tuple[str, str | None]:
    """(what it said, None) or ("", why not)."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    asked = json.dumps([str(folder), asdict(settings), sweep])
    command = [sys.executable, "-m", "optimizer.reports.wandb", asked]
    limit = SECONDS[settings.mode]
    try:
        code, out, said = _limited(command, os.environ | own, limit)
    except subprocess.TimeoutExpired:
        return "", f"it was not done after {limit} s."
    except OSError as error:
        return "", str(error)
    if code == 0:
        return out.strip().splitlines()[-1], None
    lines = [line for line in said.splitlines() if line.strip()]
    return "", lines[-1] if lines else f"exit code {code}."


def _limited(command: list[str], env: dict[str, str], limit: float) -> tuple[int, str, str]:
    """(exit code, output, errors). When the time is over, or this program is stopped, the process and
    all that it started end: W&B's own service holds the pipes and would go on trying."""
    with subprocess.Popen(  # noqa: S603  (this very program)
        command,
        stdin=subprocess.DEVNULL,  # W&B asks for a key where there is a terminal
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    ) as child:
        try:
            out, said = child.communicate(timeout=limit)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
        return child.returncode, out, said


def main(asked: str) -> None:
    """The other process."""
    folder, settings, sweep = json.loads(asked)
    wanted = Wandb(**settings)
    plan, run = Plan.load(folder), Run.load(Path(folder))
    live = _begin(plan, run, Path(folder), wanted, sweep)
    _log(live, plan, run, Path(folder))
    where = Path(live.settings.sync_dir)
    live.finish()
    if wanted.mode == "online":
        print(f"Recorded by W&B: {live.url}")
        return
    where = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where
    print(f"Recorded for W&B, offline: wandb sync {where}")


def _begin(plan: Plan, run: Run, folder: Path, settings: Wandb, sweep: str | None) -> Any:
    import wandb

    mode: Any = settings.mode
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        dir=folder,
        id=run.key,
        name=f"{Path(run.model).name}, {chart.size(run.chosen.bytes)}, {run.chosen.bits:.2f} bits",
        group=settings.group or sweep,
        job_type="optimize",
        tags=settings.tags or None,
        config=_config(plan, run),
        mode=mode,
        resume="allow" if mode == "online" else None,
        reinit="finish_previous",
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_stats=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        ),
    )


def _config(plan: Plan, run: Run) -> dict[str, Any]:
    """Everything that determines the result, and how to get it again."""
    return {
        **run.config,
        "fingerprint": plan.model.get("fingerprint"),
        "command": plan.provenance.get("command"),
        "versions": plan.provenance.get("versions"),
        "run_key": run.key,
    }


def _log(live: Any, plan: Plan, run: Run, folder: Path) -> None:
    import wandb

    plans = plan_table(run)
    log: dict[str, Any] = {"plans": plans, "front": front_chart(run)}
    log["predicted against measured"] = wandb.plot.scatter(
        plans, "predicted_kl", "kl", f"Predicted against measured KL, nats per {run.unit}"
    )
    if run.third is not None:
        column = {"read": "bytes_per_token", "time": "seconds_per_token",
                  "price": "price_of_a_million"}[run.third]  # fmt: skip
        title = f"{column} against measured KL, nats per token"
        log["third objective"] = wandb.plot.scatter(plans, column, "kl", title)
    log["heat map"] = wandb.Html(html.heat_document(plan), inject=False)
    if (folder / blur_example.FILE).exists():
        shaded = (folder / blur_example.FILE).read_text(encoding="utf-8")
        log["blur"] = wandb.Html(shaded, inject=False)
    if plan.certificate:
        log["certificate"] = certificate_table(plan.certificate)
    live.log(log)
    live.summary.update(_summary(plan, run))
    stem = NAME.sub("-", Path(run.model).name).strip("-.") or "model"
    certificate = write_atomically(
        folder / CERTIFICATE, (json.dumps(plan.certificate, indent=1) + "\n").encode()
    )
    for kind, files in (
        ("plan", [folder / "plan.json"]),
        ("certificate", [certificate]),
        (
            "report",
            [
                folder / name
                for name in (
                    "report.html",
                    "run.json",
                    "front.csv",
                    "measured.csv",
                    blur_example.FILE,
                )
            ],
        ),
    ):
        _artifact(live, f"{stem}-{kind}", kind, files, {"plan_id": plan.id, "run_key": run.key})


def _artifact(
    live: Any, name: str, kind: str, files: list[Path], metadata: dict[str, Any]
) -> None:
    import wandb

    artifact = wandb.Artifact(name[-128:], kind, metadata=metadata)
    for file in files:
        if file.exists():
            artifact.add_file(str(file))
    live.log_artifact(artifact)


# ---------------------------------------------------------------- tables


def plan_table(run: Run) -> Any:
    """A row per measured plan: who, bytes, bits, promise, and each measure with its interval."""
    import wandb

    points = [(p, role) for p, role in chart.shown(run) if role != "front"]
    measures = list(dict.fromkeys(key for point, _ in points for key in point.measures))
    columns: list[str | int] = ["plan", "role", "plan_id", "bytes", "bits", "bytes_per_token"]
    columns += ["seconds_per_token", "price_of_a_million", "predicted_kl"]
    for key in measures:
        columns += [key, f"{key}_low", f"{key}_high"]
    rows = [_plan_row(run, point, role, measures) for point, role in points]
    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


def _plan_row(run: Run, point: Point, role: str, measures: list[str]) -> list[Any]:
    row: list[Any] = [point.name, role, point.id, point.bytes, point.bits, point.moved]
    row += [point.seconds or None, run.price(point), point.predicted]
    for key in measures:
        row += _three(point.measures.get(key, {}))
    return row


def _three(interval: Mapping[str, float]) -> list[float | None]:
    return [interval.get(end) for end in ("value", "low", "high")]


def certificate_table(proof: Mapping[str, Any]) -> Any:
    """The held-out rows: plan, bytes, each measure with its interval."""
    import wandb

    measures = [key for key, value in proof["rows"][0].items() if isinstance(value, dict)]
    columns: list[str | int] = ["plan", "bytes"]
    for key in measures:
        columns += [key, f"{key}_low", f"{key}_high"]
    rows = [
        [row["name"], row["bytes"], *(v for key in measures for v in _three(row.get(key, {})))]
        for row in proof["rows"]
    ]
    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


def front_chart(run: Run) -> Any:
    """Size against loss as W&B's own lines. Its preset has linear axes, so the loss is its log10;
    a loss of zero has none and is left out."""
    import wandb

    shown = chart.shown(run)
    uniform = [p for p, role in shown if role == "uniform"]
    lines = {
        "predicted front": [(p.bytes, p.predicted) for p in run.front],
        "uniform, predicted": [(p.bytes, p.predicted) for p in uniform],
        "uniform, measured": [(p.bytes, p.measured or 0.0) for p in uniform],
        "chosen plan": [(run.chosen.bytes, run.chosen.measured or run.chosen.predicted)],
    }
    xs: list[list[float]] = []
    ys: list[list[float]] = []
    keys: list[str] = []
    for name, values in lines.items():
        usable = [(size, math.log10(loss)) for size, loss in sorted(values) if loss > 0]
        if usable:
            keys.append(name)
            xs.append([size / 1e6 for size, _ in usable])
            ys.append([loss for _, loss in usable])
    title = f"log10 of KL (nats per {run.unit}) against size"
    return wandb.plot.line_series(xs=xs, ys=ys, keys=keys, title=title, xname="MB")


def _summary(plan: Plan, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {
        "plan_id": plan.id,
        "bytes": plan.bytes["total"],
        "bits": plan.effective_bits,
        "predicted_kl": plan.predicted["kl"],
        "seconds": run.seconds,
        "notes": list(run.notes),
    }
    found |= {f"prediction.{key}": value for key, value in run.prediction.items()}
    if plan.certificate:
        found["verdict"] = plan.certificate["verdict"]
        row = plan.certificate["rows"][0]
        for key, value in row.items():
            if isinstance(value, dict):
                found[f"heldout.{key}"] = value["value"]
    return found


if __name__ == "__main__":
    main(sys.argv[1])
