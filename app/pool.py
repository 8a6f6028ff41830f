"""Pools of connections that share one limit, and know how many wait for one."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

from sqlalchemy import AsyncAdaptedQueuePool
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry, Pool


class PoolState(NamedTuple):
    """How many connections are lent, how many lie ready, and how many threads wait for one."""

    in_use: int
    idle: int
    waiting: int


class ConnectionCap:
    """How many connections some pools may have together.

    ``held`` are those that are lent, idle, or being opened. Of the ``idle`` ones the first is the
    one that has not been used for longest. All that belongs to a pool changes under ``changed``.
    """

    everyone: ClassVar[WeakSet[ConnectionCap]] = WeakSet()

    def __init__(self, most: int) -> None:
        self.most = most
        self.changed = threading.Condition()  # reentrant: see CountingPool._do_return_conn
        self.forget_all()
        self.everyone.add(self)

    def forget_all(self) -> None:
        """Begin anew, in a process that has just been forked: the connections are the parent's."""
        self.held = 0
        self.waiting = 0
        self.idle: OrderedDict[ConnectionPoolEntry, CountingPool] = OrderedDict()


class CountingPool(Pool):
    """A pool as SQLAlchemy's QueuePool is, of a connection cap that it may share with others.

    When there are as many connections as the cap allows, the one that has been idle for longest, of
    whichever pool, is closed for a new one; one that is lent never is. Where none is idle, a thread
    waits for as long as it would for one of its own pool.
    """

    # SQLAlchemy's loggers say no more than warnings, unless they are asked to.
    _sqla_logger_namespace = "sqlalchemy.pool.CountingPool"

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
        self._cap = cap or ConnectionCap(self._most)
        self._idle: deque[ConnectionPoolEntry] = deque()
        self._held = 0
        self._is_disposed = False

    def _do_get(self) -> ConnectionPoolEntry:
        deadline = time.monotonic() + self._timeout
        with self._cap.changed:
            while not self._idle and not self._may_open():
                self._wait_until(deadline)
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

    def _may_open(self) -> bool:
        has_room = self._cap.held < self._cap.most or bool(self._cap.idle)
        return self._held < self._most and has_room

    def _wait_until(self, deadline: float) -> None:
        self._cap.waiting += 1
        try:
            if not self._cap.changed.wait(max(0.0, deadline - time.monotonic())):
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


class AsyncCountingPool(AsyncAdaptedQueuePool):
    """The asynchronous service's pool, which counts the rest itself but not who waits."""

    _sqla_logger_namespace = "sqlalchemy.pool.AsyncCountingPool"

    everyone: ClassVar[WeakSet[AsyncCountingPool]] = WeakSet()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.waiting = 0
        self.everyone.add(self)

    def _do_get(self) -> ConnectionPoolEntry:
        if self._overflow < self._max_overflow or self.checkedin():
            return super()._do_get()
        self.waiting += 1
        try:
            return super()._do_get()
        finally:
            self.waiting -= 1


def pool_state() -> PoolState:
    """Return the sums over the pools of this process, of both kinds."""
    caps, others = list(ConnectionCap.everyone), list(AsyncCountingPool.everyone)
    idle = sum(len(cap.idle) for cap in caps)
    return PoolState(
        in_use=sum(cap.held for cap in caps) - idle + sum(pool.checkedout() for pool in others),
        idle=idle + sum(pool.checkedin() for pool in others),
        waiting=sum(cap.waiting for cap in caps) + sum(pool.waiting for pool in others),
    )
