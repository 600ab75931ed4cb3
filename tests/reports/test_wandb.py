"""What W&B is given, read back from the files that its offline mode writes."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("wandb")

from wandb.proto import wandb_internal_pb2

from optimizer.config import Wandb
from optimizer.errors import ConfigError
from optimizer.reports import html, wandb
from optimizer.reports.wandb import beside
from tests.reports.test_html import EVIL, save

BLOCK = 32768


def records(file: Path):
    """The protocol buffers of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little for a header: padding
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + body) == checksum
        whole, at = whole + body, at + 7 + length
        if kind in (1, 4):  # full, last
            found = wandb_internal_pb2.Record()
            found.ParseFromString(whole)
            yield found
            whole = b""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    plan, run = save(folder)
    search = {"third": "price", "hourly_rate": 3.6}
    run = replace(
        run, config=run.config | {"search": search}, chosen=replace(run.chosen, seconds=0.25)
    )
    run.save(folder)
    html.write(folder)
    (folder / "front.csv").write_text("size\n")
    (folder / "search.csv").write_text("tokens,loss\n10,0.5\n20,0.25\n")
    (folder / "blur.html").write_text("<p>a shaded word</p>")
    notes = wandb.record(plan, folder, Wandb(tags=["one"]), sweep="multirun/x")
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    return plan, run, notes, file, list(records(file))


def find(found, kind):
    return [getattr(r, kind) for r in found if r.WhichOneof("record_type") == kind]


def media(file: Path, key: str):
    [path] = (file.parent / "files/media").glob(f"*/{key}_0_*")
    return path.read_text()


def test_the_record_is_the_runs_own(recorded):
    _, run, notes, file, found = recorded
    begun = find(found, "run")[0]
    assert (begun.run_id, begun.run_group, begun.project) == (run.key, "multirun/x", "mezzotint")
    assert list(begun.tags) == ["one"]
    updates = [*begun.config.update, *(i for c in find(found, "config") for i in c.update)]
    config = {item.key: json.loads(item.value_json) for item in updates}
    assert config["seed"] == 3 and config["data"] == {"source": "self", "seed": 5}
    assert config["fingerprint"] == "sha256:x" and config["run_key"] == run.key
    assert notes == [f"Recorded for W&B, offline: wandb sync {file.parent}"]


def test_every_measured_plan_is_a_row(recorded):
    plan, run, _, file, _ = recorded
    table = json.loads(media(file, "plans"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["plan_id"] for row in rows] == [*(p.id for p in run.measured[:3]), plan.id]
    own = rows[-1]
    assert own["seconds_per_token"] == 0.25 and own["price_of_a_million"] == pytest.approx(250)
    assert (own["bytes"], own["kl_low"], own["kl"], own["kl_high"]) == (
        run.chosen.bytes, 0.01, 0.02, 0.03,
    )  # fmt: skip


def test_held_out_rows_and_heat_map(recorded):
    *_, file, _ = recorded
    table = json.loads(media(file, "certificate"))
    assert [row[0] for row in table["data"]] == ["plan", EVIL]
    assert "perplexity_reference_high" in table["columns"]
    assert "down_proj" in media(file, "heat map")
    assert "a shaded word" in media(file, "blur")


def front_panel(value):
    """The panel's configuration where a record says how the front is drawn."""
    found = value.get("visualize", value) if isinstance(value, dict) else {}
    found = found.get("front", found)
    config = found.get("panel_config", {}) if isinstance(found, dict) else {}
    return config if "customPanelDef" in config else None


def test_the_front_is_a_chart_of_wandbs_own(recorded):
    *_, file, found = recorded
    panels = [
        json.loads(item.value_json)
        for config in [*(r.config for r in find(found, "run")), *find(found, "config")]
        for item in config.update
        if item.nested_key[:1] == ["_wandb"] or item.key == "_wandb"
    ]
    assert "wandb/scatter/v0" in json.dumps(panels)
    own = next(p for p in map(front_panel, panels) if p)
    drawn = json.loads(own["customPanelDef"]["spec"])
    assert [x["encoding"]["y"]["scale"]["type"] for x in drawn["layer"]] == ["log", "log"]
    table = json.loads(media(file, "front_table"))
    asked = own["userQuery"]["queryFields"][0]["fields"][-1]["args"][0]["value"]
    assert asked == "front_table" and set(own["fieldSettings"].values()) == set(table["columns"])
    assert {row[2] for row in table["data"]} >= {"predicted front", "uniform, measured"}
    assert all(row[1] > 0 for row in table["data"])
    assert "price_of_a_million" in json.dumps(panels)  # the third objective has a chart, too


def test_every_trial_of_the_search_is_a_point(recorded):
    *_, found = recorded
    points = []
    for history in find(found, "history"):
        values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in history.item}
        points += (
            [(values["trial/tokens"], values["trial/loss"])] if "trial/loss" in values else []
        )
    assert points == [(10, 0.5), (20, 0.25)]


def test_summary_and_artifacts(recorded):
    plan, _, _, _, found = recorded
    summary = {}
    for part in find(found, "summary"):
        for item in part.update:
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert summary["plan_id"] == plan.id and summary["verdict"] == "Better than tiny."
    artifacts = {
        r.request.log_artifact.artifact.name: r.request.log_artifact.artifact
        for r in found
        if r.WhichOneof("record_type") == "request"
    } | {a.name: a for a in find(found, "artifact")}
    assert {"tiny-plan", "tiny-certificate", "tiny-report"} <= artifacts.keys()
    assert [e.path for e in artifacts["tiny-plan"].manifest.contents] == ["plan.json"]
    assert {e.path for e in artifacts["tiny-report"].manifest.contents} == {
        "report.html", "run.json", "front.csv", "search.csv", "blur.html", "front.vega.json",
    }  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_continues_its_record_and_another_question_does_not(tmp_path):
    plan, run = save(tmp_path, EVIL)
    for _ in range(2):
        wandb.record(plan, tmp_path, Wandb())
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{run.key}.wandb"}


