"""Tenants over HTTP: what names one, who may reach it, and that its records are its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, request
from flask.testing import FlaskClient
from sqlalchemy import Engine, create_engine

from app import onboarding, tenants, tokens
from app.db import db
from app.models import NATURAL_KEYS
from migrations_bootstrap import bootstrap, clones
from migrations_bootstrap.embedded import EmbeddedServer
from migrations_bootstrap.errors import AccessRefused
from tests.tenancy import (
    call,
    database_of,
    departments,
    execute_in,
    new_name,
    onboard,
    states,
    tenants_app,
)
from tests.test_errors import assert_problem

TENANTS = "/api/v1/tenants"
DEPARTMENTS = "/api/v1/departments"
ONE, TWO = "api-one", "api-two"


@pytest.fixture(scope="module")
def home_url(server: EmbeddedServer) -> str:
    """A database of the service that has two tenants, for all tests of this file."""
    url = server.url("home")
    bootstrap(url, NATURAL_KEYS)
    return url


@pytest.fixture
def app(make_app: Callable[..., Flask], home_url: str) -> Flask:
    app = tenants_app(make_app, home_url)
    with app.app_context():
        for name in (ONE, TWO):
            onboarding.create(name)
    return app


@pytest.fixture
def locked(make_app: Callable[..., Flask], app: Flask, home_url: str) -> Callable[..., FlaskClient]:
    """Make clients of the service with authentication, and another source of tenants."""

    def make(source: str = "header") -> FlaskClient:
        settings = {"ROLLCALL_AUTH": "token", "ROLLCALL_TENANT_SOURCE": source}
        return tenants_app(make_app, home_url, **settings).test_client()

    return make


@pytest.fixture
def issued(app: Flask) -> Iterator[dict[str | None, dict[str, str]]]:
    """The headers of tokens by whose they are; None is that of all."""
    with app.app_context():
        found: dict[str | None, dict[str, str]] = {}
        for whose in (None, ONE, TWO):
            token = tokens.issue(db.engine, f"of {whose}", "admin", tenant=whose)
            found[whose] = {"Authorization": f"Bearer {token}"}
        yield found
        for whose in found:
            tokens.revoke(db.engine, f"of {whose}")


def test_a_tenant_is_created_shown_listed_and_deleted(app: Flask) -> None:
    """201 with its address, 200 for one that was there, 204, and 404 from then on."""
    client, name = app.test_client(), new_name()
    made = client.post(TENANTS, json={"name": name})
    again = client.post(TENANTS, json={"name": name})
    assert (made.status_code, made.headers["Location"]) == (201, f"{TENANTS}/{name}")
    assert (again.status_code, again.headers["Content-Location"]) == (200, f"{TENANTS}/{name}")
    shown = client.get(f"{TENANTS}/{name}")
    assert shown.get_json() == made.get_json() == again.get_json()
    assert {**shown.get_json(), "created_at": ""} == {
        "name": name,
        "owner": None,
        "state": "ready",
        "created_at": "",
    }
    assert call(client, name, name="Sales").status_code == 201
    gone = client.delete(f"{TENANTS}/{name}")
    assert (gone.status_code, gone.data) == (204, b"")
    for answer in (
        client.get(f"{TENANTS}/{name}"),
        client.delete(f"{TENANTS}/{name}"),
        call(client, name),
        client.get(f"{TENANTS}/%00"),
    ):
        assert_problem(answer, 404, "unknown_tenant")


def test_tenants_are_listed_by_name_in_pages(app: Flask) -> None:
    """Whatever state they are in."""
    with app.app_context():
        tenants.register(db.engine, "api-half", database_of("api-half"), 1, None)
    client = app.test_client()
    first = client.get(f"{TENANTS}?limit=1").get_json()
    assert [item["name"] for item in first["items"]] == ["api-half"]
    rest = client.get(first["next"]).get_json()
    assert [item["name"] for item in rest["items"]] == [ONE]
    assert client.get(f"{TENANTS}?after={TWO}").get_json() == {"items": [], "next": None}
    assert client.get(f"{TENANTS}/api-half").get_json()["state"] == "creating"
    assert_problem(client.get(f"{TENANTS}?after=A"), 422, "invalid")
    with app.app_context():
        tenants.forget(db.engine, "api-half")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"),
        ({"name": "Acme"}, "name"),
        ({"name": 7}, "name"),
        ({"name": "www"}, "name"),
        ({"name": "a" * 60}, "name"),
        ({"name": "acme", "owner": "nobody at all"}, "owner"),
        ({"name": "acme", "owner": ""}, "owner"),
        ({"name": "acme", "state": "ready"}, "state"),
    ],
)
def test_what_cannot_be_a_tenant_is_refused(app: Flask, body: dict[str, Any], field: str) -> None:
    """With the field that is to blame, and nothing is made."""
    answer = app.test_client().post(TENANTS, json=body)
    assert_problem(answer, 422, "invalid")
    assert list(answer.get_json()["errors"]) == [field]
    assert "acme" not in states(app)


def test_what_is_in_the_way_is_a_conflict(
    app: Flask, administrator: Engine, server: EmbeddedServer
) -> None:
    """Somebody else's database, somebody in the tenant's, and a drop that has begun."""
    client, name = app.test_client(), new_name()
    execute_in(administrator, f'CREATE DATABASE "{database_of(name)}"')
    assert_problem(client.post(TENANTS, json={"name": name}), 409, "database_taken")
    execute_in(administrator, f'DROP DATABASE "{database_of(name)}"')
    onboard(app, name)
    stranger = create_engine(server.url(database_of(name)))
    with stranger.connect():
        assert_problem(client.delete(f"{TENANTS}/{name}"), 409, "tenant_in_use")
        assert_problem(client.delete(f"{TENANTS}/{name}?force=yes"), 422, "invalid")
        with app.app_context():
            tenants.note(db.engine, name, "dropping")
        assert_problem(client.post(TENANTS, json={"name": name}), 409, "tenant_dropping")
        assert client.delete(f"{TENANTS}/{name}?force=true").status_code == 204
    stranger.dispose()


def test_what_the_server_refuses_is_not_the_clients_fault(
    app: Flask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the reason, such as a role that may not create databases."""

    def refuse(*given: object) -> None:
        raise AccessRefused("permission denied")

    monkeypatch.setattr(clones, "oid_of", refuse)
    answer = app.test_client().post(TENANTS, json={"name": new_name()})
    assert_problem(answer, 503, "database_away")
    assert "permission denied" in caplog.text
    assert "permission" not in answer.text


