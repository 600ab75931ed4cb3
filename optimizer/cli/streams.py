"""Where output goes, also when nobody takes it: a closed pipe, a full disk, no stdout at all.

A run goes on without its words: what it writes to its folder matters more. The exit code tells.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

CLOSED_PIPE = 141  # 128 + SIGPIPE, as of a program that the signal ended


class Outlet:
    """stdout, whose first failure is kept and after which everything is thrown away."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        self._guarded("write", text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._stream is not None:
            self._guarded("flush")

    def _guarded(self, name: str, *arguments: str) -> None:
        if self.failure is not None:
            return
        try:
            if self._stream is None:  # Python's stdout where its descriptor is closed
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            getattr(self._stream, name)(*arguments)
        except UnicodeEncodeError:  # a terminal without UTF-8
            coding = self._stream.encoding or "ascii"
            self._stream.write(arguments[0].encode(coding, "replace").decode(coding))
        except OSError as error:
            self.failure = error
            self._drop()

    def _drop(self) -> None:
        """What the stream still holds back goes nowhere, too: Python would complain at its end."""
        with suppress(OSError, ValueError, AttributeError):
            descriptor = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            if name == "encoding":
                return "utf-8"
            raise AttributeError(name)
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and bool(self._stream.isatty())

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return int(self._stream.fileno())


@contextmanager
def outlet() -> Iterator[Outlet]:
    """Inside, sys.stdout is an Outlet."""
    before = sys.stdout
    found = Outlet(before)
    _open_descriptors()
    sys.stdout = found
    try:
        yield found
        found.flush()
    finally:
        sys.stdout = before


def _open_descriptors() -> None:
    """A closed 0, 1 or 2 would be given to the next file that is opened, and be written into."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM stops the program as Ctrl-C does."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(text: str) -> None:
    """A line on stderr, if there is one."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
