"""Merge groups, one transaction each, and take merges back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.batch import keep_writers_out
from app.duplicates import journal
from app.duplicates.collisions import from_error
from app.duplicates.groups import find_groups
from app.duplicates.journal import Journal
from app.duplicates.merging import Merging, Outcome, Rules
from app.duplicates.parts import side_by_side
from app.duplicates.plan import LEAVE, Decisions, PlannedGroup
from app.duplicates.status import which_there_can_be
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
# While the server works for one thread, the other reads its answer and asks for the next.
AT_A_TIME = 2
# Groups that a thread merges in succession. Neighbours share pages of the indexes: with 100, each
# sixth group lost a race; with 1,000, one in 300.
IN_SUCCESSION = 1000


def merge_group(
    engine: Engine,
    tables: Tables,
    table: KeyedTable,
    group: PlannedGroup,
    rules: Rules,
    policy: RetryPolicy,
    decisions: Decisions | None = None,
    merged: Collection[Any] = (),
    waiting: bool = True,
) -> Outcome:
    """Merge rows into the one that is kept: mark them, fill its blanks, repoint their references.

    ``decisions`` are what a plan says of homonyms, also of those that come about by the merge.
    ``merged`` are duplicates that were merged before, which nothing is filled from again.

    Raises GroupChanged, AlreadyMerged where it would do nothing, HomonymsFound, RowsCollide and
    UnusablePlan; nothing is changed then, and nothing journalled. Nothing is ever deleted or set
    to NULL. One of many need not be waited for: see journal.settle().
    """

    def work(session: Session, unanswered: Outcome | None) -> Outcome:
        connection = keep_out(session, tables, table, policy)
        if unanswered is not None and journal.has(connection, table, unanswered.id):
            return unanswered
        writer = Journal(connection, table)
        outcome = Outcome(0, table.name, group.kept, group.duplicates)
        decided = decisions or Decisions([group])
        merging = Merging(connection, tables, writer, rules, decided, outcome)
        kept, rows = merging.lock(table, group.kept, group.duplicates)
        outcome.id = writer.begin(journal.MERGE, table, group.kept, group.duplicates)
        merging.mark(table, kept, rows)
        # What a person has blanked since stays blank.
        chosen = group.fill and {name: id for name, id in group.fill.items() if id not in merged}
        merging.fill(table, kept, [row for row in rows if row.id not in merged], chosen)
        merging.repoint(table, kept, rows)
        if not writer.step and _were_merged(connection, table, outcome):
            raise AlreadyMerged(f"the duplicates of {table.name} {group.kept} are merged already")
        return outcome

    try:
        return run(engine, work, policy, races(tables), beginning(tables, table, waiting))
    except IntegrityError as error:
        raise RowsCollide([from_error(error)]) from error


def _were_merged(connection: Connection, table: KeyedTable, outcome: Outcome) -> bool:
    """Tell whether the duplicates of a merge have been merged before it."""
    ids = outcome.duplicates
    return len(journal.merged_among(connection, table, ids, but=outcome.id)) == len(ids)


@dataclass(frozen=True)
class Left:
    """A group that was left as it was, and why."""

    group: PlannedGroup
    error: RollcallError


class _Found(NamedTuple):
    """A group to merge, and those of its duplicates that were merged before."""

    group: PlannedGroup
    merged: Collection[Any]


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

    def work(found: _Found) -> Outcome | Left:
        return _merge_or_leave(engine, tables, table, *found, rules, policy)

    for _ in range(PASSES):
        merged = 0
        with engine.connect() as connection:
            which = which_there_can_be(connection, tables, table)
            groups = (
                _Found(PlannedGroup(group.table, group.kept, group.duplicates), group.merged)
                for group in find_groups(connection, tables, table, rules.keep, which=which)
            )
            wanted = (found for found in groups if found.group not in left)
            for outcome in side_by_side(work, wanted, IN_SUCCESSION, _threads(tables, table)):
                if isinstance(outcome, Left):
                    left.add(outcome.group)
                else:
                    merged += 1
                yield outcome
        if not merged:
            return
        journal.settle(engine, table, policy)


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
    decisions = Decisions(groups)

    def work(found: _Found) -> Outcome | Left:
        return _merge_or_leave(engine, tables, table, *found, rules, policy, decisions)

    with engine.connect() as connection:
        wanted = _planned(connection, table, decisions)
        for outcome in side_by_side(work, wanted, IN_SUCCESSION, _threads(tables, table)):
            if not (isinstance(outcome, Left) and isinstance(outcome.error, AlreadyMerged)):
                yield outcome
    journal.settle(engine, table, policy)


def _planned(connection: Connection, table: KeyedTable, decisions: Decisions) -> Iterator[_Found]:
    for group in decisions.groups:
        planned = group.without_renamed() if group.rename else group
        if planned and planned.table == table.name and planned.decision != LEAVE:
            yield _Found(planned, journal.merged_among(connection, table, planned.duplicates))


def _threads(tables: Tables, table: KeyedTable) -> int:
    """Return how many merges go on at a time: one, where each keeps all writers out."""
    return 1 if tables.children(table) else AT_A_TIME


def _merge_or_leave(
    engine: Engine,
    tables: Tables,
    table: KeyedTable,
    group: PlannedGroup,
    merged: Collection[Any],
    rules: Rules,
    policy: RetryPolicy,
    decisions: Decisions | None = None,
) -> Outcome | Left:
    try:
        return merge_group(
            engine, tables, table, group, rules, policy, decisions, merged, waiting=False
        )
    except (GroupChanged, HomonymsFound, RowsCollide, UnusablePlan) as error:
        return Left(group, error)


def races(tables: Tables) -> frozenset[str]:
    """Return the names of the indexes that somebody who creates a row can make us run into."""
    return frozenset().union(*(race_indexes(table.name) for table in tables.by_oid.values()))


def beginning(tables: Tables, table: KeyedTable, waiting: bool = False) -> str:
    """Return what a transaction on rows of a table begins with; keep_out() is to follow."""
    lock = "" if tables.children(table) else after_lists([table.table])
    return f"{journal.ONE_FORMAT}{'' if waiting else journal.NOT_WAITING}{lock}"


def keep_out(
    session: Session, tables: Tables, table: KeyedTable, policy: RetryPolicy
) -> Connection:
    """Keep other writers out where many rows may move, as a list does."""
    children = [child.model for child, _ in tables.children(table)]
    if children:
        keep_writers_out(session, policy, table.model, *children)
    return session.connection()
