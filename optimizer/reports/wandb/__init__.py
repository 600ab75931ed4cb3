"""W&B: what a run tells, while it works and when its folder is complete. See `beside` for what is
recorded: wandb works in a process of its own there, which can't delay or fail a run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from optimizer.config import Wandb
from optimizer.plan import Plan
from optimizer.reports.wandb.events import Told
from optimizer.stages.view import View
from optimizer.store import write_atomically

# At the end of a run the process beside it may take so long. Online that is only used where the run
# took less: whether W&B answers is asked, and the record begun, while it works. Offline needs no
# network.
SECONDS = {"online": 60, "offline": 300}
STOP_SECONDS = 5  # the same after a mistake or Ctrl-C
SAID = ("W&B, ", "Recorded")  # how our own lines begin


class Live:
    """The record of one run, made while it works. view: what the run shows its progress to."""

    def __init__(self, settings: Wandb, folder: Path, sweep: str | None, inner: View) -> None:
        self._settings, self._folder, self._sweep = settings, folder, sweep
        self._process: subprocess.Popen[str] | None = None
        self._file: Path | None = None
        self.view = inner
        if settings.mode != "off":
            with suppress(OSError):
                handle, name = tempfile.mkstemp(".jsonl", "mezzotint-run-")
                os.close(handle)
                self._file = Path(name)
                self.view = Told(inner, self._file, self._start)

    def _start(self) -> None:
        with suppress(OSError):
            self._process = _process(self._asked(follow=str(self._file)))

    def _asked(self, **what: str) -> dict[str, Any]:
        rest = {"settings": asdict(self._settings), "sweep": self._sweep}
        return {**what, "folder": str(self._folder), **rest}

    def finish(self, plan: Plan) -> list[str]:
        """The run's folder is complete; returns lines for the person who ran it."""
        if self._settings.mode == "off":
            return []
        notes, name = [], f"plan {plan.id}"
        if self._process is not None and isinstance(self.view, Told):
            self.view.end(True)
            lines, error = _answer(self._process, SECONDS[self._settings.mode])
            if error is None:
                return lines
            notes = [f"W&B, {self._settings.mode}, could not record {name}: {error}"]
        offline = replace(self._settings, mode="offline")
        return _complete([*notes, *_recorded(self._folder, offline, self._sweep, name)])

    def close(self) -> None:
        """If the run didn't come to its end, the record ends with what it has."""
        if self._process is not None and self._process.poll() is None:
            if isinstance(self.view, Told):
                self.view.end(False)
            _answer(self._process, STOP_SECONDS)
        if self._file is not None:
            self._file.unlink(missing_ok=True)


@contextmanager
def follow(settings: Wandb, folder: Path, sweep: str | None, view: View) -> Iterator[Live]:
    """Record what a run shows to the yielded view. sweep: the one that it belongs to."""
    live = Live(settings, folder, sweep, view)
    try:
        yield live
    finally:
        live.close()


def record(plan: Plan, folder: Path, settings: Wandb, sweep: str | None = None) -> list[str]:
    """Record the finished run in `folder`; returns lines for the person who ran it."""
    return _complete(_recorded(folder, settings, sweep, f"plan {plan.id}"))


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
        return _recorded(file, settings, None, sheets.name)


def _complete(notes: list[str]) -> list[str]:
    done = notes[-1].startswith("Recorded")
    return notes if done else [*notes, "The run's own files are complete."]


def _recorded(what: Path, settings: Wandb, sweep: str | None, name: str) -> list[str]:
    """Lines for a person; the last one begins with "Recorded" if it was."""
    notes: list[str] = []
    for mode in dict.fromkeys((settings.mode, "offline")):
        own = asdict(replace(settings, mode=mode))
        lines, error = _attempt({"record": str(what), "settings": own, "sweep": sweep}, mode)
        if error is None:
            return [*notes, *lines]
        notes.append(f"W&B, {mode}, could not record {name}: {error}")
    return notes


def _attempt(asked: dict[str, Any], mode: str) -> tuple[list[str], str | None]:
    """(what it said, None) or ([], why not)."""
    try:
        return _answer(_process(asked), SECONDS[mode])
    except OSError as error:
        return [], str(error)


def _answer(process: subprocess.Popen[str], limit: float) -> tuple[list[str], str | None]:
    """Wait for the process, `limit` seconds at most, and stop it with all that it started: W&B's own
    service has a session of its own, holds the pipes and would go on trying."""
    with process:
        try:
            out, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return [], f"it was not done after {limit} s."
        finally:
            if process.poll() is None:
                kill(process.pid)
    if process.returncode == 0:
        return [line for line in out.splitlines() if line.startswith(SAID)], None
    lines = [line for line in said.splitlines() if line.strip()]
    return [], lines[-1] if lines else f"exit code {process.returncode}."


def _process(asked: dict[str, Any]) -> subprocess.Popen[str]:
    """W&B's process. If this program is killed, it ends by itself."""
    package = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", "optimizer.reports.wandb.beside"]
    return subprocess.Popen(  # noqa: S603  (this very program)
        [*command, json.dumps(asked), str(os.getpid())],
        stdin=subprocess.DEVNULL,  # W&B asks for a key where there is a terminal
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | own,
        start_new_session=True,
    )


def kill(pid: int) -> None:
    """A process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
