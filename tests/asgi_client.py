"""Flask's test client, before the ASGI application: the same tests for both servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from functools import cache
from typing import Any

from flask import Flask
from flask.testing import EnvironBuilder, FlaskClient
from werkzeug.datastructures import Headers

from app.aio import perform
from app.asgi import create_app
from tests.cancelling import is_cancelled_at


@cache
def loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all ASGI applications of this process, in a thread of its own."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True).start()
    return made


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Have the loop do some work, and wait for it."""
    return asyncio.run_coroutine_threadsafe(work, loop()).result(60)


class AsgiApplication:
    """An ASGI application that is made when it is first needed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.made: Any = None

    def __call__(self) -> Any:
        self.made = self.made or create_app(self.settings)
        return self.made

    def dispose(self) -> None:
        """Close its connections."""
        if self.made is not None:
            run(self.made.state.engine.dispose())
            run(perform(self.made.state.work.tenants.dispose))


class AsgiClient(FlaskClient):
    """Sends what Flask's client would send to an ASGI application instead."""

    def __init__(self, app: Flask, *arguments: Any, asgi: Callable[[], Any], **more: Any) -> None:
        super().__init__(app, *arguments, **more)
        self.asgi = asgi

    def run_wsgi_app(
        self, environ: dict[str, Any], buffered: bool = False
    ) -> tuple[Iterable[bytes], str, Headers]:
        status, headers, body = run(ask(self.asgi(), scope_of(environ), body_of(environ)))
        sent = b"" if environ["REQUEST_METHOD"] == "HEAD" else body
        return [sent], f"{status} status", Headers(headers)

    def leave(self, number: int, path: str, **options: Any) -> None:
        """Send a request, and hang up when it waits for so many things."""
        run(is_cancelled_at(self._request(path, options), number))

    def begin(self, path: str, **options: Any) -> Future[tuple[int, list[Any], bytes]]:
        """Send a request; return what waits for its answer, and can be cancelled."""
        return asyncio.run_coroutine_threadsafe(self._request(path, options), loop())

    def _request(self, path: str, options: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        environ = EnvironBuilder(self.application, path, **options).get_environ()
        return ask(self.asgi(), scope_of(environ), body_of(environ))


async def ask(app: Any, scope: dict[str, Any], body: bytes) -> tuple[int, list[Any], bytes]:
    """Send one request; return status, headers and body."""
    answer: list[Any] = []
    requests = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(requests)

    async def send(message: Any) -> None:
        answer.append(message)

    await app(scope, receive, send)
    start, *parts = answer
    headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in start["headers"]]
    return start["status"], headers, b"".join(part.get("body", b"") for part in parts)


def scope_of(environ: dict[str, Any]) -> dict[str, Any]:
    """Return what an ASGI server makes of the same request."""
    path = (environ["SCRIPT_NAME"] + environ["PATH_INFO"]).encode("latin-1")
    named = {
        key.removeprefix("HTTP_").replace("_", "-"): value
        for key, value in environ.items()
        if key.startswith("HTTP_") or (key in ("CONTENT_TYPE", "CONTENT_LENGTH") and value)
    }
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": environ["REQUEST_METHOD"],
        "scheme": environ["wsgi.url_scheme"],
        "path": path.decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": environ["QUERY_STRING"].encode("latin-1"),
        "root_path": environ["SCRIPT_NAME"],
        "headers": [(n.lower().encode(), v.encode("latin-1")) for n, v in named.items()],
        "client": ("127.0.0.1", 40000),
        "server": ("127.0.0.1", 80),
        "state": {},
    }


def body_of(environ: dict[str, Any]) -> bytes:
    body: bytes = environ["wsgi.input"].read()
    return body
