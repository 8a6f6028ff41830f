"""Delete merged rows for good: the one step that nothing takes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.duplicates import journal
from app.duplicates.collisions import from_error
from app.duplicates.journal import Entry, Journal
from app.duplicates.merge import beginning, keep_out, races
from app.duplicates.merging import Merging, Outcome, Rules
from app.duplicates.plan import Decisions
from app.duplicates.rows import lock_rows
from app.duplicates.tables import KeyedTable, Tables
from app.errors import GroupChanged, HomonymsFound, RowsCollide
from app.transactions import RetryPolicy, run


@dataclass
class Purged:
    """What became of the duplicates of one merge."""

    merge: int
    deleted: int = 0
    repointed: int = 0  # rows that had come to refer to them since
    kept_back: list[str] = field(default_factory=list)  # why, where they are not deleted


def old_merges(connection: Connection, table: KeyedTable, older_than: timedelta) -> list[Entry]:
    """Return the merges of a table that may be purged, the oldest first."""
    found = journal.entries(
        connection,
        table,
        f"action = '{journal.MERGE}' AND table_name = %(table)s AND undone_at IS NULL"
        " AND purged_at IS NULL AND made_at <= clock_timestamp() - %(age)s",
        {"table": table.name, "age": older_than},
    )
    return found[::-1]


def purge_merge(
    engine: Engine,
    tables: Tables,
    table: KeyedTable,
    merge: Entry,
    rules: Rules,
    policy: RetryPolicy,
) -> Purged:
    """Delete the duplicates of a merge, which cannot be undone any more after that.

    Whatever has come to refer to them since is repointed first; where that cannot be, and where
    the rows are no duplicates of that row any more, they are kept back. No ON DELETE ever fires.
    """

    def work(session: Session, unanswered: Purged | None) -> Purged:
        connection = keep_out(session, tables, table, policy)
        (found,) = journal.entries(connection, table, "id = %(id)s", {"id": merge.id}, lock=True)
        if unanswered is not None and found.purged_at is not None:
            return unanswered
        if found.undone_at is not None or found.purged_at is not None:
            raise GroupChanged("somebody else undid or purged it meanwhile")
        return _purge(connection, tables, table, found, rules)

    try:
        return run(engine, work, policy, races(tables), beginning(tables, table))
    except (GroupChanged, HomonymsFound, RowsCollide) as error:
        return Purged(merge.id, kept_back=[str(error)])
    except IntegrityError as error:
        return Purged(merge.id, kept_back=[from_error(error).reason])


def _purge(
    connection: Connection, tables: Tables, table: KeyedTable, merge: Entry, rules: Rules
) -> Purged:
    there = lock_rows(connection, tables, table, merge.duplicates)
    roots = {row.mark for row in there.values()}
    if None in roots:
        raise GroupChanged("a row of it is no duplicate any more")
    writer = Journal(connection, table)
    entry = writer.begin(journal.PURGE, table, merge.kept, merge.duplicates)
    outcome = Outcome(entry, table.name, merge.kept, tuple(merge.duplicates))
    merging = Merging(connection, tables, writer, rules, Decisions(), outcome)
    for root in roots:
        ids = [row.id for row in there.values() if row.mark == root]
        merging.repoint(table, *merging.lock(table, root, ids))
    merging.require_unreferred(table, list(there))
    deleted = writer.delete(table, list(there))
    connection.exec_driver_sql(
        f"UPDATE {table.journal}.rollcall_merge SET purged_at = clock_timestamp()"
        " WHERE id = %(id)s",
        {"id": merge.id},
    )
    return Purged(merge.id, deleted, sum(outcome.repointed.values()))
