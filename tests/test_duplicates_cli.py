"""`flask duplicates`: says what there is and what to do next, and fails with one line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskCliRunner
from sqlalchemy import Engine, NullPool, create_engine

from app.cli.long_work import interruptible
from migrations_bootstrap import upgrade
from tests.conftest import execute, waits
from tests.legacy import LegacyRows
from tests.measuring import MEASURING
from tests.races import eventually
from tests.test_cli import FLASK, ROOT, flask, on_a_terminal

Made = tuple[str, LegacyRows]


@pytest.fixture
def runner(make_app: Callable[..., Flask], legacy_database: Made) -> FlaskCliRunner:
    """What runs commands on a legacy database that was adopted."""
    return make_app(legacy_database[0]).test_cli_runner()


@pytest.fixture
def own_runner(make_app: Callable[..., Flask], fresh_database: str) -> FlaskCliRunner:
    """What runs commands on a database of the test's own, with our tables."""
    upgrade(fresh_database)
    return make_app(fresh_database).test_cli_runner()


def report(runner: FlaskCliRunner, *arguments: str) -> str:
    """Return what the command prints."""
    result = runner.invoke(args=["duplicates", "report", *arguments])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    printed: str = result.stdout
    return printed


def report_json(runner: FlaskCliRunner, *arguments: str) -> Any:
    return json.loads(report(runner, "--json", *arguments))


def test_the_report_is_a_table_for_people(runner: FlaskCliRunner) -> None:
    """A summary and the largest groups of each table, and what to do next; no colours."""
    printed = report(runner)
    assert "department: 7 rows, 2 groups of duplicates, 2 redundant rows.\n" in printed
    assert "employee: 370 rows, 60 groups of duplicates, 70 redundant rows.\n" in printed
    assert "Homonyms: 10 groups that may be different people.\n" in printed
    assert "rows by ticket.employee_id.\n" in printed
    assert "The largest groups, 10 of 60:\n" in printed
    assert re.search(r" 6 +oldest +306, 307 +name='Ada Floyd' department_id=1 ", printed)
    assert printed.endswith(
        "Next: look at the 10 groups of homonyms (--csv has them all),"
        " then run flask duplicates guard, which stops at them.\n"
    )
    assert "\x1b" not in printed


def test_how_many_groups_are_shown_can_be_said(runner: FlaskCliRunner) -> None:
    """Of one table, or of all; --all shows every one."""
    assert "The largest groups, 3 of 60:" in report(runner, "--limit", "3")
    none = report(runner, "--limit", "0", "--table", "department")
    assert "largest" not in none
    assert "employee: " not in none
    everything = report(runner, "--all", "--table", "employee")
    assert everything.count("oldest") == 60
    assert "department: " not in everything


def test_the_report_can_be_read_by_a_script(runner: FlaskCliRunner, legacy_database: Made) -> None:
    """An object by table, with the counts and the largest groups; all of them with --all."""
    made = legacy_database[1]
    printed = report_json(runner, "--keep", "most-complete")
    assert list(printed) == ["department", "employee"]
    for table, counted in printed.items():
        assert counted["rows"] == made.rows[table]
        assert counted["groups"] == made.groups[table]
        assert counted["redundant"] == made.redundant[table]
        assert counted["homonyms"] == made.homonyms[table]
        assert (counted["marked"], counted["keep"]) == (0, "most-complete")
        assert len(counted["largest"]) == min(10, counted["groups"])
    assert printed["employee"]["references"].keys() == {"employee.manager_id", "ticket.employee_id"}
    everything = report_json(runner, "--all", "--table", "employee")["employee"]["largest"]
    assert len(everything) == 60
    assert everything[0] == {
        "kept": 6,
        "why": "oldest",
        "duplicates": [306, 307],
        "marked": [],
        "key": {"name": "Ada Floyd", "department_id": 1},
        "homonyms": [],
        "references": {"6": {"ticket.employee_id": 2}, "306": {"ticket.employee_id": 2}},
    }


def test_the_report_can_be_read_by_a_spreadsheet(runner: FlaskCliRunner) -> None:
    """A line for each row of each group, in the order of the groups."""
    lines = list(csv.DictReader(io.StringIO(report(runner, "--csv"))))
    assert len(lines) == 4 + 60 + 70
    assert lines[2] == {
        "table": "department",
        "group": "2",
        "id": "2",
        "state": "kept",
        "marked": "no",
        "name": "Sales",
        "department_id": "",
        "homonyms": "",
        "references": "66",
    }
    homonyms = [line for line in lines if line["homonyms"]]
    assert len(homonyms) == 20
    assert {line["homonyms"] for line in homonyms} == {"title"}
    triple = [line for line in lines if line["table"] == "employee" and line["group"] == "1"]
    assert [(line["id"], line["state"]) for line in triple] == [
        ("6", "kept"),
        ("306", "duplicate"),
        ("307", "duplicate"),
    ]


