"""Tables with a natural key as the database has them, and what refers to their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Column, Connection, Table, inspect, literal_column, text
from sqlalchemy.dialects.postgresql import psycopg2
from sqlalchemy.orm import Mapper

from app.errors import UnknownReference, UnknownTable
from app.get_or_create import GetOrCreateMixin
from app.natural_key import columns_of
from migrations_bootstrap import catalogue, normalised
from migrations_bootstrap.census import TEXT_TYPES

Model = type[GetOrCreateMixin]

dialect = psycopg2.dialect()  # type: ignore[no-untyped-call]


def quote(name: str) -> str:
    """Return a name as SQL that is sent with parameters."""
    return dialect.identifier_preparer.quote_identifier(name)


def as_value(sql: str) -> str:
    """Return SQL that is sent with parameters, such as a quoted name, as one of the parameters."""
    return sql.replace("%%", "%")


def literal(value: str) -> str:
    """Return a string as SQL that is sent with parameters."""
    return "'{}'".format(value.replace("'", "''").replace("%", "%%"))


def blank_as_null(name: str, alias: str) -> str:
    """Return a column as text; what is nothing but white space counts as NULL."""
    return f"nullif(btrim({alias}.{quote(name)}::text), '')"


class SoftReference(NamedTuple):
    """A column that refers to the id of a table's rows without a foreign key."""

    table: str  # may have its schema in front: audit.entry
    column: str
    target: str  # the table of a model


@dataclass(frozen=True)
class Reference:
    """Columns of a table, by which its rows refer to rows of another.

    ``identity`` tells the table's rows apart: its primary key, or columns that are unique and never
    NULL; where it has neither it is empty. Without an index each look for referring rows reads the
    whole table.
    """

    name: str  # such as ticket.employee_id
    oid: int
    schema: str
    bare_name: str
    table: str  # as SQL
    columns: tuple[str, ...]
    targets: tuple[str, ...]  # the columns that they refer to
    identity: tuple[str, ...]
    indexed: bool
    uniques: tuple[catalogue.Definition, ...]  # the unique indexes that have one of the columns

    @property
    def table_name(self) -> str:
        """The name that a person knows the table by."""
        return self.name.rpartition(".")[0]

    def matches(self, alias: str, target: str) -> str:
        """Return the condition that a row refers to a target row, both given by their alias."""
        pairs = zip(self.columns, self.targets, strict=True)
        return " AND ".join(f"{alias}.{quote(own)} = {target}.{quote(of)}" for own, of in pairs)


