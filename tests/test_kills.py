"""A campaign: 100 kills, wherever a run touches the disk. Every plan is that of an unhurt run, and
nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optimizer.drafts import is_draft
from optimizer.models.source import Source
from tests.conftest import QUICK

SEED = 20261126
KILLS = {"optimize": 84, "apply": 16}
SEARCH = [
    "search=moves",
    "data.search.sequences=16",
    "data.search.length=32",
    "search.tokens=4000",
]

# In one process, so that everything is imported once: each job runs in a fork that dies at a random
# one of the events that change the disk, is run again, and again, until it comes through.
DRIVER = """
import os, random, signal, sys
from optimizer.cli.main import main
import torch, transformers, optuna, optimizer.stages.refine, optimizer.search.study

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "fcntl.flock", "os.truncate"}
kills, seed, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
rng = random.Random(seed)

def changes(event, given):
    if event == "open":
        return isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return event in CHANGES

def run(call, last):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        def hook(event, given):
            nonlocal count
            if changes(event, given):
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.addaudithook(hook)
        code = main(call)
        os.write(write, str(count).encode())
        os._exit(code)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    count = os.read(read, 20)
    os.close(read)
    return None if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), int(count))

whole = run([a.replace("@", "unhurt") for a in arguments], 0)
assert whole and whole[0] == 0, "the unhurt run failed"
done = episode = 0
while done < kills:
    episode += 1
    call = [a.replace("@", str(episode)) for a in arguments]
    while (end := run(call, rng.randint(1, max(2, whole[1] // 3)) if done < kills else 0)) is None:
        done += 1
    assert end[0] == 0, f"episode {episode} ended with {end[0]}"
print(episode, done)
"""


def campaign(folder: Path, kills: int, call: list[str]) -> int:
    """How many runs came through."""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(kills), str(SEED), *call],
        capture_output=True, text=True, cwd=folder, check=False,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = (folder / "log").read_text()
    assert done.returncode == 0, done.stderr + log[-2000:]
    assert "Traceback" not in log
    episodes, killed = map(int, done.stdout.split())
    assert killed >= kills
    return episodes


def left(folder: Path) -> list[Path]:
    """What only a killed process leaves."""
    return [p for p in folder.rglob("*") if is_draft(p) or p.name.endswith(".lock")]


@pytest.mark.campaign
def test_a_hundred_kills_change_no_plan_and_leave_no_file(
    tmp_path: Path, store: Path, source: Source
) -> None:
    for name in ("unhurt", *map(str, range(1, 1 + KILLS["optimize"]))):
        shutil.copytree(store / "models", tmp_path / f"store-{name}" / "models")
    settings = [*QUICK[:-1], *SEARCH, "proof.domains=[]"]
    call = ["optimize", "model=stories", "budget.bits=4.5", *settings]
    episodes = campaign(
        tmp_path, KILLS["optimize"], [*call, f"store={tmp_path}/store-@", "hydra.run.dir=run-@"]
    )
    for name in ("plan.json", "search.csv", "measured.csv", "front.csv"):
        first = (tmp_path / "run-unhurt" / name).read_text().replace("unhurt", "@")
        for k in range(1, episodes + 1):
            again = (tmp_path / f"run-{k}" / name).read_text()
            assert again.replace(f"store-{k}", "store-@").replace(f"run-{k}", "run-@") == first
    shutil.copytree(tmp_path / "run-unhurt", tmp_path / "plan")
    call = ["apply", "plan/plan.json", f"store={tmp_path}/store-unhurt", "overwrite=true"]
    packed = campaign(tmp_path, KILLS["apply"], [*call, "out=packed-@"])
    for k in range(1, packed + 1):
        for file in (tmp_path / "packed-unhurt").iterdir():
            assert (tmp_path / f"packed-{k}" / file.name).read_bytes() == file.read_bytes()
    assert left(tmp_path) == []


@pytest.mark.campaign
def test_identical_searches_at_once_end_as_one_alone_does(
    tmp_path: Path, store: Path, source: Source
) -> None:
    """Three at once on one store, then one more, as after a kill behind the search's end."""

    def start(name: str, kept: str) -> subprocess.Popen[bytes]:
        call = ["optimize", "model=stories", "budget.bits=4.5", *QUICK[:-1], *SEARCH]
        call += [
            "proof.certify=false",
            f"store={tmp_path / kept}",
            f"hydra.run.dir={tmp_path / name}",
        ]
        command = [sys.executable, "-m", "optimizer", *call]
        with (tmp_path / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    for kept in ("one", "many"):
        shutil.copytree(store / "models", tmp_path / kept / "models")
    assert start("alone", "one").wait() == 0
    together = [start(f"together {k}", "many") for k in range(3)]
    assert [run.wait() for run in together] == [0, 0, 0]
    assert start("later", "many").wait() == 0
    expected = (tmp_path / "alone" / "search.csv").read_text()
    layers = json.loads((tmp_path / "alone" / "plan.json").read_text())["layers"]
    for name in ("together 0", "together 1", "together 2", "later"):
        assert (tmp_path / name / "search.csv").read_text() == expected
        assert json.loads((tmp_path / name / "plan.json").read_text())["layers"] == layers
    assert any("waiting for it" in (tmp_path / f"together {k}.log").read_text() for k in range(3))
