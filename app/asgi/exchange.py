"""Between ASGI and what is the same for every server: a request in, an answer out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, MutableMapping
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

from sqlalchemy.util import await_only
from starlette.responses import Response
from starlette.types import Receive
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, RequestTimeout
from werkzeug.http import parse_options_header

from app.limits import network_of
from app.tokens import Token
from app.web.answers import Answer

Scope = MutableMapping[str, Any]


def respond(answer: Answer) -> Response:
    """Return an answer as Starlette's response."""
    headers = dict(answer.headers)
    if answer.text is not None:
        headers["Content-Type"] = answer.kind
    return Response(answer.text, answer.status, headers)


class Headers(Mapping[str, str]):
    """Headers by name, in whatever case. One that is repeated is a list, as WSGI has it."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, str] = {}
        for name, value in raw:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self._values[key] = f"{self._values[key]},{text}" if key in self._values else text

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class AsgiRequest:
    """A request of ASGI's; its body is awaited when it is read, which is in a greenlet."""

    token: Token | None = None
    tenant: str | None = None

    def __init__(self, scope: Scope, receive: Receive, longest: int, patience: float) -> None:
        self._scope = scope
        self._receive = receive
        self._longest = longest
        self._patience = patience
        self.method: str = scope["method"]
        self.root: str = scope.get("root_path", "")
        self.path: str = scope["path"].removeprefix(self.root)
        self.headers = Headers(scope["headers"])

    @cached_property
    def query(self) -> Mapping[str, list[str]]:
        values: dict[str, list[str]] = {}
        text = self._scope["query_string"].decode("latin-1")
        for name, value in parse_qsl(text, keep_blank_values=True, errors="replace"):
            values.setdefault(name, []).append(value)
        return values

    @property
    def mimetype(self) -> str:
        kind: str = parse_options_header(self.headers.get("Content-Type"))[0]
        return kind.lower()

    @property
    def caller(self) -> str | None:
        return None if self.token is None else str(self.token.id)

    def body(self) -> bytes:
        return await_only(self._read_in_time())

    async def _read_in_time(self) -> bytes:
        try:
            return await asyncio.wait_for(self._read(), self._patience)
        except (asyncio.TimeoutError, TimeoutError):
            raise RequestTimeout from None

    async def _read(self) -> bytes:
        announced = self.headers.get("Content-Length", "0")
        if not announced.isascii() or not announced.isdecimal():
            raise BadRequest
        if int(announced) > self._longest:
            raise RequestEntityTooLarge
        body, more = bytearray(), True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise BadRequest
            body += message.get("body", b"")
            if len(body) > self._longest:
                raise RequestEntityTooLarge
            more = message.get("more_body", False)
        return bytes(body)


def address(scope: Scope, headers: Headers, proxies: int) -> str:
    """Return what the client is counted by: its address, or the network of that.

    ``proxies`` is how many in front of us are believed, each of which has added who it heard from.
    """
    known = (scope.get("client") or ("local",))[0]
    forwarded = headers.get("X-Forwarded-For", "").split(",")
    if proxies and len(forwarded) >= proxies and forwarded[-proxies].strip():
        known = forwarded[-proxies].strip()
    return network_of(str(known))
