"""Databases that are copies of a template, made in a fraction of a second, and their end.

A template is a database that nobody can connect to, brought up once for each revision. Statements
are sent from the database that is given by its URL; others are named. Names are quoted.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy import URL, Connection, text

from migrations_bootstrap import bootstrap
from migrations_bootstrap.connection import connected, make_engine, postgres_url
from migrations_bootstrap.database import check_name, send_creation
from migrations_bootstrap.errors import InUse
from migrations_bootstrap.indexes import Keys
from migrations_bootstrap.lock import bootstrap_lock
from migrations_bootstrap.schema import head, knows

logger = logging.getLogger(__name__)

TEMPLATE_KEY = int.from_bytes(b"template", "big")
FORCED = " WITH (FORCE)"

IS_MEMBER = text("SELECT pg_has_role(oid, 'MEMBER') FROM pg_roles WHERE rolname = :name")
OID = text("SELECT CAST(oid AS bigint) FROM pg_database WHERE datname = :name")
IS_TEMPLATE = text("SELECT datistemplate FROM pg_database WHERE datname = :name")
TEMPLATES = text("SELECT datname FROM pg_database WHERE starts_with(datname, :prefix)")
STRANGERS = text("""
    SELECT count(*) FROM pg_stat_activity
     WHERE datname = :name AND application_name <> ALL (:ours) AND backend_type = 'client backend'
""")
TERMINATE = text("""
    SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
     WHERE datname = :name AND application_name = ANY (:ours)
""")


class Database(NamedTuple):
    """What a database is known by: an OID is never given to another while it is there."""

    name: str
    oid: int


def url_of(url: str | URL, name: str) -> URL:
    """Return the URL of another database of the server; nothing in the query names one besides."""
    return postgres_url(url).set(database=name).difference_update_query(["dbname", "database"])


@contextmanager
def statements(url: str | URL, connect_timeout: int = 5) -> Iterator[Connection]:
    """Yield a connection for statements that PostgreSQL runs outside of transactions."""
    engine = make_engine(url, connect_timeout, isolation_level="AUTOCOMMIT")
    with connected(engine) as connection:
        yield connection


def _quoted(connection: Connection, name: str) -> str:
    check_name(name)
    return connection.dialect.identifier_preparer.quote_identifier(name)


def ensure_template(
    url: str | URL, prefix: str, keys: Keys, *, connect_timeout: int = 5, lock_timeout: float = 300
) -> str:
    """Return the name of the template of the newest revision; make it, if it is not there.

    It becomes a template in the one statement that closes it to connections: what is one is whole.
    Any number of callers may ask at once. Raises a BootstrapError.
    """
    name = f"{prefix}{head()}"
    with statements(url, connect_timeout) as connection:
        if _is_template(connection, name):
            return name
    with (
        bootstrap_lock(make_engine(url, connect_timeout), lock_timeout, TEMPLATE_KEY),
        statements(url, connect_timeout) as connection,
    ):
        if not _is_template(connection, name):
            bootstrap(url_of(url, name), keys, connect_timeout=connect_timeout)
            closed = "IS_TEMPLATE true ALLOW_CONNECTIONS false"
            connection.exec_driver_sql(f"ALTER DATABASE {_quoted(connection, name)} WITH {closed}")
            logger.info("made the template database %s", name)
    return name


def _is_template(connection: Connection, name: str) -> bool:
    return bool(connection.scalar(IS_TEMPLATE, {"name": name}))


def drop_old_templates(url: str | URL, prefix: str, connect_timeout: int = 5) -> list[str]:
    """Drop the templates of revisions before the newest; return their names."""
    with statements(url, connect_timeout) as connection:
        old = [
            name
            for name in connection.scalars(TEMPLATES, {"prefix": prefix})
            if name != f"{prefix}{head()}" and knows(name.removeprefix(prefix))
        ]
        for name in old:
            quoted = _quoted(connection, name)
            connection.exec_driver_sql(f"ALTER DATABASE {quoted} WITH IS_TEMPLATE false")
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {quoted}")
    return old


def oid_of(url: str | URL, name: str, connect_timeout: int = 5) -> int | None:
    """Return the OID of a database, None where there is none of this name."""
    with statements(url, connect_timeout) as connection:
        oid: int | None = connection.scalar(OID, {"name": name})
        return oid


def has_role(url: str | URL, name: str, connect_timeout: int = 5) -> bool:
    """Tell whether there is a role of this name, and ours may give it a database."""
    with statements(url, connect_timeout) as connection:
        return bool(connection.scalar(IS_MEMBER, {"name": name}))


def clone(
    url: str | URL,
    database: Database,
    template: str,
    *,
    owner: str | None = None,
    connect_timeout: int = 5,
) -> bool:
    """Create a database as a copy of a template; return False where its name is taken.

    It gets the OID that is given, by which the caller knows it again: it is there from the same
    moment as the database. Raises DatabaseMissing, whose cause says why, or ServerUnreachable.
    """
    with statements(url, connect_timeout) as connection:
        statement = (
            f"CREATE DATABASE {_quoted(connection, database.name)}"
            f" WITH TEMPLATE {_quoted(connection, template)} OID {database.oid:d}"
        ) + (f" OWNER {_quoted(connection, owner)}" if owner else "")
        return send_creation(connection, statement, url_of(url, database.name))


def drop(
    url: str | URL,
    database: Database,
    ours: Sequence[str],
    *,
    force: bool = False,
    connect_timeout: int = 5,
) -> None:
    """Drop a database, if it is there: let nobody in any more, end the sessions, drop it.

    When this returns each connection of ours, those with one of these `application_name`s, is gone.
    Those of others are ended with `force`; else they are left alone and InUse is raised.
    """
    with statements(url, connect_timeout) as connection:
        if connection.scalar(OID, {"name": database.name}) != database.oid:
            return
        quoted = _quoted(connection, database.name)
        connection.exec_driver_sql(f"ALTER DATABASE {quoted} WITH ALLOW_CONNECTIONS false")
        connection.execute(TERMINATE, {"name": database.name, "ours": list(ours)})
        # PostgreSQL would wait five seconds for them.
        if not force and (others := _strangers(connection, database.name, ours)):
            raise InUse(f"database {database.name!r} is in use by {others} sessions")
        connection.exec_driver_sql(f"DROP DATABASE {quoted}{FORCED if force else ''}")


def strangers(url: str | URL, name: str, ours: Sequence[str], connect_timeout: int = 5) -> int:
    """Return how many sessions of others than us are in a database."""
    with statements(url, connect_timeout) as connection:
        return _strangers(connection, name, ours)


def _strangers(connection: Connection, name: str, ours: Sequence[str]) -> int:
    return connection.scalar(STRANGERS, {"name": name, "ours": list(ours)}) or 0
