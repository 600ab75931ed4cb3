"""Parallel processes make an entry once, and damaged or half-written ones are made again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optimizer.errors import StorageError
from optimizer.store import Store, alone

WORKER = """
import sys, time
from pathlib import Path
from optimizer.store import Store, alone
folder = Path(sys.argv[1])
def make():
    with (folder / "made").open("a") as file:
        file.write("x")
    time.sleep(0.4)
    return {"value": 7}
print(Store(folder / "store").json("kind", "key", make)["value"])
"""


def test_parallel_processes_make_an_entry_once(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    root = str(Path(__file__).parents[1])
    jobs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(4)
    ]
    assert [job.communicate(timeout=60)[0].strip() for job in jobs] == ["7"] * 4
    assert (tmp_path / "made").read_text() == "x"


def test_a_maker_that_fails_leaves_neither_an_entry_nor_a_lock(tmp_path):
    store = Store(tmp_path)

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.json("kind", "key", fail)
    assert store.json("kind", "key", lambda: 1) == 1


@pytest.mark.parametrize("data", [b"", b"\x00" * 50, b"{"])
def test_a_damaged_entry_is_made_again_and_told_once(tmp_path, data):
    told = []
    store = Store(tmp_path, told.append)
    store.arrays("kind", "key", lambda: {"a": np.ones(3)})
    store.path("kind", "key", ".safetensors").write_bytes(data)
    assert not told
    assert store.arrays("kind", "key") is None
    assert store.arrays("kind", "key", lambda: {"a": np.zeros(3)})["a"].sum() == 0
    assert len(told) == 1 and "key.safetensors is damaged" in told[0]
    assert store.arrays("kind", "key")["a"].sum() == 0


def test_makers_may_make_other_entries(tmp_path):
    store = Store(tmp_path)
    assert store.json("kind", "a", lambda: store.json("kind", "b", lambda: 2)) == 2


def test_a_store_that_cannot_be_written_is_an_error_of_the_user(tmp_path):
    (tmp_path / "kind").write_text("in the way")
    with pytest.raises(StorageError):
        Store(tmp_path).json("kind", "key", lambda: 1)


def test_who_waits_for_another_process_is_told_and_no_lock_stays(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    root = str(Path(__file__).parents[1])
    told = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as job:
        while not (tmp_path / "made").exists():
            assert job.poll() is None
        with alone(tmp_path / "store" / "kind" / "key.json", lambda: told.append(1)):
            assert (tmp_path / "store" / "kind" / "key.json").exists()
    assert told == [1]
    assert [p.name for p in (tmp_path / "store" / "kind").iterdir()] == ["key.json"]


def test_what_the_dead_left_is_swept(tmp_path):
    kind = tmp_path / "kind"
    kind.mkdir()
    for name in (".key.json.lock", ".key.json.mezzotint-abcdefgh", "key.json", ".other"):
        (kind / name).write_text("")
    with alone(kind / "held"):
        Store.open(str(tmp_path))
        assert sorted(p.name for p in kind.iterdir()) == [".held.lock", ".other", "key.json"]
