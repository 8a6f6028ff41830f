"""Tenants for tests: names that no other test has, and what their databases are called."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, text

from app import onboarding, tenants
from app.db import db

PATTERN = "tests_{name}"
numbers = itertools.count(1)


def new_name() -> str:
    """Return what no tenant of this process has been called."""
    return f"tenant-{next(numbers)}"


def database_of(name: str) -> str:
    return PATTERN.format(name=name)


def tenants_app(make_app: Callable[..., Flask], url: str, **config: object) -> Flask:
    """Make an application whose tenants' databases have names of the tests."""
    return make_app(url, **{"ROLLCALL_TENANT_DATABASE": PATTERN, **config})


def onboard(app: Flask, *names: str) -> None:
    with app.app_context():
        for name in names:
            assert onboarding.create(name)[1]


def states(app: Flask) -> dict[str, str]:
    """Return the state of each tenant."""
    with app.app_context():
        return {one.name: one.state for one in tenants.list_all(db.default_engine)}


def exists(administrator: Engine, name: str) -> bool:
    """Tell whether a tenant has a database, whoever made it."""
    with administrator.connect() as connection:
        query = text("SELECT 1 FROM pg_database WHERE datname = :name")
        return bool(connection.scalar(query, {"name": database_of(name)}))


def execute_in(administrator: Engine, statement: str) -> None:
    with administrator.connect() as connection:
        connection.exec_driver_sql(statement)


def call(client: FlaskClient, tenant: str | None, **body: Any) -> Any:
    """Create a department of the tenant, or list them without a body; return the answer."""
    headers = {} if tenant is None else {"X-Tenant": tenant}
    path = "/api/v1/departments"
    if body:
        return client.post(path, json=body, headers=headers)
    return client.get(path, headers=headers)


def departments(client: FlaskClient, tenant: str | None) -> list[str]:
    answer = call(client, tenant)
    assert answer.status_code == 200, answer.text
    return [item["name"] for item in answer.get_json()["items"]]
