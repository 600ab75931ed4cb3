"""The terminal as a place for texts from anywhere: nothing in them is markup or steers it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from optimizer.untrusted import printable


class Screen(Console):
    """A console that takes strings as they are; what is styled is `Text`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)


def console() -> Console:
    """As wide as the terminal; 120 columns where there is none."""
    found = Screen()
    return found if found.is_terminal else Screen(width=120)


def note(out: Console, text: str, label: str = "Note:", style: str = "yellow") -> None:
    """A line with a label before it."""
    out.print(Text.assemble((label, style), " ", printable(text)), soft_wrap=True)


def within(value: str, low: str, high: str) -> Text:
    """A number with its interval."""
    return Text.assemble(value, " ", (f"[{low}, {high}]", "dim"))
