"""Every request asks for a token with a scope, whatever route it takes, unless it is a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from flask import Flask, g
from flask.testing import FlaskClient
from sqlalchemy import Engine

from app import security, tokens
from app.db import db
from app.tokens import SCOPES, new_token
from tests.races import eventually
from tests.serving import Service, serving
from tests.test_errors import assert_problem

EMPLOYEES = "/api/v1/employees"
OPEN = {"health.healthz", "health.readyz"}
ADMIN = {
    "api.duplicates",
    "api.duplicates_merge",
    "api.merge_undo",
    "api.tenant",
    "api.tenants",
    "health.metrics",
}
CHALLENGE = 'Bearer realm="rollcall"'
PAGE = "https://portal.example"
Headers = dict[str, str]


@pytest.fixture
def app(make_app: Callable[..., Flask], database_url: str) -> Flask:
    """An application that asks for tokens, as it does where nothing is set."""
    return make_app(database_url, ROLLCALL_AUTH="token")


@pytest.fixture
def held(app: Flask) -> dict[str, Headers]:
    """The headers that show a token, by its scope."""
    with app.app_context():
        return {scope: bearer(tokens.issue(db.engine, scope, scope)) for scope in SCOPES}


def bearer(token: str) -> Headers:
    return {"Authorization": f"Bearer {token}"}


def expected_scope(endpoint: str, method: str) -> str | None:
    """Return what this test, independently of the code, says that a request needs."""
    if endpoint in OPEN:
        return None
    if endpoint in ADMIN:
        return "admin"
    return "read" if method in {"GET", "HEAD", "OPTIONS"} else "write"


def requests_of(app: Flask) -> Iterator[tuple[str, str, str]]:
    """Yield endpoint, method and path of everything that the application answers."""
    urls = app.url_map.bind("localhost")
    for rule in app.url_map.iter_rules():
        for method in sorted(rule.methods or ()):
            values = dict.fromkeys(rule.arguments, 1)
            yield rule.endpoint, method, urls.build(rule.endpoint, values, method)


@pytest.mark.flask_only
def test_every_route_asks_for_a_scope(app: Flask, held: dict[str, Headers]) -> None:
    """Each rule with each of its methods: without a token, with too little, with enough."""
    client, seen = app.test_client(), set()
    for endpoint, method, path in requests_of(app):
        needed = expected_scope(endpoint, method)
        seen.add((endpoint, needed))
        bare = client.open(path, method=method)
        if needed is None:
            assert bare.status_code == 200, (endpoint, method)
            continue
        assert bare.status_code == 401, (endpoint, method)
        assert bare.headers["WWW-Authenticate"] == CHALLENGE
        for scope in SCOPES:
            answer = client.open(path, method=method, headers=held[scope])
            enough = SCOPES.index(scope) >= SCOPES.index(needed)
            assert (answer.status_code in (401, 403)) is not enough, (endpoint, method, scope)
            if not enough:
                assert answer.status_code == 403
    assert len(seen) > 15
    assert {needed for _, needed in seen} == {None, *SCOPES}


@pytest.mark.flask_only
def test_a_route_that_is_added_is_locked(app: Flask, held: dict[str, Headers]) -> None:
    """Without anybody thinking of it."""
    app.add_url_rule("/new", "new", lambda: "secret", methods=["GET", "POST"])
    client = app.test_client()
    assert client.get("/new").status_code == client.post("/new").status_code == 401
    assert client.get("/new", headers=held["read"]).text == "secret"
    assert client.post("/new", headers=held["read"]).status_code == 403
    assert client.post("/new", headers=held["write"]).text == "secret"


@pytest.mark.flask_only
def test_each_endpoint_that_is_named_exists_or_is_awaited(app: Flask) -> None:
    """A name that was misspelt would open nothing, and would lock too little."""
    rules: set[str] = {rule.endpoint for rule in app.url_map.iter_rules()}
    assert security.OPEN == OPEN
    assert security.FOR_ADMINS == ADMIN
    assert (OPEN | ADMIN) - {"health.metrics"} <= rules


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("PUT", EMPLOYEES, 405), ("POST", "/healthz", 405),
     ("TRACE", "/", 405), ("ZEBRA", EMPLOYEES, 405), ("GET", "/api/v1/employees/x", 404)],
)  # fmt: skip
def test_what_is_not_there_is_not_told_to_strangers(
    app: Flask, held: dict[str, Headers], method: str, path: str, status: int
) -> None:
    """401 before 404 and 405."""
    client = app.test_client()
    assert_problem(client.open(path, method=method), 401, "unauthorized")
    assert client.open(path, method=method, headers=held["admin"]).status_code == status


def test_a_request_without_a_token_is_told_how_to_send_one(app: Flask) -> None:
    """401, and nothing of what it sent."""
    answer = app.test_client().post(EMPLOYEES, json={"name": "Zebra"})
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == CHALLENGE
    assert "Authorization: Bearer" in answer.get_json()["detail"]


def test_a_token_that_is_not_enough_is_told_what_would_be(
    app: Flask, held: dict[str, Headers]
) -> None:
    """403 with the scope that is missing; nothing is done."""
    client = app.test_client()
    answer = client.post("/api/v1/departments", json={"name": "Zebra"}, headers=held["read"])
    assert_problem(answer, 403, "forbidden")
    assert answer.get_json()["scope"] == "write"
    assert "scope write" in answer.get_json()["detail"]
    challenge = f'{CHALLENGE}, error="insufficient_scope", scope="write"'
    assert answer.headers["WWW-Authenticate"] == challenge
    listed = client.get("/api/v1/departments", headers=held["read"])
    assert listed.get_json()["items"] == []


@pytest.mark.flask_only
def test_what_is_for_admins_takes_their_scope(app: Flask, held: dict[str, Headers]) -> None:
    """Which is in the answer."""
    answer = app.test_client().get("/api/v1/duplicates", headers=held["write"])
    assert (answer.status_code, answer.get_json()["scope"]) == (403, "admin")


@pytest.mark.parametrize(
    "value",
    ["Bearer {}x", "Bearer x{}", "Bearer {}, Bearer {}", "Bearer {},Bearer {}", "Bearer {} {}",
     "Bearer \xe9{}", "Bearer token={}", "Bearer " + "Zebra" * 1600, "bearer Zebra", "Bearer \t",
     "Bearer {}\xa0", "Bearer \x00{}"],
)  # fmt: skip
def test_a_header_that_shows_no_valid_token_is_refused(
    app: Flask, held: dict[str, Headers], value: str
) -> None:
    """Repeated, huge, not of ASCII, or of another form: 401, for which nobody asks the database."""
    answer = refused(app, held, value)
    assert answer.headers["WWW-Authenticate"].startswith(CHALLENGE)


def refused(app: Flask, held: dict[str, Headers], value: str) -> Any:
    """Send a header in which {} is a valid token; see that it is refused, and return the answer."""
    valid = held["admin"]["Authorization"].removeprefix("Bearer ")
    environ = {"HTTP_AUTHORIZATION": value.replace("{}", valid)}
    answer = app.test_client().get(EMPLOYEES, environ_overrides=environ)
    assert_problem(answer, 401, "unauthorized")
    return answer


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Basic {}", "Basic Zebra", "Digest {}", "{}", "Bearer{}", "Token {}", "Basic =",
     "Digest username=\xe9", "Negotiate {}"],
)  # fmt: skip
def test_another_kind_of_credentials_is_none(
    app: Flask, held: dict[str, Headers], value: str
) -> None:
    """Only bearer tokens are taken."""
    refused(app, held, value)


def test_a_token_elsewhere_is_not_looked_at(app: Flask, held: dict[str, Headers]) -> None:
    """Addresses end up in logs; cookies are sent by whatever page asks."""
    token = held["admin"]["Authorization"].removeprefix("Bearer ")
    client = app.test_client()
    client.set_cookie("access_token", token)
    query = {"access_token": token, "token": token}
    headers = {"X-Api-Key": token, "Proxy-Authorization": f"Bearer {token}"}
    assert client.get(EMPLOYEES, query_string=query, headers=headers).status_code == 401


def test_an_unknown_or_expired_token_is_told_so(app: Flask, held: dict[str, Headers]) -> None:
    """As RFC 6750 has it; the scheme may be in any case."""
    client = app.test_client()
    with app.app_context(), db.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE rollcall_token SET expires_at = now() WHERE name = 'write'"
        )
    for headers in (bearer(new_token()), held["write"]):
        answer = client.get(EMPLOYEES, headers=headers)
        assert_problem(answer, 401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == f'{CHALLENGE}, error="invalid_token"'
    lower = {"Authorization": held["read"]["Authorization"].replace("Bearer", "bEARER")}
    assert client.get(EMPLOYEES, headers=lower).status_code == 200


def test_a_database_that_is_away_is_503_and_probes_stay_open(
    make_app: Callable[..., Flask],
) -> None:
    """It says nothing of the token; without one nobody has to ask."""
    app = make_app(
        "postgresql://u@127.0.0.1:1/d", ROLLCALL_AUTH="token", ROLLCALL_RETRY_DEADLINE=0.1
    )
    client = app.test_client()
    answer = client.get(EMPLOYEES, headers=bearer(new_token()))
    assert_problem(answer, 503, "database_away")
    assert "Retry-After" in answer.headers
    assert client.get(EMPLOYEES).status_code == 401
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503


def test_a_database_without_the_table_is_503(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """It has yet to be brought up to date."""
    client = make_app(fresh_database, ROLLCALL_AUTH="token").test_client()
    answer = client.get(EMPLOYEES, headers=bearer(new_token()))
    assert_problem(answer, 503, "schema_behind")


def seen_by_others(app: Flask) -> list[Any]:
    """Have the application note what `flask.g.token` is at the end of each request."""
    seen: list[Any] = []

    @app.after_request
    def note(response: Any) -> Any:
        seen.append(g.token)
        return response

    return seen


@pytest.mark.flask_only
def test_the_token_is_there_for_logs_and_limits(app: Flask, held: dict[str, Headers]) -> None:
    """Also of a request that it is not enough for; none before it is checked."""
    seen, client = seen_by_others(app), app.test_client()
    client.get(EMPLOYEES, headers=held["read"])
    client.post(EMPLOYEES, headers=held["read"])
    client.get(EMPLOYEES)
    client.get("/healthz", headers=held["read"])
    assert [token and (token.id, token.name, token.scope) for token in seen] == [
        (1, "read", "read"),
        (1, "read", "read"),
        None,
        None,
    ]


@pytest.mark.flask_only
def test_nobody_is_asked_with_authentication_off(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """Not even for a token that is sent."""
    app = make_app(database_url)
    seen, client = seen_by_others(app), app.test_client()
    assert client.get(EMPLOYEES).status_code == 200
    assert client.get("/api/v1/duplicates", headers=bearer(new_token())).status_code == 200
    assert client.get("/nothing").status_code == 404
    assert seen == [None, None, None]


def test_preflights_are_locked_unless_they_are_wanted(
    app: Flask, make_app: Callable[..., Flask], database_url: str
) -> None:
    """And where they are wanted, no other OPTIONS is open with them."""
    preflight = {"Origin": PAGE, "Access-Control-Request-Method": "PATCH"}
    assert app.test_client().options(EMPLOYEES, headers=preflight).status_code == 401
    wanted = make_app(database_url, ROLLCALL_AUTH="token", ROLLCALL_CORS_ORIGINS=PAGE)
    client = wanted.test_client()
    assert client.options(EMPLOYEES, headers=preflight).status_code == 204
    assert client.options(EMPLOYEES, headers={"Origin": PAGE}).status_code == 401
    assert client.get(EMPLOYEES, headers=preflight).status_code == 401


STRANGE = [
    {"Sec-Fetch-Site": "cross-site", "Origin": PAGE},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},
    {"Origin": PAGE},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
]
OUR_OWN: list[dict[str, str]] = [
    {},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://proxy.example"},
    {"Sec-Fetch-Site": "none"},
    {"Origin": "http://localhost"},
    {"Origin": "https://localhost"},
]


@pytest.fixture
def free(make_app: Callable[..., Flask], database_url: str) -> FlaskClient:
    """A client of a service that asks nobody for a token."""
    return make_app(database_url).test_client()


@pytest.mark.parametrize("headers", STRANGE)
def test_pages_of_other_origins_change_nothing(free: FlaskClient, headers: Headers) -> None:
    """A browser sends an empty body for any page, and says where that is from. They may read."""
    for method, path in (
        ("POST", "/api/v1/duplicates/employee/1/merge"),
        ("POST", "/api/v1/merges/1/undo"),
        ("POST", EMPLOYEES),
        ("PATCH", f"{EMPLOYEES}/1"),
        ("DELETE", f"{EMPLOYEES}/1"),
    ):
        answer = free.open(path, method=method, headers=headers)
        assert (answer.status_code, answer.get_json()["code"]) == (403, "cross_origin")
    assert free.get(EMPLOYEES, headers=headers).status_code == 200


@pytest.mark.parametrize("headers", OUR_OWN)
def test_our_own_pages_and_other_programs_may(free: FlaskClient, headers: Headers) -> None:
    """The Swagger UI, also behind a proxy; curl says nothing."""
    assert free.delete(f"{EMPLOYEES}/1", headers=headers).status_code == 404


def test_pages_that_are_named_may_change(make_app: Callable[..., Flask], database_url: str) -> None:
    """By their origin, exactly; where all are, they may read."""
    headers = {"Sec-Fetch-Site": "cross-site", "Origin": PAGE}
    named, all_of_them = (
        make_app(database_url, ROLLCALL_CORS_ORIGINS=origins).test_client()
        for origins in (PAGE, "*")
    )
    assert named.delete(f"{EMPLOYEES}/1", headers=headers).status_code == 404
    assert all_of_them.delete(f"{EMPLOYEES}/1", headers=headers).status_code == 403


def test_swagger_says_that_a_token_is_needed(app: Flask, held: dict[str, Headers]) -> None:
    """Its Authorize button has something to ask for, and each operation its 401 and 403."""
    document = app.test_client().get("/api/v1/swagger.json", headers=held["read"]).get_json()
    (name,) = document["securityDefinitions"]
    assert document["securityDefinitions"][name]["name"] == "Authorization"
    assert document["security"] == [{name: []}]
    operations = [
        operation
        for path in document["paths"].values()
        for method, operation in path.items()
        if method != "parameters"
    ]
    assert len(operations) > 8
    for operation in operations:
        assert {"401", "403"} <= operation["responses"].keys()
        assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]


@pytest.fixture(scope="module")
def file_token() -> str:
    return new_token()


# Rollcall whose workers remember tokens for a moment, so that a test need not wait for long.
SHORT_MEMORY = """
from app import create_app, tokens
from app.token_cache import TokenCache

