"""The asynchronous engine, sessions that are one task's, and the bootstrap that can be awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Engine, create_engine, make_url, select, text

from app.async_database import (
    Connection,
    abootstrap,
    asyncpg_dsn,
    make_async_engine,
    make_sessions,
)
from app.config import Settings, load_settings, postgresql_url
from app.errors import SessionShared
from app.models import NATURAL_KEYS, Department
from app.pool import AsyncCountingPool, pool_state
from migrations_bootstrap import BootstrapError, bootstrap
from migrations_bootstrap.lock import LOCK_KEY
from tests.races import eventually


def settings_of(url: str, **given: Any) -> Settings:
    return load_settings({"DATABASE_URL": url, "ROLLCALL_AUTH": "off", **given})


def test_the_pool_is_that_of_the_flask_side(guarded_url: str) -> None:
    """By the same settings, but that all are kept; parameters are in no error message."""
    settings = settings_of(
        guarded_url,
        ROLLCALL_POOL_SIZE=3,
        ROLLCALL_MAX_OVERFLOW=4,
        ROLLCALL_POOL_TIMEOUT=2,
        ROLLCALL_POOL_RECYCLE=60,
    )
    assert settings.database_url is not None
    engine = make_async_engine(settings.database_url, settings).sync_engine
    pool: Any = engine.pool
    assert isinstance(pool, AsyncCountingPool)
    assert (pool._size, pool._most, pool._timeout, pool._recycle) == (7, 7, 2, 60)
    assert engine.hide_parameters


def test_a_pooler_that_refuses_options_is_asked_without_them(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; what it lends is as any other connection."""
    asked: list[bool] = []

    async def connect(*arguments: Any, **options: Any) -> Any:
        asked.append("lock_timeout" in options["server_settings"])
        if asked[-1]:
            raise asyncpg.ProtocolViolationError("unsupported startup parameter: lock_timeout")
        return await to_connect(*arguments, **options)

    async def work() -> set[Any]:
        engine = make_async_engine(make_url(database_url), settings_of(database_url), at_once=True)
        async with engine.connect() as one, engine.connect() as other:
            raw: list[Any] = [await lent.get_raw_connection() for lent in (one, other)]
            known = {lent.driver_connection.begins_with for lent in raw}
        await engine.dispose()
        return known

    to_connect = asyncpg.connect
    monkeypatch.setattr(asyncpg, "connect", connect)
    assert asyncio.run(work()) == {None}
    assert asked == [True, False, False]


def test_only_what_is_sent_alone_is_at_serializable_by_itself(database_url: str) -> None:
    """What SQLAlchemy begins is at READ COMMITTED, or at the level that it is told."""

    async def work() -> list[Any]:
        engine = make_async_engine(make_url(database_url), settings_of(database_url), at_once=True)
        async with engine.connect() as connection:
            raw: Any = (await connection.get_raw_connection()).driver_connection
            found = [await raw.fetchval(LEVEL), await connection.scalar(text(LEVEL))]
            await connection.rollback()
            async with raw.transaction(isolation="serializable"), raw.transaction():
                found.append(await raw.fetchval(LEVEL))
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            found.append(await connection.scalar(text(LEVEL)))
        await engine.dispose()
        return found

    assert asyncio.run(work()) == [
        "serializable", "read committed", "serializable", "repeatable read",
    ]  # fmt: skip


LEVEL = "SELECT current_setting('transaction_isolation')"


def test_who_waits_for_a_connection_is_counted(database_url: str) -> None:
    """Beside those of the pools that block."""

    async def work() -> None:
        settings = settings_of(database_url, ROLLCALL_POOL_SIZE=1, ROLLCALL_MAX_OVERFLOW=0)
        engine = make_async_engine(make_url(database_url), settings)
        before = pool_state()
        async with engine.connect():
            second = asyncio.create_task(engine.connect().start())
            while pool_state().waiting == before.waiting:
                await asyncio.sleep(0)
            assert pool_state().in_use == before.in_use + 1
        await (await second).close()
        after = pool_state()
        assert (after.waiting, after.in_use) == (before.waiting, before.in_use)
        assert after.idle == before.idle + 1
        await engine.dispose()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("url", "dsn"),
    [
        ("postgresql://u:password@h:1/d", "postgresql://u:password@h:1/d"),
        (
            "postgresql://u@/d?host=h1:1&host=h2:2&target_session_attrs=read-write",
            "postgresql://u@/d?host=h1%3A1%2Ch2%3A2&target_session_attrs=read-write",
        ),
        (
            "postgresql+asyncpg://u@h/d?ssl=require&connect_timeout=3&keepalives=1",
            "postgresql://u@h/d?sslmode=require",
        ),
    ],
)
def test_a_url_is_read_as_asyncpg_reads_it(url: str, dsn: str) -> None:
    """One setting for both drivers, whichever it names."""
    assert asyncpg_dsn(postgresql_url(url)) == dsn


def awaited(url: str, work: Any) -> Any:
    """Run some work on an event loop with an engine and its sessions."""

    async def main() -> Any:
        settings = settings_of(url)
        engine = make_async_engine(make_url(url), settings)
        try:
            return await work(make_sessions(engine))
        finally:
            await engine.dispose()

    return asyncio.run(main())


