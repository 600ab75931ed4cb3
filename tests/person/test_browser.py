"""The page in a real browser. Needs Chromium: tests/install_browser.sh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from optimizer.data import pairs as probes
from optimizer.models.source import Source
from optimizer.person import entrants, judge_page, overlay_page, web
from optimizer.person.judging import Judging
from optimizer.person.overlay import ChoiceFile, Writer
from optimizer.person.settings import Overlay
from optimizer.person.votes import VoteFile
from optimizer.stages.view import View
from optimizer.store import Store
from tests.person.comparisons import TOKEN, judging
from tests.reports.test_blur_browser import NAMES, shutil

pytestmark = pytest.mark.campaign
playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

ARABIC = ("لا تفتح الباب قبل أن يعود أبي", "افتح الباب قبل أن يعود أبي")
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
LOOKS: dict[str, dict[str, Any]] = {
    "desk": {"viewport": {"width": 1200, "height": 900}},
    "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    "phone": PHONE,
    "dark phone": PHONE | {"color_scheme": "dark"},
    "200 % zoom": {"viewport": {"width": 600, "height": 450}, "device_scale_factor": 2},
    "400 % zoom": {"viewport": {"width": 320, "height": 256}, "device_scale_factor": 4},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    name = next((name for name in NAMES if shutil.which(name)), None)
    if name is None:
        pytest.fail(f"No browser ({', '.join(NAMES)}): run tests/install_browser.sh.")
    with playwright.sync_playwright() as own:
        found = own.chromium.launch(executable_path=shutil.which(name), args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def served(made: Judging, port: int = 8790) -> Iterator[str]:
    """The address at which a session is served."""
    sock = web.bind(port, lambda _: None)
    port = sock.getsockname()[1]
    with running(judge_page.application(made, TOKEN, port, lambda _: None), sock) as address:
        yield address


@contextmanager
def running(app: Any, sock: Any) -> Iterator[str]:
    """The address of an application that a thread serves."""
    port = sock.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/{TOKEN}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def made(tmp_path: Path) -> Judging:
    return judging(tmp_path)


@pytest.fixture
def address(made: Judging) -> Iterator[str]:
    with served(made) as found:
        yield found


def tab(browser: Any, address: str, **look: Any) -> Any:
    page = browser.new_context(**look).new_page()
    page.goto(address)
    return page


def settle(page: Any) -> None:
    """Until keys count: the script waits a moment, so that a held key answers one question only."""
    page.wait_for_timeout(350)


def test_votes_by_keys(browser: Any, address: str, made: Judging) -> None:
    page = tab(browser, address)
    for i, (key, choice) in enumerate(
        [("1", "first"), ("2", "second"), ("0", "alike"), ("x", "lost"), ("X", "lost")], 2
    ):
        settle(page)
        page.keyboard.press(key)
        page.wait_for_selector(f"text=Question {i} of")
        assert made.last is not None
        assert made.last.choice == choice
    settle(page)
    page.keyboard.down("1")
    page.wait_for_selector("text=Question 7 of")
    settle(page)
    for _ in range(3):
        page.keyboard.down("1")  # held: still the finger of the question before
    page.wait_for_timeout(300)
    assert len(made.votes) == 6


def test_votes_by_clicks_with_tags_and_undo(browser: Any, address: str, made: Judging) -> None:
    page = tab(browser, address)
    page.get_by_label("negation").check()
    page.get_by_role("button", name="Both lost the meaning").click()
    page.wait_for_selector("text=Your last answer: both lost the meaning")
    assert made.last is not None
    assert made.last.tags == ("negation",)
    page.get_by_role("button", name="Undo").click()
    page.wait_for_selector("text=Question 1 of")
    assert not made.votes


def test_votes_without_javascript(browser: Any, address: str, made: Judging) -> None:
    page = tab(browser, address, java_script_enabled=False)
    page.get_by_role("button", name="Second").click()
    page.get_by_role("link", name="What the reference says there").click()
    assert "The reference says" in page.content()
    page.get_by_role("link", name="Go on").click()
    assert page.get_by_text("Question 2 of").is_visible()
    assert not page.get_by_text("Keys 1, 2, 0").is_visible()
    assert len(made.votes) == 1


def test_keys_can_be_switched_off_and_stay_off(browser: Any, address: str, made: Judging) -> None:
    page = tab(browser, address)
    page.get_by_label("Keys 1, 2, 0 and x answer").uncheck()
    page.reload()
    settle(page)
    page.keyboard.press("1")
    page.wait_for_timeout(300)
    assert not made.votes


def test_reload_back_button_and_two_tabs(browser: Any, address: str, made: Judging) -> None:
    context = browser.new_context()
    one, other = context.new_page(), context.new_page()
    one.goto(address)
    other.goto(address)
    one.get_by_role("button", name="First").click()
    one.wait_for_selector("text=Question 2 of")
    one.reload()
    assert one.get_by_text("Question 2 of").is_visible()
    other.get_by_role("button", name="Second").click()  # the question that the first tab answered
    other.wait_for_selector("text=Nothing was changed")
    one.go_back()
    one.wait_for_load_state()
    if one.get_by_text("Question 1 of").count() == 0:
        assert one.get_by_text("Question 2 of").is_visible()
    assert [v.choice for v in made.votes.values()] == ["first"]


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_is_accessible_and_nothing_sticks_out(
    browser: Any, tmp_path: Path, look: str
) -> None:
    made = judging(tmp_path)
    for question in made.comparison.questions:
        object.__setattr__(question, "texts", (f" {ARABIC[0]} <b>", f" {ARABIC[1]} {'x' * 90}"))
    with served(made) as address:
        page = tab(browser, address, **LOOKS[look])
        check(page, "question")
        page.get_by_role("button", name="Alike").click()
        page.wait_for_selector("text=Your last answer")
        check(page, "after a vote")
        page.get_by_role("link", name="What the reference says there").click()
        check(page, "seen")
        for question in made.comparison.questions[1:]:
            made.vote(question.id, "first", [])
        page.goto(address)
        check(page, "done")
        page.get_by_role("button", name="Show the names").click()
        page.wait_for_selector("text=Who was who")
        check(page, "result")


def check(page: Any, name: str) -> None:
    found = axe.Axe().run(page)
    assert found.violations_count == 0, f"{name}: {found.generate_report()}"
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], name


def test_right_to_left_texts_run_so(browser: Any, tmp_path: Path) -> None:
    made = judging(tmp_path)
    for question in made.comparison.questions:
        object.__setattr__(question, "texts", ARABIC)
    with served(made) as address:
        page = tab(browser, address)
        direction = "e => getComputedStyle(e).direction"
        said = page.locator(".pair .said").first
        assert said.evaluate(direction) == "rtl"
        assert page.locator(".prompt .said").evaluate(direction) == "ltr"


def test_no_request_leaves_the_machine(browser: Any, address: str) -> None:
    page = browser.new_context().new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    settle(page)
    page.keyboard.press("1")
    page.wait_for_selector("text=Question 2 of")
    assert asked
    outside = [
        url for url in asked if not url.startswith((address[: address.index(TOKEN)], "data:"))
    ]
    assert not outside


@pytest.mark.parametrize("look", ["desk", "dark phone", "400 % zoom"])
def test_the_overlay_is_accessible_and_works_by_keys(
    browser: Any, store: Path, run_folder: Path, source: Source, tmp_path: Path, look: str
) -> None:
    kept = Store(store)
    (entrant,) = entrants.find([str(run_folder)], None, kept, "overlay")
    writers = [
        Writer(one, 1.0, kept, "cpu", View()) for one in (entrant, entrants.reference([entrant]))
    ]
    file = ChoiceFile(tmp_path / "choices.jsonl")
    sock = web.bind(8795, lambda _: None)
    config = Overlay(model="x", stretch=8)
    state = overlay_page.State("Mia had a")
    made = overlay_page.OverlayPage(config, *writers, file, f"/{TOKEN}/", state)  # type: ignore[call-arg, arg-type]
    app = overlay_page.application(made, TOKEN, sock.getsockname()[1])
    with running(app, sock) as address:
        page = tab(browser, address, **LOOKS[look])
        check(page, "begin")
        page.get_by_role("button", name="Go on").click()
        page.wait_for_selector("text=Here it is unsure")
        check(page, "offers")
        settle(page)
        page.keyboard.press("2")
        page.wait_for_selector("text=1 choices kept")
        page.get_by_label("Only mark where it is unsure").check()
        page.get_by_role("button", name="Go on").click()
        page.wait_for_selector("text=Where it was unsure")
        check(page, "marks")
    assert probes.read(file.path)


KILLED = """
import sys
from pathlib import Path
from optimizer.person import judge_page, web
from tests.person.comparisons import TOKEN, judging
made = judging(Path(sys.argv[1]))
sock = web.bind(8791, lambda _: None)
print(sock.getsockname()[1], flush=True)
web.serve(judge_page.application(made, TOKEN, sock.getsockname()[1], lambda _: None), sock)
"""


def test_a_killed_server_loses_nothing(browser: Any, tmp_path: Path) -> None:
    page = browser.new_context().new_page()
    for start in range(2):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            port = int(child.stdout.readline())
            page.goto(f"http://127.0.0.1:{port}/{TOKEN}/")
            assert page.get_by_text(f"Question {1 + start * 3} of").is_visible()
            for i in range(3):
                page.get_by_role("button", name="Alike").click()
                page.wait_for_selector(f"text=Question {2 + i + start * 3} of")
            os.kill(child.pid, signal.SIGKILL)
    file = VoteFile(tmp_path / "votes.jsonl")
    file.refresh()
    assert len([line for line in file.lines if line.kind == "vote"]) == 6
    assert not file.complaints
