"""Merge groups, one transaction each, and take merges back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.batch import keep_writers_out
from app.duplicates import journal
from app.duplicates.collisions import from_error
from app.duplicates.groups import find_groups
from app.duplicates.journal import Journal
from app.duplicates.merging import Merging, Outcome, Rules
from app.duplicates.plan import LEAVE, Decisions, PlannedGroup
from app.duplicates.tables import KeyedTable, Tables
from app.errors import (
    AlreadyMerged,
    GroupChanged,
    HomonymsFound,
    RollcallError,
    RowsCollide,
    UnusablePlan,
)
from app.get_or_create import race_indexes
from app.transactions import RetryPolicy, after_lists, run

# Rows may come to refer to a duplicate while the rest is being merged.
PASSES = 3


def merge_group(
    engine: Engine,
    tables: Tables,
    table: KeyedTable,
    group: PlannedGroup,
    rules: Rules,
    policy: RetryPolicy,
) -> Outcome:
    """Merge rows into the one that is kept: mark them, fill its blanks, repoint their references.

    Raises GroupChanged, AlreadyMerged where it would do nothing, HomonymsFound, RowsCollide and
    UnusablePlan; nothing is changed then, and nothing journalled. Nothing is ever deleted or set
    to NULL.
    """

    def work(session: Session, unanswered: Outcome | None) -> Outcome:
        connection = keep_out(session, tables, table, policy)
        if unanswered is not None and journal.has(connection, table, unanswered.id):
            return unanswered
        already = journal.merged_among(connection, table, group.duplicates)
        writer = Journal(connection, table)
        entry = writer.begin(journal.MERGE, table, group.kept, group.duplicates)
        outcome = Outcome(entry, table.name, group.kept, group.duplicates)
        merging = Merging(connection, tables, writer, rules, outcome)
        kept, rows = merging.lock(table, group.kept, group.duplicates)
        merging.mark(table, kept, rows)
        # What a person has blanked since stays blank.
        chosen = group.fill and {name: id for name, id in group.fill.items() if id not in already}
        merging.fill(table, kept, [row for row in rows if row.id not in already], chosen)
        merging.repoint(table, kept, rows)
        if not writer.step and already.issuperset(group.duplicates):
            raise AlreadyMerged(f"the duplicates of {table.name} {group.kept} are merged already")
        return outcome

    try:
        return run(engine, work, policy, races(tables), beginning(tables, table))
    except IntegrityError as error:
        raise RowsCollide([from_error(error)]) from error


@dataclass(frozen=True)
class Left:
    """A group that was left as it was, and why."""

    group: PlannedGroup
    error: RollcallError


def merge_all(
    engine: Engine,
    tables: Tables,
    table: KeyedTable,
    rules: Rules,
    policy: RetryPolicy,
) -> Iterator[Outcome | Left]:
    """Merge every group of a table, and again what has come to refer to merged rows meanwhile.

    Yields what became of each group. It may be interrupted and run again.
    """
    left: set[PlannedGroup] = set()
    for _ in range(PASSES):
        merged = 0
        with engine.connect() as connection:
            for group in find_groups(connection, tables, table, rules.keep):
                planned = PlannedGroup(group.table, group.kept, group.duplicates)
                if planned not in left:
                    outcome = _merge_or_leave(engine, tables, table, planned, rules, policy)
                    if isinstance(outcome, Left):
                        left.add(planned)
                    else:
                        merged += 1
                    yield outcome
        if not merged:
            return


def merge_planned(
    engine: Engine,
    tables: Tables,
    table: KeyedTable,
    groups: Iterable[PlannedGroup],
    rules: Rules,
    policy: RetryPolicy,
) -> Iterator[Outcome | Left]:
    """Merge the groups of a reviewed plan that are of this table, save those that it leaves.

    Rows that the plan gives another key are left out: the guard gives it to them. What is merged
    already is passed over, so that a plan can be followed again from the start.
    """
    plan = list(groups)
    decided = replace(rules, decisions=Decisions(plan))
    for group in plan:
        planned = group.without_renamed() if group.rename else group
        if planned and planned.table == table.name and planned.decision != LEAVE:
            outcome = _merge_or_leave(engine, tables, table, planned, decided, policy)
            if not (isinstance(outcome, Left) and isinstance(outcome.error, AlreadyMerged)):
                yield outcome


def _merge_or_leave(
    engine: Engine,
    tables: Tables,
    table: KeyedTable,
    group: PlannedGroup,
    rules: Rules,
    policy: RetryPolicy,
) -> Outcome | Left:
    try:
        return merge_group(engine, tables, table, group, rules, policy)
    except (GroupChanged, HomonymsFound, RowsCollide, UnusablePlan) as error:
        return Left(group, error)


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
