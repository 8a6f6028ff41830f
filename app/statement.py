"""The statements of get_or_create: from a model and a call's shape to SQL that is compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    CTE,
    Boolean,
    Column,
    ColumnElement,
    CompoundSelect,
    Dialect,
    Enum,
    FromClause,
    Select,
    String,
    Table,
    Text,
    TypeDecorator,
    bindparam,
    cast,
    exists,
    func,
    insert,
    literal_column,
    null,
    select,
    true,
    union_all,
)
from sqlalchemy.orm import Mapper
from sqlalchemy.types import TypeEngine

from app.call import Call
from app.creation_token import span
from app.natural_key import canonical, columns_of, equals
from app.transactions import StatementText, after_lists


@dataclass(frozen=True)
class Plan:
    """A statement compiled for a dialect, with what converts values on the way in and out."""

    text: StatementText
    fixed: Mapping[str, Any]
    bind: Mapping[str, Callable[[Any], Any]]  # of the parameters that need converting
    names: Sequence[str]
    result: Mapping[str, Callable[[Any], Any]]  # of the attributes that need converting

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the driver's parameters for the values of a call."""
        return _convert({**self.fixed, **values}, self.bind)

    def read(self, row: Iterable[Any]) -> dict[str, Any]:
        """Return a row's values by attribute."""
        return _convert(dict(zip(self.names, row, strict=True)), self.result)


