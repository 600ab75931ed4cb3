"""The process beside a run, which alone imports wandb: nothing that happens here (no key, no network,
a full disk, a crash, a hang) can cost a result. It is started as
`python -m optimizer.reports.wandb.beside ASKED PID`, ends with the process PID, also when that is
killed, and takes W&B's own service with it.

A record holds the table's progress and every trial while the run works; at its end every measured
plan as a row of a table, the held-out rows of the certificate as another, charts that W&B draws
itself, the heat map and shaded examples as small pages, and the plan, the certificate and the run's
files as versioned artifacts. Its id is the run's content key: the same question about the same model
continues the same record.
"""

from __future__ import annotations

import csv
import http.client
import json
import math
import os
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimizer.config import Wandb
from optimizer.plan import Plan
from optimizer.reports import html
from optimizer.reports.html import blur_example, chart
from optimizer.reports.run import Run
from optimizer.reports.wandb import Sheets, events, front, kill, tables
from optimizer.store import write_atomically

REACH_SECONDS = 20  # until W&B's host answers, before it is taken for out of reach
INIT_SECONDS = 15  # online; after it the record is kept offline instead
FINISH_SECONDS = 20
GRACE_SECONDS = 30  # until the record of a run that was killed is closed
LOOK_SECONDS = 0.5
DRAW_SECONDS = 60.0  # between two drawings of the front while a search works
CERTIFICATE = "certificate.json"
SEARCH = "search.csv"
CHART = "front.vega.json"
NAME = re.compile(r"[^\w.-]+")  # artifact names: letters, digits, underscore, dash, dot


def main(asked: str, parent: str) -> None:
    """asked: JSON, {follow, folder} or {record}, with settings and sweep."""
    what, pid = json.loads(asked), int(parent)
    settings, sweep = Wandb(**what["settings"]), what["sweep"]
    if "follow" in what:
        _watch(pid, GRACE_SECONDS)
        _follow(Path(what["follow"]), Path(what["folder"]), settings, sweep, pid)
        return
    _watch(pid, 0)
    folder = Path(what["record"])
    if folder.is_file():
        live = _log_sheets(Sheets(**json.loads(folder.read_text(encoding="utf-8"))), settings)
    else:
        plan, run = Plan.load(folder), Run.load(folder)
        about = {"key": run.key, "model": run.model, "config": run.config}
        live = _begin(about, folder, settings, sweep)
        _log(live, plan, run, folder)
        for trial in trials(folder):
            live.log(trial)
    _end(live, settings)


def _watch(parent: int, grace: float) -> None:
    """In the background: when the run is gone, also by kill -9, this process and all that it started
    are, too, after `grace` seconds."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        time.sleep(grace)
        kill(os.getpid())

    threading.Thread(target=look, daemon=True).start()


def _follow(file: Path, folder: Path, settings: Wandb, sweep: str | None, parent: int) -> None:
    source = events.read(file, lambda: os.getppid() != parent)
    begun = next(source)["begin"]
    live, settings = _open(begun, folder, settings, sweep)
    growing, complete = Growing(live), False
    for event in source:
        growing.take(event)
        complete = event.get("end", False)
    if complete:
        _log(live, Plan.load(folder), Run.load(folder), folder, growing.trials)
        _end(live, settings)
    else:
        live.finish(exit_code=1)
    file.unlink(missing_ok=True)


def _open(
    begun: dict[str, Any], folder: Path, settings: Wandb, sweep: str | None
) -> tuple[Any, Wandb]:
    """The record as it was wanted, or kept offline, where W&B can't be reached."""
    import wandb

    if settings.mode == "online":
        error = _silence()
        if error is None:
            try:
                return _begin(begun, folder, settings, sweep), settings
            except (wandb.Error, OSError) as failure:
                error = _last(str(failure))
                wandb.teardown()
        print(f"W&B, online, could not record this run: {error}")
    offline = replace(settings, mode="offline")
    return _begin(begun, folder, offline, sweep), offline


def _last(said: str) -> str:
    return ([""] + [line for line in said.splitlines() if line.strip()])[-1]


