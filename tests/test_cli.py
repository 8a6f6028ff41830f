"""The command line: says what it did, and fails with one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flask import Flask
from flask.cli import ScriptInfo
from sqlalchemy import create_engine, make_url

from app.database import administering
from app.db import db
from tests.measuring import MEASURING
from tests.races import started

ROOT = Path(__file__).parent.parent
FLASK = str(Path(sys.executable).with_name("flask"))


def flask(
    *arguments: str, project: Path = ROOT, measured: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command as an operator does; see tests/measuring.py for ``measured``."""
    return subprocess.run(
        [FLASK, *arguments],
        cwd=project,
        env={**os.environ, **(MEASURING if measured else {}), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def on_a_terminal(
    app: Flask, *arguments: str, typed: bytes = b"", **environment: str
) -> tuple[int, str]:
    """Run a command on a terminal, in this process; return its exit status and what it showed.

    A process of its own would take a second to load, and two where it is measured.
    """
    ours, theirs = pty.openpty()
    os.write(ours, typed)
    shown = started(lambda: all_of(ours))
    with (
        open(theirs, "r+b", buffering=0) as terminal,
        io.TextIOWrapper(terminal, write_through=True) as text,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in ("stdin", "stdout", "stderr"):
            patch.setattr(sys, name, text)
        for name, value in {"TERM": "xterm", **environment}.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            app.cli.main([*arguments], obj=ScriptInfo(create_app=lambda: app))
    return int(str(ended.value.code)), shown()


def all_of(terminal: int) -> str:
    """Read what a terminal shows until nobody has it open any more, and close it."""
    shown = b""
    with contextlib.suppress(OSError):  # that is how Linux says that the other end was closed
        while True:
            shown += os.read(terminal, 4096)
    os.close(terminal)
    return shown.decode()


def test_init_db_creates_and_then_has_nothing_to_do(
    make_app: Callable[..., Flask], empty_database: str
) -> None:
    """The second run changes nothing and says so."""
    runner = make_app(empty_database).test_cli_runner()
    first, second = runner.invoke(args=["init-db"]), runner.invoke(args=["init-db"])

    assert first.exit_code == second.exit_code == 0
    assert "Created the database." in first.output
    assert "employee: guarded; records: 0" in first.output
    assert "Nothing to do" not in first.output
    assert "Nothing to do: the database was up to date." in second.output
    assert "Created" not in second.output


def test_init_db_adopts_a_legacy_database_and_counts_its_duplicates(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """Two bare tables, a hundred groups of duplicates, and keys stored un-normalised."""
    engine = create_engine(fresh_database)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE department (id int, name varchar(50));"
            "CREATE TABLE employee (id int, department_id int, name varchar(50));"
            "INSERT INTO department VALUES (1, 'Sales');"
            "INSERT INTO employee SELECT n, 1, 'Name ' || mod(n, 100)"
            " FROM generate_series(0, 199) n;"
            "INSERT INTO employee VALUES (900, 1, 'Odd  Name')"
        )
        before = connection.exec_driver_sql("SELECT xmin, * FROM employee ORDER BY id").all()
    app = make_app(fresh_database)

    outcome = app.test_cli_runner().invoke(args=["init-db"])

    assert outcome.exit_code == 0
    assert "Adopted: department, employee." in outcome.output
    assert (
        "employee: not guarded yet; records: 201, groups of duplicates: 100, redundant rows: 100,"
        " keys stored un-normalised: 1." in outcome.output
    )
    with engine.begin() as connection:
        after = connection.exec_driver_sql(
            "SELECT xmin, id, department_id, name FROM employee ORDER BY id"
        ).all()
    assert after == before
    engine.dispose()
    client = app.test_client()
    answer = client.post("/api/v1/employees", json={"name": "Name 7", "department": "Sales"})
    assert (answer.status_code, answer.get_json()["id"]) == (200, 7)
    assert (
        client.post("/api/v1/employees", json={"name": "New", "department": "Sales"}).status_code
        == 201
    )


def test_init_db_can_be_read_by_a_script(
    make_app: Callable[..., Flask], empty_database: str
) -> None:
    """With --json."""
    outcome = make_app(empty_database).test_cli_runner().invoke(args=["init-db", "--json"])
    report = json.loads(outcome.stdout)
    assert (report["created"], report["changed"]) == (True, True)
    assert [table["guard"] for table in report["tables"]] == [True, True]


def test_init_db_fails_with_one_line(make_app: Callable[..., Flask]) -> None:
    """Nobody listens there."""
    app = make_app("postgresql://u:secret@127.0.0.1:1/d")
    outcome = app.test_cli_runner().invoke(args=["init-db"])
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1
    assert "secret" not in outcome.output


def test_a_bad_setting_stops_the_command_with_one_line() -> None:
    """No traceback, and not the value, which may hold a password."""
    outcome = flask("init-db", DATABASE_URL="mysql://u:secret@h/d")
    assert outcome.returncode == 1
    assert outcome.stderr == "rollcall: DATABASE_URL must begin with postgresql://, not mysql://\n"


def test_help_needs_no_database() -> None:
    """Nothing is started to show what there is."""
    outcome = flask("init-db", "--help", DATABASE_URL="postgresql://u@127.0.0.1:1/d")
    assert outcome.returncode == 0
    assert "can be run again at any time" in outcome.stdout


def test_commands_that_change_tables_go_past_a_pooler(
    make_app: Callable[..., Flask], database_url: str
) -> None:
    """By a URL of their own where there is one, otherwise with the service's engine."""
    with make_app(database_url).app_context(), administering() as engine:
        assert engine is db.engine
    direct = make_url(database_url).update_query_dict({"gssencmode": "disable"})
    app = make_app(database_url, ROLLCALL_ADMIN_URL=direct.render_as_string(hide_password=False))
    with app.app_context(), administering() as engine:
        assert engine.url.query["gssencmode"] == "disable"
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
