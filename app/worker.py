"""gunicorn's threaded worker, which here gives a thread only to requests that are there as a whole.

Requests arrive, and answers leave, in the main thread, as slowly as the clients like and within
bounds of time and memory. The worker stops without loss and answers every error as JSON.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from flask import Response
from gunicorn.glogging import Logger
from gunicorn.http import errors
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker
from werkzeug.exceptions import BadRequest, HTTPException, RequestTimeout, ServiceUnavailable

from app.api.exchange import respond
from app.config import load_settings
from app.connection import Connection
from app.headers import with_ours
from app.metrics import bring_up_to_date
from app.observability import REQUEST_ID, Exchange, configure_service, served
from app.web.problems import Problem, http_problem, problem_of

LET_OTHERS_GO_FIRST = 0.001  # seconds
ENOUGH_FOR_ALL = 128  # connections; so many are shared out well enough without that
LINGER = 2.0  # seconds that a client has to read its last answer and to hang up
LARGE = 64 * 1024  # bytes
MOST_LARGE = 64  # connections that may hold more than that, in each worker
LOOK_EVERY = 1.0  # seconds
STOPPING_NAP = 0.1  # seconds
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)

logger = logging.getLogger(__name__)

STATUSES: dict[type[Exception], int] = {
    errors.LimitRequestLine: 414,
    errors.LimitRequestHeaders: 431,
    errors.UnsupportedTransferCoding: 501,
    errors.ExpectationFailed: 417,
    errors.ForbiddenProxyRequest: 403,
    errors.ParseException: 400,
}


@problem_of.register
def _(error: errors.ParseException) -> Problem:
    """Also for a body that turns out to be malformed only when the application reads it."""
    return http_problem(next(STATUSES[kind] for kind in STATUSES if isinstance(error, kind)))


class Log(Logger):  # type: ignore[misc]
    """gunicorn's own lines, which go where all others go, in the same shape."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        configure_service(cfg.loglevel.upper(), load_settings().log_format, sys.stdout)
        logging.captureWarnings(True)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class Worker(ThreadWorker):  # type: ignore[misc]
    """Answers every connection that the kernel took before the stop, and errors as problems.

    A connection is either with a thread or among ``waiting``, which has the one that has waited
    longest first, and what is done when the wait is over.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = load_settings()
        self.request_timeout = settings.request_timeout
        self.longest_body = settings.max_body
        self.waiting: dict[Connection, Callable[[Connection], None]] = {}
        self.large: dict[Connection, None] = {}
        self.quiet = 0  # connections that have been waiting for a second or more
        self.next_look = 0.0

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Refuse TLS, which would have to be read in the main thread too."""
        if cfg.is_ssl:
            sys.exit("rollcall: TLS has to end at a proxy, see docs/limits.md")

    def set_accept_enabled(self, enabled: bool) -> None:
        """Stop listening, when the worker stops, only after taking what waits to be accepted.

        gunicorn leaves those connections in the backlog, and the kernel resets them: requests of
        clients that saw their connection succeed.
        """
        super().set_accept_enabled(enabled)
        if enabled or self.alive:
            return
        for listener in self.sockets:
            while self._take(listener):
                pass
            listener.close()

    def accept(self, listener: Any) -> None:
        """Take a connection, but when all threads have one let the other workers go first.

        The first worker to wake up would otherwise take all that arrive at once, and clients that
        keep their connections, such as a proxy, would have one process work for them.
        """
        if self.cfg.threads <= self.nr_conns - self.quiet < ENOUGH_FOR_ALL:
            time.sleep(LET_OTHERS_GO_FIRST)
        self._take(listener)

    def _take(self, listener: Any) -> bool:
        """Take a connection, if there is one; return whether there was.

        Where it is one too many, the one that has waited longest has to make room.
        """
        try:
            client, address = listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            logger.warning("a connection cannot be taken: %s", error)
            if error.errno in NO_DESCRIPTORS:
                time.sleep(LET_OTHERS_GO_FIRST)
                self._make_room()
            return False
        self.nr_conns += 1
        if self.nr_conns >= self.worker_connections:
            self._make_room()
        connection = Connection(self.cfg, client, address, self.longest_body)
        self._await_request(connection)
        self._read(connection)  # often it is there already
        return True

    def _make_room(self) -> None:
        for connection in list(self.waiting)[:1]:
            self._close(connection)

    def _wait(
        self,
        connection: Connection,
        event: int,
        then: Callable[[Connection], None],
        patience: float,
    ) -> None:
        """Have a connection wait until it can be read or written, for so many seconds."""
        connection.since = time.monotonic()
        connection.deadline = connection.since + patience
        self.waiting[connection] = then

        def go_on(_: Any) -> None:
            # Not if another event that was found together with this one has ended the wait.
            if self.waiting.get(connection) == then:
                then(connection)

        self.poller.register(connection.socket, event, go_on)

    def _wait_no_more(self, connection: Connection) -> None:
        if connection in self.waiting:
            del self.waiting[connection]
            self.poller.unregister(connection.socket)

    def _await_request(self, connection: Connection) -> None:
        """Wait for the next request, of which some may be there already."""
        patience = self.cfg.keepalive if self.alive else STOP_KEEPALIVE_LINGER
        if connection.has_begun:
            patience = self.request_timeout
        self._wait(connection, selectors.EVENT_READ, self._read, patience)
        if connection.has_begun:
            self._look_at_request(connection)

    def _read(self, connection: Connection) -> None:
        """Take what a client has sent of its request."""
        is_first = not connection.has_begun
        try:
            is_all = not connection.receive()
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        if is_first:
            connection.deadline = time.monotonic() + self.request_timeout
        if not is_all:
            self._look_at_request(connection)
        elif connection.is_in_body:
            self._refuse(connection, BadRequest())
        elif connection.has_begun:
            connection.last_request()
            self._work_on(connection)
        else:
            self._close(connection)

    def _work_on(self, connection: Connection) -> None:
        self._wait_no_more(connection)
        self.enqueue_req(connection)

    def _look_at_request(self, connection: Connection) -> None:
        """Give a request that is there as a whole to a thread."""
        try:
            is_there = connection.next_request()
        except OSError:
            self._close(connection)
        except (errors.ParseException, HTTPException) as error:
            self._refuse(connection, error)
        else:
            if is_there:
                self._work_on(connection)
            else:
                self._mind_the_size(connection)

    def _mind_the_size(self, connection: Connection) -> None:
        """Let only so many waiting connections hold much; who has for longest is given up."""
        if connection.held <= LARGE:
            return
        self.large[connection] = None
        if len(self.large) > MOST_LARGE:
            oldest = next(one for one in self.large if one in self.waiting)
            self._give_up(oldest, ServiceUnavailable(retry_after=1))

    def handle(self, connection: Connection) -> bool:
        """Answer a request; return whether another can follow. Runs in a thread."""
        request = None
        another = False
        try:
            request = next(connection.parser)
            if connection.lingers:
                request.force_close()
            another = self.handle_request(request, connection) and _ended(connection.parser)
        except (StopIteration, errors.NoMoreData):
            logger.debug("a request or its answer broke off")
        except Exception as error:
            connection.sock.left.clear()
            connection.lingers = True
            self.handle_error(request, connection.sock, connection.client, error)
        connection.try_to_flush()
        return another

    def finish_request(self, connection: Connection, work: Future[bool]) -> None:
        """Take a connection back from its thread."""
        self.large.pop(connection, None)
        connection.ends = connection.ends or not work.result()
        self._send(connection)

    def _send(self, connection: Connection) -> None:
        """Wait until the client has taken its answer, if it has not."""
        if connection.sock.left:
            self._wait(connection, selectors.EVENT_WRITE, self._write, self.request_timeout)
            self._mind_the_size(connection)
        elif connection.ends and (connection.lingers or connection.has_begun):
            self._linger(connection)
        elif connection.ends:
            self._close(connection)
        else:
            self._await_request(connection)

    def _write(self, connection: Connection) -> None:
        connection.try_to_flush()
        if not connection.sock.left:
            self._wait_no_more(connection)
            self.large.pop(connection, None)
            self._send(connection)

    def _linger(self, connection: Connection) -> None:
        """Let a client that may still be sending read its answer, which unread data would drop."""
        try:
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
        else:
            self._wait(connection, selectors.EVENT_READ, self._discard, LINGER)

    def _discard(self, connection: Connection) -> None:
        try:
            is_all = not connection.discard()
        except BlockingIOError:
            return
        except OSError:
            is_all = True
        if is_all:
            self._close(connection)

    def _refuse(self, connection: Connection, error: Exception) -> None:
        """Answer in the place of the application, and end the connection."""
        self._wait_no_more(connection)
        self.large.pop(connection, None)
        connection.forget_request()
        self.handle_error(None, connection.sock, connection.client, error)
        connection.ends = connection.lingers = True
        connection.try_to_flush()
        self._send(connection)

    def _give_up(self, connection: Connection, error: Exception) -> None:
        """End a connection that waits, with an answer if it is in the middle of a request."""
        if connection.has_begun and not connection.sock.left:
            self._refuse(connection, error)
        else:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        self._wait_no_more(connection)
        self.large.pop(connection, None)
        self.nr_conns -= 1
        connection.socket.close()

    def murder_keepalived(self, force: bool = False) -> None:
        """Give up, about once a second, the connections that have waited too long, or all.

        And bring the metrics up to date.
        """
        now = time.monotonic()
        if now < self.next_look and self.alive:
            return
        self.next_look = now + LOOK_EVERY
        bring_up_to_date()
        for connection in list(self.waiting):
            if force:
                self._close(connection)
            elif connection.deadline <= now:
                self._give_up(connection, RequestTimeout())
        self.quiet = sum(connection.since < now - LOOK_EVERY for connection in self.waiting)

    def _cap_keepalive(self, deadline: float) -> None:
        """Have connections that wait for a request to begin end at the latest then."""
        for connection in self.waiting:
            if not connection.held:
                connection.deadline = min(connection.deadline, deadline)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Look more often whether a connection has waited for too long when the worker stops."""
        super().wait_for_and_dispatch_events(timeout if self.alive else min(timeout, STOPPING_NAP))

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer what is not even HTTP; gunicorn's own answer is HTML that repeats the input."""
        with Exchange() as known:
            response = respond(problem_of(exc).answer())
            response.headers[REQUEST_ID] = known.request_id
            served(known, getattr(req, "method", None), str(response.status_code))
            try:
                client.sendall(_as_http(response))
            except OSError as error:
                logger.debug("the client is gone: %s", error)


def _ended(parser: Any) -> bool:
    """Tell whether a request ends where its bytes do, so that another can follow it.

    What the application did not read of the body is looked at here for the first time.
    """
    try:
        return bool(parser.finish_body()) and not parser.unreader.take_buffered()
    except (OSError, errors.ParseException) as error:
        logger.debug("the body is malformed: %s", error)
        return False


def _as_http(response: Response) -> bytes:
    body = response.get_data()
    head = f"HTTP/1.1 {response.status}\r\nConnection: close\r\n"
    pairs = with_ours(list(response.headers.items()))
    headers = "".join(f"{name}: {value}\r\n" for name, value in pairs)
    return f"{head}{headers}\r\n".encode() + body
