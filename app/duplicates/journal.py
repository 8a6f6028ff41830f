"""The journal: who merged what and when, and every row that was changed as it was before.

Two tables beside those that they are about; where these are in several schemas, beside the one
whose name comes first. An entry is one transaction's work. Its changes are
numbered by step: a step changes the same columns of some rows of one table, so that an entry is
undone by undoing its steps in reverse.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from app.duplicates.tables import KeyedTable, Reference, as_value, literal, quote
from app.errors import UnknownTable
from app.transactions import RetryPolicy, execute_prepared, run, sqlstate

MARK, MERGE, PURGE = "mark", "merge", "purge"

# Rows are kept as JSON, in which values of some types look as the session wants them to.
ONE_FORMAT = (
    "SET LOCAL timezone = 'UTC'; SET LOCAL intervalstyle = 'postgres'; "
    "SET LOCAL extra_float_digits = 1; SET LOCAL bytea_output = 'hex'; "
    "SET LOCAL datestyle = 'ISO'; "
)

CREATE = """
CREATE TABLE IF NOT EXISTS {schema}.rollcall_merge (
    id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_rollcall_merge PRIMARY KEY,
    action text NOT NULL,
    table_name text NOT NULL,
    kept jsonb,
    duplicates jsonb NOT NULL,
    made_by text NOT NULL DEFAULT session_user,
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    undone_by text,
    undone_at timestamptz,
    purged_at timestamptz
);
CREATE INDEX IF NOT EXISTS ix_rollcall_merge_duplicates
    ON {schema}.rollcall_merge USING gin (duplicates jsonb_path_ops);
CREATE TABLE IF NOT EXISTS {schema}.rollcall_change (
    merge_id bigint NOT NULL CONSTRAINT fk_rollcall_change_merge_id_rollcall_merge
        REFERENCES {schema}.rollcall_merge (id),
    step integer NOT NULL,
    number bigint GENERATED ALWAYS AS IDENTITY,
    table_name text NOT NULL,
    row_key jsonb,
    before jsonb NOT NULL,
    after jsonb,
    CONSTRAINT pk_rollcall_change PRIMARY KEY (merge_id, step, number)
);
"""
# For one of many transactions in succession: a crash of the server takes back the last moment's,
# each as a whole, and the next run does them again. :func:`settle` comes after the last.
NOT_WAITING = "SET LOCAL synchronous_commit = off; "


def settle(engine: Engine, table: KeyedTable, policy: RetryPolicy) -> None:
    """Return when everything that was committed before is on disk, and have the planner know.

    Autovacuum tells it once a tenth of a table has changed; until then it takes the few that are
    marked for none, and searches that take seconds take minutes.
    """
    run(engine, lambda session, _: session.scalar(text("SELECT pg_current_xact_id()")), policy)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"ANALYZE (SKIP_LOCKED) {table.table}, {table.journal}.rollcall_merge"
        )


# Of two who create it at once: pg_type_typname_nsp_index, duplicate table, duplicate object.
CREATED_MEANWHILE = ("23505", "42P07", "42710")


def create(engine: Engine, table: KeyedTable) -> None:
    """Create the journal beside the table, if it is not there yet."""
    with engine.connect() as connection:
        if exists(connection, table):
            return
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(CREATE.format(schema=table.journal))
    except DBAPIError as error:
        if sqlstate(error) not in CREATED_MEANWHILE:
            raise


def exists(connection: Connection, table: KeyedTable) -> bool:
    """Tell whether there is a journal beside the table."""
    name = as_value(f"{table.journal}.rollcall_change")
    return connection.scalar(text("SELECT to_regclass(:name)"), {"name": name}) is not None


def require(connection: Connection, table: KeyedTable) -> None:
    """Raise UnknownTable where there is no journal beside the table."""
    if not exists(connection, table):
        raise UnknownTable(f"there is no journal of merges beside the table {table.name}")


def merged_ids(table: KeyedTable) -> str:
    """Return a query of the ids of rows that have been merged into another."""
    return (
        f"SELECT DISTINCT CAST(merged.id AS {table.id_type}) AS id"
        f" FROM {table.journal}.rollcall_merge AS e,"
        " jsonb_array_elements_text(e.duplicates) AS merged (id)"
        f" WHERE e.action = '{MERGE}' AND e.table_name = %(table)s AND e.undone_at IS NULL"
    )


def merged_among(
    connection: Connection, table: KeyedTable, ids: Sequence[Any], but: int | None = None
) -> list[Any]:
    """Return those of the ids whose rows have been merged into others, but for one entry.

    OFFSET 0 has the index asked for each of them, where a join reads the journal from its start.
    """
    sql = f"""
