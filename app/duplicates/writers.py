"""Refuse writers that PostgreSQL cannot hold against others: those below SERIALIZABLE."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, text

from app.duplicates.tables import KeyedTable, quote

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


def refuse_unsafe_writers(engine: Engine, table: KeyedTable, lock_timeout: float) -> None:
    """Have inserts, and changes of the key, fail below SERIALIZABLE."""
    columns = ", ".join(map(quote, table.key))
    names = {"schema": table.schema, "name": NAME, "table": table.table, "columns": columns}
    with engine.begin() as connection:
        _wait_at_most(connection, lock_timeout)
        connection.exec_driver_sql((FUNCTION.replace("%", "%%") + TRIGGER).format(**names))


def admit_all_writers(engine: Engine, table: KeyedTable, lock_timeout: float) -> None:
    """Take that back."""
    with engine.begin() as connection:
        _wait_at_most(connection, lock_timeout)
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {NAME} ON {table.table}")
        if not connection.scalar(
            text("SELECT EXISTS (SELECT FROM pg_trigger WHERE tgname = :name)"), {"name": NAME}
        ):
            connection.exec_driver_sql(f"DROP FUNCTION IF EXISTS {table.schema}.{NAME}()")


def _wait_at_most(connection: Connection, seconds: float) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{seconds}s'")
