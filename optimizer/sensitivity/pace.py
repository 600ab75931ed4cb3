"""How fast passes through a model's blocks are, and how long the rest may take."""

from __future__ import annotations

import time
from collections.abc import Callable

TOTAL = 1000  # what is told to be done at the end
BACK = 4.0  # times a block's way forward that its way back takes, until one was gone

Tell = Callable[[int, str], None]


class Pace:
    """One pass forward through all blocks and one back. tell: hears after each block how much is done
    of TOTAL, and the news. tokens: of all windows. read: bytes of weights that were read so
    far; None where all are in memory. outside: what comes after them, as so many blocks."""

    def __init__(
        self,
        tell: Tell,
        blocks: int,
        tokens: int,
        read: Callable[[], int] | None,
        clock: Callable[[], float] = time.monotonic,
        outside: float = 0.0,
    ) -> None:
        self._tell, self._blocks, self._tokens = tell, blocks, tokens
        self._read, self._clock, self._outside = read, clock, outside
        self._ways = {"forward": [0, 0.0], "back": [0, 0.0]}  # blocks, seconds
        self._from, self._bytes, self._done = clock(), 0 if read is None else read(), 0
        self._spent, self._skipped = 0.0, 0

    def passed(self, way: str, block: int, skipped: bool = False) -> None:
        """`way` is forward or back. skipped: the block was done by an earlier run."""
        now, held = self._clock(), 0 if self._read is None else self._read()
        took, read = max(now - self._from, 1e-9), held - self._bytes
        self._from, self._bytes = now, held
        self._spent += took
        self._ways[way][0] += 1
        if skipped:
            self._skipped += 1
            return
        self._ways[way][1] += took
        left = self._left()
        share = self._spent / (self._spent + left)
        self._done = max(self._done, min(round(TOTAL * share), TOTAL - 1))
        news = [
            f"block {block + 1} of {self._blocks} {way}",
            f"{_short(self._tokens / took / self._blocks)} tokens/s",
        ]
        if self._read is not None:
            news.append(f"{_short(read / took / 1e6)} MB of weights read/s")
        self._tell(self._done, ", ".join(news))

    def outside(self) -> None:
        """The blocks are done; embeddings and the head follow."""
        self._tell(self._done, "embeddings and head")

    def ended(self) -> None:
        self._tell(TOTAL, "")

    def _left(self) -> float:
        """Seconds for what is still to come: each block like the mean of its way, and what lies
        outside of them as if it were blocks."""
        (ahead, forth), (behind, back) = self._ways["forward"], self._ways["back"]
        each = forth / max(ahead, 1)
        way_back = back / (behind - self._skipped) if back else BACK * each
        rest = (self._blocks - ahead) * each + (self._blocks - behind) * way_back
        return rest + self._outside * (each + way_back)


def _short(value: float) -> str:
    """Two digits that count, or all before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
