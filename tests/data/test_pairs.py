"""The suite of minimal pairs, and pairs of one's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from optimizer.data.pairs import HERE, built_in, read
from optimizer.errors import ConfigError, TextError

GOOD = {"prefix": "Mia had a", "good": " red ball", "bad": " red sad"}


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "mine.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


def test_the_suite_is_whole() -> None:
    pairs = built_in()
    counts = Counter(pair.cell for pair in pairs)
    assert len(counts) == 30
    assert set(counts.values()) == {64}
    assert len({pair.id for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.prefix == pair.prefix.strip(), pair.id
        assert len({pair.good, pair.bad}) == 2, pair.id
        assert pair.id.startswith(f"{pair.phenomenon}-{pair.language}"), pair.id
        cyrillic = sum("а" <= char <= "я" for char in (pair.prefix + pair.good).lower())
        assert (cyrillic > 5) == (pair.language == "ru"), pair.id
    assert "CC0" in (HERE / "README.md").read_text(encoding="utf-8")


def test_half_of_the_pairs_are_exchanged_in_another() -> None:
    """Couples cancel a preference for one of the continuations."""
    pairs = built_in()
    ends = {(pair.cell, pair.good, pair.bad) for pair in pairs}
    coupled = sum((pair.cell, pair.bad, pair.good) in ends for pair in pairs)
    assert coupled >= 0.4 * len(pairs)


def test_a_users_file_may_leave_out_the_names(tmp_path: Path) -> None:
    first, second = read(written(tmp_path, GOOD, "", GOOD | {"id": "x", "phenomenon": "colour"}))
    assert first.cell == ("own", "-")
    assert second.cell == ("colour", "-")
    assert first.id == "line 1"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{oops", "line 2 isn't JSON"),
        ("[1, 2]", "line 2 is no JSON object"),
        ({"prefix": "a", "good": " b"}, "line 2 lacks the field 'bad'"),
        (GOOD | {"good": 3}, "line 2: field 'good' must be text, not int"),
        (GOOD | {"bad": "  "}, "line 2: field 'bad' is empty"),
        (GOOD | {"wrong": "x"}, "line 2 has the field 'wrong'"),
        (GOOD | {"id": "line 1"}, "line 2 has the id 'line 1' of line 1"),
        (GOOD | {"bad": " red ball and a kite"}, "field 'bad' begins with the whole of 'good'"),
        (GOOD | {"bad": " red ball"}, "begins with the whole of"),
        ('{"prefix": "a", "good": " \\ud800", "bad": " b"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, wanted: str) -> None:
    file = written(tmp_path, GOOD, line)
    with pytest.raises(TextError) as caught:
        read(file)
    assert wanted in str(caught.value)
    assert str(file) in str(caught.value)


def test_files_that_are_no_probes(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="There is no probe file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(TextError, match="holds no pairs"):
        read(written(tmp_path, "", ""))
    (tmp_path / "old.jsonl").write_bytes('{"prefix": "Да"}'.encode("cp1251"))
    with pytest.raises(TextError, match="UTF-8"):
        read(tmp_path / "old.jsonl")
    with pytest.raises(ConfigError, match="'xx'"):
        built_in(["xx"])
