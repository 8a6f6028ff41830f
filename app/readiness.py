"""Whether the service can serve, and if not, why not: in words, and without secrets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Connection, Engine, func, literal, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.db import db, default_engine
from app.errors import ContentionError
from app.models import NATURAL_KEYS
from app.transactions import (
    CANNOT_CONNECT_NOW,
    INSUFFICIENT_PRIVILEGE,
    LOCK_NOT_AVAILABLE,
    TOO_MANY_CONNECTIONS,
    RetryPolicy,
    driver,
    read,
    sqlstate,
)
from migrations_bootstrap import BootstrapError, guard_name, is_ahead, is_current
from migrations_bootstrap.connection import addresses, connected, first_answer, make_engine
from migrations_bootstrap.database import MAINTENANCE

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PROBE = RetryPolicy(attempts=3, deadline=1.0, lock_timeout=0.5, statement_timeout=1.0)
QUERY_CANCELED = "57014"


@dataclass(frozen=True)
class Readiness:
    """What a probe is told: ``state`` by member name, and in words why there is no serving."""

    is_ready: bool
    state: dict[str, Any]
    detail: str = ""


class TableState(NamedTuple):
    """How many of a table's rows are marked as duplicates, and whether its guard is in force."""

    duplicates: int
    guarded: bool


def readiness() -> Readiness:
    """Look at the database: does it answer, is its schema current, which tables are guarded?"""
    try:
        return _probe(_look)
    except (ContentionError, SQLAlchemyError) as error:
        found = _diagnosis(error)
        said = " ".join(str(_root(error)).split())
        logger.warning("not ready: %s (%s)", found.detail, said)
        return found


def look_at_tables() -> dict[str, TableState]:
    """Return each table's state, in a second or not at all: raises what :func:`_probe` does."""
    return _probe(
        lambda connection: {
            table: TableState(_marked(connection, table), _is_guarded(connection, table))
            for table in NATURAL_KEYS
        }
    )


def _probe(look: Callable[[Connection], Result]) -> Result:
    """Return what a short look gives. Raises ContentionError and SQLAlchemy's errors."""
    return read(default_engine(), look, PROBE)


def _look(connection: Connection) -> Readiness:
    if is_current(connection):
        schema, notes = "current", []
    elif is_ahead(connection):
        schema, notes = "ahead", [NEWER]
    else:
        return _not_ready("The schema is older than this version needs; run flask init-db.", BEHIND)
    guards = {table: _is_guarded(connection, table) for table in NATURAL_KEYS}
    notes += [UNGUARDED.format(table) for table, guarded in guards.items() if not guarded]
    state = {"status": "ready", "database": "up", "schema": schema, "guards": guards}
    return Readiness(True, {**state, "notes": notes} if notes else state)


NEWER = "The schema is that of a newer version, which this one serves until it is replaced."
UNGUARDED = (
    "Table {} has no guard: writers that do not use get_or_create can make duplicates in it."
    " Run flask duplicates guard."
)
BEHIND = {"database": "up", "schema": "behind"}
AWAY = {"database": "away"}
UNKNOWN = {"database": "up", "schema": "unknown"}


def _not_ready(detail: str, state: dict[str, str]) -> Readiness:
    return Readiness(False, {"status": "unavailable", **state}, detail)


GUARD_IS_VALID = text("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")


def _is_guarded(connection: Connection, table: str) -> bool:
    return bool(connection.scalar(GUARD_IS_VALID, {"name": guard_name(table)}))


MOST_COUNTED = 1_000_000
"""Rows. By the partial index on duplicate_of_id that takes some 70 ms."""


def _marked(connection: Connection, table: str) -> int:
    rows = db.metadata.tables[table]
    some = select(literal(1)).select_from(rows).where(rows.c.duplicate_of_id.is_not(None))
    counted = select(func.count()).select_from(some.limit(MOST_COUNTED).subquery())
    return connection.scalar(counted) or 0


def _root(error: BaseException) -> BaseException:
    """Return the error that an error began with."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _diagnosis(error: Exception) -> Readiness:
    """Return what keeps the service from its database."""
    causes = list(_causes(error))
    if any(isinstance(cause, BootstrapError) for cause in causes):
        return _not_ready("The embedded server does not start; the log says why.", AWAY)
    if any(isinstance(cause, PoolTimeout) for cause in causes):
        return _not_ready("All connections of this worker's pool are in use.", UNKNOWN)
    state = next((found for cause in causes if (found := sqlstate(cause))), None)
    if state is None:
        engine = make_engine(default_engine().url, int(PROBE.deadline))
        why = driver.get().elsewhere(lambda: _why_not_connected(engine))
        return _not_ready(why, AWAY)
    return _not_ready(ANSWERS.get(state, f"The database answers with SQLSTATE {state}."), UNKNOWN)


ANSWERS = {
    INSUFFICIENT_PRIVILEGE: (
        "The role may not read the table rollcall_version: grant it SELECT, see docs/operations.md."
    ),
    LOCK_NOT_AVAILABLE: "A lock on the table rollcall_version is held by somebody else.",
    QUERY_CANCELED: "The database takes longer than a second to answer.",
}


def _why_not_connected(engine: Engine) -> str:
    """Ask the servers: psycopg2 has no SQLSTATE for a connection that failed."""
    user = engine.url.username or "postgres"
    answers = {first_answer(host, port, user) for host, port in addresses(engine)}
    for state, words in TURNED_AWAY.items():
        if state in answers:
            return words
    if answers == {None}:
        return "No database server answers: check host, port and network."
    return _why_refused(engine)


TURNED_AWAY = {
    CANNOT_CONNECT_NOW: "The database server is starting up or shutting down.",
    TOO_MANY_CONNECTIONS: "The database server has no connection left: see max_connections.",
}


def _why_refused(engine: Engine) -> str:
    """Tell a role that may not log in from a database that is not there, by trying another."""
    timeout = int(PROBE.deadline)
    url = engine.url.difference_update_query([WANTED])
    for name in MAINTENANCE:
        try:
            with connected(make_engine(url.set(database=name), timeout)) as connection:
                there = connection.scalar(DATABASE_IS_THERE, {"name": engine.url.database})
        except BootstrapError:
            continue
        if not there:
            return "The database does not exist; run flask init-db."
        return NONE_OF_THE_KIND if WANTED in engine.url.query else NOT_FOR_THE_ROLE
    return (
        "The database server refuses the role: check its name, its password, pg_hba.conf,"
        " and that a connection is left for it. The log has the server's words."
    )


WANTED = "target_session_attrs"
NONE_OF_THE_KIND = (
    "No database server is of the kind that target_session_attrs asks for, read-write as a rule:"
    " the primary is away, or a standby has yet to be promoted."
)
DATABASE_IS_THERE = text("SELECT EXISTS (SELECT FROM pg_database WHERE datname = :name)")
NOT_FOR_THE_ROLE = (
    "The database does not take the role's connection: check its right to connect,"
    " and the database's connection limit. The log has the server's words."
)
