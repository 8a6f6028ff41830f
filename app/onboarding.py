"""Tenants come, are brought up to date, and go: databases and registry in an order that holds.

Whatever is killed in the middle of it is finished by doing it again. The registry says what is to
be before the server is asked for it: a line is written before there is a database, and taken out
when there is none any more. The line also has the OID that the database is created with, so that a
database that somebody else made, at whatever moment, is never taken for the tenant's.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import SQLAlchemyError

from app import tenants
from app.config import current_settings
from app.database import APPLICATION_NAME, administering, administration_url
from app.db import db
from app.errors import (
    DatabaseTaken,
    RollcallError,
    TenantGoing,
    TenantInUse,
    TenantUnknown,
    UnknownRole,
)
from app.models import NATURAL_KEYS
from app.tenants import DROPPING, READY, Tenant
from migrations_bootstrap import Bootstrap, BootstrapError, DatabaseMissing, bootstrap, clones
from migrations_bootstrap.connection import APPLICATION_NAME as BOOTSTRAP_NAME
from migrations_bootstrap.connection import connected, make_engine
from migrations_bootstrap.errors import InUse
from migrations_bootstrap.lock import bootstrap_lock
from migrations_bootstrap.schema import revision

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LONGEST_WAIT = 20.0
"""Seconds for whoever else creates, upgrades or drops the same tenant."""

OURS = (APPLICATION_NAME, BOOTSTRAP_NAME)
"""What the sessions of workers call themselves, and those that bring databases up."""

SMALLEST_OID = 2**31  # the server counts up from 16384 for its own


def create(name: str, owner: str | None = None) -> tuple[Tenant, bool]:
    """Return the tenant, and whether it has been created, or its creation finished, by this call.

    Any number of callers may ask at once. Raises UnusableName, UnknownRole, DatabaseTaken,
    TenantGoing, UnknownTable, and BootstrapErrors.
    """
    url, settings = administration_url(), current_settings()
    database = tenants.database_for(
        name, settings.tenant_database, [db.default_engine.url.database, url.database]
    )
    with _locked(name):
        known = tenants.find(db.default_engine, name)
        if known is None:
            known = _register(name, database, owner)
        if known.state == READY:
            return known, False
        if known.state == DROPPING:
            raise TenantGoing(name)
        _make_database(known)
        bootstrap(clones.url_of(url, known.database), NATURAL_KEYS, connect_timeout=_timeout())
        with administering(db.default_engine) as engine:
            tenants.note(engine, name, READY)
    logger.info("tenant created: %s", name, extra={"event": "tenant_created", "tenant": name})
    return tenants.get(db.default_engine, name), True


def _register(name: str, database: str, owner: str | None) -> Tenant:
    """Write that a tenant will be, after looking for what would keep it from that."""
    url = administration_url()
    if clones.oid_of(url, database, _timeout()) is not None:
        raise DatabaseTaken(database)
    if owner is not None and not clones.has_role(url, owner, _timeout()):
        raise UnknownRole("there is no such role that ours could give a database to")
    oid = SMALLEST_OID + secrets.randbelow(SMALLEST_OID)
    with administering(db.default_engine) as engine:
        tenants.register(engine, name, database, oid, owner)
    return tenants.get(db.default_engine, name)


def _make_database(known: Tenant) -> None:
    """Clone the template into the tenant's database, if that is not there yet.

    Where the server refuses, or the name has been taken meanwhile, there is nothing to resume, and
    the tenant is forgotten.
    """
    url, timeout = administration_url(), _timeout()
    wanted = clones.Database(known.database, known.database_oid)
    if clones.oid_of(url, wanted.name, timeout) == wanted.oid:
        return
    prefix = tenants.template_prefix(current_settings().tenant_database)
    template = clones.ensure_template(url, prefix, NATURAL_KEYS, connect_timeout=timeout)
    try:
        if clones.clone(url, wanted, template, owner=known.owner, connect_timeout=timeout):
            return
        raise DatabaseTaken(wanted.name)
    except (DatabaseTaken, DatabaseMissing):
        with administering(db.default_engine) as engine:
            tenants.forget(engine, known.name)
        raise


def drop(name: str, force: bool = False) -> None:
    """Drop a tenant and its database; from the first moment on nobody reaches it any more.

    Sessions of others in the database are ended with ``force``. Without, nothing is done while
    there are some: raises TenantInUse. Raises TenantUnknown, UnknownTable, and BootstrapErrors.
    """
    url, timeout = administration_url(), _timeout()
    with _locked(name):
        known = tenants.get(db.default_engine, name)
        others = clones.strangers(url, known.database, OURS, timeout)
        if others and not force:
            raise TenantInUse(name, others)
        with administering(db.default_engine) as engine:
            tenants.note(engine, name, DROPPING)
            database = clones.Database(known.database, known.database_oid)
            try:
                clones.drop(url, database, OURS, force=force, connect_timeout=timeout)
            except InUse as error:
                raise TenantInUse(name, 1) from error
            tenants.forget(engine, name)
    logger.info("tenant dropped: %s", name, extra={"event": "tenant_dropped", "tenant": name})


def upgrade(name: str) -> Bootstrap:
    """Bring a tenant's database up to date. Raises TenantUnknown and BootstrapErrors."""
    with _locked(name):
        known = tenants.get(db.default_engine, name)
        if known.state != READY:
            raise TenantUnknown(name)
        url = clones.url_of(administration_url(), known.database)
        return bootstrap(url, NATURAL_KEYS, connect_timeout=_timeout())


