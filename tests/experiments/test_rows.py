"""Rows of experiments say what measured them."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import rows
from optimizer.config import Optimize
from optimizer.data.text import Data


def test_rows_carry_a_commit_and_a_key_beside_those_of_before(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text("model,kl\nold,1\n")
    rows.append(file, {"model": "new", "kl": 2, "extra": "a,b"}, "new")
    rows.append(file, {"model": "newer", "kl": 3}, "newer")
    assert file.read_text().splitlines()[0] == "model,kl,extra,commit,config"
    old, first, second = rows.read(file)
    assert (old["commit"], old["config"], old["kl"], old["extra"]) == ("", "", "1", "")
    assert first["extra"] == "a,b" and first["config"] != second["config"]
    assert first["commit"] == second["commit"] == rows.commit()
    rows.write(file, rows.read(file))
    assert rows.read(file) == [old, first, second], "what was measured keeps its commit"


def test_the_commit_is_the_repositorys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    rows.commit.cache_clear()
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    try:
        assert rows.commit() == ""
        (tmp_path / "optimizer").mkdir()
        (tmp_path / "optimizer" / "a.py").write_text("1")
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
            subprocess.run([*git, *words], check=True)
        rows.commit.cache_clear()
        clean = rows.commit()
        (tmp_path / "optimizer" / "a.py").write_text("2")
        rows.commit.cache_clear()
        assert len(clean) == 12 and rows.commit() == f"{clean}+"
    finally:
        rows.commit.cache_clear()


def test_a_key_is_of_what_was_asked_not_of_where(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Optimize(model="stories", data=Data(source="text", path="/home/a/story.txt"))
    elsewhere = replace(asked, store="/b", data=replace(asked.data, path="/c/story.txt"))
    assert rows.key(asked) == rows.key(elsewhere)
    others = [
        replace(asked, seed=1),
        replace(asked, data=replace(asked.data, path="/c/other.txt")),
    ]
    assert len({rows.key(asked), *map(rows.key, others), rows.key(asked, 1)}) == 4
    monkeypatch.setattr("sys.argv", ["/a/03-rounding/measure.py", "stories", "/a/text.txt"])
    typed = rows.key()
    monkeypatch.setattr("sys.argv", ["/b/03-rounding/measure.py", "stories", "/b/text.txt"])
    assert rows.key() == typed
    monkeypatch.setattr("sys.argv", ["/b/12-first-damage/measure.py", "stories", "/b/text.txt"])
    assert rows.key() != typed
