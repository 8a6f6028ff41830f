"""Run a unit of work at SERIALIZABLE, again and again, until the database accepts it.

PostgreSQL lets a serializable transaction fail at any statement, COMMIT included, and asks the
application to run the complete transaction again, with the logic that decides what it does (manual,
"Serializable Isolation Level"). :func:`retry` is that loop, the only one here. Two kinds of work go
through it: a callable with a session of its own (:func:`run`), and one statement (:func:`execute`).

How SQL is sent and how one waits is :class:`Driver`'s: this one's is psycopg2, and blocks. ``aio``
has asyncpg's, under which all of this is run as it stands.

This module knows no Flask and no model: take it, together with ``errors.py``, where you need it.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection

from app.errors import ContentionError, DatabaseAway, LostRace

logger = logging.getLogger(__name__)

on_retry: set[Callable[[str | None], object]] = set()
"""Called with the SQLSTATE, if there is one, of each error that is about to be retried."""

Result = TypeVar("Result")

SERIALIZATION_FAILURE = "40001"
DEADLOCK_DETECTED = "40P01"
LOCK_NOT_AVAILABLE = "55P03"
UNIQUE_VIOLATION = "23505"
FOREIGN_KEY_VIOLATION = "23503"
READ_ONLY_TRANSACTION = "25006"
FEATURE_NOT_SUPPORTED = "0A000"  # SERIALIZABLE on a standby; of a prepared statement: see _send
CANNOT_CONNECT_NOW = "57P03"
TOO_MANY_CONNECTIONS = "53300"
INSUFFICIENT_PRIVILEGE = "42501"

ENDS_CONNECTION = frozenset({"57P01", "57P02"})  # admin shutdown, crash shutdown
TAKES_NO_WRITES = frozenset({READ_ONLY_TRANSACTION, FEATURE_NOT_SUPPORTED})
LOST_THE_RACE = frozenset({SERIALIZATION_FAILURE, DEADLOCK_DETECTED, LOCK_NOT_AVAILABLE})


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try, how long to wait in between, and what one try may take; in seconds.

    ``deadline`` bounds the whole, connecting and waiting for the pool included: no further attempt
    begins after it. One under way may still wait once, for the pool, a connection or a lock.
    """

    attempts: int = 50
    deadline: float = 10.0
    wait_initial: float = 0.005
    wait_max: float = 0.5
    lock_timeout: float = 2.0
    statement_timeout: float = 10.0


