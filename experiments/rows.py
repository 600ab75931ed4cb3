"""An experiment's rows as CSV. Each carries the commit that measured it (with a + where the package
had changes of one's own) and a key of its settings: rows with the same key answer the same question.
Rows from before have neither.

`from experiments.rows import append, write` needs the repository's root on the path, where an editable
installation puts it.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from optimizer.plan import digest

ROOT = Path(__file__).parents[1]
MACHINE = ("store", "device")  # settings that say where, not what


def append(file: Path, row: Mapping[str, Any], *settings: Any) -> None:
    """One more row. settings: see `key`."""
    write(file, [*read(file), stamped(row, *settings)])


def write(file: Path, rows: Iterable[Mapping[str, Any]], *settings: Any) -> None:
    """All rows, of which those that have no commit get this one."""
    marked = [row if "commit" in row else stamped(row, *settings) for row in rows]
    columns = list(dict.fromkeys(name for row in marked for name in row))
    last = [name for name in ("commit", "config") if name in columns]
    names = [name for name in columns if name not in last] + last
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(marked)


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a file, [] if there is none. Those of before have an empty commit."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return [{"commit": "", "config": ""} | row for row in csv.DictReader(lines)]


def stamped(row: Mapping[str, Any], *settings: Any) -> dict[str, Any]:
    return dict(row) | {"commit": commit(), "config": key(*settings)}


def key(*settings: Any) -> str:
    """Of settings (dataclasses, or what JSON has), or else of the script and its words. Of a path its
    name counts, not where it is on this machine."""
    given = settings or (Path(sys.argv[0]).resolve().parent.name, *sys.argv)
    return digest([_plain(value) for value in given])[:12]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in MACHINE}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, int | float | None) else str(value).rpartition("/")[2]


@cache
def commit() -> str:
    """`1a2b3c4d5e6f`, with a + where a tracked file differs; "" outside of a repository."""
    if not (found := _git("rev-parse", "--short=12", "HEAD")):
        return ""
    return found + "+" * bool(_git("status", "--porcelain", "--untracked-files=no", "optimizer"))


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
