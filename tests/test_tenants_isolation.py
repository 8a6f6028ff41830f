"""No record of one tenant shows in another, whatever clients do at once; and a leak is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, make_url

from app import create_app
from app.db import Databases, db
from app.engines import TenantEngines
from app.models import NATURAL_KEYS
from migrations_bootstrap import bootstrap
from migrations_bootstrap.embedded import EmbeddedServer
from tests.conftest import USUAL, execute, hang_up
from tests.isolation import ACTIONS, Client, Directory, Send, Step
from tests.races import started
from tests.tenancy import PATTERN, database_of, onboard

NAMES = ("isolated-1", "isolated-2", "isolated-3")
CLIENTS = 4

steps = st.lists(
    st.builds(Step, st.sampled_from(ACTIONS), st.integers(0, len(NAMES))), min_size=3, max_size=8
)


@pytest.fixture(scope="module")
def app(server: EmbeddedServer) -> Iterator[Flask]:
    """A service with three tenants, and fewer connections than that for its four clients."""
    url = server.url("isolation")
    bootstrap(url, NATURAL_KEYS)
    app = create_app(
        {
            **USUAL,
            "DATABASE_URL": url,
            "ROLLCALL_TENANT_DATABASE": PATTERN,
            "ROLLCALL_MAX_CONNECTIONS": 3,
            "LOG_LEVEL": "ERROR",
        }
    )
    onboard(app, *NAMES)
    yield app
    hang_up(app)


@pytest.fixture
def directory(app: Flask, server: EmbeddedServer) -> Directory:
    urls: dict[str | None, Any] = {name: make_url(server.url(database_of(name))) for name in NAMES}
    return Directory({**urls, None: make_url(server.url("isolation"))})


def sender(app: Flask) -> Send:
    client = app.test_client()

    def send(method: str, path: str, tenant: str | None, body: Any) -> tuple[int, Any]:
        headers = {} if tenant is None else {"X-Tenant": tenant}
        answer = client.open(path, method=method, json=body, headers=headers)
        return answer.status_code, answer.get_json(silent=True)

    return send


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans=st.lists(steps, min_size=CLIENTS, max_size=CLIENTS))
def test_no_record_shows_in_another_tenant(
    app: Flask, directory: Directory, plans: list[list[Step]]
) -> None:
    """Also after errors, retries and lost connections, and where all share few connections."""
    clients = [Client(directory, sender(app)) for _ in plans]
    pairs = zip(clients, plans, strict=True)
    ends = [started(lambda one=one, plan=plan: one.go(plan)) for one, plan in pairs]
    for end in ends:
        end()
    directory.check()


class LastOneStays(Databases):
    """Keeps the chosen database where all requests meet, as a careless author might."""

    chosen: Engine | None = None

    @property
    def engines(self) -> Mapping[str | None, Engine]:
        chosen = LastOneStays.chosen
        return super().engines if chosen is None else {None: chosen}

    def use(self, engine: Engine) -> None:
        LastOneStays.chosen = engine


def one_for_all(self: TenantEngines, name: str) -> Engine:
    """Return the engine of the first tenant for everybody."""
    return FOUND(self, NAMES[0])


FOUND = TenantEngines.of


def leak_by_engine(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(TenantEngines, "of", one_for_all)


def leak_by_choice(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(db, "__class__", LastOneStays)


@pytest.mark.parametrize("leak", [leak_by_engine, leak_by_choice])
def test_a_leak_is_found(
    app: Flask,
    directory: Directory,
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """Otherwise the test above would prove nothing: in an answer, and in the rows."""
    client = Client(directory, sender(app))
    client.go([Step("find", place) for place in range(len(NAMES) + 1)])
    with monkeypatch.context() as patched:
        leak(patched)
        with pytest.raises(AssertionError, match="was shown Of isolated-"):
            client.go([Step("list", place) for place in range(len(NAMES) + 1)])


def test_a_stray_row_is_found(directory: Directory) -> None:
    """And one that was acknowledged and is not there."""
    url = directory.databases[NAMES[0]].render_as_string(hide_password=False)
    execute(url, "INSERT INTO department (name) VALUES ('Of isolated-2, stray')")
    with pytest.raises(AssertionError, match=r"isolated-1 has \['Of isolated-2, stray'\]"):
        directory.check()
    execute(url, "DELETE FROM department WHERE name = 'Of isolated-2, stray'")
    directory.acknowledge(NAMES[0], ["Of isolated-1, lost"])
    with pytest.raises(AssertionError, match="isolated-1 has lost some"):
        directory.check()
