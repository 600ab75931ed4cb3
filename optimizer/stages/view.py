"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class View:
    """What a person sees while it runs; this one shows nothing."""

    def expect(self, stages: Mapping[str, float]) -> None:
        """A run's stages in order, with what each costs in a unit of their own."""

    def enter(self, stage: str) -> None:
        """One of the expected stages begins."""

    def stage(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:  # noqa: ARG002
        return items

    @contextmanager
    def meter(self, text: str, total: int) -> Iterator[Callable[[int, str], None]]:  # noqa: ARG002
        """Progress of something that isn't a list: call the yielded (done so far, news)."""
        yield lambda _done, _news: None

    def begin(self, key: str, model: str, config: Mapping[str, Any]) -> None:
        """A run's question is known: its content key, its model's name and its settings."""

    def row(self, kind: str, values: Mapping[str, Any]) -> None:
        """Numbers of one moment: of a trial that ended, or of a table that grows."""

    def plans(self, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        """kind -> (bytes, loss) of plans that are known now."""
