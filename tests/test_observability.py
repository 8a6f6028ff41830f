"""One line an event, whatever clients send, and nothing in it that is not for logs."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask, g
from flask.testing import FlaskClient
from gunicorn.config import Config
from sqlalchemy import Engine

from app import observability
from app.observability import Exchange, configure_command, configure_service
from app.worker import Log
from tests.conftest import empty
from tests.races import terminate_backends
from tests.serving import Service, serving

NASTY = "Zebra\r\n{\x1b[31m\u2028\u202e\x85\ud800"
FRESH = re.compile("[0-9a-f]{32}")


@pytest.fixture
def stream(logging_restored: None) -> io.StringIO:
    """A stream that is no terminal, and what the service's log goes to, at DEBUG."""
    stream = io.StringIO()
    configure_service("DEBUG", "auto", stream)
    return stream


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def request_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines_of(stream.getvalue()) if line["event"] == "request"]


def test_the_line_of_a_request_says_what_was_asked_and_answered(
    client: FlaskClient, stream: io.StringIO
) -> None:
    """With the rule rather than the path, and at DEBUG for probes."""
    client.get("/api/v1/departments/7")
    client.get("/readyz")
    shown, probe = request_lines(stream)
    assert list(shown) == [
        *("timestamp", "level", "event", "request_id", "method", "route"),
        *("status", "ms", "token", "tenant", "retries"),
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", shown["timestamp"])
    assert FRESH.fullmatch(shown["request_id"])
    assert shown["ms"] > 0
    del shown["timestamp"], shown["request_id"], shown["ms"]
    assert shown == {
        "level": "info",
        "event": "request",
        "method": "GET",
        "route": "/api/v1/departments/<int:id>",
        "status": 404,
        "token": None,
        "tenant": None,
        "retries": 0,
    }
    assert (probe["level"], probe["route"], probe["status"]) == ("debug", "/readyz", 200)


def test_the_name_of_the_token_is_in_the_line(
    make_app: Callable[..., Flask], database_url: str, stream: io.StringIO
) -> None:
    """The name only, quoted."""
    app = make_app(database_url)

    @app.before_request
    def authenticate() -> None:
        g.token = SimpleNamespace(name='por"tal', id="Zebra")

    app.test_client().get("/healthz")
    (line,) = request_lines(stream)
    assert line["token"] == 'por"tal'
    assert "Zebra" not in stream.getvalue()


def test_lines_bear_the_tenant_of_their_request(stream: io.StringIO) -> None:
    """From when it is known."""
    with Exchange() as known:
        logging.getLogger("x").warning("not yet")
        known.tenant = "acme"
        logging.getLogger("x").warning("now")
    assert [line.get("tenant") for line in lines_of(stream.getvalue())] == [None, "acme"]


def test_retries_are_in_the_line_and_their_lines_bear_the_request(
    client: FlaskClient, administrator: Engine, stream: io.StringIO
) -> None:
    """A connection that was cut is one."""
    assert client.get("/api/v1/departments").status_code == 200
    terminate_backends(administrator)
    client.get("/api/v1/departments", headers={"X-Request-ID": "cut"})
    (line,) = [line for line in request_lines(stream) if line["request_id"] == "cut"]
    assert line["retries"] == 1
    (retry,) = [
        line for line in lines_of(stream.getvalue()) if line["event"] == "transaction_retry"
    ]
    assert (retry["request_id"], retry["attempt"], retry["level"]) == ("cut", 1, "warning")


@pytest.mark.parametrize("sane", ["a", "A-z_0.9", "x" * 128])
def test_a_sane_request_id_is_kept(client: FlaskClient, sane: str) -> None:
    """And comes back."""
    answer = client.get("/healthz", headers={"X-Request-ID": sane})
    assert answer.headers.getlist("X-Request-ID") == [sane]


@pytest.mark.parametrize(
    "odd", ["", " ", "a b", 'a"b', "a,b", "ä", "x" * 129, "x" * 10_000, "a\x7f", "{}", "a\u2028"]
)
def test_any_other_request_id_is_replaced(client: FlaskClient, odd: str) -> None:
    """By one of our own."""
    environ = {"HTTP_X_REQUEST_ID": odd}
    answer = client.get("/healthz", environ_overrides=environ)
    assert FRESH.fullmatch(answer.headers["X-Request-ID"])


def test_every_error_bears_an_id_and_has_a_line(
    app: Flask, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """404, 405, 413, 415, 422, and 500, whose traceback can be found by it."""
    monkeypatch.setitem(app.view_functions, "health.healthz", lambda: 1 / 0)
    client = app.test_client()
    answers = [
        client.get("/nothing-here"),
        client.put("/api/v1/departments"),
        client.post("/api/v1/departments", content_type="application/json", data=b" " * 3_000_000),
        client.post("/api/v1/departments", data=b"x"),
        client.post("/api/v1/departments", json={}),
        client.get("/healthz"),
    ]
    statuses = [404, 405, 413, 415, 422, 500]
    assert [answer.status_code for answer in answers] == statuses
    lines = request_lines(stream)
    assert [line["status"] for line in lines] == statuses
    ids = [answer.headers["X-Request-ID"] for answer in answers]
    assert [line["request_id"] for line in lines] == ids
    assert len(set(ids)) == len(ids)
    (error,) = [line for line in lines_of(stream.getvalue()) if "exception" in line]
    assert error["request_id"] == ids[-1]
    assert "ZeroDivisionError" in error["exception"]


def test_an_application_that_fails_outright_is_left_to_the_server(stream: io.StringIO) -> None:
    """Which answers, and writes the line of it."""

    def broken(environ: Any, start_response: Any) -> Any:
        raise LookupError

    with pytest.raises(LookupError):
        observability.Observed(broken)({"REQUEST_METHOD": "GET"}, lambda *_: None)  # type: ignore[arg-type]
    assert stream.getvalue() == ""
    assert observability.at_work.get() is None


def test_a_response_made_outside_of_a_request_is_not_noted(app: Flask) -> None:
    """As Flask's own tools make them."""
    with app.test_request_context("/healthz"):
        response = app.process_response(app.make_response("x"))
    assert response.get_data() == b"x"


@pytest.mark.usefixtures("logging_restored")
def test_any_line_is_json_in_ascii_whatever_is_in_it() -> None:
    """Of the libraries' loggers as of ours, with what they add, and with tracebacks."""
    stream = io.StringIO()
    configure_service("INFO", "auto", stream)  # here: pytest cannot report a lone surrogate
    try:
        secret = "Hippo"
        raise LookupError(NASTY, len(secret))
    except LookupError:
        logging.getLogger("sqlalchemy.pool").exception("a %s", NASTY, extra={"more": {NASTY}})
    assert stream.getvalue().isascii()
    (line,) = lines_of(stream.getvalue())
    assert (line["event"], line["logger"], line["level"]) == (
        f"a {NASTY}",
        "sqlalchemy.pool",
        "error",
    )
    assert "LookupError" in line["exception"]
    assert "Hippo" not in line["exception"], "no local variables"
    assert line["more"] == repr({NASTY})


@pytest.mark.parametrize("colors", [True, False])
def test_people_get_lines_that_no_client_can_make_up(colors: bool, logging_restored: None) -> None:
    """Control characters are escaped, and a traceback is indented."""
    stream = io.StringIO()
    stream.isatty = lambda: colors  # type: ignore[method-assign]
    configure_service("INFO", "auto" if colors else "console", stream)
    try:
        raise LookupError(NASTY)
    except LookupError:
        logging.getLogger("x").exception("a %s", NASTY, extra={"more": NASTY, "attempt": 1})
    with Exchange("the-id") as known:
        observability.served(known, NASTY, "400")
    text = stream.getvalue()
    first, *traceback, last = text.splitlines()
    assert all(line.startswith("    ") for line in traceback)
    assert ("\x1b" in text) is colors
    assert "\x1b[31m\u2028" not in text
    assert not set("\r\x85\u2028\u202e\ud800") & set(text)
    assert r"Zebra\r\n{\x1b[31m\u2028\u202e\x85\ud800" in first
    assert "the-id" in last


def test_commands_log_in_words_on_standard_error(
    logging_restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without anything that a terminal would obey."""
    configure_command("INFO")
    try:
        raise LookupError(NASTY)
    except LookupError:
        logging.getLogger("x").exception("a %s", NASTY)
    with Exchange("the-id") as known:
        observability.served(known, "GET", "200")
    out, err = capsys.readouterr()
    first, *traceback, last = err.splitlines()
    assert out == ""
    assert first == r"ERROR x: a Zebra\r\n{\x1b[31m\u2028\u202e\x85\ud800"
    assert all(line.startswith("    ") for line in traceback)
    assert last.startswith("INFO rollcall.request: GET None: 200 in ")


def test_a_log_that_cannot_be_written_is_no_reason_not_to_serve(
    client: FlaskClient, stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full, or a reader that is gone: it is said on standard error."""

    def fail(text: str) -> int:
        raise OSError("no space left")

    stream.write = fail  # type: ignore[method-assign]
    assert client.get("/api/v1/departments/7").status_code == 404
    assert "no space left" in capsys.readouterr().err


def test_an_application_sets_up_logging_where_nobody_has(
    make_app: Callable[..., Flask], logging_restored: None
) -> None:
    """In the way of a command; a service has it set up by gunicorn before."""
    root = logging.getLogger()
    root.handlers.clear()
    make_app("postgresql://u@h/d", LOG_LEVEL="ERROR")
    assert root.level == logging.ERROR
    (handler,) = root.handlers
    make_app("postgresql://u@h/d", LOG_LEVEL="DEBUG")
    assert (root.handlers, root.level) == ([handler], logging.ERROR)


def test_gunicorn_logs_as_everybody_does(
    logging_restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its errors and warnings of Python, on standard output; and again after a reload."""
    config = Config()
    config.set("loglevel", "warning")
    log = Log(config)
    log.setup(config)
    log.info("not this")
    log.error("a %s", NASTY)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(NASTY, UserWarning, stacklevel=1)
    out, err = capsys.readouterr()
    assert err == ""
    assert [(line["logger"], line["level"]) for line in lines_of(out)] == [
        ("gunicorn.error", "error"),
        ("py.warnings", "warning"),
    ]


@pytest.fixture(scope="module")
def service(guarded_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with everything in its log."""
    empty(guarded_url)
    folder = tmp_path_factory.mktemp("observed")
    with serving(
        folder, DATABASE_URL=guarded_url, LOG_LEVEL="DEBUG", WEB_CONCURRENCY="1"
    ) as service:
        yield service


ID = b"X-Request-ID: "
HOSTILE = {
    "quotes and brackets": (b'GET /a"b{} HTTP/1.1\r\nX-Request-ID: "}\r\n\r\n', 404),
    "escapes": (b"GET /\x1b[31m HTTP/1.1\r\nX-Request-ID: \x1b[31m\r\n\r\n", 400),
    "encoded line break": (b"GET /%0d%0a%7b%7d HTTP/1.1\r\n\r\n", 404),
    "bytes that are no UTF-8": (b"GET /%ff%fe HTTP/1.1\r\nX-Request-ID: \xff\xfe\r\n\r\n", 404),
    "a long header": (b"GET / HTTP/1.1\r\nX-Request-ID: " + b"x" * 8000 + b"\r\n\r\n", 302),
    "too long a header": (b"GET / HTTP/1.1\r\nX-Request-ID: " + b"x" * 10_000 + b"\r\n\r\n", 431),
    "two ids": (b"GET / HTTP/1.1\r\nX-Request-ID: a\r\nX-Request-ID: b\r\n\r\n", 302),
    "an odd method": (b"ZEBRA / HTTP/1.1\r\n\r\n", 405),
    "no HTTP at all": (b"\x16\x03\x01\x00\x00\r\n\r\n", 400),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_request_is_one_line_of_valid_json(service: Service, case: str) -> None:
    """With an id of our own, which the answer bears, once."""
    sent, status = HOSTILE[case]
    before = len(service.log.read_bytes())
    with socket.create_connection(("127.0.0.1", service.port), 30) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        head = raw.makefile("rb").read().partition(b"\r\n\r\n")[0].decode("latin-1")
    assert head.startswith(f"HTTP/1.1 {status} ")
    (shown,) = re.findall(r"(?im)^x-request-id: (\S*)\r?$", head)
    assert FRESH.fullmatch(shown)

    def written() -> list[dict[str, Any]]:
        text = service.log.read_bytes()[before:].decode("ascii")
        return [json.loads(line) for line in text.split("\n")[:-1]]

    (line,) = [line for line in written() if line["event"] == "request"]
    assert (line["request_id"], line["status"]) == (shown, status)
    assert all("xxxx" not in json.dumps(line) for line in written())


def test_every_line_of_a_service_is_json(service: Service) -> None:
    """From its first on, gunicorn's among them."""
    lines = lines_of(service.log.read_text("ascii"))
    assert {"gunicorn.error"} < {line.get("logger") for line in lines}
    assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)


def test_a_password_that_is_refused_is_in_no_line(
    stream: io.StringIO, make_app: Callable[..., Flask]
) -> None:
    """Neither in the driver's words nor in the traceback, nor in the settings' repr."""
    app = make_app(
        "postgresql://nobody_here:Zebra@/d?host=/nowhere&password=Zebra",
        ROLLCALL_RETRY_DEADLINE=0.1,
    )
    client = app.test_client()
    assert client.get("/readyz").status_code == 503
    assert client.post("/api/v1/departments", json={"name": "x"}).status_code == 503
    logging.getLogger("x").error("%s %r", app.extensions["rollcall"], app.extensions["rollcall"])
    assert "not ready" in stream.getvalue()
    assert "Zebra" not in stream.getvalue()


def test_what_clients_send_to_the_database_is_in_no_line(
    client: FlaskClient, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters of a statement that fails are hidden."""
    app = client.application
    with app.app_context():
        engine: Engine = app.extensions["sqlalchemy"].engine
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE department RENAME TO gone")
    try:
        answer = client.post("/api/v1/departments", json={"name": "Zebra"})
    finally:
        with app.app_context(), engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE gone RENAME TO department")
    assert answer.status_code == 500
    assert "UndefinedTable" in stream.getvalue()
    assert "Zebra" not in stream.getvalue()