def backoff(
    retry: int, policy: RetryPolicy, uniform: Callable[[float, float], float] = random.uniform
) -> float:
    """Return the seconds to wait before the given retry, counted from 1.

    The first is at once: the victim of a serialization failure can succeed straight away
    (PostgreSQL's README-SSI). The others have full jitter under a doubling, capped bound.
    """
    if retry == 1:
        return 0.0
    exponent = min(retry - 2, 32)
    return uniform(0.0, min(policy.wait_max, policy.wait_initial * 2.0**exponent))


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error: psycopg2 calls it pgcode, psycopg and asyncpg sqlstate."""
    original = getattr(error, "orig", None)
    return getattr(original, "pgcode", None) or getattr(original, "sqlstate", None)


def violated_constraint(error: BaseException) -> str | None:
    """Return the name of the constraint or index that an integrity error names.

    psycopg2's has it in its diagnostics, asyncpg's itself; SQLAlchemy wraps that once more.
    """
    original = getattr(error, "orig", None)
    known = (getattr(original, "diag", None), original, getattr(original, "__cause__", None))
    names = (getattr(one, "constraint_name", None) for one in known)
    return next((name for name in names if name), None)


def is_connection_lost(state: str | None) -> bool:
    """Tell whether a SQLSTATE says that the connection ends: by an operator, a crash, or itself.

    psycopg2 has none then; asyncpg has what the server has said last.
    """
    return state is not None and (state in ENDS_CONNECTION or state.startswith("08"))


def is_lost(error: DBAPIError) -> bool:
    """Tell whether an error has ended its connection, so that nobody knows how far it got."""
    return error.connection_invalidated or is_connection_lost(sqlstate(error))


def is_retryable(error: BaseException, race_indexes: Collection[str] = ()) -> bool:
    """Tell whether running the complete unit of work again can help.

    A lost race, a lost connection (a re-run looks again, so that also a lost reply to COMMIT ends
    well), a server that is away, and a pool that is used up are. A unique violation is only one of
    ``race_indexes``, the indexes that the work itself relies on; any other is the caller's.
    """
    if isinstance(error, (LostRace, DatabaseAway, PoolTimeout)):
        return True
    if not isinstance(error, DBAPIError):
        return False
    state = sqlstate(error)
    if state == UNIQUE_VIOLATION:
        return violated_constraint(error) in race_indexes
    return is_lost(error) or state in LOST_THE_RACE


def retry(
    attempt: Callable[[int], Result],
    policy: RetryPolicy,
    race_indexes: Collection[str] = (),
    sleep: Callable[[float], object] | None = None,
) -> Result:
    """Call ``attempt`` with 1, 2, 3 … until it returns, and return what it does.

    An error that is not retryable passes as it is. Raises :class:`ContentionError`, from the last
    error, when the policy's attempts or its deadline are spent.
    """
    started = time.monotonic()
    number = 1
    while True:
        try:
            return attempt(number)
        except Exception as error:
            if not is_retryable(error, race_indexes):
                raise
            elapsed = time.monotonic() - started
            wait = backoff(number, policy)
            if number >= policy.attempts or elapsed + wait >= policy.deadline:
                raise ContentionError(number, elapsed, sqlstate(error)) from error
            _tell_of_retry(number, sqlstate(error))
        (sleep or driver.get().sleep)(wait)
        number += 1


def _tell_of_retry(attempt: int, state: str | None) -> None:
    _log_retry(attempt, state)
    for tell in on_retry:
        tell(state)


def _log_retry(attempt: int, state: str | None) -> None:
    logger.warning(
        "transaction retry: attempt=%d sqlstate=%s",
        attempt,
        state,
        extra={"event": "transaction_retry", "attempt": attempt, "sqlstate": state},
    )


def look_again(work: Callable[[], Result]) -> Result:
    """Do the work, and once more after a violation of a unique index that is not ours.

    It may be a constraint on the key that the table had before us: its winner is committed now,
    and found. Any other is violated again, and that is the caller's.
    """
    try:
        return work()
    except IntegrityError as error:
        if sqlstate(error) != UNIQUE_VIOLATION:
            raise
        return work()


def run(
    engine: Engine,
    work: Callable[[Session, Result | None], Result],
    policy: RetryPolicy,
    race_indexes: Collection[str] = (),
    beginning: str = "",
) -> Result:
    """Run ``work(session, unanswered)`` in a transaction of its own at SERIALIZABLE, and commit.

    Each attempt gets a new session, closed on every way out. ``unanswered`` is what the work
    returned in an earlier attempt whose COMMIT got no reply, and None otherwise: that commit may
    have happened, so that, say, a deletion which now finds nothing knows that it was the one.
    ``beginning`` is SQL to begin with, such as :func:`after_lists` gives. Objects stay loaded after
    the commit. Raises what the work raises, and see :func:`retry`.
    """
    unanswered: Result | None = None

    def attempt(number: int) -> Result:
        nonlocal unanswered
        with (
            connect(engine) as connection,
            _leaving_read_only_servers(engine, connection.connection, number),
            Session(connection, expire_on_commit=False) as session,
        ):
            # By way of the session: it commits only a transaction that it began itself.
            begin(session.connection(), beginning_of(policy) + beginning)
            result = work(session, unanswered)
            session.flush()
            try:
                session.commit()
            except DBAPIError as error:
                if is_lost(error):
                    unanswered = result
                raise
            return result

    return retry(attempt, policy, race_indexes)


def read(engine: Engine, query: Callable[[Connection], Result], policy: RetryPolicy) -> Result:
    """Return what a query gives on a connection of its own, at the usual isolation level.

    Raises what it raises, and see :func:`retry`.
    """

    def attempt(number: int) -> Result:
        with connect(engine) as connection:
            begin(connection, limits(policy))
            return query(connection)

    return retry(attempt, policy)


class StatementText:
    """A statement as the driver takes it, and as it is sent to be prepared on the server.

    The name that it is prepared under says what it is, so that it means the same on each
    connection, also where a pooler passes several off as one. ``beginning`` goes before it in its
    transaction. ``is_numbered`` where the driver takes $1, $2 … itself, and the parameters in that
    order.

    ``at_once`` is the same, with the same parameters, for a driver that can send no beginning with
    it. It may rely on the connection to be at SERIALIZABLE, and does nothing but to give a row of
    NULLs where it is not. Without it there is no such way.
    """

    def __init__(
        self,
        sql: str,
        parameters: Sequence[str],
        beginning: str = "",
        is_numbered: bool = False,
        at_once: str | None = None,
    ) -> None:
        self.beginning = beginning
        self.at_once = at_once
        self.parameters = parameters
        self.is_numbered = is_numbered
        self.sql = sql
        if not is_numbered:
            self._prepare()

    def _prepare(self) -> None:
        parameters = self.parameters
        numbered = {name: f"${number}" for number, name in enumerate(parameters, 1)}
        body = self.sql % numbered
        self.name = f"rollcall_{sha256(body.encode()).hexdigest()[:16]}"
        arguments = ", ".join(f"%({name})s" for name in parameters)
        self.execute = f"EXECUTE {self.name}" + (f" ({arguments})" if arguments else "")
        escaped = body.replace("%", "%%")
        self.prepare_and_execute = f"PREPARE {self.name} AS {escaped}; {self.execute}"

    def in_order(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the values, which are given by parameter, as $1, $2 …"""
        return tuple([values[name] for name in self.parameters])


