"""Words of the command line -> overrides in Hydra's grammar.

A path may hold what that grammar gives a meaning to: = , ( ) { } $ ' and backslashes. A path that
exists, or stands where a path must, is quoted here, and so are pins, which hold a =; others are told
how to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from optimizer.reports.run import quoted

OVERRIDE = re.compile(r"(?:\+\+?|~)?([\w./@-]+?)(?:@[\w.:]*)?=")
MEANT = re.compile(r"[=,(){}\[\]$'\"\\\s#:]")  # has a meaning in Hydra's grammar, or may have

PINS, QUOTES = "policy.pins", re.compile(r"['\"\\{}$]")

VALUED = {
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--config-dir",
    "-cd",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--package",
    "-p",
    "--experimental-rerun",
}


def placed(words: Sequence[str], places: Sequence[str], keys: Collection[str]) -> list[str]:
    """The first words become `place=word` where they are paths. keys: of the command's settings; a
    word that sets none of them is a path even if it holds a =."""
    found = list(words)
    for i, place in enumerate(places[: len(found)]):
        if not _is_path(found[i], keys):
            break
        found[i] = f"{place}={quoted(found[i])}"
    return [*found[: len(places)], *(_with_path(word, words) for word in found[len(places) :])]


def listed(words: Sequence[str], key: str, keys: Collection[str]) -> list[str]:
    """The paths before the first setting become one setting with a list."""
    count = next((i for i, w in enumerate(words) if not _is_path(w, keys)), len(words))
    if not count:
        return list(words)
    return [f"{key}=[{','.join(map(quoted, words[:count]))}]", *words[count:]]


def flags_first(words: Sequence[str]) -> list[str]:
    """Hydra's flags with their values, then the overrides: argparse takes these in one piece only."""
    first: list[str] = []
    rest: list[str] = []
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        valued = before in VALUED or (before.startswith("-") and "=" not in word)
        (first if word.startswith("-") or valued else rest).append(word)
    return [*first, *rest]


def _is_path(word: str, keys: Collection[str]) -> bool:
    if _exists(word):
        return True
    if word.startswith("-"):
        return False
    match = OVERRIDE.match(word)
    return match is None or match[1].split(".")[0] not in {*keys, "hydra"}


def _with_path(word: str, words: Sequence[str]) -> str:
    """KEY=PATH with the path quoted, where it names something that exists and needs it."""
    match = OVERRIDE.match(word)
    if match is None or {"-m", "--multirun"} & set(words):
        return word
    value = word[match.end() :]
    if match[1] == PINS and not QUOTES.search(value):
        return f"{match[0]}{_pins(value)}"
    odd = MEANT.search(value) is not None or value.startswith("-")
    return f"{match[0]}{quoted(value)}" if odd and _exists(value) else word


def _pins(value: str) -> str:
    """One pin, or a list of them in brackets, with each quoted."""
    if not (value.startswith("[") and value.endswith("]")):
        return quoted(value)
    entries = [entry.strip() for entry in value[1:-1].split(",")]
    return f"[{','.join(quoted(entry) for entry in entries if entry)}]"


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # a NUL, or longer than a name may be
        return False


def advice(words: Sequence[str]) -> str:
    """For a message about overrides that couldn't be read: how such a value is written."""
    for word in words:
        match = OVERRIDE.match(word)
        if match is not None and MEANT.search(word[match.end() :]):
            value = word[match.end() :].strip("'\"")
            return (
                f"If {value[:60]!r} is a path or a name, quote it for Hydra and for the shell: "
                f'"{match[1]}={quoted(value[:200])}".'
            )
    return ""
