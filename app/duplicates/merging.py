"""What a merge does to rows, within one transaction: mark, collapse, fill, repoint.

The guard marks and collapses; a merge does all of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from app.duplicates.collisions import Collision, find_collisions
from app.duplicates.groups import Group, Within, find_groups
from app.duplicates.journal import Change, Journal
from app.duplicates.plan import Decisions
from app.duplicates.rows import Row, first_filled, have_key_of, lock_rows, own_references, refer
from app.duplicates.tables import KeyedTable, Reference, Tables, plain_table, quote
from app.errors import GroupChanged, HomonymsFound, RowsCollide, UnusablePlan

SKIP, MERGE_CHILDREN = "skip", "merge"


@dataclass(frozen=True)
class Rules:
    """What a person has decided beforehand, of all groups.

    ``on_collision`` says by table what happens to rows that would collide: "skip" leaves them where
    they are, "merge" also repoints what refers to them and fills blanks of the row that stays.
    """

    keep: str = "oldest"
    accept_homonyms: bool = False
    on_collision: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What was done for one group of a table."""

    id: int
    table: str
    kept: Any
    duplicates: tuple[Any, ...]
    repointed: Counter[str] = field(default_factory=Counter)  # rows by reference
    filled: dict[str, Any] = field(default_factory=dict)  # by column, the row it came from
    collapsed: Counter[str] = field(default_factory=Counter)  # duplicates it made, by table
    left: list[Collision] = field(default_factory=list)  # rows that stayed where they were


