"""Around everything: each request has an id, a line in the log, its place in the metrics."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.asgi.exchange import Headers
from app.headers import with_ours
from app.observability import REQUEST_ID, Exchange, served


class Observed:
    """An ASGI application whose every answer bears our headers, is counted, and logged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = ""
        by_https = scope["scheme"] == "https"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                headers = with_ours(_read(message["headers"]), by_https)
                message["headers"] = _raw([*headers, (REQUEST_ID, known.request_id)])
            await send(message)

        with Exchange(Headers(scope["headers"]).get(REQUEST_ID)) as known:
            scope["rollcall.known"] = known
            await self._app(scope, receive, answer)
            served(known, scope["method"], status)


def _read(raw: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """Return headers under their usual names, which Starlette sends in small letters."""
    read = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in raw)
    return [(USUAL.get(name.lower()) or name.title(), value) for name, value in read]


def _raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


USUAL = {"etag": "ETag", "www-authenticate": "WWW-Authenticate"}