def test_the_header_names_the_tenant(app: Flask) -> None:
    """Each has its own records; without a header it is the service's own database."""
    client = app.test_client()
    for whose in (ONE, TWO, None):
        call(client, whose, name=f"Only {whose}")
    for whose in (ONE, TWO, None):
        assert f"Only {whose}" in departments(client, whose)
        others = {f"Only {other}" for other in (ONE, TWO, None)} - {f"Only {whose}"}
        assert others.isdisjoint(departments(client, whose))


@pytest.mark.parametrize("name", ["", " ", "Api-one", f"{ONE},{TWO}", f"{ONE};", "a" * 64, "é"])
def test_a_header_that_cannot_be_a_name_is_refused(app: Flask, name: str) -> None:
    """Also one that was sent twice, which a server makes a list of."""
    answer = app.test_client().get(DEPARTMENTS, headers={"X-Tenant": name})
    assert_problem(answer, 422, "invalid")
    assert list(answer.get_json()["errors"]) == ["x_tenant"]


@pytest.mark.parametrize("name", ["nobody", "postgres", "home", "www", "a" * 63])
def test_a_tenant_that_is_not_there_is_unknown(app: Flask, name: str) -> None:
    """Also one whose name is that of a database; whatever is asked, before it is looked at."""
    client, headers = app.test_client(), {"X-Tenant": name}
    for method in ("GET", "OPTIONS"):
        answer = client.open(DEPARTMENTS, method=method, headers=headers)
        assert_problem(answer, 404, "unknown_tenant")
    assert_problem(client.post(DEPARTMENTS, data="no JSON", headers=headers), 404, "unknown_tenant")
    for path in ("/healthz", "/readyz", "/api/v1/swagger.json", TENANTS):
        assert client.get(path, headers=headers).status_code == 200


