"""What the service says of itself: one line an event, and one for each request.

On a terminal the lines are for people, elsewhere each is a JSON object in ASCII: whatever a client
sends, it stays within the quotes of one value of one line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable
from contextvars import ContextVar, Token
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TextIO

import structlog
from flask import Flask, Response, g, request
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, Processor, WrappedLogger

from app import metrics, transactions
from app.config import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

REQUEST_ID = "X-Request-ID"
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})


class Exchange:
    """What is known of a request; while it is entered, the lines logged bear the request's id."""

    __slots__ = ("_before", "request_id", "retries", "route", "started", "tenant", "token")

    def __init__(self, request_id: str | None = None) -> None:
        sane = SANE_REQUEST_ID.fullmatch(request_id or "")
        self.request_id = sane[0] if sane else os.urandom(16).hex()
        self.route: str | None = None  # the rule, not the path, which may be anything
        self.token: str | None = None
        self.tenant: str | None = None
        self.retries = 0
        self.started = time.perf_counter()

    def __enter__(self) -> Exchange:
        self._before: Token[Exchange | None] = at_work.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        at_work.reset(self._before)


at_work: ContextVar[Exchange | None] = ContextVar("at_work", default=None)


def init_app(app: Flask, settings: Settings) -> None:
    """Give each request an id, a line and its place in the metrics; log, unless that is set up.

    To be called before anything else hooks into requests: what that answers counts as well.
    """
    if not _root.handlers:
        configure_command(settings.log_level)
    metrics.init_app()
    transactions.on_retry.add(count_retry)
    app.after_request(_note)
    app.wsgi_app = Observed(app.wsgi_app)  # type: ignore[method-assign]


def count_retry(sqlstate: str | None) -> None:
    """Count a retry of the request at hand, if there is one."""
    known = at_work.get()
    if known is not None:
        known.retries += 1


def _note(response: Response) -> Response:
    """Keep what is known only while Flask has the request."""
    known = at_work.get()
    if known is not None:
        rule = request.url_rule
        known.route = None if rule is None else rule.rule
        known.token = getattr(g.get("token"), "name", None)
    return response


class Observed:
    """A WSGI application whose every answer bears the request's id, is counted, and logged."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status = ""
        with Exchange(environ.get("HTTP_X_REQUEST_ID")) as known:

            def start(line: str, headers: list[tuple[str, str]], *error: Any) -> Any:
                nonlocal status
                status = line[:3]
                return start_response(line, [*headers, (REQUEST_ID, known.request_id)], *error)

            body = self._app(environ, start)
            served(known, environ["REQUEST_METHOD"], status)
            return body


def served(known: Exchange, method: str | None, status: str) -> None:
    """Count and log a request that was answered; one that was not even HTTP has no method."""
    seconds = time.perf_counter() - known.started
    metrics.count_request(method, known.route, status, seconds)
    level = logging.DEBUG if known.route in PROBES else logging.INFO
    if not _requests.isEnabledFor(level):
        return
    ms = round(seconds * 1000, 2)
    for handler in _root.handlers:
        if isinstance(handler, JsonStream):
            handler.write_request(level, known, method, status, ms)
            return
    who = (known.token, known.tenant, known.retries)
    _requests.log(level, IN_WORDS, method, known.route, status, ms, *who)


_root = logging.getLogger()
_requests = logging.getLogger("rollcall.request")
IN_WORDS = "%s %s: %s in %s ms, token %s, tenant %s, %s retries"


class JsonStream(logging.StreamHandler):  # type: ignore[type-arg]
    """Where the service's lines go. The one that is written most does without a log record.

    The way of all others would take it five times as long, and a tenth of a request.
    """

    def write_request(
        self, level: int, known: Exchange, method: str | None, status: str, ms: float
    ) -> None:
        """Write the line of a request. Of its fields clients choose the method alone."""
        now = time.time()
        line = (
            f'{{"timestamp":"{_time(now)}","level":"{LEVELS[level]}","event":"request",'
            f'"request_id":"{known.request_id}","method":{_quoted(method)},'
            f'"route":{_quoted(known.route)},"status":{status},"ms":{ms},'
            f'"token":{_quoted(known.token)},"tenant":{_quoted(known.tenant)},'
            f'"retries":{known.retries}}}\n'
        )
        try:
            with self.lock:  # type: ignore[union-attr]
                self.stream.write(line)
                self.stream.flush()
        except OSError:
            # As for all other lines: said on standard error, and no reason not to serve.
            self.handleError(_requests.makeRecord("", level, "", 0, line, (), None))


LEVELS = {logging.DEBUG: "debug", logging.INFO: "info"}
_quoted = lru_cache(maxsize=1024)(json.dumps)


def configure_command(level: str) -> None:
    """Log in words on standard error: a command's standard output is what it was asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(Plain("%(levelname)s %(name)s: %(message)s"))
    _log_to(handler, level)


def configure_service(level: str, shape: str, stream: TextIO) -> None:
    """Log one line an event to a stream; ``shape`` is json, console, or auto: as the stream is."""
    for_people = shape == "console" or (shape == "auto" and stream.isatty())
    if for_people:
        handler: logging.Handler = logging.StreamHandler(stream)
        handler.setFormatter(_formatter(*_console(colors=stream.isatty())))
    else:
        handler = JsonStream(stream)
        handler.setFormatter(_formatter(_as_json))
    _log_to(handler, level)


def _log_to(handler: logging.Handler, level: str) -> None:
    _root.handlers[:] = [handler]
    _root.setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)


class Plain(logging.Formatter):
    """The standard library's lines, with nothing in them that a terminal would obey."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _harmless(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _harmless_lines(super().formatException(ei))


def _formatter(*shape: Processor) -> logging.Formatter:
    """Return what gives every logger's lines the shape that the last of the processors makes."""
    return ProcessorFormatter(
        foreign_pre_chain=[_stamp, add_log_level, add_logger_name, ExtraAdder(), _identify],
        processors=[
            ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            *shape,
        ],
    )


def _time(seconds: float) -> str:
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _stamp(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    event["timestamp"] = _time(event["_record"].created)
    return event


def _identify(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    known = at_work.get()
    if known is not None:
        event["request_id"] = known.request_id
        if known.tenant is not None:
            event["tenant"] = known.tenant
    return event


def _as_json(logger: WrappedLogger, name: str, event: EventDict) -> str:
    return ENCODER.encode(event)


# ASCII: no line separator of Unicode, no lone surrogate, whatever reads it.
ENCODER = json.JSONEncoder(separators=(",", ":"), default=repr)


def _console(colors: bool) -> list[Processor]:
    """Return what makes lines for people. Tracebacks are plain: others show local variables."""
    return [_harmless_event, ConsoleRenderer(colors=colors, exception_formatter=plain_traceback)]


def _harmless_event(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Keep clients from writing lines of their own, or to the terminal itself."""
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _harmless_lines(value) if key == "exception" else _harmless(value)
    return event


# Controls, what turns the direction of text or is not seen, line separators, lone surrogates.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def _harmless(text: str) -> str:
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def _harmless_lines(text: str) -> str:
    """Return several lines that cannot be taken for lines of the log."""
    return "\n".join(f"    {_harmless(line)}" for line in text.split("\n"))