def _convert(values: dict[str, Any], by: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    for name, convert in by.items():
        values[name] = convert(values[name])
    return values


def _compile(
    statement: CompoundSelect[Any] | Select[Any],
    types: Mapping[str, TypeEngine[Any]],
    returned: Mapping[str, Column[Any]],
    dialect: Dialect,
    at_once: CompoundSelect[Any] | Select[Any] | None = None,
) -> Plan:
    """Compile a statement, given the types of its parameters and the columns that it returns.

    ``at_once`` is it as it is sent alone, where it can be: its parameters are in the same order.
    """
    compiled = statement.compile(dialect=dialect)
    alone = None if at_once is None else str(at_once.compile(dialect=dialect))
    columns = {name: column.type for name, column in returned.items()}
    tables = {sql_name(column.table, dialect) for column in returned.values()}
    order = tuple(compiled.positiontup or compiled.params)
    return Plan(
        text=StatementText(str(compiled), order, after_lists(tables), dialect.positional, alone),
        fixed={name: value for name, value in compiled.params.items() if name not in types},
        bind=_needed(types, lambda kind: kind.bind_processor(dialect), dialect),
        names=tuple(columns),
        result=_needed(columns, lambda kind: kind.result_processor(dialect, None), dialect),
    )


def sql_name(table: FromClause, dialect: Dialect) -> str:
    """Return how a table is called in SQL."""
    assert isinstance(table, Table)  # noqa: S101 - a mapped column's is; tells mypy so
    return dialect.identifier_preparer.format_table(table)


def _needed(
    types: Mapping[str, TypeEngine[Any]],
    processor: Callable[[TypeEngine[Any]], Callable[[Any], Any] | None],
    dialect: Dialect,
) -> dict[str, Callable[[Any], Any]]:
    """Return, by name, how values are converted, where the driver does not do it all."""
    processors = ((name, processor(kind.dialect_impl(dialect))) for name, kind in types.items())
    return {name: convert for name, convert in processors if convert is not None}


def key_parameter(part: int, spelling: int) -> str:
    """Return the name of the parameter for a spelling of a part of the key."""
    return f"key_{part}_{spelling}"


def given_parameter(number: int) -> str:
    """Return the name of the parameter for a further column."""
    return f"given_{number}"


# One token, or the lowest and the highest of those that stand for the same request.
TOKEN = ("token",)
TOKENS = ("token", "token_lowest", "token_highest")


def _parameters(
    model: type[Any],
    spellings: Sequence[int],
    given: Sequence[str],
    tokens: Sequence[str] = TOKEN,
) -> dict[str, str]:
    """Return the attribute that each parameter of a statement is a value of."""
    names = {
        key_parameter(part, number): attribute
        for part, (attribute, count) in enumerate(
            zip(model.__natural_key__, spellings, strict=True)
        )
        for number in range(count)
    }
    names |= {given_parameter(number): attribute for number, attribute in enumerate(given)}
    return names | dict.fromkeys(tokens, "creation_token")


Operands = Mapping[str, list[ColumnElement[Any]]]


def _operands(
    model: type[Any], parameters: Mapping[str, str], values: Mapping[str, ColumnElement[Any]]
) -> Operands:
    """Return, by attribute, what a statement compares with or stores: spellings, or a value."""
    operands: dict[str, list[ColumnElement[Any]]] = {name: [] for name in model.__natural_key__}
    for parameter, attribute in parameters.items():
        operands.setdefault(attribute, []).append(values[parameter])
    return operands


class Shape(NamedTuple):
    """What two calls have in common that can be sent as the same SQL."""

    model: type[Any]
    spellings: tuple[int, ...]  # of each part of the natural key: 0 is NULL
    given: tuple[str, ...]  # the further columns that have a value
    by_token: bool

    @property
    def parameters(self) -> dict[str, str]:
        """The attribute that each parameter of the statement is a value of."""
        tokens = TOKENS if self.by_token else TOKEN
        return _parameters(self.model, self.spellings, self.given, tokens)


def shape_of(model: type[Any], call: Call, by_token: bool) -> Shape:
    """Return the shape of a call."""
    return Shape(model, tuple(map(len, call.key)), tuple(call.given), by_token)


def values_of(call: Call, by_token: bool = False) -> dict[str, Any]:
    """Return the values of a call by parameter."""
    values: dict[str, Any] = tokens_of(call.token) if by_token else {"token": call.token}
    for part, texts in enumerate(call.key):
        values |= {key_parameter(part, number): text for number, text in enumerate(texts)}
    given = enumerate(call.given.values())
    return values | {given_parameter(number): value for number, value in given}


def tokens_of(token: UUID) -> dict[str, Any]:
    """Return the values of the parameters of a look-up by token."""
    return dict(zip(TOKENS, (token, *span(token)), strict=True))


@lru_cache(maxsize=1024)
def plan_for(shape: Shape, dialect: Dialect) -> Plan:
    """Compile the statement of a shape, once."""
    columns = columns_of(shape.model)
    types = {parameter: columns[of].type for parameter, of in shape.parameters.items()}
    return _compile(build(shape), types, columns, dialect, build(shape, at_once=True))


@lru_cache(maxsize=256)
def plan_for_token(mapper: Mapper[Any], dialect: Dialect) -> Plan:
    """Compile the look-up by token alone, once; it is as in :func:`build`."""
    columns = columns_of(mapper.class_)
    types = dict.fromkeys(TOKENS, columns["creation_token"].type)
    tokens = [bindparam(name, type_=kind) for name, kind in types.items()]
    rows = _rows_by_token(mapper.class_, tokens)
    return _compile(rows, types, columns, dialect, at_once=rows)


def build(shape: Shape, at_once: bool = False) -> CompoundSelect[Any]:
    """Build the statement: the canonical row of the key, or else the row that it inserts.

    Before the row come true, if it was created with the call's token; false, if with another token
    of the same request; and NULL, if it was found by its key.

    ``matching`` is materialised so that the planner looks in the index of the key. It would not
    if it believed that walking the primary key in order finds a match sooner, and at SERIALIZABLE
    a walk locks every page that it reads.

    ``at_once`` is for a connection that may or may not be at SERIALIZABLE: where it is not, nothing
    is inserted, and the last row is of NULLs.
    """
    columns = columns_of(shape.model)
    values = {
        name: canonical(columns[of], bindparam(name, type_=columns[of].type))
        for name, of in shape.parameters.items()
    }
    operands = _operands(shape.model, shape.parameters, values)
    rows = _canonical_rows(shape.model).where(*_has_key(shape.model, operands, shape.spellings))
    selects = [rows]
    if shape.by_token:
        selects.append(_rows_by_token(shape.model, operands["creation_token"]))
    matching = _matching(selects)
    found = _first(matching, shape.model).cte("_found")
    stored = _stored(shape.model, operands)
    missing = select(*stored.values()).where(~exists(select(found)))
    if not at_once:
        created = _insert(shape.model, stored, missing)
        return union_all(select(*found.columns), select(true(), *created.columns))
    created = _insert(shape.model, stored, missing.where(AT_SERIALIZABLE))
    return union_all(
        select(*found.columns),
        select(true(), *created.columns),
        select(*(null() for _ in found.columns)).where(~AT_SERIALIZABLE),
    )


AT_SERIALIZABLE = func.current_setting(literal_column("'transaction_isolation'")) == literal_column(
    "'serializable'"
)


def _canonical_rows(model: type[Any]) -> Select[Any]:
    columns = columns_of(model)
    found_by_key = cast(null(), Boolean).label("_ours")
    return select(found_by_key, *columns.values()).where(columns["duplicate_of_id"].is_(None))


def _rows_by_token(
    model: type[Any], tokens: Sequence[ColumnElement[Any]], given_by: FromClause | None = None
) -> Select[Any]:
    """Return the row that was created with a token, or the one that is kept in its place.

    ``tokens`` are the token, and the lowest and highest of those that stand for the same request,
    unless it is the only one; ``given_by`` is what they are columns of, if they are. The planner
    cannot know how few rows are in between. Order and limit tell it that the first entry of the
    index is enough, and the kept row cheap to find, so that it need not plan each call anew.
    """
    columns = columns_of(model)
    table = columns["creation_token"].table
    (primary_key,) = table.primary_key
    token, *ends = tokens
    stored = columns["creation_token"]
    ours = stored == token
    wanted = stored.between(ends[0], ends[1]) if ends else ours
    bearer = (
        select(
            ours.label("_ours"),
            func.coalesce(columns["duplicate_of_id"], primary_key).label("_kept"),
        )
        .where(wanted)
        .order_by(stored)
        .limit(literal_column("1"))
        .correlate(given_by)
        .lateral("_bearer")
    )
    return select(bearer.columns._ours, *columns.values()).select_from(
        bearer.join(table, primary_key == bearer.columns._kept)
    )


def _matching(selects: Sequence[Select[Any]], nesting: bool = False) -> CTE:
    rows = union_all(*selects) if len(selects) > 1 else selects[0]
    return rows.cte("_matching", nesting=nesting).prefix_with("MATERIALIZED")


def _first(matching: CTE, model: type[Any]) -> Select[Any]:
    """Return the oldest of the matching rows; one that was found by its token goes before all."""
    (primary_key,) = columns_of(model)["creation_token"].table.primary_key
    order = matching.columns._ours.desc().nulls_last(), matching.columns[primary_key.key]
    return select(*matching.columns).order_by(*order).limit(literal_column("1"))


def _has_key(
    model: type[Any], operands: Operands, spellings: Sequence[int]
) -> list[ColumnElement[bool]]:
    parts = zip(model.__natural_key__, spellings, strict=True)
    return [equals(columns_of(model)[name], operands[name][:count]) for name, count in parts]


def _stored(model: type[Any], operands: Operands) -> dict[str, ColumnElement[Any]]:
    """Return what to store, by column name: the first spelling, the values, SQL defaults."""
    values = {}
    for attribute, column in columns_of(model).items():
        default: Any = column.default
        if attribute in operands:
            values[column.name] = operands[attribute][0] if operands[attribute] else null()
        elif default is not None:
            values[column.name] = default.next_value() if default.is_sequence else default.arg
    return values


def _insert(model: type[Any], names: Iterable[str], rows: Select[Any]) -> CTE:
    columns = columns_of(model)
    statement = insert(columns["creation_token"].table)
    inserted = statement.from_select(list(names), rows, include_defaults=False)
    return inserted.returning(*columns.values()).cte("_created")


class ManyShape(NamedTuple):
    """What two lists of calls have in common that can be sent as the same SQL."""

    model: type[Any]
    patterns: tuple[tuple[int, ...], ...]  # the spellings of each of their keys, each pattern once
    given: tuple[str, ...]
    returned: tuple[str, ...]  # the attributes that rows come with
    by_token: bool

    @property
    def spellings(self) -> list[int]:
        """The most spellings that any key has, by its part."""
        return [max(counts) for counts in zip(*self.patterns, strict=True)]

    @property
    def parameters(self) -> dict[str, str]:
        """The attribute that each array of the statement holds the values of."""
        return _parameters(self.model, self.spellings, self.given)


@lru_cache(maxsize=1024)
def plan_for_many(shape: ManyShape, dialect: Dialect) -> Plan:
    """Compile the statement of a list, once."""
    columns = columns_of(shape.model)
    statement = build_many(shape)
    types = {name: ARRAY(columns[of].type) for name, of in shape.parameters.items()}
    returned = {name: columns[name] for name in shape.returned}
    return _compile(statement, types, returned, dialect)


def _arrays(shape: ManyShape) -> dict[str, TypeEngine[Any]]:
    columns = columns_of(shape.model)
    return {name: ARRAY(_element(columns[of].type)) for name, of in shape.parameters.items()}


def _element(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type that a column's values are cast to; the column's own converts them first.

    Not as varchar(n): a cast to it would cut them off, where an insert refuses them. Raises
    TypeError for an array, of which unnest would make several rows.
    """
    if isinstance(kind, ARRAY):
        raise TypeError("a list cannot have columns that are arrays")
    plain = kind.impl_instance if isinstance(kind, TypeDecorator) else kind
    limited = isinstance(plain, String) and not isinstance(plain, Enum) and plain.length
    return Text() if limited else kind


def build_many(shape: ManyShape) -> CompoundSelect[Any]:
    """Build the statement for a list of keys, which arrive as one array a column.

    Each row that was there comes with the position of its item, from 1. Each row that it inserts
    comes with NULL and bears its item's token. An item whose key an earlier one has inserts
    nothing, and gets no row unless it was there.
    """
    item = _items(shape)
    operands = _operands(shape.model, shape.parameters, dict(item.columns.items()))
    row = _row_of(shape, item, operands).lateral("_row")
    position = item.columns._position
    found = (
        select(position, *_returned(shape, row)).select_from(item.join(row, true())).cte("_found")
    )
    stored = _stored(shape.model, operands)
    first = _first_of_each_key(shape, operands, item, found)
    missing = select(*stored.values()).where(position.in_(first)).order_by(position)
    created = _insert(shape.model, stored, missing)
    return union_all(select(*found.columns), select(null(), *_returned(shape, created)))


def _returned(shape: ManyShape, rows: FromClause) -> list[ColumnElement[Any]]:
    """Return the attributes that are asked for, of rows that have them all."""
    names = {name: column.key for name, column in columns_of(shape.model).items()}
    return [rows.columns[names[name]] for name in shape.returned]


def _items(shape: ManyShape) -> CTE:
    """Return the items as rows, references led to canonical rows."""
    columns = columns_of(shape.model)
    arrays = _arrays(shape)
    unnested = (
        func.unnest(*(bindparam(name, type_=kind) for name, kind in arrays.items()))
        .table_valued(*arrays, with_ordinality="_position")
        .render_derived()
    )
    values = [
        canonical(columns[of], unnested.columns[name], unnested).label(name)
        for name, of in shape.parameters.items()
    ]
    return select(unnested.columns._position, *values).cte("_item").prefix_with("MATERIALIZED")


def _row_of(shape: ManyShape, item: CTE, operands: Operands) -> Select[Any]:
    """Return the canonical row of an item's key.

    A select for each pattern of NULLs, of which an item's values let only one run. It is
    materialised for the same reason as in :func:`build`.
    """
    rows = _canonical_rows(shape.model).correlate(item)
    selects = [rows.where(*_has_pattern(shape, operands, pattern)) for pattern in shape.patterns]
    if shape.by_token:
        selects.append(
            _rows_by_token(shape.model, operands["creation_token"], item).correlate(item)
        )
    return _first(_matching(selects, nesting=True), shape.model)


def _has_pattern(
    shape: ManyShape, operands: Operands, pattern: Sequence[int]
) -> list[ColumnElement[bool]]:
    keys = [operands[name] for name in shape.model.__natural_key__]
    empty = [
        values[0].is_(None)
        for values, count in zip(keys, pattern, strict=True)
        if values and count == 0
    ]
    return _has_key(shape.model, operands, pattern) + empty


def _first_of_each_key(shape: ManyShape, operands: Operands, item: CTE, found: CTE) -> Select[Any]:
    """Return the positions to insert at: the first of each key, as the database compares keys."""
    position = item.columns._position
    missing = (
        select(func.min(position))
        .where(position.not_in(select(found.columns._position)))
        .correlate(None)
    )
    keys = [
        _collated(columns_of(shape.model)[name], operands[name][0])
        for name in shape.model.__natural_key__
        if operands[name]
    ]
    return missing.group_by(*keys)


def _collated(column: Column[Any], value: ColumnElement[Any]) -> ColumnElement[Any]:
    collation = getattr(column.type, "collation", None)
    return value if collation is None else value.collate(collation)
