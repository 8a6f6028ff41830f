"""The same transactions, statements and retries under asyncio and asyncpg.

What is written to block is run as it stands, in a greenlet of SQLAlchemy's, and each place where it
would wait is an await of the task that it belongs to: :func:`perform`. So nothing of it is written
twice. This module imports neither asyncpg nor greenlet: they are needed when it is used.

Whoever is cancelled leaves no transaction open and no half a row: the connection that was being
waited for is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn

from app.errors import DatabaseAway, LostRace
from app.get_or_create import (
    Binding,
    GetOrCreateMixin,
    attach,
    find_or_create_by,
    find_or_create_many,
)
from app.transactions import (
    CANNOT_CONNECT_NOW,
    FEATURE_NOT_SUPPORTED,
    TOO_MANY_CONNECTIONS,
    Driver,
    RetryPolicy,
    StatementText,
    driver,
    execute,
    is_connection_lost,
    retry,
    run,
    sqlstate,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    Given = AsyncSession | async_sessionmaker[Any] | None

Result = TypeVar("Result")
Model = TypeVar("Model", bound="AsyncGetOrCreate")


async def perform(work: Callable[[], Result]) -> Result:
    """Do what is written to block, and await wherever it would wait.

    Its engines have to be asynchronous ones' (``AsyncEngine.sync_engine``). What it does between
    two statements, as everything does, keeps the event loop from others.
    """
    return await greenlet_spawn(_awaiting, work)


def _awaiting(work: Callable[[], Result]) -> Result:
    before = driver.set(ASYNCPG)
    try:
        return work()
    finally:
        driver.reset(before)


async def aretry(
    attempt: Callable[[int], Awaitable[Result]],
    policy: RetryPolicy,
    race_indexes: Collection[str] = (),
) -> Result:
    """Await ``attempt(1)``, ``attempt(2)`` … as :func:`transactions.retry` calls it."""
    return await perform(
        lambda: retry(lambda number: await_only(attempt(number)), policy, race_indexes)
    )


async def arun(
    engine: AsyncEngine,
    work: Callable[[Session, Result | None], Result],
    policy: RetryPolicy,
    race_indexes: Collection[str] = (),
    beginning: str = "",
) -> Result:
    """Do what :func:`transactions.run` does; ``work`` is written to block, as by ``run_sync``."""
    return await perform(lambda: run(engine.sync_engine, work, policy, race_indexes, beginning))


async def aexecute(
    engine: AsyncEngine,
    statement: Callable[[int], tuple[StatementText, Mapping[str, Any]]],
    policy: RetryPolicy,
    race_indexes: Collection[str],
) -> list[tuple[Any, ...]]:
    """Do what :func:`transactions.execute` does; see :class:`Asyncpg` for its trips."""
    return await perform(lambda: execute(engine.sync_engine, statement, policy, race_indexes))


class AsyncGetOrCreate(GetOrCreateMixin):
    """Give a model with a natural key :meth:`aget_or_create`, beside what the mixin gives it."""

    __async_binding__: ClassVar[Binding]

    @classmethod
    def abind(
        cls,
        engine: AsyncEngine,
        policy: RetryPolicy | Callable[[], RetryPolicy] = RetryPolicy(),  # noqa: B008 - frozen
    ) -> None:
        """Tell this model, or all models of a base class, where to work when it is awaited.

        An engine's connections belong to one event loop, and so does the binding.
        """
        cls.__async_binding__ = Binding(engine.sync_engine, None, policy)

    @classmethod
    async def aget_or_create(
        cls: type[Model],
        session: Given = None,
        /,
        defaults: Mapping[str, Any] | None = None,
        **key: Any,
    ) -> tuple[Model, bool]:
        """Do what :meth:`get_or_create` does, awaiting.

        The instance lives in the session that is given; without one it is detached: its columns are
        loaded, and its relationships cannot be. So it is where an ``async_sessionmaker`` is given,
        whose engine goes before the one that was bound. A connection is taken from the pool.
        """
        binding, own = _where(cls, session)
        row, created = await perform(lambda: find_or_create_by(binding, cls, defaults, **key))
        return _instance(own, cls, row), created

    @classmethod
    async def aget_or_create_many(
        cls: type[Model], session: Given, items: Iterable[Mapping[str, Any]], /
    ) -> list[tuple[Model, bool]]:
        """Do what :meth:`get_or_create_many` does, awaiting; the session as in the other method."""
        binding, own = _where(cls, session)
        found = await perform(lambda: find_or_create_many(binding, cls, items))
        return [(_instance(own, cls, row), created) for row, created in found]


def _where(model: type[AsyncGetOrCreate], given: Given) -> tuple[Binding, AsyncSession | None]:
    """Return where to work, and the session for what is found; one is not made for that alone."""
    options: Mapping[str, Any] | None = getattr(given, "kw", None)  # a sessionmaker has them
    if options is None:
        return model.__async_binding__, cast("AsyncSession | None", given)
    known = getattr(model, "__async_binding__", None)
    policy = RetryPolicy() if known is None else known.policy
    return Binding(options["bind"].sync_engine, None, policy), None


def _instance(session: AsyncSession | None, model: type[Model], row: Mapping[str, Any]) -> Model:
    if session is not None:
        return attach(session.sync_session, model, row)
    with Session() as nowhere:
        return attach(nowhere, model, row)  # and detach it


class Asyncpg(Driver):
    """How asyncpg takes SQL, within :func:`perform`.

    It prepares whatever has parameters or comes from SQLAlchemy, and only one statement can be
    prepared at a time; several go together where there are none. So a transaction is three round
    trips, or one, at the first attempt, where its beginning is that of the connection's own
    transactions (its attribute ``begins_with``). It has no lock then: who lost a race takes it.
    """

    def sleep(self, seconds: float) -> None:
        await_only(asyncio.sleep(seconds))

    def elsewhere(self, blocking: Callable[[], Result]) -> Result:
        # In a thread, where nothing of the context tells it to await.
        return await_only(asyncio.get_running_loop().run_in_executor(None, blocking))

    def reaching(self, engine: Engine) -> AbstractContextManager[None]:
        return _reaching()

    def begin(self, connection: Connection, sql: str) -> None:
        first, _, others = sql.partition("; ")
        connection.exec_driver_sql(first)  # SQLAlchemy sends BEGIN before it
        own: Any = connection.connection.driver_connection
        usual = "" if getattr(own, "begins_with", None) is None else WITH_SCANS
        try:
            await_only(own.execute(usual + others))
        except Exception as error:
            raised = _as_sqlalchemys(connection.engine, own, others, error)
            if raised.connection_invalidated:
                connection.invalidate(error)
            raise raised from error
        except BaseException as cancelled:
            connection.invalidate(cancelled)
            raise

    def send(
        self,
        engine: Engine,
        connection: PoolProxiedConnection,
        beginning: str,
        text: StatementText,
        parameters: Mapping[str, Any],
        attempt: int,
    ) -> list[tuple[Any, ...]]:
        own: Any = connection.driver_connection
        alone = attempt == 1 and text.at_once and getattr(own, "begins_with", None) == beginning
        try:
            if alone and (rows := await_only(_at_once(own, text, parameters))) is not None:
                return rows
            return await_only(_transaction(own, beginning + text.beginning, text, parameters))
        except Exception as error:
            if not alone and getattr(error, "sqlstate", None) == FEATURE_NOT_SUPPORTED:
                # A column has another type by now; asyncpg prepares anew, but not in a transaction.
                raise LostRace from error
            raised = _as_sqlalchemys(engine, own, text.sql, error)
            if raised.connection_invalidated:
                engine.pool._invalidate(connection, error)
            raise raised from error
        except BaseException as cancelled:
            connection.invalidate(cancelled)
            raise


ASYNCPG = Asyncpg()


async def _at_once(
    own: Any, text: StatementText, parameters: Mapping[str, Any]
) -> list[tuple[Any, ...]] | None:
    """Send a statement alone, which is a transaction; return its rows, or None: it did nothing.

    Then the connection is not as it was told to be, and is not asked again. Raises what asyncpg
    does.
    """
    rows: list[tuple[Any, ...]] = await own.fetch(text.at_once, *text.in_order(parameters))
    if rows and all(value is None for value in rows[-1]):
        own.begins_with = None
        return None
    return rows


async def _transaction(
    own: Any, beginning: str, text: StatementText, parameters: Mapping[str, Any]
) -> list[tuple[Any, ...]]:
    """Send a statement as a transaction of its own; return its rows. Raises what asyncpg does."""
    try:
        await own.execute(f"BEGIN; {beginning}")
        rows: list[tuple[Any, ...]] = await own.fetch(text.sql, *text.in_order(parameters))
        await own.execute("COMMIT")
        return rows
    except Exception as error:
        if not _is_lost(own, error) and own.is_in_transaction():
            await own.execute("ROLLBACK")
        raise


def _is_lost(own: Any, error: Exception) -> bool:
    """Tell whether a connection is of no more use; asyncpg may learn that it is closed later."""
    state = getattr(error, "sqlstate", None)
    return own.is_closed() or isinstance(error, OSError) or is_connection_lost(state)


def _as_sqlalchemys(engine: Engine, own: Any, sql: str, error: Exception) -> DBAPIError:
    """Return an error of asyncpg's, or of the socket's, as SQLAlchemy's that says the same."""
    is_integritys = str(getattr(error, "sqlstate", "")).startswith(INTEGRITY_VIOLATION)
    kind = IntegrityError if is_integritys else DBAPIError
    return kind(
        sql,
        None,
        error,
        hide_parameters=engine.hide_parameters,
        connection_invalidated=_is_lost(own, error),
    )


@contextmanager
def _reaching() -> Iterator[None]:
    """Raise DatabaseAway for an error of connecting that time may heal.

    asyncpg has a SQLSTATE for what the server says; what comes without one is the socket's.
    """
    try:
        yield
    except (OSError, asyncio.TimeoutError) as error:
        raise DatabaseAway from error
    except DBAPIError as error:
        state = sqlstate(error)
        if state is None or state in NOT_NOW or is_connection_lost(state):
            raise DatabaseAway from error
        raise


# What a connection that begins otherwise by itself has to be told; SERIALIZABLE takes it back.
WITH_SCANS = "SET LOCAL enable_seqscan = on; "
INTEGRITY_VIOLATION = "23"
NOT_NOW = (CANNOT_CONNECT_NOW, TOO_MANY_CONNECTIONS)
