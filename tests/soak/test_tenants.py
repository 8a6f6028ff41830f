"""For a minute: many tenants, two workers with few connections, which are cut all the time."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import make_url

from app.models import NATURAL_KEYS
from migrations_bootstrap import bootstrap
from migrations_bootstrap.embedded import EmbeddedServer
from tests.isolation import ACTIONS, Client, Directory, Send, Step
from tests.races import started
from tests.serving import Service, serving
from tests.tenancy import PATTERN, database_of

TENANTS = 40
CLIENTS = 12
SECONDS = 45.0
PASSING = "soak-passing"


@pytest.fixture(scope="module")
def service(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    url = server.url("soak")
    bootstrap(url, NATURAL_KEYS)
    with serving(
        tmp_path_factory.mktemp("soak"),
        DATABASE_URL=url,
        ROLLCALL_TENANT_DATABASE=PATTERN,
        ROLLCALL_MAX_CONNECTIONS="8",
        LOG_LEVEL="ERROR",
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


def test_no_record_shows_in_another_tenant(service: Service, server: EmbeddedServer) -> None:
    """And a tenant that comes and goes all the time never has what the one before had."""
    names = [f"soak-{number}" for number in range(TENANTS)]
    for name in names:
        assert service.call("POST", "/api/v1/tenants", {"name": name})[0] == 201
    urls: dict[str | None, Any] = {name: make_url(server.url(database_of(name))) for name in names}
    directory = Directory({**urls, None: make_url(server.url("soak"))})
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
    lives = come_and_go(sender(service), end)
    for finish in ends:
        finish()
    rows = directory.check()
    assert sum(steps) > 1000
    assert rows > 1000
    assert lives > 5


def come_and_go(send: Send, end: float) -> int:
    """Create and drop a tenant until it is time; return how often that was."""
    lives = 0
    while time.monotonic() < end:
        assert send("POST", "/api/v1/tenants", None, {"name": PASSING})[0] == 201
        for _ in range(8):  # both workers know it
            status, found = send("GET", "/api/v1/departments", PASSING, None)
            assert (status, found["items"]) == (200, [])
        assert send("POST", "/api/v1/departments", PASSING, {"name": f"Life {lives}"})[0] == 201
        assert send("DELETE", f"/api/v1/tenants/{PASSING}", None, None)[0] == 204
        for _ in range(8):
            assert send("GET", "/api/v1/departments", PASSING, None)[0] == 404
        lives += 1
    return lives
