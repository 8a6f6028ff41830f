"""What pg_catalog says about a table: columns, foreign keys, indexes.

Read from the catalogue and not through SQLAlchemy's inspector, which shows neither an invalid
index nor a foreign key that the models do not know.
"""

from dataclasses import dataclass

from sqlalchemy import Connection, text

from migrations_bootstrap.errors import BootstrapError


@dataclass(frozen=True)
class Table:
    """A relation, found on the search_path by its bare name unless its schema was given."""

    oid: int
    schema: str
    name: str
    ordinary: bool
    owned: bool
    extensible: bool
    hides_rows: bool


@dataclass(frozen=True)
class Column:
    """A column as it is; `type` is the bare name of its type, `quoted` as PostgreSQL would."""

    name: str
    quoted: str
    type: str
    not_null: bool
    default: bool
    identity: bool
    writable: bool


@dataclass(frozen=True)
class ForeignKey:
    """The columns of a foreign key, in its order, and the oid of the table they refer to."""

    columns: tuple[str, ...]
    target: int


@dataclass(frozen=True)
class Definition:
    """What makes an index the one that is wanted; `columns` holds None for an expression.

    `predicate` is written as PostgreSQL gives it back. A deferrable index is not `unique` here: no
    foreign key may refer to it.
    """

    columns: tuple[str | None, ...]
    predicate: str | None = None
    unique: bool = False
    nulls_not_distinct: bool = False
    method: str = "btree"


@dataclass(frozen=True)
class Index:
    """An index as it is; one that is not `usable` was left by a build that failed."""

    name: str
    primary: bool
    usable: bool
    definition: Definition


# "Ordinary" leaves out views, partitioned and foreign tables, partitions, parents and children of
# inheritance, typed and unlogged or temporary tables: none can hold what the guard promises.
TABLE = text("""
    SELECT c.oid, n.nspname, c.relname,
           c.relkind = 'r' AND c.relpersistence = 'p' AND c.reloftype = 0 AND NOT EXISTS (
               SELECT FROM pg_inherits WHERE c.oid IN (inhrelid, inhparent)),
           pg_has_role(c.relowner, 'USAGE'),
           has_schema_privilege(n.oid, 'CREATE'),
           row_security_active(c.oid)
      FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
     WHERE c.oid = to_regclass(concat(quote_ident(:schema) || '.', quote_ident(:name)))
""")

COLUMNS = text("""
    SELECT a.attname, quote_ident(a.attname), format_type(a.atttypid, NULL), a.attnotnull,
           a.atthasdef, a.attidentity <> '', a.attgenerated = '' AND a.attidentity <> 'a'
      FROM pg_attribute AS a
     WHERE a.attrelid = :oid AND a.attnum > 0 AND NOT a.attisdropped
     ORDER BY a.attnum
""")

FOREIGN_KEYS = text("""
    SELECT array(SELECT a.attname::text
                   FROM unnest(k.conkey) WITH ORDINALITY AS u(attnum, position)
                   JOIN pg_attribute AS a ON a.attrelid = k.conrelid AND a.attnum = u.attnum
                  ORDER BY u.position),
           k.confrelid
      FROM pg_constraint AS k
     WHERE k.conrelid = :oid AND k.contype = 'f'
     ORDER BY k.conname
""")

INDEXES = text("""
    SELECT c.relname, i.indisprimary, i.indisvalid AND i.indisready,
           array(SELECT a.attname::text
                   FROM unnest(i.indkey) WITH ORDINALITY AS u(attnum, position)
                   LEFT JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = u.attnum
                        AND u.attnum <> 0
                  WHERE u.position <= i.indnkeyatts
                  ORDER BY u.position),
           pg_get_expr(i.indpred, i.indrelid), i.indisunique AND i.indimmediate,
           i.indnullsnotdistinct, m.amname
      FROM pg_index AS i
      JOIN pg_class AS c ON c.oid = i.indexrelid
      JOIN pg_am AS m ON m.oid = c.relam
     WHERE i.indrelid = :oid
     ORDER BY c.relname
""")


def find_table(connection: Connection, name: str, schema: str | None = None) -> Table | None:
    """Return what `name` stands for, on the search_path or in a schema; None: for nothing."""
    row = connection.execute(TABLE, {"name": name, "schema": schema}).one_or_none()
    return None if row is None else Table(*row)


def get_table(connection: Connection, name: str) -> Table:
    """Return what `name` stands for on the search_path; a BootstrapError where that is nothing."""
    table = find_table(connection, name)
    if table is None:
        raise BootstrapError(f"there is no table {name!r} on the search path")
    return table


def columns(connection: Connection, table: Table) -> dict[str, Column]:
    """Return the columns by name, in the order of the table."""
    rows = connection.execute(COLUMNS, {"oid": table.oid})
    return {row[0]: Column(*row) for row in rows}


def foreign_keys(connection: Connection, table: Table) -> list[ForeignKey]:
    """Return the foreign keys that the table has, not those that refer to it."""
    rows = connection.execute(FOREIGN_KEYS, {"oid": table.oid})
    return [ForeignKey(tuple(names), target) for names, target in rows]


def indexes(connection: Connection, table: Table) -> dict[str, Index]:
    """Return the indexes by name, those of a failed build too."""
    return indexes_of(connection, table.oid)


def indexes_of(connection: Connection, oid: int) -> dict[str, Index]:
    """Return the indexes of the table with this oid, as indexes() does."""
    rows = connection.execute(INDEXES, {"oid": oid})
    return {
        name: Index(name, primary, usable, Definition(tuple(names), *rest))
        for name, primary, usable, names, *rest in rows
    }


def qualified(connection: Connection, table: Table, name: str | None = None) -> str:
    """Return the table, or something called `name` in its schema, quoted for a statement."""
    quoted = connection.dialect.identifier_preparer.quote_identifier
    return f"{quoted(table.schema)}.{quoted(name or table.name)}"
