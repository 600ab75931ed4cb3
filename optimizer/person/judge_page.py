"""The page of `mezzotint judge`: one question, its answers, and the names when all is over.

GET  /            the next question, or what there is to say when there is none
POST /vote        an answer; then back to /
POST /undo        takes the last one back
GET  /seen/ID     a question that was answered, with the reference's own text
POST /reveal      who was who; ends the session
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from optimizer.errors import StorageError
from optimizer.person import reveal, web
from optimizer.person.judging import Judging, Kept, Question
from optimizer.person.votes import TAGS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

ANSWERS = (
    ("first", "1", "First"),
    ("second", "2", "Second"),
    ("alike", "0", "Alike"),
    ("lost", "x", "Both lost the meaning"),
)
SAID = {
    "first": "first",
    "second": "second",
    "alike": "alike",
    "lost": "both lost the meaning",
    "skip": "skipped",
}


@dataclass(frozen=True)
class Piece:
    """A text in two parts: what both begin with, and the rest."""

    shared: str
    own: str


def parted(texts: tuple[str, str]) -> tuple[Piece, Piece]:
    """Both texts, cut where they part, at the beginning of a word."""
    one, other = texts
    end = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        end += 1
    while end and not one[end - 1].isspace():
        end -= 1
    shared = one[:end].lstrip(" ")
    return Piece(shared, _lead(one[end:], shared)), Piece(shared, _lead(other[end:], shared))


def _lead(text: str, before: str) -> str:
    """Without the space that joins it to the prompt."""
    return text if before else text.lstrip(" ")


@dataclass
class JudgePage:
    """ended: is called once, when the names are revealed."""

    judging: Judging
    base: str
    ended: Callable[[reveal.Result], None]
    _result: reveal.Result | None = None

    def __post_init__(self) -> None:
        self.templates = web.environment()

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/", self.home, methods=["GET"]),
            Route("/vote", self.vote, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/reveal", self.reveal, methods=["POST"]),
            Route("/seen/{question}", self.seen, methods=["GET"]),
        ]

    async def home(self, _request: Request) -> Response:
        return self._home()

    def _home(self, note: str = "", status: int = 200) -> Response:
        judging = self.judging
        if judging.over:
            return self._page("result.html", {"result": self.result, "note": note}, status)
        question = judging.current
        if question is None:
            values = {"why": judging.stopped, "note": note, **self._last()}
            return self._page("done.html", values, status)
        return self._page("question.html", self._asked(question, note), status)

    @property
    def result(self) -> reveal.Result:
        """Of the finished session, computed once."""
        if self._result is None:
            self._result = reveal.reveal(self.judging)
        return self._result

    def _asked(self, question: Question, note: str) -> dict[str, Any]:
        first, second = parted(question.texts)
        answered = len(self.judging.votes)
        return {
            "note": note,
            "question": question,
            "pieces": (("First", first), ("Second", second)),
            "number": answered + 1,
            "most": len(self.judging.comparison.questions),
            "answers": ANSWERS,
            "tags": TAGS,
            "language": _language(question),
            **self._last(),
        }

    def _last(self) -> dict[str, Any]:
        last = self.judging.last
        return {"last": last, "last_said": SAID[last.choice] if last else ""}

    def _page(self, name: str, values: dict[str, Any], status: int = 200) -> Response:
        return web.page(self.templates, name, {"base": self.base} | values, status)

    async def vote(self, request: Request) -> Response:
        fields = await web.form(request)
        if fields is None:
            return self._home("That was no answer to a question. Nothing was kept.", 400)
        given = dict(fields)
        tags = [value for name, value in fields if name == "tag"]
        try:
            kept = self.judging.vote(given.get("question", ""), given.get("choice", ""), tags)
        except StorageError as error:
            return self._home(str(error), 507)
        if kept in (Kept.NEW, Kept.AGAIN):
            return RedirectResponse(self.base, 303)
        if kept is Kept.UNKNOWN:
            return self._home("That was no answer to a question. Nothing was kept.", 400)
        return self._home(f"Nothing was changed: that question was {_why(kept)}.", 409)

    async def undo(self, request: Request) -> Response:
        fields = dict(await web.form(request) or [])
        try:
            done = self.judging.undo(fields.get("vote", ""))
        except StorageError as error:
            return self._home(str(error), 507)
        if done:
            return RedirectResponse(self.base, 303)
        return self._home("Nothing was taken back: that is not your last vote any more.", 409)

    async def reveal(self, request: Request) -> Response:
        await web.form(request)
        before = self.judging.over
        try:
            self.judging.end()
        except StorageError as error:
            return self._home(str(error), 507)
        if not before:
            self.ended(self.result)
        return RedirectResponse(self.base, 303)

    async def seen(self, request: Request) -> Response:
        """Only for questions that were answered: before, the reference would give itself away."""
        question = self.judging.question(request.path_params["question"])
        vote = self.judging.votes.get(question.id) if question else None
        if question is None or vote is None:
            return self._home("The reference's text is shown after the vote.", 404)
        first, second = parted(question.texts)
        values = {
            "question": question,
            "pieces": (("First", first), ("Second", second)),
            "said": SAID[vote.choice],
            "reference": self.judging.comparison.reference.texts[question.prompt.id],
            "language": _language(question),
        }
        return self._page("seen.html", values)


def _why(kept: Kept) -> str:
    if kept is Kept.OTHER:
        return "answered before, perhaps in another tab. Undo takes the last vote back"
    return "not asked any more"


def _language(question: Question) -> str:
    """For the browser and screen readers; empty where it isn't known."""
    return "" if question.prompt.language == "-" else question.prompt.language


def application(
    judging: Judging, token: str, port: int, ended: Callable[[reveal.Result], None]
) -> ASGIApp:
    return web.app(JudgePage(judging, f"/{token}/", ended).routes, token, port)