class Merging:
    """Merges rows within a transaction; everything is journalled."""

    def __init__(
        self,
        connection: Connection,
        tables: Tables,
        journal: Journal,
        rules: Rules,
        decisions: Decisions,
        outcome: Outcome,
    ) -> None:
        self.connection = connection
        self.tables = tables
        self.journal = journal
        self.rules = rules
        self.decisions = decisions
        self.outcome = outcome

    def lock(
        self, table: KeyedTable, kept: Any, ids: Sequence[Any], *, references: bool = True
    ) -> tuple[Row, list[Row]]:
        """Lock the rows of a group. Raises GroupChanged where they are none any more."""
        rows = self._lock(table, [kept, *ids], references)
        if kept not in rows or rows[kept].mark is not None:
            raise GroupChanged(f"{table.name} {kept} is not a row to keep any more")
        others = [rows[id] for id in ids if id in rows]
        if len(others) < len(ids) or not self._belong(table, rows[kept], others):
            raise GroupChanged(f"the duplicates of {table.name} {kept} have changed")
        return rows[kept], others

    def _lock(
        self, table: KeyedTable, ids: Sequence[Any], references: bool = True
    ) -> dict[Any, Row]:
        return lock_rows(self.connection, self.tables, table, ids, references=references)

    def _belong(self, table: KeyedTable, kept: Row, rows: Sequence[Row]) -> bool:
        """Tell whether the rows are duplicates of the one that is kept, marked or not."""
        unmarked = [row for row in rows if row.mark is None]
        if not {row.mark for row in rows} <= {None, kept.id, *_ids(rows)}:
            return False
        if all(row.key == kept.key for row in unmarked):
            return True
        return have_key_of(self.connection, self.tables, table, kept.id, _ids(unmarked))

    def mark(self, table: KeyedTable, kept: Row, rows: Sequence[Row]) -> None:
        """Have the rows, and what points at them, point at the one that is kept.

        Raises HomonymsFound for rows that were none when they were found.
        """
        unmarked = [row for row in rows if row.mark is None]
        key = {name: kept.stored[name] for name in table.key}
        differing = _differing([kept, *unmarked])
        self._require_decided([Group(table.name, kept.id, _ids(unmarked), (), key, differing, {})])
        marks = {row.id: kept.id for row in unmarked}
        changes = [_marking(table, id, None, kept.id) for id in marks]
        self.journal.change(table.table, [*changes, *self._chained(table, marks)])

    def _require_decided(self, groups: Sequence[Group]) -> None:
        """Raise HomonymsFound for groups that nobody has decided on."""
        homonyms = [
            group for group in groups if group.are_homonyms and not self.decisions.are_same(group)
        ]
        if homonyms and not self.rules.accept_homonyms:
            raise HomonymsFound(homonyms)

    def _chained(self, table: KeyedTable, kept: Mapping[Any, Any]) -> list[Change]:
        """Return the changes that lead what points at new duplicates to the rows that are kept."""
        if not kept:
            return []
        mark = quote(table.mark)
        chained = self.connection.exec_driver_sql(
            f"SELECT to_jsonb({quote(table.id)}), to_jsonb({mark}) FROM {table.table}"
            f" WHERE {mark} = ANY ({table.ids('ids')}) FOR UPDATE",
            {"ids": list(kept)},
        )
        return [_marking(table, id, root, kept[root]) for id, root in chained]

    def settle_children(self, table: KeyedTable, kept: Any, ids: Sequence[Any]) -> None:
        """Move the rows of keyed tables whose key refers to rows that are marked now."""
        for child, column in self.tables.children(table):
            for group in self.collapse(table, child, column, kept, ids):
                self.settle_children(child, group.kept, group.duplicates)

    def collapse(
        self, table: KeyedTable, child: KeyedTable, column: str, kept: Any, ids: Sequence[Any]
    ) -> list[Group]:
        """Move rows of a keyed table to the row that is kept; return the groups that this makes.

        Rows that are the same then get their new reference and their mark in one UPDATE, before
        the others move: the guard would refuse them side by side even for a moment.
        """
        within = Within(column, [kept, *ids])
        found = find_groups(
            self.connection, self.tables, child, self.rules.keep, which="unmarked", within=within
        )
        groups = list(map(self.decisions.apply, found))
        self._require_decided(groups)
        self._mark_moved(child, column, kept, groups)
        reference = next(
            one for one in table.references if (one.oid, one.columns) == (child.oid, (column,))
        )
        for id in ids:
            moved = self.journal.repoint(reference, table, id, kept)
            self.outcome.repointed[reference.name] += moved
        return groups

    def _mark_moved(
        self, child: KeyedTable, column: str, kept: Any, groups: Sequence[Group]
    ) -> None:
        winners = {id: group.kept for group in groups for id in group.duplicates}
        if not winners:
            return
        ids = [*winners, *(group.kept for group in groups)]
        rows = self._lock(child, ids, references=False)
        changes = [
            Change(
                {child.id: id},
                {column: rows[id].stored[column], child.mark: None},
                {column: kept, child.mark: winner},
            )
            for id, winner in winners.items()
        ]
        self.journal.change(child.table, changes)
        self.journal.change(child.table, self._chained(child, winners))
        self.outcome.collapsed[child.name] += len(winners)

    def absorb(self, table: KeyedTable, kept: Row, rows: Sequence[Row]) -> None:
        """Give what the rows have to the one that is kept."""
        self.fill(table, kept, rows)
        self.repoint(table, kept, rows)

    def fill(
        self,
        table: KeyedTable,
        kept: Row,
        rows: Sequence[Row],
        chosen: Mapping[str, Any] | None = None,
    ) -> None:
        """Fill blank details of the row that is kept, with those of the first row that has them.

        ``chosen`` says instead which columns to fill, and from which row. Raises RowsCollide where
        the row would come to refer to itself, and UnusablePlan.
        """
        by_id = {row.id: row for row in rows}
        sources = first_filled(table, kept, rows) if chosen is None else dict(chosen)
        for name, id in sources.items():
            if name not in table.details or id not in by_id or kept.details[name] is not None:
                raise UnusablePlan(f"{table.name} {kept.id}: {name} cannot be filled from {id}")
        if sources:
            self._require_other(table, kept, rows, sources)
            self.journal.fill(table, kept.id, sources)
            if (table.name, kept.id) == (self.outcome.table, self.outcome.kept):
                self.outcome.filled.update(sources)

    def _require_other(
        self, table: KeyedTable, kept: Row, rows: Sequence[Row], sources: Mapping[str, Any]
    ) -> None:
        """Refuse to fill columns so that their row would refer to itself."""
        by_id = {row.id: row for row in rows}
        stored = {
            name: by_id[sources[name]].stored[name] if name in sources else value
            for name, value in kept.stored.items()
        }
        for reference in own_references(table):
            filled = sources.keys() & set(reference.columns)
            if filled and any(refer(stored, row, reference) for row in (kept, *rows)):
                raise RowsCollide([_itself(table, reference, kept)])

    def repoint(self, table: KeyedTable, kept: Row, rows: Sequence[Row]) -> None:
        """Have whatever refers to the rows refer to the one that is kept.

        Raises RowsCollide, and HomonymsFound for rows of keyed tables that get the same key.
        """
        for reference in _referring(table, rows):
            child = self.tables.by_oid.get(reference.oid)
            (column, *_) = reference.columns
            if child is not None and child.parents.get(column) == table.oid:
                for group in self.collapse(table, child, column, kept.id, _ids(rows)):
                    self.absorb(child, *self.lock(child, group.kept, group.duplicates))
            else:
                self._repoint(table, reference, kept, rows)

    def require_unreferred(self, table: KeyedTable, ids: Sequence[Any]) -> None:
        """Raise RowsCollide if anything still refers to one of the rows."""
        referring = _referring(table, self._lock(table, ids).values())
        if referring:
            raise RowsCollide(
                [
                    Collision(one.table_name, f"{one.name} still refers", None, ())
                    for one in referring
                ]
            )

    def _repoint(
        self, table: KeyedTable, reference: Reference, kept: Row, rows: Sequence[Row]
    ) -> None:
        ids = _ids(rows)
        blank = [name for name in reference.targets if kept.stored[name] is None]
        if blank:
            reason = f"{reference.name} would be NULL, as {', '.join(blank)} of {kept.id} is"
            raise RowsCollide([Collision(reference.table_name, reason, None, ())])
        collisions = find_collisions(self.connection, reference, table, kept.id, ids)
        if reference.oid == table.oid and any(refer(kept.stored, row, reference) for row in rows):
            collisions.append(_itself(table, reference, kept))
        policy = self.rules.on_collision.get(reference.table_name)
        if collisions and policy is None:
            raise RowsCollide(collisions)
        if policy == MERGE_CHILDREN:
            self._absorb_children(reference, [one for one in collisions if one.first])
        self.outcome.left += collisions
        skip = [json.dumps(row) for one in collisions for row in one.others]
        for id in ids:
            moved = self.journal.repoint(reference, table, id, kept.id, skip)
            self.outcome.repointed[reference.name] += moved

    def _absorb_children(self, reference: Reference, collisions: Sequence[Collision]) -> None:
        """Do for rows that collide what is done for duplicates, only that they stay there."""
        child = plain_table(self.connection, self.tables, reference)
        if child is None:
            raise RowsCollide(list(collisions))
        for collision in collisions:
            first, *others = [row[child.id] for row in (collision.first, *collision.others)]
            rows = self._lock(child, [first, *others])
            self.absorb(child, rows[first], [rows[id] for id in others])


def _ids(rows: Iterable[Row]) -> tuple[Any, ...]:
    return tuple(row.id for row in rows)


def _referring(table: KeyedTable, rows: Iterable[Row]) -> list[Reference]:
    """Return the references by which any row refers to one of the rows."""
    names = frozenset().union(*(row.referred_by for row in rows))
    return [reference for reference in table.references if reference.name in names]


def _differing(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the details that are filled in several of the rows, and differ."""
    return tuple(
        name
        for name in (rows[0].details if rows else ())
        if len({row.details[name] for row in rows} - {None}) > 1
    )


def _marking(table: KeyedTable, id: Any, before: Any, kept: Any) -> Change:
    return Change({table.id: id}, {table.mark: before}, {table.mark: kept})


def _itself(table: KeyedTable, reference: Reference, kept: Row) -> Collision:
    """Return the row that is kept, which would come to refer to itself."""
    reason = f"{', '.join(reference.columns)} would refer to the row itself"
    return Collision(table.name, reason, None, [{table.id: kept.id}])
