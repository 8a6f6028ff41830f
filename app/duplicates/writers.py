"""Refuse writers that PostgreSQL cannot hold against others: those below SERIALIZABLE."""

from __future__ import annotations

import sys
from collections.abc import Callable

from sqlalchemy import Connection, Engine, text

from app.duplicates.tables import KeyedTable, quote
from app.errors import ContentionError, NotGuarded
from app.transactions import RetryPolicy, retry

NAME = "rollcall_refuse_unsafe_writers"

FUNCTION = """
CREATE OR REPLACE FUNCTION {schema}.{name}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF current_setting('transaction_isolation') <> 'serializable' THEN
    RAISE EXCEPTION 'rows of % are written at SERIALIZABLE until it is guarded', TG_TABLE_NAME
      USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = 'Write them through get_or_create, or BEGIN ISOLATION LEVEL SERIALIZABLE.';
  END IF;
  RETURN NULL;
END $$;
"""
# For the statement and not for each row: it costs nothing then. CREATE OR REPLACE takes the lock
# that CREATE does: a moment without writers.
TRIGGER = """
CREATE OR REPLACE TRIGGER {name} BEFORE INSERT OR UPDATE OF {columns} ON {table}
FOR EACH STATEMENT EXECUTE FUNCTION {schema}.{name}();
"""


# Whoever asks for a lock that is not to be had holds up all who come after, readers too.
LOCK_WAIT = 0.25  # seconds
PAUSE = 0.5


def refuse_unsafe_writers(engine: Engine, table: KeyedTable, lock_timeout: float) -> None:
    """Have inserts, and changes of the key, fail below SERIALIZABLE.

    Raises NotGuarded where somebody writes the table for longer than ``lock_timeout`` seconds.
    """
    columns = ", ".join(map(quote, table.key))
    names = {"schema": table.schema, "name": NAME, "table": table.table, "columns": columns}
    sql = (FUNCTION.replace("%", "%%") + TRIGGER).format(**names)
    _run(engine, table, lock_timeout, lambda connection: connection.exec_driver_sql(sql))


def admit_all_writers(engine: Engine, table: KeyedTable, lock_timeout: float) -> None:
    """Take that back. Raises what :func:`refuse_unsafe_writers` does."""

    def drop(connection: Connection) -> None:
        if _triggers(connection, table.oid):
            connection.exec_driver_sql(f"DROP TRIGGER {NAME} ON {table.table}")
        if not _triggers(connection):
            connection.exec_driver_sql(f"DROP FUNCTION IF EXISTS {table.schema}.{NAME}()")

    _run(engine, table, lock_timeout, drop)


def _triggers(connection: Connection, oid: int | None = None) -> int:
    """Return how many tables have the trigger, of this oid if one is given."""
    return connection.scalar(TRIGGERS, {"name": NAME, "oid": oid}) or 0


TRIGGERS = text("""
    SELECT count(*) FROM pg_trigger
     WHERE tgname = :name AND tgrelid = coalesce(CAST(:oid AS oid), tgrelid)
""")


def _run(
    engine: Engine, table: KeyedTable, seconds: float, work: Callable[[Connection], object]
) -> None:
    """Do the work in a transaction that waits for locks a moment only, until it gets them."""

    def attempt(number: int) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_WAIT}s'")
            work(connection)

    tries = RetryPolicy(attempts=sys.maxsize, deadline=seconds, wait_initial=PAUSE, wait_max=PAUSE)
    try:
        retry(attempt, tries)
    except ContentionError as error:
        raise NotGuarded(
            f"{table.name} is in use without a pause for {seconds:g} s: run it again"
        ) from error
