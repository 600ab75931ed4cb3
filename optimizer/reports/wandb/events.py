"""What a run tells the process beside it: a file of JSON lines, written by the run and read while it
grows. Writing never waits for the reader, and costs nothing when the disk is full.

    {"begin": {key, model, config}}           first, as soon as the run's question is known
    {"row": KIND, "values": {...}}            numbers of one moment: progress, table, trial
    {"plans": {NAME: [[bytes, loss], ...]}}   points for the front
    {"end": true}                             the run's folder is complete; false: it never will be
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from optimizer.stages.view import View

EVERY = 1.0  # seconds between two rows of progress
LOOK_SECONDS = 0.5


class Told(View):
    """Passes everything on to `inner`, and writes it down in `file`. begun: called after the first
    event; what comes before it, such as the reading of a text, isn't written down."""

    def __init__(self, inner: View, file: Path, begun: Callable[[], None]) -> None:
        self._inner, self._file, self._begun = inner, file, begun
        self._last, self._open = 0.0, False

    def _write(self, event: Mapping[str, Any]) -> None:
        if not self._open:
            return
        with suppress(OSError), self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event, default=str) + "\n")

    # ------------------------------------------------------------ for a person

    def expect(self, stages: Mapping[str, float]) -> None:
        self._inner.expect(stages)

    def enter(self, stage: str) -> None:
        self._inner.enter(stage)

    def stage(self, text: str) -> None:
        self._inner.stage(text)

    def note(self, text: str) -> None:
        self._inner.note(text)

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        items = list(items)
        for done, item in enumerate(self._inner.track(items, text), 1):
            yield item
            self._progress(text, done, len(items))

    @contextmanager
    def meter(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:
        with self._inner.meter(text, total) as tell:

            def both(done: int, news: str) -> None:
                tell(done, news)
                self._progress(text, done, total)

            yield both

    def _progress(self, text: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= EVERY or done >= total:
            self._last = now
            self.row("progress", {"stage": text, "done": done, "of": total})

    # ------------------------------------------------------------ for a record

    def begin(self, key: str, model: str, config: Mapping[str, Any]) -> None:
        self._open = True
        self._write({"begin": {"key": key, "model": model, "config": config}})
        self._begun()

    def end(self, complete: bool) -> None:
        self._write({"end": complete})

    def row(self, kind: str, values: Mapping[str, Any]) -> None:
        self._write({"row": kind, "values": {**values, **memory()}})

    def plans(self, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        self._write({"plans": {name: [*map(list, some)] for name, some in points.items()}})


def memory() -> dict[str, float]:
    """What this process holds now, in GB, and its tensors on a GPU, if it uses one."""
    found = {"memory": psutil.Process().memory_info().rss / 1e9}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["memory on the device"] = torch.cuda.memory_allocated() / 1e9
    return found


def read(file: Path, gone: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Its events as they come. The last is `end`, unless the writer was killed."""
    with file.open(encoding="utf-8") as stream:
        line = ""
        while True:
            last = gone()  # asked first: what was written until then is read
            line += stream.readline()
            if line.endswith("\n"):
                event = json.loads(line)
                line = ""
                yield event
                if "end" in event:
                    return
            elif last:
                return
            else:
                time.sleep(LOOK_SECONDS)
