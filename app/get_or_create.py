"""Find the row of a natural key or create it, without ever making a second one.

The look-up and the insert are one statement, in one serializable transaction, in one round trip.
PostgreSQL refuses one of two transactions that both found nothing and inserted the same key, and
the retry then finds the row of the other. No unique constraint is needed; where there is one (the
guard) it is a second, independent defence.

Take this module and what it imports into a project of your own: eight files that import SQLAlchemy
and nothing else of Rollcall. ``docs/adopting.md`` shows how.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Engine,
    Uuid,
    and_,
    inspect,
    literal,
)
from sqlalchemy.orm import (
    Mapped,
    Session,
    make_transient_to_detached,
    mapped_column,
    scoped_session,
)
from sqlalchemy.orm.attributes import instance_state, set_committed_value

from app.batch import Row, find_or_create_all, keep_writers_out
from app.call import read_call, read_calls, require_natural_key
from app.errors import ContentionError, NotStored, TokenReused
from app.natural_key import canonical, columns_of, equals, spellings
from app.statement import Plan, plan_for, plan_for_token, shape_of, tokens_of, values_of
from app.transactions import RetryPolicy, StatementText, execute, look_again, run

Model = TypeVar("Model", bound="GetOrCreateMixin")

on_outcome: set[Callable[[str, str, int], object]] = set()
"""Called with a table, "created", "existing" or "contention" (given up), and how many records."""


@dataclass(frozen=True)
class Binding:
    """Where a model's work is done: what :meth:`GetOrCreateMixin.bind` was given."""

    engine: Engine | Callable[[], Engine]
    session: Session | scoped_session[Any] | Callable[[], Session] | None
    policy: RetryPolicy | Callable[[], RetryPolicy]


class GetOrCreateMixin:
    """Give a model with a natural key :meth:`get_or_create`.

    The model names its key, ``__natural_key__ = ("department_id", "name")``, has one table and a
    primary key of one column. The mixin brings two columns: ``duplicate_of_id``, empty in the
    canonical row of a key, and ``creation_token``, which says which call created the row. Declare
    ``duplicate_of_id`` again to give it another type, or the foreign key that it is.

    ``__bookkeeping__`` names attributes that say nothing of what a row stands for, such as when it
    was made: rows of one key that differ in them alone are the same.
    """

    __natural_key__: ClassVar[tuple[str, ...]]
    __bookkeeping__: ClassVar[tuple[str, ...]] = ()
    __binding__: ClassVar[Binding]

    duplicate_of_id: Mapped[int | None] = mapped_column(BigInteger)
    creation_token: Mapped[uuid.UUID | None] = mapped_column(Uuid)

    @classmethod
    def bind(
        cls,
        engine: Engine | Callable[[], Engine],
        session: Session | scoped_session[Any] | Callable[[], Session],
        policy: RetryPolicy | Callable[[], RetryPolicy] = RetryPolicy(),  # noqa: B008 - frozen
    ) -> None:
        """Tell this model, or all models of a base class, where to work.

        ``engine`` gives the connections that get_or_create takes for itself, ``session`` is where
        the instances it returns live. Each may be a callable, asked at every call.
        """
        cls.__binding__ = Binding(engine, session, policy)

    @classmethod
    def get_or_create(
        cls: type[Model], defaults: Mapping[str, Any] | None = None, **key: Any
    ) -> tuple[Model, bool]:
        """Return the canonical row of the natural key, and whether this call created it.

        ``key`` is exactly the natural key; ``defaults`` are further columns, used only if the row
        is created. Strings of the key are stored normalised, and found as they were sent too. A
        reference to a duplicate is stored as one to its canonical row. The row is committed when
        this returns, whatever becomes of the bound session's transaction; the instance comes back
        loaded and attached to that session, with the changes that are pending there kept.

        Mapper events and reconstructors do not run. A caller whose session holds a connection
        needs a second one from the pool.

        Raises TypeError, before the database is touched, for a wrong key or an unknown column;
        ContentionError when the race could not be won in time; NotStored where a trigger discards
        the row; and the driver's error, as SQLAlchemy wraps it, for a value that the database
        refuses.
        """
        row, created = find_or_create(cls, defaults, **key)
        return attach(_ask(cls.__binding__.session), cls, row), created

    @classmethod
    def get_or_create_many(
        cls: type[Model], items: Iterable[Mapping[str, Any]]
    ) -> list[tuple[Model, bool]]:
        """Do for each item what get_or_create does, all in one transaction: all of it, or nothing.

        An item is the arguments of a call: ``{"name": …, "department_id": …, "defaults": {…}}``.
        The results are in the order of the items. Of items with the same key the first can create
        the row, with its own defaults; the others find it.

        While it works, other writers of the table wait. Raises what :meth:`get_or_create` does,
        and TypeError where only some of the items give a column that the database has a default
        for.
        """
        found = find_or_create_many(cls.__binding__, cls, items)
        session = _ask(cls.__binding__.session)
        return [(attach(session, cls, row), new) for row, new in found]

    @classmethod
    def has_natural_key(cls, **key: Any) -> ColumnElement[bool]:
        """Return the condition that a row is a canonical one of the natural key."""
        require_natural_key(cls, key)
        columns = columns_of(cls)
        conditions = [
            equals(columns[name], [_literal(columns[name], text) for text in spellings(value)])
            for name, value in key.items()
        ]
        return and_(columns["duplicate_of_id"].is_(None), *conditions)