SELECT one.id FROM jsonb_array_elements(CAST(%(ids)s AS jsonb)) AS one (id)
 WHERE EXISTS (SELECT FROM {table.journal}.rollcall_merge AS e
                WHERE e.duplicates @> jsonb_build_array(one.id) AND e.action = '{MERGE}'
                  AND e.table_name = %(table)s AND e.undone_at IS NULL
                  AND e.id IS DISTINCT FROM %(but)s OFFSET 0)"""
    parameters = {"ids": json.dumps(list(ids)), "table": table.name, "but": but}
    return list(connection.exec_driver_sql(sql, parameters).scalars())


class Change(NamedTuple):
    """One row's change: the row, by its identity, and the changed columns before and after."""

    row_key: Mapping[str, Any]
    before: Mapping[str, Any]
    after: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """What the journal says of one transaction."""

    id: int
    action: str
    table: str
    kept: Any
    duplicates: Sequence[Any]
    made_by: str
    made_at: datetime
    undone_at: datetime | None
    purged_at: datetime | None


def has(connection: Connection, table: KeyedTable, entry: int) -> bool:
    """Tell whether an entry was committed."""
    sql = f"SELECT EXISTS (SELECT FROM {table.journal}.rollcall_merge WHERE id = %(entry)s)"
    return bool(connection.exec_driver_sql(sql, {"entry": entry}).scalar_one())


def entries(
    connection: Connection,
    table: KeyedTable,
    condition: str,
    parameters: Mapping[str, Any],
    lock: bool = False,
) -> list[Entry]:
    """Return the entries that meet a condition in SQL, the newest first."""
    columns = "id, action, table_name, kept, duplicates, made_by, made_at, undone_at, purged_at"
    rows = connection.exec_driver_sql(
        f"SELECT {columns} FROM {table.journal}.rollcall_merge WHERE {condition} ORDER BY id DESC"
        + (" FOR UPDATE" if lock else ""),
        dict(parameters),
    )
    return [Entry(*row) for row in rows]


class Journal:
    """Changes rows, and writes down how to take that back. Used within one transaction."""

    def __init__(self, connection: Connection, table: KeyedTable) -> None:
        self.connection = connection
        self.schema = table.journal
        self.entry = 0
        self.step = 0

    def begin(self, action: str, table: KeyedTable, kept: Any, duplicates: Iterable[Any]) -> int:
        """Make the entry that the changes to come belong to, and return its id."""
        self.entry = execute_prepared(
            self.connection,
            f"INSERT INTO {self.schema}.rollcall_merge (action, table_name, kept, duplicates)"
            " VALUES (%(action)s, %(table)s, %(kept)s, %(duplicates)s) RETURNING id",
            {
                "action": action,
                "table": table.name,
                "kept": json.dumps(kept),
                "duplicates": json.dumps(list(duplicates)),
            },
        ).scalar_one()
        return self.entry

    def change(self, table: str, changes: Sequence[Change]) -> int:
        """Change rows of a table, the same columns of each, and return how many they are."""
        if not changes:
            return 0
        execute_prepared(
            self.connection,
            _change_sql(self.schema, table, tuple(changes[0].row_key), tuple(changes[0].after)),
            {**self._next_step(table), "changes": json.dumps([one._asdict() for one in changes])},
        )
        return len(changes)

    def fill(self, table: KeyedTable, kept: Any, sources: Mapping[str, Any]) -> None:
        """Give columns of a row the values of other rows, which are given by column."""
        execute_prepared(
            self.connection,
            _fill_sql(self.schema, table, sources),
            {
                **self._next_step(table.table),
                "kept": kept,
                **{f"from_{number}": id for number, id in enumerate(sources.values())},
            },
        )

    def repoint(
        self, reference: Reference, target: KeyedTable, old: Any, new: Any, skip: Sequence[str] = ()
    ) -> int:
        """Have rows that refer to one row refer to another; return how many they are.

        ``skip`` are identities of rows that stay as they are, as JSON.
        """
        result = execute_prepared(
            self.connection,
            _repoint_sql(self.schema, reference, target, bool(skip)),
            {
                **self._next_step(reference.table),
                "old": old,
                "new": new,
                **({"skip": list(skip)} if skip else {}),
            },
        )
        return int(result.rowcount)

    def delete(self, table: KeyedTable, ids: Sequence[Any]) -> int:
        """Delete rows of a table, keeping what they were; return how many they are."""
        result = execute_prepared(
            self.connection,
            f"""
WITH gone AS (DELETE FROM {table.table} AS t WHERE t.{quote(table.id)} = ANY ({table.ids("ids")})
              RETURNING jsonb_build_object({literal(table.id)}, t.{quote(table.id)}) AS row_key,
                        to_jsonb(t) AS before)
INSERT INTO {self.schema}.rollcall_change (merge_id, step, table_name, row_key, before)
SELECT %(merge)s, %(step)s, %(table)s, row_key, before FROM gone""",
            {**self._next_step(table.table), "ids": list(ids)},
        )
        return int(result.rowcount)

    def _next_step(self, table: str) -> dict[str, Any]:
        self.step += 1
        return {"merge": self.entry, "step": self.step, "table": table}