def test_every_operation_on_records_says_that_it_may_name_a_tenant(app: Flask) -> None:
    """In the Swagger document, and those on tenants that they do not."""
    document = app.test_client().get("/api/v1/swagger.json").get_json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if method == "parameters":
                continue
            names = {parameter["name"] for parameter in operation.get("parameters", ())}
            of_the_service = path.startswith("/tenants")
            assert ("X-Tenant" in names) is not of_the_service, (path, method)
            assert of_the_service or {"404", "422"} <= operation["responses"].keys()


def test_a_token_of_one_tenant_reaches_that_one_alone(
    locked: Callable[..., FlaskClient], issued: dict[str | None, dict[str, str]]
) -> None:
    """Not the others, not the service's own records, and nothing of the service as a whole."""
    client = locked()
    for whose, token in issued.items():
        for named in (None, ONE, TWO):
            headers = token if named is None else {**token, "X-Tenant": named}
            answer = client.get(DEPARTMENTS, headers=headers)
            allowed = whose in (None, named)
            assert answer.status_code == (200 if allowed else 403), (whose, named)
            if not allowed:
                assert_problem(answer, 403, "wrong_tenant")
                assert "insufficient_scope" in answer.headers["WWW-Authenticate"]
            for path in ("/metrics", TENANTS, f"{TENANTS}/{ONE}"):
                status = client.get(path, headers=headers).status_code
                assert status == (200 if whose is None else 403)
        assert client.get("/api/v1/swagger.json", headers=token).status_code == 200
        assert client.get("/api/v1/nothing", headers=token).status_code == 404


def test_the_token_names_the_tenant_where_that_is_set(
    locked: Callable[..., FlaskClient], issued: dict[str | None, dict[str, str]]
) -> None:
    """One of all names it by the header, and another than its own is refused."""
    client = locked("token")
    for whose, token in issued.items():
        sent = client.post(DEPARTMENTS, json={"name": f"By {whose}"}, headers=token)
        assert sent.status_code in (200, 201)
    for whose in (None, ONE, TWO):
        headers = issued[None] if whose is None else {**issued[None], "X-Tenant": whose}
        items = client.get(DEPARTMENTS, headers=headers).get_json()["items"]
        names = {item["name"] for item in items if item["name"].startswith("By ")}
        assert names == {f"By {whose}"}
    answer = client.get(DEPARTMENTS, headers={**issued[ONE], "X-Tenant": TWO})
    assert_problem(answer, 403, "wrong_tenant")


HOSTS = {
    f"{ONE}.rollcall.example.com": ONE,
    f"{ONE.upper()}.example.com:8443": ONE,
    f"{ONE}.localhost:8000": ONE,
    f"{TWO}.example.com.": TWO,
    "rollcall.example.com": None,
    "www.example.com": None,
    "api.example.com": None,
    "example.com": None,
    "localhost:8000": None,
    "localhost": None,
    "127.0.0.1:8000": None,
    "[::1]:8000": None,
}


def test_the_host_names_the_tenant_where_that_is_set(
    make_app: Callable[..., Flask], app: Flask, home_url: str
) -> None:
    """By its first label. Where there is none it is the service's own database."""
    client = tenants_app(make_app, home_url, ROLLCALL_TENANT_SOURCE="subdomain").test_client()
    for tenant in (ONE, TWO, None):
        call(app.test_client(), tenant, name=f"At {tenant}")
    for host, tenant in HOSTS.items():
        items = client.get(DEPARTMENTS, headers={"Host": host}).get_json()["items"]
        names = {item["name"] for item in items if item["name"].startswith("At ")}
        assert names == {f"At {tenant}"}, host
        agreeing = {"Host": host, "X-Tenant": tenant} if tenant else {"Host": host}
        assert client.get(DEPARTMENTS, headers=agreeing).status_code == 200
        other = client.get(DEPARTMENTS, headers={"Host": host, "X-Tenant": "other"})
        assert_problem(other, 422, "invalid")


