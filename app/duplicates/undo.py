"""Take what the journal says back: every row as it was, or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.orm import Session

from app.duplicates import journal
from app.duplicates.collisions import from_error
from app.duplicates.journal import Entry
from app.duplicates.tables import KeyedTable, quote
from app.errors import CannotUndo, UnknownMerge
from app.transactions import RetryPolicy, run


class Step(NamedTuple):
    """Some rows of a table of which the same columns were changed."""

    number: int
    table: str  # as SQL
    identity: Sequence[str]  # empty where rows are written down as a whole
    columns: Sequence[str]


def undo(
    engine: Engine,
    table: KeyedTable,
    entry: int,
    policy: RetryPolicy,
    action: str = journal.MERGE,
) -> int:
    """Restore every row that a merge changed; return how many they are.

    ``table`` is any that the journal is beside. Raises UnknownMerge, and CannotUndo, which says
    what has changed since; nothing is changed then. The guard's marks are taken off as a whole:
    unguard() undoes entries of that ``action``.
    """

    def work(session: Session, unanswered: int | None) -> int:
        connection = session.connection()
        found = _lock(connection, table, entry)
        if unanswered is not None and found.undone_at is not None:
            return unanswered
        _require_undoable(found, action)
        steps = _steps(connection, table, entry)
        _require_latest(connection, table, entry)
        restored = sum(_restore(connection, table, entry, step) for step in steps)
        connection.exec_driver_sql(
            f"UPDATE {table.journal}.rollcall_merge SET undone_at = clock_timestamp(),"
            " undone_by = session_user WHERE id = %(entry)s",
            {"entry": entry},
        )
        return restored

    try:
        return run(engine, work, policy, beginning=journal.ONE_FORMAT)
    except IntegrityError as error:
        refusal = from_error(error)
        raise CannotUndo(
            entry, f"{refusal.table} has a rule against it: {refusal.reason}"
        ) from error
    except ProgrammingError as error:
        raise CannotUndo(entry, f"its tables are not what they were: {error.orig}") from error


def _lock(connection: Connection, table: KeyedTable, entry: int) -> Entry:
    found = journal.entries(connection, table, "id = %(entry)s", {"entry": entry}, lock=True)
    if not found:
        raise UnknownMerge(entry)
    return found[0]


def _require_undoable(entry: Entry, action: str) -> None:
    if entry.action not in (action, journal.PURGE):
        raise UnknownMerge(entry.id)
    if entry.undone_at is not None:
        raise CannotUndo(entry.id, "it was undone already")
    if entry.purged_at is not None or entry.action == journal.PURGE:
        raise CannotUndo(entry.id, "its rows were purged")


def _steps(connection: Connection, table: KeyedTable, entry: int) -> list[Step]:
    """Return the steps of an entry, the last first."""
    rows = connection.exec_driver_sql(
        "SELECT DISTINCT ON (step) step, table_name,"
        " array(SELECT jsonb_object_keys(row_key) WHERE row_key IS NOT NULL),"
        " array(SELECT a.key FROM jsonb_each(after) AS a"
        "        WHERE row_key IS NOT NULL OR a.value <> before -> a.key)"
        f" FROM {table.journal}.rollcall_change WHERE merge_id = %(entry)s ORDER BY step DESC",
        {"entry": entry},
    )
    return [Step(*row) for row in rows]


def _require_latest(connection: Connection, table: KeyedTable, entry: int) -> None:
    """Refuse to take off marks that a later merge found in place and relies on."""
    later = connection.exec_driver_sql(
        "SELECT DISTINCT e.id, e.table_name, c.table_name"
        f" FROM {table.journal}.rollcall_change AS c, jsonb_each(c.row_key) AS k,"
        f" jsonb_each(c.after) AS a, {table.journal}.rollcall_merge AS e"
        " WHERE c.merge_id = %(entry)s AND e.id > c.merge_id AND e.undone_at IS NULL"
        f" AND e.action = '{journal.MERGE}' AND e.duplicates @> jsonb_build_array(k.value)"
        " AND e.kept = a.value ORDER BY e.id DESC",
        {"entry": entry},
    )
    for id, name, changed in later:
        if changed.endswith(f".{quote(name)}"):
            raise CannotUndo(entry, f"merge {id} relies on it: undo that first")


def _restore(connection: Connection, table: KeyedTable, entry: int, step: Step) -> int:
    if not step.identity:
        return _restore_whole_rows(connection, table, entry, step)
    parameters = {"entry": entry, "step": step.number}
    changed = connection.exec_driver_sql(_changed_sql(table, step), parameters).scalars().all()
    if changed:
        rows = ", ".join(map(str, changed[:10]))
        raise CannotUndo(entry, f"rows of {step.table} have been changed since: {rows}")
    return int(connection.exec_driver_sql(_restore_sql(table, step), parameters).rowcount)


def _changes(table: KeyedTable, step: Step) -> str:
    """Return the changes of a step, each with its row as it was and as it was left, as SQL."""
    return (
        f"{table.journal}.rollcall_change AS c,"
        f" jsonb_populate_record(NULL::{step.table}, c.row_key) AS k,"
        f" jsonb_populate_record(NULL::{step.table}, c.before) AS b,"
        f" jsonb_populate_record(NULL::{step.table}, c.after) AS a"
    )


def _of(step: Step) -> str:
    return "c.merge_id = %(entry)s AND c.step = %(step)s"


def _is_row(step: Step) -> str:
    return " AND ".join(f"t.{quote(name)} = k.{quote(name)}" for name in step.identity)


def _changed_sql(table: KeyedTable, step: Step) -> str:
    """Return a query of the rows that are not as they were left.

    They are compared as JSON, for not every type can be compared.
    """
    left, now = (
        f"jsonb_build_array({', '.join(f'{row}.{quote(name)}' for name in step.columns)})"
        for row in "at"
    )
    return f"""
