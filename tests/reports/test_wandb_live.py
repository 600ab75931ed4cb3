"""What W&B's offline files hold while a run works, and after it was killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("wandb")

from optimizer.commands import optimize
from optimizer.config import Wandb
from optimizer.errors import ConfigError
from optimizer.reports import wandb
from optimizer.reports.wandb import events
from optimizer.stages.view import View
from tests.conftest import slow_beside
from tests.reports.test_wandb import alive, find, front_panel, records
from tests.stages.test_refine import searched


def rows(found, kind):
    """The values of each row of that kind, in order."""
    histories = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item}
        for history in find(found, "history")
    ]
    return [
        {key.removeprefix(f"{kind}/"): value for key, value in one.items()}
        for one in histories
        if any(key.startswith(f"{kind}/") for key in one)
    ]


def offline(folder):
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    return file


@pytest.fixture(scope="module")
def followed(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("followed")
    config = searched(source, folder / "s")
    with wandb.follow(Wandb(), folder / "r", "multirun/x", View()) as live:
        outcome = optimize.optimize(config, folder / "r", live.view)
        notes = live.finish(outcome.plan)
    return outcome, notes, folder / "r", list(records(offline(folder / "r")))


@pytest.mark.slow
def test_a_followed_run_is_one_record_with_all_that_a_finished_run_has(followed):
    outcome, notes, folder, found = followed
    assert notes == [f"Recorded for W&B, offline: wandb sync {offline(folder).parent}"]
    begun = find(found, "run")[0]
    assert (begun.run_id, begun.run_group) == (outcome.run.key, "multirun/x")
    assert "bits" in find(found, "run")[-1].display_name
    [table] = offline(folder).parent.glob("files/media/table/certificate_*")
    assert "plan" in [row[0] for row in json.loads(table.read_text())["data"]]


@pytest.mark.slow
def test_every_trial_is_a_row_with_what_the_search_knew_then(followed):
    outcome, _, folder, found = followed
    with (folder / "search.csv").open() as lines:
        told = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
    trials = rows(found, "trial")
    assert len(trials) == len(told) > 3
    for mine, row in zip(trials, told, strict=True):
        assert {key: pytest.approx(mine[key], rel=1e-6) for key in row} == row
        assert mine["memory"] > 0.05 and mine["bytes"] > 0
    best = [row["best"] for row in trials]
    assert best == sorted(best, reverse=True)
    volumes = [row["hypervolume"] for row in trials]
    assert volumes == sorted(volumes) and volumes[-1] > 0
    chosen = outcome.plan.bytes["quantized"] + outcome.plan.bytes["untouched"]
    assert chosen in [row["bytes"] for row in trials]


@pytest.mark.slow
def test_the_table_grows_by_layers(followed):
    outcome, _, _, found = followed
    table = rows(found, "table")
    layers = [row["layers"] for row in table]
    assert layers == sorted(layers) and layers[0] < layers[-1] == table[-1]["layers of all"]
    assert layers[-1] == sum(map(len, outcome.run.groups))
    part = outcome.run.config["data"]["calibration"]
    assert table[-1]["tokens"] == part["sequences"] * part["length"]
    stages = [row["stage"] for row in rows(found, "progress")]
    assert "sensitivity" in stages and "search" in stages


@pytest.mark.slow
def test_trials_are_points_of_the_front(followed):
    _, _, folder, found = followed
    tables = sorted((offline(folder).parent / "files/media/table").glob("front_table_*"))
    kinds = [{row[2] for row in json.loads(t.read_text())["data"]} for t in tables]
    assert any("predicted front" in k and "chosen plan" not in k for k in kinds)  # as it worked
    assert any({"trial", "chosen plan", "predicted front"} <= k for k in kinds)  # at the end
    visualized = [
        json.loads(item.value_json)
        for config in [*(r.config for r in find(found, "run")), *find(found, "config")]
        for item in config.update
        if item.nested_key[:1] == ["_wandb"] or item.key == "_wandb"
    ]
    assert any(map(front_panel, visualized))


RUN = """
import sys, time
from pathlib import Path
from optimizer.config import Wandb
from optimizer.reports import wandb
from optimizer.stages.view import View
folder, mode = Path(sys.argv[1]), sys.argv[2]
with wandb.follow(Wandb(mode=mode), folder, None, View()) as live:
    live.view.begin("abc123", "a/tiny", {"seed": 3})
    for i in range(40):
        live.view.row("trial", {"tokens": 10 * i, "loss": 1 / (i + 1), "bytes": 7})
    print(live._process.pid, live._file, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", slow_beside([signal.SIGKILL], [signal.SIGKILL, signal.SIGTERM]))
def test_a_run_that_is_killed_has_its_rows_until_then_and_leaves_nothing_behind(tmp_path, how):
    root = str(Path(wandb.__file__).parents[3])
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), "offline"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root},
    ) as run:  # fmt: skip
        pid, file = run.stdout.readline().split()
        run.send_signal(how)
    deadline = time.monotonic() + 60
    while alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid)) and not Path(file).exists()
    trials = rows(list(records(offline(tmp_path))), "trial")
    assert [row["tokens"] for row in trials] == [10 * i for i in range(40)]
    services = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert f"--pid {pid}" not in services.stdout


