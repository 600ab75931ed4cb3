"""The page of `mezzotint overlay`: a text that the model writes and a person steers.

    GET  /        the text as it is
    POST /write   go on; take an offer or one's own words; look at a marked place; ask the reference
The form carries the whole text, so a person may change it anywhere, and nothing is lost with the
server but the offers of the moment.
"""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Route

from optimizer.errors import MezzotintError
from optimizer.person import web
from optimizer.person.overlay import ChoiceFile, Offer, Writer, pairs_of
from optimizer.person.settings import Overlay

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp


@dataclass(frozen=True)
class State:
    """What the page shows. marks: places in the text where the model was unsure."""

    text: str
    note: str = ""
    quiet: bool = False
    marks: tuple[int, ...] = ()
    offer: Offer | None = None


@dataclass
class OverlayPage:
    """chosen: of this start, for the page."""

    config: Overlay
    writer: Writer
    reference: Writer
    file: ChoiceFile
    base: str
    state: State
    chosen: int = 0

    def __post_init__(self) -> None:
        self.templates = web.environment()

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/", self.home, methods=["GET"]),
            Route("/write", self.write, methods=["POST"]),
        ]

    async def home(self, _request: Request) -> Response:
        return self._page(self.state)

    def _page(self, state: State, status: int = 200) -> Response:
        values: dict[str, Any] = {
            "base": self.base,
            "state": state,
            "pieces": marked(state.text, state.marks),
            "name": self.writer.entrant.name,
            "share": self.writer.share,
            "chosen": self.chosen,
            "choices": self.config.choices,
            "language": "" if self.config.language == "-" else self.config.language,
        }
        return web.page(self.templates, "overlay.html", values, status)

    async def write(self, request: Request) -> Response:
        fields = await web.form(request)
        if fields is None:
            return self._page(replace(self.state, note="That text is too long, or no form."), 400)
        given = {key: value.replace("\r\n", "\n") for key, value in fields}
        try:
            self.state = await run_in_threadpool(self._next, given)
        except MezzotintError as error:
            self.state = replace(self.state, text=given.get("text", ""), note=str(error))
            return self._page(self.state, 507)
        return self._page(self.state)

    def _next(self, given: dict[str, str]) -> State:
        """What the page shows after this form."""
        now = State(given.get("text", ""), quiet="quiet" in given)
        offer = self.state.offer
        mine = given.get("own", "")
        if "at" in given:
            return self._look(now, given["at"])
        taken = "own" if "take" in given else given.get("pick")
        if taken is None and "ask" not in given:
            return self._go_on(now)
        if offer is None or offer.id != given.get("offer") or offer.prefix != now.text:
            return replace(
                now, note="These offers are of an earlier text. Go on, or choose again."
            )
        if "ask" in given:
            return replace(now, offer=self._with_reference(offer))
        text = mine if taken == "own" else _picked(offer, str(taken))
        if not text.strip():
            return replace(now, offer=offer, note="Nothing was chosen. Take an offer, or write.")
        text = text if not _glued(now.text, text) else f" {text}"
        passed = [other for other in offer.texts if other != text]
        pairs = pairs_of(now.text, text, passed, self.config.language)
        if pairs:
            self.file.append(pairs)
            self.chosen += 1
        return self._go_on(replace(now, text=now.text + text))

    def _go_on(self, now: State) -> State:
        step = self.writer.go_on(now.text, self.config.stretch, stop=not now.quiet)
        state = replace(now, text=now.text + step.text, marks=step.marks if now.quiet else ())
        if step.unsure:
            return replace(state, offer=self._offer(state.text))
        return replace(state, note="The model ended the text here." if step.ended else "")

    def _look(self, now: State, at: str) -> State:
        """Offers at a marked place; what stood behind it goes."""
        place = int(at) if at.isascii() and at.isdigit() else -1
        if place not in self.state.marks or now.text != self.state.text:
            return replace(now, note="The text was changed since it was marked. Go on.")
        text = now.text[:place]
        return replace(now, text=text, offer=self._offer(text))

    def _offer(self, text: str) -> Offer:
        texts = self.writer.offers(text, self.config.offers, self.config.words)
        return Offer(uuid.uuid4().hex[:16], text, texts)

    def _with_reference(self, offer: Offer) -> Offer:
        """The reference's own words among the offers; it may agree with one of them."""
        (own,) = self.reference.offers(offer.prefix, 1, self.config.words) or ("",)
        if own in offer.texts:
            return replace(offer, reference=offer.texts.index(own))
        return replace(offer, texts=(*offer.texts, own), reference=len(offer.texts))


def _picked(offer: Offer, number: str) -> str:
    place = int(number) if number.isascii() and number.isdigit() else -1
    return offer.texts[place] if 0 <= place < len(offer.texts) else ""


def _glued(before: str, text: str) -> bool:
    """Whether two words would run together."""
    return bool(before) and before[-1].isalnum() and text[0].isalnum() and not text[0].isspace()


def marked(text: str, marks: tuple[int, ...]) -> list[tuple[str, int | None]]:
    """The text in pieces; a piece that begins at a mark has its place."""
    cuts = [0, *[m for m in marks if 0 < m < len(text)], len(text)]
    return [(text[a:b], a if a in marks else None) for a, b in itertools.pairwise(cuts) if b > a]


def application(page: OverlayPage, token: str, port: int) -> ASGIApp:
    return web.app(page.routes, token, port)