def find_or_create(
    model: type[GetOrCreateMixin],
    defaults: Mapping[str, Any] | None = None,
    token: uuid.UUID | None = None,
    /,
    **key: Any,
) -> tuple[Row, bool]:
    """Do what :meth:`GetOrCreateMixin.get_or_create` does, and return the row's values.

    For those who only show the row: they need no instance, and no session for it to live in.

    ``token`` is that of a request which may have been sent before. The row that it created then is
    returned as created, whatever has become of its key. Raises TokenReused as well.
    """
    return find_or_create_by(model.__binding__, model, defaults, token, **key)


def find_or_create_by(
    binding: Binding,
    model: type[GetOrCreateMixin],
    defaults: Mapping[str, Any] | None = None,
    token: uuid.UUID | None = None,
    /,
    **key: Any,
) -> tuple[Row, bool]:
    """Do what :func:`find_or_create` does, by another binding than the model's."""
    call = read_call(model, defaults, token, **key)
    engine: Engine = _ask(binding.engine)
    plan = plan_for(shape_of(model, call, token is not None), engine.dialect)

    def statement(attempt: int) -> tuple[StatementText, Mapping[str, Any]]:
        if attempt == 1:
            return plan.text, plan.parameters(values_of(call, token is not None))
        # An attempt whose reply was lost may have created the row, and somebody may have renamed
        # it since: look for our token as well.
        again = plan_for(shape_of(model, call, by_token=True), engine.dialect)
        return again.text, again.parameters(values_of(call, by_token=True))

    with telling_of_contention(model, 1):
        found = look_again(lambda: _execute(binding, model, engine, statement, plan))
    if found is None:
        raise NotStored
    _tell(model, "created" if found[1] else "existing", 1)
    return found


def find_or_create_many(
    binding: Binding, model: type[GetOrCreateMixin], items: Iterable[Mapping[str, Any]]
) -> list[tuple[Row, bool]]:
    """Do what :meth:`GetOrCreateMixin.get_or_create_many` does, and return the rows' values."""
    calls = read_calls(model, list(items))
    indexes = race_indexes(inspect(model).local_table.name)
    engine: Engine = _ask(binding.engine)

    def work(session: Session, unanswered: list[Row] | None) -> list[Row]:
        keep_writers_out(session, _ask(binding.policy), model)
        return find_or_create_all(session, model, calls, by_token=unanswered is not None)

    with telling_of_contention(model, len(calls)):
        rows = look_again(lambda: run(engine, work, _ask(binding.policy), indexes))
    created = [row["creation_token"] == call.token for call, row in zip(calls, rows, strict=True)]
    tell_outcomes(model, created)
    return list(zip(rows, created, strict=True))


