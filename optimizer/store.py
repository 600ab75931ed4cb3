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
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import StorageError

if TYPE_CHECKING:
    import numpy as np


def write_atomically(path: Path, data: bytes) -> Path:
    """Write beside the target, flush to disk, then rename over it."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp's 0600 would hide results from a team
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                Path(temporary).unlink()
        raise unwritable(path, error) from None
    return path


def unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} couldn't be written: {error.strerror or error}. Nothing half-written is left. "
        "Free space or choose another folder, then run the same command: it goes on from there."
    )


@dataclass(frozen=True)
class Store:
    """`root/kind/key.json` and `root/kind/key.safetensors`."""

    root: Path

    def path(self, kind: str, key: str, suffix: str) -> Path:
        return self.root / kind / f"{key[:40]}{suffix}"

    def json(self, kind: str, key: str, make: Callable[[], Any] | None = None) -> Any:
        """The entry; made and kept if it is missing and `make` is given, else None."""
        path = self.path(kind, key, ".json")
        with suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
        if make is None:
            return None
        with alone(path):
            with suppress(OSError, ValueError):  # made while this process waited
                return json.loads(path.read_text(encoding="utf-8"))
            value = make()
            write_atomically(path, json.dumps(value).encode())
        return value

    def arrays(
        self, kind: str, key: str, make: Callable[[], dict[str, np.ndarray]] | None = None
    ) -> dict[str, np.ndarray] | None:
        """Named arrays; as `json`."""
        from safetensors import SafetensorError
        from safetensors.numpy import load, save

        path = self.path(kind, key, ".safetensors")
        with suppress(OSError, SafetensorError):
            return load(path.read_bytes())
        if make is None:
            return None
        with alone(path):
            with suppress(OSError, SafetensorError):  # made while this process waited
                return load(path.read_bytes())
            import numpy as np

            # safetensors writes a view's memory, not its values
            value = {name: np.ascontiguousarray(array) for name, array in make().items()}
            write_atomically(path, save(value))
        return value


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """The only process on this machine that makes the entry at `path`."""
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise unwritable(path, OSError(str(error))) from None
    try:
        yield
    finally:
        lock.release()
