"""Whatever a client sends, the answer is a problem that says what is wrong and nothing else."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import text
from werkzeug.exceptions import InternalServerError

from app import directory
from app.db import db
from app.errors import ContentionError
from app.web.problems import problem_of
from tests.test_transactions import database_error

URL = "/api/v1/employees"
MARK = "Zebra"


def post(client: FlaskClient, body: bytes | str, kind: str = "application/json") -> Any:
    return client.post(URL, data=body, content_type=kind)


def assert_problem(answer: Any, status: int, code: str | None = None) -> None:
    """The shape of RFC 9457, and nothing of what was sent."""
    assert answer.status_code == status
    assert answer.content_type == "application/problem+json"
    content = answer.get_json()
    assert content["status"] == status
    assert content["type"] == f"urn:rollcall:problem:{content['code']}"
    assert content["title"]
    assert content["detail"]
    assert code in (None, content["code"])
    assert MARK not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nil", b'{"name": NaN}', b'{"name": -Infinity}', b"[" * 100_000, b"\xff\xfe{}",
        b'{"name": "\xff"}', b'{"a":' * 50_000, b"9" * 5_000, b"{'name': 1}",
        b'{"name": "A", "name": "B"}', b"{} {}", b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_what_is_not_json_is_malformed(client: FlaskClient, body: bytes) -> None:
    """Not JSON as the RFC has it, or nested without end."""
    assert_problem(post(client, body), 400, "malformed_json")


@pytest.mark.parametrize(
    "body",
    [
        "[]", "null", "5", '"Zebra"', "[[{}]]", '{"<Zebra>": 1}', '{"_schema": 1}',
        '{"name": "Zebra\\u0000"}', '{"name": "Zebra\\ud800"}', '{"name": "Zebra\\u0007"}',
        '{"name": "   "}', '{"name": "\\u2003"}', '{"name": "\\u200b"}',
        '{"name": {"Zebra": 1}}', '{"name": ["Zebra"]}',
        '{"name": true}', '{"name": 1e400}',
        '{"name": "A", "department_id": 1e400}', '{"name": "A", "department_id": 1e2}',
        '{"name": "A", "department_id": -1}', '{"name": "A", "department_id": 9999999999999999999}',
        '{"name": "A", "department_id": 1, "hired_on": "Zebra"}',
        '{"name": "A", "department_id": 1, "hired_on": "2020-02-30"}',
        '{"name": "A", "department_id": 1, "hired_on": 20200230}',
        '{"name": "A", "department_id": 1, "hired_on": "20200229"}',
        '{"name": "A", "department_id": 1, "email": "Zebra"}',
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_invalid(client: FlaskClient, body: str) -> None:
    """422 with messages by field, and the client's values are not among them."""
    answer = post(client, body)
    assert_problem(answer, 422, "invalid")
    assert all(isinstance(texts, list) for texts in answer.get_json()["errors"].values())


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_does_not_say_that_it_is_json_is_refused(client: FlaskClient, kind: str) -> None:
    """415."""
    assert_problem(post(client, b"{}", kind), 415, "unsupported_media_type")


def test_a_body_that_is_too_large_is_refused(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """413, by the setting."""
    client = make_app(database_url, ROLLCALL_MAX_BODY=1024).test_client()
    assert post(client, b"{" + b" " * 1022 + b"}").status_code == 422
    assert_problem(post(client, b"{" + b" " * 1023 + b"}"), 413, "content_too_large")


@pytest.mark.parametrize(
    "path", ["/nowhere", "/api/v1/nowhere", f"{URL}/x", f"{URL}/-1", f"{URL}/1/2"]
)
def test_an_unknown_path_is_not_found(client: FlaskClient, path: str) -> None:
    """Inside the API and outside."""
    assert_problem(client.get(path), 404, "not_found")


@pytest.mark.parametrize("path", [URL, "/healthz"])
def test_a_wrong_method_is_told_the_right_ones(client: FlaskClient, path: str) -> None:
    """405 with Allow."""
    answer = client.put(path)
    assert_problem(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["Allow"]


@pytest.fixture
def failing(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], Any]:
    """Answer a GET for which the directory raises an error."""

    def answer(error: Exception) -> Any:
        def fail(*arguments: object, **named: object) -> None:
            raise error

        monkeypatch.setattr(directory, "find", fail)
        return client.get(f"{URL}/1")

    return answer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ContentionError(20, 10.0, "40001"), "contention"),
        (ContentionError(20, 10.0, None), "database_away"),
        (database_error(None), "database_away"),
        (database_error("57014"), "database_away"),
        (database_error("53100"), "database_away"),
        (database_error("25006"), "database_away"),
    ],
)
def test_what_time_may_heal_says_when_to_try_again(
    failing: Callable[[Exception], Any], error: Exception, code: str
) -> None:
    """503 with Retry-After."""
    answer = failing(error)
    assert_problem(answer, 503, code)
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("22001", 422),
        ("22003", 422),
        ("22P05", 422),
        ("23502", 422),
        ("23505", 409),
        ("23P01", 409),
        ("P0001", 422),
    ],
)
def test_a_value_the_database_refuses_is_the_clients(
    failing: Callable[[Exception], Any], state: str, status: int
) -> None:
    """By SQLSTATE, without the driver's words."""
    assert_problem(failing(database_error(state)), status)


