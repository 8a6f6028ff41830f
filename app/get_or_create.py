"""Find the row of a natural key or create it, without ever making a second one.

The look-up and the insert are one statement, in one serializable transaction, in one round trip.
PostgreSQL refuses one of two transactions that both found nothing and inserted the same key, and
the retry then finds the row of the other. No unique constraint is needed; where there is one (the
guard) it is a second, independent defence.

Take this module, ``statement.py``, ``natural_key.py``, ``transactions.py`` and ``errors.py`` into a
project of your own: they import SQLAlchemy and nothing else of Rollcall. ``docs/adopting.md`` shows
how.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, TypeVar

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
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    Mapped,
    Session,
    make_transient_to_detached,
    mapped_column,
    scoped_session,
)
from sqlalchemy.orm.attributes import instance_state, set_committed_value

from app.natural_key import canonical, columns_of, equals, spellings
from app.statement import Shape, plan_for
from app.transactions import UNIQUE_VIOLATION, RetryPolicy, execute, sqlstate

Model = TypeVar("Model", bound="GetOrCreateMixin")

KEPT_BY_THE_MIXIN = frozenset({"creation_token", "duplicate_of_id"})


@dataclass(frozen=True)
class Binding:
    """Where a model's work is done: what :meth:`GetOrCreateMixin.bind` was given."""

    engine: Engine | Callable[[], Engine]
    session: Session | scoped_session[Any] | Callable[[], Session]
    policy: RetryPolicy | Callable[[], RetryPolicy]


class GetOrCreateMixin:
    """Give a model with a natural key :meth:`get_or_create`.

    The model names its key, ``__natural_key__ = ("department_id", "name")``, has one table and a
    primary key of one column. The mixin brings two columns: ``duplicate_of_id``, empty in the
    canonical row of a key, and ``creation_token``, which says which call created the row. Declare
    ``duplicate_of_id`` again to give it another type, or the foreign key that it is.
    """

    __natural_key__: ClassVar[tuple[str, ...]]
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
        ContentionError when the race could not be won in time; and the driver's error, as
        SQLAlchemy wraps it, for a value that the database refuses.
        """
        shape, values = describe(cls, key, dict(defaults or {}))
        engine: Engine = _ask(cls.__binding__.engine)

        def statement(attempt: int) -> tuple[str, Mapping[str, Any]]:
            # An attempt whose reply was lost may have created the row, and somebody may have
            # renamed it since: from the second attempt on, look for our token as well.
            plan = plan_for(shape._replace(by_token=attempt > 1), engine.dialect)
            return plan.sql, plan.parameters(values)

        policy: RetryPolicy = _ask(cls.__binding__.policy)
        indexes = race_indexes(inspect(cls).local_table.name)
        try:
            rows = execute(engine, statement, policy, indexes)
        except IntegrityError as error:
            if sqlstate(error) != UNIQUE_VIOLATION:
                raise
            # Perhaps a constraint on the key that the table had before us: its winner is committed
            # now, and found. Any other is violated again, and that is the caller's.
            rows = execute(engine, statement, policy, indexes)
        row = plan_for(shape, engine.dialect).read(rows[0])
        instance = attach(_ask(cls.__binding__.session), cls, row)
        return instance, row["creation_token"] == values["token"]

    @classmethod
    def has_natural_key(cls, **key: Any) -> ColumnElement[bool]:
        """Return the condition that a row is a canonical one of the natural key."""
        _require_natural_key(cls, key)
        columns = columns_of(cls)
        conditions = [
            equals(columns[name], [_literal(columns[name], text) for text in spellings(value)])
            for name, value in key.items()
        ]
        return and_(columns["duplicate_of_id"].is_(None), *conditions)


def _literal(column: Column[Any], value: Any) -> ColumnElement[Any]:
    return canonical(column, literal(value, column.type))


def _ask(given: Any) -> Any:
    return given() if callable(given) else given


def race_indexes(table: str) -> frozenset[str]:
    """Return the names of the unique indexes that a race of get_or_create can run into."""
    return frozenset({f"uq_{table}_natural_key", f"uq_{table}_creation_token"})


def describe(
    model: type[GetOrCreateMixin], key: Mapping[str, Any], given: dict[str, Any]
) -> tuple[Shape, dict[str, Any]]:
    """Return the shape of a call and its values by parameter name; the token is a new one."""
    _require_natural_key(model, key)
    _require_further_columns(model, given)
    given |= _python_defaults(model, given)
    texts = [spellings(key[name]) for name in model.__natural_key__]
    values: dict[str, Any] = {"token": uuid.uuid4()}
    for part, text in enumerate(texts):
        values |= {f"key_{part}_{number}": value for number, value in enumerate(text)}
    values |= {f"given_{number}": value for number, value in enumerate(given.values())}
    return Shape(model, tuple(map(len, texts)), tuple(given)), values


def _require_natural_key(model: type[GetOrCreateMixin], key: Mapping[str, Any]) -> None:
    if set(key) != set(model.__natural_key__):
        raise TypeError(
            f"the natural key of {model.__name__} is {', '.join(model.__natural_key__)}; "
            f"got {', '.join(key) or 'nothing'}"
        )


def _require_further_columns(model: type[GetOrCreateMixin], given: Mapping[str, Any]) -> None:
    allowed = columns_of(model).keys() - set(model.__natural_key__) - KEPT_BY_THE_MIXIN
    if unknown := sorted(given.keys() - allowed):
        raise TypeError(f"{', '.join(unknown)}: not among the defaults {model.__name__} can have")


class _NoContext:
    """Stands in for SQLAlchemy's execution context, which there is none of."""

    def __getattr__(self, name: str) -> NoReturn:
        raise TypeError("get_or_create cannot evaluate a column default that reads its context")


def _python_defaults(model: type[GetOrCreateMixin], given: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the columns' own defaults, as an ORM flush would, for what was not given."""
    values = {}
    for name, column in columns_of(model).items():
        default: Any = column.default
        if default is None or name in given or name in model.__natural_key__:
            continue
        if default.is_callable:
            values[name] = default.arg(_NoContext())
        elif default.is_scalar:
            values[name] = default.arg
    return values


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
    for name, value in values.items():
        set_committed_value(instance, name, value)
    make_transient_to_detached(instance)
    session.add(instance)
    return instance


def _refresh(instance: Model, values: Mapping[str, Any]) -> Model:
    attributes = instance_state(instance).attrs
    for name, value in values.items():
        if not attributes[name].history.has_changes():
            set_committed_value(instance, name, value)
    return instance
