"""Mark duplicates and normalise stored keys, a few rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.duplicates import journal
from app.duplicates.groups import AT_ONCE, Group, find_groups
from app.duplicates.journal import Change, Journal
from app.duplicates.merge import beginning, keep_out, races
from app.duplicates.merging import Merging, Outcome, Rules
from app.duplicates.plan import Decisions
from app.duplicates.rows import lock_rows
from app.duplicates.tables import KeyedTable, Tables, quote
from app.errors import GroupChanged
from app.transactions import RetryPolicy, run

Item = TypeVar("Item")
Result = TypeVar("Result")

# More than some 32 predicate locks on a table become one on all of it, which every writer meets.
GROUPS_AT_ONCE = 8
ROWS_AT_ONCE = 16


class Marker:
    """Marks the duplicates of one table."""

    def __init__(
        self,
        engine: Engine,
        tables: Tables,
        table: KeyedTable,
        rules: Rules,
        policy: RetryPolicy,
        decisions: Decisions,
    ) -> None:
        self.engine = engine
        self.tables = tables
        self.table = table
        self.rules = replace(rules, decisions=decisions)
        self.policy = policy
        self.decisions = decisions
        self.moved: Counter[str] = Counter()  # rows of other tables that came along
        self.collapsed: Counter[str] = Counter()  # those of them that are duplicates for it

    def mark_all(self, tell: Callable[[int], object]) -> int:
        """Mark the duplicates that are there now; return how many they were."""
        # Where rows of other tables move along, each group is work enough.
        at_once = 1 if self.tables.children(self.table) else GROUPS_AT_ONCE
        marked = 0
        with self.engine.connect() as connection:
            groups = find_groups(
                connection, self.tables, self.table, self.rules.keep, which="unmarked"
            )
            for some in in_parts(map(self.decisions.apply, groups), at_once):
                marked += self._mark_if_unchanged(some)
                tell(marked)
        return marked

    def _mark_if_unchanged(self, groups: Sequence[Group]) -> int:
        """Mark groups; one whose rows have changed meanwhile is left for the next look."""
        try:
            return self._mark(groups)
        except GroupChanged:
            if len(groups) == 1:
                return 0
            return sum(self._mark_if_unchanged([group]) for group in groups)

    def _mark(self, groups: Sequence[Group]) -> int:
        duplicates = [id for group in groups for id in group.duplicates]

        def work(session: Session, unanswered: Outcome | None) -> Outcome:
            connection = keep_out(session, self.tables, self.table, self.policy)
            writer = Journal(connection, self.table)
            if unanswered is not None and journal.has(connection, self.table, unanswered.id):
                return unanswered
            entry = writer.begin(journal.MARK, self.table, None, duplicates)
            outcome = Outcome(entry, self.table.name, None, tuple(duplicates))
            for group in groups:
                merging = Merging(connection, self.tables, writer, self.rules, outcome)
                self._mark_group(merging, group)
            return outcome

        outcome = self._run(work)
        self.moved += outcome.repointed
        self.collapsed += outcome.collapsed
        return len(duplicates)

    def _mark_group(self, merging: Merging, group: Group) -> None:
        kept, rows = merging.lock(self.table, group.kept, group.duplicates)
        merging.mark(self.table, kept, rows)
        merging.settle_children(self.table, group.kept, group.duplicates)

    def normalise_all(self, tell: Callable[[int], object]) -> int:
        """Store the keys of canonical rows as new ones are stored; return how many changed."""
        normalised = 0
        with self.engine.connect() as connection:
            rows = connection.exec_driver_sql(
                self._unnormalised_sql(), {}, execution_options={"yield_per": AT_ONCE}
            )
            for some in in_parts((id for (id,) in rows), ROWS_AT_ONCE):
                normalised += self._normalise_if_free(some)
                tell(normalised)
        return normalised

    def _unnormalised_sql(self) -> str:
        table = self.table
        stored = ", ".join(f"t.{quote(name)}" for name in table.key)
        wanted = ", ".join(self.tables.key(table, name) for name in table.key)
        return (
            f"SELECT to_jsonb(t.{quote(table.id)}) FROM {table.table} AS t"
            f" WHERE t.{quote(table.mark)} IS NULL AND ROW({stored}) IS DISTINCT FROM ROW({wanted})"
        )

    def _normalise_if_free(self, ids: Sequence[Any]) -> int:
        """Normalise rows; one whose key has been taken meanwhile is left for the next look."""
        try:
            return self.rekey(dict.fromkeys(ids))
        except IntegrityError:
            if len(ids) == 1:
                return 0
            return sum(self._normalise_if_free([id]) for id in ids)

    def rekey(self, rows: Mapping[Any, Mapping[str, Any] | None]) -> int:
        """Give rows another key, by id, or the one they have in its normal form.

        Returns how many had another one. Rows that are gone, or duplicates, stay as they are.
        """

        def work(session: Session, unanswered: int | None) -> int:
            connection = session.connection()
            changes = self._new_keys(connection, rows)
            if changes:
                writer = Journal(connection, self.table)
                writer.begin(journal.MARK, self.table, None, [])
                writer.change(self.table.table, changes)
            return len(changes) if unanswered is None else unanswered

        return self._run(work)

    def _new_keys(
        self, connection: Connection, rows: Mapping[Any, Mapping[str, Any] | None]
    ) -> list[Change]:
        table = self.table
        changes = []
        for id, row in lock_rows(connection, self.tables, table, list(rows)).items():
            before = {name: row.stored[name] for name in table.key}
            after = {**dict(zip(table.key, row.key, strict=True)), **(rows[id] or {})}
            if row.mark is None and before != after:
                changes.append(Change({table.id: id}, before, after))
        return changes

    def _run(self, work: Callable[[Session, Result | None], Result]) -> Result:
        return run(
            self.engine,
            work,
            self.policy,
            races(self.tables),
            beginning(self.tables, self.table),
        )


def in_parts(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items, so many at a time."""
    while part := list(islice(items, size)):
        yield part
