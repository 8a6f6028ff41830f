"""Merge groups, one transaction each, and take merges back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.batch import keep_writers_out
from app.duplicates import journal
from app.duplicates.collisions import from_error
from app.duplicates.journal import Journal
from app.duplicates.merging import Merging, Outcome, Rules
from app.duplicates.tables import KeyedTable, Tables
from app.errors import RowsCollide
from app.get_or_create import race_indexes
from app.transactions import RetryPolicy, after_lists, run


def merge_group(
    engine: Engine,
    tables: Tables,
    table: KeyedTable,
    kept: Any,
    duplicates: Sequence[Any],
    rules: Rules,
    policy: RetryPolicy,
) -> Outcome:
    """Merge rows into the one that is kept: mark them, fill its blanks, repoint their references.

    Raises GroupChanged, HomonymsFound and RowsCollide; nothing is changed then. Nothing is ever
    deleted or set to NULL.
    """

    def work(session: Session, unanswered: Outcome | None) -> Outcome:
        connection = keep_out(session, tables, table, policy)
        if unanswered is not None and journal.has(connection, table, unanswered.id):
            return unanswered
        writer = Journal(connection, table)
        merging = Merging(connection, tables, writer, rules)
        row, rows = merging.lock(table, kept, duplicates)
        already = journal.merged_among(connection, table, duplicates)
        entry = writer.begin(journal.MERGE, table, kept, duplicates)
        merging.outcome = Outcome(entry, table.name, kept, tuple(duplicates))
        merging.mark(table, row, rows)
        merging.fill(table, row, [one for one in rows if one.id not in already])
        merging.repoint(table, row, rows)
        return merging.outcome

    try:
        return run(engine, work, policy, races(tables), beginning(tables, table))
    except IntegrityError as error:
        raise RowsCollide([from_error(error)]) from error


def races(tables: Tables) -> frozenset[str]:
    """Return the names of the indexes that somebody who creates a row can make us run into."""
    return frozenset().union(*(race_indexes(table.name) for table in tables.by_oid.values()))


def beginning(tables: Tables, table: KeyedTable) -> str:
    """Return what a transaction on rows of a table begins with."""
    if tables.children(table):
        return journal.ONE_TIME_ZONE  # and then keep_out()
    return journal.ONE_TIME_ZONE + after_lists([table.table])


def keep_out(
    session: Session, tables: Tables, table: KeyedTable, policy: RetryPolicy
) -> Connection:
    """Keep other writers out where many rows may move, as a list does."""
    children = [child.model for child, _ in tables.children(table)]
    if children:
        keep_writers_out(session, policy, table.model, *children)
    return session.connection()
