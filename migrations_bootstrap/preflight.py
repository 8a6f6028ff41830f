"""Names what keeps an existing table from being adopted, before anything is changed."""

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, text
from sqlalchemy.types import TypeEngine

from migrations_bootstrap import catalogue
from migrations_bootstrap.catalogue import Column, Definition, Table, qualified

LARGEST_KEY = 2600
"""Bytes as stored; a b-tree entry may have 2,704, its header and the other columns included."""

UNIQUE_ID = (
    Definition(("id",), unique=True),
    Definition(("id",), unique=True, nulls_not_distinct=True),
)

FITTING: dict[type[TypeEngine[Any]], tuple[str, ...]] = {
    sa.BigInteger: ("bigint", "integer"),
    sa.String: ("character varying", "text"),
    sa.Date: ("date",),
    sa.DateTime: ("timestamp with time zone", "timestamp without time zone"),
    sa.Uuid: ("uuid",),
}


def problems(connection: Connection, metadata: sa.MetaData) -> list[str]:
    """Return every reason why the tables that are there cannot become those of `metadata`."""
    found = _schema_problems(connection)
    for wanted in metadata.sorted_tables:
        table = catalogue.find_table(connection, wanted.name)
        if table is not None:
            found += _table_problems(connection, table, wanted)
    return found


def _schema_problems(connection: Connection) -> list[str]:
    statement = "SELECT current_schema(), has_schema_privilege(current_schema(), 'CREATE')"
    schema, allowed = connection.execute(text(statement)).one()
    return [] if allowed else [f"no right to create tables in schema {schema}"]


def _table_problems(connection: Connection, table: Table, wanted: sa.Table) -> list[str]:
    if not table.ordinary:
        return [f"{table.name} is not an ordinary table"]
    columns = catalogue.columns(connection, table)
    found = [*_right_problems(table), *_column_problems(columns, wanted)]
    # What the rows hold can be asked only of columns that are there and may be read.
    if table.owned and all(name in columns for name in required(wanted)):
        found += _row_problems(connection, table, columns, wanted)
    return found


def required(wanted: sa.Table) -> list[str]:
    """Return the columns that a table must bring along: its id and its natural key."""
    return [column.name for column in wanted.columns if not column.nullable]


def _right_problems(table: Table) -> Iterator[str]:
    if not table.owned:
        yield f"{table.name} belongs to a role that this one is not a member of"
    if not table.extensible:
        yield f"no right to create indexes in schema {table.schema}, which {table.name} is in"
    if table.hides_rows:
        yield f"{table.name} hides rows from this role (row level security)"


def _column_problems(columns: dict[str, Column], wanted: sa.Table) -> Iterator[str]:
    for name in required(wanted):
        if name not in columns:
            yield f"{wanted.name} has no column {name}"
    for column in columns.values():
        where = f"{wanted.name}.{column.name}"
        if column.name in wanted.columns:
            yield from _fit_problems(where, column, wanted.columns[column.name])
        elif column.not_null and column.writable and not column.default and not column.identity:
            yield f"{where} is NOT NULL without a default: nothing could be inserted"


def _fit_problems(where: str, column: Column, wanted: sa.Column[Any]) -> Iterator[str]:
    fitting = next(names for kind, names in FITTING.items() if isinstance(wanted.type, kind))
    if column.type not in fitting:
        yield f"{where} is {column.type}, not {' or '.join(fitting)}"
    if not column.writable and not (wanted.primary_key and column.identity):
        yield f"{where} is generated and cannot be written"
    if _refuses_null(column, wanted):
        yield f"{where} is NOT NULL, but is to be empty in most rows"


def _refuses_null(column: Column, wanted: sa.Column[Any]) -> bool:
    """Tell whether inserts that leave `column` out would fail; an own default may save them."""
    saved = column.default or wanted.server_default is not None
    return bool(column.not_null and wanted.nullable and (wanted.foreign_keys or not saved))


def _row_problems(
    connection: Connection, table: Table, columns: dict[str, Column], wanted: sa.Table
) -> Iterator[str]:
    source = qualified(connection, table)
    if not columns["id"].not_null and (rows := _count(connection, source, "id IS NULL")):
        yield f"{table.name}.id is NULL in {rows} rows"
    if not has_unique_id(connection, table):
        groups = f"(SELECT FROM {source} WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1) AS g"
        if rows := _count(connection, groups, "true"):
            yield f"{table.name}.id has {rows} values that are there more than once"
    quoted = connection.dialect.identifier_preparer.quote_identifier
    size = " + ".join(f"coalesce(pg_column_size({quoted(name)}), 0)" for name in required(wanted))
    if rows := _count(connection, source, f"{size} > {LARGEST_KEY}"):
        yield f"{table.name} has {rows} rows with a key too long to be indexed"


def has_unique_id(connection: Connection, table: Table) -> bool:
    """Tell whether a foreign key may refer to the id of the table."""
    return any(
        index.usable and index.definition in UNIQUE_ID
        for index in catalogue.indexes(connection, table).values()
    )


def _count(connection: Connection, source: str, condition: str) -> int:
    # Quoted names and our own words only.
    statement = f"SELECT count(*) FROM {source} WHERE {condition}"  # noqa: S608
    return int(connection.exec_driver_sql(statement).scalar_one())
