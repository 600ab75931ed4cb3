"""Writing with a model: where it stops, what it offers, and what is kept of a choice."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import optimizer
from optimizer.data import pairs as probes
from optimizer.errors import TextError
from optimizer.models.source import Source
from optimizer.person import overlay_page
from optimizer.person.entrants import find, reference
from optimizer.person.overlay import ChoiceFile, Writer, pairs_of, share_of
from optimizer.person.settings import Overlay
from optimizer.stages.view import View
from optimizer.store import Store
from tests.conftest import Command
from tests.person.comparisons import BASE, PORT, TOKEN

BEGIN = "Mia had a"


def writer(store: Path, plan: Path, share: float) -> Writer:
    kept = Store(store)
    return Writer(find([str(plan)], None, kept, "overlay")[0], share, kept, "cpu", View())


@pytest.fixture(scope="module")
def writers(store: Path, run_folder: Path, source: Source) -> Iterator[dict[float, Writer]]:
    """By the share of tokens at which they stop."""
    found = {share: writer(store, run_folder, share) for share in (0.0, 0.3, 1.0)}
    yield found
    for one in found.values():
        one.close()


def test_it_stops_where_it_is_unsure(writers: dict[float, Writer]) -> None:
    always = writers[1.0].go_on(BEGIN, 12, stop=True)
    never = writers[0.0].go_on(BEGIN, 12, stop=True)
    some = writers[0.3].go_on(BEGIN, 12, stop=True)
    assert always.unsure and not never.unsure
    assert never.text.startswith(always.text)
    assert len(always.text) < len(never.text)
    assert never.text.startswith(some.text)
    assert always.text.strip()


def test_it_is_unsure_of_about_as_many_words_as_it_says(writers: dict[float, Writer]) -> None:
    """Of what it writes, not of text that is sampled from it."""
    begun = (
        "Mia had a",
        "Once upon a time",
        "Ben said",
        "The dog ran to",
        "It was a sunny day and",
    )
    marks = [len(writers[0.3].go_on(text, 24, stop=False).marks) for text in begun]
    assert 0.22 < sum(marks) / (24 * len(begun)) < 0.45


def test_a_nested_plans_base_writes_and_its_probe_says_where(
    nested_folder: Path, store: Path
) -> None:
    base = optimizer.load(nested_folder, unpack="never")
    one = writer(store, nested_folder, 0.3)
    try:
        step = one.go_on(BEGIN, 24, stop=False)
        ids = one.model.tokenizer(BEGIN, return_tensors="pt")["input_ids"]
        greedy = base.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert (BEGIN + step.text).strip() == one.model.tokenizer.decode(
            greedy[0], skip_special_tokens=True
        ).strip()
        assert one.signal.kind == "probe" and "probe foretells a loss above" in one.stops
        assert 1 <= len(step.marks) <= 16
    finally:
        one.close()


def test_quiet_writing_only_marks(writers: dict[float, Writer]) -> None:
    loud, quiet = (writers[0.3].go_on(BEGIN, 20, stop) for stop in (True, False))
    assert not quiet.unsure
    assert quiet.text.startswith(loud.text)
    if loud.unsure:
        assert len(BEGIN) + len(loud.text) in quiet.marks
    assert all(len(BEGIN) <= place <= len(BEGIN + quiet.text) for place in quiet.marks)


def test_offers_are_different_and_the_likeliest_is_what_it_would_write(
    writers: dict[float, Writer],
) -> None:
    offers = writers[0.3].offers(BEGIN, 4, 3)
    assert len(set(offers)) == 4
    assert writers[0.0].go_on(BEGIN, 3, stop=False).text == offers[0]


def test_a_text_longer_than_the_context_goes_on(writers: dict[float, Writer]) -> None:
    assert writers[0.0].go_on("Mia had a red ball . " * 80, 8, stop=True).text.strip()


def test_the_plans_promise_says_how_often_to_stop(writers: dict[float, Writer]) -> None:
    entrant = writers[0.3].entrant
    assert share_of(entrant, 0.07) == 0.07
    assert 0.02 <= share_of(entrant, None) <= 0.25
    assert share_of(reference([entrant]), None) == 0.1


def test_a_choice_is_minimal_pairs(tmp_path: Path) -> None:
    pairs = pairs_of("Do", " not open", [" open", " not", " never open", " "], "en")
    assert [(p.good, p.bad) for p in pairs] == [
        (" not open", " open"),
        (" not open", " never open"),
    ]
    file = ChoiceFile(tmp_path / "choices.jsonl")
    file.append(pairs)
    file.append(pairs_of("Once", " upon", [" there"], "en"))
    assert probes.read(file.path)[:2] == pairs
    assert len(probes.read(file.path)) == 3
    ChoiceFile(file.path)
    file.path.write_text('{"kind": "vote"}\n')
    with pytest.raises(TextError, match="line 1"):
        ChoiceFile(file.path)


# ---------------------------------------------------------------- the page


class Page:
    def __init__(self, client: TestClient, page: overlay_page.OverlayPage) -> None:
        self.client, self.page = client, page

    def post(self, **fields: object) -> str:
        headers = {"Origin": BASE}
        found = self.client.post(f"/{TOKEN}/write", data=fields, headers=headers)
        assert found.status_code == 200, found.text
        return found.text


@pytest.fixture
def page(writers: dict[float, Writer], tmp_path: Path) -> Iterator[Page]:
    config = Overlay(model="x", choices=str(tmp_path / "choices.jsonl"), stretch=8, language="en")
    made = overlay_page.OverlayPage(
        config, writers[1.0], writers[0.0], ChoiceFile(Path(config.choices)), f"/{TOKEN}/",
        overlay_page.State(""),
    )  # fmt: skip
    with TestClient(overlay_page.application(made, TOKEN, PORT), base_url=BASE) as client:
        yield Page(client, made)


def fields(text: str) -> dict[str, str]:
    """What a browser would send back: the text and the number of the offers."""
    area = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", text, re.DOTALL)
    offer = re.search(r'name="offer" value="([^"]+)"', text)
    assert area is not None
    found = {"text": html.unescape(area[1])}
    return found | ({"offer": offer[1]} if offer else {})


def test_an_offer_taken_is_kept_and_written(page: Page) -> None:
    text = page.post(text=BEGIN, go="on")
    before = fields(text)
    offer = page.page.state.offer
    assert offer is not None
    after = page.post(**before, pick="1")
    assert fields(after)["text"].startswith(before["text"] + offer.texts[1])
    pairs = probes.read(Path(page.page.config.choices))
    assert {p.good for p in pairs} == {offer.texts[1]}
    assert {p.prefix for p in pairs} == {before["text"]}
    assert {p.bad for p in pairs} <= set(offer.texts)
    stale = page.post(**before, pick="0")
    assert "of an earlier text" in stale
    assert len(probes.read(Path(page.page.config.choices))) == len(pairs)


def test_own_words_pass_over_every_offer(page: Page) -> None:
    before = fields(page.post(text=BEGIN, go="on"))
    offer = page.page.state.offer
    assert offer is not None
    assert "Nothing was chosen" in page.post(**before, own=" ", take="own")
    page.post(**before, own="zebra", take="own")
    pairs = probes.read(Path(page.page.config.choices))
    assert {p.good for p in pairs} == {" zebra"}
    assert len(pairs) == len(offer.texts)


def test_the_reference_is_shown_on_request(page: Page) -> None:
    text = page.post(text=BEGIN, go="on")
    assert "(the reference)" not in text
    assert "(the reference)" in page.post(**fields(text), ask="reference")


def test_marks_lead_to_offers(page: Page) -> None:
    text = page.post(text=BEGIN, quiet="on", go="on")
    assert 'name="offer"' not in text
    places = re.findall(r'name="at" value="(\d+)"', text)
    assert places
    looked = page.post(text=fields(text)["text"], quiet="on", at=places[-1])
    assert 'name="offer"' in looked
    assert len(fields(looked)["text"]) == int(places[-1])
    assert "was changed" in page.post(text="another text", at=places[0])


def test_texts_are_escaped(page: Page) -> None:
    evil = "</textarea><script>alert(1)</script>"
    text = page.post(text=evil, quiet="on", go="on")
    assert "<script>alert" not in text
    assert fields(text)["text"].startswith(evil)


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "needs model"), (["stories", "offers=1"], "offers is 2 or more"),
     (["stories", "share=2"], "share is a share"), (["stories", "choices=."], "choices is a file"),
     (["stories", "text=none.txt"], "none.txt")],
)  # fmt: skip
def test_mistakes_are_explained(mezzotint: Command, words: list[str], message: str) -> None:
    ended = mezzotint("overlay", *words, "open=false")
    assert ended.code == 2
    assert message in ended.err
