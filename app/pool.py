"""Pools of connections that share one limit, and know how many wait for one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.util import await_only


class PoolState(NamedTuple):
    """How many connections are lent, how many lie ready, and how many wait for one."""

    in_use: int
    idle: int
    waiting: int


class ConnectionCap:
    """How many connections some pools may have together.

    ``held`` are those that are lent, idle, or being opened. Of the ``idle`` ones the first is the
    one that has not been used for longest. All that belongs to a pool changes under ``changed``.
    """

    everyone: ClassVar[WeakSet[ConnectionCap]] = WeakSet()
    # Reentrant, as that of those who await is: see CountingPool._do_return_conn.
    condition: ClassVar[type[Any]] = threading.Condition

    def __init__(self, most: int) -> None:
        self.most = most
        self.changed = self.condition()
        self.forget_all()
        self.everyone.add(self)

    def forget_all(self) -> None:
        """Begin anew, in a process that has just been forked: the connections are the parent's."""
        self.held = 0
        self.waiting = 0
        self.idle: OrderedDict[ConnectionPoolEntry, CountingPool] = OrderedDict()


class Changes:
    """What a cap needs of threading.Condition, for tasks: whoever waits lets the event loop go on.

    The lock is for the garbage collector, which may return a connection in another thread. Nobody
    awaits anything while holding it, so that it holds nobody up.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def wait_for(self, may_go: Callable[[], bool], timeout: float) -> bool:
        """Await, in a greenlet and without the lock, that one may go; return whether it came."""
        deadline = time.monotonic() + timeout
        while not may_go():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._wait(may_go, left)
        return True

    def _wait(self, may_go: Callable[[], bool], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        too_late = loop.call_later(seconds, _wake, woken)
        self._waiting[woken] = may_go
        self._lock.release()
        is_here = False
        try:
            await_only(woken)
            is_here = True
        finally:
            self._lock.acquire()
            too_late.cancel()
            was_called = self._waiting.pop(woken, None) is None
            if was_called and not (is_here and may_go()):
                self.notify_all()  # of what was for this one

    def notify_all(self) -> None:
        """Wake who has waited longest of those that may go: each change is good for one.

        Hundreds may wait, and would all have to look.
        """
        if self._waiting and not self._call(next(iter(self._waiting))):
            any(self._call(woken) for woken in list(self._waiting))

    def _call(self, woken: asyncio.Future[None]) -> bool:
        """Wake a task if it waits and may go; return whether it does."""
        may_go = self._waiting.get(woken)
        if may_go is None or not may_go():
            return False
        del self._waiting[woken]
        woken.get_loop().call_soon_threadsafe(_wake, woken)
        return True


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


class AwaitedCap(ConnectionCap):
    """The same for pools whose connections are awaited."""

    condition = Changes


class CountingPool(Pool):
    """A pool as SQLAlchemy's QueuePool is, of a connection cap that it may share with others.

    When there are as many connections as the cap allows, the one that has been idle for longest, of
    whichever pool, is closed for a new one; one that is lent never is. Where none is idle, a thread
    waits for as long as it would for one of its own pool.
    """

    # SQLAlchemy's loggers say no more than warnings, unless they are asked to.
    _sqla_logger_namespace = "sqlalchemy.pool.CountingPool"
    _cap_of_its_own: ClassVar[type[ConnectionCap]] = ConnectionCap

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 5,
        timeout: float = 5.0,
        cap: ConnectionCap | None = None,
        **options: Any,
    ) -> None:
        super().__init__(creator, **options)
        self._size = pool_size
        self._most = pool_size + max_overflow
        self._timeout = timeout
        self._cap = cap or self._cap_of_its_own(self._most)
        self._idle: deque[ConnectionPoolEntry] = deque()
        self._held = 0
        self._is_disposed = False

    def _do_get(self) -> ConnectionPoolEntry:
        with self._cap.changed:
            if not self._may_get():
                self._wait()
            if self._idle:
                entry = self._idle.popleft()
                del self._cap.idle[entry]
                return entry
            evicted = self._make_room()
        try:
            if evicted is not None:
                evicted.close()
            return self._create_connection()
        except BaseException:
            self._give_up()
            raise

    def _may_get(self) -> bool:
        """Tell whether there is a connection, or the right to open one."""
        has_room = self._cap.held < self._cap.most or bool(self._cap.idle)
        return bool(self._idle) or (self._held < self._most and has_room)

    def _wait(self) -> None:
        self._cap.waiting += 1
        try:
            if not self._cap.changed.wait_for(self._may_get, self._timeout):
                raise PoolTimeout(f"all connections were in use for {self._timeout:g} s")
        finally:
            self._cap.waiting -= 1

    def _make_room(self) -> ConnectionPoolEntry | None:
        """Take the right to a new connection; return the one to close for it, if one has to go."""
        self._held += 1
        if self._cap.held < self._cap.most:
            self._cap.held += 1
            return None
        entry, pool = self._cap.idle.popitem(last=False)
        pool._idle.remove(entry)
        pool._held -= 1
        return entry

    def _give_up(self) -> None:
        """Leave the right to a connection to others."""
        with self._cap.changed:
            self._held -= 1
            self._cap.held -= 1
            self._cap.changed.notify_all()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        """Take a connection back, perhaps from the garbage collector, at any moment."""
        with self._cap.changed:
            is_lost = record.dbapi_connection is None
            if len(self._idle) < self._size and not is_lost and not self._is_disposed:
                self._idle.append(record)
                self._cap.idle[record] = self
                self._cap.changed.notify_all()
                return
        try:
            record.close()
        finally:
            self._give_up()

    def recreate(self) -> CountingPool:
        """Return a pool like this one, with no connection yet."""
        return self.__class__(
            self._creator,
            pool_size=self._size,
            max_overflow=self._most - self._size,
            timeout=self._timeout,
            cap=self._cap,
            pre_ping=self._pre_ping,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )

    def dispose(self) -> None:
        """Close what is idle; what is lent is closed when it comes back."""
        self._is_disposed = True
        while True:
            with self._cap.changed:
                if not self._idle:
                    return
                entry = self._idle.popleft()
                del self._cap.idle[entry]
            try:
                entry.close()
            finally:
                self._give_up()

    def checkedin(self) -> int:
        """Return how many connections are idle."""
        return len(self._idle)

    def checkedout(self) -> int:
        """Return how many connections are lent."""
        return self._held - len(self._idle)

    def status(self) -> str:
        """Say how many connections there are."""
        return f"{self.checkedout()} connections in use, {self.checkedin()} idle"


class AsyncCountingPool(CountingPool):
    """The same for asyncio: whoever waits for a connection, or for one to be opened, awaits it."""

    _sqla_logger_namespace = "sqlalchemy.pool.AsyncCountingPool"
    _cap_of_its_own = AwaitedCap


def pool_state() -> PoolState:
    """Return the sums over the pools of this process."""
    caps = list(ConnectionCap.everyone)
    idle = sum(len(cap.idle) for cap in caps)
    held, waiting = sum(cap.held for cap in caps), sum(cap.waiting for cap in caps)
    return PoolState(in_use=held - idle, idle=idle, waiting=waiting)
