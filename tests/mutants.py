"""Mutation testing: one operator or constant changed at a time, and the room's own tests run.

    python -m tests.mutants ROOM [COUNT] [SEED]

draws COUNT of the mutants that mutmut makes of the room as pyproject.toml says (default 50), and
prints which survived and the share that was killed. All tests of the room run once; then, for each
mutant, a fork of that process runs those that reach the changed function until one fails, with what
the session has made as it is: minutes, where a process for each mutant takes hours. `mutmut show NAME`
in the folder that is named shows one. A mutant that no test of the room runs counts as survived; one
that ran out of time counts as killed, and is named: look whether the tests are only slow.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("optimizer", "conf", "tests", "docs", "experiments", "README.md", "pyproject.toml")
MADE = "done in"  # mutmut says so when the mutants are there
ASKED, FOUND = (
    "MEZZOTINT_MUTANTS",
    "MEZZOTINT_OUTCOMES",
)  # files of the process that runs the tests
KILLED, SURVIVED, UNTESTED, LATE = "killed", "survived", "no test", "time out"
MINUTE = 60  # of the processor's beyond three times what a mutant's tests took


def settings(room: str) -> dict[str, Any]:
    """pyproject.toml's, narrowed to one room and its own tests."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["tool"]["mutmut"] | {
        "only_mutate": [f"optimizer/{room}/*"],
        "pytest_add_cli_args_test_selection": [f"tests/{room}"],
    }


def prepared(room: str) -> Path:
    """A folder for mutmut, which copies what it mutates below the one that it runs in."""
    work = ROOT / "mutants" / room
    work.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        if (ROOT / name).exists() and not (work / name).exists() and name != "pyproject.toml":
            (work / name).symlink_to(ROOT / name)
    whole = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    own, _, rest = whole.partition("[tool.mutmut]\n")
    _, table, after = rest.partition("\n[")
    (work / "pyproject.toml").write_text(own + table + after, encoding="utf-8")
    (work / "setup.cfg").write_text(as_config(settings(room)), encoding="utf-8")
    return work


def as_config(values: Mapping[str, Any]) -> str:
    lines = ["[mutmut]"]
    for key, value in values.items():
        text = "".join(f"\n    {x}" for x in value) if isinstance(value, list) else str(value)
        lines.append(f"{key} = {text}".replace("%", "%%"))
    return "\n".join(lines) + "\n"


def made(work: Path) -> list[str]:
    """Names of all mutants, which mutmut writes; what it would run after that is ended."""
    log = work / "mutmut.log"
    with log.open("w") as file:
        command = ["mutmut", "run", "--max-children", "1", "no mutant of this name"]
        process = subprocess.Popen(
            command, cwd=work, stdout=file, stderr=file, start_new_session=True
        )
        while process.poll() is None and MADE not in log.read_text(errors="replace"):
            time.sleep(1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    found: list[str] = []
    for meta in work.glob("mutants/optimizer/**/*.meta"):
        found += json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return sorted(found)


def run(work: Path, room: str, names: Sequence[str]) -> dict[str, str]:
    """Mutant -> its outcome, of those that came to an end."""
    inside, asked, found = work / "mutants", work / "asked.json", work / "outcomes.jsonl"
    tests = inside / "tests"
    tests.unlink() if tests.is_symlink() else shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests", tests)
    asked.write_text(json.dumps(names), encoding="utf-8")
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"tests/{room}", "-q", "-p", "tests.mutants"]
    environment = {ASKED: str(asked), FOUND: str(found), "PYTHONPATH": str(inside)}
    with (work / "pytest.log").open("w") as log:
        subprocess.run(
            [*command, *settings(room)["pytest_add_cli_args"]],
            cwd=inside, env=os.environ | environment, stdout=log, stderr=log, check=False,
        )  # fmt: skip
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    return dict(json.loads(line) for line in lines)


