"""Tenants as their clients see them, of both servers, when databases come, go and fall behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask
from sqlalchemy import Engine, text

from app import onboarding
from app.db import db
from migrations_bootstrap.embedded import EmbeddedServer
from tests.conftest import execute
from tests.tenancy import (
    call,
    database_of,
    departments,
    execute_in,
    new_name,
    onboard,
    tenants_app,
)


@pytest.fixture
def app(make_app: Callable[..., Flask], database_url: str) -> Flask:
    return tenants_app(make_app, database_url)


def test_who_is_dropped_is_unknown_from_the_next_request_on(
    make_app: Callable[..., Flask], app: Flask, database_url: str
) -> None:
    """In every worker, those with connections in their pools too; and again when it comes back."""
    name = new_name()
    workers = [tenants_app(make_app, database_url).test_client() for _ in range(3)]
    for round in range(2):
        onboard(app, name)
        for worker in workers[:2]:
            assert departments(worker, name) == (["Sales"] if worker is workers[1] else [])
            assert call(worker, name, name="Sales").status_code in (200, 201)
        with app.app_context():
            onboarding.drop(name)
        for worker in workers:
            answer = call(worker, name, name="Late") if round else call(worker, name)
            assert (answer.status_code, answer.get_json()["code"]) == (404, "unknown_tenant")


@pytest.mark.flask_only
def test_an_old_engine_finds_no_foreign_database(
    app: Flask, administrator: Engine, server: EmbeddedServer
) -> None:
    """Somebody made one of the name of a tenant that was dropped."""
    name = new_name()
    client = app.test_client()
    onboard(app, name)
    assert departments(client, name) == []
    with app.app_context():
        onboarding.drop(name)
    execute_in(administrator, f'CREATE DATABASE "{database_of(name)}"')
    assert call(client, name).status_code == 404
    with administrator.connect() as connection:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name")
        assert connection.scalar(query, {"name": database_of(name)}) == 0
    execute_in(administrator, f'DROP DATABASE "{database_of(name)}"')


def test_a_database_that_vanished_is_away(app: Flask, administrator: Engine) -> None:
    """The registry has the tenant: that is a failure, and not the client's."""
    name = new_name()
    onboard(app, name)
    client = app.test_client()
    assert departments(client, name) == []
    execute_in(administrator, f'DROP DATABASE "{database_of(name)}" WITH (FORCE)')
    answer = call(client, name)
    assert (answer.status_code, answer.get_json()["code"]) == (503, "database_away")


def test_a_schema_that_is_behind_is_not_served_and_one_ahead_is(
    app: Flask, server: EmbeddedServer, administrator: Engine
) -> None:
    """Until the tenant is upgraded, as the newer version is asked to be before it serves."""
    name = new_name()
    onboard(app, name)
    url, client = server.url(database_of(name)), app.test_client()
    execute(url, "DROP TABLE rollcall_version")
    assert call(client, name).get_json()["code"] == "schema_behind"
    execute(
        url,
        "CREATE TABLE rollcall_version (version_num varchar(32) PRIMARY KEY)",
        "INSERT INTO rollcall_version VALUES ('0003')",
        "ALTER TABLE rollcall_token DROP COLUMN tenant",
        "DROP TABLE rollcall_tenant",
    )
    answer = call(client, name)
    assert (answer.status_code, answer.get_json()["code"]) == (503, "schema_behind")
    with app.app_context():
        assert onboarding.upgrade(name).upgrade.before == "0003"
    assert departments(client, name) == []
    execute(url, "UPDATE rollcall_version SET version_num = '9999'")
    execute_in(administrator, ENDED.format(database_of(name)))
    assert departments(client, name) == []


ENDED = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{}'"


@pytest.mark.flask_only
def test_few_connections_serve_many_tenants(
    make_app: Callable[..., Flask], app: Flask, database_url: str, administrator: Engine
) -> None:
    """Those of the tenants that were idle longest are closed; two are all there ever are."""
    names = [new_name() for _ in range(5)]
    onboard(app, *names)
    small = tenants_app(make_app, database_url, ROLLCALL_MAX_CONNECTIONS=3)
    client = small.test_client()
    for round in range(2):
        for name in names:
            assert call(client, name, name=f"Of {name}").status_code == (200 if round else 201)
            assert departments(client, name) == [f"Of {name}"]
            assert departments(client, None) == []
    query = text("SELECT count(*) FROM pg_stat_activity WHERE datname = ANY (:names)")
    with small.app_context(), administrator.connect() as connection:
        assert db.default_engine.pool._cap.held == 2  # type: ignore[attr-defined]
        assert connection.scalar(query, {"names": [*map(database_of, names)]}) in (1, 2)


def test_a_registry_that_is_not_there_yet_is_said_so(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """Nothing is looked for, or made, without it."""
    app = tenants_app(make_app, fresh_database)
    answer = call(app.test_client(), "acme")
    assert (answer.status_code, answer.get_json()["code"]) == (503, "schema_behind")
