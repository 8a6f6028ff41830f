"""Mark duplicates and normalise stored keys, a few rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.duplicates import journal
from app.duplicates.groups import AT_ONCE, Group, find_groups
from app.duplicates.journal import Change, Journal
from app.duplicates.merge import beginning, keep_out, races
from app.duplicates.merging import Merging, Outcome, Rules
from app.duplicates.parts import in_parts
from app.duplicates.plan import Decisions
from app.duplicates.rows import lock_rows
from app.duplicates.tables import KeyedTable, Tables, quote
from app.errors import GroupChanged
from app.transactions import RetryPolicy, run

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
        self.rules = rules
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
            for some in in_parts(self._unmarked(connection), at_once):
                marked += self._mark_if_unchanged(some)
                tell(marked)
        if marked:
            journal.settle(self.engine, self.table, self.policy)
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
        def work(session: Session, unanswered: Outcome | None) -> Outcome:
            connection = keep_out(session, self.tables, self.table, self.policy)
            if unanswered is not None and journal.has(connection, self.table, unanswered.id):
                return unanswered
            return self._mark_groups(connection, groups)

        return self._count(self._run(work, races(self.tables)))

    def mark_last(self, build: Callable[[Connection], object]) -> int:
        """Mark what duplicates there are while no other writer works, and build the guard.

        Returns how many were marked. Writers of the table wait meanwhile: for a look at the whole
        table, and the build of an index.
        """

        def work(session: Session, unanswered: Outcome | None) -> Outcome:
            connection = session.connection()
            if unanswered is not None and journal.has(connection, self.table, unanswered.id):
                return unanswered
            children = (child.table for child, _ in self.tables.children(self.table))
            tables = ", ".join((self.table.table, *children))
            connection.exec_driver_sql(f"LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE")
            outcome = self._mark_groups(connection, list(self._unmarked(connection)))
            build(connection)
            return outcome

        return self._count(self._run(work, frozenset()))

    def _unmarked(self, connection: Connection) -> Iterator[Group]:
        groups = find_groups(connection, self.tables, self.table, self.rules.keep, which="unmarked")
        return map(self.decisions.apply, groups)

    def _mark_groups(self, connection: Connection, groups: Sequence[Group]) -> Outcome:
        duplicates = tuple(id for group in groups for id in group.duplicates)
        writer = Journal(connection, self.table)
        entry = writer.begin(journal.MARK, self.table, None, duplicates)
        outcome = Outcome(entry, self.table.name, None, duplicates)
        merging = Merging(connection, self.tables, writer, self.rules, self.decisions, outcome)
        for group in groups:
            self._mark_group(merging, group)
        return outcome

    def _count(self, outcome: Outcome) -> int:
        self.moved += outcome.repointed
        self.collapsed += outcome.collapsed
        return len(outcome.duplicates)

    def _mark_group(self, merging: Merging, group: Group) -> None:
        kept, rows = merging.lock(self.table, group.kept, group.duplicates, references=False)
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
        if normalised:
            journal.settle(self.engine, self.table, self.policy)
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
                for change in changes:
                    writer.change(self.table.table, [change])
            return len(changes) if unanswered is None else unanswered

        # A key that is taken stays so: here the guard is no race that could be won.
        return self._run(work, frozenset())

    def _new_keys(
        self, connection: Connection, rows: Mapping[Any, Mapping[str, Any] | None]
    ) -> list[Change]:
        table = self.table
        changes = []
        for id, row in lock_rows(connection, self.tables, table, list(rows)).items():
            key = {**dict(zip(table.key, row.key, strict=True)), **(rows[id] or {})}
            # Only what differs: a number would lose digits on its way through JSON.
            after = {name: value for name, value in key.items() if value != row.stored[name]}
            if row.mark is None and after:
                before = {name: row.stored[name] for name in after}
                changes.append(Change({table.id: id}, before, after))
        return changes

    def _run(
        self, work: Callable[[Session, Result | None], Result], race_indexes: frozenset[str]
    ) -> Result:
        begin = beginning(self.tables, self.table)
        return run(self.engine, work, self.policy, race_indexes, begin)