def execute(
    engine: Engine,
    statement: Callable[[int], tuple[StatementText, Mapping[str, Any]]],
    policy: RetryPolicy,
    race_indexes: Collection[str],
) -> list[tuple[Any, ...]]:
    """Run one statement as a serializable transaction, in one round trip, and return its rows.

    ``statement(attempt)`` gives its text and parameters. SET TRANSACTION and the statement travel
    as one simple query, which PostgreSQL runs as one transaction: the shortest there can be, and
    one that keeps its isolation level through PgBouncer in transaction mode.

    It is the driver's cursor that sends it, so that SQLAlchemy's events of execution do not fire:
    a Connection and its result would double what a call costs here. Errors are SQLAlchemy's.
    """
    beginning = beginning_of(policy)

    def attempt(number: int) -> list[tuple[Any, ...]]:
        text, parameters = statement(number)
        connection = _borrow(engine)
        try:
            with _leaving_read_only_servers(engine, connection, number):
                return driver.get().send(engine, connection, beginning, text, parameters, number)
        finally:
            connection.close()

    return retry(attempt, policy, race_indexes)


@contextmanager
def _leaving_read_only_servers(
    engine: Engine, connection: PoolProxiedConnection, attempt: int
) -> Iterator[None]:
    """Have new connections made after an error that says: this server takes no writes.

    It may have been one for a while only, or another has taken its place: the first attempt is run
    again at once. What the pool holds would go on saying so for as long as it lives.
    """
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) not in TAKES_NO_WRITES:
            raise
        engine.pool._invalidate(connection, error)
        if attempt == 1:
            raise LostRace from error
        raise


