"""Pools of connections that know how many wait for one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakSet

from sqlalchemy import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.pool import ConnectionPoolEntry

if TYPE_CHECKING:
    Base = QueuePool
else:
    Base = object


class PoolState(NamedTuple):
    """How many connections are lent, how many lie ready, and how many wait for one."""

    in_use: int
    idle: int
    waiting: int


class Counting(Base):
    """What makes SQLAlchemy's pools, which count the rest themselves, count who waits."""

    everyone: ClassVar[WeakSet[Counting]] = WeakSet()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waiting = 0
        self._counting = threading.Lock()
        self.everyone.add(self)

    def _do_get(self) -> ConnectionPoolEntry:
        if self._overflow < self._max_overflow or self.checkedin():
            return super()._do_get()
        self._count(1)
        try:
            return super()._do_get()
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._counting:
            self._waiting += change

    @classmethod
    def state(cls) -> PoolState:
        """Return the sums over the pools of this process, of both kinds."""
        pools = list(cls.everyone)
        return PoolState(
            in_use=sum(pool.checkedout() for pool in pools),
            idle=sum(pool.checkedin() for pool in pools),
            waiting=sum(pool._waiting for pool in pools),
        )


class CountingPool(Counting, QueuePool):
    """The service's pool."""

    # SQLAlchemy's loggers say no more than warnings, unless they are asked to.
    _sqla_logger_namespace = "sqlalchemy.pool.CountingPool"


class AsyncCountingPool(Counting, AsyncAdaptedQueuePool):
    """The asynchronous service's pool."""

    _sqla_logger_namespace = "sqlalchemy.pool.AsyncCountingPool"