class Growing:
    """A record while its run works. trials: (bytes, loss, name) of each."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self.trials: list[tuple[float, float, str]] = []
        self._plans: dict[str, list[tuple[float, float, str]]] = {}
        self._drawn = -math.inf
        live.define_metric("trial/*", step_metric="trial/tokens")

    def take(self, event: dict[str, Any]) -> None:
        if "plans" in event:
            for kind, points in event["plans"].items():
                self._plans[kind] = [(size, loss, kind) for size, loss in points]
            self._draw()
        elif "row" in event:
            self._row(event["row"], dict(event["values"]))

    def _row(self, kind: str, values: dict[str, Any]) -> None:
        memory = {key: values.pop(key) for key in [*values] if key.startswith("memory")}
        self._live.log({f"{kind}/{key}": value for key, value in values.items()} | memory)
        if kind == "trial":
            self.trials.append((values["bytes"], values["loss"], f"trial {len(self.trials)}"))
            if time.monotonic() - self._drawn >= DRAW_SECONDS:
                self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._live.log({"front": front.chart(self._plans | {"trial": self.trials})})


def _end(live: Any, settings: Wandb) -> None:
    where = Path(live.settings.sync_dir)
    live.finish()
    if settings.mode == "online":
        print(f"Recorded by W&B: {live.url}")
        return
    where = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where
    print(f"Recorded for W&B, offline: wandb sync {where}")


def _silence() -> str | None:
    """Why W&B's host can't be asked; None if it answers. Any answer will do, a refusal, too: what it
    means is for W&B to say."""
    import wandb

    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    host = settings.base_url
    try:
        with urllib.request.urlopen(host, timeout=REACH_SECONDS):  # noqa: S310  (the user's own)
            return None
    except urllib.error.HTTPError:
        return None
    except TimeoutError:
        return f"{host} didn't answer within {REACH_SECONDS} s."
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # W&B has settings of its own for that
            return None
        return f"{host} doesn't answer ({reason})."


def _begin(about: dict[str, Any], folder: Path, settings: Wandb, sweep: str | None) -> Any:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        dir=folder,
        id=about["key"],
        name=Path(about["model"]).name,
        group=settings.group or sweep,
        job_type="optimize",
        config={**about["config"], "run_key": about["key"]},
        resume="allow" if settings.mode == "online" else None,
        **_common(settings),
    )


def _common(settings: Wandb) -> dict[str, Any]:
    """What every record is begun with."""
    import wandb

    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_disable_stats=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )
    about = {key: getattr(settings, key) for key in ("project", "entity", "mode")}
    return about | {"tags": settings.tags or None, "reinit": "finish_previous", "settings": quiet}


def _log_sheets(sheets: Sheets, settings: Wandb) -> Any:
    import wandb

    live = wandb.init(
        dir=sheets.folder,
        name=sheets.name,
        job_type=sheets.kind,
        group=settings.group,
        **_common(settings),
    )
    for name, (columns, rows) in sheets.tables.items():
        live.log({name: wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)})
    files = [Path(file) for file in sheets.files]
    _artifact(live, NAME.sub("-", sheets.name).strip("-."), sheets.kind, files, {})
    return live


def _log(
    live: Any,
    plan: Plan,
    run: Run,
    folder: Path,
    tried: Sequence[tuple[float, float, str]] = (),
) -> None:
    """Everything that a finished run has. tried: trials, for the front."""
    import wandb

    size = chart.size(run.chosen.bytes)
    live.name = f"{Path(run.model).name}, {size}, {run.chosen.bits:.2f} bits"
    live.config.update(_provenance(plan), allow_val_change=True)
    plans = tables.plan_table(run)
    points = tables.front_plans(run) | ({"trial": tried} if tried else {})
    log: dict[str, Any] = {"plans": plans, "front": front.chart(points, run.unit)}
    log["predicted against measured"] = wandb.plot.scatter(
        plans, "predicted_kl", "kl", f"Predicted against measured KL, nats per {run.unit}"
    )
    if run.third is not None:
        column = {
            "read": "bytes_per_token",
            "time": "seconds_per_token",
            "price": "price_of_a_million",
        }[run.third]
        title = f"{column} against measured KL, nats per token"
        log["third objective"] = wandb.plot.scatter(plans, column, "kl", title)
    log["heat map"] = wandb.Html(html.heat_document(plan), inject=False)
    if (folder / blur_example.FILE).exists():
        shaded = (folder / blur_example.FILE).read_text(encoding="utf-8")
        log["blur"] = wandb.Html(shaded, inject=False)
    if plan.proof is not None:
        log["certificate"] = tables.certificate_table(plan.proof)
    live.log(log)
    live.summary.update(tables.summary(plan, run))
    stem = NAME.sub("-", Path(run.model).name).strip("-.") or "model"
    certificate = write_atomically(
        folder / CERTIFICATE, (json.dumps(plan.certificate, indent=1) + "\n").encode()
    )
    picture = write_atomically(
        folder / CHART, (json.dumps(front.spec(), indent=1) + "\n").encode()
    )
    for kind, files in (
        ("plan", [folder / "plan.json"]),
        ("certificate", [certificate]),
        (
            "report",
            [
                picture,
                *(
                    folder / name
                    for name in (
                        "report.html",
                        "run.json",
                        "front.csv",
                        "measured.csv",
                        SEARCH,
                        blur_example.FILE,
                    )
                ),
            ],
        ),
    ):
        _artifact(live, f"{stem}-{kind}", kind, files, {"plan_id": plan.id, "run_key": run.key})


def _provenance(plan: Plan) -> dict[str, Any]:
    """How to get the same again."""
    return {
        "fingerprint": plan.model.get("fingerprint"),
        "command": plan.provenance.get("command"),
        "versions": plan.provenance.get("versions"),
    }


def trials(folder: Path) -> list[dict[str, float]]:
    """One point a trial of the search: what search.csv has in its columns; none without a search."""
    file = folder / SEARCH
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return [{f"trial/{key}": float(value) for key, value in row.items()} for row in rows]


def _artifact(
    live: Any, name: str, kind: str, files: list[Path], metadata: dict[str, Any]
) -> None:
    import wandb

    artifact = wandb.Artifact(name[-128:], kind, metadata=metadata)
    for file in files:
        if file.exists():
            artifact.add_file(str(file))
    live.log_artifact(artifact)


if __name__ == "__main__":
    main(*sys.argv[1:])
