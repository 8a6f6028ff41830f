"""What goes to Sentry and OpenTelemetry, and that nothing of a client's does."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sentry_sdk
from flask import Flask
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode
from sentry_sdk.transport import Transport

from app import create_app, telemetry
from app.errors import ConfigurationError

DSN = "https://key@127.0.0.1/1"
AWAY = "postgresql://u@127.0.0.1:1/d"


class Kept(Transport):
    """Keeps what would be sent to Sentry."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.events.append(envelope.get_event())


@pytest.fixture
def kept() -> Iterator[Kept]:
    transport = Kept()
    telemetry.report_to_sentry(DSN, transport=transport)
    yield transport
    sentry_sdk.init()


class Spans(SpanExporter):
    """Keeps what would be sent by OpenTelemetry."""

    def __init__(self) -> None:
        self.sent: list[ReadableSpan] = []
        self.endpoint = ""

    def at(self, endpoint: str) -> Spans:
        """Be the exporter for an address."""
        self.endpoint = endpoint
        return self

    def export(self, spans: Any) -> SpanExportResult:
        self.sent += spans
        return SpanExportResult.SUCCESS


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, as it was afterwards."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield root
    root.handlers[:] = before


def fails() -> Any:
    secret = "Hippo"
    raise LookupError(f"Zebra {secret}")


@pytest.fixture
def broken(make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch) -> Flask:
    """An application with a route that fails."""
    app = make_app(AWAY)
    monkeypatch.setitem(app.view_functions, "health.healthz", fails)
    return app


def test_an_error_goes_to_sentry_without_what_a_client_sent(broken: Flask, kept: Kept) -> None:
    """Its type, its stack and the request's id, by which the log has the rest."""
    answer = broken.test_client().get(
        "/healthz?Zebra", headers={"Authorization": "Zebra", "X-Request-ID": "it"}, data="Zebra"
    )
    assert answer.status_code == 500
    (event,) = kept.events
    (error,) = event["exception"]["values"]
    assert error["type"] == "LookupError"
    assert error["stacktrace"]["frames"][-1]["function"] == "fails"
    assert event["tags"] == {"request_id": "it"}
    assert event["logentry"] == {"message": "unforeseen error"}
    lines = [frame.pop("context_line") for frame in error["stacktrace"]["frames"]]
    assert lines
    for frame in error["stacktrace"]["frames"]:
        del frame["pre_context"], frame["post_context"]  # our own source, which says Zebra
    sent = json.dumps(event)
    assert "Zebra" not in sent
    assert "Hippo" not in sent


def test_an_error_outside_of_a_request_goes_to_sentry_too(kept: Kept) -> None:
    """A line without an exception is one as well; a warning is not, and nothing goes before it."""
    logging.getLogger("x").warning("a %s", "Zebra")
    logging.getLogger("x").error("an %s", "Zebra", extra={"more": "Zebra"})
    (event,) = kept.events
    assert event["logentry"] == {"message": "an %s"}
    assert "tags" not in event
    assert "Zebra" not in json.dumps(event)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    """What applications send that are made while this is there."""
    spans = Spans()
    library = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    monkeypatch.setattr(library, "OTLPSpanExporter", spans.at)
    return spans


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[telemetry.Traced]:
    """The traced applications that are made while this is there."""
    made: list[telemetry.Traced] = []

    class Remembered(telemetry.Traced):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(telemetry, "Traced", Remembered)
    return made


@pytest.mark.usefixtures("root")
def test_a_request_is_a_span_without_what_a_client_sent(
    make_app: Callable[..., Flask],
    monkeypatch: pytest.MonkeyPatch,
    spans: Spans,
    traced: list[telemetry.Traced],
) -> None:
    """Route, status, id; part of the caller's trace; an error by its type and stack."""
    app = make_app(AWAY, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1/")
    monkeypatch.setitem(app.view_functions, "health.healthz", fails)
    assert spans.endpoint == "http://127.0.0.1:1/v1/traces"
    client = app.test_client()
    caller = {"traceparent": f"00-{7:032x}-{9:016x}-01", "Authorization": "Zebra"}
    client.get("/healthz?Zebra", headers={**caller, "X-Request-ID": "it"}, data="Zebra")
    client.open("/Zebra", method="ZEBRA")
    logging.getLogger("x").error("no exception")
    traced[0].flush()
    failed, unknown = spans.sent
    assert (failed.name, unknown.name) == ("GET /healthz", "other none")
    assert failed.context is not None
    assert failed.context.trace_id == 7
    assert dict(failed.attributes or {}) == {
        "http.request.method": "GET",
        "http.response.status_code": 500,
        "http.route": "/healthz",
        "rollcall.request_id": "it",
        "rollcall.retries": 0,
    }
    assert failed.status.status_code is StatusCode.ERROR
    assert unknown.status.status_code is StatusCode.UNSET
    (event,) = failed.events
    assert dict(event.attributes or {}).keys() == {"exception.type", "exception.stacktrace"}
    assert (event.attributes or {})["exception.type"] == "LookupError"


@pytest.mark.usefixtures("root")
def test_a_span_needs_no_observer() -> None:
    """It then has no route."""
    spans = Spans()

    def application(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return []

    application_traced = telemetry.Traced(application, spans)
    application_traced({"REQUEST_METHOD": "GET"}, lambda *_: None)  # type: ignore[arg-type]
    application_traced.flush()
    assert [span.name for span in spans.sent] == ["GET"]


@pytest.mark.parametrize(
    ("variable", "value", "module", "extra"),
    [
        ("SENTRY_DSN", DSN, "sentry_sdk", "sentry"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://h:1", "opentelemetry.sdk.trace", "otel"),
    ],
)
def test_a_library_that_is_missing_is_one_clear_line(
    variable: str, value: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"{variable} is set, .* rollcall\[{extra}\]$"):
        create_app({"DATABASE_URL": AWAY, variable: value})


def test_a_dsn_that_is_none_is_one_clear_line() -> None:
    """Without repeating it: it may hold a secret."""
    with pytest.raises(ConfigurationError, match=r"^SENTRY_DSN is not a DSN") as caught:
        create_app({"DATABASE_URL": AWAY, "SENTRY_DSN": "https://Zebra"})
    assert "Zebra" not in str(caught.value)


def test_the_setting_turns_reports_on(make_app: Callable[..., Flask]) -> None:
    """Nothing is sent before there is something to send; the key is not in the settings' repr."""
    app = make_app(AWAY, SENTRY_DSN=DSN)
    assert sentry_sdk.get_client().is_active()
    sentry_sdk.init()
    assert "key" not in repr(app.extensions["rollcall"])