def test_no_key_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    plan, _ = save(tmp_path)
    notes = wandb.record(plan, tmp_path, Wandb(mode="online"))
    assert "No API key" in notes[0] and "wandb sync" in notes[1]


HANGING = """
import importlib, json, os, pathlib, subprocess, sys, time
if json.loads(sys.argv[1])["settings"]["mode"] == "online":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(os.environ["CHILD"]).write_text(str(child.pid))
    time.sleep(600)
sys.path.remove(str(pathlib.Path(__file__).parent))
del sys.modules["wandb"]
sys.modules["wandb"] = importlib.import_module("wandb")
"""


def test_a_network_that_hangs_costs_nothing_and_leaves_nothing_behind(tmp_path, monkeypatch):
    """W&B online never returns and has started a process that holds the pipes. However slow this
    machine is, the first attempt ends at its limit and the second needs no network."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "wandb.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(fake), prepend=os.pathsep)
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    monkeypatch.setitem(wandb.SECONDS, "online", 4)
    plan, _ = save(tmp_path)
    notes = wandb.record(plan, tmp_path, Wandb(mode="online"))
    assert "not done after 4 s" in notes[0] and "wandb sync" in notes[1]
    if (tmp_path / "child").exists():
        assert not alive(int((tmp_path / "child").read_text()))


def alive(pid: int) -> bool:
    """A process that ended and that nobody asked about counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_an_unreachable_host_costs_nothing(tmp_path, monkeypatch):
    """Nothing listens on port 9; W&B would wait for it much longer than a person. It is stopped, or
    gives up by itself; what is kept after that is offline and has its own, long limit."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(wandb.SECONDS, "online", 20)
    plan, _ = save(tmp_path)
    notes = wandb.record(plan, tmp_path, Wandb(mode="online"))
    assert "could not record" in notes[0] and "wandb sync" in notes[1]


def test_a_host_that_says_nothing_is_waited_for_no_longer_than_the_limit(monkeypatch):
    """It accepts the connection and is silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(beside, "REACH_SECONDS", 1)
        assert "didn't answer within 1 s" in beside._silence()


@pytest.mark.parametrize(("answer", "reached"), [(b"HTTP/1.1 404 No\r\n\r\n", True), (b"", False)])
def test_any_answer_will_do(answer, reached, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")

        def serve():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        refusal = beside._silence()
        thread.join()
    assert (refusal is None) == reached
    assert reached or "doesn't answer" in refusal


def test_all_limits_together_are_a_minute_at_most():
    steps = beside.REACH_SECONDS + beside.INIT_SECONDS + beside.FINISH_SECONDS
    assert steps <= wandb.SECONDS["online"] <= 60


RUN = """
import json, sys, time
from optimizer.config import Wandb
from optimizer.reports import wandb
child = wandb._process(json.loads(sys.argv[1]))
print(child.pid, flush=True)
time.sleep(600)
"""


def test_wandbs_process_ends_with_a_run_that_is_killed(tmp_path, monkeypatch):
    """So does what it has started in a session of its own, as W&B's service is."""
    fake = tmp_path / "fake"
    fake.mkdir()
    service = HANGING.replace('time.sleep(600)"])', 'time.sleep(600)"], start_new_session=True)')
    (fake / "wandb.py").write_text(service)
    root = str(Path(wandb.__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(fake), root]), "CHILD": str(tmp_path / "child")
    }  # fmt: skip
    save(tmp_path)
    asked = json.dumps(
        {"record": str(tmp_path), "settings": asdict(Wandb(mode="online")), "sweep": None}
    )
    with subprocess.Popen(
        [sys.executable, "-c", RUN, asked], stdout=subprocess.PIPE, text=True, env=environment
    ) as run:
        child = int(run.stdout.readline())
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
            assert alive(child)
            time.sleep(0.05)
        run.kill()
    deadline = time.monotonic() + 60
    pids = [child, int((tmp_path / "child").read_text())]
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_a_damaged_installation_costs_nothing(tmp_path, monkeypatch):
    plan, _ = save(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    notes = wandb.record(plan, tmp_path, Wandb())
    assert "could not record" in notes[0] and notes[1] == "The run's own files are complete."


def test_modes():
    with pytest.raises(ConfigError, match="offline, online or off"):
        Wandb(mode="cloud").check()


def test_sheets_are_tables_and_an_artifact(tmp_path):
    votes = tmp_path / "votes.jsonl"
    votes.write_text("{}\n")
    rows = [["anna", i, None] for i in range(3000)]  # more than a command line holds
    sheets = wandb.Sheets(
        "judged: a against b", "judge", str(tmp_path), {"votes": (["judge", "n", "tag"], rows)},
        [str(votes)],
    )  # fmt: skip
    notes = wandb.record_sheets(sheets, Wandb())
    assert notes[-1].startswith("Recorded for W&B, offline")
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert len(json.loads(media(file, "votes"))["data"]) == 3000
    found = list(records(file))
    assert find(found, "run")[0].job_type == "judge"
    assert [a.type for a in find(found, "artifact")] and find(found, "artifact")[
        -1
    ].type == "judge"