# ---------------------------------------------------------------- inside of pytest

if ASKED in os.environ:
    _fixture: Any = pytest.fixture

    def _kept(*given: Any, scope: str = "function", **more: Any) -> Any:
        """A fork needn't make again what a module's tests share."""
        return _fixture(*given, scope="function" if scope == "function" else "session", **more)

    pytest.fixture = _kept  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    if ASKED not in os.environ:
        return None
    if session.testsfailed:
        raise session.Interrupted("not all tests could be collected")
    reached, spent = _clean(session)
    for name in json.loads(Path(os.environ[ASKED]).read_text(encoding="utf-8")):
        items = reached.get(name.rpartition("__mutmut_")[0], [])
        # by quarters of a second; within one, in pytest's own order, which shares fixtures
        items = sorted(items, key=lambda item: int(4 * spent[item]))
        outcome = _outcome(session, name, items, spent)
        with Path(os.environ[FOUND]).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, outcome]) + "\n")
    session._setupstate.teardown_exact(None)
    return True


FAILURES: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        FAILURES.append(report.nodeid)


def _passes(item: pytest.Item, following: pytest.Item) -> bool:
    """following: what is kept is what that one needs, too."""
    FAILURES.clear()
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return not FAILURES


def _clean(session: pytest.Session) -> tuple[dict[str, list[Any]], dict[Any, float]]:
    """Function -> the tests that reach it, and the seconds of each test; of those that pass."""
    from mutmut.mutation import trampoline

    reached: dict[str, list[Any]] = {}
    spent: dict[Any, float] = {}
    here: set[str] = set()
    trampoline.record_trampoline_hit = lambda name, **_: here.add(name)
    os.environ["MUTANT_UNDER_TEST"] = "stats"
    for item, following in zip(
        session.items, [*session.items[1:], session.items[-1]], strict=True
    ):
        here.clear()
        start = time.process_time()
        if not _passes(item, following):
            print("fails by itself", item.nodeid)
            continue
        spent[item] = time.process_time() - start
        for name in here:
            reached.setdefault(name, []).append(item)
    return reached, spent


def _outcome(
    session: pytest.Session, name: str, items: Sequence[Any], spent: Mapping[Any, float]
) -> str:
    """Of one mutant, in a fork."""
    if not items:
        return UNTESTED
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            limit = int(time.process_time() + 3 * sum(spent[x] for x in items)) + MINUTE
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            signal.alarm(20 * MINUTE)  # of the clock's, for what waits for ever
            os.environ["MUTANT_UNDER_TEST"] = name
            session._setupstate.teardown_exact(items[0])
            for item, following in zip(items, [*items[1:], items[-1]], strict=True):
                if not _passes(item, following):
                    break
            else:
                code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return SURVIVED if code == 0 else LATE if -code in (signal.SIGXCPU, signal.SIGALRM) else KILLED


# ---------------------------------------------------------------- what is printed


def wilson(killed: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, killed / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale


def main(room: str, count: str = "50", seed: str = "0") -> None:
    work = prepared(room)
    every = made(work)
    if not every:
        sys.exit(f"mutmut made no mutants; see {work / 'mutmut.log'}")
    drawn = random.Random(f"{seed} {room}").sample(every, min(int(count), len(every)))
    found = run(work, room, drawn)
    if len(found) < len(drawn):
        sys.exit(f"{len(drawn) - len(found)} mutants weren't run; see {work / 'pytest.log'}")
    for name in drawn:
        if found[name] != KILLED:
            print(f"{found[name]:8}", name)
    killed = sum(outcome in (KILLED, LATE) for outcome in found.values())
    low, high = wilson(killed, len(drawn))
    print(
        f"{room}: {killed} of {len(drawn)} killed, {killed / len(drawn):.0%} [{low:.0%}, {high:.0%}], "
        f"of {len(every)} mutants; look at survivors with `mutmut show NAME` in {work}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
