"""The asynchronous service: what is its own, beside what it shares with Flask's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends
from flask import Flask
from sqlalchemy import create_engine, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app import tokens
from app.asgi import create_app
from app.asgi.exchange import Headers
from app.asgi.outside import Outside, _addresses
from app.async_database import get_session
from app.db import db
from app.models import Department
from app.security import FOR_ADMINS, required_scope
from app.tokens import SCOPES, new_token
from migrations_bootstrap.embedded import EmbeddedServer
from tests.asgi_client import AsgiApplication, ask, run
from tests.conftest import empty
from tests.hostile import MARK, SEEDED, bodies, conditions, fields, paths, queries
from tests.races import terminate_backends
from tests.serving import ROOT, UVICORN, Service, free_port, serving_by_uvicorn, settings_with_token
from tests.test_errors import assert_problem
from tests.test_hostile import Reply, code, read_reply
from tests.test_limits import redis

EMPLOYEES = "/api/v1/employees"
DEPARTMENTS = "/api/v1/departments"


@pytest.fixture
def service_kind() -> str:
    return "asgi"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def scope_of(path: str, method: str = "GET", **more: Any) -> dict[str, Any]:
    """Return a request as an ASGI server gives it."""
    usual = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    return {**usual, **more}


def test_every_route_asks_for_a_scope(make_app: Callable[..., Flask], database_url: str) -> None:
    """As the same endpoint does in the Flask service."""
    app = make_app(database_url, ROLLCALL_AUTH="token")
    with app.app_context():
        held = {scope: bearer(tokens.issue(db.engine, scope, scope)) for scope in SCOPES}
    client: Any = app.test_client()
    seen = set()
    for route in client.asgi().router.routes:
        path = route.path.replace("{id:int}", "1").replace("{filename:path}", "swagger-ui.css")
        path = path.replace("{name}", "nobody")
        for method in sorted({*route.methods, "OPTIONS"}):
            needed = required_scope(route.name, method)
            seen.add(needed)
            bare = client.open(path, method=method)
            assert (bare.status_code == 401) is (needed is not None), (route.name, method)
            for scope in SCOPES if needed else ():
                answer = client.open(path, method=method, headers=held[scope])
                enough = SCOPES.index(scope) >= SCOPES.index(str(needed))
                assert (answer.status_code in (401, 403)) is not enough, (route.name, method)
    assert seen == {None, *SCOPES}
    names = {route.name for route in client.asgi().router.routes}
    assert names & FOR_ADMINS == {"api.tenant", "api.tenants", "health.metrics"}


def test_an_address_that_others_reach_is_refused_without_authentication(database_url: str) -> None:
    """Whatever server it is that did not say where it listens."""
    app = AsgiApplication({"DATABASE_URL": database_url, "ROLLCALL_AUTH": "off"})()
    answers = [
        run(ask(app, scope_of("/healthz", server=server), b""))
        for server in (("192.0.2.1", 80), ("127.0.0.1", 80), ("/run/rollcall", None), None)
    ]
    assert [status for status, *_ in answers] == [403, 200, 200, 200]


class Uvicorn:
    """Whose lifespan it is, as uvicorn lets its applications know."""

    def __init__(self, **config: Any) -> None:
        self.config = type("Config", (), {"uds": None, "fd": None, **config})

    async def receive(self) -> dict[str, Any]:
        return {"type": "lifespan.startup"}


def test_where_uvicorn_is_going_to_listen_is_known() -> None:
    """By host and port, a Unix socket, or a socket that it was given."""
    assert _addresses(Uvicorn(host="0.0.0.0", port=1).receive) == [("0.0.0.0", 1)]
    assert _addresses(Uvicorn(uds="/run/x").receive) == []
    assert _addresses(lambda: None) == []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = _addresses(Uvicorn(fd=listener.fileno()).receive)
        assert found == [listener.getsockname()]


@pytest.mark.parametrize(
    ("settings", "host", "said"),
    [
        ({"ROLLCALL_AUTH": "off"}, "0.0.0.0", "is not a loopback address"),
        ({"ROLLCALL_AUTH": "off"}, "127.0.0.1", "no PostgreSQL server"),
        ({"ROLLCALL_ADMIN_TOKEN_FILE": "/nowhere"}, "0.0.0.0", "cannot be read"),
    ],
)
def test_what_must_not_start_says_why_in_one_line(
    settings: dict[str, str], host: str, said: str, logging_restored: None
) -> None:
    """To the server, which ends."""
    url = "postgresql://u@127.0.0.1:1/d"
    app = Outside(create_app({"DATABASE_URL": url, "ROLLCALL_CONNECT_TIMEOUT": 1, **settings}))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    uvicorn = Uvicorn(host=host, port=80)
    asyncio.run(app({"type": "lifespan"}, uvicorn.receive, send))
    (failed,) = sent
    assert failed["type"] == "lifespan.startup.failed"
    assert failed["message"].startswith("rollcall: ")
    assert said in failed["message"]


@pytest.mark.parametrize("embedded", [False, True])
def test_the_database_is_brought_up_before_the_first_request(
    server: EmbeddedServer,
    empty_database: str,
    tmp_path: Path,
    embedded: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    logging_restored: None,
) -> None:
    """With the token of the file; errors go where they are to, and the log is set up."""
    reported: list[str] = []
    monkeypatch.setattr("app.telemetry.report_to_sentry", reported.append)
    monkeypatch.setattr("app.asgi.TICK", 0.01)
    (tmp_path / "token").write_text(token := new_token())
    settings = {
        "DATABASE_URL": "" if embedded else empty_database,
        "ROLLCALL_AUTH": "off" if embedded else "token",
        "ROLLCALL_ADMIN_TOKEN_FILE": str(tmp_path / "token"),
        "SENTRY_DSN": "https://key@sentry.example/1",
    }
    if embedded:
        monkeypatch.setattr("app.asgi.EmbeddedServer", lambda folder: server)
    inner = create_app(settings)
    app = Outside(inner)

    async def live() -> None:
        told: list[Any] = []
        asked: asyncio.Queue[Any] = asyncio.Queue()

        async def send(message: Any) -> None:
            told.append(message["type"])

        asked.put_nowait({"type": "lifespan.startup"})
        life = asyncio.create_task(app({"type": "lifespan", "state": {}}, asked.get, send))
        while not told:
            await asyncio.sleep(0.01)
        shown = [(b"authorization", f"Bearer {token}".encode())]
        asked_for = ((EMPLOYEES, "GET"), ("/api/v1/tenants/nobody", "DELETE"))
        scopes = [scope_of(path, method, headers=shown) for path, method in asked_for]
        statuses = [(await ask(app, scope, b""))[0] for scope in scopes]
        await asyncio.sleep(0.05)
        asked.put_nowait({"type": "lifespan.shutdown"})
        await life
        # Not after asyncio.run: it ends a thread that a greenlet began, and coverage with it.
        assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert statuses == [200, 404]
        assert reported == ["https://key@sentry.example/1"]

    asyncio.run(live())


def test_a_route_of_fastapis_own_has_its_session(database_url: str) -> None:
    """Beside the resources, and behind the same gate."""
    app = create_app({"DATABASE_URL": database_url, "ROLLCALL_AUTH": "off"})
    given: list[AsyncSession] = []

    async def count(session: Annotated[AsyncSession, Depends(get_session)]) -> int:
        given.append(session)
        return int(await session.scalar(select(func.count()).select_from(Department)) or 0)

    app.add_api_route("/count", count)
    status, _, body = run(ask(app, scope_of("/count"), b""))
    assert (status, body) == (200, b"0")
    assert not given[0].in_transaction()
    assert run(ask(app, scope_of("/count", "POST"), b""))[0] == 405
    run(app.state.engine.dispose())


def test_headers_are_read_in_whatever_case() -> None:
    """One that is repeated is a list."""
    headers = Headers([(b"If-Match", b'"a"'), (b"if-match", b'"b"'), (b"x", b"y")])
    assert dict(headers) == {"if-match": '"a","b"', "x": "y"}
    assert len(headers) == 2
    assert "IF-MATCH" in headers


def test_a_body_is_read_within_its_limits(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """Announced or not, cut off, slow, or of a length that is none."""
    client: Any = make_app(database_url, ROLLCALL_MAX_BODY=1024).test_client()
    hasty: Any = make_app(database_url, ROLLCALL_REQUEST_TIMEOUT=0.1).test_client()
    json_type = (b"content-type", b"application/json")

    def post(
        headers: list[tuple[bytes, bytes]], *messages: Any, client: Any = client
    ) -> tuple[int, str]:
        async def send_all() -> Any:
            left = iter(messages)
            answer: list[Any] = []

            async def receive() -> Any:
                message = next(left)
                if message is None:
                    await asyncio.sleep(60)
                return message

            async def send(message: Any) -> None:
                answer.append(message)

            scope = scope_of(DEPARTMENTS, "POST", headers=[json_type, *headers])
            await client.asgi()(scope, receive, send)
            return answer[0]["status"], json.loads(answer[1]["body"])["code"]

        found: tuple[int, str] = run(send_all())
        return found

    def part(body: bytes, more: bool = True) -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": more}

    too_large = (413, "content_too_large")
    assert post([(b"content-length", b"1025")]) == too_large
    assert post([], part(b" " * 1000), part(b" " * 100)) == too_large
    assert post([], part(b"{"), {"type": "http.disconnect"}) == (400, "bad_request")
    assert post([], part(b"{"), None, client=hasty) == (408, "request_timeout")
    assert post([(b"content-length", b"+5")], part(b"{}", False)) == (400, "bad_request")
    assert post([], part(b"{"), part(b"}", False)) == (422, "invalid")
    found = client.post(DEPARTMENTS, json={"name": "Research"})
    assert found.status_code == 201


def test_an_address_that_is_too_long_or_too_large_an_id_is_refused(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """414 and 404."""
    client = make_app(database_url).test_client()
    assert_problem(client.get(f"{EMPLOYEES}?q={'x' * 5000}"), 414, "uri_too_long")
    run_long = client.get(f"{EMPLOYEES}/{'9' * 4000}")
    assert run_long.status_code == 404
    app: Any = client.asgi()  # type: ignore[attr-defined]
    path = f"{EMPLOYEES}/{'9' * 5000}"
    assert run(ask(app, scope_of(path, raw_path=b"/"), b""))[0] == 404


def test_options_and_head_are_answered(make_app: Callable[..., Flask], database_url: str) -> None:
    """With what a resource can do, and without a body."""
    client = make_app(database_url).test_client()
    assert client.options(EMPLOYEES).headers["Allow"] == "GET, HEAD, OPTIONS, POST"
    head, got = client.head(EMPLOYEES), client.get(EMPLOYEES)
    assert (head.data, head.headers["Content-Length"]) == (b"", got.headers["Content-Length"])


def test_answers_have_the_headers_of_the_service(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """Security headers, caching, and the request's id."""
    client = make_app(database_url).test_client()
    sane = client.get(EMPLOYEES, headers={"X-Request-ID": "abc"})
    assert sane.headers["X-Request-ID"] == "abc"
    assert sane.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in sane.headers["Content-Security-Policy"]
    assert "Strict-Transport-Security" not in sane.headers
    odd = client.get("/nowhere", headers={"X-Request-ID": "a b"}, base_url="https://localhost")
    assert odd.headers["X-Request-ID"] != "a b"
    assert "Strict-Transport-Security" in odd.headers