@pytest.mark.parametrize("error", [database_error("42P01"), LookupError(MARK)])
def test_an_unforeseen_error_is_logged_and_kept_from_the_client(
    failing: Callable[[Exception], Any], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """500, with the traceback in the log."""
    with caplog.at_level(logging.ERROR):
        assert_problem(failing(error), 500, "internal_error")
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is error


def test_an_unforeseen_error_outside_the_api_is_answered_alike(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probes are not Flask-RESTX resources."""
    monkeypatch.setitem(app.view_functions, "health.healthz", lambda: 1 / 0)
    assert_problem(app.test_client().get("/healthz"), 500, "internal_error")


def test_an_http_error_without_a_description_has_a_detail(app: Flask) -> None:
    """The phrase of the status stands in."""
    with app.test_request_context():
        assert problem_of(InternalServerError()).status == 500


def test_a_name_longer_than_a_legacy_column_is_invalid(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """22001, once through the mixin and once through a change."""
    app = make_app(fresh_database)
    with app.app_context(), db.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE department (id serial PRIMARY KEY, name varchar(5) NOT NULL)"
        )
    assert app.test_cli_runner().invoke(args=["init-db"]).exit_code == 0
    client = app.test_client()
    assert client.post("/api/v1/departments", json={"name": "short"}).status_code == 201
    assert_problem(client.post("/api/v1/departments", json={"name": "too long"}), 422)
    assert_problem(client.patch("/api/v1/departments/1", json={"name": "too long"}), 422)


def test_a_rule_of_the_database_that_the_schemas_do_not_know_is_kept(client: FlaskClient) -> None:
    """A check constraint of a legacy table: 422."""
    with client.application.app_context(), db.engine.begin() as connection:
        connection.execute(text("ALTER TABLE employee ADD CONSTRAINT no_zoe CHECK (name <> 'Zoe')"))
    try:
        made = client.post(URL, json={"name": "Ann", "department": "X"}).get_json()["id"]
        assert_problem(client.post(URL, json={"name": "Zoe", "department": "X"}), 422)
        assert_problem(client.patch(f"{URL}/{made}", json={"name": "Zoe"}), 422)
    finally:
        with client.application.app_context(), db.engine.begin() as connection:
            connection.execute(text("ALTER TABLE employee DROP CONSTRAINT no_zoe"))


def test_a_rule_that_a_trigger_enforces_is_the_clients(client: FlaskClient) -> None:
    """RAISE EXCEPTION, and an integrity error that is no foreign key's, in a deletion."""
    made = client.post(URL, json={"name": "Ann", "department": "X"}).get_json()["id"]
    with client.application.app_context(), db.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION 'Zebra' USING ERRCODE = TG_ARGV[0]; END $$"
        )
    for state in ("P0001", "23514"):
        with client.application.app_context(), db.engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE OR REPLACE TRIGGER refuse BEFORE DELETE ON employee"
                f" FOR EACH ROW EXECUTE FUNCTION refuse('{state}')"
            )
        assert_problem(client.delete(f"{URL}/{made}"), 422)
    with client.application.app_context(), db.engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER refuse ON employee; DROP FUNCTION refuse")


@pytest.mark.flask_only
def test_a_body_of_unannounced_length_is_read_only_where_the_server_ends_it(
    client: FlaskClient,
) -> None:
    """Otherwise reading it would wait for the client to go away."""
    for ends, status in ((True, 201), (False, 400)):
        answer = client.post(
            "/api/v1/departments",
            input_stream=io.BytesIO(b'{"name": "Unannounced"}'),
            content_type="application/json",
            headers={"Transfer-Encoding": "chunked"},
            environ_overrides={"wsgi.input_terminated": ends},
        )
        assert answer.status_code == status


class HungUp:
    """What comes of a client that hangs up: the server's own error, when it is read."""

    def read(self, size: int) -> bytes:
        raise OSError


@pytest.mark.flask_only
@pytest.mark.parametrize(
    ("body", "length", "status"),
    [
        (io.BytesIO(b'{"name": "A"}'), "100", 400),
        (io.BytesIO(b" " * 5000), "", 413),
        (HungUp(), "10", 400),
    ],
)
def test_a_body_is_read_as_strictly_behind_another_server(
    make_app: Callable[..., Flask], database_url: str, body: Any, length: str, status: int
) -> None:
    """One that reads no further than it is asked to."""
    client = make_app(database_url, ROLLCALL_MAX_BODY="4096").test_client()
    answer = client.post(
        "/api/v1/departments",
        content_type="application/json",
        headers={} if length else {"Transfer-Encoding": "chunked"},
        environ_overrides={
            "wsgi.input": body,
            "wsgi.input_terminated": True,
            "CONTENT_LENGTH": length,
        },
    )
    assert answer.status_code == status