class Driver:
    """What is done in one way by psycopg2 and in another by asyncpg: see ``aio``."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def elsewhere(self, blocking: Callable[[], Result]) -> Result:
        """Do what knows no other way than to block."""
        return blocking()

    def reaching(self, engine: Engine) -> AbstractContextManager[None]:
        """Raise DatabaseAway for an error of connecting that time may heal."""
        return _reaching(engine)

    def begin(self, connection: Connection, sql: str) -> None:
        """Begin a transaction with several statements of SQL that give no rows."""
        connection.exec_driver_sql(sql)

    def send(
        self,
        engine: Engine,
        connection: PoolProxiedConnection,
        beginning: str,
        text: StatementText,
        parameters: Mapping[str, Any],
        attempt: int,
    ) -> list[tuple[Any, ...]]:
        """Run a statement as a transaction of its own; return its rows. Raises DBAPIError.

        ``beginning`` is that of its policy; that of the statement follows.
        """
        try:
            return _send(connection, beginning + text.beginning, text, parameters)
        except engine.dialect.loaded_dbapi.Error as error:
            raise _wrapped(engine, connection, text.sql, parameters, error) from error


driver: ContextVar[Driver] = ContextVar("driver", default=Driver())  # noqa: B039 - has no state


def begin(connection: Connection, sql: str) -> None:
    """Begin a transaction with several statements of SQL that give no rows."""
    driver.get().begin(connection, sql)


INVALID_STATEMENT_NAME = "26000"
DUPLICATE_PREPARED_STATEMENT = "42P05"
NOT_PREPARED_SO = (INVALID_STATEMENT_NAME, DUPLICATE_PREPARED_STATEMENT, FEATURE_NOT_SUPPORTED)
Prepared = dict[str, bool]  # by name: whether a connection has it, and it can be executed
MOST_PREPARED = 50  # on a connection; each takes the server some 50 kB


def _send(
    connection: PoolProxiedConnection,
    beginning: str,
    text: StatementText,
    parameters: Mapping[str, Any],
) -> list[tuple[Any, ...]]:
    """Send a statement, prepared once a connection: planning it costs more than running it.

    Where the server says that the name is not, or no longer, what we think, as behind a pooler, or
    that a column has another type by now (0A000), it has done nothing, and the statement is sent in
    full.
    """
    own: Any = connection.dbapi_connection
    prepared = _prepared_on(connection)
    sql = _sql_to_send(prepared, text)
    try:
        return _rows(own, beginning + sql, parameters)
    except Exception as error:
        state = getattr(error, "pgcode", None)
        if sql == text.sql or state not in NOT_PREPARED_SO:
            raise
        if state == INVALID_STATEMENT_NAME:
            del prepared[text.name]
        elif state == FEATURE_NOT_SUPPORTED:
            prepared[text.name] = False
    return _rows(own, beginning + text.sql, parameters)


def _prepared_on(connection: Connection | PoolProxiedConnection) -> Prepared:
    prepared: Prepared = connection.info.setdefault("rollcall_prepared", {})
    return prepared


def _sql_to_send(prepared: Prepared, text: StatementText) -> str:
    usable = prepared.get(text.name)
    if usable is None and len(prepared) < MOST_PREPARED:
        prepared[text.name] = True
        return text.prepare_and_execute
    return text.execute if usable else text.sql


def execute_prepared(connection: Connection, sql: str, parameters: Mapping[str, Any]) -> Any:
    """Run a statement within a transaction, prepared once a connection, and return its result.

    Where the server has it under another name or none, as behind a pooler, the transaction has
    failed: raises LostRace, and it is sent in full when the transaction is run again.
    """
    prepared = _prepared_on(connection)
    text = _statement_text(sql, tuple(parameters))
    try:
        return connection.exec_driver_sql(_sql_to_send(prepared, text), dict(parameters))
    except DBAPIError as error:
        if sqlstate(error) not in NOT_PREPARED_SO or not prepared.get(text.name):
            raise
        prepared[text.name] = False
        raise LostRace from error


@lru_cache(maxsize=256)
def _statement_text(sql: str, parameters: tuple[str, ...]) -> StatementText:
    return StatementText(sql, parameters)


def _rows(own: Any, sql: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Send a statement without a BEGIN before it: psycopg2's autocommit costs no round trip."""
    before, own.autocommit = own.autocommit, True
    try:
        with own.cursor() as cursor:
            cursor.execute(sql, parameters)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
            return rows
    finally:
        if not own.closed:
            own.autocommit = before


def _wrapped(
    engine: Engine,
    connection: PoolProxiedConnection,
    sql: str,
    parameters: Mapping[str, Any],
    error: Any,
) -> DBAPIError:
    """Return the driver's error as SQLAlchemy's, and do what it does about a lost connection.

    Those that the pool opened before it count as lost as well.
    """
    lost = engine.dialect.is_disconnect(error, connection.dbapi_connection, None)
    if lost:
        engine.pool._invalidate(connection, error)
    return _as_sqlalchemys(engine, error, lost, sql, parameters)


def _as_sqlalchemys(
    engine: Engine, error: Any, lost: bool, sql: str = "", parameters: Any = None
) -> DBAPIError:
    wrapped = DBAPIError.instance(
        sql,
        parameters,
        error,
        engine.dialect.loaded_dbapi.Error,
        hide_parameters=engine.hide_parameters,
        connection_invalidated=lost,
        dialect=engine.dialect,
    )
    return cast(DBAPIError, wrapped)


def _borrow(engine: Engine) -> PoolProxiedConnection:
    """Take a driver's connection from the pool; raise what :func:`connect` does."""
    with reaching(engine):
        try:
            return engine.raw_connection()
        except engine.dialect.loaded_dbapi.Error as error:
            raise _as_sqlalchemys(engine, error, lost=False) from error


# Not by SQLAlchemy's isolation_level: each change of it makes psycopg2 send another statement.
# A table of a few rows is scanned sequentially even where it has an index, and that locks the whole
# relation against every insert: hence enable_seqscan.
SERIALIZABLE = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; SET LOCAL enable_seqscan = off; "


