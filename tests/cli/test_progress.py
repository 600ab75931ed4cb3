from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from optimizer.cli import progress
from optimizer.cli.progress import Terminal, Whole, duration


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_of_all_of_it() -> None:
    clock = Clock()
    whole = Whole({"table": 1.0, "search": 2.0, "proof": 1.0}, clock)
    assert whole.left is None and whole.place == "" and whole.told == ""
    whole.enter("table")
    whole.share, clock.now = 0.5, 10.0
    assert whole.place == "1 of 3"
    assert whole.left == pytest.approx(70.0)  # an eighth took 10 s
    whole.enter("search")
    clock.now = 20.0
    assert whole.place == "2 of 3" and whole.left == pytest.approx(60.0)
    whole.enter("nothing of the kind")
    assert whole.place == "2 of 3"


def test_a_second_bar_of_a_stage_goes_on_where_the_first_ended() -> None:
    """It began at nothing again, and said eleven hours where ten minutes were left."""
    clock = Clock()
    whole = Whole({"table": 3.0, "proof": 1.0}, clock)
    whole.enter("table")
    whole.bar()
    whole.fill(1.0)
    clock.now = 600.0
    before = whole.left
    whole.bar()
    whole.fill(0.05)
    after = whole.left
    assert before is not None and after is not None and 0.9 * before < after < before
    whole.fill(1.0)
    assert whole.share < 1.0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3, "10 s"), (44, "40 s"), (100, "2 min"), (5340, "89 min"), (7800, "2 h 10 min")],
)
def test_durations_are_no_more_exact_than_a_guess(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_without_a_terminal_a_line_comes_while_a_step_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    out = Console(file=io.StringIO(), width=200)
    view = Terminal(out)
    view.expect({"table": 1.0, "proof": 1.0})
    view.enter("table")
    for item in view.track([1, 2], "sensitivity"):
        if item == 2:
            deadline = time.monotonic() + 5
            while ": 1 of 2" not in out.file.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
    said = out.file.getvalue()
    assert "stage 1 of 2: sensitivity ..." in said
    assert "stage 1 of 2: sensitivity: 1 of 2" in said and "left in all" in said


@pytest.mark.parametrize("stages", [1, 2])
def test_a_single_stage_says_once_what_is_left(
    monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    """Of a table that was all of its run a line said 12 minutes, and 38 in all."""
    monkeypatch.setattr(progress, "EVERY", 0.02)
    clock, out = Clock(), Console(file=io.StringIO(), width=200)
    view = Terminal(out, clock)
    view.expect({f"stage {i}": 1.0 for i in range(stages)})
    view.enter("stage 0")
    clock.now = 0.0
    with view.meter("sensitivity", 1000) as tell:
        clock.now = 60.0
        tell(250, "block 9 of 32 forward")
        deadline = time.monotonic() + 5
        while ": 25%" not in out.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    said = out.file.getvalue()
    line = "sensitivity: 25%, block 9 of 32 forward, 60 s so far, about 3 min left"
    assert line in said
    assert ("left in all" in said) == (stages == 2)


def test_a_meter_counts_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    out = Console(file=io.StringIO(), width=200)
    with Terminal(out).meter("trials", 100) as tell:
        tell(40, "best 0.01")
        deadline = time.monotonic() + 5
        while "40%" not in out.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "trials: 40%, best 0.01" in out.file.getvalue()


def test_a_stage_that_fails_ends_its_line() -> None:
    out = Console(file=io.StringIO(), width=200)
    with pytest.raises(ZeroDivisionError):
        for _ in Terminal(out).track([1], "work"):
            raise ZeroDivisionError
    view = Terminal(out)
    assert list(view.track([1, 2], "work")) == [1, 2]


def test_what_runs_inside_of_an_item_moves_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring two plans said `0 of 2` for twelve minutes, and that ever more was left."""
    monkeypatch.setattr(progress, "EVERY", 0.02)
    clock, out = Clock(), Console(file=io.StringIO(), width=200)
    view = Terminal(out, clock)
    view.expect({"table": 1.0, "proof": 1.0})
    view.enter("table")
    shares = []

    def waited(text: str) -> None:
        deadline = time.monotonic() + 5
        while text not in out.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)

    for plan in view.track(["one", "two"], "measuring plans"):
        for block in view.track(range(4), "gptq, block by block"):
            shares.append(view._whole.share)
            if (plan, block) == ("one", 3):
                waited("0 of 2, gptq, block by block 3 of 4")
        for _ in view.track(range(2), "scores"):
            shares.append(view._whole.share)
        with view.meter("tokens", 10) as tell:
            tell(5, "half")
            shares.append(view._whole.share)
    assert shares == sorted(shares) and 0.5 < shares[-1] < progress.MOST
    assert (
        shares[6] < progress.MOST / 2 <= shares[7]
    )  # the first plan's, and where the second begins
    said = out.file.getvalue()
    assert "measuring plans: 0 of 2, gptq, block by block 3 of 4" in said
    assert said.count("...") == 1  # no line of their own


def test_a_bar_inside_of_a_bar_breaks_no_terminal() -> None:
    out = Console(file=io.StringIO(), width=160, force_terminal=True)
    view = Terminal(out)
    found = [(a, b) for a in view.track("xy", "outer") for b in view.track([1, 2], "inner")]
    assert found == [("x", 1), ("x", 2), ("y", 1), ("y", 2)]
    assert list(view.track([3], "another")) == [3]
