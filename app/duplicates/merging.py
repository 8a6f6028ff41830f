"""What a merge does to rows, within one transaction: mark, collapse, fill, repoint.

The guard marks and collapses; a merge does all of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sqlalchemy import Connection

from app.duplicates.collisions import Collision, find_collisions
from app.duplicates.groups import Group, Within, find_groups
from app.duplicates.journal import Change, Journal
from app.duplicates.rows import Row, lock_rows
from app.duplicates.tables import KeyedTable, Reference, Tables, plain_table, quote
from app.errors import GroupChanged, HomonymsFound, RowsCollide, UnusablePlan

SKIP, MERGE_CHILDREN = "skip", "merge"


class Decided(Protocol):
    """What a person has said of single groups."""

    def apply(self, group: Group) -> Group:
        """Return the group with the row kept that shall be."""

    def are_same(self, group: Group) -> bool:
        """Tell whether the rows of homonyms are the same."""


@dataclass(frozen=True)
class Rules:
    """What a person has decided beforehand, of all groups, and in ``decisions`` of single ones.

    ``on_collision`` says by table what happens to rows that would collide: "skip" leaves them where
    they are, "merge" also repoints what refers to them and fills blanks of the row that stays.
    """

    keep: str = "oldest"
    accept_homonyms: bool = False
    on_collision: Mapping[str, str] = field(default_factory=dict)
    decisions: Decided | None = None

    def apply(self, group: Group) -> Group:
        """Return the group with the row kept that shall be."""
        return group if self.decisions is None else self.decisions.apply(group)

    def are_same(self, group: Group) -> bool:
        """Tell whether the rows count as the same though they differ."""
        decided = self.decisions is not None and self.decisions.are_same(group)
        return self.accept_homonyms or decided


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
        outcome: Outcome,
    ) -> None:
        self.connection = connection
        self.tables = tables
        self.journal = journal
        self.rules = rules
        self.outcome = outcome

    def lock(self, table: KeyedTable, kept: Any, ids: Sequence[Any]) -> tuple[Row, list[Row]]:
        """Lock the rows of a group. Raises GroupChanged where they are none any more."""
        rows = lock_rows(self.connection, self.tables, table, [kept, *ids])
        if kept not in rows or rows[kept].mark is not None:
            raise GroupChanged(f"{table.name} {kept} is not a row to keep any more")
        others = [rows[id] for id in ids if id in rows]
        if len(others) < len(ids) or not all(_belongs(row, rows[kept]) for row in others):
            raise GroupChanged(f"the duplicates of {table.name} {kept} have changed")
        return rows[kept], others

    def mark(self, table: KeyedTable, kept: Row, rows: Sequence[Row]) -> None:
        """Have the rows, and what points at them, point at the one that is kept.

        Raises HomonymsFound for rows that were none when they were found.
        """
        unmarked = [row for row in rows if row.mark is None]
        differ = differing([kept, *unmarked])
        group = Group(table.name, kept.id, _ids(rows), (), kept.stored, differ, {})
        if unmarked and differ and not self.rules.are_same(group):
            raise HomonymsFound([replace(group, duplicates=_ids(unmarked))])
        marks = {row.id: kept.id for row in unmarked}
        changes = [_marking(table, id, None, kept.id) for id in marks]
        self.journal.change(table.table, [*changes, *self._chained(table, marks)])

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
        groups = [self.rules.apply(group) for group in found]
        homonyms = [one for one in groups if one.homonyms and not self.rules.are_same(one)]
        if homonyms:
            raise HomonymsFound(homonyms)
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
        rows = lock_rows(self.connection, self.tables, child, ids)
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
            _require_other(table, name, by_id[id], {kept.id, *by_id})
        if sources:
            self.journal.fill(table, kept.id, sources)
            if (table.name, kept.id) == (self.outcome.table, self.outcome.kept):
                self.outcome.filled.update(sources)

    def repoint(self, table: KeyedTable, kept: Row, rows: Sequence[Row]) -> None:
        """Have whatever refers to the rows refer to the one that is kept.

        Raises RowsCollide, and HomonymsFound for rows of keyed tables that get the same key.
        """
        for reference in self._referring(table, rows):
            child = self.tables.by_oid.get(reference.oid)
            (column, *_) = reference.columns
            if child is not None and child.parents.get(column) == table.oid:
                for group in self.collapse(table, child, column, kept.id, _ids(rows)):
                    self.absorb(child, *self.lock(child, group.kept, group.duplicates))
            else:
                self._repoint(table, reference, kept, rows)

    def _referring(self, table: KeyedTable, rows: Sequence[Row]) -> list[Reference]:
        """Return the references by which any row refers to one of the rows."""
        if not table.references:
            return []
        (found,) = self.connection.exec_driver_sql(_referring_sql(table), {"ids": [*_ids(rows)]})
        return [one for one, refers in zip(table.references, found, strict=True) if refers]

    def require_unreferred(self, table: KeyedTable, rows: Sequence[Row]) -> None:
        """Raise RowsCollide if anything still refers to one of the rows."""
        names = [reference.name for reference in self._referring(table, rows)]
        if names:
            raise RowsCollide(
                [
                    Collision(name.rpartition(".")[0], f"{name} still refers", None, ())
                    for name in names
                ]
            )

    def _repoint(
        self, table: KeyedTable, reference: Reference, kept: Row, rows: Sequence[Row]
    ) -> None:
        ids = _ids(rows)
        collisions = find_collisions(self.connection, reference, table, kept.id, ids)
        collisions += _to_itself(table, reference, kept, ids)
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
            rows = lock_rows(self.connection, self.tables, child, [first, *others])
            self.absorb(child, rows[first], [rows[id] for id in others])


def first_filled(table: KeyedTable, kept: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """Return, by blank detail of the row that is kept, the first of the rows that has it."""
    found = {}
    for name in table.details:
        source = next((row.id for row in rows if row.details[name] is not None), None)
        if kept.details[name] is None and source is not None:
            found[name] = source
    return found


def _ids(rows: Iterable[Row]) -> tuple[Any, ...]:
    return tuple(row.id for row in rows)


def _belongs(row: Row, kept: Row) -> bool:
    return row.mark == kept.id or (row.mark is None and row.key == kept.key)


def differing(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the details that are filled in several of the rows, and differ."""
    return tuple(
        name
        for name in (rows[0].details if rows else ())
        if len({row.details[name] for row in rows} - {None}) > 1
    )