def find_created(model: type[GetOrCreateMixin], token: uuid.UUID) -> Row | None:
    """Return the values of the row that a request of this token created; None: it did not yet.

    A row that has become a duplicate leads to its canonical row. Raises TokenReused.
    """
    binding = model.__binding__
    engine: Engine = _ask(binding.engine)
    plan = plan_for_token(inspect(model), engine.dialect)
    values = plan.parameters(tokens_of(token))
    found = _execute(binding, model, engine, lambda attempt: (plan.text, values), plan)
    if found is None:
        return None
    _tell(model, "created", 1)  # as it is answered
    return found[0]


def _execute(
    binding: Binding,
    model: type[GetOrCreateMixin],
    engine: Engine,
    statement: Callable[[int], tuple[StatementText, Mapping[str, Any]]],
    plan: Plan,
) -> tuple[Row, bool] | None:
    """Return the row that a statement gives, if any, and whether the call's token created it."""
    indexes = race_indexes(inspect(model).local_table.name)
    rows = execute(engine, statement, _ask(binding.policy), indexes)
    if not rows:
        return None
    (ours, *values) = rows[0]
    if ours is False:
        raise TokenReused
    return plan.read(values), bool(ours)


def tell_outcomes(model: type[GetOrCreateMixin], created: Sequence[bool]) -> None:
    """Tell whoever asked (:data:`on_outcome`) how many records of a list were created."""
    new = sum(created)
    for outcome, records in (("created", new), ("existing", len(created) - new)):
        if records:
            _tell(model, outcome, records)


@contextmanager
def telling_of_contention(model: type[GetOrCreateMixin], records: int) -> Iterator[None]:
    """Tell whoever asked of records that are given up."""
    try:
        yield
    except ContentionError:
        _tell(model, "contention", records)
        raise


def _tell(model: Any, outcome: str, records: int) -> None:
    for tell in on_outcome:
        tell(_table_of(model), outcome, records)


@lru_cache(maxsize=256)
def _table_of(model: type[Any]) -> str:
    return str(inspect(model).local_table.name)


def _literal(column: Column[Any], value: Any) -> ColumnElement[Any]:
    return canonical(column, literal(value, column.type))


def _ask(given: Any) -> Any:
    return given() if callable(given) else given


@lru_cache(maxsize=256)
def race_indexes(table: str) -> frozenset[str]:
    """Return the names of the unique indexes that a race of get_or_create can run into."""
    return frozenset({f"uq_{table}_natural_key", f"uq_{table}_creation_token"})


def attach(session: Session, model: type[Model], values: Mapping[str, Any]) -> Model:
    """Return the session's instance of a row, given all the row's values by attribute.

    An instance that the session has already is brought up to date, except for the attributes
    with changes that were not flushed yet.
    """
    mapper = inspect(model)
    (primary_key,) = (mapper.get_property_by_column(column).key for column in mapper.primary_key)
    key = mapper.identity_key_from_primary_key((values[primary_key],))
    known: Model | None = session.identity_map.get(key)
    if known is not None:
        return _refresh(known, values)
    instance: Model = mapper.class_manager.new_instance()
    instance.__dict__.update(values)  # as loaded: none of them is a change
    make_transient_to_detached(instance)
    session.add(instance)
    return instance


def _refresh(instance: Model, values: Mapping[str, Any]) -> Model:
    attributes = instance_state(instance).attrs
    for name, value in values.items():
        if not attributes[name].history.has_changes():
            set_committed_value(instance, name, value)
    return instance