def test_csv_goes_alone(runner: FlaskCliRunner) -> None:
    """Which is said, with the usage."""
    for other in ("--json", "--near"):
        result = runner.invoke(args=["duplicates", "report", "--csv", other])
        assert result.exit_code == 2
        assert "--csv goes neither with --json nor with --near." in result.stderr


def test_near_duplicates_are_suggested(own_runner: FlaskCliRunner, fresh_database: str) -> None:
    """With a score, both rows and the reasons; in a table and as JSON, where they are wanted."""
    execute(
        fresh_database,
        "INSERT INTO department (name) VALUES ('Sales')",
        "INSERT INTO employee (department_id, name) VALUES (1, 'Ann Lee'), (1, 'Lee, Ann')",
    )
    printed = report(own_runner, "--near")
    assert "Rows of employee that may be one record, for a person to judge:" in printed
    assert re.search(r" 99 +1 +name='Ann Lee' department_id=1 +word order ", printed)
    assert re.search(r" 99 +2 +name='Lee, Ann' department_id=1 ", printed)
    assert "No near duplicates among 1 key of department." in printed
    assert printed.endswith("No duplicates: there is nothing to do.\n")
    near = report_json(own_runner, "--near")["employee"]["near"]
    assert near == {
        "compared": 2,
        "incomplete": 0,
        "pairs": [
            {
                "score": 99,
                "reasons": ["word order"],
                "ids": [1, 2],
                "keys": [
                    {"name": "Ann Lee", "department_id": 1},
                    {"name": "Lee, Ann", "department_id": 1},
                ],
            }
        ],
    }
    assert "near" not in report_json(own_runner)["employee"]


def test_it_says_where_not_all_was_compared(
    own_runner: FlaskCliRunner, fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suggestions may be missing then."""
    monkeypatch.setattr("app.duplicates.near.MOST_ROWS", 1)
    execute(fresh_database, "INSERT INTO department (name) VALUES ('Sales'), ('SALES')")
    printed = report(own_runner, "--near", "--table", "department")
    assert "No near duplicates among 2 keys of department.\n" in printed
    assert "Not all is compared: 1 set of similar keys had too many.\n" in printed


def test_it_says_what_is_marked_and_what_to_do_next(
    own_runner: FlaskCliRunner, fresh_database: str
) -> None:
    """Guard first, then merge."""
    execute(
        fresh_database, "INSERT INTO department (name) SELECT 'Sales' FROM generate_series(1, 30)"
    )
    printed = report(own_runner)
    assert "30 rows, 1 group of duplicates, 29 redundant rows.\n" in printed
    assert ", 20, 21 and 9 more " in printed
    assert printed.endswith(
        "Next: run flask duplicates guard, so that no more can come; it merges nothing.\n"
    )
    execute(fresh_database, "UPDATE department SET duplicate_of_id = 1 WHERE id > 1")
    printed = report(own_runner)
    assert "29 redundant rows, 29 of them marked and not merged yet.\n" in printed
    assert " has duplicates " in printed
    assert printed.endswith("Next: run flask duplicates merge.\n")
    lines = list(csv.DictReader(io.StringIO(report(own_runner, "--csv"))))
    assert [line["marked"] for line in lines] == ["no"] + ["yes"] * 29


def test_names_are_shown_in_full_and_as_they_are(
    own_runner: FlaskCliRunner, fresh_database: str
) -> None:
    """Whatever their length, and whatever a terminal or a mark-up language would make of them."""
    names = ["[bold]x[/] :smile: " + "long " * 40 + "name", "a\x1b[31mb\u202e"]
    engine = create_engine(fresh_database)
    with engine.begin() as connection:
        for name in names * 2:
            connection.exec_driver_sql("INSERT INTO department (name) VALUES (%(n)s)", {"n": name})
    engine.dispose()
    printed = report(own_runner)
    for name in names:
        assert repr(name) in printed
    assert "\x1b" not in printed
    assert report_json(own_runner)["department"]["largest"][1]["key"]["name"] == names[1]


def test_the_report_of_a_database_that_is_not_adopted_is_one_line(
    make_app: Callable[..., Flask], fresh_database: str
) -> None:
    """Which says what to do; nothing is printed as if it were a report."""
    runner = make_app(fresh_database).test_cli_runner()
    result = runner.invoke(args=["duplicates", "report", "--json"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: there is no table department: run flask init-db first\n"


def test_the_report_of_a_database_that_cannot_be_reached_is_one_line(
    make_app: Callable[..., Flask], empty_database: str
) -> None:
    """Nobody listens there, or there is no such database."""
    for url, said in (
        ("postgresql://u:secret@127.0.0.1:1/d", "Error: the database is away\n"),
        (empty_database, "does not exist\n"),
    ):
        result = make_app(url).test_cli_runner().invoke(args=["duplicates", "report"])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("Error: ")
        assert result.stderr.endswith(said)
        assert result.stderr.count("\n") == 1


def test_progress_is_shown_in_lines_where_there_is_no_terminal(
    runner: FlaskCliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now and then, on standard error, so that standard output stays what it is."""
    monkeypatch.setattr("app.cli.long_work.PROGRESS_EVERY", 0.0)
    for arguments in (["--json", "--near"], ["--csv"], ["--near"]):
        result = runner.invoke(args=["duplicates", "report", *arguments])
        assert re.search(r"^employee: reading, \d+ s$", result.stderr, re.MULTILINE)
        assert re.search(r"^employee: 60 groups so far, \d+ s$", result.stderr, re.MULTILINE)
        assert "so far" not in result.stdout
    assert "employee: 300 rows compared so far, " in result.stderr


def test_progress_is_shown_in_place_on_a_terminal(
    make_app: Callable[..., Flask], legacy_database: Made
) -> None:
    """And is gone when the report comes, which is as wide as the terminal."""
    app = make_app(legacy_database[0])
    status, shown = on_a_terminal(app, "duplicates", "report", COLUMNS="60")
    assert status == 0
    assert re.match(r"(\r\x1b\[K[\w: ]+, \d+ s)+\r\x1b\[Kdepartment: 7 rows, ", shown)
    assert "Next: look at the 10 groups of homonyms" in shown
    table = [line for line in shown.splitlines() if " oldest " in line]
    assert len(table) == 12
    assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= 60 for line in table)