def _change_sql(schema: str, table: str, identity: Sequence[str], columns: Sequence[str]) -> str:
    """Return the statement that makes changes, given as a JSON array, and journals them."""
    assignments = ", ".join(f"{quote(name)} = r.{quote(name)}" for name in columns)
    return f"""
WITH change AS (
  SELECT c.* FROM jsonb_to_recordset(CAST(%(changes)s AS jsonb))
                  AS c (row_key jsonb, before jsonb, after jsonb)),
done AS (
  UPDATE {table} AS t SET {assignments}
    FROM change, jsonb_populate_record(NULL::{table}, row_key || after) AS r,
         jsonb_populate_record(NULL::{table}, row_key) AS k
   WHERE {_same("t", "k", identity)})
INSERT INTO {schema}.rollcall_change (merge_id, step, table_name, row_key, before, after)
SELECT %(merge)s, %(step)s, %(table)s, row_key, before, after FROM change"""


def _same(one: str, other: str, columns: Iterable[str]) -> str:
    return " AND ".join(f"{one}.{quote(name)} = {other}.{quote(name)}" for name in columns)


def _fill_sql(schema: str, table: KeyedTable, sources: Mapping[str, Any]) -> str:
    """Return the statement that fills columns of one row; values never leave the database."""
    id = quote(table.id)
    columns = [(quote(name), literal(name), f"d{number}") for number, name in enumerate(sources)]
    assignments = ", ".join(f"{name} = {row}.{name}" for name, _, row in columns)
    others = ", ".join(f"{table.table} AS {row}" for _, _, row in columns)
    chosen = " AND ".join(f"{row}.{id} = %(from_{row[1:]})s" for _, _, row in columns)
    before = ", ".join(f"{text}, o.{name}" for name, text, _ in columns)
    after = ", ".join(f"{text}, t.{name}" for name, text, _ in columns)
    return f"""
WITH filled AS (
  UPDATE {table.table} AS t SET {assignments} FROM {table.table} AS o, {others}
   WHERE t.{id} = %(kept)s AND o.{id} = t.{id} AND {chosen}
  RETURNING jsonb_build_object({literal(table.id)}, t.{id}) AS row_key,
            jsonb_build_object({before}) AS before, jsonb_build_object({after}) AS after)
INSERT INTO {schema}.rollcall_change (merge_id, step, table_name, row_key, before, after)
SELECT %(merge)s, %(step)s, %(table)s, row_key, before, after FROM filled"""


def _repoint_sql(schema: str, reference: Reference, target: KeyedTable, skipping: bool) -> str:
    """Return the statement that repoints rows from an old target to a new one.

    A row without an identity is written down as a whole, as it was and as it is.
    """
    id = quote(target.id)
    pairs = list(zip(reference.columns, reference.targets, strict=True))
    assignments = ", ".join(f"{quote(own)} = n.{quote(of)}" for own, of in pairs)
    before, after = (
        ", ".join(f"{literal(own)}, {row}.{quote(of)}" for own, of in pairs) for row in "on"
    )
    if reference.identity:
        row_key = identity_object(reference, "c")
        images = f"jsonb_build_object({before}) AS before, jsonb_build_object({after}) AS after"
    else:
        row_key = "CAST(NULL AS jsonb)"
        images = f"to_jsonb(c) || jsonb_build_object({before}) AS before, to_jsonb(c) AS after"
    row = row_key if reference.identity else "to_jsonb(c)"
    kept_out = f" AND {row} <> ALL (CAST(CAST(%(skip)s AS text[]) AS jsonb[]))" if skipping else ""
    return f"""
WITH moved AS (
  UPDATE {reference.table} AS c SET {assignments} FROM {target.table} AS o, {target.table} AS n
   WHERE o.{id} = %(old)s AND n.{id} = %(new)s AND {reference.matches("c", "o")}{kept_out}
  RETURNING {row_key} AS row_key, {images})
INSERT INTO {schema}.rollcall_change (merge_id, step, table_name, row_key, before, after)
SELECT %(merge)s, %(step)s, %(table)s, row_key, before, after FROM moved"""


def identity_object(reference: Reference, alias: str) -> str:
    """Return what tells a referring row from others, as a JSON object in SQL."""
    pairs = (f"{literal(name)}, {alias}.{quote(name)}" for name in reference.identity)
    return f"jsonb_build_object({', '.join(pairs)})"