@dataclass(frozen=True, eq=False)
class KeyedTable:
    """The table of a model. ``details`` are the columns that people fill in, the key left out."""

    model: Any  # None for a table without a natural key
    oid: int
    name: str
    schema: str  # as SQL
    journal: str  # the schema of the journal, as SQL: one for all tables that belong together
    table: str  # as SQL
    id: str
    id_type: str
    mark: str  # the column of duplicate_of_id
    key: tuple[str, ...]
    texts: frozenset[str]  # the columns of the key that are normalised
    parents: Mapping[str, int]  # by column of the key, the keyed table that it refers to
    details: tuple[str, ...]
    references: tuple[Reference, ...]
    utf8: bool

    def ids(self, parameter: str) -> str:
        """Return a parameter that is a list of ids, as SQL."""
        return f"CAST(CAST(%({parameter})s AS text[]) AS {self.id_type}[])"

    def detail(self, name: str) -> str:
        """Return a detail of rows ``t`` as text to compare; one that refers to a row of this table
        itself is that row's canonical one."""
        own = [one for one in self.references if one.oid == self.oid and one.columns == (name,)]
        if not own or own[0].targets != (self.id,) or not self.mark:
            return blank_as_null(name, "t")
        kept = f"SELECT other.{quote(self.mark)} FROM {self.table} AS other"
        value = f"t.{quote(name)}"
        return f"coalesce(({kept} WHERE other.{quote(self.id)} = {value}), {value})::text"

    def normalised(self, name: str, alias: str) -> str:
        """Return a column of the key as new rows are stored, as SQL."""
        stored = f"{alias}.{quote(name)}"
        if name not in self.texts:
            return stored
        expression = normalised(literal_column(stored), utf8=self.utf8)
        return str(expression.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


class Tables:
    """The keyed tables of an application, by the oid of each."""

    def __init__(self, tables: Iterable[KeyedTable]) -> None:
        self.by_oid = {table.oid: table for table in tables}

    def of(self, model: Model) -> KeyedTable:
        """Return the table of a model. Raises UnknownTable where it is not in the database."""
        for table in self.by_oid.values():
            if table.model is model:
                return table
        raise UnknownTable(f"there is no table {inspect(model).local_table.name}")

    def parents(self, table: KeyedTable) -> list[KeyedTable]:
        """Return the keyed tables that the table's key refers to, other than itself."""
        oids = dict.fromkeys(table.parents.values())
        return [self.by_oid[oid] for oid in oids if oid != table.oid]

    def in_order(self, table: KeyedTable) -> list[KeyedTable]:
        """Return the tables that the table's key refers to, directly or not, and then itself."""
        before = [one for parent in self.parents(table) for one in self.in_order(parent)]
        return list(dict.fromkeys([*before, table]))

    def key(self, table: KeyedTable, name: str) -> str:
        """Return a column of the key of rows ``t`` as new rows are stored, as SQL.

        References are led to canonical rows.
        """
        parent = self.by_oid.get(table.parents.get(name, 0))
        if parent is None:
            return table.normalised(name, "t")
        kept = f"SELECT p.{quote(parent.mark)} FROM {parent.table} AS p"
        value = f"t.{quote(name)}"
        return f"coalesce(({kept} WHERE p.{quote(parent.id)} = {value}), {value})"

    def children(self, table: KeyedTable) -> list[tuple[KeyedTable, str]]:
        """Return the keyed tables whose key refers to the table, and their column that does."""
        return [
            (child, name)
            for child in self.by_oid.values()
            for name, oid in child.parents.items()
            if oid == table.oid and child.oid != oid
        ]


def read_tables(
    connection: Connection, model: Model, soft_references: Sequence[SoftReference] = ()
) -> Tables:
    """Return the tables of the model and of all others with a natural key that belong to it.

    Raises UnknownTable for one without the mixin's columns, and UnknownReference for a soft
    reference that is none.
    """
    found = {}
    for candidate in _models_with(model):
        local: Table = inspect(candidate).local_table
        table = catalogue.find_table(connection, local.name, local.schema)
        if table is not None:
            found[candidate] = table
    names = {table.name for table in found.values()}
    for soft in soft_references:
        if soft.target not in names:
            raise UnknownReference(f"{soft.table}.{soft.column}: there is no table {soft.target}")
    utf8 = connection.scalar(text("SHOW server_encoding")) == "UTF8"
    journal = quote(min(found.values(), key=lambda table: table.name).schema) if found else ""
    return Tables(
        _read(connection, candidate, found, journal, utf8, soft_references) for candidate in found
    )


def _models_with(model: Model) -> Iterator[Model]:
    mapper: Mapper[GetOrCreateMixin] = inspect(model)
    for other in mapper.registry.mappers:
        if issubclass(other.class_, GetOrCreateMixin):
            yield other.class_


def _read(
    connection: Connection,
    model: Model,
    found: Mapping[Model, catalogue.Table],
    journal: str,
    utf8: bool,
    soft_references: Sequence[SoftReference],
) -> KeyedTable:
    table = found[model]
    named = columns_of(model)
    there = catalogue.columns(connection, table)
    (primary_key,) = inspect(model).primary_key
    key = tuple(named[attribute].name for attribute in model.__natural_key__)
    mark = named["duplicate_of_id"].name
    missing = [name for name in (primary_key.name, *key, mark) if name not in there]
    if missing:
        raise UnknownTable(f"the table {table.name} has no column {missing[0]}")
    kept_by_us = {mark, named["creation_token"].name, primary_key.name, *key}
    kept_by_us |= {named[attribute].name for attribute in model.__bookkeeping__}
    return KeyedTable(
        model=model,
        oid=table.oid,
        name=table.name,
        schema=quote(table.schema),
        journal=journal,
        table=catalogue.qualified(connection, table),
        id=primary_key.name,
        id_type=there[primary_key.name].type,
        mark=mark,
        key=key,
        texts=frozenset(name for name in key if there[name].type in TEXT_TYPES),
        parents=dict(_parents(model, found)),
        details=tuple(
            name for name, own in there.items() if own.writable and name not in kept_by_us
        ),
        references=tuple(
            reference
            for reference in (
                *_foreign_keys(connection, table),
                *_soft_references(connection, table, primary_key.name, soft_references),
            )
            if (reference.oid, reference.columns) != (table.oid, (mark,))
        ),
        utf8=utf8,
    )


def _parents(model: Model, found: Mapping[Model, catalogue.Table]) -> Iterator[tuple[str, int]]:
    tables = {inspect(other).local_table: table.oid for other, table in found.items()}
    for attribute in model.__natural_key__:
        column: Column[object] = columns_of(model)[attribute]
        for foreign_key in column.foreign_keys:
            if foreign_key.column.table in tables and foreign_key.column.primary_key:
                yield column.name, tables[foreign_key.column.table]


def plain_table(connection: Connection, tables: Tables, reference: Reference) -> KeyedTable | None:
    """Return the table that a reference is in, though it may have no natural key.

    None where no single column tells its rows apart.
    """
    if reference.oid in tables.by_oid:
        return tables.by_oid[reference.oid]
    if len(reference.identity) != 1:
        return None
    table = catalogue.Table(reference.oid, reference.schema, reference.bare_name, *[True] * 4)
    (id,) = reference.identity
    there = catalogue.columns(connection, table)
    constrained = {name for unique in reference.uniques for name in unique.columns}
    return KeyedTable(
        model=None,
        oid=table.oid,
        name=reference.table_name,
        schema=quote(table.schema),
        journal="",
        table=reference.table,
        id=id,
        id_type=there[id].type,
        mark="",
        key=(),
        texts=frozenset(),
        parents={},
        details=tuple(
            name
            for name, own in there.items()
            if own.writable and name not in constrained and name not in (id, *reference.columns)
        ),
        references=tuple(_foreign_keys(connection, table)),
        utf8=True,
    )


# A partition's constraint is its parent's; rows are reached by way of the parent.
FOREIGN_KEYS = text("""
    SELECT c.oid, n.nspname, c.relname, pg_table_is_visible(c.oid),
           array(SELECT a.attname::text
                   FROM unnest(k.conkey) WITH ORDINALITY AS u(attnum, position)
                   JOIN pg_attribute AS a ON a.attrelid = k.conrelid AND a.attnum = u.attnum
                  ORDER BY u.position),
           array(SELECT a.attname::text
                   FROM unnest(k.confkey) WITH ORDINALITY AS u(attnum, position)
                   JOIN pg_attribute AS a ON a.attrelid = k.confrelid AND a.attnum = u.attnum
                  ORDER BY u.position)
      FROM pg_constraint AS k
      JOIN pg_class AS c ON c.oid = k.conrelid
      JOIN pg_namespace AS n ON n.oid = c.relnamespace
     WHERE k.confrelid = :oid AND k.contype = 'f' AND k.conparentid = 0
     ORDER BY n.nspname, c.relname, k.conname
""")

SOFT = text("""
    SELECT c.oid, n.nspname, c.relname, pg_table_is_visible(c.oid)
      FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
      JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = :column AND NOT a.attisdropped
     WHERE c.oid = to_regclass(:table)
""")

IDENTITY = text("""
    SELECT array(SELECT a.attname::text FROM pg_attribute AS a
                  WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey) ORDER BY a.attnum)
      FROM pg_index AS i
     WHERE i.indrelid = :oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
       AND i.indexprs IS NULL AND i.indnkeyatts = i.indnatts
       AND NOT EXISTS (SELECT FROM pg_attribute AS a
                        WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
                          AND NOT a.attnotnull)
     ORDER BY i.indisprimary DESC, i.indnatts, i.indexrelid
     LIMIT 1
""")

IS_INDEXED = text("""
    SELECT EXISTS (SELECT FROM pg_index AS i
                     JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                    WHERE i.indrelid = :oid AND i.indisvalid AND a.attname = ANY (:columns))
""")


def _foreign_keys(connection: Connection, table: catalogue.Table) -> Iterator[Reference]:
    """Return what pg_constraint knows to refer to the table, in whatever schema."""
    seen = set()
    for oid, schema, name, visible, columns, targets in connection.execute(
        FOREIGN_KEYS, {"oid": table.oid}
    ):
        if (oid, tuple(columns)) not in seen:
            seen.add((oid, tuple(columns)))
            yield _reference(connection, (oid, schema, name, visible), columns, targets)


def _soft_references(
    connection: Connection, table: catalogue.Table, id: str, declared: Sequence[SoftReference]
) -> Iterator[Reference]:
    for soft in declared:
        if soft.target == table.name:
            found = connection.execute(SOFT, {"table": soft.table, "column": soft.column})
            row = found.one_or_none()
            if row is None:
                raise UnknownReference(f"there is no column {soft.table}.{soft.column}")
            yield _reference(connection, tuple(row), [soft.column], [id])


def _reference(
    connection: Connection,
    table: tuple[int, str, str, bool],
    columns: Sequence[str],
    targets: Sequence[str],
) -> Reference:
    oid, schema, name, visible = table
    shown = name if visible else f"{schema}.{name}"
    identity: Sequence[str] | None = connection.scalar(IDENTITY, {"oid": oid})
    return Reference(
        name=f"{shown}.{'+'.join(columns)}",
        oid=oid,
        schema=schema,
        bare_name=name,
        table=f"{quote(schema)}.{quote(name)}",
        columns=tuple(columns),
        targets=tuple(targets),
        identity=tuple(identity or ()),
        indexed=bool(connection.scalar(IS_INDEXED, {"oid": oid, "columns": list(columns)})),
        uniques=tuple(_uniques(connection, oid, columns)),
    )


def _uniques(
    connection: Connection, oid: int, columns: Sequence[str]
) -> Iterator[catalogue.Definition]:
    """Return the unique indexes that a change of the columns can violate, save expressions."""
    for index in catalogue.indexes_of(connection, oid).values():
        definition = index.definition
        touched = not set(columns).isdisjoint(definition.columns)
        if definition.unique and touched and None not in definition.columns:
            yield definition
