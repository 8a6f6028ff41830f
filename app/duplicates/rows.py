"""The rows of a group, locked, as a merge needs to know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection

from app.duplicates.tables import KeyedTable, Reference, Tables, literal, quote
from app.transactions import execute_prepared


@dataclass(frozen=True)
class Row:
    """A row that is locked; ``key`` is compared with those of others, not stored."""

    id: Any
    mark: Any
    key: tuple[Any, ...]
    stored: Mapping[str, Any]  # the id, the key, what refers to its own table, what is referred to
    details: Mapping[str, str | None]  # as text to compare; None: blank
    referred_by: frozenset[str]  # the references by which any row refers to it, if asked for


def read_rows(
    connection: Connection, tables: Tables, table: KeyedTable, ids: Sequence[Any]
) -> dict[Any, Row]:
    """Return rows by id, without locking them."""
    return _rows(connection, _sql(tables, table, False), ids)


def lock_rows(
    connection: Connection,
    tables: Tables,
    table: KeyedTable,
    ids: Sequence[Any],
    *,
    references: bool = False,
) -> dict[Any, Row]:
    """Lock rows for the rest of the transaction, and return those that are there, by id.

    In the order of their ids, so that two merges wait for each other rather than die. Nobody can
    begin to refer to a row meanwhile: a foreign key's check waits for the lock. ``references`` asks
    what refers to them, too, which reads the whole of tables that have no index for it.
    """
    return _rows(connection, f"{_sql(tables, table, references)} FOR UPDATE OF t", ids)


def _rows(connection: Connection, sql: str, ids: Sequence[Any]) -> dict[Any, Row]:
    result = execute_prepared(connection, sql, {"ids": list(ids)})
    return {
        id: Row(id, mark, tuple(key), stored, details, frozenset(referred_by))
        for id, mark, key, stored, details, referred_by in result
    }


@lru_cache(maxsize=64)
def _sql(tables: Tables, table: KeyedTable, references: bool) -> str:
    id, mark = f"t.{quote(table.id)}", f"t.{quote(table.mark)}" if table.mark else "NULL::int"
    keys = ", ".join(tables.key(table, name) for name in table.key)
    own = (name for one in own_references(table) for name in one.columns)
    targets = (name for one in table.references for name in one.targets)
    stored = {name: f"t.{quote(name)}" for name in (table.id, *table.key, *own, *targets)}
    names = ", ".join(map(literal, table.details))
    details = ", ".join(table.detail(name) for name in table.details)
    referred = ", ".join(map(_refers, table.references)) if references else ""
    return f"""
SELECT to_jsonb({id}), to_jsonb({mark}), jsonb_build_array({keys}),
       {_object(stored)}, jsonb_object(ARRAY[{names}]::text[], ARRAY[{details}]::text[]),
       array_remove(ARRAY[{referred}]::text[], NULL)
  FROM {table.table} AS t WHERE {id} = ANY ({table.ids("ids")}) ORDER BY {id}"""


def _refers(reference: Reference) -> str:
    """Return a reference's name where a row refers to ``t`` by it, else NULL."""
    rows = f"SELECT FROM {reference.table} AS c WHERE {reference.matches('c', 't')}"
    return f"CASE WHEN EXISTS ({rows}) THEN {literal(reference.name)} END"


def _object(values: Mapping[str, str]) -> str:
    pairs = (f"{literal(name)}, {value}" for name, value in values.items())
    return f"jsonb_build_object({', '.join(pairs)})"


def own_references(table: KeyedTable) -> list[Reference]:
    """Return the references by which a table's rows refer to one another."""
    return [one for one in table.references if one.oid == table.oid]


def refer(stored: Mapping[str, Any], row: Row, reference: Reference) -> bool:
    """Tell whether what is stored in a table's columns refers to a row of the same table."""
    pairs = zip(reference.columns, reference.targets, strict=True)
    return all(stored[own] is not None and stored[own] == row.stored[of] for own, of in pairs)


def have_key_of(
    connection: Connection, tables: Tables, table: KeyedTable, kept: Any, ids: Sequence[Any]
) -> bool:
    """Ask the database, which may compare in its own way, whether rows have the key of another."""
    key = ", ".join(tables.key(table, name) for name in table.key)
    id = f"t.{quote(table.id)}"
    sql = (
        f"SELECT count(*) FROM {table.table} AS t WHERE {id} = ANY ({table.ids('ids')})"
        f" AND ROW({key}) IS NOT DISTINCT FROM"
        f" (SELECT ROW({key}) FROM {table.table} AS t WHERE {id} = %(kept)s)"
    )
    found = connection.exec_driver_sql(sql, {"ids": list(ids), "kept": kept}).scalar_one()
    return bool(found == len(ids))


def first_filled(table: KeyedTable, kept: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """Return, by blank detail of the row that is kept, the first of the rows that has it."""
    found = {}
    for name in table.details:
        source = next((row.id for row in rows if row.details[name] is not None), None)
        if kept.details[name] is None and source is not None:
            found[name] = source
    return found
