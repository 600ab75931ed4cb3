"""A page for one person on this machine: only loopback, only who has the address, only its own forms.

No request leaves the machine: the pages name nothing outside, and their policy forbids it.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from optimizer.errors import ConfigError
from optimizer.reports.html import pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2 import Environment
    from starlette.requests import Request
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HERE = Path(__file__).parent
HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
PORTS = 50  # that are tried, from the wanted one on
LARGEST = 2**18  # bytes of a form
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def environment() -> Environment:
    """The templates of the pages."""
    return pages.environment(HERE / "templates")


def app(routes: Sequence[BaseRoute], token: str, port: int) -> ASGIApp:
    """The routes below /token/, guarded."""
    static = Mount("/static", StaticFiles(directory=HERE / "static"))
    inner = Starlette(routes=[Mount(f"/{token}", routes=[static, *routes])])
    return Guard(inner, token, port)


class Guard:
    """In front of the pages: turns away whoever asks for another host, without the token, or from
    another page; and says with each answer what a browser may do with it."""

    def __init__(self, inner: ASGIApp, token: str, port: int) -> None:
        self.inner, self.token = inner, token
        self.hosts = [f"{name}:{port}" for name in NAMES]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.inner(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.inner)(scope, receive, answer)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self.hosts:  # another name for this address, as DNS rebinding uses
            return PlainTextResponse("This page answers to 127.0.0.1 only.\n", 421)
        given = scope["path"].split("/")[1] if "/" in scope["path"] else ""
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return HTMLResponse(_page("This address is not valid", _STALE), 404)
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")
        if origin is None:  # some browsers name only the page that a form is on
            referer = headers.get("referer", "")
            origin = "/".join(referer.split("/")[:3])
        if origin != f"http://{host}":
            return HTMLResponse(_page("This form came from another page", _FOREIGN), 403)
        return None


_STALE = "It may belong to an earlier start. The terminal shows the right address."
_FOREIGN = "Nothing was kept. Go back to the page that the terminal shows, and answer there."


def _page(title: str, text: str) -> str:
    """For words of our own only: nothing is escaped."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<main><h1>{title}</h1><p>{text}</p></main>"
    )


async def form(request: Request) -> list[tuple[str, str]] | None:
    """The fields of a posted form in their order; None if it isn't one, or is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            return None
    try:
        text = body.decode("ascii")
        return parse_qsl(text, keep_blank_values=True, max_num_fields=100, errors="strict")
    except ValueError:
        return None


def new_token() -> str:
    return secrets.token_urlsafe(18)


def bind(port: int, say: Callable[[str], None]) -> socket.socket:
    """A listening socket on loopback, at the first free port from `port` on; another one is said."""
    for candidate in range(port, min(port + PORTS, 65536)):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, candidate))
            sock.listen(64)
        except OSError:
            sock.close()
            continue
        if candidate != port:
            say(f"Port {port} is in use; this is at {candidate}.")
        return sock
    raise ConfigError(
        f"Ports {port} to {port + PORTS - 1} of {HOST} are all in use. Choose another with port=..."
    )


def serve(application: ASGIApp, sock: socket.socket) -> None:
    """Until it is interrupted."""
    import uvicorn

    config = uvicorn.Config(
        application,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[sock])


def show(address: str, wanted: bool, say: Callable[[str], None]) -> None:
    """Print the address and, if it is wanted, open it in a browser."""
    say(f"Open {address}")
    if not wanted:
        return
    if not _has_display():
        say("There is no display here, so no browser was opened: open the address yourself.")
        return

    def attempt() -> None:
        try:
            opened = webbrowser.open(address)
        except (webbrowser.Error, OSError):
            opened = False
        if not opened:
            say("No browser could be opened: open the address yourself.")

    threading.Thread(target=attempt, daemon=True).start()


def _has_display() -> bool:
    """Without one, Python would start a browser for terminals, inside this one."""
    if sys.platform in ("darwin", "win32") or os.environ.get("BROWSER"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def page(
    templates: Environment, name: str, values: dict[str, Any], status: int = 200
) -> HTMLResponse:
    return HTMLResponse(templates.get_template(name).render(values), status)