def _marking(table: KeyedTable, id: Any, before: Any, kept: Any) -> Change:
    return Change({table.id: id}, {table.mark: before}, {table.mark: kept})


def _require_other(table: KeyedTable, name: str, source: Row, group: set[Any]) -> None:
    """Refuse to fill a column so that its row would refer to itself."""
    if source.stored.get(name) in group - {None}:
        reason = f"{name} would refer to the row itself"
        raise RowsCollide([Collision(table.name, reason, None, [{table.id: source.id}])])


def _to_itself(
    table: KeyedTable, reference: Reference, kept: Row, ids: Sequence[Any]
) -> list[Collision]:
    """Return the kept row itself, where it refers to one of its duplicates."""
    own = reference.oid == table.oid and reference.targets == (table.id,)
    if not own or kept.stored[reference.columns[0]] not in ids:
        return []
    reason = f"{reference.columns[0]} would refer to the row itself"
    return [Collision(table.name, reason, None, [{table.id: kept.id}])]


def _referring_sql(table: KeyedTable) -> str:
    found = (
        f"EXISTS (SELECT FROM {table.table} AS t JOIN {one.table} AS c ON {one.matches('c', 't')}"
        f" WHERE t.{quote(table.id)} = ANY ({table.ids('ids')}))"
        for one in table.references
    )
    return f"SELECT {', '.join(found)}"