SELECT c.row_key FROM {_changes(table, step)}
 WHERE {_of(step)} AND NOT EXISTS (
       SELECT FROM {step.table} AS t WHERE {_is_row(step)} AND {left} = {now})
 ORDER BY c.number"""


def _restore_sql(table: KeyedTable, step: Step) -> str:
    assignments = ", ".join(f"{quote(name)} = b.{quote(name)}" for name in step.columns)
    return f"""
UPDATE {step.table} AS t SET {assignments} FROM {_changes(table, step)}
 WHERE {_of(step)} AND {_is_row(step)}"""


def _restore_whole_rows(connection: Connection, table: KeyedTable, entry: int, step: Step) -> int:
    """Restore rows that nothing tells apart, one by one: of rows that are alike any will do."""
    rows = connection.exec_driver_sql(
        f"SELECT number FROM {table.journal}.rollcall_change AS c"
        f" WHERE {_of(step)} ORDER BY number",
        {"entry": entry, "step": step.number},
    ).scalars()
    numbers = list(rows)
    for number in numbers:
        result = connection.exec_driver_sql(
            _restore_whole_sql(table, step), {"entry": entry, "step": step.number, "row": number}
        )
        if not result.rowcount:
            raise CannotUndo(entry, f"a row of {step.table} has been changed since")
    return len(numbers)


def _restore_whole_sql(table: KeyedTable, step: Step) -> str:
    assignments = ", ".join(f"{quote(name)} = b.{quote(name)}" for name in step.columns)
    return f"""
UPDATE {step.table} AS t SET {assignments}
  FROM {table.journal}.rollcall_change AS c,
       jsonb_populate_record(NULL::{step.table}, c.before) AS b
 WHERE {_of(step)} AND c.number = %(row)s
   AND (t.tableoid, t.ctid) = (
       SELECT o.tableoid, o.ctid FROM {step.table} AS o
        WHERE to_jsonb(o) = to_jsonb(jsonb_populate_record(o, c.after)) LIMIT 1)"""