def test_swagger_is_that_of_the_service(make_app: Callable[..., Flask], database_url: str) -> None:
    """Less the paths that are not served here; the page and its files come from here."""
    client = make_app(database_url).test_client()
    for path in ("/", "/api/v1"):
        led = client.get(path)
        assert (led.status_code, led.headers["Location"]) == (302, "/api/v1/")
    page = client.get("/api/v1/")
    assert "sha256-" in page.headers["Content-Security-Policy"]
    assert "swagger-ui" in page.text
    assert client.get("/swaggerui/swagger-ui.css").content_type.startswith("text/css")
    assert client.get("/swaggerui/../../app/config.py").status_code == 404
    paths = client.get("/api/v1/swagger.json").get_json()["paths"]
    assert set(paths) == {
        "/departments", "/departments/{id}", "/employees", "/employees/batch", "/employees/{id}",
        "/tenants", "/tenants/{name}",
    }  # fmt: skip


def test_pages_of_other_origins_may_call_if_they_are_named(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """Or, if all may, read."""
    origin = {"Origin": "https://portal.example.com"}
    preflight = {**origin, "Access-Control-Request-Method": "PATCH"}
    allowed = "Access-Control-Allow-Origin"
    named = make_app(
        database_url, ROLLCALL_AUTH="token", ROLLCALL_CORS_ORIGINS="https://portal.example.com"
    ).test_client()
    asked = named.options(EMPLOYEES, headers=preflight)
    assert (asked.status_code, asked.headers[allowed]) == (204, origin["Origin"])
    assert named.get(EMPLOYEES, headers=origin).headers[allowed] == origin["Origin"]
    everybody = make_app(database_url, ROLLCALL_CORS_ORIGINS="*").test_client()
    asked = everybody.options(EMPLOYEES, headers=preflight)
    assert (asked.status_code, allowed in asked.headers) == (204, False)
    assert everybody.get(EMPLOYEES, headers=origin).headers[allowed] == "*"
    nobody = make_app(database_url).test_client()
    assert allowed not in nobody.get(EMPLOYEES, headers=origin).headers


def test_rates_are_limited_by_client(make_app: Callable[..., Flask], database_url: str) -> None:
    """With the headers that say how much is left; probes are not counted."""
    settings = {"ROLLCALL_RATE_LIMIT": "2/minute;100/hour", "ROLLCALL_TRUSTED_PROXIES": 1}
    client = make_app(database_url, **settings).test_client()
    answers = [client.get(EMPLOYEES) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers.get("RateLimit-Remaining") for answer in answers] == ["1", "0", None]
    assert answers[0].headers["RateLimit-Limit"] == "2"
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 60
    assert client.get("/healthz").status_code == 200
    other = {"X-Forwarded-For": "evil, 2001:db8::1"}
    assert client.get(EMPLOYEES, headers=other).status_code == 200
    same = {"X-Forwarded-For": "2001:db8::2"}
    assert client.get(EMPLOYEES, headers=same).headers["RateLimit-Remaining"] == "0"
    odd = {"X-Forwarded-For": "a:b"}
    assert client.get(EMPLOYEES, headers=odd).headers["RateLimit-Remaining"] == "1"


def test_rates_are_counted_by_a_token(make_app: Callable[..., Flask], database_url: str) -> None:
    """Each has its own."""
    app = make_app(database_url, ROLLCALL_AUTH="token", ROLLCALL_RATE_LIMIT="1/minute")
    with app.app_context():
        issued = [tokens.issue(db.engine, name, "read") for name in ("a", "b")]
    client = app.test_client()
    for token in issued:
        statuses = [client.get(EMPLOYEES, headers=bearer(token)).status_code for _ in range(2)]
        assert statuses == [200, 429]


def test_rates_are_counted_together_in_redis(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """Two applications, one count."""
    with redis() as url:
        settings = {"ROLLCALL_RATE_LIMIT": "2/minute", "ROLLCALL_RATE_LIMIT_STORAGE": url}
        clients = [make_app(database_url, **settings).test_client() for _ in range(2)]
        remaining = [client.get(EMPLOYEES).headers["RateLimit-Remaining"] for client in clients]
        assert remaining == ["1", "0"]
        assert clients[0].get(EMPLOYEES).status_code == 429


def test_without_its_redis_a_process_counts_for_itself(
    make_app: Callable[..., Flask], database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so, once."""
    away = {"ROLLCALL_RATE_LIMIT_STORAGE": f"redis://127.0.0.1:{free_port()}"}
    client = make_app(database_url, ROLLCALL_RATE_LIMIT="2/minute", **away).test_client()
    assert [client.get(EMPLOYEES).status_code for _ in range(3)] == [200, 200, 429]
    assert sum("Redis is away" in record.message for record in caplog.records) == 1


def test_failed_authentication_is_limited(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """429 in the place of a 401, by address."""
    client = make_app(database_url, ROLLCALL_AUTH="token").test_client()
    statuses = [client.get(EMPLOYEES).status_code for _ in range(62)]
    assert statuses == [401] * 60 + [429] * 2


def test_an_unforeseen_error_is_a_problem_wherever_it_happens(
    make_app: Callable[..., Flask], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a route is found, too."""

    def fail(*arguments: object) -> None:
        raise LookupError("Zebra")

    monkeypatch.setattr("app.asgi.gate._find", fail)
    assert_problem(make_app(database_url).test_client().get("/healthz"), 500, "internal_error")


@pytest.fixture(scope="module")
def service(guarded_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """uvicorn with tokens; the first is in a file."""
    folder = tmp_path_factory.mktemp("asgi")
    empty(guarded_url)
    with serving_by_uvicorn(folder, **settings_with_token(guarded_url, folder)) as service:
        yield service


def call(service: Service, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Send a request with the token of the file."""
    token = (service.log.parent / "token").read_text()
    with closing(service.connect()) as connection:
        headers = {"Content-Type": "application/json", **bearer(token)}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        content = answer.read()
        kind = answer.headers.get_content_subtype()
        return answer.status, json.loads(content) if "json" in kind else content


def test_uvicorn_serves_with_tokens_logs_and_metrics(service: Service, guarded_url: str) -> None:
    """One line a request, which nobody else writes; and cut connections never show."""
    assert service.call("GET", EMPLOYEES)[0] == 401
    body = {"name": "Ann", "department": "Research"}
    assert [call(service, "POST", EMPLOYEES, body)[0] for _ in range(2)] == [201, 200]
    administrator = create_engine(guarded_url)
    terminate_backends(administrator)
    administrator.dispose()
    assert call(service, "GET", f"{EMPLOYEES}/1")[1]["name"] == "Ann"
    status, metrics = call(service, "GET", "/metrics")
    assert status == 200
    assert b'rollcall_get_or_create_total{outcome="created",table="employee"} 1.0' in metrics
    assert b'rollcall_pool_connections{state="idle"}' in metrics
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if "{" in line]
    shown = [line for line in lines if line.get("route") == f"{EMPLOYEES}/{{id:int}}"]
    assert [(line["status"], line["token"]) for line in shown] == [(200, "admin-file")]
    assert "GET /api" not in service.log.read_text()


def test_uvicorn_ends_when_it_is_told_to(service: Service) -> None:
    """Connections are closed, and nothing is unforeseen in the log."""
    assert service.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    log = service.log.read_text()
    assert "Traceback" not in log
    assert "Application shutdown complete" in log


def test_uvicorn_does_not_start_for_others_without_authentication(guarded_url: str) -> None:
    """As gunicorn does not: one line, and an exit status."""
    done = subprocess.run(
        [UVICORN, "asgi:app", "--host=0.0.0.0", f"--port={free_port()}"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": guarded_url, "ROLLCALL_AUTH": "off"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert "rollcall: ROLLCALL_AUTH is off" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_setting_stops_the_import_with_one_line() -> None:
    """As that of wsgi.py."""
    done = subprocess.run(
        [UVICORN, "asgi:app"],
        cwd=ROOT,
        env={**os.environ, "PORT": "Zebra"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "rollcall: PORT must be" in done.stderr


def test_who_means_harm_is_answered_as_by_the_flask_service(
    guarded_url: str, tmp_path: Path
) -> None:
    """Whatever is HTTP at all, of tests/hostile.py, and concerns what is served here."""
    empty(guarded_url)
    table = [
        one
        for one in (*bodies(), *fields(), *queries(), *paths(), *conditions())
        if b"/duplicates" not in one.sent and one.name not in OTHERWISE
    ]
    with serving_by_uvicorn(tmp_path, DATABASE_URL=guarded_url, ROLLCALL_AUTH="off") as service:
        for path, names in SEEDED.items():
            for name in names:
                more = {"department_id": 1} if path == "employees" else {}
                service.call("POST", f"/api/v1/{path}", {"name": name, **more})
        with ThreadPoolExecutor(4) as clients:
            replies = list(clients.map(lambda one: reply_of(service.port, one.sent), table))
        for path, names in SEEDED.items():
            _, page = service.call("GET", f"/api/v1/{path}?limit=500")
            assert [record["name"] for record in page["items"]] == names
    assert len(table) > 350
    for one, reply in zip(table, replies, strict=True):
        assert (reply.status, code(reply)) == one.answer, one.name
        assert reply.status < 400 or MARK.casefold() not in str(reply).casefold()
    assert "unforeseen" not in service.log.read_text()


# uvicorn's parser answers the first in words of its own; the second is a path like any other here.
OTHERWISE = ("path: an umlaut as it is", "path: two slashes")


def reply_of(port: int, sent: bytes) -> Reply:
    """Send it and read until the server hangs up, which a client must not do before."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(sent)
        return read_reply(connection)
