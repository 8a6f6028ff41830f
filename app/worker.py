"""gunicorn's threaded worker, which here stops without loss and answers every error as JSON."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from flask import Response
from gunicorn.glogging import Logger
from gunicorn.http import errors
from gunicorn.workers.gthread import ThreadWorker

from app.api.errors import Problem, http_problem, problem_of
from app.config import load_settings
from app.metrics import sample_pools
from app.observability import REQUEST_ID, Exchange, configure_service, served

LET_OTHERS_GO_FIRST = 0.001  # seconds
SAMPLE_EVERY = 1.0  # seconds

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
    """Answers every connection that the kernel took before the stop, and errors as problems."""

    sampled = 0.0

    def set_accept_enabled(self, enabled: bool) -> None:
        """Stop listening, when the worker stops, only after taking what waits to be accepted.

        gunicorn leaves those connections in the backlog, and the kernel resets them: requests of
        clients that saw their connection succeed.
        """
        super().set_accept_enabled(enabled)
        if enabled or self.alive:
            return
        for listener in self.sockets:
            self._accept_all(listener)
            listener.close()

    def _accept_all(self, listener: Any) -> None:
        before = -1
        while before != self.nr_conns:
            before = self.nr_conns
            super().accept(listener)

    def accept(self, listener: Any) -> None:
        """Take a connection, but when all threads have one let the other workers go first.

        The first worker to wake up would otherwise take all that arrive at once, and clients that
        keep their connections, such as a proxy, would have one process work for them.
        """
        if self.nr_conns >= self.cfg.threads:
            time.sleep(LET_OTHERS_GO_FIRST)
        super().accept(listener)

    def notify(self) -> None:
        """Tell the master that we are alive, and the metrics what the pool is like."""
        super().notify()
        now = time.monotonic()
        if now - self.sampled >= SAMPLE_EVERY:
            self.sampled = now
            sample_pools()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer what is not even HTTP; gunicorn's own answer is HTML that repeats the input."""
        with Exchange() as known:
            response = problem_of(exc).response()
            response.headers[REQUEST_ID] = known.request_id
            served(known, getattr(req, "method", None), str(response.status_code))
            try:
                client.sendall(_as_http(response))
            except OSError as error:
                logger.debug("the client is gone: %s", error)


def _as_http(response: Response) -> bytes:
    body = response.get_data()
    head = f"HTTP/1.1 {response.status}\r\nConnection: close\r\n"
    headers = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
    return f"{head}{headers}\r\n".encode() + body
