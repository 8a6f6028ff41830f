"""Plans: what would be done to each group, as JSON that a person may edit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from sqlalchemy import Connection

from app.duplicates.collisions import find_collisions
from app.duplicates.groups import Group
from app.duplicates.rows import first_filled, read_rows
from app.duplicates.tables import KeyedTable, Tables
from app.errors import UnusablePlan

VERSION = 1
SAME, LEAVE = "same", "leave"


@dataclass(frozen=True)
class PlannedGroup:
    """What a plan says of one group.

    ``decision`` is what a person says of homonyms: "same" person, or "leave" the group as it is.
    ``rename`` gives rows another key instead, by id. ``fill`` says from which row a blank column of
    the kept one is filled; None: from the first that has it.
    """

    table: str
    kept: Any
    duplicates: tuple[Any, ...]
    decision: str | None = None
    rename: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    fill: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def ids(self) -> frozenset[Any]:
        """All of its rows."""
        return frozenset([self.kept, *self.duplicates])

    def without_renamed(self) -> PlannedGroup | None:
        """Return what is left of the group when rows have got another key; None: no group."""
        ids = [id for id in (self.kept, *self.duplicates) if str(id) not in self.rename]
        if len(ids) < 2:
            return None
        kept, *duplicates = ids
        fill = None
        if self.fill is not None and kept == self.kept:
            fill = {name: id for name, id in self.fill.items() if id in duplicates}
        return PlannedGroup(self.table, kept, tuple(duplicates), self.decision, {}, fill)


class Decisions:
    """What a reviewed plan says of groups that are found again."""

    def __init__(self, groups: Iterable[PlannedGroup] = ()) -> None:
        self.groups = list(groups)
        self._by_id = {(one.table, id): one for one in self.groups for id in one.ids}

    def of(self, group: Group) -> PlannedGroup | None:
        """Return what the plan says of these rows, of which some may be marked or gone by now."""
        planned = self._by_id.get((group.table, group.kept))
        return planned if planned and planned.ids >= {group.kept, *group.duplicates} else None

    def apply(self, group: Group) -> Group:
        """Return the group with the row kept that the plan keeps."""
        planned = self.of(group)
        if planned is None or planned.kept not in group.duplicates:
            return group
        others = tuple(id for id in (group.kept, *group.duplicates) if id != planned.kept)
        return replace(group, kept=planned.kept, duplicates=others)

    def renames(self, group: Group) -> bool:
        """Tell whether some of the rows get another key."""
        planned = self.of(group)
        return planned is not None and bool(planned.rename)

    def new_keys(self, table: str) -> dict[Any, Mapping[str, Any]]:
        """Return the keys that rows of a table get, by id."""
        groups = (group for group in self.groups if group.table == table)
        return {
            id: group.rename[str(id)]
            for group in groups
            for id in (group.kept, *group.duplicates)
            if str(id) in group.rename
        }

    def leave(self, group: Group) -> bool:
        """Tell whether somebody has said that the group stays as it is."""
        planned = self.of(group)
        return planned is not None and planned.decision == LEAVE

    def are_same(self, group: Group) -> bool:
        """Tell whether somebody has said that the rows are the same."""
        planned = self.of(group)
        return planned is not None and planned.decision == SAME


def describe(
    connection: Connection, tables: Tables, table: KeyedTable, group: Group
) -> dict[str, Any]:
    """Return what a plan says of a group, for a person to read and edit."""
    rows = read_rows(connection, tables, table, [group.kept, *group.duplicates])
    kept, others = rows[group.kept], [rows[id] for id in group.duplicates]
    collisions = [
        one._asdict()
        for reference in table.references
        for one in find_collisions(connection, reference, table, group.kept, group.duplicates)
    ]
    return {
        "table": group.table,
        "key": group.key,
        "kept": group.kept,
        "duplicates": list(group.duplicates),
        "marked": list(group.marked),
        "repoint": {id: counts for id, counts in group.references.items() if id != str(group.kept)},
        "fill": first_filled(table, kept, others),
        "collisions": collisions,
        "homonyms": {
            name: {str(row.id): row.details[name] for row in (kept, *others)}
            for name in group.homonyms
        },
        "decision": None,
        "rename": {},
    }


def write_plan(file: TextIO, groups: Iterable[Mapping[str, Any]]) -> Iterator[int]:
    """Write a plan, a group a line; yield how many there are so far."""
    file.write(f'{{"rollcall_plan": {VERSION}, "groups": [')
    separator, written = "\n", 0
    for group in groups:
        file.write(separator + json.dumps(group, ensure_ascii=False))
        separator, written = ",\n", written + 1
        yield written
    file.write("\n]}\n")


def read_plan(file: TextIO) -> list[PlannedGroup]:
    """Return the groups of a plan. Raises UnusablePlan, which says what is wrong and where."""
    try:
        content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UnusablePlan(f"it is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("rollcall_plan") != VERSION:
        raise UnusablePlan(f'it does not begin with {{"rollcall_plan": {VERSION}')
    groups = content.get("groups")
    if not isinstance(groups, list):
        raise UnusablePlan("it has no list of groups")
    planned = [_read_group(number, group) for number, group in enumerate(groups, 1)]
    _require_distinct(planned)
    return planned


def _read_group(number: int, group: Any) -> PlannedGroup:
    if not isinstance(group, dict):
        raise UnusablePlan(f"group {number} is no object")
    table, kept, duplicates = (group.get(name) for name in ("table", "kept", "duplicates"))
    decision, rename = group.get("decision"), group.get("rename") or {}
    if not isinstance(table, str) or not _is_id(kept):
        raise UnusablePlan(f"group {number} needs a table and the id of the row to keep")
    if not isinstance(duplicates, list) or not duplicates or not all(map(_is_id, duplicates)):
        raise UnusablePlan(f"group {number} needs a list of the ids of its duplicates")
    if decision not in (None, SAME, LEAVE):
        raise UnusablePlan(f'group {number}: decision is "{SAME}", "{LEAVE}" or null')
    _require_renames(number, rename, [kept, *duplicates])
    fill = group.get("fill")
    if fill is not None and not (isinstance(fill, dict) and all(map(_is_id, fill.values()))):
        raise UnusablePlan(f"group {number}: fill gives, by column, the id to fill it from")
    return PlannedGroup(table, kept, tuple(duplicates), decision, rename, fill)


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _require_renames(number: int, rename: Any, ids: Sequence[Any]) -> None:
    known = {str(id) for id in ids}
    if not isinstance(rename, dict) or not rename.keys() <= known:
        raise UnusablePlan(f"group {number}: rename is by ids of the group")
    if not all(isinstance(key, dict) and key for key in rename.values()):
        raise UnusablePlan(f"group {number}: rename gives columns of the key and their new values")


def _require_distinct(groups: Iterable[PlannedGroup]) -> None:
    seen: set[tuple[str, Any]] = set()
    for group in groups:
        for id in (group.kept, *group.duplicates):
            if (group.table, id) in seen:
                raise UnusablePlan(f"{group.table} {id} is there more than once")
            seen.add((group.table, id))