def followed_online(folder):
    """The last lines of a run that ends after two rows."""
    with wandb.follow(Wandb(mode="online"), folder, None, View()) as live:
        live.view.begin("abc123", "a/tiny", {"seed": 3})
        for i in range(2):
            live.view.row("trial", {"tokens": i, "loss": 1.0, "bytes": 7})
        live.view.end(False)
        return wandb._answer(live._process, 60)


@pytest.mark.slow
def test_an_unreachable_host_is_known_while_the_run_works(tmp_path, monkeypatch):
    """Nothing listens on port 9. The record goes on offline, with every row."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    lines, error = followed_online(tmp_path)
    assert error is None and "doesn't answer" in lines[0]
    assert [row["tokens"] for row in rows(list(records(offline(tmp_path))), "trial")] == [0, 1]


@pytest.mark.slow
def test_no_key_is_known_while_the_run_works(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")

        def serve():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 404 No\r\n\r\n")
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        lines, error = followed_online(tmp_path)
    assert error is None and "No API key" in lines[0]
    assert len(rows(list(records(offline(tmp_path))), "trial")) == 2


def test_a_mistake_before_the_work_starts_no_process(tmp_path):
    with (
        pytest.raises(ConfigError),
        wandb.follow(Wandb(), tmp_path, None, View()) as live,
    ):
        raise ConfigError("no")
    assert live._process is None and not live._file.exists()


def test_who_wants_no_record_is_not_followed(tmp_path):
    view = View()
    with wandb.follow(Wandb(mode="off"), tmp_path, None, view) as live:
        assert live.view is view
        view.begin("abc", "tiny", {})
    assert live._process is None and list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_nothing(tmp_path):
    told = events.Told(View(), tmp_path, lambda: None)  # a folder can't be written to
    told.begin("abc", "tiny", {})
    assert list(told.track([1, 2], "counting")) == [1, 2]


def test_half_a_line_is_waited_for(tmp_path):
    file = tmp_path / "events"
    file.write_text('{"row": "trial"')
    assert [*events.read(file, lambda: True)] == []  # its writer is gone: it will never be whole
    with file.open("a") as stream:
        stream.write(', "values": {}}\n{"end": true}\n{"row": "after"}\n')
    assert [*events.read(file, lambda: False)] == [{"row": "trial", "values": {}}, {"end": True}]


def test_progress_is_written_once_a_second_and_at_each_end(tmp_path):
    file = tmp_path / "events"
    told = events.Told(View(), file, lambda: None)
    told.begin("abc", "tiny", {})
    assert list(told.track(range(500), "counting")) == list(range(500))
    written = [json.loads(line) for line in file.read_text().splitlines()]
    done = [e["values"]["done"] for e in written if e.get("row") == "progress"]
    assert done[-1] == 500 and len(done) < 10
