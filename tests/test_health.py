"""The probes, and the embedded server behind the commands."""

from __future__ import annotations

import shutil
import socketserver
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, NullPool, create_engine, make_url

from app.database import bootstrap_database
from app.db import db
from app.models import NATURAL_KEYS
from migrations_bootstrap import bootstrap
from migrations_bootstrap.embedded import EmbeddedServer, EmbeddedServerError
from tests.conftest import cloned, execute, numbers, unguard
from tests.races import eventually, terminate_backends
from tests.serving import ROOT, serving
from tests.test_cli import flask

SECRET = "Zebra"


def test_healthz_needs_no_database(make_app: Callable[..., Flask]) -> None:
    """The process is up."""
    client = make_app("postgresql://u@127.0.0.1:1/d").test_client()
    assert client.get("/healthz").get_json() == {"status": "ok"}


def test_readyz_says_what_is_up_and_guarded(client: FlaskClient) -> None:
    """200 with the state of each table."""
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.get_json() == {
        "status": "ready",
        "database": "up",
        "schema": "current",
        "guards": {"department": True, "employee": True},
    }


def test_a_missing_guard_is_no_reason_not_to_serve(
    make_app: Callable[..., Flask], unguarded_url: str
) -> None:
    """It is said in the body of a 200."""
    unguard(unguarded_url)
    answer = make_app(unguarded_url).test_client().get("/readyz")
    assert answer.status_code == 200
    assert answer.get_json()["guards"] == {"department": False, "employee": False}
    notes = answer.get_json()["notes"]
    assert [note.partition(":")[0] for note in notes] == [
        "Table department has no guard",
        "Table employee has no guard",
    ]
    assert all(note.endswith("Run flask duplicates guard.") for note in notes)


def test_a_connection_that_was_cut_is_no_reason_not_to_be_ready(
    client: FlaskClient, administrator: Engine
) -> None:
    """The probe looks again on another."""
    assert client.get("/readyz").status_code == 200
    terminate_backends(administrator)
    assert client.get("/readyz").status_code == 200


