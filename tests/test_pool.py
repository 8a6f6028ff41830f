"""Pools under one cap: never more connections than it allows, and none that is lent is closed."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.util import greenlet_spawn

from app.pool import AsyncCountingPool, AwaitedCap, ConnectionCap, CountingPool, pool_state
from tests.races import eventually, started


class Driver:
    """Counts the connections that it has opened and that are not closed."""

    def __init__(self) -> None:
        self.open: set[Connection] = set()
        self.most = 0
        self.refuses = False
        self.lock = threading.Lock()

    def connect(self) -> Connection:
        if self.refuses:
            raise OSError("refused")
        with self.lock:
            connection = Connection(self)
            self.open.add(connection)
            self.most = max(self.most, len(self.open))
        return connection


class Connection:
    """What a driver's connection is to a pool."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.lent = False

    def rollback(self) -> None:
        """Do what is done before a connection is taken back."""

    def close(self) -> None:
        assert not self.lent
        with self.driver.lock:
            self.driver.open.remove(self)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def make(driver: Driver) -> Callable[..., CountingPool]:
    """Make pools of two connections and one more, under a cap of three, that wait for 10 ms."""
    cap = ConnectionCap(3)

    def make(timeout: float = 0.01, cap: ConnectionCap = cap) -> CountingPool:
        return CountingPool(driver.connect, 2, 1, timeout, cap)

    return make


def test_what_has_been_idle_longest_is_closed_for_a_new_one(
    make: Callable[..., CountingPool], driver: Driver
) -> None:
    """Of whichever pool; one that was used since stays."""
    one, two, three, four = (make() for _ in range(4))
    for pool in (one, two, three, one):
        pool.connect().close()
    (second,) = [entry.dbapi_connection for entry in two._idle]
    four.connect().close()
    assert [pool.checkedin() for pool in (one, two, three, four)] == [1, 0, 1, 1]
    assert second not in driver.open
    assert driver.most == 3
    assert four.status() == "0 connections in use, 1 idle"


def test_a_connection_that_is_lent_is_never_closed(
    make: Callable[..., CountingPool], driver: Driver
) -> None:
    """Who finds all of them lent waits, and no longer than is set."""
    held = [make().connect() for _ in range(3)]
    with pytest.raises(PoolTimeout, match=r"in use for 0\.01 s"):
        make().connect()
    assert len(driver.open) == 3
    for connection in held:
        connection.close()
    make().connect().close()
    assert driver.most == 3


def test_who_waits_gets_what_another_pool_gives_back(make: Callable[..., CountingPool]) -> None:
    """At once, and is counted for as long."""
    before = pool_state()
    held = [make().connect() for _ in range(3)]
    patient = make(timeout=20)
    done = started(lambda: patient.connect().close())
    eventually(lambda: pool_state().waiting == before.waiting + 1)
    assert pool_state().in_use == before.in_use + 3
    held[0].close()
    done()
    assert pool_state().waiting == before.waiting
    assert patient.checkedin() == 1


def test_a_pool_has_a_limit_of_its_own(make: Callable[..., CountingPool], driver: Driver) -> None:
    """No more than its size and overflow, whatever the cap allows; the overflow is not kept."""
    pool = make(cap=ConnectionCap(9))
    held = [pool.connect() for _ in range(3)]
    with pytest.raises(PoolTimeout):
        pool.connect()
    for connection in held:
        connection.close()
    assert (pool.checkedin(), len(driver.open)) == (2, 2)


def test_what_cannot_be_opened_or_is_lost_takes_no_room(
    make: Callable[..., CountingPool], driver: Driver
) -> None:
    """Also where another connection was closed for it."""
    pool, other = make(), make()
    lent = [pool.connect() for _ in range(2)]
    other.connect().close()
    driver.refuses = True
    with pytest.raises(OSError, match="refused"):
        pool.connect()
    assert other.checkedin() == 0
    driver.refuses = False
    lent[0].invalidate()
    lent[0].close()
    assert (pool.checkedin(), pool.checkedout()) == (0, 1)
    again = [other.connect() for _ in range(2)]
    assert len(driver.open) == 3
    for connection in (*again, lent[1]):
        connection.close()


