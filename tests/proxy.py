"""A TCP proxy in front of PostgreSQL that can lose the reply to a chosen statement."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from sqlalchemy import make_url


class LossyProxy:
    """Passes everything on, until a statement with ``lose_reply_to`` in it was answered.

    That answer is read from the server, so that the server is known to be done, and then the
    client's connection is cut instead of passing it on. Each setting works once. ``sent`` is what
    clients sent, one item a packet.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.lose_reply_to: bytes | None = None
        self.lost = 0
        self.sent: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

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
                target.sendall(data)
                if self.lose_reply_to is not None and self.lose_reply_to in data:
                    self.lose_reply_to = None
                    self.losing = source
            target.shutdown(socket.SHUT_WR)

    losing: socket.socket | None = None

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other side went away
            while data := server.recv(65536):
                if self.losing is client:
                    self.losing = None
                    self.lost += 1
                    client.shutdown(socket.SHUT_RDWR)
                    break
                client.sendall(data)
            client.close()
            server.close()


@contextlib.contextmanager
def lossy_proxy(url: str) -> Iterator[tuple[LossyProxy, str]]:
    """Yield a proxy in front of a database on a Unix socket, and the URL through it."""
    direct = make_url(url)
    proxy = LossyProxy(f"{direct.query['host']}/.s.PGSQL.5432")
    through = direct.set(host="127.0.0.1", port=proxy.port, query={})
    yield proxy, through.render_as_string(hide_password=False)
    proxy.listener.close()