@contextmanager
def report_that_waits(url: str) -> Iterator[tuple[subprocess.Popen[str], Engine]]:
    """Yield a report that waits for a table, and an engine on its database."""
    engine = create_engine(url)
    with engine.connect() as other:
        other.exec_driver_sql("LOCK TABLE ticket IN ACCESS EXCLUSIVE MODE")
        process = subprocess.Popen(
            [FLASK, "duplicates", "report"],
            cwd=ROOT,
            env={**os.environ, **MEASURING, "DATABASE_URL": url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually(lambda: waits(engine) == 1)
        yield process, engine
        eventually(lambda: waits(engine) == 0)
    engine.dispose()


def test_ctrl_c_ends_it_while_the_server_works(legacy_database: Made) -> None:
    """At once, with the status of that, and the server stops, too."""
    with report_that_waits(legacy_database[0]) as (process, _):
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "Stopped.\n")
    assert stdout.startswith("department: ")


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_what_ctrl_c_does_is_put_back_and_left_alone_where_it_is_ignored(handler: Any) -> None:
    """As it is in a shell's background job, which the terminal's Ctrl-C is not for."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with interruptible(lambda: None):
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert ignored == (handler is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_what_the_other_threads_wait_for(legacy_database: Made) -> None:
    """Python interrupts its main thread alone; the others look whether it was."""
    engine = create_engine(legacy_database[0], poolclass=NullPool)
    ended = []

    def wait_for_a_lock() -> None:
        with engine.connect() as connection:
            try:
                connection.exec_driver_sql("SELECT pg_advisory_lock(7)")
            except KeyboardInterrupt:
                ended.append(True)

    thread = threading.Thread(target=wait_for_a_lock)

    def be_interrupted() -> None:
        with interruptible(lambda: None):
            thread.start()
            eventually(lambda: waits(engine) == 1)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with engine.connect() as holder:
            holder.exec_driver_sql("SELECT pg_advisory_lock(7)")
            with pytest.raises(KeyboardInterrupt):
                be_interrupted()
            thread.join(60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [True]
    eventually(lambda: waits(engine) == 0)


def test_the_database_has_the_word_when_it_ends_the_report(legacy_database: Made) -> None:
    """In one line, without the statement."""
    with report_that_waits(legacy_database[0]) as (process, engine):
        with engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted"
            )
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == "Error: FATAL: terminating connection due to administrator command\n"


def test_help_names_the_policies() -> None:
    """And needs no database."""
    outcome = flask("duplicates", "report", "--help", DATABASE_URL="postgresql://u@127.0.0.1:1/d")
    assert outcome.returncode == 0
    assert "[oldest|newest|most-referenced|most-complete]" in outcome.stdout
