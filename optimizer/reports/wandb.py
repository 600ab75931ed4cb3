"""W&B: this module and its tables alone import wandb. Called when a run is finished and all its files
lie in its folder, so that nothing that happens here can cost a result: failures become notes.

A record holds every measured plan as a row of a table, the held-out rows of the certificate as
another, charts that W&B draws itself, the heat map and shaded examples as small pages,
and the plan, the certificate and the run's files as versioned artifacts. Its id is the run's
content key: the same question about the same model continues the same record.
"""

from __future__ import annotations

import csv
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from optimizer.config import Wandb
from optimizer.plan import Plan
from optimizer.reports import html
from optimizer.reports import wandb_tables as tables
from optimizer.reports.html import blur_example, chart
from optimizer.reports.run import Run
from optimizer.store import write_atomically

REACH_SECONDS = 20  # from the run's start: whether W&B answers at all is asked while the run works
INIT_SECONDS = 15  # online; after it the record is kept offline instead
FINISH_SECONDS = 20
LOOK_SECONDS = 0.5
SECONDS = {"online": 40, "offline": 300}  # the latter needs no network
CERTIFICATE = "certificate.json"
SEARCH = "search.csv"
NAME = re.compile(r"[^\w.-]+")  # artifact names: letters, digits, underscore, dash, dot


@dataclass(frozen=True)
class Reach:
    """Whether W&B answers, asked in the background since `begun`; process None: nobody asked."""

    process: subprocess.Popen[str] | None = None
    begun: float = 0.0

    def refusal(self) -> str | None:
        """Why W&B can't be reached; None if it can."""
        if self.process is None:
            return None
        left = max(0.0, self.begun + REACH_SECONDS - time.monotonic())
        try:
            _, said = self.process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            return f"it didn't answer within {REACH_SECONDS} s."
        return _last(said) if self.process.returncode else None


@contextmanager
def reach(settings: Wandb) -> Iterator[Reach]:
    """Ask from now on whether W&B answers, if it is wanted online."""
    if settings.mode != "online":
        yield Reach()
        return
    begun = time.monotonic()
    with _process("reach") as process:
        yield Reach(process, begun)


def record(
    plan: Plan,
    folder: Path,
    settings: Wandb,
    sweep: str | None = None,
    contact: Reach | None = None,
) -> list[str]:
    """Record the finished run in `folder`; returns lines for the person who ran it. contact: whether
    W&B answers, if somebody asked.

    W&B works in a process of its own: whatever happens to it (no key, no network, a full disk, a
    crash, a hang), the run goes on, and so does the sweep that it belongs to.
    """
    notes = _recorded(folder, settings, sweep, f"plan {plan.id}", contact)
    complete = notes[-1].startswith("Recorded")
    return notes if complete else [*notes, "The run's own files are complete."]


@dataclass(frozen=True)
class Sheets:
    """A record that is no run's: tables by name, each (columns, rows), and files for an artifact."""

    name: str
    kind: str
    folder: str
    tables: dict[str, tuple[list[str], list[list[Any]]]]
    files: list[str]


