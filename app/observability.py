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

    __slots__ = ("_before", "request_id", "retries", "route", "started", "token")

    def __init__(self, request_id: str | None = None) -> None:
        sane = SANE_REQUEST_ID.fullmatch(request_id or "")
        self.request_id = sane[0] if sane else os.urandom(16).hex()
        self.route: str | None = None  # the rule, not the path, which may be anything
        self.token: str | None = None
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
    if not logging.getLogger().handlers:
        configure_command(settings.log_level)
    metrics.init_app()
    transactions.on_retry.add(_count_retry)
    app.after_request(_note)
    app.wsgi_app = Observed(app.wsgi_app)  # type: ignore[method-assign]


def _count_retry(sqlstate: str | None) -> None:
    known = at_work.get()
    if known is not None:
        known.retries += 1


def _note(response: Response) -> Response:
    """Keep what is known only while Flask has the request."""
    known = at_work.get()
    if known is not None:
        known.route = request.url_rule.rule if request.url_rule is not None else None
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


_requests = logging.getLogger("rollcall.request")


def served(known: Exchange, method: str | None, status: str) -> None:
    """Count and log a request that was answered; one that was not even HTTP has no method."""
    seconds = time.perf_counter() - known.started
    metrics.count_request(method, known.route, status, seconds)
    level = logging.DEBUG if known.route in PROBES else logging.INFO
    if _requests.isEnabledFor(level):
        said = {
            "request_id": known.request_id,
            "method": method,
            "route": known.route,
            "status": int(status),
            "ms": round(seconds * 1000, 2),
            "token": known.token,
            "retries": known.retries,
        }
        # Not by info(): that would look for the line of code that called it.
        record = _requests.makeRecord(_requests.name, level, "", 0, IN_WORDS, (said,), None)
        _requests.handle(record)


IN_WORDS = "request %(request_id)s: %(method)s %(route)s, %(status)s in %(ms)s ms"


def configure_command(level: str) -> None:
    """Log in words on standard error: a command's standard output is what it was asked for."""
    handler = logging.StreamHandler()
    handler.setFormatter(Plain("%(levelname)s %(name)s: %(message)s"))
    _log_to(handler, level)


def configure_service(level: str, shape: str, stream: TextIO) -> None:
    """Log one line an event to a stream; ``shape`` is json, console, or auto: as the stream is."""
    for_people = shape == "console" or (shape == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(for_people, colors=stream.isatty()))
    # Nobody reads them, and each line would pay for them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    _log_to(handler, level)


def _log_to(handler: logging.Handler, level: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)


class Plain(logging.Formatter):
    """The standard library's lines, with nothing in them that a terminal would obey."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _harmless(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _harmless_lines(super().formatException(ei))


class Lines(ProcessorFormatter):
    """Every logger's lines: JSON, or for people, in colour or not."""

    def __init__(self, for_people: bool, colors: bool) -> None:
        self._shape = _console(colors) if for_people else [_as_json]
        self._request = self._in_shape if for_people else _request_as_json
        super().__init__(
            foreign_pre_chain=[_stamp, add_log_level, add_logger_name, ExtraAdder(), _identify],
            processors=[
                ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                *self._shape,
            ],
        )

    def format(self, record: logging.LogRecord) -> str:
        if record.name == _requests.name:
            return self._request(record, record.args)
        return super().format(record)

    def _in_shape(self, record: logging.LogRecord, said: Any) -> str:
        line: Any = {"timestamp": _time(record), "level": _level(record), "event": "request"}
        line |= said
        for processor in self._shape:
            line = processor(None, "", line)
        return str(line)


def _request_as_json(record: logging.LogRecord, said: Any) -> str:
    """Write the line that is written most, in a quarter of the time that json takes."""
    return (
        f'{{"timestamp":"{_time(record)}","level":"{_level(record)}","event":"request",'
        f'"request_id":"{said["request_id"]}","method":{_quoted(said["method"])},'
        f'"route":{_quoted(said["route"])},"status":{said["status"]},"ms":{said["ms"]},'
        f'"token":{_quoted(said["token"])},"retries":{said["retries"]}}}'
    )


_quoted = lru_cache(maxsize=1024)(json.dumps)


def _level(record: logging.LogRecord) -> str:
    return record.levelname.lower()


def _time(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _stamp(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    event["timestamp"] = _time(event["_record"])
    return event


def _identify(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    known = at_work.get()
    if known is not None:
        event["request_id"] = known.request_id
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
