"""The asynchronous service's engine, sessions and bootstrap: as the Flask side's, by asyncpg."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
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
    """asyncpg's, which waits for a server that is gone no longer than a moment to say goodbye."""

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
) -> AsyncEngine:
    """Return an engine with the pool settings of the Flask side; it connects nowhere yet.

    ``attach`` is called before each connect, in a thread: an embedded server may be gone by then.
    """
    return _make(url, async_creator=_opener(url, settings, attach), **_options(settings, cap))


def make_tenant_engines(
    url: URL, settings: Settings, attach: Callable[[], object] | None, cap: AwaitedCap
) -> TenantEngines:
    """Return the engines of the tenants, to be used in a greenlet: see ``aio.perform``."""
    options = _options(settings, cap)
    creator = _opener(url, settings, attach)

    def make(url: URL, **options: Any) -> Engine:
        return _make(url, async_creator=creator, **options).sync_engine

    def open(dialect: Any, url: URL) -> Any:
        return dialect.connect(async_creator_fn=_opener(url, settings))

    return TenantEngines(url, options, make, open)


def _make(url: URL, **options: Any) -> AsyncEngine:
    return create_async_engine(url.set(drivername="postgresql+asyncpg"), **options)


def _options(settings: Settings, cap: AwaitedCap | None) -> dict[str, Any]:
    """Return the Flask side's options, without what psycopg2 alone is told."""
    options = engine_options(settings, cap)
    for name in ("connect_args", "use_native_hstore"):
        del options[name]
    return {**options, "poolclass": AsyncCountingPool}


def _opener(
    url: URL, settings: Settings, attach: Callable[[], object] | None = None
) -> Callable[[], Awaitable[Any]]:
    """Return what opens a connection of asyncpg's."""
    dsn = asyncpg_dsn(url)

    async def connect() -> Any:
        if attach is not None:
            await asyncio.to_thread(attach)
        return await asyncpg.connect(
            dsn,
            timeout=settings.connect_timeout,
            connection_class=Connection,
            server_settings={"application_name": APPLICATION_NAME},
        )

    return connect


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
