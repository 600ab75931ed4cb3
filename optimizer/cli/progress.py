"""What a person sees while it runs: on a terminal bars, elsewhere a line each half minute; both say
which stage of how many it is and how long all of it may still take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from optimizer.stages.view import View

MOST = 0.8  # of what is left of a stage that one bar stands for
KNOWN = 0.02  # share from which on the rest is guessed from it
EVERY = 30.0  # seconds between two lines where output is no terminal


class Whole:
    """How far a run has come. expected: stages in order, each with its cost in any one unit; the
    time that is left is what the finished share took, scaled."""

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float]) -> None:
        self._costs = dict(expected)
        self._clock, self._since = clock, clock()
        self.now, self.share, self._from = "", 0.0, 0.0

    def enter(self, stage: str) -> None:
        if stage in self._costs:
            self.now, self.share, self._from = stage, 0.0, 0.0

    def bar(self) -> None:
        """A bar begins. A stage may have several, and nobody knows how many are still to come."""
        self._from = self.share

    def fill(self, share: float) -> None:
        """The bar is filled to `share`, and so is most of what was left of the stage before it."""
        self.share = self._from + MOST * (1 - self._from) * min(share, 1.0)

    @property
    def place(self) -> str:
        """`2 of 6`; empty before the first stage and where stages aren't known."""
        if self.now not in self._costs:
            return ""
        return f"{list(self._costs).index(self.now) + 1} of {len(self._costs)}"

    @property
    def several(self) -> bool:
        """Whether there is more than one stage."""
        return len(self._costs) > 1

    @property
    def left(self) -> float | None:
        """Seconds; None before there is anything to go by."""
        if self.now not in self._costs:
            return None
        names = list(self._costs)
        done = sum(self._costs[name] for name in names[: names.index(self.now)])
        done += self.share * self._costs[self.now]
        total = sum(self._costs.values())
        if done < KNOWN * total:
            return None
        return (self._clock() - self._since) * (total - done) / done

    @property
    def told(self) -> str:
        left = self.left
        return "" if left is None else f"about {duration(left)} left in all"


class Item:
    """How far one item of a bar has come, by those that begin while it is worked on, which get no bars
    of their own. tell: hears the share and what it is at."""

    def __init__(self, tell: Callable[[float, str], None]) -> None:
        self._tell, self._share, self._from = tell, 0.0, 0.0

    def bar(self) -> None:
        self._from = self._share

    def fill(self, share: float, news: str) -> None:
        self._share = self._from + MOST * (1 - self._from) * min(share, 1.0)
        self._tell(self._share, news)


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 10 min`: no more exact than a guess."""
    if seconds < 90:
        return f"{max(round(seconds / 10) * 10, 10):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _silent(_done: int, _news: str) -> None:
    """Where nothing is shown."""


class Left(ProgressColumn):
    """The whole run's remaining time."""

    def __init__(self, whole: Whole) -> None:
        super().__init__()
        self._whole = whole

    def render(self, task: Task) -> Text:  # noqa: ARG002
        return Text(self._whole.told if self._whole.several else "", "dim")


class Terminal(View):
    """Progress with a remaining time; notes and stages as lines."""

    def __init__(self, out: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self._clock = out, clock
        self._item: Item | None = None  # of the bar that is shown
        self._whole = Whole({}, clock)
        self._last = clock()

    def expect(self, stages: Mapping[str, float]) -> None:
        self._whole = Whole(stages, self._clock)

    def enter(self, stage: str) -> None:
        self._whole.enter(stage)

    def stage(self, text: str) -> None:
        self.out.print(f"{text} ...", style="dim", markup=False)

    def note(self, text: str) -> None:
        self.out.print(text, soft_wrap=True, markup=False)

    def _titled(self, text: str) -> str:
        place = self._whole.place
        return f"stage {place}: {text}" if place else text

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        items = list(items)
        if self._item is not None:
            self._item.bar()
            for i, item in enumerate(items):
                self._item.fill(i / len(items), f"{text} {i} of {len(items)}")
                yield item
            return
        try:
            with self._shown(text, len(items)) if items else nullcontext(_silent) as tell:
                for i, item in enumerate(items):

                    def at(share: float, news: str, i: int = i) -> None:
                        self._whole.fill((i + share) / len(items))
                        tell(i, news)

                    self._item = Item(at)
                    at(0, "")
                    yield item
                    tell(i + 1, "")
        finally:
            self._item = None

    @contextmanager
    def meter(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:
        if (item := self._item) is not None:
            item.bar()
            yield lambda done, news: item.fill(done / total if total else 1.0, f"{text} {news}")
            return

        def follow(tell: Callable[[int, str], None]) -> Callable[[int, str], None]:
            def both(done: int, news: str) -> None:
                self._whole.fill(done / total if total else 1.0)
                tell(done, news)

            return both

        with self._shown(text, total, counted=False) as tell:
            yield follow(tell)

    @contextmanager
    def _shown(
        self, text: str, total: int, counted: bool = True
    ) -> Iterator[Callable[[int, str], None]]:
        shown = self._bar if self.out.is_terminal else self._lines
        self._whole.bar()
        with shown(self._titled(text), total, counted) as tell:
            yield tell

    @contextmanager
    def _bar(self, text: str, total: int, counted: bool) -> Iterator[Callable[[int, str], None]]:
        columns = (
            TextColumn(f"{text:<40}", markup=False),
            BarColumn(24),
            *([MofNCompleteColumn()] if counted else []),
            TextColumn("{task.fields[news]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            Left(self._whole),
        )
        with Progress(*columns, console=self.out, speed_estimate_period=300) as progress:
            task = progress.add_task(text, total=total, news="")
            yield lambda done, news: progress.update(task, completed=min(done, total), news=news)

    @contextmanager
    def _lines(
        self,
        text: str,
        total: int,
        counted: bool,
    ) -> Iterator[Callable[[int, str], None]]:
        """A line at once, and then one each EVERY seconds, from a thread beside: a single step may
        take longer than that."""
        begun, ended = self._clock(), threading.Event()
        state: tuple[int, str] = (0, "")

        def line() -> str:
            done, news = state
            spent, share = self._clock() - begun, done / max(total, 1)
            told = [
                f"{text}: {done} of {total}" if counted else f"{text}: {share:.0%}",
                news,
                f"{spent:.0f} s so far",
                f"about {duration(spent * (1 / share - 1))} left" if 0 < share < 1 else "",
                self._whole.told if self._whole.several else "",
            ]
            return ", ".join(part for part in told if part)

        def tell(done: int, news: str) -> None:
            nonlocal state
            state = (min(done, total), news)

        def speak() -> None:
            while not ended.wait(EVERY):
                self.out.print(line(), soft_wrap=True, markup=False)

        self.out.print(f"{text} ...", style="dim", markup=False)
        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        try:
            yield tell
        finally:
            ended.set()
            speaker.join()
