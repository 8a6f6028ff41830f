"""How one thread has another give up a bootstrap: nothing else ends a statement or a long wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import Connection, event

from migrations_bootstrap.errors import Interrupted


class Interruption:
    """Knows the connections of a bootstrap; interrupted, they run no further statement."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._is_asked_for = False

    def interrupt(self) -> None:
        """Have the statements that run be cancelled, and those to come be refused."""
        with self._lock:
            self._is_asked_for = True
            for connection in self._connections:
                own: Any = connection.connection.driver_connection
                own.cancel()

    @contextmanager
    def of(self, connection: Connection) -> Iterator[None]:
        """Have a connection interrupted, if it comes to that, while the body uses it."""
        event.listen(connection, "before_cursor_execute", self._require_none)
        with self._lock:
            self._connections.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _require_none(self, *arguments: object) -> None:
        if self._is_asked_for:
            raise Interrupted("the bootstrap was interrupted")


interruption: ContextVar[Interruption | None] = ContextVar("interruption", default=None)
