"""What is told of passes through a model's blocks."""

from __future__ import annotations

from optimizer.sensitivity.pace import BACK, TOTAL, Pace


class Watched:
    """A clock, a disk, and what was told."""

    def __init__(self, reads: bool = True) -> None:
        self.now, self.bytes, self.told = 100.0, 7, list[tuple[int, str]]()
        read = (lambda: self.bytes) if reads else None
        tell = lambda done, news: self.told.append((done, news))  # noqa: E731
        self.pace = Pace(tell, 4, 4000, read, lambda: self.now)

    def after(self, seconds: float, way: str, block: int, skipped: bool = False) -> None:
        self.now += seconds
        self.bytes += 30_000_000
        self.pace.passed(way, block, skipped)


def test_the_first_block_says_how_long_the_rest_takes() -> None:
    """One of four took 10 s: three more and four ways back of BACK times as long."""
    seen = Watched()
    seen.after(10, "forward", 0)
    left = 30 + 4 * BACK * 10
    assert seen.told == [
        (
            round(TOTAL * 10 / (10 + left)),
            "block 1 of 4 forward, 100 tokens/s, 3 MB of weights read/s",
        )
    ]


def test_the_way_back_is_as_long_as_it_was_until_now() -> None:
    seen = Watched(reads=False)
    for block in range(4):
        seen.after(1, "forward", block)
    seen.after(10, "back", 3)
    seen.after(20, "back", 2)
    assert seen.told[-1] == (
        round(TOTAL * 34 / 64),
        "block 3 of 4 back, 50 tokens/s",
    )
    seen.after(10, "back", 1)
    seen.after(10, "back", 0)
    assert seen.told[-1][0] == TOTAL - 1
    seen.pace.ended()
    assert seen.told[-1] == (TOTAL, "")
    assert [done for done, _ in seen.told] == sorted(done for done, _ in seen.told)


def test_blocks_that_an_earlier_run_did_count_as_done() -> None:
    seen = Watched(reads=False)
    for block in range(4):
        seen.after(1, "forward", block)
    for block in (3, 2):
        seen.after(0, "back", block, skipped=True)
    seen.after(6, "back", 1)
    assert seen.told[-1] == (TOTAL * 10 // 16, "block 2 of 4 back, 167 tokens/s")


def test_embeddings_and_the_head_take_their_share_of_the_time() -> None:
    """A table of an 8B model said `0 s left` for five minutes."""
    told = list[tuple[int, str]]()
    now = [0.0]
    pace = Pace(lambda *x: told.append(x), 2, 100, None, lambda: now[0], outside=2.0)
    for way, seconds in (("forward", 1), ("forward", 1), ("back", 4), ("back", 4)):
        now[0] += seconds
        pace.passed(way, 0)
    assert told[-1][0] == TOTAL // 2  # 10 s, and two more of such blocks
    pace.outside()
    assert told[-1] == (TOTAL // 2, "embeddings and head")
    pace.ended()
    assert told[-1] == (TOTAL, "")
