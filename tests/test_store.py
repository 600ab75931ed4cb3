from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from optimizer.errors import StorageError
from optimizer.store import Store, root, write_atomically
from tests.conftest import largest_file


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_a_value_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"a": 1}

    assert Store(tmp_path).json("kind", "k" * 64, make) == {"a": 1}
    assert Store(tmp_path).json("kind", "k" * 64, make) == {"a": 1}
    assert Store(tmp_path).json("kind", "l" * 64, make) == {"a": 1}
    assert len(made) == 2


def test_arrays_come_back_with_their_types(tmp_path: Path) -> None:
    value = {"loss": np.random.default_rng(0).normal(size=(3, 2)), "ids": np.arange(4)}
    Store(tmp_path).arrays("tables", "key", lambda: value)
    again = Store(tmp_path).arrays("tables", "key")
    assert again is not None and again.keys() == value.keys()
    for key, array in value.items():
        assert again[key].dtype == array.dtype
        assert np.array_equal(again[key], array)


def test_views_are_kept_by_their_values(tmp_path: Path) -> None:
    """safetensors would write the memory behind a view: other numbers, without a word."""
    whole = np.arange(12).reshape(3, 4)
    Store(tmp_path).arrays("tables", "key", lambda: {"cut": whole[:, 2:], "turned": whole.T})
    again = Store(tmp_path).arrays("tables", "key")
    assert again is not None
    assert np.array_equal(again["cut"], whole[:, 2:])
    assert np.array_equal(again["turned"], whole.T)


def test_missing_without_a_maker_is_none(tmp_path: Path) -> None:
    assert Store(tmp_path).json("kind", "key") is None
    assert Store(tmp_path).arrays("kind", "key") is None
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", [b"", b"\x00\x01", b'{"a":', b"\xff" * 40])
def test_a_damaged_entry_counts_as_missing_and_is_made_again(
    tmp_path: Path, damage: bytes
) -> None:
    store = Store(tmp_path)
    store.json("j", "key", lambda: 1)
    store.arrays("a", "key", lambda: {"x": np.ones(3)})
    for file in tmp_path.rglob("key.*"):
        file.write_bytes(damage)
    assert store.json("j", "key") is None
    assert store.arrays("a", "key") is None
    assert store.json("j", "key", lambda: 2) == 2
    assert store.json("j", "key") == 2
    assert store.arrays("a", "key", lambda: {"x": np.zeros(1)}) is not None
    assert store.arrays("a", "key") == {"x": np.zeros(1)}


def test_one_flipped_bit_counts_as_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.json("j", "key", lambda: [1, 2])
    store.arrays("a", "key", lambda: {"x": np.ones(300)})
    for kind, suffix, place in (("j", ".json", 1), ("a", ".safetensors", -100)):
        path = store.path(kind, "key", suffix)
        data = bytearray(path.read_bytes())
        data[place] ^= 2  # still well-formed: [3, 2], and another number
        path.write_bytes(data)
    assert store.json("j", "key") is None
    assert store.arrays("a", "key") is None


def test_a_cut_off_array_counts_as_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.arrays("a", "key", lambda: {"x": np.ones(300)})
    path = store.path("a", "key", ".safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert store.arrays("a", "key") is None


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def make() -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).json("kind", "key", make)
    assert [name for name in names(tmp_path) if not name.endswith(".lock")] == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "plan.json", b"old")
    words = r"plan\.json couldn't be written.*half-written"
    with pytest.raises(StorageError, match=words), largest_file(1000):
        write_atomically(path, b"n" * 2000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["plan.json"]


def test_a_death_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_atomically(tmp_path / "plan.json", b"old")

    def die(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(SystemExit):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="choose another folder"):
        write_atomically(tmp_path / "file" / "plan.json", b"x")
    assert (tmp_path / "file").read_text() == "in the way"


def test_files_have_the_users_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_atomically(tmp_path / "plan.json", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_where_the_store_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert root("~/.cache/mezzotint") == Path("/home/me/.cache/mezzotint")
    for nowhere in ("", " ", "~no-such-account/store"):
        with pytest.raises(StorageError, match="MEZZOTINT_STORE"):
            root(nowhere)
