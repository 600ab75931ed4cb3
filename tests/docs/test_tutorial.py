"""The tutorial's commands do what it says, in the words that it shows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.py"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(PAGE))


def words(text: str) -> list[str]:
    """Without numbers, which differ in a last digit from one processor to another, and without the
    lines of tables."""
    return [w for w in re.split(r"[\s\d.\[\]│┃┡┩╇━─┏┓┳┴┬├┤┼└┘,]+", text) if w]


def test_the_page_has_the_commands_of_the_script(script: dict[str, Any]) -> None:
    page = PAGE.with_suffix(".md").read_text(encoding="utf-8")
    asked = [line[2:] for line in page.splitlines() if line.startswith("$ ")]
    assert asked == script["commands"](script["TEXT"]) and len(asked) >= 7
    prose = re.sub(r"\s+", " ", BLOCK.sub("", page))
    assert prose == re.sub(r"\s+", " ", BLOCK.sub("", script["TEXT"]))


@pytest.mark.slow
def test_the_commands_print_what_the_page_shows(
    script: dict[str, Any], mezzotint: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture gives an empty folder and a store; the commands run in it one after the other."""
    monkeypatch.setenv("COLUMNS", script["WIDTH"])
    page = PAGE.with_suffix(".md").read_text(encoding="utf-8")
    for block in BLOCK.findall(page):
        for part in block.split("$ ")[1:]:
            command, _, shown = part.partition("\n")
            code, printed = script["printed"](command)
            assert code == (2 if "would fail" in shown else 0), printed
            told = words(printed)
            if " generate " not in command:
                missing = [w for w in words(shown) if w.isalpha() and w not in told]
                assert not missing, (command, missing)
