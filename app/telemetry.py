"""Errors to Sentry and traces to OpenTelemetry, where a setting says so; neither is required.

What leaves the house is ours: types and stacks of exceptions, routes, statuses, and the request's
id, by which the log has the rest. No message of an exception, no local variable, no header, path,
query or body: any of them may hold what a client has sent.
"""

from __future__ import annotations

import importlib
import logging
import threading
import traceback
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flask import Flask

from app.config import Settings
from app.errors import ConfigurationError
from app.metrics import NO_ROUTE, label_of
from app.observability import at_work

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def init_app(app: Flask, settings: Settings) -> None:
    """Set up what the settings ask for, before the requests are observed.

    Raises ConfigurationError where a library is missing, or a setting cannot be used.
    """
    if settings.sentry_dsn:
        report_to_sentry(settings.sentry_dsn)
    if settings.otlp_endpoint:
        _library("opentelemetry.sdk.trace", OTLP, "otel")
        exporter = _library("opentelemetry.exporter.otlp.proto.http.trace_exporter", OTLP, "otel")
        trace(app, exporter.OTLPSpanExporter(f"{settings.otlp_endpoint.rstrip('/')}/v1/traces"))


OTLP = "OTEL_EXPORTER_OTLP_ENDPOINT"


def _library(name: str, variable: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigurationError(
            f"{variable} is set, but the library is missing: install rollcall[{extra}]"
        ) from None


def report_to_sentry(dsn: str, **options: Any) -> None:
    """Send each line of level ERROR, and above, to Sentry. ``options`` are those of its client."""
    sentry = _library("sentry_sdk", "SENTRY_DSN", "sentry")
    atexit = importlib.import_module("sentry_sdk.integrations.atexit")
    logs = importlib.import_module("sentry_sdk.integrations.logging")
    try:
        sentry.init(
            dsn,
            default_integrations=False,
            auto_enabling_integrations=False,
            integrations=[
                logs.LoggingIntegration(level=None, event_level=logging.ERROR),
                atexit.AtexitIntegration(callback=lambda pending, timeout: None),
            ],
            include_local_variables=False,
            max_breadcrumbs=0,
            before_send=_without_words,
            **options,
        )
    except sentry.utils.BadDsn:
        raise ConfigurationError("SENTRY_DSN is not a DSN as Sentry gives them") from None


def _without_words(event: dict[str, Any], hint: Any) -> dict[str, Any]:
    """Take out of an event for Sentry what may be a client's; put in which request it was."""
    for error in event.get("exception", {}).get("values", ()):
        error.pop("value", None)
        error.pop("mechanism", None)
    template = event.get("logentry", {}).get("message")
    event["logentry"] = {"message": template}
    event.pop("extra", None)
    known = at_work.get()
    if known is not None:
        event["tags"] = {"request_id": known.request_id}
    return event


def trace(app: Flask, exporter: Any) -> None:
    """Have each request be a span, and each error that is logged an event of it."""
    app.wsgi_app = Traced(app.wsgi_app, exporter)  # type: ignore[method-assign]


class Traced:
    """A WSGI application whose every request is a span; to be within an observed one."""

    def __init__(self, app: WSGIApplication, exporter: Any) -> None:
        self._app = app
        self._exporter = exporter
        self._beginning = threading.Lock()
        self._provider: Any = None
        self._api: Any = importlib.import_module("opentelemetry.trace")
        propagation = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
        self._callers = propagation.TraceContextTextMapPropagator()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status = 500

        def start(line: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            nonlocal status
            status = int(line[:3])
            return start_response(line, headers, *error)

        method = label_of(environ["REQUEST_METHOD"])
        caller = self._callers.extract({"traceparent": environ.get("HTTP_TRACEPARENT", "")})
        with self._begun().start_as_current_span(
            method,
            context=caller,
            kind=self._api.SpanKind.SERVER,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            body = self._app(environ, start)
            self._describe(span, method, status)
            return body

    def _begun(self) -> Any:
        """Return the tracer. It has a thread, which only a worker may start: not before a fork."""
        with self._beginning:
            if self._provider is None:
                sdk = importlib.import_module("opentelemetry.sdk.trace")
                export = importlib.import_module("opentelemetry.sdk.trace.export")
                self._provider = sdk.TracerProvider()
                self._provider.add_span_processor(export.BatchSpanProcessor(self._exporter))
                logging.getLogger().addHandler(ErrorsToSpans(logging.ERROR))
        return self._provider.get_tracer("rollcall")

    def flush(self) -> None:
        """Send what has not been sent yet."""
        self._provider.force_flush()

    def _describe(self, span: Any, method: str, status: int) -> None:
        known = at_work.get()
        span.set_attribute("http.request.method", method)
        span.set_attribute("http.response.status_code", status)
        if known is not None:
            route = known.route or NO_ROUTE
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
            span.set_attribute("rollcall.request_id", known.request_id)
            span.set_attribute("rollcall.retries", known.retries)
        if status >= 500:
            span.set_status(self._api.StatusCode.ERROR)


class ErrorsToSpans(logging.Handler):
    """Adds the type and the stack of an exception that is logged to the span it was logged in."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        span = importlib.import_module("opentelemetry.trace").get_current_span()
        stack = "".join(traceback.format_tb(error.__traceback__))
        names = {"exception.type": type(error).__qualname__, "exception.stacktrace": stack}
        span.add_event("exception", names)
