"""The page over HTTP, as a browser without scripts uses it."""

from __future__ import annotations

import html
import re
import time
from pathlib import Path

import pytest

from optimizer.person import web
from optimizer.person.votes import CHOICES, VoteFile
from tests.conftest import largest_file
from tests.person.comparisons import BASE, TOKEN, Page, judging, opened

NAMES = ("sparrow", "heron")


def current(text: str) -> str:
    """The id of the question on the page."""
    found = re.search(r'name="question" value="([^"]+)"', text)
    assert found is not None, text
    return found[1]


def last(text: str) -> str:
    found = re.search(r'name="vote" value="([^"]+)"', text)
    assert found is not None, text
    return found[1]


def test_a_vote_leads_to_the_next_question(page: Page) -> None:
    first = page.get()
    assert "Question 1 of 40" in first
    after = page.post("vote", question=current(first), choice="first", tag=["tone", "name"])
    assert "Question 2 of 40" in after
    assert "Your last answer: first" in after
    (vote,) = page.judging.votes.values()
    assert (vote.choice, vote.tags) == ("first", ("name", "tone"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_button_is_an_answer(page: Page, choice: str) -> None:
    text = page.get()
    assert f'value="{choice}"' in text
    page.post("vote", question=current(text), choice=choice)
    assert [v.choice for v in page.judging.votes.values()] == [choice]


def test_no_name_and_no_number_gives_a_model_away(tmp_path: Path) -> None:
    made = judging(tmp_path)
    for question in made.comparison.questions:  # the texts of these models hold their names
        object.__setattr__(question, "texts", ("one text", "another text"))
    with opened(made) as page:
        text = page.get()
        for _ in range(3):
            assert not any(name in text for name in NAMES)
            assert not re.search(r"\bkl\b|features|MB|bytes", text)
            text = page.post("vote", question=current(text), choice="alike")
        seen = page.get(f"seen/{next(iter(made.votes))}")
        assert not any(name in seen for name in NAMES)


def test_undo_brings_the_question_back(page: Page) -> None:
    first = page.get()
    after = page.post("vote", question=current(first), choice="second")
    back = page.post("undo", vote=last(after))
    assert current(back) == current(first)
    assert not page.judging.votes
    assert "Nothing was taken back" in page.post("undo", 409, vote=last(after))


def test_two_tabs_and_the_back_button_give_one_answer(page: Page) -> None:
    one = other = page.get()
    page.post("vote", question=current(one), choice="first")
    page.post("vote", question=current(other), choice="first")  # the same again, a double click
    text = page.post("vote", 409, question=current(other), choice="second")
    assert "Nothing was changed" in text
    assert current(text) != current(one)
    assert [v.choice for v in page.judging.votes.values()] == ["first"]


def test_a_reload_asks_the_same(page: Page) -> None:
    assert current(page.get()) == current(page.get())


def test_the_references_text_is_shown_after_the_vote_only(page: Page) -> None:
    text = page.get()
    name = current(text)
    refused = page.client.get(f"/{TOKEN}/seen/{name}")
    assert refused.status_code == 404
    assert "as reference" not in refused.text
    page.post("vote", question=name, choice="lost")
    assert "as reference" in page.get(f"seen/{name}")


def test_names_come_at_the_end_and_end_it(page: Page) -> None:
    text = page.get()
    while 'name="question"' in text:
        question = page.judging.question(current(text))
        assert question is not None
        side = question.about.models.index("heron")
        text = page.post("vote", question=question.id, choice=("first", "second")[side])
    assert "clear at 95 %" in text
    assert not any(f"{name} was preferred" in text for name in NAMES)
    last_vote = last(text)
    end = page.post("reveal")
    assert "heron was preferred to sparrow" in end
    assert page.ended[0].duels[0].tally.lost == 8
    page.post("undo", 409, vote=last_vote)
    page.post("reveal")
    assert len(page.ended) == 1


def test_a_restart_goes_on(tmp_path: Path) -> None:
    with opened(judging(tmp_path)) as page:
        text = page.post("vote", question=current(page.get()), choice="first")
    with opened(judging(tmp_path)) as page:
        assert current(page.get()) == current(text)
        assert "Question 2" in page.get()


# ---------------------------------------------------------------- who may come in


def test_only_this_host_this_address_and_these_forms(page: Page) -> None:
    client, name = page.client, current(page.get())
    fields = {"question": name, "choice": "first"}
    assert client.get("/").status_code == 404
    assert client.get("/other/").status_code == 404
    assert client.get(f"/{TOKEN}x/").status_code == 404
    for host in ("evil.example", "127.0.0.1:80", "127.0.0.1", "localhost.evil.example:8765"):
        assert client.get(f"/{TOKEN}/", headers={"Host": host}).status_code == 421
    for origin in ("http://evil.example", "null", "https://127.0.0.1:8765", "http://127.0.0.1:1"):
        headers = {"Origin": origin}
        assert client.post(f"/{TOKEN}/vote", data=fields, headers=headers).status_code == 403
    assert client.post(f"/{TOKEN}/vote", data=fields).status_code == 403
    headers = {"Referer": f"{BASE}/{TOKEN}/"}
    assert not page.judging.votes
    assert client.post(f"/{TOKEN}/vote", data=fields, headers=headers).status_code == 200
    assert len(page.judging.votes) == 1
    assert client.get(f"/{TOKEN}/vote").status_code == 405


def test_headers_forbid_what_the_page_does_not_need(page: Page) -> None:
    found = page.client.get(f"/{TOKEN}/")
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert found.headers["cache-control"] == "no-store"
    assert "http" not in re.sub(r'action="/|href="/|src="/', "", found.text.lower())
    for file in ("static/keys.js", "static/person.css"):
        assert "http" not in page.get(file).replace("http://www.w3.org", "")
    assert page.client.get(f"/{TOKEN}/static/../judge_page.py").status_code == 404


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"question=" + b"x" * 2**19, b"&".join(b"a=1" for _ in range(5000)), b"{}"],
)
def test_what_is_no_form_is_no_answer(page: Page, body: bytes) -> None:
    headers = {"Origin": BASE, "Content-Type": "application/x-www-form-urlencoded"}
    found = page.client.post(f"/{TOKEN}/vote", content=body, headers=headers)
    assert found.status_code == 400
    assert "Nothing was kept" in found.text
    assert not page.judging.votes


