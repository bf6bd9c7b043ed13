"""Keeps other web pages from using the server of the demo.

A page of any site can send requests to addresses of this machine from the browser of a
user. Two headers, which a page cannot change, tell such requests from those of our page.
"""

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flallm_ds.demo.refused import Refusal, Refused

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Only our own files, no inline script, not within the frame of another page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Guard:
    """Passes requests of our own page, and of programs, to an application.

    host: the address on which the server listens.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._is_loopback = host in LOOPBACK
        self._names = {*LOOPBACK, host.lower()}
        if not self._is_loopback:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            self._check(Headers(scope=scope))
        except Refused as error:
            await Refusal(error)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, headers: Headers) -> None:
        """Raise Refused for a request of another page."""
        host, origin = headers.get("host", ""), headers.get("origin")
        # Otherwise a site could let its own name point to this machine, and our page and
        # its page would be one origin.
        if not self._is_own(_name(f"//{host}")):
            raise Refused(
                f"The Host header must be {_listed(sorted(self._names))}, got {host!r:.80}.",
                403,
            )
        # Browsers send the origin with each POST, other programs do not.
        if origin is not None and _place(origin) != host.lower():
            raise Refused(
                f"A request must come from the page of the demo, got one of {origin!r:.80}.",
                403,
            )

    def _is_own(self, name: str) -> bool:
        return name in self._names or (not self._is_loopback and _is_address(name))


def _name(url: str) -> str:
    """Return the host of an URL without its port; empty for one that is not valid."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _place(origin: str) -> str:
    """Return host and port of an origin; empty for one that is not valid, such as null."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    return " or ".join(names)
