"""Where trials are kept: a journal file, or a database that several machines reach.

A journal is Optuna's, one JSON operation a line, with a checksum in each. The file's own lock keeps
writers apart, so a killed one holds nothing up. A torn end is cut off before anything is appended; a
line that is JSON, but no operation, or another one than was written, is refused by its number.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import optuna
from optuna.distributions import json_to_distribution
from optuna.exceptions import OptunaError
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optimizer.errors import ConfigError, StorageError
from optimizer.search import credentials

try:
    import fcntl
except ImportError:  # Windows: two writers of one journal are not kept apart
    fcntl = None  # type: ignore[assignment]

CHECK = "check"  # Optuna passes over keys that it doesn't know
NUMBER = (int, float)
# Operations as Optuna 5 writes them: what each must have besides op_code and worker_id
FIELDS: dict[int, dict[str, Any]] = {
    0: {"study_name": str, "directions": list},
    1: {"study_id": int},
    2: {"study_id": int, "user_attr": dict},
    3: {"study_id": int, "system_attr": dict},
    4: {"study_id": int, "datetime_start": (str, type(None))},
    5: {"trial_id": int, "param_name": str, "param_value_internal": NUMBER, "distribution": str},
    6: {"trial_id": int, "state": int, "values": (list, type(None))},
    7: {"trial_id": int, "step": int, "intermediate_value": NUMBER},
    8: {"trial_id": int, "user_attr": dict},
    9: {"trial_id": int, "system_attr": dict},
}


def open_storage(url: str | None, default: Path, heartbeat: int = 30) -> BaseStorage:
    """A journal file, or a database that several machines reach. Raises StorageError."""
    if url is None:
        try:
            default.parent.mkdir(parents=True, exist_ok=True)
            return Journal(Lines(str(default)))
        except OSError as error:
            raise StorageError(
                f"The study's journal {default} can't be opened ({error})."
            ) from None
    check_address(url)
    return _database(credentials.whole(str(credentials.hidden(url))), heartbeat)


def check_address(url: str) -> None:
    """Raises ConfigError for what can't be a database's address. Parts of it aren't quoted: what
    can't be understood may be a password."""
    import sqlalchemy

    if "://" not in url:
        raise ConfigError(
            f"search.storage is a database address such as postgresql://user@host/name or "
            f"sqlite:///study.db, not {credentials.masked(url)!r}."
        )
    try:
        sqlalchemy.make_url(credentials.whole(url))
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise ConfigError(
            f"search.storage is {credentials.masked(url)}, which isn't a database's address: "
            "SCHEME://USER:PASSWORD@HOST:PORT/NAME. Write @, :, / and % in a password as %40, %3A, "
            "%2F and %25."
        ) from None


# ---------------------------------------------------------------- journals


class Lines(JournalFileBackend):
    """The lines of a journal."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps({**log, CHECK: _check(log)}, separators=(",", ":")) for log in logs]
        with _locked(Path(self._file_path)) as file:
            _cut(file, _whole(file, last=True))  # what a killed writer left
            file.seek(0, os.SEEK_END)
            file.write(("\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        number = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                number += 1
                reason = _fault(log)
                if reason:
                    raise refused(self._file_path, number, reason)
                yield log
        except (ValueError, RecursionError) as error:
            raise refused(self._file_path, number + 1, str(error)) from None


class Journal(JournalStorage):
    """A storage that names the line which it can't follow."""

    _backend: Lines

    def _sync_with_backend(self) -> None:
        try:
            super()._sync_with_backend()
        except (
            OptunaError
        ):  # of this program's own last line, such as a name that is there already
            raise
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise refused(
                self._backend._file_path, self._replay_result.log_number_read, reason
            ) from None


def mend(journal: Path) -> bool:
    """Cut off what a kill or a full disk left half-written, and what was appended to it; else no later
    run could read the journal. Returns whether there was anything."""
    if not journal.exists():
        return False
    with _locked(journal) as file:
        return _cut(file, _whole(file))


def refused(journal: str, number: int, reason: str) -> StorageError:
    return StorageError(
        f"Line {number} of the study's journal {journal} is no operation of a study as it was written "
        f"({reason}). Remove that line, or move the file away: its trials are then made again."
    )


