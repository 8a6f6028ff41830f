"""No record of one tenant shows in another, whatever clients do at once; and a leak is found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, NullPool, create_engine, make_url

from app import create_app
from app.db import Databases, db
from app.engines import TenantEngines
from app.models import NATURAL_KEYS
from app.place import Place
from app.pool import pool_state
from migrations_bootstrap import bootstrap
from migrations_bootstrap.embedded import EmbeddedServer
from tests.asgi_client import AsgiApplication, AsgiClient, loop
from tests.conftest import USUAL, asgi_of, execute, hang_up, waits
from tests.isolation import ACTIONS, DEPARTMENTS, Client, Directory, Send, Step
from tests.races import eventually, started
from tests.tenancy import PATTERN, database_of, onboard

NAMES = ("isolated-1", "isolated-2", "isolated-3")
CLIENTS = 4
SETTINGS = {
    "ROLLCALL_TENANT_DATABASE": PATTERN,
    "ROLLCALL_MAX_CONNECTIONS": 3,
    "LOG_LEVEL": "ERROR",
}
AWAITS = 25  # of a request, at which its client may hang up

steps = st.lists(
    st.builds(Step, st.sampled_from(ACTIONS), st.integers(0, len(NAMES))), min_size=3, max_size=8
)


@pytest.fixture(scope="module")
def app(server: EmbeddedServer) -> Iterator[Flask]:
    """A service with three tenants, and fewer connections than that for its four clients."""
    url = server.url("isolation")
    bootstrap(url, NATURAL_KEYS)
    app = create_app({**USUAL, **SETTINGS, "DATABASE_URL": url})
    onboard(app, *NAMES)
    yield app
    hang_up(app)


@pytest.fixture
def directory(app: Flask, server: EmbeddedServer) -> Directory:
    urls: dict[str | None, Any] = {name: make_url(server.url(database_of(name))) for name in NAMES}
    return Directory({**urls, None: make_url(server.url("isolation"))})


@pytest.fixture(scope="module")
def asgi(server: EmbeddedServer) -> Iterator[AsgiApplication]:
    """The asynchronous service of the same tenants, of as few connections.

    It is made here, with its loop, before there are threads that would each make their own.
    """
    asgi = asgi_of(server.url("isolation"), SETTINGS)
    asgi()
    loop()
    yield asgi
    asgi.dispose()


@pytest.fixture
def new_client(app: Flask, asgi: AsgiApplication, service_kind: str) -> Callable[[], FlaskClient]:
    """Make clients of one of the servers."""
    if service_kind == "flask":
        return app.test_client
    return lambda: AsgiClient(app, app.response_class, asgi=asgi)


def sender(client: FlaskClient) -> Send:
    def send(method: str, path: str, tenant: str | None, body: Any) -> tuple[int, Any]:
        answer = client.open(path, method=method, json=body, headers=headers_of(tenant))
        return answer.status_code, answer.get_json(silent=True)

    return send


def headers_of(tenant: str | None) -> dict[str, str]:
    return {} if tenant is None else {"X-Tenant": tenant}


class Impatient:
    """Sends requests, and before every third one another, which its client leaves at some await."""

    def __init__(self, client: AsgiClient) -> None:
        self.client = client
        self.send = sender(client)

    def __call__(self, method: str, path: str, tenant: str | None, body: Any) -> tuple[int, Any]:
        left, turn = divmod(next(numbers), 3)
        if turn == 0:
            new = {"name": f"Of {tenant}, left {left}"}
            self.client.leave(
                left % AWAITS, DEPARTMENTS, method="POST", json=new, headers=headers_of(tenant)
            )
        return self.send(method, path, tenant, body)


numbers = itertools.count()


def send_of(client: FlaskClient) -> Send:
    return Impatient(client) if isinstance(client, AsgiClient) else sender(client)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans=st.lists(steps, min_size=CLIENTS, max_size=CLIENTS))
def test_no_record_shows_in_another_tenant(
    new_client: Callable[[], FlaskClient], directory: Directory, plans: list[list[Step]]
) -> None:
    """Also after errors, retries, lost connections and clients, where all share few connections."""
    clients = [Client(directory, send_of(new_client())) for _ in plans]
    pairs = zip(clients, plans, strict=True)
    ends = [started(lambda one=one, plan=plan: one.go(plan)) for one, plan in pairs]
    for end in ends:
        end()
    directory.check()


def test_who_waits_for_a_connection_holds_nobody_up(
    app: Flask, asgi: AsgiApplication, directory: Directory
) -> None:
    """Both that there may be are in use; whoever leaves the queue does not keep the others."""
    client = AsgiClient(app, app.response_class, asgi=asgi)

    def begin(tenant: str | None) -> Any:
        return client.begin(DEPARTMENTS, headers=headers_of(tenant))

    before = pool_state().waiting
    holder = create_engine(directory.databases[NAMES[0]], poolclass=NullPool)
    with holder.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE department")
        held = [begin(NAMES[0]) for _ in range(2)]
        eventually(lambda: waits(holder) == 2)
        queue = [begin(tenant) for tenant in (*NAMES, None) * 2]
        eventually(lambda: pool_state().waiting == before + len(queue))
        assert client.get("/healthz").status_code == 200
        assert queue.pop(3).cancel()
        eventually(lambda: pool_state().waiting == before + len(queue))
    assert {one.result(20)[0] for one in (*held, *queue)} == {200}
    assert pool_state().waiting == before
    assert asgi().state.engine.pool._cap.held == 2


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
    patched.setattr(LastOneStays, "chosen", None)
    patched.setattr(db, "__class__", LastOneStays)
    patched.setattr(Place, "__post_init__", begin_where_the_last_was)
    patched.setattr(Place, "use", use_for_all)


def use_for_all(self: Place, engine: Engine) -> None:
    LastOneStays.chosen = engine
    begin_where_the_last_was(self)


def begin_where_the_last_was(self: Place) -> None:
    self.engine = self.session.bind = LastOneStays.chosen or self.default_engine


@pytest.mark.parametrize("leak", [leak_by_engine, leak_by_choice])
def test_a_leak_is_found(
    new_client: Callable[[], FlaskClient],
    directory: Directory,
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """Otherwise the test above would prove nothing: in an answer, and in the rows."""
    client = Client(directory, sender(new_client()))
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
