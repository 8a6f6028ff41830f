"""Who has a database of their own: names, and the registry in the default database.

A tenant's name stands in headers, host names and paths, and in the name of a database. What a
database is called is decided when the tenant is created, and kept in the registry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Engine,
    Identity,
    MetaData,
    Row,
    Select,
    Table,
    Text,
    bindparam,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import transactions
from app.config import TENANT_TEMPLATE, request_policy
from app.errors import TenantUnknown, UnusableName
from app.tables_of_ours import table_required

CREATING, READY, DROPPING = STATES = ("creating", "ready", "dropping")

LONGEST_IDENTIFIER = 63  # bytes, and characters of a label in a host name
NAME = "[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?"
# Databases that every server has, and what host names begin with that is no tenant.
RESERVED = frozenset(
    {"api", "default", "localhost", "postgres", "rollcall", "template0", "template1", "www"}
)

# Not a table of the directory: apart from the models, so that nothing takes it for one of theirs.
tenant = Table(
    "rollcall_tenant",
    MetaData(),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False),
    Column("database", Text, nullable=False),
    Column("database_oid", BigInteger, nullable=False),
    Column("owner", Text),
    Column("state", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
RACE_INDEXES = frozenset({"uq_rollcall_tenant_name"})


@dataclass(frozen=True)
class Tenant:
    """A line of the registry. ``database_oid`` was chosen before there was a database."""

    name: str
    database: str
    database_oid: int
    owner: str | None
    state: str
    created_at: datetime


COLUMNS = [tenant.c[name] for name in Tenant.__annotations__]


def is_name(text: str) -> bool:
    """Tell whether a tenant could be called so, on any server and with any settings."""
    return re.fullmatch(NAME, text) is not None


def template_prefix(pattern: str) -> str:
    """Return what the names of templates begin with; no tenant's can, since it holds a plus."""
    return pattern.format(name=TENANT_TEMPLATE)


def database_for(name: str, pattern: str, others: Collection[str | None]) -> str:
    """Return how a new tenant's database is to be called, which must be none of the others.

    Raises UnusableName for a name that cannot be one, or would be another database's.
    """
    if not is_name(name):
        raise UnusableName(
            "a tenant's name is 1 to 63 of the letters a-z, digits, - and _; it begins and ends"
            " with a letter or digit"
        )
    database = pattern.format(name=name)
    if len(database.encode()) > LONGEST_IDENTIFIER:
        raise UnusableName(
            f"the name of its database, {pattern}, would be longer than {LONGEST_IDENTIFIER} bytes"
        )
    if name in RESERVED or database in RESERVED or database in others:
        raise UnusableName("the name is reserved: take another")
    return database


def find(engine: Engine, name: str) -> Tenant | None:
    """Return a tenant, whatever state it is in."""
    if not is_name(name):
        return None
    rows = _rows(engine, select(*COLUMNS).where(tenant.c.name == name))
    return next((Tenant(**row._mapping) for row in rows), None)


def get(engine: Engine, name: str) -> Tenant:
    """Return a tenant, whatever state it is in. Raises TenantUnknown."""
    found = find(engine, name)
    if found is None:
        raise TenantUnknown(name)
    return found


def list_all(engine: Engine, after: str = "", limit: int | None = None) -> list[Tenant]:
    """Return the tenants whose names come after one, in the order of their bytes."""
    name = tenant.c.name.collate("C")
    query = select(*COLUMNS).where(name > after).order_by(name).limit(limit)
    return [Tenant(**row._mapping) for row in _rows(engine, query)]


def ready_database(engine: Engine, name: str) -> str:
    """Return the name of a tenant's database. Raises TenantUnknown for one that is not ready."""
    for row in _rows(engine, READY_DATABASE, {"tenant": name}):
        return str(row.database)
    raise TenantUnknown(name)


READY_DATABASE = select(tenant.c.database).where(
    tenant.c.name == bindparam("tenant"), tenant.c.state == READY
)


def _rows(
    engine: Engine, query: Select[Any], parameters: Mapping[str, Any] | None = None
) -> Sequence[Row[Any]]:
    with table_required(tenant):
        return transactions.read(
            engine,
            lambda connection: connection.execute(query, parameters).all(),
            request_policy(),
        )


def register(engine: Engine, name: str, database: str, oid: int, owner: str | None) -> None:
    """Write that a tenant is being created. Whoever calls holds the tenant's lock."""

    def work(session: Session, unanswered: bool | None) -> bool:
        values = {"name": name, "database": database, "database_oid": oid, "owner": owner}
        line = insert(tenant).values(**values, state=CREATING)
        session.execute(line.on_conflict_do_nothing(index_elements=["name"]))
        return True

    _write(engine, work)


def note(engine: Engine, name: str, state: str) -> None:
    """Write what has become of a tenant."""

    def work(session: Session, unanswered: bool | None) -> bool:
        session.execute(update(tenant).where(tenant.c.name == name).values(state=state))
        return True

    _write(engine, work)


def forget(engine: Engine, name: str) -> None:
    """Take a tenant out of the registry; its tokens go with it."""

    def work(session: Session, unanswered: bool | None) -> bool:
        session.execute(delete(tenant).where(tenant.c.name == name))
        return True

    _write(engine, work)


def _write(engine: Engine, work: Callable[[Session, bool | None], bool]) -> None:
    with table_required(tenant):
        transactions.run(engine, work, request_policy(), RACE_INDEXES)
