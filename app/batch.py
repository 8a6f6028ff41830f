"""Find or create the rows of many natural keys, within one serializable transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.call import Call
from app.errors import NotStored
from app.natural_key import columns_of
from app.statement import (
    ManyShape,
    given_parameter,
    key_parameter,
    plan_for_many,
    sql_name,
)
from app.transactions import LOCK_NOT_AVAILABLE, RetryPolicy, begin, limits, sqlstate

Row = Mapping[str, Any]


def find_or_create_all(
    session: Session,
    model: type[Any],
    calls: Sequence[Call],
    by_token: bool,
    attributes: Sequence[str] = (),
) -> list[Row]:
    """Return each call's canonical row, by attribute; it bears the token of who created it.

    ``attributes`` are those that are needed, the token among them; if none are named, all.

    Of calls with one key the first creates the row; the others find it, when they are sent again.
    ``by_token`` says that these calls may have created rows before, in a transaction whose COMMIT
    got no answer. Raises TypeError for what cannot travel in an array, and NotStored.
    """
    rows: dict[int, Row] = {}
    left = list(range(len(calls)))
    while left:
        part = [calls[place] for place in left]
        shape = _shape_of(model, part, by_token, tuple(attributes))
        found = _send(session, shape, part, left)
        if not found:
            raise NotStored
        rows.update(found)
        left = [place for place in left if place not in rows]
    return [rows[place] for place in range(len(calls))]


def _send(
    session: Session, shape: ManyShape, calls: Sequence[Call], places: Sequence[int]
) -> dict[int, Row]:
    """Return the rows that were found or created, by the place of their call."""
    connection = session.connection()
    plan = plan_for_many(shape, connection.dialect)
    arrays = plan.parameters(_arrays(shape, calls))
    arguments = plan.text.in_order(arrays) if plan.text.is_numbered else _with_texts(arrays)
    result = connection.exec_driver_sql(plan.text.sql, arguments)
    owners = {call.token: place for call, place in zip(calls, places, strict=True)}
    rows: dict[int, Row] = {}
    for position, *values in result:
        row = plan.read(values)
        place = owners[row["creation_token"]] if position is None else places[position - 1]
        rows[place] = row
    return rows


def _shape_of(
    model: type[Any], calls: Sequence[Call], by_token: bool, attributes: tuple[str, ...]
) -> ManyShape:
    patterns = {tuple(map(len, call.key)) for call in calls}
    given = {name for call in calls for name in call.given}
    for name in given:
        _require_given_by_all(model, name, calls)
    return ManyShape(
        model,
        tuple(sorted(patterns)),
        tuple(sorted(given)),
        attributes or tuple(columns_of(model)),
        by_token,
    )


def _require_given_by_all(model: type[Any], name: str, calls: Sequence[Call]) -> None:
    """Refuse what one insert cannot do: take some values from us, others from the database."""
    column = columns_of(model)[name]
    from_database = column.server_default is not None or column.default is not None
    if from_database and not all(name in call.given for call in calls):
        raise TypeError(f"{name}: give it for every item, or let the database set it for every one")


def _arrays(shape: ManyShape, calls: Sequence[Call]) -> dict[str, list[Any]]:
    """Return the values by parameter. A key of fewer spellings than others repeats its first."""
    arrays: dict[str, list[Any]] = {}
    for part, most in enumerate(shape.spellings):
        texts = [call.key[part] for call in calls]
        for number in range(most):
            arrays[key_parameter(part, number)] = [
                text[number] if number < len(text) else next(iter(text), None) for text in texts
            ]
    for number, name in enumerate(shape.given):
        arrays[given_parameter(number)] = [call.given.get(name) for call in calls]
    arrays["token"] = [call.token for call in calls]
    return arrays


PLAIN = frozenset({bool, date, datetime, Decimal, float, int, str, type(None), UUID})


def _with_texts(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Write arrays as PostgreSQL reads them (manual, "Array Value Input"), where that is easy.

    The driver would write ``ARRAY['a', 'b', …]``, of which the server parses each element as an
    expression: a thousand rows take it, and us, three times as long.
    """
    return {
        name: _array_text(value) if isinstance(value, list) and _is_plain(value) else value
        for name, value in parameters.items()
    }


def _is_plain(values: Sequence[Any]) -> bool:
    return PLAIN.issuperset(map(type, values))


def _array_text(values: Sequence[Any]) -> str:
    elements = ("NULL" if value is None else _quoted(str(value)) for value in values)
    return f"{{{','.join(elements)}}}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


LOCK_WAIT = 0.25  # seconds
LOCK_TRIES = 3


def keep_writers_out(session: Session, policy: RetryPolicy, *models: type[Any]) -> None:
    """Lock the models' tables against every other writer, or go on without after a short wait.

    A long list reads so much that PostgreSQL takes it to have read the whole table, and each insert
    of somebody else to conflict with it (manual, "Serializable Isolation Level"). The lock keeps
    lists and single creates from starving each other; what keeps the rows unique is SERIALIZABLE
    alone. So nobody waits long for it: not for a VACUUM or an index that is being built, which hold
    it off, and not the writers who queue behind us, who get their turn between two tries.

    To be the first statement of the transaction: its snapshot is then taken after the others have
    committed.
    """
    dialect = session.get_bind().dialect
    tables = ", ".join(sql_name(inspect(model).local_table, dialect) for model in models)
    connection = session.connection()
    connection.exec_driver_sql("SAVEPOINT unlocked")
    for _ in range(LOCK_TRIES):
        try:
            begin(
                connection,
                f"{limits(replace(policy, lock_timeout=LOCK_WAIT))}"
                f"LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE; {limits(policy)}",
            )
            return
        except DBAPIError as error:
            if sqlstate(error) != LOCK_NOT_AVAILABLE:
                raise
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT unlocked")