@contextmanager
def _locked(journal: Path) -> Iterator[BinaryIO]:
    with journal.open("r+b") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _whole(file: BinaryIO, last: bool = False) -> int:
    """Bytes up to the first line that isn't whole. last: only the last one may be torn."""
    size = file.seek(0, os.SEEK_END)
    if last:
        file.seek(max(size - 1, 0))
        if file.read(1) in (b"\n", b""):
            return size
    file.seek(0)
    whole = 0
    for line in file:
        if not (line.endswith(b"\n") and (last or _is_json(line))):
            break
        whole += len(line)
    return whole


def _cut(file: BinaryIO, size: int) -> bool:
    """Whether there was more than `size` bytes."""
    if file.seek(0, os.SEEK_END) == size:
        return False
    file.truncate(size)
    return True


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    except RecursionError:  # refused when it is read
        return True
    return True


def _check(log: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in log.items() if k != CHECK}, sort_keys=True)
    return sha256(text.encode()).hexdigest()[:12]


def _fault(log: Any) -> str | None:
    """What is wrong with a line, or None. A line without a checksum was written by another program,
    such as optuna-dashboard's notes."""
    if not isinstance(log, dict) or not _is(log.get("op_code"), int):
        return "it names no operation"
    if CHECK in log and log[CHECK] != _check(log):
        return "its checksum says that it was changed"
    fields = FIELDS.get(log["op_code"])
    if fields is None:
        return f"there is no operation {log['op_code']}"
    for name, kind in {"worker_id": str, **fields}.items():
        if name not in log or not _is(log[name], kind):
            return f"its {name} is missing, or of another type"
    return _inner_fault(log)


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _inner_fault(log: dict[str, Any]) -> str | None:
    """What is wrong inside of fields that have the right type."""
    try:
        [StudyDirection(d) for d in log.get("directions", [])]
        TrialState(log.get("state", 0))
        for key in ("datetime_start", "datetime_complete"):
            if log.get(key) is not None:
                datetime.fromisoformat(log[key])
        pairs = (
            [(log["distribution"], log["param_value_internal"])] if "distribution" in log else []
        )
        values = log.get("params", {})
        pairs += [(text, values.get(name)) for name, text in log.get("distributions", {}).items()]
        for text, value in pairs:
            distribution = json_to_distribution(text)
            distribution.to_external_repr(value)
        if not all(_is(value, NUMBER) for value in log.get("values") or []):
            return "its values are no numbers"
        if not all(isinstance(log.get(k, {}), dict) for k in ("user_attrs", "system_attrs")):
            return "its attributes are no object"
        if any(len(log[k]) != 1 for k in ("user_attr", "system_attr") if k in log):
            return "it has not one attribute"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# ---------------------------------------------------------------- databases


def has_heartbeat(storage: BaseStorage) -> bool:
    return isinstance(getattr(storage, "_backend", storage), RDBStorage)


def _database(url: str, heartbeat: int, tries: int = 10) -> BaseStorage:
    """Workers that start together make the tables together: who is beaten tries again."""
    import sqlalchemy.exc
    from optuna.exceptions import StorageInternalError

    driver = url
    if url.startswith("postgresql://"):  # SQLAlchemy would look for the older driver psycopg2
        driver = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return RDBStorage(
                driver,
                heartbeat_interval=heartbeat,
                grace_period=2 * heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
    except (
        sqlalchemy.exc.SQLAlchemyError,
        StorageInternalError,
        ImportError,
        ValueError,
        OSError,
    ) as error:
        if tries == 1 or not _beaten(error):
            raise _unusable(url, error) from None
    time.sleep(np.random.default_rng().uniform(0.05, 0.5))
    return _database(url, heartbeat, tries - 1)


def _beaten(error: Exception) -> bool:
    """Another worker was making the same tables at this moment; they will be there soon."""
    text = str(error).lower()
    return any(sign in text for sign in ("already exists", "duplicate key", "unique", "locked"))


def _unusable(url: str, error: Exception) -> StorageError:
    said = credentials.clean(str(error)).strip()
    reason = said.splitlines()[0] if said else type(error).__name__
    return StorageError(
        f"The study's database {credentials.masked(url)} can't be used ({reason}). Check the "
        "address, that the server runs, and that its driver is installed "
        "(pip install 'mezzotint[postgres]')."
    )
