"""`mezzotint store`: what is kept, and getting rid of what nobody has used for long."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from optimizer.errors import ConfigError, StorageError
from optimizer.store import Store

DAY = 86400.0
AGE = re.compile(r"(\d+(?:\.\d+)?)([dh])")  # 30d, 12h
# kinds of entries that other results are read with, in words for a person
WORDS = {
    "models": "models that were converted or trained",
    "inventories": "lists of a model's tensors",
    "tokens": "calibration, search and held-out tokens",
    "tables": "sensitivity tables",
    "scores": "measured plans",
    "codes": "rounded layers",
    "grids": "scales of llama.cpp's blocks",
    "weights": "weights of tokens",
    "studies": "searches",
}


@dataclass(frozen=True)
class Kind:
    """Entries of one kind. used: when the newest was last written or read, seconds since 1970."""

    name: str
    entries: int
    bytes: int
    used: float

    @property
    def words(self) -> str:
        return WORDS.get(self.name, self.name)


@dataclass(frozen=True)
class Pruned:
    """What was removed, and what stayed."""

    entries: int
    bytes: int
    left: int


def kinds(store: Store) -> list[Kind]:
    """What the store holds, the largest first. An entry is a file or a folder of a kind's folder;
    locks and drafts don't count."""
    found = []
    for place in sorted(store.root.iterdir()) if store.root.is_dir() else ():
        own = _entries(place)
        if own:
            sizes, times = zip(*(_measured(entry) for entry in own), strict=True)
            found.append(Kind(place.name, len(own), sum(sizes), max(times)))
    return sorted(found, key=lambda kind: -kind.bytes)


def seconds(text: str) -> float:
    """`30d` or `12h` in seconds. Raises ConfigError."""
    match = AGE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"An age is a number of days or hours, such as 30d or 12h, not {text!r}."
        )
    return float(match[1]) * (DAY if match[2] == "d" else DAY / 24)


def prune(store: Store, older: float, now: float | None = None) -> Pruned:
    """Remove entries that were neither written nor read for `older` seconds. What is removed is made
    again when it is needed. Raises StorageError."""
    now = time.time() if now is None else now
    removed, freed, left = 0, 0, 0
    for place in sorted(store.root.iterdir()) if store.root.is_dir() else ():
        for entry in _entries(place):
            size, used = _measured(entry)
            if now - used < older:
                left += size
                continue
            try:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            except OSError as error:
                raise StorageError(
                    f"{entry} couldn't be removed: {error.strerror or error}. {removed} entries were "
                    "removed before it. Free it, or remove it by hand."
                ) from None
            removed, freed = removed + 1, freed + size
    return Pruned(removed, freed, left)


def _entries(place: Path) -> list[Path]:
    if not place.is_dir() or place.is_symlink() or place.name.startswith("."):
        return []
    return [entry for entry in sorted(place.iterdir()) if not entry.name.startswith(".")]


def _measured(entry: Path) -> tuple[int, float]:
    """Bytes, and when it was last written or read (where the file system keeps that)."""
    files = [p for p in entry.rglob("*") if p.is_file()] if entry.is_dir() else [entry]
    stats = [
        file.stat() for file in files
    ]  # listing a folder counts as reading it, so not its own
    times = [max(stat.st_mtime, stat.st_atime) for stat in stats]
    return sum(stat.st_size for stat in stats), max(times, default=entry.stat().st_mtime)