def test_texts_are_escaped(tmp_path: Path) -> None:
    made = judging(tmp_path)
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7777*7 }}"
    for question in made.comparison.questions:
        object.__setattr__(question, "texts", (evil, f"{evil}."))
        object.__setattr__(question.prompt, "text", evil)
        made.comparison.reference.texts[question.prompt.id] = evil  # its id follows its text
    with opened(made) as page:
        text = page.get()
        assert "<script>alert" not in text
        assert "<img" not in text
        assert "54439" not in text
        assert html.escape(evil, quote=False).split("&quot;")[0][:30] in text
        name = current(text)
        page.post("vote", question=name, choice=evil, status=400)
        page.post("vote", question=name, choice="first", tag=[evil])
        assert page.judging.votes[name].tags == ()
        assert "<script>alert" not in page.get(f"seen/{name}")


def test_a_full_disk_is_told_and_the_question_stays(page: Page) -> None:
    name = current(page.get())
    with largest_file(0):
        text = page.post("vote", 507, question=name, choice="first")
    assert "not kept" in text
    assert current(text) == name
    page.post("vote", question=name, choice="first")
    assert len(page.judging.votes) == 1


def test_a_vote_is_answered_within_a_tenth_of_a_second(tmp_path: Path) -> None:
    """With 10,000 votes of others in the file."""
    from tests.person.test_votes import vote

    VoteFile(tmp_path / "votes.jsonl").append(*(vote(str(i), judge="x") for i in range(10_000)))
    with opened(judging(tmp_path)) as page:
        spent = []
        text = page.get()
        for _ in range(12):
            begun = time.process_time()
            text = page.post("vote", question=current(text), choice="alike")
            spent.append(time.process_time() - begun)
        assert sorted(spent)[6] < 0.1


def test_a_port_in_use_is_said_and_the_next_one_taken() -> None:
    said: list[str] = []
    with web.bind(8765, said.append) as one, web.bind(one.getsockname()[1], said.append) as other:
        assert other.getsockname()[0] == "127.0.0.1"
        assert other.getsockname()[1] > one.getsockname()[1]
        assert f"Port {one.getsockname()[1]} is in use" in said[-1]


def test_an_address_is_printed_where_no_browser_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    said: list[str] = []
    web.show("http://127.0.0.1:1/x/", True, said.append)
    assert said[0].endswith("http://127.0.0.1:1/x/")
    assert "open the address yourself" in said[1]
    monkeypatch.setenv("BROWSER", "/no/such/browser")
    web.show("http://127.0.0.1:1/x/", True, said.append)
    deadline = time.monotonic() + 20
    while len(said) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "No browser could be opened" in said[3]
