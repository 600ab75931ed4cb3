"""`mezzotint store`: what is kept, and what nobody has used for long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optimizer.commands.store import DAY, kinds, prune, seconds
from optimizer.errors import ConfigError
from optimizer.store import Store
from tests.conftest import Command


def old(store: Store, kind: str, key: str, days: float) -> Path:
    """An entry that was last used so many days before second 1,000 days."""
    store.json(kind, key, lambda: {"text": "x" * 100})
    path = store.path(kind, key, ".json")
    os.utime(path, (DAY * (1000 - days),) * 2)
    return path


def test_kinds_are_counted_with_their_bytes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old(store, "scores", "a", 1)
    old(store, "scores", "b", 3)
    old(store, "tables", "c", 2)
    found = {kind.name: kind for kind in kinds(store)}
    assert found["scores"].entries == 2 and found["tables"].entries == 1
    size = store.path("tables", "c", ".json").stat().st_size
    assert found["tables"].bytes == size and found["scores"].bytes == 2 * size
    assert found["scores"].used == DAY * 999
    assert list(found) == ["scores", "tables"]  # the largest first
    assert kinds(Store(tmp_path / "nowhere")) == []


def test_only_what_is_old_is_removed_and_can_be_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    gone, young = old(store, "scores", "a", 31), old(store, "scores", "b", 29)
    folder = tmp_path / "models" / "one"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"0" * 50)
    os.utime(folder / "weights", (DAY * 900,) * 2)
    done = prune(store, 30 * DAY, now=DAY * 1000)
    assert (done.entries, done.bytes) == (2, 50 + young.stat().st_size)
    assert young.exists() and not gone.exists() and not folder.exists()
    assert store.json("scores", "a") is None
    assert store.json("scores", "a", lambda: 1) == 1


@pytest.mark.parametrize(
    ("text", "wanted"), [("30d", 30 * DAY), ("12h", DAY / 2), ("1.5d", 1.5 * DAY)]
)
def test_ages(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "30 days", "1e9d"])
def test_what_is_no_age_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="30d or 12h"):
        seconds(text)


def test_the_command_lists_and_prunes(
    mezzotint: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEZZOTINT_STORE", str(tmp_path / "own"))
    assert "holds nothing" in mezzotint("store").out
    path = old(Store(tmp_path / "own"), "scores", "a", 0)
    assert "measured plans" in mezzotint("store").out
    done = mezzotint("store", "prune", "30d")  # second 1,000 days is in 1972
    assert done.code == 0 and "Removed 1 entries" in done.out and not path.exists()
    for wrong in (["prune"], ["prune", "soon"], ["list"]):
        refused = mezzotint("store", *wrong)
        assert refused.code == 2 and "30d" in refused.err
