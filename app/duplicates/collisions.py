"""What keeps rows from being repointed: they would be as others are, or refer to themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from app.duplicates.journal import identity_object
from app.duplicates.tables import KeyedTable, Reference, quote
from migrations_bootstrap.catalogue import Definition


class Collision(NamedTuple):
    """Rows of a table that a merge would bring together, or one that it would lead to itself."""

    table: str
    reason: str
    first: Any  # the identity of the row that is in the others' way, if it is one
    others: Sequence[Any]  # of those that cannot be repointed


def find_collisions(
    connection: Connection, reference: Reference, target: KeyedTable, kept: Any, ids: Sequence[Any]
) -> list[Collision]:
    """Return what would collide if rows that refer to any of ``ids`` referred to ``kept``.

    Where a constraint is of another kind than a unique index on columns, the database says so.
    """
    found = []
    for unique in reference.uniques:
        rows = connection.exec_driver_sql(
            _sql(reference, target, unique), {"kept": kept, "ids": [kept, *ids]}
        )
        reason = f"unique ({', '.join(map(str, unique.columns))})"
        for ((first, *others),) in rows:
            found.append(Collision(reference.table_name, reason, first, others))
    return found


def _sql(reference: Reference, target: KeyedTable, unique: Definition) -> str:
    row = identity_object(reference, "c") if reference.identity else "to_jsonb(c)"
    others = [f"c.{quote(str(name))}" for name in unique.columns if name not in reference.columns]
    comparable = [] if unique.nulls_not_distinct else [f"{name} IS NOT NULL" for name in others]
    rows = f"SELECT * FROM {reference.table} AS c"
    return f"""
SELECT jsonb_agg({row} ORDER BY o.{quote(target.id)} = %(kept)s DESC, {row})
  FROM ({rows} WHERE {(unique.predicate or "true").replace("%", "%%")}) AS c
  JOIN {target.table} AS o ON {reference.matches("c", "o")}
 WHERE {" AND ".join([f"o.{quote(target.id)} = ANY ({target.ids('ids')})", *comparable])}
 GROUP BY {", ".join(others) or "()"} HAVING count(*) > 1"""


def from_error(error: IntegrityError) -> Collision:
    """Return what the database refused: the constraint, for its own words quote stored values."""
    diagnostics: Any = getattr(error.orig, "diag", None)
    reason = f"constraint {diagnostics.constraint_name}"
    return Collision(str(diagnostics.table_name), reason, None, ())
