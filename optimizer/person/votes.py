"""votes.jsonl: what people said about pairs of texts, one line each, only ever appended to.

    vote    one answer, with what is needed to learn from it: whose texts, and their features
    same    a prompt that two models continue alike: it isn't asked, and counts as alike
    undo    takes a vote back; the vote's own line stays
    end     the names were revealed: nothing can be voted on in this session any more

A line that isn't one of these is named and left where it is. Each line is written at once and is on
the disk before a page answers.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from optimizer.errors import StorageError, TextError

CHOICES = ("first", "second", "alike", "lost", "skip")
TAGS = ("negation", "number", "name", "tone", "idiom", "logic", "language", "other words")
LONGEST = 2**20  # bytes of a line

STRICT = ConfigDict(extra="forbid", strict=True)
Choice = Literal["first", "second", "alike", "lost", "skip"]
Tag = Literal["negation", "number", "name", "tone", "idiom", "logic", "language", "other words"]
Name = Annotated[str, Field(max_length=400)]
Value = Annotated[float, Field(allow_inf_nan=False)]
Features = dict[str, Value]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]


@dataclass(frozen=True)
class About:
    """Which pair of texts. models, bytes, features: of the first text and the second, as shown.
    catch: both are the reference's."""

    __pydantic_config__ = STRICT
    prompt: Name
    domain: Name
    language: Name
    phenomenon: Name | None
    models: tuple[Name, Name]
    bytes: tuple[int, int]
    features: tuple[Features, Features]
    catch: bool = False


@dataclass(frozen=True)
class Line:
    """What every line has. id: never used twice. judge: who. session: which comparison."""

    __pydantic_config__ = STRICT
    judge: Name
    session: Name
    id: Name = field(default_factory=lambda: uuid.uuid4().hex)
    time: Time = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))


@dataclass(frozen=True, kw_only=True)
class Vote(Line):
    """seconds: from the page to the answer, for this start of the server; 0 = not known."""

    __pydantic_config__ = STRICT
    question: Name
    about: About
    choice: Choice
    tags: tuple[Tag, ...] = ()
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    kind: Literal["vote"] = "vote"


@dataclass(frozen=True, kw_only=True)
class Same(Line):
    __pydantic_config__ = STRICT
    about: About
    kind: Literal["same"] = "same"


@dataclass(frozen=True, kw_only=True)
class Undo(Line):
    """of: a vote's id."""

    __pydantic_config__ = STRICT
    of: Name
    kind: Literal["undo"] = "undo"


@dataclass(frozen=True, kw_only=True)
class End(Line):
    __pydantic_config__ = STRICT
    kind: Literal["end"] = "end"


Known = Vote | Same | Undo | End
READER: TypeAdapter[Known] = TypeAdapter(Annotated[Known, Field(discriminator="kind")])


def parse(raw: bytes) -> Known | str:
    """One line, or why it isn't one."""
    if len(raw) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    try:
        return READER.validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("vote", "same"))
        return f"{where + ': ' if where else ''}{first['msg']}"


@dataclass
class VoteFile:
    """lines: those that could be read, each id once. complaints: the others, by line number."""

    path: Path
    lines: list[Known] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    _read: int = 0  # bytes
    _count: int = 0  # lines
    _ids: set[str] = field(default_factory=set)

    def refresh(self) -> bool:
        """Read what was added since the last time, also by others. Returns whether anything was."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if size == self._read:
            return False
        if size < self._read:  # somebody cut the file: read it again
            self.lines, self.complaints, self._ids = [], [], set()
            self._read = self._count = 0
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                added = file.read(size - self._read)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        whole = added.rfind(b"\n") + 1  # a last line without its end is read when it is whole
        for raw in added[:whole].split(b"\n")[:-1]:
            self._take(raw)
        self._read += whole
        return whole > 0

    def _take(self, raw: bytes) -> None:
        self._count += 1
        raw = raw.removeprefix(b"\xef\xbb\xbf") if self._count == 1 else raw
        if not raw.strip():
            return
        found = parse(raw)
        if isinstance(found, str):
            self.complaints.append(
                f"{self.path}, line {self._count} is no line of a votes file ({found}). It is left "
                "where it is and not counted."
            )
        elif found.id not in self._ids:
            self._ids.add(found.id)
            self.lines.append(found)

    def rest(self) -> None:
        """Take a last line that lacks its end, too; for files that are only read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                added = file.read()
        except OSError as error:
            raise _unreadable(self.path, error) from None
        self._take(added)
        self._read += len(added)

    def mend(self) -> None:
        """End a last line that was cut off by a kill, so that the next one begins on its own."""
        if self.path.exists() and self.path.stat().st_size > self._read:
            self.put(b"\n")

    def append(self, *lines: Known) -> None:
        """On the disk when this returns. Raises StorageError, and then nothing was kept."""
        if lines:
            self.put(b"".join(READER.dump_json(line) + b"\n" for line in lines))

    def put(self, data: bytes) -> None:
        """Whole lines, as they are."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists()
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                _write_whole(handle, data)
            finally:
                os.close(handle)
            if fresh:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(
                f"{self.path} couldn't be written: {error.strerror or error}. This answer was not "
                "kept. Free space or choose another votes=FILE, and give it again."
            ) from None
        self.refresh()


def _write_whole(handle: int, data: bytes) -> None:
    """At the end of the file, after a line's end, and to the disk. What was written of it before an
    error is taken away again, as far as nobody wrote behind it."""
    end = os.fstat(handle).st_size
    if end and os.pread(handle, 1, end - 1) != b"\n" and data != b"\n":
        data = b"\n" + data  # after a kill in the middle of a line
    try:
        written = os.write(handle, data)
        if written < len(data):
            raise OSError(28, "No space left on device")
        os.fsync(handle)
    except OSError:
        if os.fstat(handle).st_size <= end + len(data):
            os.ftruncate(handle, end)
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unreadable(path: Path, error: OSError) -> TextError:
    return TextError(
        f"{path} couldn't be read: {error.strerror or error}. Correct the name, or its permissions."
    )


def standing(lines: Iterable[Known]) -> list[Vote]:
    """Votes that nobody took back, in the order in which they were given. Only who gave a vote can
    take it back."""
    lines = list(lines)
    undone = {(line.of, line.judge) for line in lines if isinstance(line, Undo)}
    return [
        line for line in lines if isinstance(line, Vote) and (line.id, line.judge) not in undone
    ]


def joined(files: Sequence[VoteFile]) -> list[Known]:
    """The lines of several files; one that is in two of them counts once."""
    found = {line.id: line for file in files for line in file.lines}
    return list(found.values())


def turned(about: About) -> About:
    """The same pair, shown the other way round."""
    models, sizes, features = about.models[::-1], about.bytes[::-1], about.features[::-1]
    return replace(about, models=models, bytes=sizes, features=features)


def plain(line: Known) -> dict[str, Any]:
    return asdict(line)