def renew_template() -> list[str]:
    """Make the template of the newest revision, drop those before; return what was dropped."""
    url, timeout = administration_url(), _timeout()
    prefix = tenants.template_prefix(current_settings().tenant_database)
    clones.ensure_template(url, prefix, NATURAL_KEYS, connect_timeout=timeout)
    return clones.drop_old_templates(url, prefix, timeout)


@dataclass(frozen=True)
class Details:
    """What a tenant's database is like: bytes, its schema's revision, rows marked as duplicates."""

    size: int
    revision: str | None
    duplicates: dict[str, int]


def look_into(known: Tenant) -> Details:
    """Return what a tenant's database is like. Raises BootstrapErrors."""
    url = clones.url_of(administration_url(), known.database)
    with connected(make_engine(url, _timeout())) as connection:
        return Details(
            size=connection.scalar(select(func.pg_database_size(func.current_database()))) or 0,
            revision=revision(connection),
            duplicates={table: _marked(connection, table) for table in NATURAL_KEYS},
        )


def _marked(connection: Connection, table: str) -> int:
    rows = db.metadata.tables[table]
    query = select(func.count()).select_from(rows).where(rows.c.duplicate_of_id.is_not(None))
    return connection.scalar(query) or 0


def for_each(
    known: Iterable[Tenant], work: Callable[[Tenant], Result], at_once: int
) -> Iterator[tuple[Tenant, Result | Exception]]:
    """Yield what work gives, or is kept from giving, for each tenant, in whatever order it ends."""

    def attempt(one: Tenant) -> Result | Exception:
        try:
            return work(one)
        except (RollcallError, BootstrapError, SQLAlchemyError) as error:
            return error

    with ThreadPoolExecutor(at_once) as pool:
        begun = {pool.submit(copy_context().run, attempt, one): one for one in known}
        try:
            for done in as_completed(begun):
                yield begun[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Be the only one who changes anything about a tenant's database. Raises LockTimeout."""
    key = int.from_bytes(sha256(f"tenant {name}".encode()).digest()[:8], "big", signed=True)
    engine = make_engine(administration_url(), _timeout())
    with bootstrap_lock(engine, LONGEST_WAIT, key):
        yield


def _timeout() -> int:
    return current_settings().connect_timeout
