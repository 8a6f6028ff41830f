"""A pool of connections that knows how many wait for one."""

from __future__ import annotations

import threading
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

from sqlalchemy import QueuePool
from sqlalchemy.pool import ConnectionPoolEntry


class PoolState(NamedTuple):
    """How many connections are lent, how many lie ready, and how many threads wait for one."""

    in_use: int
    idle: int
    waiting: int


class CountingPool(QueuePool):
    """SQLAlchemy's pool, which counts the rest itself but not who waits."""

    # SQLAlchemy's loggers say no more than warnings, unless they are asked to.
    _sqla_logger_namespace = "sqlalchemy.pool.CountingPool"

    everyone: ClassVar[WeakSet[CountingPool]] = WeakSet()

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
        """Return the sums over the pools of this process."""
        pools = list(cls.everyone)
        return PoolState(
            in_use=sum(pool.checkedout() for pool in pools),
            idle=sum(pool.checkedin() for pool in pools),
            waiting=sum(pool._waiting for pool in pools),
        )