def after_lists(tables: Iterable[str]) -> str:
    """Return the SQL that waits for whoever is storing a list in the tables, given as SQL names.

    An INSERT takes this lock too, but its snapshot is older than its wait: it does not see what the
    list has stored, loses to it, and then waits for the next list. A LOCK takes no snapshot. Beside
    two senders of lists single creates lost up to 14 times in succession without it, and 4 with it;
    it costs some 2 µs.
    """
    return f"LOCK TABLE {', '.join(tables)} IN ROW EXCLUSIVE MODE; "


def beginning_of(policy: RetryPolicy) -> str:
    """Return the SQL that each unit of work of a policy begins with."""
    return f"{SERIALIZABLE}{limits(policy)}"


def defaults_of(policy: RetryPolicy) -> dict[str, str]:
    """Return the settings of a connection on which all begin so, without being told.

    Not for each: PgBouncer refuses them as start-up options, and what else is done there begins
    so as well.
    """
    return {
        "default_transaction_isolation": "serializable",
        "enable_seqscan": "off",
        "lock_timeout": str(_milliseconds(policy.lock_timeout)),
        "statement_timeout": str(_milliseconds(policy.statement_timeout)),
    }


def limits(policy: RetryPolicy) -> str:
    """Return the time limits of one transaction, as SQL.

    SET LOCAL, since PgBouncer refuses them as start-up options.
    """
    return _limits(policy.lock_timeout, policy.statement_timeout)


@lru_cache(maxsize=64)
def _limits(lock_timeout: float, statement_timeout: float) -> str:
    return (
        f"SET LOCAL lock_timeout = {_milliseconds(lock_timeout)}; "
        f"SET LOCAL statement_timeout = {_milliseconds(statement_timeout)}; "
    )


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def connect(engine: Engine) -> Connection:
    """Take a connection from the engine's pool.

    Raises :class:`DatabaseAway` when the server cannot be reached or takes nobody just now, and
    the driver's error when it can and said no: a bad password, no such database.
    """
    with reaching(engine):
        return engine.connect()


def reaching(engine: Engine) -> AbstractContextManager[None]:
    """Raise DatabaseAway for an error of connecting that time may heal."""
    return driver.get().reaching(engine)


@contextmanager
def _reaching(engine: Engine) -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if is_away(engine):
            raise DatabaseAway from error
        raise


def is_away(engine: Engine) -> bool:
    """Tell whether none of the engine's servers takes connections now.

    Where the URL asks for a server of some kind (``target_session_attrs``), one that is away is
    enough: another may be about to take its place. psycopg2 gives no SQLSTATE for a failed connect,
    hence this second question.
    """
    user = engine.url.username or "postgres"
    enough = all if "target_session_attrs" in engine.url.query else any
    return not enough(_takes_connections(host, port, user) for host, port in _addresses(engine))


def _addresses(engine: Engine) -> list[tuple[str, str]]:
    """Return where libpq looks for the engine's servers: the URL, its own variables, defaults."""
    _, options = engine.dialect.create_connect_args(engine.url)
    named = options.get("hostaddr") or options.get("host") or os.environ.get("PGHOST")
    hosts = str(named or DEFAULT_HOSTS).split(",")
    given = str(options.get("port") or os.environ.get("PGPORT") or "").split(",")
    ports = [port or DEFAULT_PORT for port in given]
    return list(zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=False))


DEFAULT_HOSTS = "/var/run/postgresql,/tmp,localhost"
DEFAULT_PORT = "5432"
PROTOCOL_3 = 196608
PING_TIMEOUT = 2.0


def _takes_connections(host: str, port: str, user: str) -> bool:
    """Ask as pg_isready does: a start-up packet, and a look at the first answer.

    An authentication request, or a refusal for the user's own reasons, comes from a server that
    takes connections (manual, "Frontend/Backend Protocol": start-up and ErrorResponse).
    """
    body = struct.pack("!i", PROTOCOL_3) + b"user\0" + user.encode() + b"\0\0"
    try:
        with _open_socket(host, int(port)) as server:
            server.sendall(struct.pack("!i", len(body) + 4) + body)
            answer = server.recv(4096)
    except (OSError, ValueError):  # a host or port that cannot be one, too
        return False
    turned_away = (f"\0C{state}\0".encode() for state in (CANNOT_CONNECT_NOW, TOO_MANY_CONNECTIONS))
    return bool(answer) and not any(state in answer for state in turned_away)


def _open_socket(host: str, port: int) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port), PING_TIMEOUT)
    server = socket.socket(socket.AF_UNIX)
    try:
        server.settimeout(PING_TIMEOUT)
        server.connect(f"{host}/.s.PGSQL.{port}")
    except OSError:
        server.close()
        raise
    return server