def test_a_pool_that_is_disposed_of_keeps_nothing(
    make: Callable[..., CountingPool], driver: Driver
) -> None:
    """What was lent is closed when it comes back; the pool in its place begins anew."""
    pool = make()
    lent, idle = pool.connect(), pool.connect()
    idle.close()
    pool.dispose()
    assert len(driver.open) == 1
    lent.close()
    assert driver.open == set()
    successor = pool.recreate()
    successor.connect().close()
    assert (successor.checkedin(), len(driver.open)) == (1, 1)
    assert successor._cap.held == 1


@pytest.mark.parametrize("seed", range(5))
def test_however_threads_use_their_pools_the_cap_holds(driver: Driver, seed: int) -> None:
    """And in the end each connection is accounted for."""
    cap = ConnectionCap(3)
    pools = [CountingPool(driver.connect, 2, 1, 20.0, cap) for _ in range(7)]

    def work(number: int) -> None:
        chance = random.Random(f"{seed} {number}")  # noqa: S311 - no secret
        for _ in range(150):
            connection = chance.choice(pools).connect()
            used = connection.dbapi_connection
            assert isinstance(used, Connection)
            assert not used.lent
            used.lent = True
            if chance.random() < 0.1:
                used.lent = False
                connection.invalidate()
            used.lent = False
            connection.close()

    ends = [started(lambda number=number: work(number)) for number in range(6)]
    for end in ends:
        end()
    assert driver.most <= 3
    assert cap.held == len(cap.idle) == len(driver.open) == sum(p.checkedin() for p in pools)


def test_tasks_await_what_threads_would_wait_for(driver: Driver) -> None:
    """Also where another thread gives a connection back; who waits too long is told so."""

    async def main() -> None:
        pool = AsyncCountingPool(driver.connect, 1, 0, 20.0)
        held = pool.connect()
        tasks = await queued(pool, 2)
        await asyncio.to_thread(held.close)
        (await tasks[0]).close()
        held = await tasks[1]
        hasty = AsyncCountingPool(driver.connect, 2, 0, 0.01, pool._cap)
        with pytest.raises(PoolTimeout):
            await greenlet_spawn(hasty.connect)
        held.close()
        (await greenlet_spawn(hasty.connect)).close()
        assert (pool._cap.held, pool._cap.waiting, driver.most) == (1, 0, 1)

    asyncio.run(main())


async def queued(pool: AsyncCountingPool, count: int) -> list[asyncio.Task[Any]]:
    """Return so many tasks that wait for a connection of the pool."""
    tasks = [asyncio.create_task(greenlet_spawn(pool.connect)) for _ in range(count)]
    while pool._cap.waiting < count:
        await asyncio.sleep(0)
    return tasks


def test_whom_a_connection_does_not_reach_leaves_it_to_the_next(driver: Driver) -> None:
    """One is woken for it, who may have left by then, or find that another was quicker."""

    async def main() -> None:
        pool = AsyncCountingPool(driver.connect, 1, 0, 20.0)
        held = pool.connect()
        leaves, waits, comes_last = await queued(pool, 3)
        held.close()
        leaves.cancel()
        held = await waits
        held.close()
        quicker = pool.connect()
        await asyncio.sleep(0.01)
        assert not comes_last.done()
        quicker.close()
        (await comes_last).close()
        assert leaves.cancelled()
        assert (pool._cap.held, pool._cap.waiting, driver.most) == (1, 0, 1)

    asyncio.run(main())


def test_a_connection_is_for_whoever_may_have_it(driver: Driver) -> None:
    """A task whose pool has as many as it may is passed over."""

    async def main() -> None:
        cap = AwaitedCap(2)
        small, other = (AsyncCountingPool(driver.connect, 1, 0, 20.0, cap) for _ in range(2))
        first, second = small.connect(), other.connect()
        (longest,) = await queued(small, 1)
        third = AsyncCountingPool(driver.connect, 1, 0, 20.0, cap)
        next_one = asyncio.create_task(greenlet_spawn(third.connect))
        while cap.waiting < 2:
            await asyncio.sleep(0)
        second.close()
        (await next_one).close()
        assert not longest.done()
        first.close()
        (await longest).close()

    asyncio.run(main())
