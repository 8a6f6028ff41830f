"""Where a table stands on its way out of duplicates, and who may still make new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from app.duplicates import journal
from app.duplicates.groups import Which, find_groups
from app.duplicates.tables import KeyedTable, Tables, as_value, quote
from app.natural_key import columns_of
from migrations_bootstrap import guard_name

ADOPTED, GUARDED, MERGED, CLEAN = "adopted", "guarded", "merged", "clean"


@dataclass(frozen=True)
class Writer:
    """A session that writes a table, and is not seen to be at SERIALIZABLE."""

    pid: int
    application: str
    role: str
    seconds: float  # since its transaction began


@dataclass(frozen=True)
class Status:
    """A table's rung: adopted, guarded, merged (no duplicate waits for it), clean (none is left).

    ``unmarked`` are rows that no mark tells from canonical ones; a guard lets none be. The writers
    are of interest until there is one.
    """

    table: str
    rung: str
    guard: str  # "valid", "invalid" (a build that failed) or "none"
    rows: int
    unmarked: int
    marked: int  # rows that point at their canonical row
    waiting: int  # those of them that are not merged
    merges: int  # that could be undone
    written_by_others: int  # rows since the adoption that no get_or_create made
    last_written_by_others: datetime | None
    unsafe_writers: Sequence[Writer]


def status(connection: Connection, tables: Tables, table: KeyedTable) -> Status:
    """Look at a table; it counts its rows, and without a guard its duplicates too."""
    guard = guard_state(connection, table)
    counts = _counts(connection, table)
    unmarked = 0 if guard == "valid" else _unmarked(connection, tables, table)
    waiting = _waiting(connection, table)
    merges = _merges(connection, table)
    return Status(
        table=table.name,
        rung=_rung(guard, unmarked, counts["marked"], waiting),
        guard=guard,
        unmarked=unmarked,
        waiting=waiting,
        merges=merges,
        unsafe_writers=() if guard == "valid" else _unsafe_writers(connection, table),
        **counts,
    )


def _rung(guard: str, unmarked: int, marked: int, waiting: int) -> str:
    if guard != "valid" or unmarked:
        return ADOPTED
    if waiting:
        return GUARDED
    return MERGED if marked else CLEAN


GUARD_IS_VALID = text("""
    SELECT i.indisvalid AND i.indisready FROM pg_index AS i WHERE i.indexrelid = to_regclass(:name)
""")


def guard_state(connection: Connection, table: KeyedTable) -> str:
    """Return "valid", "invalid" (what a build that failed has left), or "none"."""
    name = as_value(f"{table.schema}.{quote(guard_name(table.name))}")
    valid = connection.scalar(GUARD_IS_VALID, {"name": name})
    return {None: "none", False: "invalid", True: "valid"}[valid]


def which_there_can_be(connection: Connection, tables: Tables, table: KeyedTable) -> Which:
    """Return which duplicates to look for: where guards stand each is marked, and quickly found.

    The guards of the tables that the key refers to count too, whose duplicates make others here.
    """
    states = {guard_state(connection, one) for one in tables.in_order(table)}
    return "marked" if states == {"valid"} else "all"


def _counts(connection: Connection, table: KeyedTable) -> dict[str, Any]:
    """Count rows. One that nobody's get_or_create made has no token, and a time of its own.

    Rows older than the adoption have no time, where the adoption brought that column.
    """
    columns = columns_of(table.model)
    token = quote(columns["creation_token"].name)
    time = quote(columns["created_at"].name) if "created_at" in columns else None
    others = f"t.{token} IS NULL AND t.{time} IS NOT NULL" if time else "false"
    sql = (
        f"SELECT count(*) AS rows, count({quote(table.mark)}) AS marked,"
        f" count(*) FILTER (WHERE {others}) AS written_by_others,"
        f" max({time or 'NULL::timestamptz'}) FILTER (WHERE {others}) AS last_written_by_others"
        f" FROM {table.table} AS t"
    )
    return dict(connection.exec_driver_sql(sql).mappings().one())


def _unmarked(connection: Connection, tables: Tables, table: KeyedTable) -> int:
    groups = find_groups(connection, tables, table, which="unmarked")
    return sum(len(group.duplicates) for group in groups)


def _waiting(connection: Connection, table: KeyedTable) -> int:
    sql = f"SELECT count(*) FROM {table.table} AS t WHERE {quote(table.mark)} IS NOT NULL"
    if journal.exists(connection, table):
        merged = f"SELECT FROM ({journal.merged_ids(table)}) AS merged WHERE merged.id"
        sql += f" AND NOT EXISTS ({merged} = t.{quote(table.id)})"
    return int(connection.exec_driver_sql(sql, {"table": table.name}).scalar_one())


def _merges(connection: Connection, table: KeyedTable) -> int:
    if not journal.exists(connection, table):
        return 0
    sql = (
        f"SELECT count(*) FROM {table.journal}.rollcall_merge WHERE action = '{journal.MERGE}'"
        " AND table_name = %(table)s AND undone_at IS NULL AND purged_at IS NULL"
    )
    return int(connection.exec_driver_sql(sql, {"table": table.name}).scalar_one())


# PostgreSQL shows nobody another session's isolation level. But who has written in a serializable
# transaction has mostly read in it as well, and keeps predicate locks for that.
UNSAFE_WRITERS = text("""
    SELECT a.pid, a.application_name, a.usename,
           extract(epoch FROM clock_timestamp() - a.xact_start)::float
      FROM pg_stat_activity AS a
     WHERE a.pid <> pg_backend_pid()
       AND EXISTS (SELECT FROM pg_locks AS l
                    WHERE l.pid = a.pid AND l.granted AND l.locktype = 'relation'
                      AND l.mode = 'RowExclusiveLock' AND l.relation = :oid
                      AND l.database = (SELECT oid FROM pg_database
                                         WHERE datname = current_database()))
       AND NOT EXISTS (SELECT FROM pg_locks AS l WHERE l.pid = a.pid AND l.mode = 'SIReadLock')
     ORDER BY a.xact_start
""")


def _unsafe_writers(connection: Connection, table: KeyedTable) -> list[Writer]:
    return [Writer(*row) for row in connection.execute(UNSAFE_WRITERS, {"oid": table.oid})]