def record_sheets(sheets: Sheets, settings: Wandb) -> list[str]:
    """As `record`, of tables and files."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_atomically(Path(folder) / "sheets.json", json.dumps(asdict(sheets)).encode())
        return _recorded(file, settings, None, sheets.name, None)


def _recorded(
    what: Path, settings: Wandb, sweep: str | None, name: str, contact: Reach | None
) -> list[str]:
    """Lines for a person; the last one begins with "Recorded" if it was."""
    notes: list[str] = []
    for mode in dict.fromkeys((settings.mode, "offline")):
        error = contact.refusal() if contact and mode == "online" else None
        line = ""
        if error is None:
            line, error = _attempt(what, replace(settings, mode=mode), sweep)
        if error is None:
            return [*notes, line]
        notes.append(f"W&B, {mode}, could not record {name}: {error}")
    return notes


def _attempt(what: Path, settings: Wandb, sweep: str | None) -> tuple[str, str | None]:
    """(what it said, None) or ("", why not)."""
    limit = SECONDS[settings.mode]
    try:
        with _process(json.dumps([str(what), asdict(settings), sweep])) as process:
            out, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return "", f"it was not done after {limit} s."
    except OSError as error:
        return "", str(error)
    if process.returncode == 0:
        return out.strip().splitlines()[-1], None
    return "", _last(said) or f"exit code {process.returncode}."


def _last(said: str) -> str:
    return ([""] + [line for line in said.splitlines() if line.strip()])[-1]


@contextmanager
def _process(asked: str) -> Iterator[subprocess.Popen[str]]:
    """W&B's process. At the end it is stopped with all that it started: W&B's own service has a
    session of its own, holds the pipes and would go on trying. If this program is killed, it ends by
    itself, see _watch."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    with subprocess.Popen(  # noqa: S603  (this very program)
        [sys.executable, "-m", "optimizer.reports.wandb", asked, str(os.getpid())],
        stdin=subprocess.DEVNULL,  # W&B asks for a key where there is a terminal
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | own,
        start_new_session=True,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                _end(child.pid)


def _end(pid: int) -> None:
    """Kill a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def _watch(parent: int) -> None:
    """In the background: when the run is gone, also by kill -9, this process and all that it started
    are."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        _end(os.getpid())

    threading.Thread(target=look, daemon=True).start()


def main(asked: str, parent: str) -> None:
    """The other process."""
    _watch(int(parent))
    if asked == "reach":
        _answer()
        return
    what, settings, sweep = json.loads(asked)
    wanted, folder = Wandb(**settings), Path(what)
    if folder.is_file():
        live = _log_sheets(Sheets(**json.loads(folder.read_text(encoding="utf-8"))), wanted)
    else:
        plan, run = Plan.load(folder), Run.load(folder)
        live = _begin(plan, run, folder, wanted, sweep)
        _log(live, plan, run, folder)
    where = Path(live.settings.sync_dir)
    live.finish()
    if wanted.mode == "online":
        print(f"Recorded by W&B: {live.url}")
        return
    where = where.relative_to(Path.cwd()) if where.is_relative_to(Path.cwd()) else where
    print(f"Recorded for W&B, offline: wandb sync {where}")


def _answer() -> None:
    """Exit with the reason if W&B's host doesn't answer. Any answer will do, a refusal, too: what it
    means is for W&B to say."""
    import wandb

    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    host = settings.base_url
    try:
        with urllib.request.urlopen(host, timeout=REACH_SECONDS):  # noqa: S310  (the user's own)
            return
    except urllib.error.HTTPError:
        return
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # W&B has settings of its own for that
            return
        sys.exit(f"{host} doesn't answer ({reason}).")


def _begin(plan: Plan, run: Run, folder: Path, settings: Wandb, sweep: str | None) -> Any:
    import wandb

    return wandb.init(
        dir=folder,
        id=run.key,
        name=f"{Path(run.model).name}, {chart.size(run.chosen.bytes)}, {run.chosen.bits:.2f} bits",
        group=settings.group or sweep,
        job_type="optimize",
        config=_config(plan, run),
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

    plans = tables.plan_table(run)
    log: dict[str, Any] = {"plans": plans, "front": tables.front_chart(run)}
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
    if plan.certificate:
        log["certificate"] = tables.certificate_table(plan.certificate)
    live.log(log)
    for trial in trials(folder):
        live.log(trial)
    live.summary.update(tables.summary(plan, run))
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
                    SEARCH,
                    blur_example.FILE,
                )
            ],
        ),
    ):
        _artifact(live, f"{stem}-{kind}", kind, files, {"plan_id": plan.id, "run_key": run.key})


def trials(folder: Path) -> list[dict[str, float]]:
    """One point a trial of the search: what search.csv has in its columns; none without a search."""
    file = folder / SEARCH
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return [{f"trial {key}": float(value) for key, value in row.items()} for row in rows]


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
