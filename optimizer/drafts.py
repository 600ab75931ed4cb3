"""Files and folders that are written as hidden drafts and then take their place in one step.

The process that writes a draft holds a lock on it, which the kernel drops with the process. So a
draft that can be locked was left by a dead process, and `sweep` removes it.

A folder takes an old one's place by an exchange of names, where the system has that. Where it
hasn't, and where `target` can't be renamed (a mount point, the current folder), its files are moved
one by one:
    model    the draft is being written; of a dead process: removed
    ready    the draft is whole, old files are moved to `old`
    filling  all old files are in `old`, new ones are moved into the target
From `ready` on nothing is removed before the new folder stands: `recover` finishes what a kill left.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: drafts of the dead stay there
    fcntl = None  # type: ignore[assignment]

MARK = ".mezzotint-"
DRAFT = re.compile(r"\..*\.mezzotint-[a-z0-9_]{8}", re.DOTALL)
LONGEST = 50  # characters of a target's name in its draft's; a file's name has 255 bytes
SEAL = (
    "manifest.json"  # tells that a folder is whole: of old files it goes first, of new ones last
)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


# ---------------------------------------------------------------- drafts and their owners


def is_draft(path: Path) -> bool:
    return DRAFT.fullmatch(path.name) is not None


def sweep(place: Path, name: str | None = None) -> None:
    """Remove the drafts in the folder `place` whose process is dead: those of `name`, or all. A folder
    that was already taking its target's place is left to `recover`."""
    for draft in _drafts(place, name):
        with _taken(draft) as dead:
            if dead and not _whole(draft):
                _remove(draft)


@contextmanager
def file(target: Path) -> Iterator[tuple[int, Path]]:
    """(open file, path) of a new draft beside `target`; removed if it is still there at the end."""
    sweep(target.parent, target.name)
    handle, draft = _new(target.parent, target.name, _make_file)
    try:
        yield handle, draft
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def folder(place: Path, name: str) -> Iterator[Path]:
    """A new draft folder in `place`, removed at the end unless it must be recovered."""
    handle, draft = _new(place, name, _make_folder)
    try:
        yield draft
    finally:
        if not _whole(draft):
            _remove(draft)
        os.close(handle)


def _prefix(name: str) -> str:
    return f".{name[:LONGEST]}{MARK}"


def _make_file(place: Path, name: str) -> tuple[int, Path]:
    handle, path = tempfile.mkstemp(dir=place, prefix=_prefix(name))
    return handle, Path(path)


def _make_folder(place: Path, name: str) -> tuple[int, Path]:
    path = tempfile.mkdtemp(dir=place, prefix=_prefix(name))
    return os.open(path, os.O_RDONLY), Path(path)


def _new(
    place: Path, name: str, make: Callable[[Path, str], tuple[int, Path]]
) -> tuple[int, Path]:
    """A locked draft. One that another process took for dead before it was locked is made again."""
    while True:
        handle, draft = make(place, name)
        _lock(handle, wait=True)
        with suppress(OSError):
            if os.path.samestat(draft.stat(), os.fstat(handle)):
                return handle, draft
        os.close(handle)


def _drafts(place: Path, name: str | None) -> list[Path]:
    start = "." if name is None else _prefix(name)
    try:
        found = [Path(entry.path) for entry in os.scandir(place) if entry.name.startswith(start)]
    except OSError:
        return []
    return [path for path in found if is_draft(path)]


@contextmanager
def _taken(draft: Path) -> Iterator[bool]:
    """Whether this process now owns the draft, because nobody else does."""
    try:
        handle = os.open(draft, os.O_RDONLY if draft.is_dir() else os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        yield _lock(handle, wait=False)
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    """Whether the lock is held; never on a file system that has none, where nothing is swept."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with suppress(OSError):
            draft.unlink()


# ---------------------------------------------------------------- folders


def publish(target: Path, fill: Callable[[Path], None]) -> None:
    """`fill` writes into a draft, which then takes the place of the folder `target`, if there is one.
    target: resolved. After an exception it is as it was; after a kill too, or `recover` finishes the
    new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    new = not target.exists() or is_empty(target)
    with folder(place_of(target), target.name) as draft:
        model = draft / "model"
        model.mkdir()
        fill(model)
        if draft.parent != target:
            if new:
                model.rename(target)  # an error if somebody else filled it meanwhile
                return
            try:
                exchange(model, target)
                return
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM):
                    raise
        model.rename(draft / "ready")
        try:
            _finish(draft, target)
        except OSError:
            _undo(draft, target)
            raise


def recover(target: Path) -> None:
    """Finish what a killed process began, and remove its drafts of `target`."""
    for place in (target.parent, target):
        for draft in _drafts(place, target.name):
            with _taken(draft) as dead:
                if dead and _whole(draft):
                    _finish(draft, target)
        sweep(place, target.name)


def is_empty(target: Path) -> bool:
    """Whether the folder holds nothing but drafts."""
    return target.is_dir() and all(map(is_draft, target.iterdir()))


def place_of(target: Path) -> Path:
    """The folder in which a draft can be moved to `target`: beside it, or inside of it where it is a
    mount point, its parent can't be written, or it is the current folder, which a shell would lose."""
    if not target.exists():
        return target.parent
    if Path.cwd().is_relative_to(target):
        return target
    try:
        with folder(target.parent, target.name) as draft:
            (draft / "probe").mkdir()
            moved = target / draft.name
            (draft / "probe").rename(moved)
            moved.rmdir()
    except OSError:
        return target
    return target.parent


def exchange(one: Path, other: Path) -> None:
    """Swap two names of one file system in one step. Raises OSError where that can't be done."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def _whole(draft: Path) -> bool:
    return (draft / "ready").is_dir() or (draft / "filling").is_dir()


def _finish(draft: Path, target: Path) -> None:
    """From `ready` or `filling` to a target that holds the new files and no others."""
    ready, filling, old = draft / "ready", draft / "filling", draft / "old"
    target.mkdir(exist_ok=True)
    if ready.is_dir():
        old.mkdir(exist_ok=True)
        for path in sorted(target.iterdir(), key=lambda path: path.name != SEAL):
            if not is_draft(path):
                path.rename(old / path.name)
        ready.rename(filling)
    for path in sorted(filling.iterdir(), key=lambda path: path.name == SEAL):
        path.rename(target / path.name)
    filling.rmdir()


def _undo(draft: Path, target: Path) -> None:
    """After an error in `_finish`: the old files are back, the new ones are a mere draft again."""
    ready, filling, old = draft / "ready", draft / "filling", draft / "old"
    if filling.is_dir():
        for path in sorted(target.iterdir(), key=lambda path: path.name != SEAL):
            if not is_draft(path):
                path.rename(filling / path.name)
        filling.rename(ready)
    for path in sorted(old.iterdir(), key=lambda path: path.name == SEAL) if old.is_dir() else ():
        path.rename(target / path.name)
    ready.rename(draft / "model")
