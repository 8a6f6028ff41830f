"""The client of docs/client.py, against the real service and against one that has its moods."""

from __future__ import annotations

import json
import runpy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ROOT, serving

names = runpy.run_path(str(ROOT / "docs" / "client.py"))
Client, Refused = names["Client"], names["Refused"]


def test_it_creates_pages_and_updates(database_url: str, tmp_path: Path) -> None:
    """As its own docstring shows it, and as a service answers that has more than a page."""
    with serving(
        tmp_path, DATABASE_URL=database_url, WEB_CONCURRENCY="1", ROLLCALL_AUTH="off"
    ) as service:
        client = Client(f"http://127.0.0.1:{service.port}/api/v1")
        ada = client.create("employees", name="Ada Lovelace", department="Research")
        for name in ("Mary Shelley", "Ada  Lovelace", "Grace Hopper"):
            client.create("employees", name=name, department_id=ada["department_id"])
        names = [employee["name"] for employee in client.each("employees", limit=1)]
        assert names == ["Ada Lovelace", "Mary Shelley", "Grace Hopper"]
        assert [found["id"] for found in client.each("employees", q="love")] == [ada["id"]]
        changed = client.update("employees", ada["id"], lambda employee: {"title": "Analyst"})
        assert (changed["name"], changed["title"]) == ("Ada Lovelace", "Analyst")
        with pytest.raises(Refused, match='"code": "invalid"') as refused:
            client.create("employees", name=" ", department="Research")
        assert refused.value.status == 422


class Moods(ThreadingHTTPServer):
    """Answers as it is told to, in turn, and remembers what it was asked."""

    def __init__(self, *answers: tuple[int, dict[str, str], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Moody)
        self.answers = list(answers)
        self.asked: list[tuple[str, str | None, str | None]] = []


class Moody(BaseHTTPRequestHandler):
    server: Moods

    def answer(self) -> None:
        """Give the next answer."""
        asked = (self.command, self.headers["If-Match"], self.headers["Authorization"])
        self.server.asked.append(asked)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, content = self.server.answers.pop(0)
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = answer

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def moody(*answers: tuple[int, dict[str, str], Any]) -> Iterator[tuple[Moods, Callable[..., Any]]]:
    """Run a service that gives these answers; yield it and a client of it."""
    with Moods(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server, Client(f"http://127.0.0.1:{server.server_port}/api/v1", token=TOKEN)
        server.shutdown()
        thread.join()


TOKEN = "of-the-test"
BUSY = (503, {"Retry-After": "0"}, {})
TOO_OFTEN = (429, {"Retry-After": "0"}, {})
ADA = (200, {"ETag": '"1"'}, {"id": 1, "title": None})
NEWER_ADA = (200, {"ETag": '"2"'}, {"id": 1, "title": "Analyst"})
CHANGED = (412, {}, {})


def test_it_waits_while_the_service_is_busy() -> None:
    """503 and 429, and no longer than it has tries."""
    with moody(BUSY, TOO_OFTEN, ADA) as (server, client):
        assert client.create("employees", name="Ada")["id"] == 1
        assert server.asked == [("POST", None, f"Bearer {TOKEN}")] * 3
    with moody(*[BUSY] * 5) as (server, client), pytest.raises(Refused) as refused:
        client.create("employees", name="Ada")
    assert refused.value.status == 503
    assert server.answers == []


def test_it_changes_the_version_it_has_seen() -> None:
    """And looks again where somebody was quicker: 412."""
    with moody(ADA, CHANGED, NEWER_ADA, NEWER_ADA) as (server, client):
        client.update("employees", 1, lambda ada: {"title": f"Chief {ada['title']}"})
        assert [asked[:2] for asked in server.asked] == [
            ("GET", None),
            ("PATCH", '"1"'),
            ("GET", None),
            ("PATCH", '"2"'),
        ]
    with moody(*[ADA, CHANGED] * 5) as (server, client), pytest.raises(Refused) as refused:
        client.update("employees", 1, lambda ada: {})
    assert refused.value.status == 412
    assert server.answers == []
