"""How often a client may call."""

from __future__ import annotations

import http.client
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakeredis import TcpFakeServer
from flask import Flask
from flask.testing import FlaskClient
from limits.storage import RedisStorage
from redis import Redis
from werkzeug.test import TestResponse

from app import limits, tokens
from app.db import db
from app.limits import ADDRESSES, FAILURES, WINDOW, Failures
from tests.races import eventually
from tests.serving import ask, free_port, serving

DEPARTMENTS = "/api/v1/departments"
FEW = {"ROLLCALL_RATE_LIMIT": "3 per hour"}


def calls(client: FlaskClient, count: int, path: str = DEPARTMENTS, **more: Any) -> list[int]:
    """Return the status of each of so many calls."""
    return [client.get(path, **more).status_code for _ in range(count)]


def come_from(address: str) -> dict[str, Any]:
    return {"environ_overrides": {"REMOTE_ADDR": address}}


def says_to_wait(answer: TestResponse) -> bool:
    content = answer.get_json()
    assert answer.mimetype == "application/problem+json"
    assert (answer.status_code, content["status"], content["code"]) == (
        429,
        429,
        "too_many_requests",
    )
    return 0 < int(answer.headers["Retry-After"]) <= 3601


def test_nobody_is_limited_unless_it_is_set(client: FlaskClient) -> None:
    """No header says anything of limits either."""
    assert calls(client, 50) == [200] * 50
    assert not [name for name, _ in client.get(DEPARTMENTS).headers if "Limit" in name]


def test_an_address_has_so_many_calls(make_app: Callable[..., Flask], database_url: str) -> None:
    """Of any kind, but for the probes; what is nowhere counts too. Other addresses have theirs."""
    client = make_app(database_url, ROLLCALL_RATE_LIMIT="1000/minute;3 per hour").test_client()
    first = client.get(DEPARTMENTS)
    assert first.headers["RateLimit-Limit"] == "1000"
    assert first.headers["RateLimit-Remaining"] == "999"
    assert 0 < int(first.headers["RateLimit-Reset"]) <= 60
    assert "Retry-After" not in first.headers
    assert client.get("/nowhere").status_code == 404
    assert client.post(DEPARTMENTS, json={"name": "R"}).status_code == 201
    refused = client.get(DEPARTMENTS)
    assert says_to_wait(refused)
    assert refused.headers["RateLimit-Remaining"] == "0"
    assert says_to_wait(client.get("/nowhere"))
    assert calls(client, 5, "/healthz") == calls(client, 5, "/readyz") == [200] * 5
    assert calls(client, 4, **come_from("192.0.2.7")) == [200, 200, 200, 429]


