"""Results that are kept: a folder of content-keyed entries, each written whole or not at all.

An entry's key is the digest of everything that determines its value, so an entry is never
stale and is found again by the next run, whatever that run is called. Entries are JSON or
safetensors, never pickles. A damaged entry counts as missing. Processes that want the same entry
at the same time make it once: the others wait for the one that holds its lock. A killed process
loses its locks, so nothing stays locked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer import drafts
from optimizer.errors import StorageError

if TYPE_CHECKING:
    import numpy as np


def root(text: str) -> Path:
    """The store's folder, `~` resolved. Raises StorageError where that can't be told."""
    try:
        if text.strip():
            return Path(text).expanduser()
    except RuntimeError:  # neither HOME nor an account
        pass
    raise StorageError(
        f"What is measured is kept in a folder; store={text!r} names none here. Set store=DIR, or "
        "MEZZOTINT_STORE."
    )


def write_atomically(path: Path, data: bytes) -> Path:
    """Write a draft beside the target, flush to disk, then rename over it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with drafts.file(path) as (handle, draft):
            with os.fdopen(handle, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            umask = os.umask(0)
            os.umask(umask)
            draft.chmod(0o666 & ~umask)  # a draft's 0600 would hide results from a team
            draft.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    return path


def unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} couldn't be written: {error.strerror or error}. Nothing half-written is left. "
        "Free space or choose another folder, then run the same command: it goes on from there."
    )


def _digest(data: bytes) -> bytes:
    return sha256(data).hexdigest().encode()


def _silent(_text: str) -> None:
    """Who gives no `tell` isn't told."""


@dataclass(frozen=True)
class Store:
    """`root/kind/key.json` and `root/kind/key.safetensors`, each with a line behind it that holds
    its SHA-256. tell: hears of damaged entries."""

    root: Path
    tell: Callable[[str], None] = field(default=_silent, compare=False)
    _damaged: set[Path] = field(default_factory=set, compare=False)

    @classmethod
    def open(cls, text: str, tell: Callable[[str], None] = _silent) -> Store:
        """The store that `store=` names, without what killed processes left there."""
        found = cls(root(text), tell)
        found.sweep()
        return found

    def path(self, kind: str, key: str, suffix: str) -> Path:
        return self.root / kind / f"{key[:40]}{suffix}"

    def sweep(self) -> None:
        """Remove what killed processes left half-written, and their locks."""
        for place in self.root.iterdir() if self.root.is_dir() else ():
            drafts.sweep(place)
            for lock in place.glob(".*.lock"):
                drop(lock)

    def json(self, kind: str, key: str, make: Callable[[], Any] | None = None) -> Any:
        """The entry; made and kept if it is missing and `make` is given, else None."""
        path = self.path(kind, key, ".json")
        return self._entry(path, json.loads, make, lambda value: json.dumps(value).encode())

    def arrays(
        self, kind: str, key: str, make: Callable[[], dict[str, np.ndarray]] | None = None
    ) -> dict[str, np.ndarray] | None:
        """Named arrays; as `json`."""
        from safetensors import SafetensorError
        from safetensors.numpy import load, save

        def parse(data: bytes) -> dict[str, np.ndarray]:
            try:
                return dict(load(data))
            except SafetensorError as error:
                raise ValueError(str(error)) from None

        def whole() -> dict[str, np.ndarray]:
            import numpy as np

            assert make is not None  # safetensors writes a view's memory, not its values
            return {name: np.ascontiguousarray(array) for name, array in make().items()}

        path = self.path(kind, key, ".safetensors")
        found: dict[str, np.ndarray] | None = self._entry(path, parse, make and whole, save)
        return found

    def _entry(
        self,
        path: Path,
        parse: Callable[[bytes], Any],
        make: Callable[[], Any] | None,
        encode: Callable[[Any], bytes],
    ) -> Any:
        for value in self._read(path, parse):
            return value
        if make is None:
            return None
        with alone(path):
            for value in self._read(path, parse):  # made while this process waited
                return value
            value = make()
            data = encode(value)
            write_atomically(path, data + b"\n" + _digest(data))
        return value

    def _read(self, path: Path, parse: Callable[[bytes], Any]) -> list[Any]:
        """[the entry], or [] if there is none that can be read."""
        try:
            data, _, mark = path.read_bytes().rpartition(b"\n")
        except OSError:
            return []
        try:
            if _digest(data) != mark:
                raise ValueError("other bytes than were written")
            return [parse(data)]
        except ValueError:
            if path not in self._damaged:
                self.tell(f"{path} is damaged, or of an earlier version; it is made again")
            self._damaged.add(path)
            return []


def drop(lock: Path) -> None:
    """Remove the file of a lock that nobody holds."""
    from filelock import FileLock, Timeout

    with suppress(OSError, NotImplementedError, Timeout), FileLock(lock, blocking=False):
        lock.unlink()


def _free() -> None:
    """Who waits isn't told."""


@contextmanager
def alone(path: Path, busy: Callable[[], None] = _free) -> Iterator[None]:
    """The only process on this machine that makes the entry at `path`. busy: called before waiting
    for another one."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            busy()
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise unwritable(path, OSError(str(error))) from None
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()  # still held: who waits for it sees that it is gone
        lock.release()
