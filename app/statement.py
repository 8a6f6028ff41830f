"""The statement of get_or_create: from a model and a call's shape to SQL that is compiled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import (
    CTE,
    ColumnElement,
    CompoundSelect,
    Dialect,
    Select,
    and_,
    bindparam,
    exists,
    insert,
    null,
    or_,
    select,
    union_all,
)

from app.natural_key import canonical, columns_of, equals


class Shape(NamedTuple):
    """What two calls have in common that can be sent as the same SQL."""

    model: type[Any]
    spellings: tuple[int, ...]  # of each part of the natural key: 0 is NULL
    given: tuple[str, ...]  # the further columns that have a value
    by_token: bool = False


@dataclass(frozen=True)
class Plan:
    """A statement compiled for a dialect, with what converts values on the way in and out."""

    sql: str
    fixed: Mapping[str, Any]
    bind: Mapping[str, Callable[[Any], Any] | None]
    result: Mapping[str, Callable[[Any], Any] | None]

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the driver's parameters for the values of a call."""
        return {
            **self.fixed,
            **{name: _convert(self.bind[name], value) for name, value in values.items()},
        }

    def read(self, row: Sequence[Any]) -> dict[str, Any]:
        """Return a row's values by attribute."""
        return {
            name: _convert(convert, value)
            for (name, convert), value in zip(self.result.items(), row, strict=True)
        }


def _convert(convert: Callable[[Any], Any] | None, value: Any) -> Any:
    return value if convert is None else convert(value)


@lru_cache(maxsize=1024)
def plan_for(shape: Shape, dialect: Dialect) -> Plan:
    """Compile the statement of a shape, once."""
    columns = columns_of(shape.model)
    types = {name: column.type.dialect_impl(dialect) for name, column in columns.items()}
    compiled = build(shape).compile(dialect=dialect)
    parameters = _parameters(shape)
    return Plan(
        sql=str(compiled),
        fixed={name: value for name, value in compiled.params.items() if name not in parameters},
        bind={name: types[of].bind_processor(dialect) for name, of in parameters.items()},
        result={name: kind.result_processor(dialect, None) for name, kind in types.items()},
    )


def _parameters(shape: Shape) -> dict[str, str]:
    """Return the attribute that each parameter of the statement is a value of."""
    parts = zip(shape.model.__natural_key__, shape.spellings, strict=True)
    names = {
        f"key_{part}_{number}": attribute
        for part, (attribute, count) in enumerate(parts)
        for number in range(count)
    }
    names |= {f"given_{number}": attribute for number, attribute in enumerate(shape.given)}
    return names | {"token": "creation_token"}


def build(shape: Shape) -> CompoundSelect[Any]:
    """Build the statement: the canonical row of the key, or else the row that it inserts.

    ``matching`` is materialised so that the planner looks in the index of the key. It would not
    if it believed that walking the primary key in order finds a match sooner, and at SERIALIZABLE
    a walk locks every page that it reads.
    """
    columns = columns_of(shape.model)
    table = columns["creation_token"].table
    operands = _operands(shape)
    matching = _matching(shape, operands).cte("matching").prefix_with("MATERIALIZED")
    found = _oldest(shape, matching).cte("found")
    values = _inserted(shape, operands)
    created = (
        insert(table)
        .from_select(
            list(values),
            select(*values.values()).where(~exists(select(found))),
            include_defaults=False,
        )
        .returning(*columns.values())
        .cte("created")
    )
    return union_all(select(*found.columns), select(*created.columns))


Operands = Mapping[str, list[ColumnElement[Any]]]


def _operands(shape: Shape) -> Operands:
    """Return, by attribute, what the statement compares with or stores: spellings, or a value."""
    key = shape.model.__natural_key__
    operands: dict[str, list[ColumnElement[Any]]] = {name: [] for name in key}
    for parameter, attribute in _parameters(shape).items():
        column = columns_of(shape.model)[attribute]
        value = bindparam(parameter, type_=column.type)
        operands.setdefault(attribute, []).append(canonical(column, value))
    return operands


def _matching(shape: Shape, operands: Operands) -> Select[Any]:
    columns = columns_of(shape.model)
    wanted = and_(*(equals(columns[name], operands[name]) for name in shape.model.__natural_key__))
    if shape.by_token:
        wanted = or_(wanted, equals(columns["creation_token"], operands["creation_token"]))
    return select(*columns.values()).where(columns["duplicate_of_id"].is_(None), wanted)


def _oldest(shape: Shape, matching: CTE) -> Select[Any]:
    columns = columns_of(shape.model)
    (primary_key,) = columns["creation_token"].table.primary_key
    order: list[ColumnElement[Any]] = [matching.columns[primary_key.key]]
    if shape.by_token:
        token = bindparam("token", type_=columns["creation_token"].type)
        order.insert(0, matching.columns["creation_token"].is_distinct_from(token))
    return select(*matching.columns).order_by(*order).limit(1)


def _inserted(shape: Shape, operands: Operands) -> dict[str, ColumnElement[Any]]:
    """Return what to store, by column name: the first spelling, the values, SQL defaults."""
    values = {}
    for attribute, column in columns_of(shape.model).items():
        default: Any = column.default
        if attribute in operands:
            values[column.name] = operands[attribute][0] if operands[attribute] else null()
        elif default is not None:
            values[column.name] = default.next_value() if default.is_sequence else default.arg
    return values
