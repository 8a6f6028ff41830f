"""The probes, and the embedded server behind the commands."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Engine, text

from app.db import db
from migrations_bootstrap import head
from migrations_bootstrap.embedded import EmbeddedServer, EmbeddedServerError
from tests.conftest import unguard
from tests.races import eventually, terminate_backends
from tests.serving import ROOT, serving
from tests.test_cli import flask


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


def test_a_schema_that_a_later_version_made_will_do(client: FlaskClient) -> None:
    """Otherwise an upgrade would take every older worker out of service at once."""
    with client.application.app_context(), db.engine.begin() as connection:
        connection.execute(text("UPDATE rollcall_version SET version_num = 'later'"))
    try:
        answer = client.get("/readyz")
        assert (answer.status_code, answer.get_json()["schema"]) == (200, "ahead")
    finally:
        with client.application.app_context(), db.engine.begin() as connection:
            connection.execute(
                text("UPDATE rollcall_version SET version_num = :head"), {"head": head()}
            )


def test_a_database_that_is_away_is_not_ready(make_app: Callable[..., Flask]) -> None:
    """503, and calls of the API say when to try again."""
    app = make_app("postgresql://u@127.0.0.1:1/d", ROLLCALL_RETRY_DEADLINE=0.1)
    client = app.test_client()
    answer = client.get("/readyz")
    assert (answer.status_code, answer.get_json()["database"]) == (503, "away")
    assert answer.get_json()["code"] == "not_ready"
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
    assert client.get("/readyz").status_code == 503
    assert client.post("/api/v1/departments", json={"name": "X"}).status_code == 503


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
    with serving(project, project=project, DATABASE_URL="") as service:
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
