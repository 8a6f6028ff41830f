"""A real server, and a table of requests that mean it harm: see tests/hostile.py."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psutil
import pytest

from app import create_app, tokens
from app.db import db
from tests.conftest import empty
from tests.hostile import HOSTILE, MARK, READER, SEEDED, WRITER, Hostile
from tests.races import eventually
from tests.serving import Service, serving

CLIENTS = 4


class Reply(NamedTuple):
    """What came back until the server closed the connection."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@pytest.fixture(scope="module")
def service(guarded_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service, with what SEEDED says in it, and without authentication."""
    empty(guarded_url)
    folder = tmp_path_factory.mktemp("hostile")
    with serving(folder, DATABASE_URL=guarded_url, ROLLCALL_AUTH="off") as service:
        for path, names in SEEDED.items():
            for name in names:
                more = {"department_id": 1} if path == "employees" else {}
                service.call("POST", f"/api/v1/{path}", {"name": name, **more})
        yield service


@pytest.fixture(scope="module")
def locked(
    service: Service, guarded_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Another on the same database, which asks for tokens."""
    folder = tmp_path_factory.mktemp("locked")
    with serving(folder, DATABASE_URL=guarded_url, ROLLCALL_AUTH="token") as locked:
        yield locked


@pytest.fixture(scope="module")
def held(guarded_url: str) -> Iterator[dict[str, str]]:
    """Tokens by what stands for them in the table."""
    scopes = {READER: tokens.READ, WRITER: tokens.WRITE}
    with create_app({"DATABASE_URL": guarded_url}).app_context():
        yield {mark: tokens.issue(db.engine, f"A {s}", s) for mark, s in scopes.items()}
        for scope in scopes.values():
            tokens.revoke(db.engine, f"A {scope}")
        db.engine.dispose()


@pytest.fixture(scope="module")
def workers(service: Service, locked: Service) -> dict[int, set[int]]:
    """The worker processes of each, by their master, before any request."""
    masters = [one.process.pid for one in (service, locked)]
    eventually(lambda: [len(children(master)) for master in masters] == [2, 2])
    return {master: children(master) for master in masters}


def children(master: int) -> set[int]:
    return {child.pid for child in psutil.Process(master).children()}


@pytest.fixture(scope="module")
def replies(
    service: Service, locked: Service, workers: dict[int, set[int]], held: dict[str, str]
) -> dict[str, Reply]:
    """The replies to all requests of the table, by their names; some are sent at once.

    Before them comes each cut in two, by a client that then hangs up.
    """

    def attack(request: Hostile) -> Reply:
        sent = request.sent
        for mark, token in held.items():
            sent = sent.replace(mark.encode(), token.encode())
        port = (locked if request.locked else service).port
        hang_up(port, sent)
        return ask(port, sent)

    with ThreadPoolExecutor(CLIENTS) as clients:
        asked = clients.map(attack, HOSTILE)
        return dict(zip((request.name for request in HOSTILE), asked, strict=True))


def hang_up(port: int, sent: bytes) -> None:
    """Send all but the end of it, and reset the connection."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(sent[:-1])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def ask(port: int, sent: bytes) -> Reply:
    """Send it, say that this was all, and read until the server has no more to say."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return read_reply(connection)


def read_reply(connection: socket.socket) -> Reply:
    """Read until the server has no more to say."""
    head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.title(): value for name, value in (line.split(": ", 1) for line in lines)}
    return Reply(int(status.split()[1]), headers, body)


@pytest.mark.parametrize("request_", HOSTILE, ids=[request.name for request in HOSTILE])
def test_the_answer_is_the_one_in_the_table(request_: Hostile, replies: dict[str, Reply]) -> None:
    """One answer and no second; a refusal is a problem that says nothing of what was sent."""
    reply = replies[request_.name]
    assert (reply.status, code(reply)) == request_.answer, reply
    assert len(reply.body) == int(reply.headers["Content-Length"])
    assert reply.status < 400 or MARK.casefold() not in str(reply).casefold()


def code(reply: Reply) -> str:
    """Return the code of a problem, which has all that RFC 9457 asks for; "" of anything else."""
    if reply.status < 400:
        return ""
    assert reply.headers["Content-Type"] == "application/problem+json"
    problem = json.loads(reply.body)
    assert problem["status"] == reply.status
    assert problem["type"] == f"urn:rollcall:problem:{problem['code']}"
    assert problem["title"]
    assert problem["detail"]
    assert ("Www-Authenticate" in reply.headers) == (reply.status == 401) or reply.status == 403
    return str(problem["code"])


def test_the_table_is_long_and_has_no_row_twice() -> None:
    """Two hundred at least, each under a name of its own."""
    assert len(HOSTILE) >= 200
    assert len({request.name for request in HOSTILE}) == len(HOSTILE)
    assert len({(request.sent, request.locked) for request in HOSTILE}) == len(HOSTILE)


@pytest.mark.usefixtures("replies")
def test_nothing_was_stored_changed_or_deleted(service: Service) -> None:
    """The service still answers, and the directory is as it was before them."""
    for path, names in SEEDED.items():
        status, page = service.call("GET", f"/api/v1/{path}?limit=500")
        assert status == 200
        assert [record["name"] for record in page["items"]] == names
        assert all(record["created_at"] == record["updated_at"] for record in page["items"])


@pytest.mark.usefixtures("replies")
def test_no_worker_died(workers: dict[int, set[int]]) -> None:
    """The processes are those of the start."""
    for master, before in workers.items():
        assert children(master) == before


@pytest.mark.usefixtures("replies")
def test_nothing_of_it_was_unforeseen(
    service: Service, locked: Service, held: dict[str, str]
) -> None:
    """No traceback, no error of ours, and no token is in the log."""
    for one in (service, locked):
        log = one.log.read_text(errors="replace")
        assert "Swagger UI" in log
        for sign in ("Traceback", "ERROR", "CRITICAL", "unforeseen", *held.values()):
            assert sign not in log