def test_a_network_of_ipv6_is_one_address(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """A client has 2**64 of them. A Unix socket has none, and all of its clients are one."""
    client = make_app(database_url, **FEW).test_client()
    for number in range(3):
        assert calls(client, 1, **come_from(f"2001:db8::{number:x}")) == [200]
    assert calls(client, 1, **come_from("2001:db8::ffff:1%eth0")) == [429]
    assert calls(client, 1, **come_from("2001:db8:0:1::1")) == [200]
    assert calls(client, 4, **come_from("")) == [200, 200, 200, 429]


@pytest.mark.parametrize("written", ["local", "192.0.2.1", "192.0.2.1:80", "a:b", "[::1]:80"])
def test_what_is_no_address_counts_as_it_stands(written: str) -> None:
    """A proxy may write a port behind it, or whatever it likes."""
    assert limits.network_of(written) == written


def tokens_of(app: Flask, *names: str) -> list[str]:
    """Issue a token to each; return the headers' values that show them."""
    with app.app_context():
        return [f"Bearer {tokens.issue(db.engine, name, 'read')}" for name in names]


def test_a_token_has_so_many_calls_from_anywhere(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """Another from the same addresses has its own."""
    app = make_app(database_url, ROLLCALL_AUTH="token", **FEW)
    client = app.test_client()
    one, other = tokens_of(app, "one", "other")
    statuses = [
        client.get(
            DEPARTMENTS, headers={"Authorization": shown}, **come_from(f"192.0.2.{number}")
        ).status_code
        for shown in (one, other)
        for number in range(4)
    ]
    assert statuses == [200, 200, 200, 429] * 2


def test_only_trusted_proxies_say_who_calls(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """Without, everybody could be somebody else at each call."""

    def as_forwarded(client: FlaskClient, *addresses: str) -> list[int]:
        return [
            client.get(DEPARTMENTS, headers={"X-Forwarded-For": address}).status_code
            for address in addresses
        ]

    alone = make_app(database_url, **FEW).test_client()
    assert as_forwarded(alone, "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4") == [
        200,
        200,
        200,
        429,
    ]
    behind = make_app(database_url, ROLLCALL_TRUSTED_PROXIES="1", **FEW).test_client()
    told = [f"198.51.100.{number}, 192.0.2.1" for number in range(4)]
    assert as_forwarded(behind, *told, "192.0.2.1, 192.0.2.2") == [200, 200, 200, 429, 200]


@contextmanager
def redis() -> Iterator[str]:
    """Run a Redis; yield its URL. Applications that are made meanwhile wait for it."""
    port = free_port()
    server = TcpFakeServer(("127.0.0.1", port), server_type="redis")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with Redis(port=port) as client:
        # It hangs up on who calls a script that it does not have, which Redis only says.
        client.script_load(RedisStorage.SCRIPT_INCR_EXPIRE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module in ("limits", "asgi.rates"):
                patch.setattr(f"app.{module}.REDIS_PATIENCE", 60)
            yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_redis_counts_for_all_and_is_not_needed(
    make_app: Callable[..., Flask], database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is away each worker counts for itself, and the log says so once."""
    with redis() as url:
        one, other = (
            make_app(database_url, ROLLCALL_RATE_LIMIT_STORAGE=url, **FEW).test_client()
            for _ in range(2)
        )
        assert calls(one, 2) + calls(other, 2) == [200, 200, 200, 429]
        assert says_to_wait(other.get(DEPARTMENTS))
    with caplog.at_level(logging.WARNING):
        assert calls(one, 4) == [200, 200, 200, 429]
    assert [record.getMessage() for record in caplog.records if "limit" in record.name] == [
        "Rate limit storage unreachable - falling back to in-memory storage"
    ]
    assert calls(other, 4) == [200, 200, 200, 429]


def test_a_flood_is_turned_away(database_url: str, tmp_path: Path) -> None:
    """On the real server; afterwards the client is served again."""
    settings = {"DATABASE_URL": database_url, "ROLLCALL_RATE_LIMIT": "2 per second"}
    with (
        serving(tmp_path, WEB_CONCURRENCY="1", **settings) as service,
        closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)) as connection,
    ):
        answers = [ask(connection, "GET", DEPARTMENTS)]
        while [status for status, _, _ in answers].count(429) < 100:
            answers.append(ask(connection, "GET", DEPARTMENTS))
        refused = [(headers, content) for status, headers, content in answers if status == 429]
        assert {status for status, _, _ in answers} == {200, 429}
        assert {headers["Retry-After"] for headers, _ in refused} <= {"1", "2"}
        assert {content["code"] for _, content in refused} == {"too_many_requests"}
        assert ask(connection, "GET", "/healthz")[0] == 200
        eventually(lambda: ask(connection, "GET", DEPARTMENTS)[0] == 200)


def test_wrong_tokens_are_limited_and_right_ones_are_not(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """By address, and whatever else is set."""
    app = make_app(database_url, ROLLCALL_AUTH="token")
    client = app.test_client()
    wrong = {"headers": {"Authorization": "Bearer wrong"}}
    (right,) = tokens_of(app, "one")
    assert calls(client, FAILURES, **wrong) == [401] * FAILURES
    assert says_to_wait(client.get(DEPARTMENTS, **wrong))
    assert client.get(DEPARTMENTS, headers={"Authorization": right}).status_code == 200
    assert calls(client, 1, **wrong, **come_from("192.0.2.7")) == [401]


def test_failures_are_forgotten_with_their_window() -> None:
    """And the addresses that are remembered are limited in number."""
    failures = Failures()
    assert [failures.count("a", 0.0) for _ in range(FAILURES)] == [None] * FAILURES
    assert failures.count("a", 1.0) == WINDOW - 1
    assert failures.count("a", WINDOW) is None
    for number in range(ADDRESSES + 10):
        failures.count(str(number), WINDOW)
    assert len(failures.counts) == ADDRESSES


def test_a_wait_is_a_whole_number_of_seconds() -> None:
    """Never none: the client would be back at once."""
    waits = [limits.too_many_requests(wait).headers["Retry-After"] for wait in (-0.1, 0.2, 1.2)]
    assert waits == ["1", "1", "2"]
