"""Import and export of employees: ``flask employees``."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from app import directory
from app.db import db
from app.models import Department, Employee
from tests.conftest import count, empty
from tests.races import inserts_held
from tests.test_cli import ROOT, flask, on_a_terminal

HEADER = "name,department,title,email,hired_on\n"
GOOD = HEADER + (
    "Ann Lee,Sales,Chief,ann@example.org,2020-02-01\n"
    "Bob,Sales,,,\n"
    " Ann  Lee,Sales,Other,,\n"
    "Ann Lee,Research,,,\n"
)


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def import_text(runner: FlaskCliRunner, folder: Path, content: str, *options: str) -> Result:
    (folder / "people.csv").write_text(content, "utf-8")
    return runner.invoke(args=["employees", "import", "people.csv", *options])


def rejects(folder: Path, name: str = "people.csv.rejects.csv") -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_become_employees(runner: FlaskCliRunner, folder: Path, app: Flask) -> None:
    """Departments are created, repeats are found, empty cells are nothing; a sum at the end."""
    result = import_text(runner, folder, GOOD)
    assert result.exit_code == 0
    assert "Read 4, created 3, existing 1, rejected 0; " in result.stdout
    assert result.stdout.rstrip().endswith(" rows/s")
    assert "Encoding utf-8, delimiter ','." in result.stderr
    with app.app_context():
        assert count(Department) == 2
        ann, _ = Employee.get_or_create(name="Ann Lee", department_id=1)
        assert (ann.title, ann.email, str(ann.hired_on)) == (
            "Chief",
            "ann@example.org",
            "2020-02-01",
        )
    assert [path.name for path in folder.iterdir()] == ["people.csv"]


def test_a_second_run_does_no_harm(runner: FlaskCliRunner, folder: Path) -> None:
    """Everybody is there already, and stays as they are."""
    import_text(runner, folder, GOOD)
    again = import_text(runner, folder, GOOD, "--json")
    summary = json.loads(again.stdout)
    assert summary.pop("seconds") > 0
    assert summary.pop("rows_per_second") > 0
    assert summary == {"read": 4, "created": 0, "existing": 4, "rejected": 0, "rejects": None}


BAD = HEADER + (
    "Good,Sales,,,\n"
    ",Sales,,,\n"
    "No Department,,,,\n"
    "Bad Mail,Sales,,nobody,\n"
    "Bad Day,Sales,,,1.2.2020\n"
    "Short,Sales\n"
    '"Unclosed,Sales,,,\n'
    f"{'x' * 256},Sales,,,\n"
    "Refused,Sales,forbidden,,\n"
    "Good too,Sales,,,\n"
)


def test_bad_rows_are_rejected_and_the_others_stored(
    runner: FlaskCliRunner, folder: Path, app: Flask
) -> None:
    """Each with its line and the reason, also what only the database refuses."""
    with app.app_context():
        db.session.execute(text("ALTER TABLE employee ADD CHECK (title <> 'forbidden')"))
        db.session.commit()
    try:
        result = import_text(runner, folder, BAD)
    finally:
        with app.app_context():
            db.session.execute(text("ALTER TABLE employee DROP CONSTRAINT employee_title_check"))
            db.session.commit()

    assert result.exit_code == 0
    assert "Read 10, created 2, existing 0, rejected 8; " in result.stdout
    assert "The rejected rows are in people.csv.rejects.csv" in result.stdout
    rows = rejects(folder)
    assert [(row["line"], row["reason"].partition(":")[0]) for row in rows] == [
        ("3", "name"),
        ("4", "department"),
        ("5", "email"),
        ("6", "hired_on"),
        ("7", "2 cells under a header of 5"),
        ("8", "not CSV"),
        ("9", "name"),
        ("10", "the database refuses it (SQLSTATE 23514)"),
    ]
    assert rows[2]["name"] == "Bad Mail"
    assert rows[5]["name"] == '"Unclosed,Sales,,,\n'


def test_a_row_that_a_trigger_discards_is_rejected(
    runner: FlaskCliRunner, folder: Path, app: Flask, client: FlaskClient
) -> None:
    """And a single one is a conflict over HTTP; the others of the file are stored."""
    with app.app_context():
        db.session.execute(
            text(
                "CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql"
                " AS 'BEGIN RETURN NULL; END';"
                "CREATE TRIGGER discard BEFORE INSERT ON employee FOR EACH ROW"
                " WHEN (NEW.name = 'Nobody') EXECUTE FUNCTION discard()"
            )
        )
        db.session.commit()
    try:
        result = import_text(runner, folder, HEADER + "Ann,S,,,\nNobody,S,,,\nBob,S,,,\n")
        answer = client.post("/api/v1/employees", json={"name": "Nobody", "department": "S"})
    finally:
        with app.app_context():
            db.session.execute(text("DROP FUNCTION discard() CASCADE"))
            db.session.commit()
    assert "Read 3, created 2, existing 0, rejected 1" in result.stdout
    assert rejects(folder)[0]["reason"] == "the database refuses it (a trigger discards it)"
    assert (answer.status_code, answer.get_json()["code"]) == (409, "conflict")


def test_what_was_rejected_can_be_mended_and_imported(runner: FlaskCliRunner, folder: Path) -> None:
    """The file of rejected rows is one to import; its two further columns are ignored."""
    import_text(runner, folder, HEADER + "Ann,,Chief,,\n")
    mended = (folder / "people.csv.rejects.csv").read_text("utf-8").replace("Ann,,", "Ann,Sales,")
    again = import_text(runner, folder, mended)
    assert "created 1, existing 0, rejected 0" in again.stdout
    assert "ignored columns: line, reason" in again.stderr
    assert not (folder / "people.csv.rejects.csv").exists()


def test_standard_input_and_options(runner: FlaskCliRunner, folder: Path) -> None:
    """An encoding, a delimiter and a place for the rejects that are given."""
    content = "name\tdepartment\nJ\u00fcrgen\tSales\n\tSales\n".encode("cp850")
    options = ["--encoding", "cp850", "--delimiter", "tab", "--rejects", "bad.csv"]
    result = runner.invoke(args=["employees", "import", "-", *options], input=content)
    assert "created 1, existing 0, rejected 1" in result.stdout, result.stderr
    assert "The rejected rows are in bad.csv" in result.stdout
    result = runner.invoke(args=["employees", "import", "-"], input=b"name,department\n,x\n")
    assert "The rejected rows are in rejects.csv" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoding", "utf-99"], "Python knows no text encoding of this name"),
        (["--encoding", "hex"], "Python knows no text encoding of this name"),
        (["--delimiter", ";;"], "must be one character, or tab"),
        (["--delimiter", '"'], "must be one character, or tab"),
        (["--rejects", "no/such/folder.csv"], "there is no folder no/such"),
        (["--rejects", "people.csv"], "people.csv is being read"),
        (["--delimiter", ";"], "people.csv: its first line names no column name and no department"),
    ],
)
def test_a_wrong_option_stops_it_before_anything_is_read(
    runner: FlaskCliRunner, folder: Path, app: Flask, options: list[str], message: str
) -> None:
    """With one line that says which."""
    result = import_text(runner, folder, GOOD, *options)
    assert result.exit_code not in (0, None)
    assert message in result.stderr
    with app.app_context():
        assert count(Employee) == 0


def test_a_file_that_is_not_there_is_said_so(runner: FlaskCliRunner) -> None:
    """By the command's own check of its argument."""
    result = runner.invoke(args=["employees", "import", "missing.csv"])
    assert result.exit_code == 2
    assert "missing.csv" in result.stderr


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_database_that_cannot_be_brought_up_is_said_so(
    make_app: Callable[..., Flask], command: str, folder: Path
) -> None:
    """With the line of the bootstrap."""
    (folder / "people.csv").write_text(GOOD, "utf-8")
    runner = make_app("postgresql://nobody@127.0.0.1:1/none").test_cli_runner()
    result = runner.invoke(args=["employees", command, "people.csv"])
    assert result.exit_code == 1
    assert "127.0.0.1" in result.stderr
    assert "Traceback" not in result.stderr