app = create_app()
app.extensions["rollcall_tokens"] = TokenCache(tokens.find, tokens.note_use, lifetime=0.2)
"""


@pytest.fixture(scope="module")
def service(
    migrated_url: str, file_token: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Two workers that ask for tokens, and log all that they can; the first token is in a file."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "token").write_text(f"{file_token}\n")
    (folder / "short_memory.py").write_text(SHORT_MEMORY)
    with serving(
        folder,
        "short_memory:app",
        PYTHONPATH=str(folder),
        DATABASE_URL=migrated_url,
        LOG_LEVEL="DEBUG",
        ROLLCALL_AUTH="token",
        ROLLCALL_ADMIN_TOKEN_FILE=str(folder / "token"),
    ) as service:
        yield service


@pytest.fixture
def store(service: Service, make_app: Callable[..., Flask], migrated_url: str) -> Iterator[Engine]:
    """The service's tokens, as another process gets at them."""
    with make_app(migrated_url).app_context():
        yield db.engine


def statuses(service: Service, token: str, times: int = 20) -> set[int]:
    """Ask on new connections, so that each worker is asked."""
    return {status_of(service, token) for _ in range(times)}


def status_of(service: Service, token: str) -> int:
    with closing(service.connect()) as connection:
        connection.request("GET", EMPLOYEES, headers=bearer(token))
        return connection.getresponse().status


@pytest.mark.flask_only
def test_revocation_reaches_every_worker(service: Service, store: Engine) -> None:
    """From another process; a token that was issued works at once."""
    token = tokens.issue(store, "portal", "read")
    assert statuses(service, token) == {200}
    tokens.revoke(store, "portal")
    eventually(lambda: statuses(service, token) == {401}, 10)


@contextmanager
def renamed(engine: Engine, table: str, name: str) -> Iterator[None]:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO {name}")
    yield
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {name} RENAME TO {table}")


@pytest.mark.flask_only
def test_the_token_of_the_file_is_good_and_no_token_is_shown(
    service: Service, store: Engine, file_token: str
) -> None:
    """However much is logged, and whatever goes wrong with it at hand."""
    issued = tokens.issue(store, "reader", "read")
    assert statuses(service, file_token) == {200}
    assert {row.name: row.scope for row in tokens.list_all(store)}["admin-file"] == "admin"
    with renamed(store, "rollcall_token", "elsewhere"):
        eventually(lambda: statuses(service, issued) == {503})
    eventually(lambda: statuses(service, issued) == {200})
    log = service.log.read_text()
    assert "rollcall_token is not there" in log
    for token in (file_token, issued):
        assert token.removeprefix("rollcall_") not in log
