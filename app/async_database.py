"""The asynchronous service's engine, sessions and bootstrap: as the Flask side's, by asyncpg."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn
from starlette.requests import HTTPConnection

from app.config import Settings
from app.database import APPLICATION_NAME, engine_options
from app.engines import TenantEngines
from app.errors import SessionShared
from app.models import NATURAL_KEYS
from app.pool import AsyncCountingPool, AwaitedCap
from app.transactions import beginning_of, defaults_of
from migrations_bootstrap import Bootstrap, bootstrap
from migrations_bootstrap.interruption import Interruption, interruption

# libpq's, which asyncpg would send to the server as settings of it.
LIBPQS_OWN = frozenset(
    {
        "channel_binding",
        "client_encoding",
        "connect_timeout",
        "fallback_application_name",
        "gssencmode",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "sslcompression",
        "tcp_user_timeout",
    }
)

INTERRUPT_EVERY = 0.1  # seconds
GOODBYE = 2.0  # seconds


class Connection(asyncpg.Connection):  # type: ignore[misc]
    """asyncpg's, which waits for a server that is gone no longer than a moment to say goodbye.

    ``begins_with`` is SQL that need not be sent: each statement that is sent alone begins so.
    """

    begins_with: str | None = None

    def transaction(self, *, isolation: str | None = None, **options: Any) -> Any:
        """Begin at READ COMMITTED, which is not the connection's own level, unless it is told."""
        if self.begins_with is not None and not self.is_in_transaction():
            isolation = isolation or "read_committed"
        return super().transaction(isolation=isolation, **options)

    async def close(self, *, timeout: float | None = GOODBYE) -> None:
        try:
            await super().close(timeout=timeout)
        except (OSError, asyncio.TimeoutError):
            self.terminate()


def make_async_engine(
    url: URL,
    settings: Settings,
    attach: Callable[[], object] | None = None,
    cap: AwaitedCap | None = None,
    at_once: bool = False,
) -> AsyncEngine:
    """Return an engine with the pool settings of the Flask side; it connects nowhere yet.

    ``attach`` is called before each connect, in a thread: an embedded server may be gone by then.
    ``at_once`` is for an engine whose work is get_or_create: see :class:`Opener`.
    """
    opener = Opener(settings, attach, at_once)
    return _make(url, async_creator=partial(opener.open, url), **_options(settings, cap))


def make_tenant_engines(
    url: URL, settings: Settings, attach: Callable[[], object] | None, cap: AwaitedCap
) -> TenantEngines:
    """Return the engines of the tenants, to be used in a greenlet: see ``aio.perform``."""
    options = _options(settings, cap)
    to_registry, to_tenants = Opener(settings, attach), Opener(settings, at_once=True)

    def make(url: URL, **options: Any) -> Engine:
        return _make(url, async_creator=partial(to_registry.open, url), **options).sync_engine

    def open(dialect: Any, url: URL) -> Any:
        return dialect.connect(async_creator_fn=partial(to_tenants.open, url))

    return TenantEngines(url, options, make, open)


def _make(url: URL, **options: Any) -> AsyncEngine:
    return create_async_engine(url.set(drivername="postgresql+asyncpg"), **options)


def _options(settings: Settings, cap: AwaitedCap | None) -> dict[str, Any]:
    """Return the Flask side's options, without what psycopg2 alone is told.

    All connections are kept: an event loop has as many requests at work as come, and would close
    and open one of the overflow for each of a dozen.
    """
    options = engine_options(settings, cap)
    for name in ("connect_args", "use_native_hstore"):
        del options[name]
    most = settings.pool_size + settings.max_overflow
    return {**options, "poolclass": AsyncCountingPool, "pool_size": most, "max_overflow": 0}


class Opener:
    """Opens connections of asyncpg's.

    ``at_once``: on these get_or_create is one statement and one round trip, since each transaction
    begins as it should by itself: at SERIALIZABLE, with the settings' limits, and without
    sequential scans. What SQLAlchemy begins is at READ COMMITTED, but has the rest. A pooler that
    refuses such options is asked without them from then on.
    """

    def __init__(
        self,
        settings: Settings,
        attach: Callable[[], object] | None = None,
        at_once: bool = False,
    ) -> None:
        self._settings = settings
        self._attach = attach
        self._begins_with = beginning_of(settings.retry_policy) if at_once else None

    async def open(self, url: URL) -> Connection:
        """Return a new connection. Raises what asyncpg does."""
        if self._attach is not None:
            await asyncio.to_thread(self._attach)
        if self._begins_with is None:
            return await self._connect(url)
        try:
            connection = await self._connect(url, **defaults_of(self._settings.retry_policy))
        except asyncpg.ProtocolViolationError:
            self._begins_with = None
            return await self._connect(url)
        connection.begins_with = self._begins_with
        return connection

    async def _connect(self, url: URL, **defaults: str) -> Connection:
        connection: Connection = await asyncpg.connect(
            asyncpg_dsn(url),
            timeout=self._settings.connect_timeout,
            connection_class=Connection,
            server_settings={"application_name": APPLICATION_NAME, **defaults},
        )
        return connection


def asyncpg_dsn(url: URL) -> str:
    """Return the URL as asyncpg reads it: several hosts with commas, nothing of libpq's alone."""
    query = {
        name: value if isinstance(value, str) else ",".join(value)
        for name, value in url.query.items()
        if name not in LIBPQS_OWN
    }
    return url.set(drivername="postgresql", query=query).render_as_string(hide_password=False)


class OneTaskSession(AsyncSession):
    """A session of the task that first uses it; another one's use raises SessionShared.

    Two tasks on one session would each see, flush and commit what the other is at.
    """

    _task: asyncio.Task[Any] | None = None
    _own: Session

    @property
    def sync_session(self) -> Session:
        """What every method that awaits works with."""
        task = asyncio.current_task()
        self._task = self._task or task
        if task is not self._task:
            raise SessionShared("a session was used by two tasks: give each one of its own")
        return self._own

    @sync_session.setter
    def sync_session(self, session: Session) -> None:
        self._own = session

    async def close(self) -> None:
        """Close it; SQLAlchemy does so in a task that nobody cancels."""
        await greenlet_spawn(self._own.close)


def make_sessions(engine: AsyncEngine) -> async_sessionmaker[OneTaskSession]:
    """Return what makes sessions; what is committed stays loaded."""
    return async_sessionmaker(engine, class_=OneTaskSession, expire_on_commit=False)


async def get_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """Give a request a session of its own, for FastAPI's Depends; closed with the request."""
    async with connection.app.state.sessions() as session:
        yield session


async def abootstrap(
    url: str | URL, keys: Mapping[str, tuple[str, ...]] = NATURAL_KEYS, **options: Any
) -> Bootstrap:
    """Do what ``migrations_bootstrap.bootstrap`` does, in a thread: there is only that one.

    Whoever cancels it waits until the server has dropped the statement at hand; all locks are
    released then, and it can be run again. Raises a BootstrapError.
    """
    stop = Interruption()
    before = interruption.set(stop)
    try:
        work = asyncio.ensure_future(asyncio.to_thread(bootstrap, url, keys, **options))
    finally:
        interruption.reset(before)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            # Again: the thread may be just about to send a statement.
            await asyncio.to_thread(stop.interrupt)
            await asyncio.wait({work}, timeout=INTERRUPT_EVERY)
        work.exception()  # is known: it was interrupted, or done by then
        raise
