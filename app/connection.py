"""One client's connection: what has come of its request, and what is left to send of its answer."""

from __future__ import annotations

import logging
import socket
from typing import Any

from gunicorn.http import get_parser

from app.framing import Framing

logger = logging.getLogger(__name__)

RECEIVED_AT_ONCE = 64 * 1024  # bytes
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Answer:
    """What gunicorn takes for the socket: it keeps what is to be sent, and never waits."""

    def __init__(self) -> None:
        self.left = bytearray()

    def sendall(self, data: bytes) -> None:
        """Keep the data until they are flushed."""
        self.left += data

    def send(self, data: bytes) -> None:
        """Drop 100 Continue, the one thing that comes this way: a whole request has been told."""

    def shutdown(self, how: int) -> None:
        """Throw away an answer that broke off, and tell gunicorn that there is nobody to wait for.

        Raises OSError.
        """
        self.left.clear()
        raise OSError("nothing has been sent")

    def close(self) -> None:
        """Leave the connection to the main thread."""


class Connection:
    """A connection belongs to the main thread, but for the time a request of it is worked on.

    The attributes up to ``parser`` have the names that gunicorn's worker knows.
    """

    def __init__(self, cfg: Any, client: socket.socket, address: Any, longest_body: int) -> None:
        client.setblocking(False)
        self.cfg = cfg
        self.sock = Answer()
        self.client = address
        self.server = client.getsockname()
        self.parser: Any = None
        self.socket = client
        self.since = self.deadline = 0.0  # of what is waited for
        self.ends = False  # after the answer that is being sent
        self.lingers = False  # then, since the client may still be sending
        self._longest_body = longest_body
        self._received = bytearray()
        self._framing = Framing(longest_body)

    @property
    def held(self) -> int:
        """How many bytes it keeps in memory."""
        return len(self._received) + len(self.sock.left)

    @property
    def has_begun(self) -> bool:
        """Whether some of the next request is there."""
        return bool(self._received)

    @property
    def is_in_body(self) -> bool:
        """Whether the head of the next request is there, and its body is not."""
        return self._framing.in_body

    def receive(self) -> bool:
        """Take what has come; return False when the client will send no more. Raises OSError."""
        data = self.socket.recv(RECEIVED_AT_ONCE)
        self._received += data
        return bool(data)

    def next_request(self) -> bool:
        """Make ``parser`` ready for the next request, once that is there as a whole.

        A client that waits to be told to send its body is told so. Raises what Framing does, and
        OSError.
        """
        end = self._framing.end(self._received)
        if end is None:
            if self._framing.expects:
                self._framing.expects = False
                self.socket.send(CONTINUE)
            return False
        self._parse(end)
        return True

    def last_request(self) -> None:
        """Make ``parser`` ready for what there is of a head, when the client will send no more."""
        self._parse(len(self._received))

    def _parse(self, end: int) -> None:
        self.parser = get_parser(self.cfg, iter([bytes(self._received[:end])]), self.client)
        self.lingers = self._framing.is_cut
        del self._received[:end]
        self._framing = Framing(self._longest_body)

    def forget_request(self) -> None:
        """Drop what has come of a request that is refused."""
        self._received.clear()

    def discard(self) -> bool:
        """Throw away what has come; return False when the client will send no more."""
        return bool(self.socket.recv(RECEIVED_AT_ONCE))

    def try_to_flush(self) -> None:
        """Send what the client takes now of its answer; all is dropped, if the client is gone."""
        left = self.sock.left
        try:
            del left[: self.socket.send(left)]
        except BlockingIOError:
            logger.debug("the client takes its time")
        except OSError as error:
            logger.debug("the client is gone: %s", error)
            left.clear()
            self.ends = True
