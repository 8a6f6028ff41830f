"""For a minute: many tenants, two workers with few connections, which are cut all the time."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from app.models import NATURAL_KEYS
from migrations_bootstrap import bootstrap
from migrations_bootstrap.embedded import EmbeddedServer
from tests.conftest import private_server
from tests.isolation import ACTIONS, Client, Directory, Send, Step
from tests.races import started
from tests.serving import Service, serving, serving_by_uvicorn
from tests.tenancy import PATTERN, database_of

TENANTS = 40
CLIENTS = 12
MANY = 1000
SECONDS = 45.0


@pytest.fixture(params=["gunicorn", "uvicorn"])
def service_kind(request: pytest.FixtureRequest) -> str:
    """The server, and what the names of its tenants begin with."""
    return str(request.param)


@pytest.fixture
def service(server: EmbeddedServer, tmp_path: Path, service_kind: str) -> Iterator[Service]:
    url = server.url(service_kind)
    bootstrap(url, NATURAL_KEYS)
    settings = {
        "DATABASE_URL": url,
        "ROLLCALL_AUTH": "off",
        "ROLLCALL_TENANT_DATABASE": PATTERN,
        "ROLLCALL_MAX_CONNECTIONS": "8",
        "LOG_LEVEL": "ERROR",
    }
    by_uvicorn = service_kind == "uvicorn"
    with (
        serving_by_uvicorn(tmp_path, "--workers=2", **settings)
        if by_uvicorn
        else serving(tmp_path, **settings)
    ) as service:
        yield service


def sender(service: Service) -> Send:
    """Return what sends requests, as a client that has more than one tenant's work to do."""

    def send(method: str, path: str, tenant: str | None, body: Any) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if tenant is not None:
            headers["X-Tenant"] = tenant
        content = None if body is None else json.dumps(body)
        with closing(service.connect()) as connection:
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None

    return send


def test_no_record_shows_in_another_tenant(
    service: Service, server: EmbeddedServer, service_kind: str
) -> None:
    """And a tenant that comes and goes all the time never has what the one before had."""
    names = [f"{service_kind}-{number}" for number in range(TENANTS)]
    for name in names:
        assert service.call("POST", "/api/v1/tenants", {"name": name})[0] == 201
    urls: dict[str | None, Any] = {name: make_url(server.url(database_of(name))) for name in names}
    directory = Directory({**urls, None: make_url(server.url(service_kind))})
    end = time.monotonic() + SECONDS
    steps = [0] * CLIENTS

    def work(number: int) -> None:
        chance, client = random.Random(number), Client(directory, sender(service))  # noqa: S311
        while time.monotonic() < end:
            weights = [1 if action == "cut" else 5 for action in ACTIONS]
            (action,) = chance.choices(ACTIONS, weights)
            client.go([Step(action, chance.randrange(TENANTS + 1))])
            steps[number] += 1

    ends = [started(lambda number=number: work(number)) for number in range(CLIENTS)]
    lives = come_and_go(sender(service), f"{service_kind}-passing", end)
    for finish in ends:
        finish()
    rows = directory.check()
    assert sum(steps) > 1000
    assert rows > 1000
    assert lives > 5


def test_a_thousand_tenants_share_a_hundred_connections(tmp_path: Path) -> None:
    """Of the server; each tenant is called on again when its connections have long been closed."""
    names = [f"many-{number}" for number in range(MANY)]
    with private_server(max_connections="100") as server:
        url = server.url("many")
        bootstrap(url, NATURAL_KEYS)
        settings = {"DATABASE_URL": url, "ROLLCALL_TENANT_DATABASE": PATTERN}
        with (
            serving(tmp_path, ROLLCALL_MAX_CONNECTIONS="40", LOG_LEVEL="ERROR", **settings) as many,
            ThreadPoolExecutor(CLIENTS) as clients,
        ):
            send = sender(many)

            def create(name: str) -> int:
                return send("POST", "/api/v1/tenants", None, {"name": name})[0]

            def enter(name: str) -> int:
                return send("POST", "/api/v1/departments", name, {"name": name})[0]

            def look(name: str) -> list[str]:
                items = send("GET", "/api/v1/departments", name, None)[1]["items"]
                return [item["name"] for item in items]

            assert set(clients.map(create, names)) == {201}
            assert set(clients.map(enter, names)) == {201}
            assert set(clients.map(enter, reversed(names))) == {200}
            assert list(clients.map(look, names)) == [[name] for name in names]


def come_and_go(send: Send, name: str, end: float) -> int:
    """Create and drop a tenant until it is time; return how often that was."""
    lives = 0
    while time.monotonic() < end:
        assert send("POST", "/api/v1/tenants", None, {"name": name})[0] == 201
        for _ in range(8):  # both workers know it
            status, found = send("GET", "/api/v1/departments", name, None)
            assert (status, found["items"]) == (200, [])
        assert send("POST", "/api/v1/departments", name, {"name": f"Life {lives}"})[0] == 201
        assert send("DELETE", f"/api/v1/tenants/{name}", None, None)[0] == 204
        for _ in range(8):
            assert send("GET", "/api/v1/departments", name, None)[0] == 404
        lives += 1
    return lives