def test_a_schema_that_is_behind_is_not_ready(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """503."""
    answer = make_app(fresh_database).test_client().get("/readyz")
    assert (answer.status_code, answer.get_json()["schema"]) == (503, "behind")
    assert "run flask init-db" in answer.get_json()["detail"]


@pytest.fixture(scope="module")
def sound_template(server: EmbeddedServer) -> str:
    """A database that is up to date, and that nobody is connected to."""
    url = server.url("sound_template")
    bootstrap(url, NATURAL_KEYS)
    return url


@pytest.fixture
def own_database(
    administrator: Engine, sound_template: str, server: EmbeddedServer
) -> Iterator[str]:
    """A database that is up to date, for a test to spoil."""
    with cloned(administrator, sound_template, server.url(f"own_{next(numbers)}")) as url:
        yield url


def readyz(app: Flask) -> dict[str, Any]:
    """Ask the probe; its status is also the answer's."""
    answer = app.test_client().get("/readyz")
    state: dict[str, Any] = answer.get_json()
    assert state["status"] in (answer.status_code, "ready")
    return state


def test_a_schema_that_is_ahead_is_served(
    make_app: Callable[..., Flask], own_database: str
) -> None:
    """Otherwise an upgrade would take every older worker out of service at once; it is said."""
    execute(own_database, "UPDATE rollcall_version SET version_num = '9999'")
    state = readyz(make_app(own_database))
    assert (state["status"], state["schema"]) == ("ready", "ahead")
    assert "newer version" in state["notes"][0]


def test_a_role_that_may_not_read_the_version_is_told_so(
    make_app: Callable[..., Flask], own_database: str
) -> None:
    """The database does answer."""
    role = f"no_reader_{next(numbers)}"
    execute(own_database, f"CREATE ROLE {role} LOGIN")
    state = readyz(make_app(with_role(own_database, role)))
    assert (state["status"], state["database"], state["schema"]) == (503, "up", "unknown")
    assert state["detail"].startswith("The role may not read the table rollcall_version")


def test_a_version_that_somebody_has_locked_is_told_so(
    make_app: Callable[..., Flask], own_database: str
) -> None:
    """Not that the database is away."""
    engine = create_engine(own_database, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE rollcall_version IN ACCESS EXCLUSIVE MODE")
        state = readyz(make_app(own_database))
    assert (state["status"], state["database"]) == (503, "up")
    assert "lock" in state["detail"]


def test_an_error_that_has_no_words_is_given_by_its_sqlstate(
    make_app: Callable[..., Flask], own_database: str
) -> None:
    """The appendix of PostgreSQL's manual has them all."""
    execute(own_database, "ALTER TABLE rollcall_version RENAME COLUMN version_num TO number")
    assert readyz(make_app(own_database))["detail"] == "The database answers with SQLSTATE 42703."


def test_a_pool_that_is_used_up_is_told_so(client: FlaskClient) -> None:
    """The database is not to blame."""
    app = client.application
    with app.app_context():
        pool = db.engine.pool
        held = [pool.connect() for _ in range(10)]
        pool._timeout = 0.05  # type: ignore[attr-defined]
        assert "pool" in readyz(app)["detail"]
        for connection in held:
            connection.close()


def test_a_database_that_is_not_there_is_told_from_one_that_is_closed(
    make_app: Callable[..., Flask], empty_database: str, own_database: str
) -> None:
    """To everybody, or to a role."""
    role = f"outsider_{next(numbers)}"
    name = make_url(own_database).database
    execute(
        own_database, f"CREATE ROLE {role} LOGIN", f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC"
    )
    missing = readyz(make_app(empty_database))
    closed = readyz(make_app(with_role(own_database, role)))
    assert missing["detail"] == "The database does not exist; run flask init-db."
    assert closed["detail"].startswith("The database does not take the role's connection")
    assert missing["database"] == closed["database"] == "away"


def test_a_server_of_the_wrong_kind_is_told_so(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """It answers, and it is not what the URL asks for: after a failover, not yet read-write."""
    found = readyz(make_app(f"{database_url}&target_session_attrs=standby"))
    assert found["database"] == "away"
    assert "target_session_attrs" in found["detail"]


def test_a_role_that_is_refused_is_told_so_without_its_password(
    make_app: Callable[..., Flask], guarded_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The server's own words are in the log, the password is nowhere."""
    url = make_url(guarded_url).set(username="nobody_here").set(password=SECRET)
    answer = make_app(url.render_as_string(hide_password=False)).test_client().get("/readyz")
    assert answer.get_json()["detail"].startswith("The database server refuses the role")
    assert 'role "nobody_here" does not exist' in caplog.text
    assert SECRET not in caplog.text + answer.text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (b"57P03", "starting up"),
        (b"53300", "has no connection left"),
        (b"28P01", "refuses the role"),
    ],
)
def test_a_server_that_turns_everybody_away_is_told_why(
    make_app: Callable[..., Flask], state: bytes, words: str
) -> None:
    """As it says itself, by SQLSTATE."""
    with turning_away(state) as port:
        answered = readyz(make_app(f"postgresql://u@127.0.0.1:{port}/d"))
    assert words in answered["detail"]
    assert answered["database"] == "away"


@contextmanager
def turning_away(state: bytes) -> Iterator[int]:
    """Listen as a PostgreSQL server that refuses each connection with a SQLSTATE."""
    fields = b"SFATAL\0VFATAL\0C" + state + b"\0Mno\0\0"
    refusal = b"E" + struct.pack("!i", len(fields) + 4) + fields

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while True:
                length, code = struct.unpack("!ii", self.request.recv(8))
                if code == 196608:  # the protocol's version: a start-up packet
                    self.request.recv(length)
                    self.request.sendall(refusal)
                    return
                self.request.sendall(b"N")  # neither TLS nor GSSAPI

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
        thread.start()
        yield listener.server_address[1]
        listener.shutdown()
        thread.join()


def with_role(url: str, role: str) -> str:
    return make_url(url).set(username=role).render_as_string(hide_password=False)


def test_a_database_that_is_away_is_not_ready(make_app: Callable[..., Flask]) -> None:
    """503, and calls of the API say when to try again."""
    app = make_app("postgresql://u@127.0.0.1:1/d", ROLLCALL_RETRY_DEADLINE=0.1)
    client = app.test_client()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["database"]) == (503, "away")
    assert answer.get_json()["code"] == "not_ready"
    assert answer.get_json()["detail"].startswith("No database server answers")
    assert "Retry-After" in answer.headers
    for call in (
        client.get("/api/v1/departments"),
        client.post("/api/v1/departments", json={"name": "X"}),
        client.patch("/api/v1/departments/1", json={"name": "X"}),
        client.delete("/api/v1/departments/1"),
    ):
        assert (call.status_code, call.get_json()["code"]) == (503, "database_away")
        assert "Retry-After" in call.headers


def test_an_embedded_server_that_fails_is_a_database_that_is_away(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or its binaries gone: 503."""

    def fail(server: EmbeddedServer) -> None:
        raise EmbeddedServerError("the disk is full")

    monkeypatch.setattr(EmbeddedServer, "attach", fail)
    client = make_app("", ROLLCALL_RETRY_DEADLINE=0.1).test_client()
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.get_json()["detail"].startswith("The embedded server does not start")
    assert client.post("/api/v1/departments", json={"name": "X"}).status_code == 503


def test_a_bootstrap_starts_the_embedded_server_and_says_so(
    make_app: Callable[..., Flask],
    server: EmbeddedServer,
    empty_database: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the folder of its data."""
    app = make_app(empty_database)
    app.extensions["rollcall_embedded"] = server
    with app.app_context():
        assert bootstrap_database().created
    assert f"using the embedded PostgreSQL server, data in {server.home}" in caplog.text


@pytest.fixture
def project() -> Iterator[Path]:
    """A checkout with an instance folder of its own, where any user can get in."""
    folder = Path(tempfile.mkdtemp(prefix="rollcall-project-"))
    folder.chmod(0o755)
    for package in ("app", "migrations_bootstrap"):
        (folder / package).symlink_to(ROOT / package)
    for file in ("wsgi.py", "gunicorn.conf.py"):
        shutil.copy(ROOT / file, folder)
    yield folder
    shutil.rmtree(folder)


def test_the_embedded_server_serves_where_nothing_is_configured(project: Path) -> None:
    """Commands and gunicorn start it, say so, share it and leave nothing running."""
    made = flask("init-db", project=project, DATABASE_URL="")
    again = flask("init-db", project=project, DATABASE_URL="")
    assert made.returncode == again.returncode == 0, made.stderr
    assert "Created the database." in made.stdout
    assert "Nothing to do" in again.stdout
    assert f"using the embedded PostgreSQL server, data in {project}/instance/server" in made.stderr

    with serving(project, project=project, DATABASE_URL="") as service:
        assert service.call("POST", "/api/v1/departments", {"name": "R"})[0] == 201
        assert "Nothing to do" in flask("init-db", project=project, DATABASE_URL="").stdout
        assert service.call("POST", "/api/v1/departments", {"name": "R"})[0] == 200

    eventually(lambda: not runs_in(project))


def test_help_starts_no_server(project: Path) -> None:
    """Only what needs a database starts one."""
    assert flask("init-db", "--help", project=project, DATABASE_URL="").returncode == 0
    assert not (project / "instance").exists()


def runs_in(project: Path) -> list[list[str]]:
    """Return the commands that run with the project's folder in their arguments."""
    processes = psutil.process_iter(["cmdline"])
    commands = [process.info["cmdline"] or [] for process in processes]
    return [command for command in commands if any(str(project) in word for word in command)]
