"""A TCP proxy in front of PostgreSQL that can lose replies to chosen statements, or cut them."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from sqlalchemy import create_engine, make_url, text


class LossyProxy:
    """Passes everything on, until a statement that it was told of was answered.

    That answer is read from the server, so that the server is known to be done, and then the
    client's connection is cut instead of passing it on. ``lose_reply_to`` works once;
    :meth:`lose_often` goes on. ``sent`` is what clients sent, one item a packet.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.lose_reply_to: bytes | None = None
        self.lost = 0
        self.sent: list[bytes] = []
        self.plan: Callable[[bytes], int | None] = self._once
        self.losing: dict[socket.socket, int] = {}
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    def _once(self, data: bytes) -> int | None:
        """Return how much of the reply to pass on; None: all of it."""
        # Whole words: BEGIN may say READ COMMITTED.
        if self.lose_reply_to is None or not re.search(self.lose_reply_to + rb"\b", data):
            return None
        self.lose_reply_to = None
        return 0

    @contextlib.contextmanager
    def lose_often(self, statement: bytes, every: int, passed: Sequence[int]) -> Iterator[None]:
        """Cut one reply in so many to the statement, after each of these numbers of bytes in turn.

        A count and no dice, so that each run is hit in the same way.
        """
        hits, lengths = itertools.count(1), itertools.cycle(passed)

        def plan(data: bytes) -> int | None:
            return next(lengths) if statement in data and next(hits) % every == 0 else None

        self.plan = plan
        yield
        self.plan = self._once

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed: the test is over
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.connect(self.upstream)
        threading.Thread(target=self._pass_back, args=(server, client), daemon=True).start()
        self._pass(client, server)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other side went away
            while data := source.recv(65536):
                self.sent.append(data)
                # Before it is sent on: the reply may be here before this thread goes on.
                passed = self.plan(data)
                if passed is not None:
                    self.losing[source] = passed
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other side went away
            while data := server.recv(65536):
                passed = self.losing.pop(client, None)
                client.sendall(data[:passed])
                if passed is not None:
                    self.lost += 1
                    client.shutdown(socket.SHUT_RDWR)
                    break
        with contextlib.suppress(OSError):  # it is closed already
            client.shutdown(socket.SHUT_RDWR)  # closing it alone would not wake who reads from it
        client.close()
        server.close()


@contextlib.contextmanager
def before_each_rerun(url: str, sql: str) -> Iterator[None]:
    """Have somebody else run a statement before a transaction of ours is run again."""
    direct = create_engine(url)

    def act(*arguments: object) -> None:
        with direct.begin() as connection:
            connection.execute(text(sql))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.transactions._log_retry", act)
        yield
    direct.dispose()


@contextlib.contextmanager
def lossy_proxy(url: str) -> Iterator[tuple[LossyProxy, str]]:
    """Yield a proxy in front of a database on a Unix socket, and the URL through it."""
    direct = make_url(url)
    proxy = LossyProxy(f"{direct.query['host']}/.s.PGSQL.5432")
    through = direct.set(host="127.0.0.1", port=proxy.port, query={})
    yield proxy, through.render_as_string(hide_password=False)
    proxy.listener.close()
