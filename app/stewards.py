"""What data stewards do, on the service's own database: look at duplicates, merge, undo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from app.config import current_settings, request_policy
from app.db import db
from app.directory import look
from app.duplicates import journal
from app.duplicates.groups import Group, Page, find_groups
from app.duplicates.merge import merge_group
from app.duplicates.merging import Outcome, Rules
from app.duplicates.plan import PlannedGroup
from app.duplicates.status import which_there_can_be
from app.duplicates.tables import KeyedTable, Tables, read_tables
from app.duplicates.undo import undo
from app.errors import AlreadyMerged, NothingToMerge, RecordIsDuplicate, RecordNotFound
from app.models import RECORDS, Record

Result = TypeVar("Result")

MODELS = {model.__tablename__: model for model in RECORDS}


def _on_tables(query: Callable[[Session, Tables], Result]) -> Result:
    """Return what a query gives that needs to know the tables."""

    def work(session: Session) -> Result:
        references = current_settings().soft_references
        return query(session, read_tables(session.connection(), RECORDS[0], references))

    return look(work)


def groups(
    names: Sequence[str], after: tuple[str, int] | None, limit: int
) -> tuple[list[Group], bool]:
    """Return up to ``limit`` groups of duplicates of some tables, and whether there are more.

    They come by table and by their lowest ids; ``after`` is a table and such an id.
    """
    if after is not None:
        names = names[names.index(after[0]) :]

    def query(session: Session, tables: Tables) -> list[Group]:
        found: list[Group] = []
        for name in names:
            start = after[1] if after is not None and after[0] == name else 0
            table = tables.of(MODELS[name])
            page = Page(start, limit + 1 - len(found))
            found += _groups(session, tables, table, page=page)
        return found[: limit + 1]

    found = _on_tables(query)
    return found[:limit], len(found) > limit


def _groups(
    session: Session, tables: Tables, table: KeyedTable, **narrowed: Any
) -> Iterator[Group]:
    connection = session.connection()
    which = which_there_can_be(connection, tables, table)
    return find_groups(connection, tables, table, which=which, **narrowed)


def merge_one(name: str, id: int, accept_homonyms: bool) -> Outcome:
    """Merge the duplicates of a record into it.

    Raises RecordNotFound, RecordIsDuplicate, NothingToMerge, and what merge_group() raises.
    """
    model = MODELS[name]

    def query(session: Session, tables: Tables) -> tuple[Tables, Group | None]:
        _require_canonical(session, model, id)
        table = tables.of(model)
        journal.require(session.connection(), table)
        return tables, next(_groups(session, tables, table, of=[id]), None)

    tables, group = _on_tables(query)
    if group is None:
        raise NothingToMerge(model.__name__, id)
    rules = Rules(accept_homonyms=accept_homonyms)
    table, planned = tables.of(model), _keeping(id, group)
    try:
        return merge_group(
            db.engine, tables, table, planned, rules, request_policy(), merged=group.merged
        )
    except AlreadyMerged:
        raise NothingToMerge(model.__name__, id) from None


def _require_canonical(session: Session, model: type[Record], id: int) -> None:
    record = session.get(model, id)
    if record is None:
        raise RecordNotFound(model.__name__, id)
    if record.duplicate_of_id is not None:
        raise RecordIsDuplicate(model.__name__, id, record.duplicate_of_id)


def _keeping(id: int, group: Group) -> PlannedGroup:
    """Return the group with the record kept that was asked for.

    What is marked as a duplicate of another row follows that row.
    """
    if id == group.kept:
        return PlannedGroup(group.table, id, group.duplicates)
    others = (other for other in (group.kept, *group.unmarked) if other != id)
    return PlannedGroup(group.table, id, tuple(others))


def undo_merge(id: int) -> int:
    """Take a merge back; return how many rows that restored.

    Raises UnknownMerge and CannotUndo.
    """

    def query(session: Session, tables: Tables) -> KeyedTable:
        table = tables.of(RECORDS[0])
        journal.require(session.connection(), table)
        return table

    return undo(db.engine, _on_tables(query), id, request_policy())
