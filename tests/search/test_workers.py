"""Two workers on one study in a real PostgreSQL; one is killed in the middle of a trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optimizer.models.source import Source
from optimizer.plan import Plan
from tests.conftest import QUICK

TOKENS = 60_000


def worker(folder: Path, store: Path, url: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "optimizer", "optimize", "model=stories", "budget.code_bits=3",
        *QUICK[:-1], "data.search.sequences=32", "proof.random=0", "search=moves", f"store={store}",
        f"search.storage={url}", "search.heartbeat=1", f"search.tokens={TOKENS}",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip
    log = (folder.parent / f"{folder.name}.log").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def trials(url: str, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(url)
    try:
        found = [s for s in storage.get_all_studies() if s.study_name.startswith("mezzotint")]
        if not found:
            return []
        study = found[0]._study_id
        return storage.get_all_trials(study, deepcopy=False, states=states or None)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def stop_inside_a_trial(both: list[subprocess.Popen[bytes]], url: str) -> None:
    """Halt both workers at a moment when each has a trial under way."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        time.sleep(0.05)
        assert all(w.poll() is None for w in both), "a worker ended before it could be killed"
        if len(trials(url, TrialState.RUNNING)) < 2:
            continue
        for w in both:
            w.send_signal(signal.SIGSTOP)
        if len(trials(url, TrialState.RUNNING)) == 2:
            return
        for w in both:
            w.send_signal(signal.SIGCONT)
    pytest.fail("the workers never had a trial each at one time")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_loses_no_trial_and_none_counts_twice(
    tmp_path: Path, store: Path, source: Source
) -> None:
    url = os.environ.get("MEZZOTINT_POSTGRES")
    assert url, "run this test through tests/postgres.sh, which starts the server"
    both = [worker(tmp_path / name, store, url) for name in ("a", "b")]
    try:
        stop_inside_a_trial(both, url)
        both[0].kill()
        both[1].send_signal(signal.SIGCONT)
        assert both[1].wait(timeout=240) == 0, (tmp_path / "b.log").read_text()
    finally:
        for w in both:
            w.kill()
    every = trials(url)
    states = Counter(t.state for t in every)
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0
    failed = [t.number for t in every if t.state == TrialState.FAIL]
    assert len(failed) == 1
    which = optuna.storages.RetryHeartbeatStaleTrialCallback.retried_trial_number
    again = [t for t in every if which(t) == failed[0]]
    assert len(again) == 1 and again[0].state in (TrialState.COMPLETE, TrialState.PRUNED)
    counted = [t for t in every if t.user_attrs.get("tokens", 0) > 0]
    plans = Counter(json.dumps(t.user_attrs["assignment"]) for t in counted)
    assert max(plans.values()) == 1
    plan = Plan.load(tmp_path / "b" / "plan.json")
    assert plan.code_bits <= 3 and plan.certificate["rows"][0]["name"] == "plan"
