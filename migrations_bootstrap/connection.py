"""Connections of the bootstrap, and what a failing one means."""

import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, make_url
from sqlalchemy.exc import DBAPIError

from migrations_bootstrap.errors import AccessRefused, Blocked, BootstrapError, ServerUnreachable
from migrations_bootstrap.interruption import interruption

OLDEST_SERVER = 15
"""NULLS NOT DISTINCT, which the guard needs, came with PostgreSQL 15."""

APPLICATION_NAME = "rollcall-bootstrap"

DEADLOCK_DETECTED = "40P01"
INSUFFICIENT_PRIVILEGE = "42501"
LOCK_NOT_AVAILABLE = "55P03"

PROBE_TIMEOUT = 1.0
"""Seconds; libpq has waited its whole connect_timeout before a probe is sent."""

# Connection exceptions, insufficient resources (too many clients), operator intervention
# (starting up, shutting down): https://www.postgresql.org/docs/current/errcodes-appendix.html
NOT_NOW = ("08", "53", "57")

# Where libpq looks when neither the URL nor PGHOST names a host.
DEFAULT_HOSTS = "/var/run/postgresql,/tmp,localhost"


def postgres_url(url: str | URL) -> URL:
    """Return `url` as one for psycopg2, whichever PostgreSQL driver it names."""
    url = make_url(url)
    if url.get_backend_name() not in ("postgres", "postgresql"):
        raise BootstrapError(f"Rollcall needs PostgreSQL, not {url.get_backend_name()}")
    return url.set(drivername="postgresql+psycopg2")


def make_engine(
    url: str | URL, connect_timeout: int, *, isolation_level: str = "READ COMMITTED"
) -> Engine:
    """Return an engine that keeps no connection: what is closed is gone.

    The isolation level is always said, for a role or a database may default to another.
    """
    return create_engine(
        postgres_url(url),
        poolclass=NullPool,
        isolation_level=isolation_level,
        connect_args={
            "application_name": APPLICATION_NAME,
            "connect_timeout": connect_timeout,
            # The connection that holds the lock is silent for as long as an index build takes.
            "keepalives_idle": 30,
        },
    )


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """Yield a connection; what the driver raises leaves as a BootstrapError."""
    try:
        connection = engine.connect()
    except DBAPIError as error:
        raise connect_failure(engine, error) from error
    try:
        with connection, _interruptible(connection):
            _refuse_old_server(connection)
            yield connection
    except DBAPIError as error:
        raise statement_failure(engine, error) from error
    finally:
        engine.dispose()


def _interruptible(connection: Connection) -> AbstractContextManager[None]:
    wanted = interruption.get()
    return nullcontext() if wanted is None else wanted.of(connection)


def sqlstate(error: DBAPIError) -> str | None:
    """Return the SQLSTATE, None where the server sent none: at connect, or a lost connection."""
    state: str | None = getattr(error.orig, "pgcode", None)
    return state


def first_line(error: DBAPIError) -> str:
    """Return the first line of what the driver says; libpq puts no password there."""
    return re.sub(r"\s+", " ", str(error.orig).strip().partition("\n")[0])


def primary_message(error: DBAPIError) -> str:
    """Return the server's own message without detail, hint or position."""
    diagnostics = getattr(error.orig, "diag", None)
    return getattr(diagnostics, "message_primary", None) or first_line(error)


def connect_failure(engine: Engine, error: DBAPIError) -> BootstrapError:
    """Return what a failure to connect means; libpq gives no SQLSTATE, so the server is asked."""
    where = ", ".join(f"{host}:{port}" for host, port in addresses(engine))
    if not any(_accepts(engine, host, port) for host, port in addresses(engine)):
        return ServerUnreachable(f"no PostgreSQL server to use at {where}: {first_line(error)}")
    return AccessRefused(
        f"PostgreSQL at {where} refuses database {engine.url.database!r}"
        f" to role {engine.url.username!r}: {first_line(error)}"
    )


def statement_failure(engine: Engine, error: DBAPIError) -> BootstrapError:
    """Return what a statement that failed means."""
    state = sqlstate(error)
    line = f"database {engine.url.database!r}: {primary_message(error)}"
    if state is None:
        return ServerUnreachable(f"{line} (the connection was lost)")
    if state == INSUFFICIENT_PRIVILEGE:
        return AccessRefused(f"{line} (role {engine.url.username!r}, SQLSTATE {state})")
    if state in (LOCK_NOT_AVAILABLE, DEADLOCK_DETECTED):
        return Blocked(f"{line} (SQLSTATE {state})")
    return BootstrapError(f"{line} (SQLSTATE {state})")


def addresses(engine: Engine) -> list[tuple[str, str]]:
    """Return the (host, port) pairs that libpq tries for this engine, in its order."""
    _, options = engine.dialect.create_connect_args(engine.url)
    named = options.get("hostaddr") or options.get("host") or os.environ.get("PGHOST")
    hosts = str(named or DEFAULT_HOSTS).split(",")
    given = str(options.get("port") or os.environ.get("PGPORT") or "").split(",")
    ports = [port or "5432" for port in given]
    # SQLAlchemy lets through one port for each host, or none.
    return list(zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=False))


def first_answer(host: str, port: str, user: str) -> str | None:
    """Knock as a client does and return the SQLSTATE that the server answers with.

    It is "" where the server lets us in or asks who we are, None where no PostgreSQL answers
    in time. Frontend/backend protocol, "Message Formats": StartupMessage, ErrorResponse.
    """
    parameters = b"user\0" + user.encode() + b"\0\0"
    try:
        with _open_socket(host, int(port)) as connection, connection.makefile("rb") as answer:
            connection.sendall(struct.pack("!ii", 8 + len(parameters), 196608) + parameters)
            kind, body = answer.read(1), answer.read(4)
            if kind == b"R":
                return ""
            return _error_code(answer.read(struct.unpack("!i", body)[0])) if kind == b"E" else None
    except (OSError, ValueError, struct.error):
        return None


def _refuse_old_server(connection: Connection) -> None:
    version = connection.dialect.server_version_info or ()
    if version < (OLDEST_SERVER,):
        found = ".".join(map(str, version))
        raise BootstrapError(f"PostgreSQL {OLDEST_SERVER} or newer is needed, this is {found}")


def _accepts(engine: Engine, host: str, port: str) -> bool:
    answer = first_answer(host, port, engine.url.username or "postgres")
    return answer is not None and not answer.startswith(NOT_NOW)


def _open_socket(host: str, port: int) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port), PROBE_TIMEOUT)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PROBE_TIMEOUT)
    try:
        connection.connect(f"{host}/.s.PGSQL.{port}")
    except OSError:
        connection.close()
        raise
    return connection


def _error_code(body: bytes) -> str:
    fields = (field.decode("ascii", "replace") for field in body.split(b"\0"))
    return next((field[1:] for field in fields if field.startswith("C")), "")
