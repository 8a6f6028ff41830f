"""How rows are compared with a natural key: spellings, NULLs, and references to duplicates."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Column, ColumnElement, FromClause, any_, func, inspect, select
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.orm import Mapper


def normalise(value: Any) -> Any:
    """Return a string in NFC, trimmed, inner white space folded to a blank; others as they are."""
    if not isinstance(value, str):
        return value
    return " ".join(unicodedata.normalize("NFC", value).split())


def spellings(value: Any) -> tuple[Any, ...]:
    """Return what a value of a key is looked up as: normalised, and as sent if that differs."""
    if value is None:
        return ()
    normalised = normalise(value)
    return (normalised,) if normalised == value else (normalised, value)


def columns_of(model: type[Any]) -> Mapping[str, Column[Any]]:
    """Return the model's own columns by the name of their attribute."""
    mapper: Mapper[Any] = inspect(model)
    return _columns_of(mapper)


@lru_cache(maxsize=256)
def _columns_of(mapper: Mapper[Any]) -> Mapping[str, Column[Any]]:
    columns = {attribute.key: attribute.columns[0] for attribute in mapper.column_attrs}
    return {key: column for key, column in columns.items() if isinstance(column, Column)}


def canonical(
    column: ColumnElement[Any], value: ColumnElement[Any], given_by: FromClause | None = None
) -> ColumnElement[Any]:
    """Lead a reference to a duplicate to its canonical row, within the statement.

    Two employees of one key would otherwise be canonical side by side, one of them under a
    duplicate of their department. An unknown id stays as it is, for the foreign key to refuse.
    ``given_by`` is what the value is a column of, if it is one.
    """
    targets = (foreign_key.column for foreign_key in column.foreign_keys)
    target = next((to for to in targets if "duplicate_of_id" in to.table.columns), None)
    if target is None:
        return value
    kept = func.coalesce(target.table.columns["duplicate_of_id"], target)
    row = select(kept).where(target == value).correlate(given_by).scalar_subquery()
    return func.coalesce(row, value)


def equals(
    column: ColumnElement[Any], operands: Sequence[ColumnElement[Any]]
) -> ColumnElement[bool]:
    """Compare with any of the operands; none means NULL.

    ``IS NOT DISTINCT FROM`` would be one expression for all, but PostgreSQL uses no index for it.
    """
    if not operands:
        return column.is_(None)
    if len(operands) == 1:
        return column == operands[0]
    return column == any_(array(operands))
