"""One bootstrap at a time, and who holds it up."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, text

from migrations_bootstrap.connection import connected
from migrations_bootstrap.errors import BootstrapError, LockTimeout

logger = logging.getLogger(__name__)

LOCK_KEY = int.from_bytes(b"rollcall", "big")
POLL_INTERVAL = 0.1

# set_config over pg_settings instead of SET LOCAL: transaction_timeout came with PostgreSQL 17.
NO_TIMEOUTS = text(
    "SELECT set_config(name, '0', :local) FROM pg_settings WHERE name IN"
    " ('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')"
)

TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(:key)")

# A bigint key is shown in two halves: manual, "pg_locks".
HOLDERS = text("""
    SELECT array_agg(pid) FROM pg_locks
     WHERE locktype = 'advisory' AND granted AND objsubid = 1
       AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND classid = CAST(:key AS bigint) >> 32 AND objid = CAST(:key AS bigint) & 4294967295
""")

BLOCKERS = text("SELECT pg_blocking_pids(:pid)")

SESSIONS = text("""
    SELECT string_agg(format('pid %s (%s, for %s s)', pid,
                             coalesce(nullif(application_name, ''), usename, backend_type),
                             round(extract(epoch FROM clock_timestamp() - xact_start))), ', ')
      FROM pg_stat_activity WHERE pid = ANY (:pids)
""")


@contextmanager
def bootstrap_lock(engine: Engine, timeout: float, key: int = LOCK_KEY) -> Iterator[None]:
    """Hold the one lock of the database over the body, which works on other connections.

    `key` names another lock, for work that has nothing to do with the database's own schema.

    The lock lives in a transaction that stays open and idle: that pins the server connection under
    PgBouncer in transaction mode, where a session lock is lost, and at READ COMMITTED an idle
    transaction holds no snapshot, so CREATE INDEX CONCURRENTLY in the body does not wait for it.
    Raises LockTimeout after `timeout` seconds.
    """
    with connected(engine) as connection:
        _acquire(connection, timeout, key)
        yield
        # A lock that was lost on the way is an error, not a silent success.
        connection.commit()


@dataclass
class Wait:
    """Who a statement waits for, in words; empty while it waits for nobody."""

    blockers: str = ""


@contextmanager
def watched(
    engine: Engine, connection: Connection, action: str, patience: float, wait: Wait
) -> Iterator[None]:
    """Look every `patience` seconds who holds up what the body does on `connection`.

    What is found first is logged and left in `wait`.
    """
    # Asked of the driver: a query would begin a transaction that is not ours to begin.
    driver_connection: Any = connection.connection.driver_connection
    pid, done = driver_connection.info.backend_pid, threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(engine, pid, action, patience, wait, done), daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _acquire(connection: Connection, timeout: float, key: int) -> None:
    deadline = time.monotonic() + timeout
    waiting = False
    while not _try_lock(connection, key):
        if time.monotonic() > deadline:
            holders = _sessions(connection, connection.scalar(HOLDERS, {"key": key}))
            raise LockTimeout(
                f"another bootstrap of this database is not done after {timeout:g} s: {holders}"
            )
        if not waiting:
            logger.info("bootstrap_waiting for another one to finish", extra={"timeout": timeout})
            waiting = True
        # No waiter may keep a snapshot that the holder's index build would wait for.
        connection.rollback()
        time.sleep(POLL_INTERVAL)


def _try_lock(connection: Connection, key: int) -> bool:
    connection.execute(NO_TIMEOUTS, {"local": True})
    return bool(connection.scalar(TRY_LOCK, {"key": key}))


def _watch(
    engine: Engine, pid: int, action: str, patience: float, wait: Wait, done: threading.Event
) -> None:
    while not wait.blockers and not done.wait(patience):
        with suppress(BootstrapError), connected(engine) as connection:
            wait.blockers = _sessions(connection, connection.scalar(BLOCKERS, {"pid": pid}))
    if wait.blockers:
        logger.info("bootstrap_blocked by %s: %s", wait.blockers, action)


def _sessions(connection: Connection, pids: list[int] | None) -> str:
    """Return, for a person, who the sessions are and how old their transactions."""
    return connection.scalar(SESSIONS, {"pids": pids}) or ""