def test_a_session_belongs_to_the_task_that_uses_it_first(database_url: str) -> None:
    """Another one's use is a clear error, and harms nothing."""

    async def work(sessions: Any) -> None:
        async with sessions() as session:
            session.add(Department(name="Research"))
            await session.flush()
            for use in (session.flush, session.commit, session.rollback):
                with pytest.raises(SessionShared, match="two tasks"):
                    await asyncio.create_task(use())
            await session.commit()
        async with sessions() as other:
            assert (await other.scalars(select(Department.name))).all() == ["Research"]

    awaited(database_url, work)


def test_a_session_that_is_left_by_a_cancelled_task_is_closed(database_url: str) -> None:
    """Its connection is back in the pool, or closed."""

    async def work(sessions: Any) -> None:
        pool = sessions.kw["bind"].sync_engine.pool

        is_held = asyncio.Event()

        async def hold() -> None:
            async with sessions() as session:
                await session.scalars(select(Department.name))
                is_held.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(hold())
        await is_held.wait()
        assert pool.checkedout() == 1
        task.cancel()
        await asyncio.wait({task})
        assert pool.checkedout() == 0

    awaited(database_url, work)


def test_a_server_that_is_gone_is_not_waited_for_at_the_end(
    guarded_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is dropped where it says no goodbye."""

    async def work(sessions: Any) -> bool:
        async with sessions.kw["bind"].connect() as connection:
            own = (await connection.get_raw_connection()).driver_connection
            assert isinstance(own, Connection)
            await own.close(timeout=0)
            return own.is_closed()

    assert awaited(guarded_url, work)


def test_the_embedded_server_is_attached_before_each_connect(guarded_url: str) -> None:
    """In a thread, for it may take a while."""
    threads: list[threading.Thread] = []

    async def work() -> None:
        settings = settings_of(guarded_url)
        engine = make_async_engine(
            make_url(guarded_url), settings, lambda: threads.append(threading.current_thread())
        )
        async with engine.connect():
            pass
        await engine.dispose()

    asyncio.run(work())
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_a_database_is_brought_up_from_a_lifespan(empty_database: str) -> None:
    """By a URL of asyncpg's; a second time changes nothing."""
    url = make_url(empty_database).set(drivername="postgresql+asyncpg")
    first, second = (asyncio.run(abootstrap(url)) for _ in range(2))
    assert (first.created, first.changed) == (True, True)
    assert (second.created, second.changed) == (False, False)


def test_many_bring_one_database_up_at_once(empty_database: str) -> None:
    """Awaiting and blocking ones: each ends well, one has created it."""

    async def all_at_once() -> list[Any]:
        awaiting = [abootstrap(empty_database) for _ in range(3)]
        blocking = [asyncio.to_thread(bootstrap, empty_database, NATURAL_KEYS) for _ in range(3)]
        return await asyncio.gather(*awaiting, *blocking)

    outcomes = asyncio.run(all_at_once())
    assert sum(outcome.created for outcome in outcomes) == 1


def test_what_stops_a_bootstrap_is_said(empty_database: str) -> None:
    """As by the one that blocks."""
    with pytest.raises(BootstrapError, match="no PostgreSQL server"):
        asyncio.run(abootstrap("postgresql+asyncpg://u@127.0.0.1:1/d", connect_timeout=1))


async def cancelled(work: Coroutine[Any, Any, Any], when: Any) -> None:
    """Cancel some work when something has come to be, and wait for its end."""
    task = asyncio.ensure_future(work)
    await asyncio.to_thread(when)
    task.cancel()
    await asyncio.wait({task}, timeout=60)
    assert task.cancelled()


def test_a_bootstrap_that_waits_for_another_can_be_cancelled(
    fresh_database: str, administrator: Engine
) -> None:
    """It holds nothing then, and the next one does the work."""
    holder = create_engine(fresh_database)
    with holder.begin() as connection:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY})")
        asyncio.run(cancelled(abootstrap(fresh_database), lambda: at_work(administrator, LOCKING)))
        eventually(lambda: sessions_of_bootstraps(administrator) == 0)
    holder.dispose()
    assert asyncio.run(abootstrap(fresh_database)).changed


def test_a_bootstrap_that_is_held_up_by_a_table_can_be_cancelled(
    server: Any, administrator: Engine, legacy_url: str
) -> None:
    """The statement that waits is cancelled on the server."""
    holder = create_engine(legacy_url)
    with holder.begin() as connection:
        connection.exec_driver_sql(
            "DROP INDEX ix_employee_natural_key; LOCK TABLE employee IN ACCESS EXCLUSIVE MODE"
        )
        asyncio.run(cancelled(abootstrap(legacy_url), lambda: at_work(administrator, HELD_UP)))
        eventually(lambda: sessions_of_bootstraps(administrator) == 0)
    holder.dispose()
    asyncio.run(abootstrap(legacy_url))


LOCKING = "query LIKE '%%pg_try_advisory%%'"
HELD_UP = "wait_event_type = 'Lock'"


def at_work(administrator: Engine, how: str) -> None:
    eventually(lambda: sessions_of_bootstraps(administrator, how) > 0)


def sessions_of_bootstraps(administrator: Engine, how: str = "true") -> int:
    with administrator.connect() as connection:
        return int(
            connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity"
                f" WHERE application_name = 'rollcall-bootstrap' AND {how}"
            ).scalar_one()
        )