def numbered(count: int) -> str:
    rows = (f"Person {number},Department {number % 7},,,\n" for number in range(count))
    return HEADER + "".join(rows)


def fail_at_third(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], object]) -> None:
    """Have the third part of an import end otherwise than by being stored."""
    real, calls = directory.create_employees, []

    def create(items: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 3:
            fail()
        return real(items)

    monkeypatch.setattr("app.directory.create_employees", create)


def test_a_fault_that_is_no_rows_stops_it_and_a_second_run_goes_on(
    runner: FlaskCliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database goes away in the middle: what was stored is counted, and nobody is rejected."""
    fail_at_third(monkeypatch, lambda: db.session.execute(text("SELECT 1/0 FROM pg_sleep(0)")))
    monkeypatch.setattr("app.transfer.REFUSALS", frozenset())
    result = import_text(runner, folder, numbered(2500))
    assert result.exit_code == 1
    assert "Read 2000, created 2000, existing 0, rejected 0" in result.stdout
    assert "Run it again to go on. What the summary counts is stored." in result.stderr

    monkeypatch.undo()
    monkeypatch.chdir(folder)
    again = import_text(runner, folder, numbered(2500))
    assert "Read 2500, created 500, existing 2000, rejected 0" in again.stdout


def test_a_file_that_cannot_be_read_to_its_end_is_stored_as_far_as_it_can(
    runner: FlaskCliRunner, folder: Path, app: Flask
) -> None:
    """And it is no use to run that one again."""
    content = numbered(1500).encode("utf-16") + b"\x00"
    (folder / "people.csv").write_bytes(content)
    result = runner.invoke(args=["employees", "import", "people.csv"])
    assert result.exit_code == 1
    assert "Read 1500, created 1500" in result.stdout
    assert "after line 1501 it is not utf-16" in result.stderr
    assert "again" not in result.stderr


def test_rejects_may_go_to_a_device(runner: FlaskCliRunner, folder: Path) -> None:
    """Which is there afterwards, as is one that an export goes to."""
    result = import_text(runner, folder, HEADER + ",S,,,\n", "--rejects", "/dev/null")
    assert "rejected 1" in result.stdout
    assert runner.invoke(args=["employees", "export", "/dev/null"]).exit_code == 0
    assert Path("/dev/null").is_char_device()


def test_an_export_has_everybody(runner: FlaskCliRunner, app: Flask) -> None:
    """Also who has no department that can be named, as legacy tables have them."""
    with app.app_context():
        db.session.execute(text("SET LOCAL session_replication_role = replica"))
        db.session.execute(text("INSERT INTO employee (name, department_id) VALUES ('Lost', 99)"))
        db.session.commit()
    assert "Lost,,,," in runner.invoke(args=["employees", "export"]).stdout


def test_ctrl_c_stops_it_with_a_summary(
    runner: FlaskCliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was stored is counted, and the exit status is that of shells."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    fail_at_third(monkeypatch, interrupt)
    result = import_text(runner, folder, numbered(2500))
    assert result.exit_code == 130
    assert "Read 2000, created 2000" in result.stdout
    assert "Stopped. What the summary counts is stored." in result.stderr


def test_it_can_be_stopped_at_any_time_and_run_again(
    database_url: str, app: Flask, folder: Path
) -> None:
    """Whole parts are stored, and no part of one; the second run has the rest to do."""
    (folder / "people.csv").write_text(numbered(4_000), "utf-8")
    with app.app_context():
        with inserts_held(db.engine, "employee", "NEW.name = 'Person 2500'") as gate:
            process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("flask")),
                    "employees",
                    "import",
                    f"{folder}/people.csv",
                ],
                cwd=ROOT,
                env={**os.environ, "DATABASE_URL": database_url},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            gate.wait_for(1)
            process.kill()
            process.wait()
            gate.open()
        assert count(Employee) == 2_000

    again = flask("employees", "import", f"{folder}/people.csv", DATABASE_URL=database_url)
    assert "created 2000, existing 2000, rejected 0" in again.stdout


def test_progress_is_shown_in_lines_where_there_is_no_terminal(
    runner: FlaskCliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then, on standard error."""
    monkeypatch.setattr("app.cli.long_work.PROGRESS_EVERY", 0.0)
    result = import_text(runner, folder, numbered(1500))
    assert "read 1000, created 1000, existing 0, rejected 0 so far" in result.stderr
    assert "exported 1000 so far" in runner.invoke(args=["employees", "export"]).stderr


def test_progress_is_a_bar_on_a_terminal(app: Flask, folder: Path) -> None:
    """With the rows that were read."""
    (folder / "people.csv").write_text(numbered(1500), "utf-8")
    status, shown = on_a_terminal(app, "employees", "import", "people.csv")
    assert status == 0
    assert "100%" in shown
    assert "1500 rows, 0 rejected" in shown


def test_memory_does_not_grow_with_the_file(database_url: str, folder: Path) -> None:
    """Many times the rows need no more of it."""

    def peak(rows: int) -> int:
        (folder / "people.csv").write_text(numbered(rows), "utf-8")
        process = psutil.Popen(
            [sys.executable, "-c", PEAK, f"{folder}/people.csv"],
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": database_url},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return int(process.communicate(timeout=60)[0].split()[-1])

    few, many = peak(2_000), peak(15_000)
    assert many < few * 1.1


PEAK = """
import resource, sys
from wsgi import app
app.test_cli_runner().invoke(args=["employees", "import", sys.argv[1]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_an_export_has_the_columns_of_an_import(
    runner: FlaskCliRunner, folder: Path, app: Flask, database_url: str
) -> None:
    """To standard output or to a file, without duplicates; importing it again gives the same."""
    import_text(runner, folder, GOOD)
    with app.app_context():
        db.session.execute(text("INSERT INTO department (name, duplicate_of_id) VALUES ('S ', 1)"))
        db.session.execute(text("UPDATE employee SET department_id = 3 WHERE name = 'Bob'"))
        db.session.execute(
            text("INSERT INTO employee (name, department_id, duplicate_of_id) VALUES ('B', 1, 2)")
        )
        db.session.commit()
    result = runner.invoke(args=["employees", "export"])
    assert result.exit_code == 0
    assert result.stdout == HEADER + (
        "Ann Lee,Sales,Chief,ann@example.org,2020-02-01\nBob,Sales,,,\nAnn Lee,Research,,,\n"
    )
    assert "Exported 3 employees." in result.stderr

    to_file = runner.invoke(args=["employees", "export", "out.csv", "--delimiter", "'"])
    assert (to_file.exit_code, to_file.stdout) == (0, "")
    assert (folder / "out.csv").read_text("utf-8").startswith("name'department'title")
    empty(database_url)
    assert "created 3" in import_text(runner, folder, result.stdout).stdout
    assert runner.invoke(args=["employees", "export"]).stdout == result.stdout


def test_an_export_that_fails_leaves_no_file(
    runner: FlaskCliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a part of one, nor does it touch the one that was there."""
    (folder / "out.csv").write_text("before", "utf-8")
    monkeypatch.setattr("app.transfer._employees", lambda: text("SELECT 1/0"))
    result = runner.invoke(args=["employees", "export", "out.csv"])
    assert result.exit_code == 1
    assert "division by zero" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["out.csv"]
    assert (folder / "out.csv").read_text("utf-8") == "before"


names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=st.lists(st.tuples(names, names, names), max_size=5))
def test_what_is_imported_is_exported(
    app: Flask, database_url: str, rows: list[tuple[str, str, str]]
) -> None:
    """Whatever the names are, quotes and delimiters among them."""
    empty(database_url)
    written = io.StringIO()
    csv.writer(written).writerows([("name", "department", "title"), *rows])
    runner = app.test_cli_runner()
    runner.invoke(args=["employees", "import", "-"], input=written.getvalue().encode())
    out = runner.invoke(args=["employees", "export"]).stdout
    runner.invoke(args=["employees", "import", "-"], input=out.encode())
    assert runner.invoke(args=["employees", "export"]).stdout == out
    with app.app_context():
        assert count(Employee) == len(list(csv.reader(io.StringIO(out)))) - 1