@pytest.mark.parametrize(
    ("host", "status"),
    [("nobody.example.com", 404), ("-a.example.com", 422), ("a_.example.com", 422)],
)
def test_a_host_that_names_nobody_finds_nobody(
    make_app: Callable[..., Flask], app: Flask, home_url: str, host: str, status: int
) -> None:
    """As a header does."""
    client = tenants_app(make_app, home_url, ROLLCALL_TENANT_SOURCE="subdomain").test_client()
    assert client.get(DEPARTMENTS, headers={"Host": host}).status_code == status


@pytest.mark.flask_only
def test_a_dropped_tenants_tokens_go_with_it(
    app: Flask, locked: Callable[..., FlaskClient]
) -> None:
    """A new tenant of the name does not inherit them."""
    name = new_name()
    onboard(app, name)
    with app.app_context():
        token = tokens.issue(db.engine, name, "read", tenant=name)
        headers = {"Authorization": f"Bearer {token}", "X-Tenant": name}
        assert locked().get(DEPARTMENTS, headers=headers).status_code == 200
        onboarding.drop(name)
        onboarding.create(name)
        assert locked().get(DEPARTMENTS, headers=headers).status_code == 401


@pytest.mark.flask_only
def test_a_version_without_tenants_takes_no_tenants_token_for_one_of_all(
    app: Flask, issued: dict[str | None, dict[str, str]]
) -> None:
    """It looks for the SHA-256 of what is presented; after a step back of the version, too."""
    with app.app_context(), db.engine.connect() as connection:
        for whose, headers in issued.items():
            sha = tokens.digest(headers["Authorization"].removeprefix("Bearer "))
            found = connection.exec_driver_sql(
                "SELECT name FROM rollcall_token WHERE sha256 = %s", (sha,)
            )
            assert [row.name for row in found] == (["of None"] if whose is None else [])


def test_lines_of_the_log_say_whose_request_it_was(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """And no metric does."""
    client = app.test_client()
    with caplog.at_level("INFO", "rollcall.request"):
        departments(client, ONE)
        departments(client, None)
    assert f"tenant {ONE}" in caplog.messages[-2]
    assert "tenant None" in caplog.messages[-1]
    assert ONE not in client.get("/metrics").text


def test_a_preflight_is_answered_for_every_tenant(
    make_app: Callable[..., Flask], home_url: str
) -> None:
    """Browsers may then send the header."""
    origin = "https://portal.example.com"
    app = tenants_app(make_app, home_url, ROLLCALL_CORS_ORIGINS=origin)
    asked = {"Origin": origin, "Access-Control-Request-Method": "GET", "X-Tenant": "nobody"}
    asked["Access-Control-Request-Headers"] = "X-Tenant"
    answer = app.test_client().options(DEPARTMENTS, headers=asked)
    assert answer.status_code == 204
    assert "X-Tenant" in answer.headers["Access-Control-Allow-Headers"]


@pytest.mark.flask_only
def test_all_of_a_request_works_on_the_tenants_database(app: Flask) -> None:
    """Session, engine and mixin; the next request begins anew."""
    seen: list[set[Any]] = []

    @app.after_request
    def look(response: Any) -> Any:
        bound = {db.engine.url.database, db.session().get_bind().url.database}
        seen.append({*bound, db.session().get_bind(clause=tokens.token).url.database})
        assert request.path == DEPARTMENTS
        return response

    client = app.test_client()
    for whose in (ONE, None, TWO):
        call(client, whose)
    assert seen == [{database_of(ONE)}, {"home"}, {database_of(TWO)}]
