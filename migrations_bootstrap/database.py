"""Creates the database if it is missing, whoever else may be doing the same."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from sqlalchemy import URL, Connection, text
from sqlalchemy.exc import DBAPIError

from migrations_bootstrap.connection import (
    connected,
    make_engine,
    postgres_url,
    primary_message,
    sqlstate,
)
from migrations_bootstrap.errors import BootstrapError, DatabaseMissing, ServerUnreachable

LONGEST_NAME = 63
"""Bytes. PostgreSQL cuts longer names off without an error, at connect too."""

MAINTENANCE = ("postgres", "template1")

# Eight processes at once meet the unique index of pg_database, hardly ever "duplicate database".
CREATED_MEANWHILE = ("23505", "42P04")
TEMPLATE_IN_USE = "55006"
TEMPLATE_WAIT = 20.0
"""Seconds; the server itself waits 5 for the other users of a template to leave."""


def ensure_database(
    url: str | URL,
    *,
    owner: str | None = None,
    encoding: str = "UTF8",
    template: str = "template0",
    connect_timeout: int = 5,
) -> bool:
    """Create the database that `url` names if it is not there; return whether this call did.

    A role that may neither create databases nor connect to a maintenance database is fine as long
    as the database is there. Needs no lock: CREATE DATABASE itself lets only one caller win.
    Raises ServerUnreachable, AccessRefused or DatabaseMissing.
    """
    url = postgres_url(url)
    for name in (url.database, owner, template):
        check_name(name)
    failure = _connect_failure(url, connect_timeout)
    if failure is None:
        return False
    if isinstance(failure, ServerUnreachable):
        raise failure
    with _maintenance(url, connect_timeout, failure) as connection:
        created = _create_if_absent(connection, url, owner, encoding, template)
    failure = _connect_failure(url, connect_timeout)
    if failure is not None:
        raise failure
    return created


def check_name(name: str | None) -> None:
    """Refuse a name that PostgreSQL would not take as it stands."""
    if name is not None and len(name.encode()) > LONGEST_NAME:
        raise BootstrapError(f"the name {name!r} is longer than {LONGEST_NAME} bytes")


def _connect_failure(url: URL, connect_timeout: int) -> BootstrapError | None:
    try:
        with connected(make_engine(url, connect_timeout)):
            return None
    except BootstrapError as error:
        return error


@contextmanager
def _maintenance(url: URL, connect_timeout: int, failure: BootstrapError) -> Iterator[Connection]:
    """Yield a connection to a maintenance database, or raise why the target could not be had."""
    with ExitStack() as stack:
        for name in MAINTENANCE:
            engine = make_engine(
                url.set(database=name), connect_timeout, isolation_level="AUTOCOMMIT"
            )
            with suppress(BootstrapError):
                connection = stack.enter_context(connected(engine))
                break
        else:
            raise failure
        yield connection


def _create_if_absent(
    connection: Connection, url: URL, owner: str | None, encoding: str, template: str
) -> bool:
    lookup = text("SELECT 1 FROM pg_database WHERE datname = :name")
    if connection.scalar(lookup, {"name": url.database}):
        return False
    quoted = connection.dialect.identifier_preparer.quote_identifier
    statement = (
        f"CREATE DATABASE {quoted(str(url.database))}"
        f" TEMPLATE {quoted(template)} ENCODING {quoted(encoding)}"
    ) + (f" OWNER {quoted(owner)}" if owner else "")
    return send_creation(connection, statement, url)


def send_creation(connection: Connection, statement: str, url: URL) -> bool:
    """Send the CREATE DATABASE that makes what `url` names; return False where that is there."""
    deadline = time.monotonic() + TEMPLATE_WAIT
    while True:
        try:
            connection.exec_driver_sql(statement)
            return True
        except DBAPIError as error:
            if sqlstate(error) in CREATED_MEANWHILE:
                return False
            if sqlstate(error) != TEMPLATE_IN_USE or time.monotonic() > deadline:
                raise DatabaseMissing(
                    f"database {url.database!r} is not there and role {url.username!r} cannot"
                    f" create it: {primary_message(error)}"
                ) from error
        time.sleep(0.2)
